import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from experiments.forecasting.encoding import Encoding
from experiments.storage.records import build
from experiments.study import data
from qwen_min import Tokenizer

PUBLISHED_TEXT = "0.92,0.74;0.56,0.77;0.34,0.70;0.23,0.59;"
PUBLISHED_TOKENS = [15, 13, 24, 17, 11, 15, 13, 22, 19, 26, 15, 13, 20, 21, 11]


def check_published(trajectories, tokenizer):
    parts = data.split(len(trajectories))
    encoding = Encoding.fit(trajectories[parts.train])
    assert encoding.scale == pytest.approx(1.1008087, abs=5e-8)
    text = encoding.encode(trajectories[parts.train[1]])
    assert text.startswith(PUBLISHED_TEXT)
    tokens = tokenizer.encode(text)
    assert len(text) == len(tokens) == 999
    assert tokens[: len(PUBLISHED_TOKENS)] == PUBLISHED_TOKENS
    long = [row for row in [*parts.val, *parts.test] if len(encoding.encode(trajectories[row])) != 999]
    assert [list(parts.val).index(row) for row in long] == [24, 38]  # their contexts exceed 9.99


def test_the_published_example_is_reproduced(simulated, tiny):
    check_published(simulated, tiny[1])


def test_the_published_example_is_that_of_the_report_s_file_and_the_real_tokenizer(report_file, real_checkpoint):
    check_published(data.read(report_file), Tokenizer(real_checkpoint / "tokenizer.json"))


shapes, decimal_places = st.tuples(st.integers(1, 6), st.integers(1, 4)), st.integers(1, 6)


@given(hnp.arrays(np.float64, shapes, elements=st.floats(-1e12, 1e12)), st.floats(1e-2, 1e3), decimal_places)
def test_what_cannot_be_written_becomes_the_nearest_number_that_can(series, scale, decimals):
    nearest = np.clip(series, 0, scale * (100 - 10.0**-decimals))
    np.testing.assert_allclose(Encoding(scale, decimals).writable(series), nearest, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(("text", "values"), [
    ("1.23,4.56;0.10,0.2", [[1.23, 4.56], [0.1, None]]),  # cut off, so not read as 0.2
    ("12.34,-4.56;", [[12.34, -4.56], [None, None]]),
    ("1.234,4.56;0.10,1.00x", [[None, 4.56], [0.1, None]]),
    ("1.23;0.10,0.20", [[None, None], [0.1, 0.2]]),  # a missing variable does not shift the others
    ("1.23,4.56,7.89;0.10,0.20", [[None, None], [0.1, 0.2]]),
    ("1.2.3, 1.00;٣.00,1.00", [[None, None], [None, 1.0]]),
])  # fmt: skip
def test_malformed_values_are_nan(text, values):
    np.testing.assert_array_equal(Encoding(1.0).decode(text, 2, 2), np.array(values, dtype=float))


@pytest.mark.parametrize("settings", [
    (0.0,), (np.nan,), ((),), ((1.0, -1.0),), (1.0, 0), (1.0, True), (None, 2, 1.0), (1.0, 2, np.nan),
    ((1.0, 2.0), 2, (1.0, 2.0, 3.0)),
])  # fmt: skip
def test_settings_that_no_encoding_has_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        Encoding(*settings)


@given(hnp.arrays(float, shapes, elements=st.floats(-1e300, 1e300)), decimal_places)
def test_any_finite_series_comes_back_within_half_the_last_decimal(series, decimals):
    series = series + 0.0  # -0 is written as 0
    encoding = Encoding.fit_each(series, decimals)
    text = encoding.encode(series)
    assert "-" not in text
    found = encoding.restored(encoding.decode(text, *series.shape))
    half = 0.5 * 10.0**-decimals * np.asarray(encoding.scale)
    rounding = 4 * np.spacing(np.abs(series).max(axis=0))  # of the differences and sums
    assert (np.abs(found - series) <= half * (1 + 1e-9) + rounding).all()
    assert encoding.scaled(series).max() < 9.9901


def test_a_shifted_variable_uses_its_digits_and_others_keep_their_zero():
    steps = np.arange(50.0)
    series = np.stack([1013 + 5 * np.sin(steps), steps, -steps], 1)
    encoding = Encoding.fit_each(series)
    scaled = encoding.scaled(series)
    np.testing.assert_allclose([scaled.min(axis=0), scaled.max(axis=0)], [[2, 0, 2], [8, 9.99, 8]], atol=1e-9)
    assert build(Encoding, json.loads(json.dumps(asdict(encoding))), "") == encoding
