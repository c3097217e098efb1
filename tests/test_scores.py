import numpy as np
import pytest

from experiments.forecasting.scores import ROUNDING_MSE, crps, errors, mean_interval, paired, probabilistic, quantiles


def test_errors_by_hand():
    truth = np.zeros((2, 2, 2))
    fallback = np.array([[2.0, 4.0], [1.0, 1.0]])
    values = np.array([[[1.0, np.nan], [3.0, 0.0]], [[np.nan, np.nan], [np.nan, np.nan]]])
    got = errors(values, truth, fallback)
    assert got["mse_filled"] == pytest.approx((1 + 16 + 9 + 0 + 4 * 1) / 8)
    assert (got["malformed_values"], got["sequences"]) == (5, 2)
    assert got["mse"] == got["mse_median"] == pytest.approx(10 / 3)
    assert got["mae"] == pytest.approx(4 / 3)
    assert got["mse_by_horizon"] == pytest.approx([1.0, 4.5])
    assert errors(np.full((1, 2, 2), np.nan), truth[:1], fallback[:1])["mse"] is None


def test_the_interval_covers_the_mean_of_skewed_values():
    """The last are as skewed as our errors, mean / median is 8; a percentile bootstrap covers 0.80."""
    normal = np.random.default_rng(1).normal(size=(1000, 150))
    for values, mean, least in ((normal, 0, 0.93), (np.exp(2.04 * normal), np.exp(2.04**2 / 2), 0.88)):
        low, high = np.array([mean_interval(row) for row in values]).T
        assert least <= ((low <= mean) & (mean <= high)).mean() <= 0.97


def test_intervals_of_few_or_equal_values_and_of_errors_which_are_not_negative():
    assert mean_interval(np.array([3.0])) is None
    assert mean_interval(np.full(9, 0.25)) == [0.25, 0.25]
    half = 12.706205 / 2**0.5 * np.std([1.0, 3.0], ddof=1)
    assert mean_interval(np.array([1.0, 3.0])) == pytest.approx([2 - half, 2 + half])  # no skewness: Student's interval
    forecast = np.full((10, 2, 1), 0.01)
    forecast[0] = 1.0
    low, high = mean_interval((forecast**2).mean((1, 2)))
    assert low < 0  # of ten numbers whose mean could be anything
    assert errors(forecast, np.zeros_like(forecast), np.zeros((10, 1)))["mse_interval"] == [0.0, high]


def test_intervals_of_the_true_distribution_cover_their_share():
    """With numpy's default quantiles, 20 samples would cover 72.4 % and 45.2 %."""
    rng = np.random.default_rng(0)
    result = probabilistic(rng.normal(size=(2000, 20, 10, 2)), rng.normal(size=(2000, 10, 2)))
    assert result["coverage_80"] == pytest.approx(0.8, abs=0.01)
    assert result["coverage_50"] == pytest.approx(0.5, abs=0.01)
    assert result["crps"] == pytest.approx(1 / np.pi**0.5, rel=0.03)  # the CRPS of a standard normal under itself
    assert result["crps_interval"][0] < result["crps"] < result["crps_interval"][1]


def test_quantiles_beyond_the_samples_are_refused_and_coverages_left_out():
    samples = np.arange(9.0)[None, ::-1, None, None]
    np.testing.assert_array_equal(quantiles(samples, [0.1, 0.5, 0.9], axis=1).ravel(), [0, 4, 8])
    for level, needed in ((0.09, 11), (0.95, 19)):
        with pytest.raises(ValueError, match=f"9 samples do not reach the quantile {level}, expected {needed} or more"):
            quantiles(samples, [0.5, level], axis=1)
    assert crps(samples[:, 2:3], np.ones((1, 1, 1))) == [5]  # of a single sample: the absolute error
    few = probabilistic(samples[:, :3], np.zeros((1, 1, 1)))
    assert (few["coverage_50"], few["coverage_80"]) == (0, None)


def test_one_sequence_does_not_decide_the_ratio():
    rng = np.random.default_rng(0)
    theirs = np.exp(2 * rng.normal(size=150)) / 1000
    ours = theirs / 2 * np.exp(rng.normal(size=150) / 2)
    ours[0] = 1  # one sequence decides the difference of means
    comparison = paired(ours, theirs)
    assert comparison["interval"] == mean_interval(ours - theirs)
    assert comparison["interval"][0] < 0 < comparison["difference"]
    assert 0.8 < comparison["better"] < 1
    assert comparison["ratio"] == pytest.approx(0.5, rel=0.2)
    assert comparison["ratio_interval"][0] < comparison["ratio"] < comparison["ratio_interval"][1] < 0.9


def test_pairs_that_lack_an_error_are_left_out_and_errors_below_rounding_are_equal():
    comparison = paired([1.0, None, 3.0, np.nan], [2.0, 5.0, None, 1.0])
    assert (comparison["difference"], comparison["ratio"], comparison["better"]) == (-1, 0.5, 1)
    assert comparison["interval"] is comparison["ratio_interval"] is None  # a single pair has no interval
    assert paired([None], [1.0]) is None
    equal = paired([0.0, ROUNDING_MSE / 9, 1e-3], [ROUNDING_MSE, 0.0, 1e-3])
    assert equal["ratio"] == 1
    assert equal["ratio_interval"] == [1, 1]
