"""Dates in text and in numbers. T cells of one column."""

import re

import numpy as np
import pandas as pd

from experiments.tables import Table
from experiments.tables.times import regular

MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
YEARS = range(1800, 2201)  # of numbers such as 202312 that are dates
CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?: ?[AaPp][Mm])?"
MONTH = rf"({'|'.join(MONTHS)})(?:uary|ruary|ch|il|e|y|ust|t|tember|ober|ember)?\.?"
# What a column holds instead of months, by what its name contains.
PERIODS = {
    "": "month|monat|mois",
    "week": "week|woche|semaine|semana",
    "quarter": "quart|trimest",
    "half-year": "half|halb|semest",
}
_ZONE = r"(?:Z|UTC|GMT|[+-]\d{2}:?\d{2})"
_AFTER = rf"((?:[T ,]+{CLOCK}(?: ?{_ZONE})?)?)"
# What a date looks like, and how it is written for pandas: in two ways where the day or the month can come first,
# in none where the year has two digits, as in Jan-59, 30.12.55, 5-Jan-59.
_FORMS = [
    (rf"(?:{MONTH}[- '/]*|\d{{1,2}}[/.]\d{{1,2}}[/.]|\d{{1,2}}[- ./]*{MONTH}[- ./']*)(\d{{2}})(?: {CLOCK})?",),
    (rf"(\d{{4}})[-/.](\d{{1,2}})[-/.](\d{{1,2}}){_AFTER}", r"\1-\2-\3\4"),
    (rf"(\d{{1,2}})[-/](\d{{1,2}})[-/](\d{{4}}){_AFTER}", r"\3-\2-\1\4", r"\3-\1-\2\4"),
    (rf"(\d{{1,2}})\.(\d{{1,2}})\.(\d{{4}}){_AFTER}", r"\3-\2-\1\4"),
    (r"(\d{4})(?:[-/]|[ -]?M)(\d{1,2})", r"\1-\2-1"),
    (r"(\d{1,2})[-/](\d{4})", r"\2-\1-1"),
    (r"(\d{4})[- ]?Q0?([1-4])", r"\1-q\2-1"),
    (r"Q([1-4])[- /]?(\d{4})", r"\2-q\1-1"),
    (r"(\d{4})-?W(\d{2})", r"\1-W\2-1"),
    (r"(\d{4}-\d{2}-\d{2})/\d{4}-\d{2}-\d{2}", r"\1"),  # a week, as pandas writes it
    (rf"(?:[a-z]{{3,9}},? )?(\d{{1,2}})[- ./]*{MONTH}[- ,./]*(\d{{4}}){_AFTER}", r"\3-\2-\1\4"),
    (rf"{MONTH}[- ]*(\d{{1,2}}),? +(\d{{4}}){_AFTER}", r"\3-\1-\2\4"),
    (rf"{MONTH}[- ,./']*(\d{{4}})", r"\2-\1-1"),
    (rf"(\d{{4}})[- ]*{MONTH}", r"\1-\2-1"),
]
# What is not ISO 8601 yet, and what it becomes.
_TO_ISO = [
    *((f"-{name}-", f"-{number}-") for number, name in enumerate(MONTHS, start=1)),
    *((f"-q{number}-", f"-{3 * number - 2}-") for number in (1, 2, 3, 4)),
    (r"(\d), *(\d{1,2}:)", r"\1 \2"),
    (r"(:\d{2}),(\d)", r"\1.\2"),
    (r" ?(?:UTC|GMT)$", "Z"),
    (r" ?([ap]m)$", r" \1"),
]
_OF_DIGITS = {6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}


def is_date(cell: str) -> bool:
    """True if a cell is a date, also one that is refused because its year has two digits. A number is none."""
    return _form(cell) is not None


def _form(cell: str) -> tuple[str, ...] | None:
    """The first of _FORMS that a cell has."""
    return next((form for form in _FORMS if re.fullmatch(form[0], cell, re.ASCII | re.IGNORECASE)), None)


def dates_of(cells: pd.Series, name: str, table: Table) -> pd.DatetimeIndex:
    """The dates in the cells of text (T) of column `name`, all in the form of the first date.

    A month or a quarter is its first day, a week its Monday. Times with several offsets are in UTC. Whether 1/2/2023
    starts with the day is decided for all cells together: such that all are dates, that they rise, and in equal steps.
    Raises DataError for another cell, years of two digits, seasons such as 2010/11, and cells that can be two dates.
    """
    first = next(filter(_form, cells), None)
    if first is None:
        raise table.error(f"holds {cells.iloc[0]!r}, expected a date", name, 0)
    form, *orders = _form(first) or ()
    if not orders:
        raise table.error(f"{first!r} has a year of two digits, of this century or the last; write all four", name)
    fits = cells.str.fullmatch(f"(?i:{form})").to_numpy(bool)
    if not fits.all():
        cell = cells.iloc[row := int(fits.argmin())][:40]
        holds = f"holds {cell!r}" if cell else "is empty"
        raise table.error(f"{holds}, expected a date written like the first one, {first!r}", name, row)
    if re.fullmatch(r"\d{4}[-/]\d{1,2}|\d{1,2}[-/]\d{4}", first):
        years = cells.str.extract(r"(\d{4})")[0].astype(int)
        parts = cells.str.replace(r"\d{4}|\D", "", regex=True).astype(int)
        _refuse_no_months(years, parts, first, name, table)
    parsed = [_parsed(cells.str.replace(f"(?i:{form})", order, regex=True), name, table) for order in orders]
    readings = [found for found in parsed if not found.isna().any()]
    if not readings:
        cell = cells.iloc[row := max(int(found.isna().argmax()) for found in parsed)]
        advice = "; write 00:00 of the next day" if re.search("[ T]24:", cell) else ""
        raise table.error(f"{cell!r} is not a date of the calendar{advice}", name, row)
    for is_good in (lambda found: found.is_monotonic_increasing, regular):
        readings = [found for found in readings if is_good(found)] or readings
    if not readings[0].equals(readings[-1]):
        at = int((readings[0] != readings[-1]).argmax())
        one, other = (f"{found[at]:%Y-%m-%d}" for found in (readings[0], readings[-1]))
        problem = f"{cells.iloc[at]!r} can start with the day or with the month, {one} or {other}"
        raise table.error(f"{problem}; write dates as {one}", name)
    return readings[0]


