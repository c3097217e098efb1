"""Files as people have them: text tables, Excel, HDF5, Parquet, pandas; several series; forecasts back to tables."""

import gzip
import io
import lzma
import zipfile
from datetime import datetime, time

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tables import DataError, following, forecast_frame, from_frame, read_series, reading, told, write
from experiments.tables.times import time_texts


@pytest.fixture
def read(tmp_path):
    """Read a text, arrays of HDF5 by their names, or rows of sheets of Excel, as a file: the series in it."""

    def read(content, name="a.csv", **wanted):
        path = tmp_path / name
        if isinstance(content, dict):
            with h5py.File(path, "w") as file:
                file.update(content)
        elif isinstance(content, list):
            book = pytest.importorskip("openpyxl").Workbook()  # with an empty sheet
            for sheet in content:
                new = book.create_sheet()
                for row in sheet:
                    new.append(row)
            book.save(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_series(path, **wanted)

    return read


def zipped(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


PACKED, DAYS = b"a,b\n1.5,2\n1.6,3\n", [datetime(2023, 1, day) for day in (1, 2)]
STYLES = {
    "comments and empty lines": "# made by a logger\na,b\n\n1.5,2\n# a pause\n1.6,3\n\n",
    "Excel's mark, decimal commas": "sep=;\na;b\n1,5;2\n1,6;3\n",
    "western Europe": "a,b,Höhe (m³)\n1.5,2,1\n1.6,3,1\n".encode("cp1252"),
    "spaces in a row": "  a   b\n  1.5 2\n1.6   3\n",
    "windows": "a,b\r\n1.5,2\r\n1.6,3\r\n",
    "utf-16": "a,b\n1.5,2\n1.6,3\n".encode("utf-16"),
    "old Macs": "a,b\r1.5,2\r1.6,3\r",
    "rows that Excel left empty": "d;a;b\n2023-01-01;1,5;2\n2023-01-02;1,6;3\n;;\n",
    "zip": zipped(**{"a.csv": PACKED}),
    "two byte order marks": "\ufeff\ufeffa,b\n1.5,2\n1.6,3\n",
    "xz": lzma.compress(PACKED),
    "Excel with numbers as text": [[["d", "a", "b"], [DAYS[0], "1,5", 2], [DAYS[1], "1,6", "3"]]],
    "Excel with rows left empty": [[["d", "a", "b"], [DAYS[0], 1.5, 2], [DAYS[1], 1.6, 3], [" ", None]]],
    "Excel with a clock": [[["d", "at", "a", "b"], [DAYS[0], time(1), 1.5, 2], [DAYS[0], time(2), 1.6, 3]]],
    "Parquet": pd.DataFrame({"d": DAYS, "a": [1.5, 1.6], "b": [2, 3]}).to_parquet(),
}


@pytest.mark.parametrize("content", STYLES.values(), ids=STYLES.keys())
def test_styles_of_tables(read, content):
    (found,) = read(content, columns=["a", "b"])
    assert list(found.columns) == ["a", "b"]
    assert found.values.tolist() == [[1.5, 2], [1.6, 3]]


def test_thousands_and_decimal_commas(read):
    assert read('a,b\n"12,000",1\n"3,500.5",2\n')[0].values.tolist() == [[12000, 1], [3500.5, 2]]
    assert read("a;b\n1.234,5;1\n12,5;2\n")[0].values.tolist() == [[1234.5, 1], [12.5, 2]]
    assert read("a;b\n1.234.567;1\n12;2\n")[0].values.tolist() == [[1234567, 1], [12, 2]]
    assert read("a\tb\n1.234\t1\n2.000\t2\n")[0].values.tolist() == [[1.234, 1], [2, 2]]  # as %.3f writes
    for text in ("a;b\n12,000;1\n13,000;2\n", "a;b\n12.000;1\n950;2\n", "a;b\n12.000;1\n13.000;2\n"):
        with pytest.raises(DataError, match=r"'12.000' can be 12.000 or 12000; write all numbers with a decimal"):
            read(text)
    assert read([[["d", "a"], [DAYS[0], 1.234], [DAYS[1], 2]]])[0]["a"].tolist() == [1.234, 2]


TIMES = {  # text: (name of the times, the next one)
    "seconds": ("time [s],a\n0.0,1\n0.1,2\n0.2,3\n", "time [s]", "0.3"),
    "microseconds": ("t,a\n1700000004000001,1\n1700000005000003,2\n", "t", "1700000006000005"),
    "equal steps without a name": (",a\n10,1\n20,2\n30,3\n", "time", "40"),
    "days as numbers": ("day,a\n20231230,1\n20231231,2\n", "day", "2024-01-01"),
    "not in equal steps": ("elapsed,a\n0,1\n1,2\n2,3\n7,4\n", "elapsed", "8"),
    "an hour in its column": ("d,hour,a\n2023-01-01,22,1\n2023-01-01,23,2\n", "d", "2023-01-02 00:00:00"),
    "year and quarter": ("year,qtr,t,a\n2022,3,1,1\n2022,4,2,2\n", "time", "2023-01-01"),
    "a date that stands still": ("made,d,a\n2023-01-01,2023-02-01,1\n2023-01-01,2023-02-02,2\n", "d", "2023-02-03"),
    "a count of rows before it": (",year,a\n1,1900,1\n2,1901,2\n", "year", "1902"),
    "an hour after an id": ("station,at,a\n7,2023123122,1\n7,2023123123,2\n", "at", "2024-01-01 00:00:00"),
    "a lone month": ("d,a\n2010/11,1\n2010/12,1\n", "d", "2011-01-01"),
    "months of quarters": ("quarter,a\n2010-07,1\n2010-10,1\n", "quarter", "2011-01-01"),
    "yearly Januaries": ("d,a\n2010-01,1\n2011-01,1\n", "d", "2012-01-01"),
    "months as numbers": ("month,a\n202311,1\n202312,2\n", "month", "2024-01-01"),
    "t with a unit": ("t_s,a\n0.0,1\n0.5,2\n1.0,3\n", "t_s", "1.5"),
    "numpy.savetxt": ("# time,a\n0.1,1\n0.3,2\n0.5,3\n", "# time", "0.7"),
    "years with decimals": ("decimal_date,a\n1990.125,1\n1990.375,2\n1990.625,3\n", "decimal_date", "1990.875"),
    "offsets": ("d,a\n2020-03-29T01:00+01:00,1\n2020-03-29T03:00+02:00,2\n", "d", "2020-03-29 02:00:00+00:00"),
}


@pytest.mark.parametrize(("text", "name", "expected"), TIMES.values(), ids=TIMES.keys())
def test_a_time_axis_is_found_and_continued(read, text, name, expected):
    (found,) = read(text)
    assert list(found.columns)[-1] == "a"
    assert found.index.name == name
    assert ("not in equal steps" in told([found])) == ("7,4" in text)
    assert write([found], np.ones((1, 1, found.shape[1]))).splitlines()[1].startswith(f"a,1,{expected},1.0")


VARIABLES = {  # text: the variables, all but the times
    "step,a,phase\n" + "".join(f"{t},{t % 5},{t % 4}\n" for t in range(12)): "a phase",
    "weight,a\n1.1,1\n1.2,2\n1.4,3\n": "weight a",
    "at,status,n,a\n" + "".join(f"{1700000000 + t**2},{t // 4},{t % 2},5\n" for t in range(12)): "at status n a",
    "t,day,hour,a\n" + "".join(f"{t},{t // 4},{t % 4},{t % 3}\n" for t in range(12)): "day hour a",
    "date,day,a\n2020-01-01,0,3\n2020-01-02,1,2\n": "a",  # the same times again
    "time\n5.2\n4.8\n6.1\n": "time",  # the only column
    "rownames,year\n1,5\n2,6\n3,8\n": "year",
    "t_min,a\n1.5,1\n1.2,2\n1.4,3\n": "t_min a",  # a temperature
    "1\n2\n3\n": "x0",  # the only column
    ",a,b\n2023-01-01,1,5\n2023-01-02,2,6\n2023-01-03,3,9\n": "a b",  # dates are it
    "20231115.10,1\n20231215.11,2\n": "x0 x1",  # decimals are no dates
    "# of a logger\n#\na b\n0 1.5\n1 2.5\n": "a b",  # comments
    "n,a\n20231231,1\n20231232,2\n": "n a",  # no day of the calendar
    "n,a\n999911,1\n999912,2\n": "n a",  # no year that dates have
    "site,2019,2020\n0.5,1.5,2.5\n0.1,1.6,2.4\n": "site 2019 2020",  # names, as a cell is no number
    ",0,1\n0,1.5,4\n1,1.6,4\n": "0 1",  # as pandas writes them
    "2018,2019,2020\n0.5,1.5,2.5\n0.1,1.6,2.4\n": "x0 x1 x2",  # years alone are numbers, so data
}


@pytest.mark.parametrize(("text", "names"), VARIABLES.items())
def test_what_is_a_variable(read, text, names):
    assert list(read(text)[0].columns) == names.split()


THREE = np.ones((1, 4, 3))
REFUSED = {  # what can mean two things, would have to be guessed, or is no table
    "infinite": ("a,b\n1,2\n3,inf\n", "line 3, column 'b': is infinite"),
    "empty": ("", "is empty"),
    "quote": ('a\n"1\n', "cannot be read"),
    "both marks": ("a;b\n1,5;1.5\n1,6;1.6\n", "decimal points in column 'b' and decimal commas in column 'a'; w"),
    "half hours": ("date,hour,a\n2023-01-01,0.5,1\n2023-01-01,1.5,2\n", "'hour': holds '2023-01-01 0.5:00', exp"),
    "a date is missing": ("date,a\n2023-01-01,1\n,2\n", "line 3, column 'date': is empty, expected a date"),
    "falls": ("d,a\n2023-01-02,1\n2023-01-01,2\n", "line 3, .*-01 comes after .*-02; sort .* with their offset from"),
    "rows with names": ("rownames,a\nAlabama,1\nAlaska,2\n", "line 2, column '': holds 'Alabama', expected a number"),
    "a panel": ("city,year,a\n1,80,5\n1,90,6\n2,80,7\n", "80 comes after 90; .*--id; .*'year' is a variable, name"),
    "some offsets": ("d,a\n2020-03-05T00:00,1\n2020-03-06T00:00Z,2\n", "some times have an offset from UTC and some"),
    "seasons": ("s,a\n2010/11,1\n2011/12,2\n", "'2010/11' can be a month or the season 2010 to 2011"),
    "days or months": ("d,a\n01/01/2023,1\n02/01/2023,2\n", "'02/01/2023' can start with the day or with the month"),
    "unequal steps": ("d,a\n01/02/2023,1\n02/02/2023,2\n05/03/2023,3\n", "'01/02/2023' can start with the day or with"),
    "quarters": ("date,a\n2010-3,1\n2010-4,2\n2011-1,3\n", "'2010-3' can be a month or a quarter; write .* 2010Q2"),
    "quarters as numbers": ("quarter,a\n201001,1\n201002,2\n", "'201001' can be a month or a quarter"),
    "quarters of five digits": ("t,a\n20104,1\n20111,2\n20112,2\n", "'20104' can be a month or a quarter"),
    "quarters with a point": ("t,a\n2010.3,1\n2010.4,1\n2011.1,2\n", "2010.3 can be a month, a quarter or a number"),
    "half-years in words": ("semester,a\n2000-1,1\n2000-2,2\n", "a month or a half-year; .* such as 2000-07-01,"),
    "weeks or months": ("week,a\n2023-01,1\n2023-02,2\n", "'2023-01' can be a month or a week; write its first day"),
    "months with a point": ("date,a\n2022.11,1\n2022.12,2\n2023.01,3\n", "2022.11 can be a month, a quarter or a n"),
    "months with a point in a first column": ("n,a\n2022.01,1\n2022.02,2\n2022.03,3\n", "2022.01 can be a month"),
    "no such day": ("date,a\n20230228,1\n20230229,2\n", "line 3, .*20230229 is no month, or no day of the calendar"),
    "years of two digits": ("year,month,a\n20,1,1\n20,2,2\n", "'year': has years of two digits, of this century"),
    "a month in each": ("year,jan,feb,mar\n2020,1,1,1\n2021,2,2,2\n", "'jan' to 'mar', which can be .*, or times"),
    "World Bank": ("c,1990 [YR1990],1991 [YR1991],1992 [YR1992]\nAruba,5,6,7\n", r"'1990 .*2\]', which can .* times"),
    "a decimal comma": ("1,5\n1,6\n", "'1,5' can be two numbers, or one with a decimal comma; write names"),
    "months or a count": ("n,a\n202301,1\n202302,2\n", "202301 can be a month or a number; call .* 'month'"),
    "two dates": ("b,d,a\n2023-01-01,2023-02-01,1\n2023-01-02,2023-02-02,2\n", "'b' and 'd' can both be the times"),
    "no id": ("unique_id,t,a\nx,1,1\nx,2,2\n,3,3\n", "line 4: has no 'unique_id', which names its series"),
    "a note": ("date,y\n2023-01-01,1\nsource\n", "line 3: has 1 columns, the first line has 2; leave out lines that"),
    "JSON": ('{"a": 1}', "is JSON, HTML or XML; save it as CSV"),
    "UTF-16": ("a\0,\0b\0", "has zero bytes, as UTF-16 without a mark.*; save it as .* encoded as UTF-8"),
    "two files": (zipped(a=b"1", b=b"2"), r"is a zip file of \['a', 'b'\], expected one table in it"),
    "an empty row": ([[["d", "a"], [DAYS[0], 1], [], [DAYS[1], 2]]], "row 3, column 'd': is empty, expected a date"),
    "a formula": ([[["d", "a"], [DAYS[0], 1], [DAYS[1], "=B2+1"]]], "has formulas without values; open it in Excel"),
    "two sheets": ([[["a"], [1]], [["b"], [2]]], "has 2 sheets with a table, .'Sheet1', 'Sheet2'.; save one of them"),
    "damaged Parquet": (b"PAR1", "not a readable Parquet file"),
    "damaged Excel": (zipped(**{"[Content_Types].xml": b""}), "Excel file"),
    "damaged zip": (zipped(a=PACKED).replace(b"1.5", b""), "cannot be unpacked"),
    "a title": ("Sales\n\ndate,y\n2023-01-01,1\n", "line 2: is empty, .* write NA, or delete it, and a title above"),
    "a title above names": ("Sales\ndate,y\n2023-01-01,1\n", "line 2, column 'Sales': holds 'date,y', expected a nu"),
    "years and weeks": ("year,week,a\n3,1,5\n3,2,6\n8,1,7\n", "'year': the time 3 repeats; .* into one column, such"),
    "stores of items": ("id,d,a\nx,2023-01-01,1\nx,2023-01-01,1\ny,2023-01-01,1\n", "of series 'x' repeats; .* once"),
    "sensors": ("s,n,a\n1,1,5\n2,1,6\n1,2,5\n2,2,6\n1,3,5\n2,3,6\n", "'n': counts anew for each 's'; .* with --id s"),
    "dates of two stations": ("STN,YYYYMMDD,a\n1,20230131,5\n1,20230201,6\n2,20230131,7\n", "-31 comes after .*--id"),
    "numbers as names": ("0,1,2\n5,6,7\n6,7,8\n", "can be names, as pandas writes them, or values; write other"),
    "a space before a hash": (" #\n0 1.5\n1 2.5\n", "line 2: has 2 columns, the first line has 1"),  # it is no comment
    "HDF5 with nothing": ({"time": np.arange(3.0)}, r"holds \['time'\], expected the array 'trajectories', or arrays"),
    "HDF5 with groups": ({"group/a": np.ones(3)}, r"holds \['group'\], expected"),
    "HDF5 of rank 3": ({"a": np.ones((2, 3, 4))}, "expected numbers of rank 1 or 2"),
    "HDF5 of other times": ({"trajectories": THREE, "time": np.ones(3)}, r"are \(1, 4, 3\), time \(3,\), expected"),
    "HDF5 without a time": ({"a": np.ones(3), "time": np.array([0, 1, np.nan])}, "has no time in 'time'"),
    "HDF5 without values": ({"trajectories": THREE * np.nan}, r"12 of 12 .*, the first in trajectories\[0, 0\]"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(read, content, message):
    with pytest.raises(DataError, match=message):
        read(content)


def test_variables_that_are_asked_for_do_not_hide_that_times_fall(read):
    """As of several countries, one below the other, or with the newest year first."""
    text = "who,code,year,a\nA,1,2001,1\nA,1,2000,2\nB,2,2001,3\nB,2,2000,4\n"
    for wanted, of in (({}, ""), ({"id": "who"}, " of series 'A'")):
        with pytest.raises(DataError, match=rf"the time 2000{of} comes after 2001; sort the rows .*--id"):
            read(text, columns=["a"], **wanted)


def test_times_that_cannot_be_read_are_refused_also_where_variables_are_asked_for(read):
    """Left out, they would be lost, and their order would not be looked at."""
    for cells in (("Januar 2020", "Februar 2020"), ("Thu 5 Mar 2020", "Fri 6 Mar 2020")):
        with pytest.raises(DataError, match=f"column 'date': holds '{cells[0]}', expected a date such as 2023-01-31"):
            read("date,a\n{},1\n{},2\n".format(*cells), columns=["a"])
    assert len(read("t,day,a\n1,May 5,1\n2,May 6,2\n", columns=["a"])[0]) == 2  # not the times, as there are others


def test_what_is_chosen_is_said(read):
    assert told(read("# a logger\nd;at;a\n1.1.2023;23:58;1\n1.1.2023;23:59;2\n")) == (
        "a: 2 rows of 1 variable (a), time: d, 2023-01-01 23:58:00 to 2023-01-01 23:59:00; 1 line after # left out; "
        "'d' and 'at' put together"
    )
    assert "read as Windows-1252" in told(read("Höhe\n1\n".encode("cp1252")))
    said = told(read("a,b,c\n1,990,-99\n-9999,-999,-80\n2,1010,7\n"))
    assert said.endswith("-999 in b is read as a value; if it stands for a missing one, write nothing")
    assert "-9999 in a is read as a value; if" in said


LONG = "unique_id,ds,y\n007,2023-01-01,1\nB,2023-01-01,5\n007,2023-01-02,2\nB,2023-01-02,6\nB,2023-01-03,7\n"


def test_several_series_one_below_the_other(read, tmp_path):
    found = read(LONG)
    assert [(one.attrs["name"], one["y"].tolist()) for one in found] == [("007", [1, 2]), ("B", [5, 6, 7])]
    assert told(found).startswith("007: 2 rows of 1 variable (y), time: ds, 2023-01-01 to 2023-01-02, and 1 more")
    assert [len(one) for one in read(LONG.replace("unique_id", "site"), id="site")] == [2, 3]
    with pytest.raises(DataError, match="has 2 series, one below the other; leave out --wide"):
        read(LONG, wide=True)
    assert [one["y"].tolist() for one in read("item_id,t,y\n1,0,5\n2,0,6\n1,1,7\n2,1,8\n")] == [[5, 7], [6, 8]]
    frame = pd.read_csv(tmp_path / "a.csv").set_index(["item_id", "t"])
    assert [one["y"].tolist() for one in from_frame(frame)] == [[5, 7], [6, 8]]
    assert [one.index.name for one in read("id,y\n1,5\n2,6\n3,7\n")] == ["id"]  # a count, not ids
    north, south = read("d,north,south\n2023-01-01,1,5\n2023-01-02,2,6\n", wide=True)
    assert (north.attrs["name"], south.attrs["name"], south.to_dict("list")) == ("north", "south", {"value": [5, 6]})


def test_missing_values_are_counted_or_interpolated_in_time(read):
    text = "t,a,b\n0,1,5\n1,,NA\n3,4,7\n4,,8\n"
    with pytest.raises(DataError, match=r"3 of 8 values are missing, the first in line 3, column 'a'; fill them with"):
        read(text)
    assert read(text, missing="interpolate")[0].values.tolist() == [[1, 5], [2, pytest.approx(17 / 3)], [4, 7], [4, 8]]
    assert read(text, missing="keep")[0]["a"].isna().tolist() == [False, True, False, True]
    assert told(read(text, missing="interpolate")).endswith("; 3 of 8 values were missing and interpolated")
    assert read("t,a\n1,nan\n2,null\n3,-\n4,?\n5,#N/A\n6,..\n7,.\n8,5\n", missing="keep")[0]["a"].count() == 1
    rows = "".join(f"2023-01-{day:02d},{day}\n" for day in range(1, 31) if day not in (9, 20))
    with pytest.raises(DataError, match=r"2 of 30 values are missing, the first at 2023-01-09, which has no row; fill"):
        read("date,a\n" + rows)
    assert read("date,a\n" + rows, missing="interpolate")[0]["a"].tolist() == list(range(1, 31))
    (kept,) = read("date,a\n" + rows.replace(",5\n", ",\n"), missing="keep")
    assert from_frame(kept.dropna(), missing="keep")[0].equals(kept)
    assert told([kept]).endswith("3 of 30 values are missing")
    with pytest.raises(DataError, match="'a': has no value, or values that are too far apart"):
        read("a,b\nNA,1\nNA,2\n", missing="interpolate")


def test_a_small_file_cannot_claim_much_memory(read, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to more than 1,000 bytes"):
        read(gzip.compress(b"1.5\n" * 1000), name="a.csv.gz")


def test_columns_are_chosen_by_name(read):
    assert read("a,b,a\n2023-01-01,2,Ham\n2023-01-02,5,Ham\n", columns=["b"])[0].values.tolist() == [[2], [5]]
    assert list(read("a,b\n1,2\n", columns=["b", "a", "b"])[0].columns) == ["b", "a"]
    assert list(read("year,a\n1900,1\n1901,2\n", columns=["year", "a"])[0].columns) == ["year", "a"]
    with pytest.raises(DataError, match=r"has 0 columns 'c', expected one; it has \['a', 'b'\]"):
        read("a,b\n1,2\n", columns=["c"])
    with pytest.raises(DataError, match="has no column of numbers"):
        read("a,b\n1,2\n", columns=[])


def test_hdf5_files_of_any_number_of_variables(read, tmp_path):
    values = np.arange(24.0).reshape(2, 4, 3) - 5
    arrays = {"trajectories": values, "time": np.arange(4) * 0.5}
    first, second = read(arrays)
    assert (first.attrs["name"], second.attrs["name"], list(first.columns)) == ("a[0]", "a[1]", ["x0", "x1", "x2"])
    assert np.array_equal(second.values, values[1])
    assert following(second.index, 1).tolist() == [2.0]
    assert read(arrays, columns=["x2"])[0].values.tolist() == values[0][:, 2:].tolist()
    assert read(gzip.compress((tmp_path / "a.csv").read_bytes()), "a.h5.gz")[1].equals(second)
    assert list(read(arrays | {"trajectories": values[..., :2]})[0].columns) == ["prey", "predator"]
    names = [one.attrs["name"] for one in read(arrays, wide=True)]
    assert (names[0][-6:], len(names)) == ("0]: x0", len({*names}))
    long, short = read({"short": np.ones(3), "time": np.arange(4.0), "long": np.ones((4, 2))})
    assert (long.attrs["name"], long.shape, following(long.index, 1).tolist()) == ("long", (4, 2), [4])
    assert (short.attrs["name"], short.shape, short.index.tolist()) == ("short", (3, 1), [0, 1, 2])
    assert [one.attrs["name"] for one in read({f"s{at}": np.ones(3) for at in range(12)})][:3] == ["s0", "s1", "s2"]


def test_numbers_that_are_packed_are_refused_and_others_are_not(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.update({"a": np.ones(3), "b": np.ones(3)})
        file["a"].attrs["_FillValue"] = np.nan  # as xarray writes it
        file["b"].attrs["scale_factor"] = 0.01
    with pytest.raises(DataError, match="b has scale_factor, as netCDF has; write the numbers"):
        read_series(tmp_path / "a.h5")


INDEXES = {  # index of three rows: the time after the last
    "clocks change": (pd.date_range("2023-03-25", periods=3, tz="Europe/Berlin"), "2023-03-28 00:00:00+02:00"),
    "fiscal quarters": (pd.period_range("2020Q1", periods=3, freq="Q-MAR"), "2020-01-01"),
    "durations": (pd.to_timedelta([0, 10, 20], unit="s"), "30"),
    "texts": (pd.Index(["2023-01-01", "2023-01-02", "2023-01-03"]), "2023-01-04"),
    "years": (pd.RangeIndex(1900, 1903), "1903"),
}


@pytest.mark.parametrize(("index", "expected"), INDEXES.values(), ids=INDEXES.keys())
def test_the_index_of_a_frame(index, expected):
    (found,) = from_frame(pd.DataFrame({"a": [1, 2, 4], "b": [4, 6, 5]}, index=index))
    assert list(found.columns) == ["a", "b"]
    made = forecast_frame(found, np.ones((1, 2)))
    assert (made.index.name, *time_texts(made.index, found.index)) == ("time", expected)


@pytest.mark.parametrize("index", [[0, 1, 2], [3, 4, 7]], ids=["a count", "what a filter left"])
def test_row_numbers_are_no_times(index):
    assert isinstance(from_frame(pd.DataFrame({"a": [1, 2, 4]}, index))[0].index, pd.RangeIndex)


def test_columns_of_frames():
    days = pd.date_range("2023-01-01", periods=20)
    frame = pd.DataFrame({"day": days, "a": pd.array([1, None] * 10, dtype="Int64"), "b": ["1.5", "2.5"] * 10})
    (found,) = from_frame(frame[frame.day > "2023-01-05"], missing="keep")  # row numbers are no times
    assert (list(found.columns), found.index[0]) == (["a", "b"], pd.Timestamp("2023-01-06"))
    assert found["b"].tolist()[:2] == [2.5, 1.5]
    assert found["a"].isna().tolist()[:2] == [True, False]
    assert from_frame(frame["b"])[0].shape == (20, 1)
    assert from_frame(pd.Series(pd.arrays.SparseArray([1, 0, 2])))[0]["x0"].tolist() == [1, 0, 2]
    assert "'day' left out, as 'time' has the times" in told(from_frame(frame.set_index(days), missing="keep"))


@pytest.mark.parametrize(("frame", "message"), [
    (pd.Series([1, "x"]), r"row 1, column 'x0': holds 'x', expected a number, .*; or leave the column out"),
    (pd.Series([True, False]), "holds 'True', expected a number"),
    (pd.Series([]), "has no rows"),
    (pd.Series([1, 2], pd.to_datetime(["2023-01-02", None])), "1 of 2 dates are missing"),
    (pd.Index(["a"]), "got a Index, expected a pandas DataFrame or Series"),
    (pd.concat({1: pd.Series([1]), 2: pd.Series([1])}), r"are called \[None, None\]; name that of the series id"),
])  # fmt: skip
def test_frames_that_are_refused(frame, message):
    with pytest.raises(DataError, match=message):
        from_frame(frame)


def test_forecasts_as_csv(read):
    (dated,), (plain,) = read("t,a\n1,5\n2,6\n"), read("a\n5\n6\n", name="b.csv")
    quantiles = np.array([[[[0.5]], [[3.0]]], [[[1.5]], [[4.0]]]])
    assert write([dated, plain], np.array([[[1.0]], [[2.0]]]), quantiles, [0.1, 0.9]) == (
        "series,step,t,a,a_q0.1,a_q0.9\na,1,3,1.0,0.5,3.0\nb,1,,2.0,1.5,4.0\n"
    )
    digits = write([plain], np.array([[[1000000003.1234567], [2e-7]]]))
    assert digits == "series,step,a\nb,1,1000000003.1234567\nb,2,2e-07\n"  # all of the float


# what pandas may write: marks, quotes, a mark for missing values
DIALECTS = [{}, {"sep": ";", "decimal": ","}, {"sep": "\t", "quoting": 2}, {"na_rep": "NA"}, {"sep": " "}]
INDEX = [
    pd.RangeIndex(8),
    pd.date_range("2023-12-25", periods=8, name="day"),
    pd.date_range("2023-11-30", periods=8, freq="ME", name="month"),
    pd.date_range("2023-12-31 22:00", periods=8, freq="15min", name="at"),
    pd.RangeIndex(1990, 1998, name="year"),
]
NAMES = st.text("abc xyzäß#'$_%", min_size=1, max_size=5).map(str.strip).filter(bool)
CELLS = st.floats(allow_infinity=False) | st.integers(-(10**6), 10**6).map(float)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(DIALECTS), st.lists(NAMES, min_size=1, max_size=3, unique=True), st.sampled_from(INDEX), st.data()
)
def test_what_pandas_writes_comes_back_exactly_or_is_refused(tmp_path_factory, options, names, index, source):
    path = tmp_path_factory.mktemp("dialect") / "a.csv"
    row = st.lists(CELLS, min_size=len(names), max_size=len(names))
    values = source.draw(st.lists(row, min_size=2, max_size=8))
    frame = pd.DataFrame(values, index[: len(values)], names, dtype=float)
    frame.to_csv(path, index=index.name is not None or source.draw(st.booleans()), **options)
    try:
        (found,) = read_series(path, missing="keep")
    except DataError as error:
        is_plain = index.name == "day" and "".join(names).isalpha() and not frame.isna().any(axis=None)
        if is_plain and "write all numbers with a decimal point" not in str(error):  # 1,234 can be two numbers
            raise
    else:
        same = {"check_freq": False, "check_index_type": False, "check_column_type": False}
        pd.testing.assert_frame_equal(found, frame, check_exact=True, **same)
