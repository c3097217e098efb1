"""The time axis: which cells are dates, which numbers are times, and how an axis continues."""

from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

import numpy as np
import pytest
from dateutil import tz

from experiments.forecasting.tables.dates import dates_of, is_date
from experiments.forecasting.tables.times import DataError, Times, are_times, first_fall

FIFTH = datetime(2020, 3, 5)
DATES = {
    "2020-03-05": FIFTH,
    "2020-3-5": FIFTH,
    "2020/03/05": FIFTH,
    "2020.03.05": FIFTH,
    "5.3.2020": FIFTH,
    "05.03.20": FIFTH,
    "5 March 2020": FIFTH,
    "Mar 5, 2020": FIFTH,
    "Thu, 5 Mar 2020": FIFTH,
    "2020-03": datetime(2020, 3, 1),
    "Mar 2020": datetime(2020, 3, 1),
    "Mar-20": datetime(2020, 3, 1),
    "2020Q3": datetime(2020, 7, 1),
    "2020-Q3": datetime(2020, 7, 1),
    "2020-03-02/2020-03-08": datetime(2020, 3, 2),
    "2020-03-05 14:30": datetime(2020, 3, 5, 14, 30),
    "2020-03-05T14:30:15.5": datetime(2020, 3, 5, 14, 30, 15, 500000),
    "5.3.2020 2:30 PM": datetime(2020, 3, 5, 14, 30),
    "2020-03-05T14:30:00Z": datetime(2020, 3, 5, 14, 30, tzinfo=UTC),
    "2020/03/05 14:30 +02:00": datetime(2020, 3, 5, 14, 30, tzinfo=timezone(timedelta(hours=2))),
}


@pytest.mark.parametrize(("cell", "date"), DATES.items(), ids=DATES.keys())
def test_a_date(cell, date):
    assert is_date(cell)
    (found,) = dates_of([cell], "here")
    assert found == date
    assert found.utcoffset() == date.utcoffset()


@pytest.mark.parametrize(
    "cell",
    ["", "5", "2020", "20200305", "20200305.10", "20200305,10", "20200305e10", "1.5", "1-2", "14:30",
     "March", "5 March", "2020-13-05", "31.02.2020", "99/1/23", "45/1/2020", "oak 5, 2020", "0001-01-01", "9999-12-31",
     "5 Mar 2020" + " " * 50],
)  # fmt: skip
def test_no_date(cell):
    assert not is_date(cell)
    assert dates_of([cell], "here") is None


@pytest.mark.parametrize(
    ("cells", "first"),
    [
        (["31/12/2023", "01/01/2024"], datetime(2023, 12, 31)),  # only one order has dates
        (["12/31/2023", "01/01/2024"], datetime(2023, 12, 31)),
        (["01/12/2023", "02/01/2023"], datetime(2023, 1, 12)),  # in the other order they fall
        (["01/02/2023", "02/02/2023", "03/02/2023", "05/03/2023"], None),  # no order has equal steps
        (["01/02/2023", "02/02/2023", "03/02/2023"], None),  # both orders have: days, months
        (["01/02/2023"], None),
        (["05/05/2023"], datetime(2023, 5, 5)),  # both orders agree
        (["02/01/2023", "09/01/2023", "16/01/2023"], datetime(2023, 1, 2)),
        (["10/12/2023", "11/12/2023", "12/12/2023", "01/12/2024"], datetime(2023, 10, 12)),  # months; or unequal days
    ],
)
def test_the_column_decides_whether_the_day_is_first(cells, first):
    if first is None:
        with pytest.raises(DataError, match=f"here: '{cells[0]}' can start with the month or with the day; write"):
            dates_of(cells, "here")
    else:
        assert dates_of(cells, "here")[0] == first


def test_dates_of_one_column_can_be_compared():
    assert dates_of(["2020-03-05", "oak"], "here") is None
    assert dates_of(["2020-03-05", "2020-03-06T00:00Z"], "here") is None
    summer = dates_of(["2020-03-29T01:00+01:00", "2020-03-29T03:00+02:00"], "here")
    assert [str(date) for date in summer] == ["2020-03-29 01:00:00+01:00", "2020-03-29 03:00:00+02:00"]
    assert Times("", summer).positions.tolist() == [0, 3600]
    assert dates_of(["2020-03-29T03:00+02:00", "2020-03-29T01:30+01:00"], "here")  # they fall; the reader says where


def test_clocks_that_change_are_no_change_of_steps():
    midnights = dates_of(["2020-03-28T00:00+01:00", "2020-03-29T00:00+01:00", "2020-03-30T00:00+02:00"], "here")
    times = Times("", midnights)  # the second day has 23 hours
    assert times.regular
    assert [times.text(time) for time in times.following(2)] == ["2020-03-31", "2020-04-01"]
    zone = tz.gettz("Europe/Berlin")
    hours = [datetime(2020, 10, 24, 23, 30, tzinfo=UTC) + timedelta(hours=hour) for hour in range(3)]
    hours = [hour.astimezone(zone) for hour in hours]  # 1:30, 2:30 and 2:30 once more
    assert first_fall(hours) is None
    assert Times("", hours).positions.tolist() == [0, 3600, 7200]
    assert [str(time) for time in Times("", hours).following(1)] == ["2020-10-25 03:30:00+01:00"]


