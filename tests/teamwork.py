"""What test_team.py and faults.py run under torchrun, as a script: `train` or `run`, with arguments."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def train(folder: str) -> int:
    """Train a small fp64 model on the rows of unequal length; each process writes its losses and adapter."""
    from conftest import GROUPED, random_model
    from experiments.training.loop import Account
    from experiments.training.loop import train as train_on
    from experiments.training.settings import Training
    from experiments.training.team import joined
    from experiments.training.windows import Cuts, TextWindows
    from lora import LoraConfig, adapter_parameters, inject

    torch.set_num_threads(1)
    with joined("cpu") as (team, _):
        model = random_model(GROUPED).double()
        torch.manual_seed(0)
        inject(model, LoraConfig(4, 4))
        model.double()
        ids = torch.randint(0, GROUPED.vocab_size, (9, 24), generator=torch.Generator().manual_seed(1))
        lengths = torch.tensor([24, 11, 24, 7, 24, 24, 18, 24, 3])
        settings = Training(4, 1e-2, 24, 6, batch=3, accumulate=1, clip=0.5)
        state = Path(folder) / f"state-{team.size}"
        cuts = Cuts([range(9)], lambda _, row: ids[row, : lengths[row]].tolist())
        done = train_on(TextWindows(model, cuts, 24, 0), settings, Account(team=team), state)
        tensors = {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}
        tensors["losses"] = torch.tensor(done.losses, dtype=torch.float64)
        save_file(tensors, Path(folder) / f"{team.size}-{team.rank}.safetensors")
    return 0


def run(*arguments: str) -> int:
    """`experiments.run` on the small plan of the tests."""
    import small_plan
    from experiments import run

    torch.set_num_threads(1)
    small_plan.install()
    return run.main(list(arguments))


if __name__ == "__main__":
    sys.exit({"train": train, "run": run}[sys.argv[1]](*sys.argv[2:]))
