"""What each experiment spent, against the budget: an append-only file that is debited before each step."""

import json
import os
from collections import defaultdict
from pathlib import Path

LARGEST = 10**30  # that a step may be booked at


class LedgerError(ValueError):
    """A ledger's file is damaged, or not of this run."""


class BudgetExceeded(ValueError):
    """A step would spend more FLOPs than the budget has left; nothing was debited."""


def _check_entry(experiment, step, flops) -> None:
    if not (isinstance(experiment, str) and type(step) is int and type(flops) is int and 0 <= flops < LARGEST):
        raise ValueError(
            f"got experiment {experiment!r}, step {step!r}, flops {flops!r}; expected a name and two integers, flops "
            f"from 0 to below {LARGEST:.0e}"
        )


class Ledger:
    """A file of one JSON line per optimizer step: {"experiment", "step", "flops"}.

    A step is debited once, before it runs. A step that is repeated after an interruption is the same step, and is not
    debited again. So a kill or a power cut can leave a step that was debited and not run, never the reverse.
    `spent` is the sum in FLOPs. The budget holds for one writer: a second Ledger on the same file does not see what the
    first debits meanwhile, and together they can overspend.
    Raises LedgerError when the file is damaged.
    """

    def __init__(self, path: Path, budget: int):
        self.path = Path(path)
        self.budget = budget
        self.spent = 0
        self._steps: dict[str, dict[int, int]] = defaultdict(dict)
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole, newline, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                name, step, flops = entry["experiment"], entry["step"], entry["flops"]
                _check_entry(name, step, flops)
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise LedgerError(f"{self.path}, line {number}: not a ledger entry ({error!r})") from error
            self._book(name, step, flops)
        if torn:  # a write cut short by a kill: its step did not run, for it is run only after the write
            os.truncate(self.path, len(whole + newline))

    def _book(self, experiment: str, step: int, flops: int) -> None:
        self.spent += flops - self._steps[experiment].get(step, 0)
        self._steps[experiment][step] = flops

    def by_experiment(self) -> dict[str, int]:
        """FLOPs debited by each experiment, in the order of their first step."""
        return {name: sum(steps.values()) for name, steps in self._steps.items()}

    def require(self, experiment: str, flops: int) -> None:
        """Raise BudgetExceeded unless all steps of an experiment, less those booked already, fit."""
        self._check(experiment, flops - sum(self._steps.get(experiment, {}).values()))

    def _check(self, what: str, flops: int) -> None:
        if self.spent + flops > self.budget:
            spent = ", ".join(f"{name} {value:.3e}" for name, value in self.by_experiment().items() if value)
            raise BudgetExceeded(
                f"{what} needs {flops:.3e} FLOPs, {self.budget - self.spent:.3e} of {self.budget:.3e} are left "
                f"(spent: {spent or 'nothing'}); raise the budget or plan less"
            )

    def debit(self, experiment: str, step: int, flops: int) -> None:
        """Book one step before it runs.

        Books nothing and raises BudgetExceeded when it does not fit, LedgerError when the step is booked at another
        price, and ValueError when the arguments are not a name, a step and a number of FLOPs.
        """
        _check_entry(experiment, step, flops)
        booked = self._steps.get(experiment, {}).get(step)
        if booked == flops:
            return
        if booked is not None:
            raise LedgerError(f"{self.path}: step {step} of {experiment} is booked at {booked:,} FLOPs, not {flops:,}")
        self._check(f"step {step} of {experiment}", flops)
        new = not self.path.exists()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"experiment": experiment, "step": step, "flops": flops}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new and os.name == "posix":  # a file's name is kept by its folder
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        self._book(experiment, step, flops)