@pytest.mark.parametrize(
    ("name", "values", "has_dates", "expected"),
    [
        ("time", [0, 1, 5], False, True),
        ("Time (s)", [0.1, 0.2, 0.7], False, True),
        ("YEAR", [1900, 1901], True, True),
        ("time", [0, 1, 1], False, False),
        ("time", [2, 1, 0], False, False),
        ("time", [0, np.nan, 2], False, False),
        ("time", [-1.7e308, 0, 1.7e308], False, False),
        ("step", [1, 2], False, True),
        ("id", [1, 2, 4], False, False),
        ("", [0.5, 1, 1.5], False, True),
        ("", [0.5, 1], False, False),
        ("", [0.5, 1, 1.6], False, False),
        ("price", [1.5, 2.5, 3.5], False, False),
        ("x", [10, 20, 30], False, True),
        ("x", [10, 20, 30], True, False),
        ("step", [10, 20, 30], True, True),
    ],
)
def test_numbers_that_are_times(name, values, has_dates, expected):
    assert are_times(name, np.array(values, float), has_dates) == expected


def days(*cells: str) -> list[datetime]:
    return [datetime.fromisoformat(cell) for cell in cells]


DAILY = [datetime(2024, 1, 1) + timedelta(day) for day in range(26)]  # from a Monday to a Friday
WEEKDAYS = [day for day in DAILY if day.weekday() < 5]
CONTINUED = {  # times, whether they are regular, the next two
    "days": (days("2024-02-27", "2024-02-28"), True, ["2024-02-29", "2024-03-01"]),
    "weeks": (days("2024-02-15", "2024-02-22"), True, ["2024-02-29", "2024-03-07"]),
    "weekdays": (WEEKDAYS, True, ["2024-01-29", "2024-01-30"]),
    "weekdays with a holiday": (WEEKDAYS[:12] + WEEKDAYS[13:], False, ["2024-01-29", "2024-01-30"]),
    "month starts": (days("2023-11-01", "2023-12-01"), True, ["2024-01-01", "2024-02-01"]),
    "month ends": (days("2023-11-30", "2023-12-31"), True, ["2024-01-31", "2024-02-29"]),
    "the 30th": (days("2024-01-30", "2024-02-29", "2024-03-30"), True, ["2024-04-30", "2024-05-30"]),
    "quarters": (days("2023-07-01", "2023-10-01"), True, ["2024-01-01", "2024-04-01"]),
    "years": (days("2023-02-28", "2024-02-28"), True, ["2025-02-28", "2026-02-28"]),
    "hours": (days("2024-01-01 22:00", "2024-01-01 23:00"), True, ["2024-01-02 00:00:00", "2024-01-02 01:00:00"]),
    "hours with an offset": (
        days("2024-01-01T22:00+02:00", "2024-01-01T23:00+02:00"),
        True,
        ["2024-01-02 00:00:00+02:00", "2024-01-02 01:00:00+02:00"],
    ),
    "irregular": (days("2024-01-01", "2024-01-03", "2024-01-05", "2024-01-15"), False, ["2024-01-17", "2024-01-19"]),
    "repeated": (days("2024-01-01", "2024-01-01", "2024-01-01"), False, ["2024-01-02", "2024-01-03"]),
    "one date": (days("2024-01-01"), False, ["2024-01-02", "2024-01-03"]),
    "numbers": (np.array([1900.0, 1901, 1902]), True, ["1903", "1904"]),
    "rounded numbers": (np.array([0, 0.333, 0.667, 1]), True, ["1.3333333", "1.6666667"]),
    "irregular numbers": (np.array([0.0, 1, 2, 7]), False, ["8", "9"]),
    "one number": (np.array([3.0]), False, ["4", "5"]),
    "tiny steps": (np.array([1e-9, 2e-9]), True, ["3e-09", "4e-09"]),
}


@pytest.mark.parametrize(("values", "regular", "expected"), CONTINUED.values(), ids=CONTINUED.keys())
def test_continuation(values, regular, expected):
    times = Times("t", values)
    assert times.regular == regular
    assert [times.text(time) for time in times.following(2)] == expected
    assert all(a < b for a, b in pairwise([values[-1], *times.following(5)]))


@pytest.mark.parametrize("values", [days("9998-12-30", "9999-12-30"), np.array([1e308, 1.7e308])])
def test_an_axis_cannot_continue_for_ever(values):
    with pytest.raises(DataError, match=r"'t' ends at .*, too late for 2 more times .*; forecast fewer steps"):
        Times("t", values).following(2)


def test_positions_are_numbers():
    assert Times("t", days("2024-01-01", "2024-01-02")).positions.tolist() == [0, 86400]
    assert Times("t", np.array([3.0, 5])).positions.tolist() == [3, 5]
