import h5py
import numpy as np
import pytest

from experiments.study import data
from experiments.study.data import DataError


def test_reading_returns_the_dataset_that_was_written(tmp_path):
    written = data.simulate(seed=3, num_systems=4)
    data.write(tmp_path / "a.h5", written)
    read = data.read(tmp_path / "a.h5")
    assert np.array_equal(read.trajectories, written.trajectories)
    assert np.array_equal(read.time, written.time)
    assert read.trajectories.shape == (4, 100, 2)
    assert (read.time[0], read.time[-1]) == (0, 200)
    assert not np.array_equal(written.trajectories, GOOD.trajectories[:4])


def test_seed_0_regenerates_the_report_s_file(simulated, report_file):
    published = data.read(report_file)
    assert np.array_equal(simulated.time, published.time)
    assert (simulated.trajectories == published.trajectories).all(axis=(1, 2)).mean() >= 0.99
    ulp = np.spacing(np.maximum(simulated.trajectories, published.trajectories))
    assert (np.abs(simulated.trajectories - published.trajectories) <= 2 * ulp).all()  # 1 except in one trajectory


def test_the_split_is_the_report_s():
    parts = data.split(1000)
    assert [len(part) for part in parts] == [700, 150, 150]
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert parts.val[2] == 759  # a limit cycle with most of the error of the first ten
    with pytest.raises(DataError, match="cannot be split"):
        data.split(6)


GOOD = data.simulate(seed=0, num_systems=4)


def with_value(value):
    trajectories = GOOD.trajectories.copy()
    trajectories[1, 5, 0] = value
    return {"trajectories": trajectories, "time": GOOD.time}


@pytest.mark.parametrize(("arrays", "message"), [
    ({"time": GOOD.time}, "expected the arrays 'trajectories' and 'time'"),
    ({"trajectories": GOOD.trajectories[0], "time": GOOD.time}, "expected numbers of rank 3"),
    ({"trajectories": GOOD.trajectories, "time": GOOD.time[:-1]}, r"expected \(N, 99, 2\)"),
    ({"trajectories": GOOD.trajectories[:, :, :1], "time": GOOD.time}, r"expected \(N, 100, 2\)"),
    ({"trajectories": GOOD.trajectories[:0], "time": GOOD.time}, r"are \(0, 100, 2\)"),
    ({"trajectories": np.full((4, 100, 2), b"x"), "time": GOOD.time}, "expected numbers"),
    (with_value(np.nan), r"trajectories\[1, 5, 0\] is nan"),
    (with_value(-1e-3), r"expected finite populations >= 0"),
    ({"trajectories": GOOD.trajectories, "time": GOOD.time * np.nan}, "time holds values that are not finite"),
])  # fmt: skip
def test_refuses_a_file_with_other_contents(tmp_path, arrays, message):
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    with pytest.raises(DataError, match=message):
        data.read(tmp_path / "bad.h5")
