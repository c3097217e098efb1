"""The times of a series: read them from text and numbers, find their step, continue them. T times."""

import re
import warnings

import numpy as np
import pandas as pd

from experiments.tables import DataError

MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
YEARS = (1800, 2200)  # of numbers such as 202312 that are dates
REGULAR = 0.01  # how far a number may lie from equal steps, in steps: times are often written with few digits
MOST_WEEKDAYS = 0.9  # with this share of steps of one weekday, the rows are weekdays, and the others are holidays
_MONTH = rf"({'|'.join(MONTHS)})(?:uary|ruary|ch|il|e|y|ust|t|tember|ober|ember)?\.?"
_ZONE = r"(?:Z|UTC|GMT|[+-]\d{2}:?\d{2})"
CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?: ?[AaPp][Mm])?"
_AFTER = rf"((?:[T ,]+{CLOCK}(?: ?{_ZONE})?)?)"
# what a date looks like, and how it is written for pandas, the day or the month first; None: it cannot be so
_FORMS: list[tuple[str, str | None, str | None]] = [
    (rf"(\d{{4}})[-/.](\d{{1,2}})[-/.](\d{{1,2}}){_AFTER}", None, r"\1-\2-\3\4"),
    (rf"(\d{{1,2}})[-/](\d{{1,2}})[-/](\d{{4}}){_AFTER}", r"\3-\2-\1\4", r"\3-\1-\2\4"),
    (rf"(\d{{1,2}})\.(\d{{1,2}})\.(\d{{4}}){_AFTER}", r"\3-\2-\1\4", None),
    (r"(\d{4})(?:[-/]|[ -]?M)(\d{1,2})", None, r"\1-\2-1"),
    (r"(\d{1,2})[-/](\d{4})", None, r"\2-\1-1"),
    (r"(\d{4})[- ]?Q0?([1-4])", None, r"\1-q\2-1"),
    (r"Q([1-4])[- /]?(\d{4})", None, r"\2-q\1-1"),
    (r"(\d{4})-?W(\d{2})", None, r"\1-W\2-1"),
    (r"(\d{4}-\d{2}-\d{2})/\d{4}-\d{2}-\d{2}", None, r"\1"),  # a week, as pandas writes it
    (rf"(?:[a-z]{{3,9}},? )?(\d{{1,2}})[- ./]*{_MONTH}[- ,./]*(\d{{4}}){_AFTER}", r"\3-\2-\1\4", None),
    (rf"{_MONTH}[- ]*(\d{{1,2}}),? +(\d{{4}}){_AFTER}", r"\3-\1-\2\4", None),
    (rf"{_MONTH}[- ,./']*(\d{{4}})", None, r"\2-\1-1"),
    (rf"(\d{{4}})[- ]*{_MONTH}", None, r"\1-\2-1"),
]
_COMPILED = [re.compile(form, re.ASCII | re.IGNORECASE) for form, *_ in _FORMS]
_SHORT_YEAR = re.compile(  # Jan-59, 30.12.55, 5-Jan-59
    rf"(?:{_MONTH}[- '/]*|\d{{1,2}}[/.]\d{{1,2}}[/.]|\d{{1,2}}[- ./]*{_MONTH}[- ./']*)(\d{{2}})(?: {CLOCK})?",
    re.ASCII | re.IGNORECASE,
)


def form_of(cell: str) -> int | None:
    """The number of the form in which a cell is a date; None if it is no date. A number is none."""
    return next((at for at, form in enumerate(_COMPILED) if form.fullmatch(cell)), None)


def is_date(cell: str) -> bool:
    """True if a cell is a date, also one that is refused because its year has two digits."""
    return form_of(cell) is not None or _SHORT_YEAR.fullmatch(cell) is not None


