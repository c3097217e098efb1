"""Dates in text and in numbers. T cells of one column."""

import re

import numpy as np
import pandas as pd

from experiments.tables.table import Table
from experiments.tables.times import regular

YEARS = range(1800, 2201)  # of numbers such as 202312 that are dates
CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: [AaPp][Mm])?"
_NAMES = "january february march april may june july august september october november december".split()
MONTH = "|".join([*_NAMES, *(name[:3] for name in _NAMES)])
# How dates are written, for pandas. %y, a year of two digits, is refused.
DAYS = "%Y-%m-%d|%d.%m.%Y|%d/%m/%Y|%m/%d/%Y|%d-%m-%Y|%m-%d-%Y|%d %b %Y|%d-%b-%Y|%d%b%Y|%b %d, %Y".split("|")
CLOCKS = ["", *(f"{mark} {one}" for mark in ("", ",") for one in ("%H:%M", "%H:%M:%S", "%I:%M %p", "%I:%M:%S %p"))]
OTHERS = "%Y-%m|%Y/%m|%m-%Y|%m/%Y|%YM%m|%b %Y|%b-%Y|%Y %b|%d.%m.%y|%d/%m/%y|%y/%m/%d|%d-%b-%y|%b-%y|%b '%y".split("|")
_PARTS = {"%Y": r"\d{4}", "%y": r"\d{2}", "%p": "[ap]m", "%b": MONTH}  # others: 1 or 2 digits
FORMS = {  # and what they look like
    "ISO8601": rf"\d{{4}}([-/.])\d{{1,2}}\1\d{{1,2}}(?:[T ]{CLOCK}(?: ?(?:Z|[+-]\d{{2}}:?\d{{2}}))?)?",
    "quarter": r"\d{4}[- ]?Q[1-4]|Q[1-4][- /]?\d{4}",
    "%G-W%V-%u": r"\d{4}-W\d{2}",
} | {
    form: re.sub("%.", lambda part: f"(?:{_PARTS.get(part[0], r'[0-9]{1,2}')})", form.replace(".", r"\."))
    for form in [*(day + clock for day in DAYS for clock in CLOCKS), *OTHERS]
}
OF_DIGITS = {6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}


def is_date(cell: str) -> bool:
    """True if a cell is a date, also one that is refused because its year has two digits. A number is none."""
    return bool(_forms(cell))


def _forms(cell: str) -> list[str]:
    """Those of FORMS that a cell can have."""
    return [form for form, pattern in FORMS.items() if re.fullmatch(pattern, cell, re.ASCII | re.IGNORECASE)]


def dates_of(cells: pd.Series, name: str, table: Table) -> pd.DatetimeIndex:
    """The dates in the cells of text (T) of column `name`, all in the form of the first date.

    A month or a quarter is its first day, a week its Monday. Times with offsets are in UTC. Whether 1/2/2023 starts
    with the day is decided for all cells together: such that all are dates, that they rise, and in equal steps.
    Raises DataError for another cell, years of two digits, seasons such as 2010/11, and cells that can be two dates.
    """
    first = next(filter(is_date, cells), None)
    if first is None:
        raise table.error(f"holds {cells.iloc[0]!r}, expected a date", name, 0)
    forms = _forms(first)
    if "%y" in forms[0]:
        raise table.error(f"{first!r} has a year of two digits, of this century or the last; write all four", name)
    fits = cells.str.fullmatch(f"(?i:{FORMS[forms[0]]})").to_numpy(bool)
    if forms[0] in ("%Y-%m", "%Y/%m", "%m-%Y", "%m/%Y") and fits.all():
        years, parts = cells.str.extract(r"(\d{4})")[0], cells.str.replace(r"\d{4}|\D", "", regex=True)
        _refuse_no_months(years.astype(int), parts.astype(int), first, name, table)
    readings = [_read(cells.where(fits), form, name, table) for form in forms]
    whole = [found for found in readings if not found.isna().any()]
    if not whole:
        cell = cells.iloc[row := max(int(found.isna().argmax()) for found in readings)][:40]
        problem = f"holds {cell!r}" if cell else "is empty"
        expected = f"a date of the calendar, written like the first one, {first!r}, midnight as 00:00"
        raise table.error(f"{problem}, expected {expected}", name, row)
    for is_good in (lambda found: found.is_monotonic_increasing, regular):
        whole = [found for found in whole if is_good(found)] or whole
    if not whole[0].equals(whole[-1]):
        at = int((whole[0] != whole[-1]).argmax())
        one, other = (f"{found[at]:%Y-%m-%d}" for found in (whole[0], whole[-1]))
        problem = f"{cells.iloc[at]!r} can start with the day or with the month, {one} or {other}"
        raise table.error(f"{problem}; write dates as {one}", name)
    return whole[0]


