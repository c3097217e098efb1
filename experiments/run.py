"""Run a plan of experiments into a folder and write its report.

    python -m experiments.run                                   # minutes, on the embedded checkpoint and data
    python -m experiments.run --plan report --model Qwen/Qwen2.5-0.5B-Instruct --data lotka_volterra_data.h5

A folder that holds the same run is continued; finished experiments are not run again.
"""

import argparse
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

from experiments import cli
from experiments.storage.files import RunError
from experiments.storage.interruption import Interrupted, Interruption
from experiments.storage.runfolder import open_run
from experiments.study import plans


def sequences(text: str) -> int | None:
    """A number of sequences, or None for "all"."""
    if text == "all":
        return None
    try:
        return positive(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'all'") from None


def budget(text: str) -> int:
    """A number of FLOPs such as 1e17."""
    try:
        return positive(int(float(text)))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of FLOPs of at least 1, such as 1e17") from None


def positive(number: int) -> int:
    """The number. Raises ValueError below 1."""
    if number < 1:
        raise ValueError(f"{number} is not positive")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--plan", choices=plans.PLANS, default="quick", help="which experiments (default %(default)s)")
    p.add_argument("--model", default="tiny", help="checkpoint: a folder, a hub id or the embedded tiny (default)")
    p.add_argument("--data", type=Path, help="HDF5 file with /trajectories and /time (default: simulated, seed 0)")
    cli.add_device(p)
    p.add_argument(
        "--sequences", type=sequences, metavar="N|all", help="evaluate the first N of each split (default all)"
    )
    p.add_argument(
        "--decoding", choices=("constrained", "free"), default="constrained", help="of forecasts: to well-formed "
        "numbers (default), or raw argmax as in the report",
    )  # fmt: skip
    p.add_argument(
        "--samples", type=int, default=20, help="paths that the last model draws for each sequence, 0 for none "
        "(default %(default)s)",
    )  # fmt: skip
    p.add_argument("--numeric-head", action="store_true", help="train with a softmax over the tokens of numbers only")
    p.add_argument(
        "--seed", type=int, default=0, help="of adapters, batches, samples and the GRU (default %(default)s)"
    )
    p.add_argument("--budget", type=budget, default=10**17, help="FLOPs of all training (default 1e17)")
    p.add_argument(
        "--convention", default="sheet", choices=("exact", "sheet", "report"),
        help="how the budget counts (default %(default)s, the strictest)",
    )  # fmt: skip
    p.add_argument("--out", type=Path, help="run folder (default runs/PLAN)")
    return p


def read_data(args: argparse.Namespace):
    """The trajectories (N, T, 2) in populations, their split, and the encoding that the training part gives.

    Raises DataError for trajectories that are too short, or too large for the encoding.
    """
    from experiments.forecasting.encoding import Encoding
    from experiments.forecasting.grammar import SCALED_LIMIT
    from experiments.study import data

    trajectories = (data.read(args.data) if args.data else data.simulate()).trajectories
    if (num_steps := trajectories.shape[1]) < plans.CONTEXT_STEPS + plans.HORIZON:
        raise data.DataError(
            f"{args.data}: trajectories have {num_steps} time steps, expected at least "
            f"{plans.CONTEXT_STEPS} context + {plans.HORIZON} forecast steps"
        )
    parts = data.split(len(trajectories))
    encoding = Encoding.fit(trajectories[parts.train])
    if (largest := encoding.scaled(trajectories).max()) >= SCALED_LIMIT - 0.5:
        raise data.DataError(
            f"{args.data}: a population is {largest:.4g} times the scale, {encoding.scale:g}, that the training "
            f"trajectories give; expected less than {SCALED_LIMIT:g}"
        )
    return trajectories, parts, encoding


def prepare(args: argparse.Namespace, stack: ExitStack, interruption: Interruption):
    """Read and check everything a run needs, then open its folder for as long as the stack is: (suite, whether it is
    continued).

    Raises an error that `cli.is_meant` for the user, before anything is written.
    """
    import hashlib
    import platform

    import torch

    import flops
    from experiments.forecasting.grammar import Grammar
    from experiments.forecasting.training import window_tensors
    from experiments.study.evaluation import most_positions
    from experiments.study.suite import Suite
    from qwen_min import load
    from qwen_min.weights import checkpoint_folder, checkpoint_hash

    for name in ("seed", "samples"):
        if getattr(args, name) < 0:
            raise cli.CommandError(f"--{name} is {getattr(args, name)}, expected 0 or more")
    device = cli.checked_device(args.device)
    plan = plans.PLANS[args.plan](args.seed)
    if args.numeric_head:
        plan = plans.with_numeric_head(plan)
    trajectories, parts, encoding = read_data(args)
    ids = {"train": parts.train, "val": parts.val[: args.sequences], "test": parts.test[: args.sequences]}
    folder = checkpoint_folder(args.model)
    model, tokenizer = load(folder, device, getattr(torch, args.dtype))
    series = {name: trajectories[rows] for name, rows in ids.items()}
    sample = [tokenizer.encode(encoding.encode(series["train"][0]))]
    grammar = Grammar(tokenizer, encoding.decimals, num_variables=2)
    lengths = [most_positions(grammar, encoding, plans.CONTEXT_STEPS, plans.LONG_HORIZON)]
    for experiment in plan.experiments:
        for training in plans.candidates(plan, experiment):
            window_tensors(sample, training, tokenizer.pad_id)  # refuses a context longer than a trajectory
            lengths.append(training.context)
    if max(lengths) > model.config.max_position_embeddings:
        raise cli.CommandError(
            f"{args.model}: has {model.config.max_position_embeddings} positions, plan {plan.name} needs {max(lengths)}"
        )
    identity = {
        "plan": args.plan,
        "experiments": plans.as_record(plan),
        "seed": args.seed,
        "sequences": args.sequences,
        "decoding": args.decoding,
        "samples": args.samples,
        "checkpoint_sha256": checkpoint_hash(folder),
        "data_sha256": hashlib.sha256(trajectories.tobytes()).hexdigest(),
        "encoding": {"scale": encoding.scale, "decimals": encoding.decimals},
        "convention": args.convention,
        "device": torch.device(device).type,
        "dtype": args.dtype,
    }
    record = {
        "command": shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]]),
        "model": args.model,
        "data": args.data.name if args.data else "simulated, seed 0",
        "parameters": sum(p.numel() for p in model.parameters()),
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "conventions": flops.CONVENTIONS,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    out = args.out or Path("runs") / args.plan
    continued = stack.enter_context(open_run(out, json_plain(identity), record))
    ledger = flops.Ledger(out / "ledger.jsonl", args.budget)
    suite = Suite(
        plan,
        out,
        model,
        tokenizer,
        encoding,
        series,
        ids,
        ledger,
        args.convention,
        checkpoint=(args.model, identity["checkpoint_sha256"]),
        decoding=args.decoding,
        samples=args.samples,
        seed=args.seed,
        interruption=interruption,
    )
    return suite, continued