def dates_of(cells: pd.Series, place: str, lines) -> pd.DatetimeIndex | None:
    """The dates in cells of text (T), all in the form of the first one; None if the first one is no date.

    A month or a quarter is its first day, a week its Monday. Times with several offsets are in UTC. Whether 1/2/2023
    starts with the day is decided for all cells together: such that all are dates, such that they rise, and such that
    the steps are equal. `place` names the column, lines(row) a row. Raises DataError for another cell, for years of two
    digits, and for cells that can be two dates.
    """
    first = cells.iloc[0]
    if _SHORT_YEAR.fullmatch(first):
        raise DataError(
            f"{place}: {first!r} has a year of two digits, which can be in this century or in the last one; write "
            "years with four digits"
        )
    if (at := form_of(first)) is None:
        return None
    other = ~cells.str.fullmatch(f"(?i:{_FORMS[at][0]})").to_numpy(bool)
    if other.any():
        row = int(other.argmax())
        raise DataError(
            f"{place}, {lines(row)}: holds {cells.iloc[row][:40] or 'nothing'!r}, expected a date written like the "
            f"first one, {first!r}"
        )
    readings: list[pd.DatetimeIndex] = []
    problem = None
    for written, day in zip(_FORMS[at][1:], (r"\d+\D(?:1[3-9]|[2-9]\d)", r"1[3-9]|[2-9]\d"), strict=True):
        # a number above 12 is no month; where that shows, the other order need not be parsed
        if written is not None and (None in _FORMS[at] or not cells.str.match(day).any()):
            text = cells.str.replace(f"(?i:{_FORMS[at][0]})", written, regex=True)
            found = _parsed(text, place)
            if not (bad := found.isna()).any():
                readings += [] if readings and found.equals(readings[0]) else [found]
            elif problem is None or bad.argmax() > problem:
                problem = int(bad.argmax())
    for wanted in (lambda found: found.is_monotonic_increasing, regular):
        readings = [found for found in readings if wanted(found)] or readings
    if not readings:
        cell = cells.iloc[problem or 0]
        advice = "; write 00:00 of the next day" if " 24:" in cell or "T24:" in cell else ""
        raise DataError(f"{place}, {lines(problem or 0)}: {cell!r} is not a date of the calendar{advice}")
    if len(readings) == 2:
        meanings = " or ".join(str(found[0].date()) for found in readings)
        raise DataError(
            f"{place}: {first!r} can start with the day or with the month, {meanings}; write dates as "
            f"{readings[0][0].date()}"
        )
    return readings[0]


def _parsed(text: pd.Series, place: str) -> pd.DatetimeIndex:
    """The dates (T) in text, nearly as ISO 8601 has it; NaT for one that is not in the calendar."""
    first = text.iloc[0]
    if re.search("[a-z]{3}-", first, re.IGNORECASE):
        for number, name in enumerate(MONTHS, start=1):
            text = text.str.replace(f"-{name}-", f"-{number}-", case=False, regex=True)
    if "-q" in first:
        text = text.str.replace(r"-q(\d)-", lambda found: f"-{3 * int(found[1]) - 2}-", regex=True)
    if "," in first or "UTC" in first or "GMT" in first:
        text = text.str.replace(r"(\d), *", r"\1 ", regex=True).str.replace(r" ?(UTC|GMT)$", "Z", regex=True)
        text = text.str.replace(r"(:\d{2}) (\d+)", r"\1.\2", regex=True)
    how = "%G-W%V-%u" if "-W" in first else "ISO8601"
    if re.search("[ap]m", first, re.IGNORECASE):
        how = f"%Y-%m-%d %I:%M{':%S' if first.count(':') == 2 else ''} %p"
        text = text.str.replace(r" ?([ap]m)", r" \1", case=False, regex=True)
    zoned = text.str.contains(rf"\d ?{_ZONE}$", regex=True) if re.search(r":\d\d", first) else pd.Series([False])
    if zoned.any() and not zoned.all():
        raise DataError(f"{place}: some times have an offset from UTC and some have none; write it for all")
    try:
        return pd.DatetimeIndex(pd.to_datetime(text, format=how, errors="coerce"))
    except ValueError:  # offsets that differ, as in summer and in winter
        return pd.DatetimeIndex(pd.to_datetime(text, format=how, errors="coerce", utc=True))


