import h5py
import numpy as np
import pytest

from experiments.study import data
from experiments.study.data import DataError


def test_reading_returns_the_dataset_that_was_written(tmp_path):
    written = data.simulate(seed=3, num_systems=4)
    data.write(tmp_path / "a.h5", written)
    assert np.array_equal(data.read(tmp_path / "a.h5"), written)
    assert not np.array_equal(written, GOOD[:4])


def test_seed_0_regenerates_the_report_s_file(simulated, report_file):
    published = data.read(report_file)
    assert (simulated == published).all(axis=(1, 2)).mean() >= 0.99
    ulp = np.spacing(np.maximum(simulated, published))
    assert (np.abs(simulated - published) <= 2 * ulp).all()  # 1 except in one trajectory


def test_the_split_is_the_report_s():
    parts = data.split(1000)
    assert [len(part) for part in parts] == [700, 150, 150]
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert parts.val[2] == 759  # a limit cycle with most of the error of the first ten
    with pytest.raises(DataError, match="cannot be split"):
        data.split(6)


GOOD = data.simulate(seed=0, num_systems=4)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"trajectories": GOOD[0]}, "expected numbers of rank 3"),
    ({"trajectories": GOOD[:, :, :1]}, r"expected \(series, time steps, 2\)"),
    ({"trajectories": GOOD[:0]}, r"are \(0, 100, 2\)"),
    ({"trajectories": np.where(GOOD[1, 5, 0] == GOOD, -0.5, GOOD)}, r"s\[1, 5, 0\] is -0.5, expected populations >= 0"),
    ({"trajectories": np.full((2, 9, 2), 1e39)}, "is inf, expected populations >= 0 that are finite in float32"),
    ({"trajectories": np.zeros((2, 9, 2))}, "all populations are 0"),
])  # fmt: skip
def test_refuses_a_file_with_other_contents(tmp_path, arrays, message):
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file.update(arrays)
    with pytest.raises(DataError, match=message):
        data.read(tmp_path / "bad.h5")