def _refuse_no_months(years, parts, first, name: str, table: Table) -> None:
    """Raise DataError if the years and other parts (T) of months can be seasons, quarters (or half-years) or weeks.

    Seasons such as 2010/11 have the year that follows. Quarters count to 4 in several years.
    """
    year, part = int(years[0]), int(parts[0])
    if len(years) > 1 and (parts == (years + 1) % 100).all():
        month = f"month {part} of {year} or " if 1 <= part <= 12 else ""
        advice = f"write months as dates, such as {year}-01-01, and seasons as their first year, {year}"
        raise table.error(f"'{first}' can be {month}the season {year} to {year + 1}; {advice}", name)
    counted = "quarter" if min(np.ptp(years), np.ptp(parts)) > 0 else ""
    kind = next((kind for kind, names in PERIODS.items() if re.search(names, name, re.IGNORECASE)), counted)
    if kind and (part <= 12 if kind == "week" else max(parts) <= 4):
        example = {"week": f"04-01, or {year}-W14", "quarter": f"04-01, or {year}Q2", "half-year": "07-01"}[kind]
        raise table.error(f"'{first}' can be a month or a {kind}; write its first day, such as {year}-{example}", name)


def _parsed(text: pd.Series, name: str, table: Table) -> pd.DatetimeIndex:
    """The dates (T) in text that is nearly ISO 8601; NaT for one that is not in the calendar."""
    first = text.iloc[0]
    if re.search("[a-su-vxy,]", first, re.IGNORECASE):  # besides the T, W and Z of ISO 8601
        for pattern, written in _TO_ISO:
            text = text.str.replace(pattern, written, case=False, regex=True)
    how = "%G-W%V-%u" if "-W" in first else "ISO8601"
    if re.search("[ap]m", first, re.IGNORECASE):
        how = f"%Y-%m-%d %I:%M{':%S' if first.count(':') == 2 else ''} %p"
    zoned = text.str.contains(rf":.*\d ?{_ZONE}$", regex=True)
    if zoned.any() and not zoned.all():
        raise table.error("some times have an offset from UTC and some have none; write it for all", name)
    try:
        return pd.DatetimeIndex(pd.to_datetime(text, format=how, errors="coerce"))
    except ValueError:  # offsets that differ, as in summer and in winter
        return pd.DatetimeIndex(pd.to_datetime(text, format=how, errors="coerce", utc=True))


def dates_of_numbers(values: np.ndarray, name: str, table: Table, is_telling: bool) -> pd.DatetimeIndex | None:
    """The dates in numbers (T) such as 202312, 20231231, 2023123123 and longer ones; None if they are no such dates.

    is_telling: the name of the column says that it holds times. Raises DataError for weeks, seasons, numbers that may
    be months, and days that are not in the calendar.
    """
    if values.dtype.kind != "i":
        if is_telling and np.isfinite(values).all():
            _refuse_points(values, name, table)
        return None
    digits = len(str(values[0]))
    year, part = np.divmod(values, 10 ** max(digits - 4, 0))
    if not np.isin(year, YEARS).all():
        return None
    if digits == 6 or (digits == 5 and is_telling and np.isin(part, range(1, 5)).all()):
        _refuse_no_months(year, part, values[0], name, table)
    if digits not in _OF_DIGITS:
        return None
    if digits == 6:
        if ("week" in name.lower() or (is_telling and part.max() > 12)) and np.isin(part, range(1, 54)).all():
            raise table.error(f"{values[0]} is a week, which is counted in several ways; write its first day", name)
        if not np.isin(part, range(1, 13)).all() or not (is_telling or (np.diff(values) > 0).all()):
            return None
        if not is_telling and year[0] == year[-1]:
            advice = "call the column 'month', or write a date"
            raise table.error(f"{values[0]} can be the month {year[0]}-{part[0]:02d} or a number; {advice}", name)
    found = pd.DatetimeIndex(pd.to_datetime(pd.Series(values).astype(str), format=_OF_DIGITS[digits], errors="coerce"))
    bad = found.isna()
    if digits == 8 and is_telling and bad.any() and not bad.all():
        raise table.error(f"{values[bad.argmax()]} is not a day of the calendar; correct it", name, int(bad.argmax()))
    return None if bad.any() else found


def _refuse_points(values: np.ndarray, name: str, table: Table) -> None:
    """Raise DataError if all numbers (T) are months such as 2023.12 or 12.2023, or quarters such as 2023.4.

    There 2023.1 can be January, October or a quarter.
    """
    for factor, order, most in ((10, 1, 4), (100, 1, 12), (10**4, -1, 12)):
        whole = np.round(values * factor)
        year, part = np.divmod(whole, factor)[::order]
        fits = np.isin(year, YEARS) & np.isin(part, range(1, most + 1)) & (np.abs(values * factor - whole) <= 1e-6)
        if fits.all() and most == 4:
            _refuse_no_months(year, part, values[0], name, table)
        elif fits.all():
            advice = f"write months as {year[0]:.0f}-{part[0]:02.0f}"
            raise table.error(f"{values[0]} can be a month or a number; {advice}", name)
