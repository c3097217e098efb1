"""Run a plan of experiments into a folder and write its report.

    python -m experiments.run                                   # minutes, on the embedded checkpoint and data
    python -m experiments.run --plan study --model Qwen/Qwen2.5-0.5B-Instruct --data lotka_volterra_data.h5

A folder that holds the same run is continued; finished experiments are not run again.
"""

import argparse
import hashlib
import json
import platform
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.storage.interruption import Interrupted, Interruption
from experiments.storage.runfolder import open_run
from experiments.study import plans

if TYPE_CHECKING:  # --help need not wait for torch
    from experiments.study.evaluation import Judge
    from experiments.study.suite import Suite


def options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("--plan", choices=plans.PLANS, default="quick", help="which experiments to run (default %(default)s)")
    add("--model", help="checkpoint: a folder, a hub id or an embedded one, tiny (default) or numbers (default of the "
        "plan numbers)")  # fmt: skip
    add("--data", type=Path, help="HDF5 file with /trajectories and /time (default: simulated, seed 0)")
    cli.add_device(p)
    add("--sequences", type=cli.positive, help="evaluate the first so many of each split (default: all)")
    add("--decoding", choices=("constrained", "free"), default="constrained", help="how forecasts are decoded: "
        "constrained to well-formed numbers (default), or free, by raw argmax, as in the study")  # fmt: skip
    add("--samples", type=cli.natural, default=20, help="paths that the last model draws for each sequence, 0 or at "
        "least 9 (default %(default)s)")  # fmt: skip
    add("--numeric-head", action="store_true", help="train with a softmax over the tokens of numbers only")
    add("--seed", type=cli.natural, default=0, help="seed of adapters, batches, samples and the GRU (default 0)")
    add("--budget", type=cli.flops, default=10**17, help="FLOPs that all trainings may cost together (default 1e17)")
    add("--convention", choices=("exact", "study", "published"), default="study", help="how FLOPs are counted (default "
        "%(default)s, the strictest)")  # fmt: skip
    add("--out", type=Path, help="run folder (default runs/PLAN); all processes must see it")


def read_data(path: Path | None):
    """Return the trajectories (N, T, 2) in populations, their split, and the encoding fitted to the training part.

    Raises DataError for trajectories that are too short, or too large for the encoding.
    """
    from experiments.forecasting.encoding import SCALED_LIMIT, Encoding
    from experiments.study import data

    trajectories = data.read(path) if path else data.simulate()
    if (num_steps := trajectories.shape[1]) < plans.CONTEXT_STEPS + plans.HORIZON:
        raise data.DataError(
            f"{path}: trajectories have {num_steps} time steps, expected at least "
            f"{plans.CONTEXT_STEPS} context + {plans.HORIZON} forecast steps"
        )
    parts = data.split(len(trajectories))
    encoding = Encoding.fit(trajectories[parts.train])
    if (largest := encoding.scaled(trajectories).max()) >= SCALED_LIMIT - 0.5:
        raise data.DataError(
            f"{path}: a population is {largest:.4g} times the scale of the training trajectories, "
            f"{encoding.scale:g}; expected less than {SCALED_LIMIT:g}"
        )
    return trajectories, parts, encoding


def check_inputs(args: argparse.Namespace, device: str) -> tuple[plans.Plan, "Judge", dict, dict]:
    """Read and check everything that a run needs, with the model on the device, and `described`. Write nothing.

    Raises an error that `cli.is_meant` for the user.
    """
    from experiments.forecasting import scores
    from experiments.forecasting.adapter import embedded_or, reads_values
    from experiments.forecasting.grammar import Grammar
    from experiments.study.evaluation import Judge
    from qwen_min import load
    from qwen_min.weights import TINY

    cli.checked_device(device)
    if args.samples:
        scores.require_samples(scores.QUANTILES, args.samples)
    plan = plans.PLANS[args.plan](args.seed)
    if args.numeric_head:
        plan = plans.with_numeric_head(plan)
    trajectories, parts, encoding = read_data(args.data)
    ids = {"train": parts.train, "val": parts.val[: args.sequences], "test": parts.test[: args.sequences]}
    args.model = args.model or ("tiny" if plan.texts else "numbers")
    folder = embedded_or(args.model)
    if reads_values(folder) == bool(plan.texts):
        wanted = "writes text" if plan.texts else "reads values"
        raise cli.CommandError(f"{args.model}: plan {plan.name} is for a model that {wanted}; choose another --model")
    writer = folder if plan.texts else TINY  # the judge encodes the series for it, whatever is trained
    model, tokenizer = load(writer, device, cli.chosen_dtype(args.dtype, device))
    # tokens of a context and a forecast of two variables, with values up to 99; windows of trainings have fewer
    forecast = Grammar(tokenizer, encoding.decimals, 2).columns(plans.LONG_HORIZON * 2)
    needed = plans.CONTEXT_STEPS * (encoding.tokens_per_step(2) + 2) + 1 + forecast
    if needed > (positions := model.config.max_position_embeddings):
        raise cli.CommandError(
            f"{args.model}: has {positions} positions, plan {plan.name} needs {needed}; choose another --model or "
            "--plan"
        )
    series = {name: trajectories[rows] for name, rows in ids.items()}
    numbers = "numbers" if plan.texts else args.model
    judge = Judge(model, tokenizer, encoding, series, ids, args.decoding, args.samples, args.seed, numbers)
    data_sha256 = hashlib.sha256(repr(trajectories.shape).encode() + trajectories.tobytes()).hexdigest()
    return plan, judge, *described(args, plan, judge, folder, data_sha256)


