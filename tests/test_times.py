"""The times of a series: which cells and numbers are dates, and how times continue."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from experiments.tables import DataError, following
from experiments.tables.dates import dates_of, is_date
from experiments.tables.table import Table
from experiments.tables.times import gapless, regular, time_texts

FIFTH = datetime(2020, 3, 5)
DATES = {
    FIFTH: ["2020-03-05", "5.3.2020", "5 March 2020", "Mar 5, 2020", "05MAR2020"],
    datetime(2020, 3, 1): ["2020-03", "2020M03", "3/2020"],
    datetime(2020, 7, 1): ["Q3 2020", "2020Q3"],
    datetime(2020, 3, 2): ["2020-W10"],
    datetime(2020, 3, 5, 14, 30): ["5.3.2020 2:30 PM", "5.3.2020, 14:30", "2020-03-05 02:30 pm"],
    datetime(2020, 3, 5, 14, 30, 15, 500000): ["2020-03-05T14:30:15.5"],
    datetime(2020, 3, 5, 14, 30, tzinfo=UTC): ["2020-03-05T14:30:00Z", "2020/03/05 16:30 +02:00"],
}


def read(cells):
    return dates_of(pd.Series(cells, dtype="str"), "d", Table("here"))


@pytest.mark.parametrize(("cell", "date"), [(cell, date) for date, cells in DATES.items() for cell in cells])
def test_a_date(cell, date):
    assert read([cell])[0] == date


NO_DATES = ["", "5", "20200305", "20200305.10", "20200305,10", "20200305e10", "1-2", "14:30", "March", "5 March",
            "oak 5, 2020", "Januar 2020", "5 Mar 2020" + " " * 50]  # fmt: skip


@pytest.mark.parametrize("cell", NO_DATES)
def test_no_date(cell):
    assert not is_date(cell)


NOT_IN_CALENDAR = ["2020-13-05", "31.02.2020", "45/1/2020", "2020-01-01 24:00", "2020-W54"]
TWO_DIGITS = ["Jan-59", "30.12.55", "5-Jan-59", "1/2/03", "99/1/23", "Jan '59"]


@pytest.mark.parametrize("cell", NOT_IN_CALENDAR + TWO_DIGITS)
def test_dates_that_are_refused(cell):
    with pytest.raises(DataError, match="two digits" if cell in TWO_DIGITS else "of the calendar, .* midnight as 00"):
        read([cell])


@pytest.mark.parametrize(("cells", "first"), [
    (["31/12/2023", "01/01/2024"], datetime(2023, 12, 31)),  # only one order has dates
    (["01/12/2023", "02/01/2023"], datetime(2023, 1, 12)),  # in the other order they fall
    (["05/05/2023"], datetime(2023, 5, 5)),  # both orders agree
    (["02/01/2023", "09/01/2023", "16/01/2023"], datetime(2023, 1, 2)),
    (["10/12/2023", "11/12/2023", "12/12/2023", "01/12/2024"], datetime(2023, 10, 12)),  # months; or unequal days
])  # fmt: skip
def test_the_column_decides_whether_the_day_is_first(cells, first):
    assert read(cells)[0] == first


def days(*cells: str) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(cells, name="t")


DAILY = pd.date_range("2024-01-01", periods=91, name="t")  # 13 weeks from a Monday on
WEEKDAYS = DAILY[DAILY.day_of_week < 5]
ODD_DAYS = DAILY[DAILY.day_of_week.isin([0, 2, 4])]
SEMI = pd.date_range("2024-01-15", periods=8, freq="SME")
WORKING = pd.date_range("2023-01-31", periods=12, freq="BME")
BERLIN = pd.date_range("2020-10-25 00:30", periods=3, freq="h", tz="Europe/Berlin")  # clocks change
CONTINUED = {  # times, whether they are regular, the next two
    "weekdays with many holidays": (WEEKDAYS[:20].delete([2, 8, 12]), False, "2024-01-29, 2024-01-30"),
    "weekdays, then a Saturday": (WEEKDAYS.union(DAILY[-2:-1]), False, "2024-04-01, 2024-04-02"),
    "Monday, Wednesday, Friday, a holiday": (ODD_DAYS.delete(8), False, "2024-04-01, 2024-04-03"),
    "six days": (DAILY[:6], True, "2024-01-07, 2024-01-08"),
    "halves of months": (pd.date_range("2024-01-01", periods=8, freq="SMS"), True, "2024-05-01, 2024-05-15"),
    "a half is missing": (SEMI.delete(2), False, "2024-05-15, 2024-05-31"),
    "month ends": (days("2023-11-30", "2023-12-31"), True, "2024-01-31, 2024-02-29"),
    "a month end is missing": (WORKING.delete(5), False, "2024-01-31, 2024-02-29"),
    "the 30th": (days("2024-01-30", "2024-02-29", "2024-03-30"), True, "2024-04-30, 2024-05-30"),
    "hours when clocks change": (BERLIN, True, "2020-10-25 02:30:00+01:00, 2020-10-25 03:30:00+01:00"),
    "irregular": (DAILY[[0, 2, 4, 14]], False, "2024-01-17, 2024-01-19"),
    "numbers apart that all differ": (pd.Index([0.0, 0.1, 0.9, 1.5]), False, "2.1, 2.7"),
    "a number is missing": (pd.Index([1900, 1901, 1903, 1904]), False, "1905, 1906"),
    "rounded numbers": (pd.Index([0, 0.333, 0.667, 1]), True, "1.3333333, 1.6666667"),
    "tiny steps": (pd.Index([1e-9, 2e-9]), True, "3e-09, 4e-09"),
}


@pytest.mark.parametrize(("index", "is_regular", "expected"), CONTINUED.values(), ids=CONTINUED.keys())
def test_continuation(index, is_regular, expected):
    assert regular(index) == is_regular
    assert ", ".join(time_texts(following(index, 2), index)) == expected


HOURS = pd.date_range("2024-03-25", periods=240, freq="h", tz="Europe/Berlin", name="t")  # clocks change
GRIDS = [HOURS, DAILY[:26], pd.date_range("2020-01-31", periods=24, freq="BME"), pd.date_range("2000-10-01", periods=24,
         freq="QS"), pd.Index(range(1900, 1950)), pd.Index(np.arange(50, dtype=np.uint16)), pd.Index([at / 10 for at in
         range(50)])]  # fmt: skip


@pytest.mark.parametrize("index", GRIDS)
def test_times_that_are_left_out(index):
    is_there = np.random.default_rng(0).random(len(index)) < 0.7
    is_there[[0, -1]] = True
    pd.testing.assert_index_equal(gapless(index[is_there]), index, check_exact=False)


NO_GRIDS = {
    "weekdays with a holiday": WEEKDAYS[:20].delete(12),
    "opening hours": HOURS[(HOURS.hour > 8) & (HOURS.hour < 18)],
    "hours of weekdays": pd.date_range("2024-01-01", periods=600, freq="h").to_series()[lambda at: at.dt.dayofweek < 5],
    "months of summers": (every := pd.date_range("2000-01-01", periods=48, freq="MS"))[every.month % 11 > 4],
    "off the grid": pd.Index([*range(20), 20.5]),
    "few": pd.Index([0, 1, 2, 3, 4, 6]),
    "the end of the calendar": pd.date_range("9980-01-01", periods=15, freq="500D", unit="s").union(days("9999-12-01")),
    "steps that grow": pd.Index(np.arange(20) ** 2),
    "a working Saturday": pd.bdate_range("2024-01-01", "2024-12-31").delete(99).union(days("2024-03-02")),
    "working days around holidays": pd.bdate_range("2023-12-18", "2024-01-05").delete([5, 6, 10]),
    "days of summers": (every := pd.date_range("2019-05-01", "2024-10-31"))[(every.month > 4) & (every.month < 11)],
}


@pytest.mark.parametrize("index", NO_GRIDS.values(), ids=NO_GRIDS.keys())
def test_times_that_are_not_left_out(index):
    index = pd.Index(index)
    assert gapless(index) is index
    assert not regular(index)


@pytest.mark.parametrize(("index", "message"), [
    (days("9998-12-30", "9999-12-30"), "ends at .*, too late for 400000 more times .*; forecast fewer steps"),
    (pd.Index([1e308, 1.7e308]), "ends at .*, too late for 400000 more times .*; forecast fewer steps"),
    (days("2024-01-01"), r"'t' has one time, .*, expected at least two, whose step can be continued"),
])  # fmt: skip
def test_times_that_cannot_continue(index, message):
    with pytest.raises(DataError, match=message):
        following(index, 400000)