def json_plain(value):
    """The value as JSON would give it back: tuples become lists."""
    import json

    return json.loads(json.dumps(value))


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when the plan is finished, 1 when it ended early (budget, loss, disk, memory), 2 when it could not
    begin (bad input, no place to write), and 128 + the signal's number when it was asked to stop."""
    args = parser().parse_args(argv)
    resume = shlex.join(["python", "-m", "experiments.run", *(sys.argv[1:] if argv is None else argv)])

    def work_in(interruption: Interruption) -> int:
        with ExitStack() as stack:
            return work(args, stack, interruption)

    return cli.exit_status(work_in, resume)


def work(args: argparse.Namespace, stack: ExitStack, interruption: Interruption) -> int:
    """`main` without its handling of signals and of input that cannot be used."""
    suite, continued = prepare(args, stack, interruption)
    import flops  # after parsing: --help need not wait for torch
    from experiments.forecasting.training import TrainingError
    from experiments.report.build import write_report
    from experiments.study.evaluation import ForecastError

    if continued:
        print(f"continuing {suite.folder}")
    if warning := suite.budget_warning():
        print(f"warning: {warning}", file=sys.stderr)
    stopped = None
    try:
        suite.write_status(None)  # what stopped an earlier process, and its budget, are no longer true
        try:
            with cli.memory_errors():
                suite.run()
        except Interrupted as error:
            suite.write_status(f"Stopped by {error}.")
            raise
        except (flops.BudgetExceeded, flops.LedgerError, TrainingError, ForecastError, MemoryError) as error:
            stopped = str(error)
            print(f"stopped: {stopped}", file=sys.stderr)
        suite.write_status(stopped)
        page = write_report(suite.folder)
    except (RunError, OSError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    spent, budget = suite.ledger.spent, suite.ledger.budget
    print(f"spent {spent:.3e} of {budget:.3e} FLOPs ({spent / budget:.2%}, {suite.convention})")
    print(f"report: {page}")
    return 1 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
