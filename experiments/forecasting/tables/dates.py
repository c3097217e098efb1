"""Read dates as files have them. T cells."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from dateutil import parser

from experiments.forecasting.tables.times import DataError, Times, first_fall, rises

LONGEST = 50  # characters of a date
_FLAGS = re.ASCII | re.IGNORECASE
_NUMBER = re.compile(r"\d+(?:[.,e][\d+-]*)?", _FLAGS)  # for datetime, 20231231.10 is ten in the morning
_CLOCK = r"(?:[T ,]+\d{1,2}(?::\d{2}){1,2}(?:[.,]\d+)?(?: ?[ap]m)?(?: ?(?:Z|UTC|GMT|[+-]\d{2}:?\d{2}))?)?"
_YEAR_FIRST = re.compile(r"\d{4}(?:[-/]\d{1,2}|([-/.])\d{1,2}\1\d{1,2}" + _CLOCK + ")", _FLAGS)
_YEAR_LAST = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(?:\d{4}|(?<=[/.])\d{2})" + _CLOCK, _FLAGS)
_MONTH_NAME = re.compile(r"([a-z0-9 ,./'-]+?)" + _CLOCK, _FLAGS)
_MONTH_AND_YEAR = re.compile(r"([a-z]{3,9})[- '](\d{2})", _FLAGS)  # Jan-23, as Excel writes months
_QUARTER = re.compile(r"(\d{4})[- ]?Q([1-4])", _FLAGS)  # 2023Q1, as pandas writes quarters
_WEEK = re.compile(r"(\d{4}-\d{2}-\d{2})/\d{4}-\d{2}-\d{2}", _FLAGS)  # as pandas writes weeks
_ZONES = {"Z": UTC, "UTC": UTC, "GMT": UTC}
_WORDS = parser.parserinfo()


def is_date(cell: str) -> bool:
    """True if a cell can be read as a date. A number cannot, and neither can a date without a year."""
    return any(_date(cell, day_first) is not None for day_first in (False, True))


def dates_of(cells: Sequence[str], place: str) -> list[datetime] | None:
    """The dates in cells; None if one of them is no date.

    Whether 1/2/2023 starts with the day is decided for all cells together: such that all are dates, such that they do
    not fall, and such that the steps are equal. Raises DataError, which begins with `place`, if both orders do all of
    that, or if neither order does the last.
    """
    readings: list[list[datetime]] = []
    for day_first in (False, True) if any(map(_YEAR_LAST.fullmatch, cells)) else (False,):
        values = []
        for cell in cells:
            value = _date(cell, day_first)
            if value is None:
                break
            values.append(value)
        else:
            if comparable(values) and values not in readings:
                readings.append(values)
    for wanted in (lambda values: first_fall(values) is None, lambda values: Times("", values).regular):
        readings = [values for values in readings if wanted(values)] or readings
    if len(readings) == 2 and first_fall(readings[0]) is None:
        raise DataError(
            f"{place}: {cells[0]!r} can start with the month or with the day; write dates as {readings[0][0].date()}"
        )
    return readings[0] if readings else None


def dates_of_numbers(values: np.ndarray) -> list[datetime] | None:
    """The dates in numbers of the form 20231231 (T) that rise; None if one is no such date."""
    if not (len(values) and rises(values) and (values == np.round(values)).all() and values[0] >= 1e7):
        return None
    try:
        return [datetime.strptime(f"{value:.0f}", "%Y%m%d") for value in values]
    except ValueError:
        return None


def comparable(values: list[datetime]) -> bool:
    """True if all dates have an offset from UTC, or none has."""
    return len({value.utcoffset() is None for value in values}) <= 1


def _date(cell: str, day_first: bool) -> datetime | None:
    """The date in a cell; a month or a quarter is its first day. None if it is no date, read in this order."""
    value = _parsed(cell, day_first)
    return value if value and 1 < value.year < 9999 else None  # the others overflow when an offset is applied


def _parsed(cell: str, day_first: bool) -> datetime | None:
    if _NUMBER.fullmatch(cell) or len(cell) > LONGEST:
        return None
    try:
        return datetime.fromisoformat(cell)
    except ValueError:
        pass
    try:
        if match := _QUARTER.fullmatch(cell):
            return datetime(int(match[1]), 3 * int(match[2]) - 2, 1)
        if match := _WEEK.fullmatch(cell):
            return datetime.fromisoformat(match[1])
        if (match := _MONTH_AND_YEAR.fullmatch(cell)) and _WORDS.month(match[1]):
            cell = f"1 {match[1]} {match[2]}"
        elif match := _YEAR_LAST.fullmatch(cell):
            # dateutil would take another order where this one is no date; points are never between month and day
            month, day = (match[3], match[1]) if day_first else (match[1], match[3])
            if int(month) > 12 or int(day) > 31 or (match[2] == "." and not day_first):
                return None
        elif _YEAR_FIRST.fullmatch(cell):
            day_first = False
        elif not _names_a_month(cell):
            return None
        return parser.parse(cell, default=datetime(2000, 1, 1), dayfirst=day_first, tzinfos=_ZONES)
    except (ValueError, OverflowError):
        return None


def _names_a_month(cell: str) -> bool:
    """True if a cell has the name of a month, a year, and nothing else than dates have."""
    match = _MONTH_NAME.fullmatch(cell)
    if not match:
        return False
    words, numbers = re.findall(r"[A-Za-z]+", match[1]), re.findall(r"\d+", match[1])
    known = all(_WORDS.month(w) or _WORDS.weekday(w) is not None or _WORDS.jump(w) for w in words)
    year = len(numbers) == 2 or (len(numbers) == 1 and len(numbers[0]) == 4)
    return known and year and any(_WORDS.month(word) for word in words)
