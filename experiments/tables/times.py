"""The calendar of a series: the step of its times, and the times that follow. T times."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.tables.table import DataError

REGULAR = 0.01  # how far a number may lie from equal steps, in steps: times are often written with few digits
ENOUGH = 0.4  # so many of the times of a grid, and of the steps between them, are there where the others are left out
FEW = 12  # with fewer rows, the commonest step is not certain
SEEN = 3  # where a weekday, or a time of day, has passed so often without a row, it hardly ever has one
RARE = 0.1  # a weekday with so small a share of rows is an exception, such as a Saturday on which people work
LONG = 60  # days, months, or other steps without a clock; rows that are left out for so long twice are seasons
MOST_WEEKDAYS = 0.6  # with this share of steps to the next of some weekdays, the rows are these; others are holidays


def following(index: pd.Index, steps: int) -> pd.Index:
    """The next times (steps) after the last one, of the type of `index`, in its step, or in the commonest step.

    Dates continue by the calendar, also where some are missing: months, their halves, last days or working days, and
    the weekdays that occur.
    Raises DataError for a single time, and where the next ones cannot be represented, such as dates after 9999.
    """
    if isinstance(index, pd.RangeIndex):
        return pd.RangeIndex(index.stop, index.stop + steps * index.step, index.step, name=index.name)
    if len(index) < 2:
        raise DataError(f"{index.name!r} has one time, {index[0]}, expected at least two, whose step can be continued")
    try:
        if not isinstance(index, pd.DatetimeIndex):
            return pd.Index(_next_numbers(index, steps), name=index.name)
        made = pd.date_range(index[-1], periods=steps + 1, freq=_calendar(index)[0])
        made = made[made > index[-1]][:steps]  # the last date, unless it is an exception such as a Saturday, is not
        if len(made) != steps:
            raise OverflowError("the calendar ends")
        return pd.DatetimeIndex(made, freq=None, name=index.name)
    except (ArithmeticError, ValueError) as error:
        problem = f"ends at {index[-1]}, too late for {steps} more times ({error}); forecast fewer steps"
        raise DataError(f"{index.name!r} {problem}") from error


def common_times(series: Sequence[pd.DataFrame]) -> list[np.ndarray] | None:
    """The times (T) of each of N series, counted along those of all; None if the series do not cover the same times.

    They do if half of them or more, but not a single one of several, have a time in common, and they are columns of one
    table, or have dates, or numbers that count from long before, such as years. Others, such as the days of an
    experiment, begin anew with each series.
    """
    indexes = [one.index for one in series]
    dated = [isinstance(one, pd.DatetimeIndex) for one in indexes]
    if any(dated) != all(dated):
        return None
    times = [one.tz_convert(None) if getattr(one, "tz", None) else one for one in indexes]
    values = [one.as_unit("us").asi8 if isinstance(one, pd.DatetimeIndex) else one.to_numpy() for one in times]
    starts, ends = (np.array([one[at] for one in values]) for at in (0, -1))
    is_counted = all(one.attrs.get("wide") for one in series) or any(dated) or starts.min() > np.ptp([starts, ends])
    covering = np.searchsorted(np.sort(starts), starts, "right") - np.searchsorted(np.sort(ends), starts)
    if not is_counted or covering.max() < min(len(series), max(2, len(series) / 2)):
        return None
    together = np.unique(np.concatenate(values))
    return [np.searchsorted(together, one) for one in values]


def regular(index: pd.Index) -> bool:
    """True if the steps of times are equal: in time, or in the calendar (months, weekdays)."""
    step = _calendar if isinstance(index, pd.DatetimeIndex) else _number_step
    return len(index) > 1 and step(index)[1]


def gapless(index: pd.Index) -> pd.Index:
    """The times (T) with those between them that are almost certainly left out.

    They are if all times lie on the grid of the commonest step, of numbers, months, days or a clock, and fill enough of
    it. Weekdays and opening hours are no such grid: most of the times that are left out never have a row.
    """
    if isinstance(index, pd.RangeIndex) or len(index) < FEW or regular(index):
        return index
    most = len(index) / ENOUGH
    if isinstance(index, pd.DatetimeIndex):
        step, wall = _calendar(index)[0], index.tz_localize(None)
        has_clock = isinstance(step, pd.Timedelta)
        is_short = wall[-1] - wall[0] < pd.Timedelta(weeks=SEEN)  # so that its weekdays are not certain
        is_weekdays = isinstance(step, pd.offsets.BusinessDay) or (is_short and (wall.day_of_week < 5).all())
        if (is_weekdays and not has_clock) or (index[-1] - index[0]) / (index[0] + step - index[0]) > most:
            return index
        try:
            made = pd.DatetimeIndex(pd.date_range(index[0], index[-1], freq=step), freq=None)
        except (ArithmeticError, ValueError):  # one step more is too late for the calendar
            return index
        at = made.get_indexer(index)
        is_grid = at.min() >= 0 and not _is_closed(made, at)
    else:
        values, has_clock = index.to_numpy(), False
        past, number = values - values[0], _number_step(index)[0]
        if past[-1] > most * number:
            return index
        grid = np.linspace(0, past[-1], round(past[-1] / number) + 1)
        at = np.rint(past / past[-1] * (len(grid) - 1)).astype(int)
        is_grid = (np.abs(past - grid[at]) <= REGULAR * number).all()
        grid = values[0] + (grid.round().astype(values.dtype) if values.dtype.kind in "iu" else grid)
        grid[at] = values
        made = pd.Index(grid)
    steps = np.diff(at)
    is_grid = is_grid and np.mean(steps == 1) >= ENOUGH and steps.min() > 0
    return made.rename(index.name) if is_grid and (has_clock or (steps > LONG).sum() < 2) else index


def _is_closed(made: pd.DatetimeIndex, at: np.ndarray) -> bool:
    """True if most of the times that are not `at` a row hardly ever have one, by time of day, of the week, or month."""
    wall = made.tz_localize(None)
    clock = wall - wall.normalize()
    is_long = made[1] - made[0] > pd.Timedelta(days=27)
    for kind in [wall.month] if is_long else [clock, clock + pd.to_timedelta(wall.day_of_week, unit="D")]:
        found, kinds = np.unique(kind, return_inverse=True)
        seldom = np.bincount(kinds[at], minlength=len(found)) < RARE * np.bincount(kinds)
        if (seldom & (np.bincount(kinds) >= SEEN))[np.delete(kinds, at)].mean() > 0.5:
            return True
    return False


def _number_step(index: pd.Index) -> tuple[float | int, bool]:
    """The step of rising numbers (T), the mean or else the commonest one, and whether all steps are equal."""
    values = index.to_numpy()
    steps, is_whole = np.diff(values), values.dtype.kind in "iu"
    if is_whole and (steps == steps[0]).all():
        return int(steps[0]), True
    mean = float(values[-1] - values[0]) / (len(values) - 1)
    if (np.abs(values - np.linspace(values[0], values[-1], len(values))) <= REGULAR * mean).all():
        return mean, True
    unit = 10.0 ** np.floor(np.log10(np.median(steps)) - 5)  # what is below six digits of the step is rounding
    step = _commonest(np.round(steps / unit)) * unit
    return round(step) if is_whole else step, False


def _commonest(steps: np.ndarray) -> int:
    """The commonest of whole steps; of several, the one in the middle, or of two the smaller: the other is a gap."""
    return int(pd.Series(steps).mode().quantile(interpolation="lower"))


def _next_numbers(index: pd.Index, steps: int) -> np.ndarray:
    step = _number_step(index)[0]
    if isinstance(step, int):
        return np.array([int(index[-1]) + step * number for number in range(1, steps + 1)], np.int64)
    with np.errstate(over="raise"):
        made = float(index[-1]) + step * np.arange(1, steps + 1)
    places = int(np.clip(6 - np.floor(np.log10(step)), 0, 300))
    return np.array([round(float(one), places) for one in made])


def _calendar(index: pd.DatetimeIndex) -> tuple[pd.DateOffset, bool]:
    """The offset from one date to the next, and whether all dates follow it."""
    wall = index.tz_localize(None)  # what a clock and a calendar there show
    if (wall - wall.normalize()).nunique() > 1:  # a clock
        steps = np.diff(index.asi8)
        return pd.Timedelta(_commonest(steps), unit=index.unit), bool((steps == steps[0]).all())
    month = np.diff(12 * wall.year + wall.month)  # first, as two months can have the same number of days
    if month.min() > 0 and (offset := _monthly(wall, _commonest(month))) is not None:
        return offset, bool((month == month[0]).all())
    days = wall.normalize().to_numpy().astype("datetime64[D]")
    counts = np.bincount(wall.day_of_week, minlength=7)
    found, whole = counts > RARE * counts.max(), np.diff(days).astype(int)
    week = found if whole.sum() >= 7 * SEEN else np.arange(7) < 5  # from Monday to Friday unless others are sure
    if len(days) > 5 and 1 < week.sum() < 7 and not (found & ~week).any():
        single = np.busday_count(days[:-1], days[1:], weekmask=week) == 1
        if single.mean() >= MOST_WEEKDAYS:
            weekmask = "".join(map(str, week.astype(int)))
            is_whole = single.all() and np.is_busday(days, weekmask=week).all()
            return pd.offsets.CustomBusinessDay(weekmask=weekmask), bool(is_whole)
    for kind in (pd.offsets.SemiMonthBegin(), pd.offsets.SemiMonthEnd()):
        if np.ptp(whole) and all(map(kind.is_on_offset, wall)):
            return kind, len(pd.date_range(wall[0], wall[-1], freq=kind)) == len(wall)
    return pd.DateOffset(days=_commonest(whole)), bool((whole == whole[0]).all())


def _monthly(wall: pd.DatetimeIndex, months: int) -> pd.DateOffset | None:
    """The offset by months that dates have, which are the last or the same day, or a working day, of theirs."""
    for day in (31, int(wall.day.max())):
        if (wall.day == np.minimum(day, wall.days_in_month)).all():
            return pd.DateOffset(months=months, day=day)
    for kind in (pd.offsets.BusinessMonthEnd, pd.offsets.BusinessMonthBegin):
        if all(map(kind().is_on_offset, wall)):
            return kind(months)
    return None


def time_texts(times: pd.Index, whole: pd.Index) -> list[str]:
    """Times as files have them. A date has its time of day only if some date of `whole` has one."""
    if not isinstance(times, pd.DatetimeIndex):
        return [str(time) if times.dtype.kind in "iu" else repr(float(time)).removesuffix(".0") for time in times]
    has_days = times.tz is None and all((one == one.normalize()).all() for one in (times, whole))
    return [str(time).removesuffix(" 00:00:00") if has_days else str(time) for time in times]
