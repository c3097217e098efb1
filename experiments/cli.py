"""Code that all commands share: device, precision, exit status. It imports no torch, so that --help is quick."""

import argparse
import csv
import io
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.storage.interruption import Interrupted, Interruption

if TYPE_CHECKING:
    import torch

PACKAGES = ("qwen_min", "lora", "flops", "experiments")
DTYPES = ("float32", "bfloat16")  # fp16 would need its loss scaled to train


class CommandError(ValueError):
    """A command cannot do what its arguments ask for."""


def add_device(parser: argparse.ArgumentParser, dtype: str | None = "float32") -> None:
    """Add the options --device and --dtype; `chosen_dtype` reads the second one. dtype: its default."""
    add = parser.add_argument
    add("--device", default="cpu", help="torch device: cpu, cuda, cuda:1, ... (default %(default)s)")
    default = dtype or "bfloat16, but float32 on a CPU without instructions for bfloat16"
    add("--dtype", choices=DTYPES, default=dtype, help=f"type of the weights (default {default})")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options about files with series."""
    add = parser.add_argument
    add("series", type=Path, nargs="+", help="files with one series or several each: CSV, Excel, Parquet, HDF5")
    add("--horizon", type=positive, default=10, help="time steps to forecast (default %(default)s)")
    add("--columns", type=names, help="columns to forecast, separated by commas; one with a comma in double quotes "
        "(default: all but times and an index)")  # fmt: skip
    add("--missing", choices=("error", "interpolate"), help="what to do about missing values (default error; a model "
        "that reads values leaves them as they are)")  # fmt: skip
    add("--id", metavar="COLUMN", help="column that names the series of a file (default: unique_id, id or item_id)")
    add("--wide", action="store_true", help="each column of a file is a series of its own")
    add("--season", type=positive, help="time steps that seasonal naive repeats, such as 12 (default: it finds them)")


def names(text: str) -> list[str]:
    """Parse names, separated by commas; a name with a comma is in double quotes."""
    return [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]


def at_least(least: int, parse: Callable[[str], int], wanted: str, most: int = 2**62) -> Callable[[str], int]:
    """A parser of whole numbers up to `most`, for argparse; `wanted` says in its message what it takes."""

    def parsed(text: str) -> int:
        try:
            number = parse(text)
        except (ValueError, OverflowError):
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return number

    return parsed


natural = at_least(0, int, "a whole number of at least 0")
positive = at_least(1, int, "a whole number of at least 1")
flops = at_least(1, lambda text: int(float(text)), "a number of FLOPs, expected 1 to 1e40, such as 1e17", 10**40)


def called(module: str) -> str:
    """What the user called to run a command: `qwen-min VERB`, or `python -m MODULE`."""
    return sys.argv[0] if sys.argv[0].startswith("qwen-min") else f"python -m {module}"


def command_line(module: str, argv: list[str] | None = None) -> str:
    """The command as the user could type it again; argv None: with the arguments of this process."""
    return f"{called(module)} {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()


def checked_device(name: str) -> str:
    """Put a number on a device and return the name of the device. Raises CommandError if that fails."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return name


def chosen_dtype(name: str | None, device: str) -> "torch.dtype":
    """The type that --dtype names; None: the quicker one on this device. Warns of one that is very slow there."""
    import torch

    from qwen_min.linear import multiplies_bfloat16

    is_quick = multiplies_bfloat16(device)
    if name == "bfloat16" and not is_quick:
        warnings.warn("PyTorch multiplies bfloat16 very slowly on this CPU; use --dtype float32", stacklevel=2)
    return getattr(torch, name or ("bfloat16" if is_quick else "float32"))


def is_of_memory(error: Exception) -> bool:
    """True if the memory did not suffice; torch's errors are RuntimeErrors, on a CPU told by the message alone."""
    told = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and told)


def is_meant(error: Exception) -> bool:
    """Return True if an error is a message to the user: a system error, or of a class that a package here defines.

    Any other error, such as a plain ValueError or an error of torch, is a bug and keeps its traceback.
    """
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in PACKAGES


Options = Callable[[argparse.ArgumentParser], None]
Work = Callable[[argparse.Namespace, Interruption], int | None]


def command(
    module: str, about: str | None, options: Options, work: Work, continues: bool = False
) -> tuple[Callable[[], argparse.ArgumentParser], Callable[..., int]]:
    """The `parser` and the `main` of a command; about: the docstring of its module, which --help shows as it is.

    main parses the command line (None: that of the process) and returns the exit status: the result of work(arguments,
    interruption), or 0. After an error, which is one line on stderr, it is 2 for bad input, 1 if the memory does not
    suffice, 128 + the signal's number if the process was asked to stop. continues: it then goes on where it was.
    """

    def parser() -> argparse.ArgumentParser:
        form = argparse.RawDescriptionHelpFormatter
        made = argparse.ArgumentParser(prog=called(module), description=about, formatter_class=form)
        options(made)
        return made

    def main(argv: list[str] | None = None) -> int:
        args = parser().parse_args(argv)
        if isinstance(sys.stdout, io.TextIOWrapper):  # which may be unable to write what a model or a user writes
            sys.stdout.reconfigure(errors="replace")
        try:
            with Interruption() as interruption, warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
                return work(args, interruption) or 0
        except Interrupted as error:
            resume = f"; to continue from what is saved: {command_line(module, argv)}" if continues else ""
            print(f"stopped by {error}{resume}", file=sys.stderr)
            return error.exit_status
        except Exception as error:
            if not (is_of_memory(error) or is_meant(error)):
                raise
            print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
            return 1 if is_of_memory(error) else 2

    return parser, main
