"""Files as people have them: text tables, HDF5, Parquet, pandas."""

import gzip
from datetime import date, datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.forecasting.forecaster import Forecast
from experiments.forecasting.tables import DataError, delimited, describe, from_frame, read_tables, to_csv, to_frame


@pytest.fixture
def table(tmp_path):
    """Read a text as a file: the one table in it."""

    def read(content: str | bytes, columns=None, missing="error", name="a.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        (found,) = read_tables(path, columns, missing)
        return found

    return read


PANDAS = {  # as df.to_csv() writes
    "counted rows": ",value\n0,1.5\n1,1.6\n2,1.7\n",
    "a number as name": ",0\n0,1.5\n1,1.6\n2,1.7\n",
    "no index": "value\n1.5\n1.6\n1.7\n",
    "dates as index": ",value\n2023-01-01,1.5\n2023-01-02,1.6\n2023-01-03,1.7\n",
    "a named index": "day,value\n2023-01-01,1.5\n2023-01-02,1.6\n2023-01-03,1.7\n",
}


@pytest.mark.parametrize("text", PANDAS.values(), ids=PANDAS.keys())
def test_what_pandas_writes_is_read(table, text):
    found = table(text)
    assert found.values.tolist() == [[1.5], [1.6], [1.7]]
    assert found.variables == ["0" if ",0\n" in text else "value"]
    assert (found.times is not None) == ("2023" in text)


def test_numbers_as_names(table):
    found = table(",0,1\n0,1.5,4\n1,1.6,4\n")
    assert (found.variables, found.values.tolist()) == (["0", "1"], [[1.5, 4], [1.6, 4]])


def test_a_header_is_a_row_with_a_cell_that_is_no_number(table):
    assert table("site,2019,2020\n0.5,1.5,2.5\n0.1,1.6,2.4\n").variables == ["site", "2019", "2020"]
    years = table("2018,2019,2020\n0.5,1.5,2.5\n0.1,1.6,2.4\n")  # years alone are numbers, so data
    assert (years.variables, len(years.values)) == (["x0", "x1", "x2"], 3)


STYLES = {
    "commas": "a,b\n1.5,2\n1.6,3\n",
    "semicolons": "a;b\n1.5;2\n1.6;3\n",
    "tabs": "a\tb\n1.5\t2\n1.6\t3\n",
    "spaces": "a b\n1.5 2\n1.6 3\n",
    "decimal commas": "a;b\n1,5;2\n1,6;3\n",
    "quoted cells": '"a","b"\n"1.5","2"\n"1.6","3"\n',
    "comments and empty lines": "# made by a logger\na,b\n\n1.5,2\n# a pause\n1.6,3\n\n",
    "byte order mark": "\ufeffa,b\n1.5,2\n1.6,3\n",
    "western Europe": "a,b,Höhe\n1.5,2,1\n1.6,3,1\n".encode("cp1252"),
    "spaces in a row": "  a   b\n  1.5 2\n1.6   3\n",
    "windows": "a,b\r\n1.5,2\r\n1.6,3\r\n",
    "utf-16": "a,b\n1.5,2\n1.6,3\n".encode("utf-16"),
    "gzip": gzip.compress(b"a,b\n1.5,2\n1.6,3\n"),
    "a column of texts is left out by name": "a,b,site\n1.5,2,Ham\n1.6,3,Ham\n",
}


@pytest.mark.parametrize("content", STYLES.values(), ids=STYLES.keys())
def test_styles_of_text_tables(table, content):
    found = table(content, ["a", "b"])
    assert found.variables == ["a", "b"]
    assert found.values.tolist() == [[1.5, 2], [1.6, 3]]


def test_thousands_and_decimal_commas(table):
    assert table('a,b\n"12,000",1\n"3,500.5",2\n').values.tolist() == [[12000, 1], [3500.5, 2]]
    assert table("a;b\n1.234,5;1\n12,5;2\n").values.tolist() == [[1234.5, 1], [12.5, 2]]
    with pytest.raises(DataError, match=r"'12,000' can be 12.000 or 12000; write all numbers with a decimal point"):
        table("a;b\n12,000;1\n13,000;2\n")


TIMES = {  # text: (name, first, text of the next two)
    "days": ("date,a\n2023-01-30,1\n2023-01-31,2\n", "date", ["2023-02-01", "2023-02-02"]),
    "day first": ("date,a\n30.01.2023,1\n31.01.2023,2\n01.02.2023,3\n", "date", ["2023-02-02", "2023-02-03"]),
    "month first": ("date,a\n1/30/2023,1\n1/31/2023,2\n2/1/2023,3\n", "date", ["2023-02-02", "2023-02-03"]),
    "weekdays": (
        "date,a\n" + "".join(f"2024-01-{day:02d},1\n" for day in (1, 2, 3, 4, 5, 8, 9, 10, 11, 12)),
        "date",
        ["2024-01-15", "2024-01-16"],
    ),
    "month ends": ("date,a\n2023-01-31,1\n2023-02-28,2\n2023-03-31,3\n", "date", ["2023-04-30", "2023-05-31"]),
    "quarters": ("q,a\n2023Q3,1\n2023Q4,2\n", "q", ["2024-01-01", "2024-04-01"]),
    "names of months": ("month,a\nNov 2023,1\nDec 2023,2\n", "month", ["2024-01-01", "2024-02-01"]),
    "hours": ("at,a\n2023-01-01 22:00,1\n2023-01-01 23:00,2\n", "at", ["2023-01-02 00:00:00", "2023-01-02 01:00:00"]),
    "years": ("year,a\n1900,1\n1901,2\n", "year", ["1902", "1903"]),
    "seconds": ("time [s],a\n0.0,1\n0.1,2\n0.2,3\n", "time [s]", ["0.3", "0.4"]),
    "equal steps without a name": (",a\n10,1\n20,2\n30,3\n", "time", ["40", "50"]),
    "dates as numbers": ("day,a\n20231230,1\n20231231,2\n", "day", ["2024-01-01", "2024-01-02"]),
    "not in equal steps": ("t,a\n0,1\n1,2\n2,3\n7,4\n", "t", ["8", "9"]),
}


@pytest.mark.parametrize(("text", "name", "following"), TIMES.values(), ids=TIMES.keys())
def test_a_time_axis_is_found_and_continued(table, text, name, following):
    found = table(text)
    assert found.variables == ["a"]
    assert found.times.name == name
    assert [found.times.text(time) for time in found.times.following(2)] == following
    assert found.times.regular == ("7,4" not in text)
    written = to_csv([found], Forecast(np.ones((1, 2, 1)), None, None), [])
    assert written.splitlines()[1:] == [f"0,{step},{time},1" for step, time in enumerate(following, start=1)]


def test_what_is_no_time_axis_is_a_variable(table):
    assert table("weight,a\n1.1,1\n1.2,2\n1.4,3\n").variables == ["weight", "a"]
    assert table("year,a\n1900,1\n1901,2\n", ["year", "a"]).variables == ["year", "a"]  # asked for by name
    assert table("1\n2\n3\n").variables == ["x0"]  # the only column
    assert table(",a,b\n2023-01-01,1,5\n2023-01-02,2,6\n2023-01-03,3,9\n").variables == ["a", "b"]  # dates are the axis
    assert table("20231115.10,1\n20231215.11,2\n").variables == ["x0", "x1"]  # decimals are no dates


def test_times_that_fall_or_that_are_ambiguous_are_refused(table):
    with pytest.raises(DataError, match=r"line 3, column 'date'.*: the time 2023-01-01 comes after 2023-01-02; sort"):
        table("date,a\n2023-01-02,1\n2023-01-01,2\n")
    with pytest.raises(DataError, match="'1/2/2023' can start with the month or with the day"):
        table("date,a\n1/2/2023,1\n2/3/2023,2\n")


@pytest.mark.parametrize("mark", ["", "nan", "NA", "null", "-", "?"])
def test_missing_values_are_counted_or_interpolated(table, mark):
    text = f"t,a,b\n0,1,5\n1,{mark},{mark}\n3,4,7\n4,{mark},8\n"
    with pytest.raises(DataError, match=r"3 of 8 values are missing, the first in line 3, column 'a'; fill them with"):
        table(text)
    assert table(text, missing="interpolate").values.tolist() == [[1, 5], [2, pytest.approx(17 / 3)], [4, 7], [4, 8]]
    with pytest.raises(DataError, match="'a' has 1 of 2 values, expected at least 2 to interpolate"):
        table(f"a,b\n1,1\n{mark},2\n", missing="interpolate")


BAD = {
    "text": ("a,b\n1,2\n3,oak\n", "line 3, column 'b': holds 'oak', expected a number"),
    "infinite": ("a,b\n1,2\n3,inf\n", "line 3, column 'b': is infinite"),
    "ragged": ("1,2\n3,4,5\n", "line 2: has 3 columns, the first line has 2"),
    "empty": ("", "is empty"),
    "names only": ("a,b\n", "has names but no numbers"),
    "only dates": ("date\n2023-01-01\n2023-01-02\n", "has no column of numbers"),
    "twice": ("a,a\n1,2\n3,4\n", "has 2 columns 'a', expected one"),
    "quote": ('a\n"1\n', "not a readable CSV file"),
    "both marks": ("a;b\n1,5;1.5\n1,6;1.6\n", "has the other mark"),
    "no rows for the sample": ("# only a comment\n\n", "is empty"),
    "a date is missing": ("date,a\n2023-01-01,1\n,2\n", "line 3, column 'date': holds 'nothing', expected a date"),
    "a date is another text": ("a,date\n1,2023-01-01\n2,oak\n", "line 3, column 'date': holds 'oak', expected a date"),
    "a number too large": ("a,b\n1,1e999\n", "line 2, column 'b': is infinite"),
    "names of months over numbers": ("Jan 2020,Feb 2020\n1,2\n", "column 'x0': holds '1', expected a date"),
    "no text": (b"a\n\x81\n", "not a readable CSV file"),
    "damaged gzip": (gzip.compress(b"a\n1\n2\n")[:-4], "not a readable CSV file"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_bad_text_tables_are_refused_and_named(table, text, message):
    with pytest.raises(DataError, match=message):
        table(text)


def test_a_small_file_cannot_claim_much_memory(table, monkeypatch):
    monkeypatch.setattr(delimited, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to more than 1,000 bytes"):
        table(gzip.compress(b"1.5\n" * 1000), name="a.csv.gz")


numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)


@pytest.mark.parametrize(("delimiter", "mark"), [*((mark, ".") for mark in ",;\t "), *((mark, ",") for mark in ";\t ")])
def test_numbers_come_back_exactly(delimiter, mark, tmp_path_factory):
    path = tmp_path_factory.mktemp("round") / "a.csv"

    @given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
    def check(rows):
        lines = (delimiter.join(repr(value).replace(".", mark) for value in row) for row in rows)
        path.write_text(f"a{delimiter}b\n" + "\n".join(lines) + "\n")
        try:
            (found,) = read_tables(path, ["a", "b"])
        except DataError as error:
            if "write all numbers with a decimal point" in str(error):
                return  # 1,234 alone can be two numbers
            raise
        assert found.values.tolist() == [list(row) for row in rows]

    check()


def test_hdf5_files_of_any_number_of_variables(tmp_path):
    path, values = tmp_path / "some.h5", np.arange(24.0).reshape(2, 4, 3) - 5
    with h5py.File(path, "w") as file:
        file["trajectories"], file["time"] = values, np.arange(4) * 0.5
        file["trajectories"].attrs["variables"] = ["u", "v", "w"]
    first, second = read_tables(path)
    assert (first.name, second.name, first.variables) == ("some[0]", "some[1]", ["u", "v", "w"])
    assert np.array_equal(second.values, values[1])
    assert second.times.following(1) == [2.0]
    assert read_tables(path, ["w"])[0].values.tolist() == values[0][:, 2:].tolist()
    with h5py.File(path, "w") as file:  # arrays of their own, one for each series
        file["north"], file["south"] = np.ones((5, 2)), np.ones(7)
    assert [(one.name, one.values.shape) for one in read_tables(path)] == [("north", (5, 2)), ("south", (7, 1))]
    with h5py.File(path, "w") as file:
        file["trajectories"] = np.array([[[1.0], [np.nan], [3.0]]])
    with pytest.raises(DataError, match=r"1 of 3 values is missing, the first in trajectories\[0, 1, 0\]"):
        read_tables(path)
    assert read_tables(path, missing="interpolate")[0].values.ravel().tolist() == [1, 2, 3]


def test_frames_in_and_out(tmp_path):
    pandas = pytest.importorskip("pandas")
    index = pandas.date_range("2023-01-31", periods=3, freq="ME", name="month")
    frame = pandas.DataFrame({"a": [1.0, 2, 4], "b": [4, 5, 6]}, index=index)
    table = from_frame(frame)
    assert table.variables == ["a", "b"]
    made = to_frame(table, np.ones((2, 2)), np.zeros((1, 2, 2)), [0.1])
    assert list(made.columns) == ["a", "b", "a_q0.1", "b_q0.1"]
    assert list(made.index) == [datetime(2023, 4, 30), datetime(2023, 5, 31)]
    assert made.index.name == "month"
    plain = from_frame(frame.reset_index(drop=True))
    assert plain.times is None
    assert list(to_frame(plain, np.ones((2, 2))).index) == [3, 4]
    assert from_frame(frame["a"]).values.shape == (3, 1)
    assert from_frame(frame.to_period("M")).times.following(1) == [datetime(2023, 4, 1)]
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "a.parquet")
    (found,) = read_tables(tmp_path / "a.parquet")
    assert np.array_equal(found.values, frame.to_numpy())
    with pytest.raises(DataError, match="missing"):
        from_frame(frame.replace(5, np.nan))


def test_the_example_is_described_in_one_line():
    (found,) = read_tables(Path(__file__).parents[1] / "examples" / "hare-lynx.csv")
    assert describe(found) == "hare-lynx: 21 rows of 2 variables (hare, lynx), time: year, 1900 to 1920"
    assert found.values.sum(axis=0).tolist() == pytest.approx([715.7, 423.5])


def test_columns_are_chosen_by_name(table):
    assert table("a,b,a\n1,2,3\n4,5,6\n", ["b"]).values.tolist() == [[2], [5]]
    assert table("a,b\n1,2\n", ["b", "a", "b"]).variables == ["b", "a"]
    with pytest.raises(DataError, match=r"has 0 columns 'c', expected one; the file has \['a', 'b'\]"):
        table("a,b\n1,2\n", ["c"])
    with pytest.raises(DataError, match="has no column of numbers"):
        table("a,b\n1,2\n", [])


def test_missing_values_are_interpolated_in_time(table):
    assert table("t,a\n0,1\n1,\n4,2\n", missing="interpolate").values.ravel().tolist() == [1, 1.25, 2]
    assert table("day,a\n2023-01-01,1\n2023-01-02,\n2023-01-05,2\n", missing="interpolate").values[1] == 1.25
    assert table("a\n1\nNA\nNA\n4\n", missing="interpolate").values.ravel().tolist() == [1, 2, 3, 4]
    assert table("t,a\n0,\n1,1\n2,2\n9,\n", missing="interpolate").values.ravel().tolist() == [1, 1, 2, 2]
    repeated = "day,a\n2023-01-01,1\n2023-01-01,\n2023-01-01,2\n"
    assert 1 <= table(repeated, missing="interpolate").values[1] <= 2
    with pytest.raises(DataError, match="is infinite"):
        table("a\n1\n\ninf\nNA\n", missing="interpolate")
    with pytest.raises(DataError, match="missing is 'zero', expected one of error, interpolate"):
        table("a\n1\n", missing="zero")


@pytest.fixture
def hdf5(tmp_path):
    """Read arrays as a file: the tables in it."""

    def read(arrays, attributes=(), columns=None):
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
            for owner, key, value in attributes:
                file[owner].attrs[key] = value
        return read_tables(path, columns)

    return read


THREE = np.ones((1, 4, 3))


@pytest.mark.parametrize(
    ("arrays", "attributes", "names"),
    [
        ({"trajectories": THREE}, [], ["x0", "x1", "x2"]),
        ({"trajectories": THREE[..., :2]}, [], ["x0", "x1"]),
        ({"trajectories": THREE[..., :2], "time": np.arange(4.0)}, [], ["prey", "predator"]),
        ({"trajectories": THREE}, [("/", "names", ["u", "v", "w"])], ["u", "v", "w"]),
        ({"trajectories": THREE}, [("trajectories", "names", "u, v, w")], ["u", "v", "w"]),
        ({"trajectories": THREE}, [("trajectories", "names", np.array([b"u", b"v", b"w"]))], ["u", "v", "w"]),
        ({"a": np.ones(4)}, [("a", "variables", "load")], ["load"]),
    ],
)
def test_names_in_hdf5(hdf5, arrays, attributes, names):
    assert hdf5(arrays, attributes)[0].variables == names


@pytest.mark.parametrize(
    ("arrays", "attributes", "message"),
    [
        ({}, [], r"holds \[\], expected the array 'trajectories', or arrays"),
        ({"time": np.arange(3.0)}, [], r"holds \['time'\], expected"),
        ({"group/a": np.ones(3)}, [], r"holds \['group'\], expected"),
        ({"a": np.ones((2, 3, 4))}, [], "expected numbers of rank 1 or 2"),
        ({"trajectories": np.ones((2, 3))}, [], "expected numbers of rank 3"),
        ({"a": np.array([b"x"])}, [], "expected numbers"),
        ({"a": np.ones((0, 2))}, [], "expected at least one number"),
        ({"trajectories": THREE, "time": np.arange(3.0)}, [], r"are \(1, 4, 3\) and time \(3,\), expected"),
        ({"a": np.ones(3), "time": np.array([0.0, 2, 1])}, [], "time is not finite or does not rise"),
        ({"a": np.ones(3), "time": np.array([0, 1, np.nan])}, [], "time is not finite or does not rise"),
        ({"a": np.array([1, np.inf])}, [], r"a\[1, 0\]: is infinite"),
        ({"trajectories": THREE}, [("/", "names", ["u", "v"])], "expected 3 different names"),
        ({"trajectories": THREE}, [("/", "names", ["u", "v", "v"])], "expected 3 different names"),
    ],
)
def test_other_hdf5_files_are_refused(hdf5, arrays, attributes, message):
    with pytest.raises(DataError, match=message):
        hdf5(arrays, attributes)


def test_columns_and_times_of_hdf5(hdf5):
    with pytest.raises(DataError, match="has 0 columns 'y', expected one"):
        hdf5({"a": np.ones((4, 2))}, columns=["y"])
    short, long = hdf5({"short": np.ones(3), "time": np.arange(4.0), "long": np.ones(4)})[::-1]
    assert short.times is None
    assert long.times.following(1) == [4]


INDEXES = {  # index of three rows: the time after the last, or None if it is no time axis
    "dates": (lambda pandas: pandas.date_range("2023-01-30", periods=3), "2023-02-02 00:00:00"),
    "hours in a zone": (
        lambda pandas: pandas.date_range("2023-01-01", periods=3, freq="h", tz="Asia/Tokyo"),
        "2023-01-01 03:00:00+09:00",
    ),
    "midnights when clocks change": (
        lambda pandas: pandas.date_range("2023-03-25", periods=3, tz="Europe/Berlin"),
        "2023-03-28 00:00:00+02:00",
    ),
    "hours when clocks change": (
        lambda pandas: pandas.date_range("2023-10-29 01:30", periods=3, freq="h", tz="Europe/Berlin"),
        "2023-10-29 03:30:00+01:00",
    ),
    "months": (lambda pandas: pandas.period_range("2023-01", periods=3, freq="M"), "2023-04-01 00:00:00"),
    "durations": (lambda pandas: pandas.to_timedelta([0, 10, 20], unit="s"), "30.0"),
    "days": (lambda pandas: pandas.Index([date(2023, 1, day) for day in (1, 2, 3)]), "2023-01-04 00:00:00"),
    "texts": (lambda pandas: pandas.Index(["2023-01-01", "2023-01-02", "2023-01-03"]), "2023-01-04 00:00:00"),
    "years": (lambda pandas: pandas.RangeIndex(1900, 1903), "1903.0"),
    "numbers": (lambda pandas: pandas.Index([0.5, 1, 1.5]), "2.0"),
    "a count": (lambda pandas: pandas.RangeIndex(3), None),
    "a count as numbers": (lambda pandas: pandas.Index([0, 1, 2]), None),
    "numbers that fall": (lambda pandas: pandas.Index([3, 2, 1]), None),
    "labels": (lambda pandas: pandas.Index(["a", "b", "c"]), None),
}


@pytest.mark.parametrize(("index", "following"), INDEXES.values(), ids=INDEXES.keys())
def test_the_index_of_a_frame(index, following):
    pandas = pytest.importorskip("pandas")
    table = from_frame(pandas.DataFrame({"a": [1, 2, 3], "b": [4, 6, 5]}, index=index(pandas)))
    if following is None:
        assert (table.times.name, table.variables) == ("a", ["b"])  # by the rules for columns
    else:
        assert table.variables == ["a", "b"]
        made = to_frame(table, np.ones((1, 2)))
        assert (made.index.name, str(made.index[0])) == ("time", following)


@pytest.mark.parametrize(
    ("columns", "index", "message"),
    [
        ({"a": ["x", "y"]}, None, r"row 0 \(0\), column 'a': holds 'x', expected a number; leave columns out of"),
        ({"a": [True, False]}, None, "holds 'True', expected a number"),
        ({"a": [1, np.nan]}, None, r"1 of 2 values is missing, .* row 1 \(1\), column 'a'; fill them with missing="),
        ({"a": []}, None, "has no rows"),
        ({"a": [1, 2]}, ["2023-01-02", "2023-01-01"], "time 2023-01-01 00:00:00 of row 1 comes after"),
        ({"a": [1, 2]}, ["2023-01-02", None], "1 of 2 dates are missing"),
        ({"a": [1, 2]}, [("x", 1), ("x", 2)], "several levels"),
        ({"date": ["2023-01-01", "2023-01-02"]}, None, "has no column of numbers"),
    ],
)
def test_frames_that_are_refused(columns, index, message):
    pandas = pytest.importorskip("pandas")
    if index and isinstance(index[0], str):
        index = pandas.to_datetime(index)
    elif index:
        index = pandas.MultiIndex.from_tuples(index)
    with pytest.raises(DataError, match=message):
        from_frame(pandas.DataFrame(columns, index=index))


def test_columns_of_frames():
    pandas = pytest.importorskip("pandas")
    days = pandas.Series(pandas.date_range("2023-01-01", periods=3))
    whole = pandas.Series([1, None, 3], dtype="Int64")
    frame = pandas.DataFrame({"day": days, "a": whole, "b": ["1.5", "2.5", "4"]})
    table = from_frame(frame, missing="interpolate")
    assert table.variables == ["a", "b"]
    assert table.values.tolist() == [[1, 1.5], [2, 2.5], [3, 4]]
    assert table.times.text(table.times.values[0]) == "2023-01-01"
    with pytest.raises(DataError, match="got a Index, expected a pandas DataFrame or Series"):
        from_frame(frame.columns)


def test_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    pandas.DataFrame({"day": pandas.date_range("2023-01-01", periods=2), "a": [1.5, 2], "b": [3, 5]}).to_parquet(path)
    (table,) = read_tables(path, ["b"])
    assert (table.name, table.variables, table.values.tolist()) == ("a", ["b"], [[3], [5]])
    assert table.times.following(1) == [datetime(2023, 1, 3)]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_tables(path)


def test_forecasts_as_csv(table):
    dated = table("step,a\n1,5\n2,6\n")
    plain = table("a\n5\n6\n")
    forecast = Forecast(np.array([[[1.0]], [[2.0]]]), None, np.array([[[[0.5]], [[3.0]]], [[[1.5]], [[4.0]]]]))
    assert to_csv([dated, plain], forecast, [0.1, 0.9]) == (
        "series,step,step_,a,a_q0.1,a_q0.9\n0,1,3,1,0.5,3\n1,1,,2,1.5,4\n"
    )
    assert to_csv([plain], Forecast(np.array([[[1.0], [2e-7]]]), None, None), []) == "series,step,a\n0,1,1\n0,2,2e-07\n"


def test_descriptions(table):
    assert describe(table("a\n1\n")) == "a: 1 row of 1 variable (a)"
    wide = table(",".join("abcdefgh") + "\n" + ",".join("12345678"))
    assert describe(wide) == "a: 1 row of 8 variables (a, b, c, d, e, f, ...)"
    assert describe(table("t,a\n0,1\n1,2\n5,3\n")).endswith("(a), time: t, 0 to 5, not in equal steps")