def _read(cells: pd.Series, form: str, name: str, table: Table) -> pd.DatetimeIndex:
    """The dates in cells (T) of one of FORMS; NaT for one that is not in the calendar, and for a missing cell."""
    if form == "quarter":
        quarters = cells.str.replace(r"(?i)(\d{4})[- ]?Q|Q(\d)[- /]?(\d{4})", r"\1\3Q\2", regex=True)
        return pd.PeriodIndex(quarters, freq="Q").to_timestamp()
    zoned = cells.str.contains(r":.*(?:Z|[+-]\d\d:?\d\d)$", na=False)
    if zoned.any() and not zoned.all():
        raise table.error("some times have an offset from UTC and some have none; write it for all", name)
    cells = cells + "-1" if "%V" in form else cells.str.replace(r"([A-Za-z]{3})[a-z]+", r"\1", regex=True)
    return pd.DatetimeIndex(pd.to_datetime(cells, format=form, errors="coerce", utc=zoned.any()))


def _refuse_no_months(years, parts, first, name: str, table: Table) -> None:
    """Raise DataError if the years and other parts (T) of months can be seasons, weeks, quarters or half-years.

    Seasons such as 2010/11 have the year that follows. Quarters count to 4 in several years.
    """
    year, kind, lower = int(years[0]), "", name.lower()
    if len(years) > 1 and (parts == (years + 1) % 100).all():
        kind = f"the season {year} to {year + 1}"
    elif re.search("week|woche|semaine|semana", lower):
        kind = "a week"
    elif max(parts) <= 4 and re.search("half|halb|semest", lower):
        kind = "a half-year"
    elif max(parts) <= 4 and (re.search("quart|trimest", lower) or min(np.ptp(years), np.ptp(parts)) > 0):
        kind = "a quarter"
    if kind:
        advice = f"write its first day, such as {year}-07-01, or {year}-W14, {year}Q2, or a season as the year {year}"
        raise table.error(f"'{first}' can be a month or {kind}; {advice}", name)


def dates_of_numbers(values: np.ndarray, name: str, table: Table, is_telling: bool) -> pd.DatetimeIndex | None:
    """The dates in numbers (T) such as 202312, 20231231, 2023123123 and longer ones; None if they are no such dates.

    is_telling: the name of the column says that it holds times. Raises DataError for weeks, seasons, numbers that may
    be months, such as 2023.12 or 12.2023, or quarters, and days that are not in the calendar.
    """
    if values.dtype.kind != "i":
        for factor, order in ((10, 1), (100, 1), (10**4, -1)) if is_telling and np.isfinite(values).all() else ():
            year, part = np.divmod(np.round(values * factor), factor)[::order]
            is_month = np.isin(year, YEARS) & np.isin(part, range(1, 5 if factor == 10 else 13))
            if (is_month & (np.abs(values * factor % 1 - 0.5) >= 0.5 - 1e-6)).all():
                problem = f"{values[0]} can be a month, a quarter or a number"
                raise table.error(f"{problem}; write months as {year[0]:.0f}-01, quarters as {year[0]:.0f}Q1", name)
        return None
    digits = len(str(values[0]))
    year, part = np.divmod(values, 10 ** max(digits - 4, 0))
    if not np.isin(year, YEARS).all():
        return None
    if digits == 6 or (digits == 5 and is_telling and np.isin(part, range(1, 5)).all()):
        _refuse_no_months(year, part, values[0], name, table)
    if digits not in OF_DIGITS:
        return None
    found = pd.DatetimeIndex(pd.to_datetime(pd.Series(values).astype(str), format=OF_DIGITS[digits], errors="coerce"))
    bad = found.isna()
    if is_telling and digits <= 8 and bad.any() and not (digits == 8 and bad.all()):
        row = int(bad.argmax())
        raise table.error(f"{values[row]} is no month, or no day of the calendar; correct it", name, row)
    if digits == 6 and not (is_telling or bad.any()) and (np.diff(values) > 0).all():
        raise table.error(f"{values[0]} can be a month or a number; call the column 'month', or write a date", name)
    return None if bad.any() else found
