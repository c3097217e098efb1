"""The time axis of a series: find the step between the rows, continue the axis. T times."""

import math
import re
from calendar import monthrange
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from functools import cached_property
from itertools import pairwise
from statistics import median_low

import numpy as np
from dateutil.relativedelta import relativedelta

DAY = timedelta(days=1)
MOST_WEEKDAYS = 0.9  # with this share of steps of one weekday, the rows are weekdays, and the others are holidays
EQUAL_STEPS = 1e-6  # by how much the steps of a column without a telling name may differ, relative to their mean
REGULAR = 0.01  # how far a number may lie from equal steps, in steps: times are often written with few digits
# Rising numbers under the first names are times, whatever their steps; under the second they must rise in equal steps.
TIME_NAMES = frozenset(
    "t time times timestamp date dates datetime day days week weeks month months quarter quarters year years "
    "hour hours minute minutes second seconds".split()
)
COUNTER_NAMES = frozenset("step steps index idx id row obs".split())


class DataError(ValueError):
    """A data file, or a series given by a user, that cannot be used."""


@dataclass(frozen=True, eq=False)
class Times:
    """The times of the rows of a series. They do not fall."""

    name: str
    values: list[datetime] | np.ndarray  # (T); an array holds float64, in the unit of the file

    @property
    def regular(self) -> bool:
        """True if the steps are equal: in time, in months, or in weekdays (Monday to Friday)."""
        return self._rule[0]

    @property
    def positions(self) -> np.ndarray:
        """The times as numbers (T) float64. Dates become seconds after the first one."""
        if isinstance(self.values, np.ndarray):
            return self.values
        instants = _instants(self.values)
        return np.array([(value - instants[0]).total_seconds() for value in instants])

    def following(self, count: int) -> list[datetime | float]:
        """The `count` times after the last one, in the step of the axis, or in its median step if it is not regular.

        Raises DataError for times that Python cannot represent, such as dates after the year 9999.
        """
        try:
            return [self._rule[1](number) for number in range(1, count + 1)]
        except (OverflowError, ValueError) as error:
            raise DataError(
                f"{self.name!r} ends at {self.text(self.values[-1])}, too late for {count} more times ({error}); "
                "forecast fewer steps"
            ) from error

    def text(self, value: datetime | float) -> str:
        """A time as files have it. A date has its time of day only if some date of the axis has one."""
        if isinstance(value, datetime):
            return value.date().isoformat() if self._only_dates and value.time() == time.min else value.isoformat(" ")
        return f"{round(float(value), self._places):.15g}"

    @cached_property
    def _places(self) -> int:
        """The decimals of numbers: six digits of the step. What is below them is rounding."""
        return min(300, max(0, 6 - math.floor(math.log10(_number_step(np.asarray(self.values))[1]))))

    @cached_property
    def _only_dates(self) -> bool:
        return all(value.time() == time.min for value in self.values)

    @cached_property
    def _rule(self) -> tuple[bool, Callable[[int], datetime | float]]:
        """Whether the axis is regular, and the function from k = 1, 2, ... to the k-th time after the last one."""
        return _date_rule(self.values) if isinstance(self.values, list) else _number_rule(self.values)


def first_fall(values: Sequence | np.ndarray) -> int | None:
    """The index of the first time that is lower than the one before; None if there is none."""
    return next((at for at, (a, b) in enumerate(pairwise(_instants(values)), start=1) if b < a), None)


def _instants(values: Sequence | np.ndarray) -> Sequence | np.ndarray:
    """Times that compare and subtract as they pass: clocks that are set back repeat an hour, UTC does not."""
    aware = len(values) and isinstance(values[0], datetime) and values[0].tzinfo is not None
    return [value.astimezone(UTC) for value in values] if aware else values


def rises(values: np.ndarray) -> bool:
    """True if finite numbers (T) rise strictly, by finite steps."""
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.diff(values)
        return bool(np.isfinite(values).all() and np.isfinite(steps.sum()) and (steps > 0).all())


def are_times(name: str, values: np.ndarray, has_dates: bool = False) -> bool:
    """True if the first column of a table is a time axis, by its name ("" if it has none) and its numbers (T).

    They rise. A name of TIME_NAMES suffices then. Otherwise the steps must be equal, and the name is a counter's, or at
    least three numbers have no name, or they are whole and the table has no dates. A unit in brackets after the name is
    ignored.
    """
    if not rises(values):
        return False
    known = re.sub(r"\s*[\[(].*", "", name, flags=re.DOTALL).strip().lower()
    if known in TIME_NAMES:
        return True
    steps = np.diff(values)
    if len(steps) and np.ptp(steps) > EQUAL_STEPS * steps.mean():
        return False
    whole = bool((values == np.round(values)).all())
    return known in COUNTER_NAMES or (len(values) >= 3 and (not name or (whole and not has_dates)))


def _number_step(values: np.ndarray) -> tuple[bool, float]:
    """Whether rising numbers (T) have equal steps, and their mean step, or else their median step."""
    if len(values) < 2:
        return False, 1.0
    line = np.linspace(values[0], values[-1], len(values))
    mean = (values[-1] - values[0]) / (len(values) - 1)
    regular = bool((abs(values - line) <= REGULAR * mean).all())
    return regular, float(mean if regular else np.median(np.diff(values)))


def _number_rule(values: np.ndarray) -> tuple[bool, Callable[[int], float]]:
    regular, step = _number_step(values)

    def time_after(number: int) -> float:
        value = float(values[-1]) + step * number
        if not math.isfinite(value):
            raise OverflowError("the number is too large")
        return value

    return regular, time_after


def _date_rule(values: list[datetime]) -> tuple[bool, Callable[[int], datetime]]:
    last = values[-1]
    if len(values) < 2:
        return False, lambda number: last + DAY * number
    wall = [value.replace(tzinfo=None) for value in values]  # what a clock and a calendar there show
    if len({value.time() for value in wall}) == 1:
        months = {12 * (b.year - a.year) + b.month - a.month for a, b in pairwise(wall)}
        if len(months) == 1 and min(months) > 0 and (day := _day_of_month(wall)):
            return True, lambda number: last + relativedelta(months=min(months) * number, day=day)
        if len({b - a for a, b in pairwise(wall)}) == 1 and wall[1] > wall[0]:
            return True, lambda number: last + (wall[1] - wall[0]) * number
        dates = np.array([value.date() for value in wall], "datetime64[D]")
        single = np.busday_count(dates[:-1], dates[1:]) == 1
        if np.is_busday(dates).all() and single.mean() >= MOST_WEEKDAYS:

            def weekday_after(number: int) -> datetime:
                return last + DAY * int((np.busday_offset(dates[-1], number) - dates[-1]).astype(int))

            return bool(single.all()), weekday_after
    instants = _instants(values)
    steps = [b - a for a, b in pairwise(instants)]
    step = median_low(steps) or sum(steps, timedelta()) / len(steps) or DAY  # rows may repeat a time

    def time_after(number: int) -> datetime:
        value = instants[-1] + step * number
        return value if last.tzinfo is None else value.astimezone(last.tzinfo)

    return len(set(steps)) == 1 and steps[0] > timedelta(), time_after


def _day_of_month(values: list[datetime]) -> int | None:
    """The day that all dates have, 31 for the last day of each month; None if they differ otherwise."""
    for day in (31, max(value.day for value in values)):
        if all(value.day == min(day, monthrange(value.year, value.month)[1]) for value in values):
            return day
    return None
