"""Several processes that train together: what torchrun started, on torch.distributed (gloo on CPUs, nccl on GPUs).

All run the same program. They share out the rows of each batch and add up their gradients; the rest each of them does
alone, so all know the same. The first one leads: it works in the folder of the run, the others in copies of it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

# a process may wait for another one as long as an experiment lasts; torchrun notices processes that died
TIMEOUT = timedelta(days=30)


class PeerLost(ValueError):
    """Another process of the job ended, so this one cannot go on."""


@dataclass(frozen=True)
class Team:
    """The processes that train together, numbered by `rank` from 0, which leads: its files and messages are the run's.

    Methods that communicate must be called by all of them, in the same order. They raise PeerLost when one has ended.
    """

    rank: int = 0
    size: int = 1

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, which is the same to the last bit in all of them."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:  # as it comes when a process has ended
            raise PeerLost("another process of this job ended; see its message, then repeat the command") from error
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def same(self, value: float) -> float:
        """The value that the leading process has. Elsewhere it may be rounded otherwise, and decide otherwise."""
        given = torch.tensor(0.0 if self.rank else value, dtype=torch.float64)
        self.add_up([given])
        return given.item()


ALONE = Team()


@contextmanager
def joined(device: str, folder: Path) -> Iterator[tuple[Team, str, Path]]:
    """The processes that torchrun started, the device of this one for --device, and its folder of the run.

    Of several GPUs, `cuda` is the one with the number of the process. What the other processes print is not shown.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device, folder
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # An optimizer imports this module, whose default arguments are the group. If that came later, the group would
    # outlive its end here, with threads that abort the process while Python ends.
    import_module("torch.distributed.nn")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    try:
        with ExitStack() as stack:
            team = Team(dist.get_rank(), dist.get_world_size())
            if team.rank:
                original, folder = folder, Path(stack.enter_context(tempfile.TemporaryDirectory())) / folder.name
                if (original / "plan.json").exists():
                    shutil.copytree(original, folder)
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            team.same(0)  # the copies are made before the leading process writes
            yield team, device, folder
    finally:
        dist.destroy_process_group()
