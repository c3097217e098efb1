import numpy as np
import pytest

from experiments.scores import crps, errors, mean_interval, of_method, paired, probabilistic


def test_errors_by_hand():
    truth = np.zeros((2, 2, 2))
    fallback = np.array([[2.0, 4.0], [1.0, 1.0]])
    values = np.array([[[1.0, np.nan], [3.0, 0.0]], [[np.nan, np.nan], [np.nan, np.nan]]])
    got = errors(values, truth, fallback, scale=2.0)
    assert got["mse_filled"] == pytest.approx((1 + 16 + 9 + 0 + 4 * 1) / 8)
    assert (got["malformed_values"], got["sequences_without_forecast"], got["sequences"]) == (5, 1, 2)
    assert got["mse"] == got["mse_median"] == pytest.approx(10 / 3)
    assert got["mae"] == pytest.approx(4 / 3)
    assert got["mse_populations"] == pytest.approx(40 / 3)
    assert got["mse_by_horizon"] == pytest.approx([1.0, 4.5])
    assert got["mse_by_variable"] == pytest.approx([5.0, 0.0])
    assert errors(np.full((1, 2, 2), np.nan), truth[:1], fallback[:1], 1.0)["mse"] is None


def test_the_interval_covers_the_mean_and_is_the_same_each_time():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        sample = rng.exponential(size=60)
        low, high = mean_interval(sample)
        covered += low < 1 < high
        assert mean_interval(sample) == [low, high]
    assert 170 <= covered <= 200


def test_crps_by_its_definition():
    rng = np.random.default_rng(0)
    samples, truth = rng.normal(size=(3, 6, 2, 2)), rng.normal(size=(3, 2, 2))
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    distance = np.mean([abs(samples[:, i] - truth) for i in range(6)], axis=0)
    spread = np.mean([abs(samples[:, i] - samples[:, j]) for i, j in pairs], axis=0)
    np.testing.assert_allclose(crps(samples, truth), (distance - spread / 2).mean(axis=(1, 2)))
    np.testing.assert_allclose(crps(samples[:, :1], truth), abs(samples[:, 0] - truth).mean(axis=(1, 2)))


def test_intervals_of_the_true_distribution_cover_their_share():
    rng = np.random.default_rng(0)
    found = probabilistic(rng.normal(size=(400, 200, 5, 2)), rng.normal(size=(400, 5, 2)))
    assert found["coverage_50%"] == pytest.approx(0.5, abs=0.03)
    assert found["coverage_80%"] == pytest.approx(0.8, abs=0.03)
    assert found["crps"] == pytest.approx(1 / np.pi**0.5, rel=0.03)  # of a standard normal under itself
    assert found["crps_interval"][0] < found["crps"] < found["crps_interval"][1]


def test_the_mean_of_samples_errs_less_than_one_of_them():
    rng = np.random.default_rng(0)
    center = rng.normal(size=(60, 1, 10, 2))
    samples, truth = center + rng.normal(size=(60, 100, 10, 2)), center[:, 0] + rng.normal(size=(60, 10, 2))
    fallback = np.zeros((60, 2))
    one, mean = (of_method(found, truth, fallback, scale=2.0) for found in (samples[:, 0], samples.mean(axis=1)))
    assert one["all"]["mse"] == pytest.approx(2, rel=0.1)  # the spread of both
    assert mean["all"]["mse"] == pytest.approx(1, rel=0.1)  # of the truth alone
    assert np.mean(mean["mse_each"]) == pytest.approx(mean["all"]["mse"])
    assert np.mean(mean["mse_each"][:10]) == pytest.approx(mean["first"]["mse"])
    assert mean["all"]["mse_populations"] == pytest.approx(4 * mean["all"]["mse"])


def test_a_paired_comparison_sees_what_two_means_hide():
    rng = np.random.default_rng(0)
    hard = rng.exponential(10, size=150)  # most of an error is the sequence's
    found = paired(hard, hard + rng.normal(0.1, 0.2, size=150))
    assert found["interval"][0] < found["difference"] < found["interval"][1] < 0
    assert 0.6 < found["better"] < 0.8
