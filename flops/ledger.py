"""A ledger of the FLOPs that each experiment spent: an append-only file, debited before each step, with a budget."""

import errno
import json
import os
from collections import defaultdict
from pathlib import Path

MAX_STEP_FLOPS = 10**30  # each step must cost less
MAX_BUDGET = 10**40


class LedgerError(ValueError):
    """A ledger file is damaged or belongs to another run."""


class BudgetExceeded(ValueError):
    """A step would spend more FLOPs than the budget has left; nothing was debited."""


def _check_entry(experiment, step, flops) -> None:
    if not (isinstance(experiment, str) and type(step) is int and type(flops) is int and 0 <= flops < MAX_STEP_FLOPS):
        raise ValueError(
            f"got experiment {experiment!r}, step {step!r}, flops {flops!r}; expected a name and two integers, flops "
            f"from 0 to below {MAX_STEP_FLOPS:.0e}"
        )


class Ledger:
    """A file of one JSON line per optimizer step: {"experiment", "step", "flops"}.

    A line with "steps" stands for so many steps from that one on, each of these FLOPs (`qwen-min report --shorten`).

    A step is debited once, before it runs, and not again after an interruption. After a kill or a power cut, a step may
    be debited that did not run, but no step has run that was not debited. `budget` and `spent`, the sum of all steps,
    are in FLOPs. One process at a time may write.
    Raises LedgerError when the file is damaged, and ValueError for a budget that is no number from 0 to MAX_BUDGET.
    """

    def __init__(self, path: Path, budget: int):
        if not (isinstance(budget, int | float) and 0 <= budget <= MAX_BUDGET):
            raise ValueError(f"the budget is {budget!r} FLOPs, expected 0 to {MAX_BUDGET:.0e}")
        self.path, self.budget, self.spent = Path(path), budget, 0
        self._steps: dict[str, dict[int, int]] = defaultdict(dict)
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        # a kill cut what follows the last newline, so its step, which runs after the write, did not run
        complete = self.path.read_bytes().rpartition(b"\n")[0]
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                entry = json.loads(line)
                name, step, flops, steps = entry["experiment"], entry["step"], entry["flops"], entry.get("steps", 1)
                _check_entry(name, step, flops)
                if type(steps) is not int or not 0 < steps <= 10**6:
                    raise ValueError(f"steps are {steps!r}, expected 1 to a million")
                booked = dict.fromkeys(range(step, step + steps), flops)
                if not self._steps[name].keys().isdisjoint(booked):
                    raise ValueError("the step is booked above")
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise LedgerError(
                    f"{self.path}, line {number}: not a ledger entry ({error!r}); restore the file or correct the line"
                ) from error
            self.spent += flops * steps
            self._steps[name] |= booked

    def by_experiment(self) -> dict[str, int]:
        """FLOPs debited by each experiment, in the order of their first steps."""
        return {name: sum(steps.values()) for name, steps in self._steps.items()}

    def require(self, experiment: str, flops: int) -> None:
        """Raise BudgetExceeded unless the rest of an experiment fits the budget.

        flops is what the whole experiment costs; the steps that are already booked are subtracted from it.
        """
        self._check(experiment, flops - sum(self._steps.get(experiment, {}).values()))

    def _check(self, what: str, flops: int) -> None:
        if self.spent + flops > self.budget:
            spent = ", ".join(f"{name} {value:.3e}" for name, value in self.by_experiment().items() if value)
            raise BudgetExceeded(
                f"{what} needs {flops:.3e} FLOPs, {self.budget - self.spent:.3e} of {self.budget:.3e} are left "
                f"(spent: {spent or 'nothing'}); raise the budget or plan less"
            )

    def debit(self, experiment: str, step: int, flops: int) -> None:
        """Book one step before it runs; it must cost less than MAX_STEP_FLOPS.

        Raises BudgetExceeded when it does not fit, LedgerError when it is booked with another number of FLOPs, and
        ValueError when the arguments are not a name and two integers. Nothing is booked then.
        """
        _check_entry(experiment, step, flops)
        booked = self._steps.get(experiment, {}).get(step)
        if booked == flops:
            return
        if booked is not None:
            raise LedgerError(
                f"{self.path}: step {step} of {experiment} is booked at {booked:,} FLOPs, not {flops:,}; "
                "use the ledger of this run"
            )
        self._check(f"step {step} of {experiment}", flops)
        new, line = not self.path.exists(), json.dumps({"experiment": experiment, "step": step, "flops": flops}) + "\n"
        with self.path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if size and file.read(1) != b"\n":  # what an interrupted write left
                size = self.path.read_bytes().rfind(b"\n") + 1
                file.truncate(size)
            try:
                if file.write(line.encode()) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
        if new and os.name == "posix":  # the folder stores the name of a new file, so it needs its own fsync
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        self.spent += flops
        self._steps[experiment][step] = flops