def dates_of_numbers(name: str, values: np.ndarray, place: str, is_telling: bool) -> pd.DatetimeIndex | None:
    """The dates in numbers (T) such as 202312, 20231231, 2023123123 and longer ones; None if they are no such dates.

    is_telling: the name of the column says that it holds times. Raises DataError for weeks, and for numbers of six
    digits that can be months or a count.
    """
    if values.dtype.kind != "i" or not len(values) or values.min() < 10**5:
        return None
    text = pd.Series(values).astype(str)
    digits = len(text.iloc[0])
    formats = {6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
    year = values // 10 ** (digits - 4)
    if digits not in formats or not (text.str.len() == digits).all():
        return None
    if year.min() < YEARS[0] or year.max() > YEARS[1]:
        return None
    if digits == 6:
        part = values % 100
        is_week = "week" in name.lower() or (is_telling and part.max() > 12)
        if is_week and part.min() > 0 and part.max() <= 53:
            raise DataError(
                f"{place}: {values[0]} is a week, and weeks are counted in several ways; write its first day"
            )
        if part.min() < 1 or part.max() > 12 or not (is_telling or (np.diff(values) > 0).all()):
            return None
        if not is_telling and year[0] == year[-1]:
            raise DataError(
                f"{place}: {values[0]} can be the month {year[0]}-{part[0]:02d} or a number; call the column 'month', "
                "or write a date"
            )
    found = pd.to_datetime(text, format=formats[digits], errors="coerce")
    return None if found.isna().any() else pd.DatetimeIndex(found)


def following(index: pd.Index, steps: int) -> pd.Index:
    """The next times (steps) after the last one, of the type of `index`, in its step, or in the commonest step.

    Dates continue by the calendar, also where some are missing: months, their last days or working days, weekdays.
    Raises DataError for a single time, and where the next ones cannot be represented, such as dates after 9999.
    """
    if isinstance(index, pd.RangeIndex):
        return pd.RangeIndex(index.stop, index.stop + steps * index.step, index.step, name=index.name)
    if len(index) < 2:
        raise DataError(f"{index.name!r} has one time, {index[0]}, expected at least two, whose step can be continued")
    try:
        if isinstance(index, pd.DatetimeIndex):
            made = pd.date_range(index[-1], periods=steps + 1, freq=_calendar(index)[0])
            if (made[1:] <= index[-1]).any() or len(made) != steps + 1:
                raise OverflowError("the calendar ends")
            return pd.DatetimeIndex(made[1:], freq=None, name=index.name)
        return pd.Index(_next_numbers(index.to_numpy(), steps), name=index.name)
    except (OverflowError, ValueError) as error:
        raise DataError(
            f"{index.name!r} ends at {index[-1]}, too late for {steps} more times ({error}); forecast fewer steps"
        ) from error


def regular(index: pd.Index) -> bool:
    """True if the steps are equal: in time, or in the calendar (months, weekdays)."""
    if isinstance(index, pd.RangeIndex):
        return True
    if len(index) < 2:
        return False
    return _calendar(index)[1] if isinstance(index, pd.DatetimeIndex) else _number_step(index.to_numpy())[0]


def _number_step(values: np.ndarray) -> tuple[bool, float | int]:
    """Whether rising numbers (T) have equal steps, and their step: the mean, or else the commonest."""
    steps = np.diff(values)
    if values.dtype.kind in "iu" and (steps == steps[0]).all():
        return True, int(steps[0])
    mean = float(values[-1] - values[0]) / (len(values) - 1)
    if (np.abs(values - np.linspace(values[0], values[-1], len(values))) <= REGULAR * mean).all():
        return True, mean
    unit = 10.0 ** np.floor(np.log10(np.median(steps)) - 5)  # what is below six digits of the step is rounding
    found, counts = np.unique(np.round(steps / unit), return_counts=True)
    step = found[counts.argmax()] * unit
    return False, round(step) if values.dtype.kind in "iu" else float(step)


def _next_numbers(values: np.ndarray, steps: int) -> np.ndarray:
    step = _number_step(values)[1]
    if isinstance(step, int):
        return np.array([int(values[-1]) + step * number for number in range(1, steps + 1)], np.int64)
    made = float(values[-1]) + step * np.arange(1, steps + 1)
    if not np.isfinite(made).all():
        raise OverflowError("the numbers are too large")
    places = int(np.clip(6 - np.floor(np.log10(step)), 0, 300))
    return np.array([round(float(one), places) for one in made])


def _calendar(index: pd.DatetimeIndex) -> tuple[pd.DateOffset, bool]:
    """The offset from one date to the next, and whether all dates follow it."""
    wall = index.tz_localize(None)  # what a clock and a calendar there show
    has_clock = (wall - wall.normalize()).nunique() > 1
    month = np.diff(12 * wall.year + wall.month)  # first, as two months can have the same number of days
    if not has_clock and month.min() > 0 and (offset := _monthly(wall, _commonest(month))) is not None:
        return offset, bool((month == month[0]).all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a later pandas answers with an offset, which to_offset takes as well
        found = pd.infer_freq(index) if len(index) > 2 else None
    if found is not None:
        return pd.tseries.frequencies.to_offset(found), True
    if not has_clock:
        days = wall.normalize().to_numpy().astype("datetime64[D]")
        if np.is_busday(days).all():
            single = np.busday_count(days[:-1], days[1:]) == 1
            if len(days) > 5 and single.mean() >= MOST_WEEKDAYS:
                return pd.offsets.BusinessDay(), bool(single.all())
        whole = np.diff(days).astype(int)
        return pd.DateOffset(days=_commonest(whole)), bool((whole == whole[0]).all())
    steps = np.diff(index.asi8)
    return pd.Timedelta(_commonest(steps), unit=index.unit), bool((steps == steps[0]).all())


def _commonest(steps: np.ndarray) -> int:
    found, counts = np.unique(steps, return_counts=True)
    return int(found[counts.argmax()])


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
    has_days = bool((whole == whole.normalize()).all() and (times == times.normalize()).all())
    return [str(time.date()) if has_days and time.tzinfo is None else str(time) for time in times]