def described(
    args: argparse.Namespace, plan: plans.Plan, judge: "Judge", folder: Path, data_sha256: str
) -> tuple[dict, dict]:
    """What plan.json holds: all that decides the results of a run, as JSON can hold it; how and where it began."""
    import torch

    import flops
    from experiments.forecasting import Forecaster
    from experiments.forecasting.adapter import checkpoint_hash, embedded_or
    from experiments.training.loop import software

    numbers = checkpoint_hash(embedded_or(judge.numbers)) if len(plan.texts) < len(plan.experiments) else None
    identity = {
        "plan": args.plan,
        "seed": args.seed,
        "experiments": [asdict(experiment) for experiment in plan.experiments],
        "sequences": args.sequences,
        "chosen_on": plan.chosen_on,
        "decoding": args.decoding,
        "samples": args.samples,
        "checkpoint_sha256": checkpoint_hash(folder),
        "numbers_sha256": numbers,
        "data_sha256": data_sha256,
        "encoding": {"scale": judge.encoding.scale, "decimals": judge.encoding.decimals},
        "convention": args.convention,
        "device": torch.device(args.device).type,
        "dtype": args.dtype,
    }
    model = judge.model if plan.texts else Forecaster.load(judge.numbers).model
    cuda = args.device.startswith("cuda")
    record = {
        "command": cli.command_line("experiments.run"),
        "model": args.model,
        "data": args.data.name if args.data else "simulated, seed 0",
        "parameters": sum(p.numel() for p in model.parameters()),
        "device_name": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
        "conventions": flops.CONVENTIONS,
        "threads": torch.get_num_threads(),
        "versions": software(),
    }
    return json.loads(json.dumps(identity)), record  # tuples become lists, as they are when the file is read again


def work(args: argparse.Namespace, interruption: Interruption) -> int:
    """Check the inputs, open the run folder and run the plan in it, together with the processes that torchrun started,
    if it did.

    The exit status is 0 when the plan is finished, 1 when it ended early (budget, loss, memory).
    """
    from experiments.training.team import joined

    with ExitStack() as stack:
        out = args.out or Path("runs") / args.plan
        team, device, out = stack.enter_context(joined(args.device, out))
        plan, judge, identity, record = check_inputs(args, device)
        import flops
        from experiments.study.suite import Suite

        if stack.enter_context(open_run(out, identity, record)):
            print(f"continuing {out}")
        if team.size > 1:
            print(f"{team.size} processes share out the batches of each training")
        ledger = flops.Ledger(out / "ledger.jsonl", args.budget)
        if ledger.spent > ledger.budget:
            raise cli.CommandError(
                f"{out} has spent {ledger.spent:.3e} FLOPs already; expected a --budget of that or more"
            )
        checkpoint = args.model, identity["checkpoint_sha256"]
        return finish(Suite(plan, out, judge, ledger, args.convention, checkpoint, interruption, team))


def finish(suite: "Suite") -> int:
    """Run what is not finished yet and write the report; the exit status, as in `work`.

    A process that does not lead only does its part.
    """
    import flops
    from experiments.report.build import verdict, write_report
    from experiments.report.contents import counting
    from experiments.report.results import load_run
    from experiments.training.settings import TrainingError
    from experiments.training.team import PeerLost
    from qwen_min.config import NotFiniteError

    known_to_all = flops.BudgetExceeded, TrainingError
    if suite.team.rank:
        with suppress(*known_to_all):  # the leading process tells them, unless torchrun stops it as another has failed
            suite.run()
        return 0
    if warning := suite.budget_warning():
        print(f"warning: {warning}", file=sys.stderr)
    stopped = None
    suite.write_status(None)  # the old one has the reason and the budget of an earlier process
    try:
        suite.run()
    except Interrupted as error:
        suite.write_status(f"Stopped by {error}.")
        raise
    except Exception as error:
        known = (*known_to_all, flops.LedgerError, NotFiniteError, PeerLost)
        if not (isinstance(error, known) or cli.is_of_memory(error)):
            raise
        stopped = str(error)
        print(f"stopped: {stopped}", file=sys.stderr)
    suite.write_status(stopped)
    page = write_report(suite.folder)
    spent, budget = suite.ledger.spent, suite.ledger.budget
    rules = counting(suite.plan.experiments, suite.convention)
    print(f"spent {spent:.3e} of {budget:.3e} FLOPs ({spent / budget:.2%}; {rules})")
    if result := verdict(load_run(suite.folder)):
        print(result)
    print(f"report: {page}")
    return 1 if stopped else 0


parser, main = cli.command("experiments.run", __doc__, options, work, continues=True)

if __name__ == "__main__":
    sys.exit(main())
