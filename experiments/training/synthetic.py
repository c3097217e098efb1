"""Series to pretrain on, made from random numbers alone: nothing real is in them, and no predators and prey.

A group is a pair of series: two that belong together (two states of one system, a series and what follows it late), or
two that do not. Each family makes many at once. G groups, n series, L time steps.
"""

from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

# in time steps, as often as people have them
PERIODS = np.array(
    [1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 7, 7, 8, 10, 12, 12, 12, 12, 12, 12, 13, 24, 24, 24, 26, 30, 48, 52, 52]
)
BURN_IN = 40  # time steps before a series begins


def log_uniform(rng: np.random.Generator, low: float, high: float, size) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def runge_kutta(rates: Callable, t: float, state: np.ndarray, h: float | np.ndarray) -> np.ndarray:
    """The state of a differential equation a time h after t, by the fourth-order method; rates(t, state)."""
    k1 = rates(t, state)
    k2 = rates(t + h / 2, state + h / 2 * k1)
    k3 = rates(t + h / 2, state + h / 2 * k2)
    k4 = rates(t + h, state + h * k3)
    return state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def sometimes(rng: np.random.Generator, chance: float, n: int) -> np.ndarray:
    """1 with a chance, else 0: (n, 1)."""
    return (rng.random((n, 1)) < chance).astype(float)


def unit(x: np.ndarray) -> np.ndarray:
    """x (..., L) with standard deviation 1."""
    return x / (x.std(-1, keepdims=True) + 1e-9)


def noise(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Noise (n, L) of standard deviation 1: white, ARMA, with heavy tails, or of a volatility that changes."""
    size = (n, length + BURN_IN)
    kind, out = rng.random((n, 1)), rng.normal(size=size)
    heavy = out / np.sqrt(rng.gamma(rng.uniform(1.2, 3, (n, 1)), size=size))
    volatility = np.exp(lfilter([0.16], [1, -0.97], rng.normal(size=size)))
    out = np.where(kind < 0.2, heavy, np.where(kind < 0.3, out * volatility, out))
    for row in np.flatnonzero(rng.random(n) < 0.5):
        poles = rng.uniform(-0.6, 0.98, rng.integers(1, 3)).astype(complex)
        if rng.random() < 0.3:
            pole = rng.uniform(0.5, 0.99) * np.exp(1j * rng.uniform(0.05, np.pi))
            poles = np.array([pole, pole.conj()])
        zeros = [1, rng.uniform(-0.8, 0.8)] if rng.random() < 0.4 else [1]
        out[row] = lfilter(zeros, np.poly(poles).real, out[row])
    return unit(out[:, BURN_IN:])


def pattern(rng: np.random.Generator, periods: np.ndarray) -> np.ndarray:
    """A season of each period (n), as wide as the longest: harmonics, or any values; of standard deviation 1."""
    out = np.zeros((len(periods), periods.max()))
    for row, period in zip(out, periods, strict=True):
        if rng.random() < 0.5:
            shape = rng.normal(size=period) * (rng.random(period) < rng.uniform(0.2, 1))
        else:
            orders = np.arange(1, min(rng.integers(2, 7), period // 2 + 1) + 1)[:, None]
            sizes = rng.normal(size=orders.shape) / orders ** rng.uniform(0.3, 2)
            angles = 2 * np.pi * (orders * np.arange(period) / period + rng.random(orders.shape))
            shape = (sizes * np.sin(angles)).sum(0)
        row[:period] = unit(shape - shape.mean())
    return out


def smoothing(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Level, damped trend and season that follow their errors (exponential smoothing: Hyndman et al. 2002, table 1)."""
    period = rng.choice(PERIODS, n)
    alpha = rng.beta(0.7, 1, n)
    beta = alpha * rng.beta(0.5, 4, n) * (rng.random(n) < 0.6)
    gamma = (1 - alpha) * rng.beta(0.4, 5, n)
    damping = np.where(rng.random(n) < 0.5, 1, rng.uniform(0.8, 1, n))
    strength = log_uniform(rng, 0.3, 8, n) * (rng.random(n) < 0.8) * (period > 1)
    slope = rng.normal(size=n) * log_uniform(rng, 0.01, 0.5, n) * (rng.random(n) < 0.7)
    errors = noise(rng, n, length) if rng.random() < 0.3 else rng.normal(size=(n, length))
    season, level, rows = pattern(rng, period) * strength[:, None], np.zeros(n), np.arange(n)
    out = np.empty((n, length))
    for t in range(length):
        at = t % period
        level = level + damping * slope
        out[:, t] = level + season[rows, at] + errors[:, t]
        level = level + alpha * errors[:, t]
        slope = damping * slope + beta * errors[:, t]
        season[rows, at] += gamma * errors[:, t]
    return exponential(rng, out, 0.4)


def exponential(rng: np.random.Generator, x: np.ndarray, chance: float) -> np.ndarray:
    """Some of x (n, L) as exponents, so that growth, season and noise multiply; most of these grow."""
    rows = np.flatnonzero(rng.random(len(x)) < chance)
    chosen = unit(x[rows] - x[rows].mean(1, keepdims=True)) * log_uniform(rng, 0.05, 1, (len(rows), 1))
    falls = (chosen[:, -8:].mean(1) < chosen[:, :8].mean(1)) & (rng.random(len(rows)) < 0.5)
    chosen[falls] = -chosen[falls]
    out = x.copy()
    out[rows] = np.exp(chosen)
    return out


def trend(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Trends (n, L): none, straight, bent, logistic, or a random walk that may be smooth."""
    t, out = np.linspace(0, 1, length), np.zeros((n, length))
    for row, kind in zip(out, rng.integers(6, size=n), strict=True):
        if kind == 1:
            row += rng.normal() * 3 * t
        elif kind == 2:
            knots = np.array([0, *rng.random(rng.integers(1, 8))])
            row += 3 * (rng.normal(size=(len(knots), 1)) * np.maximum(t - knots[:, None], 0)).sum(0)
        elif kind == 3:
            row += 3 * rng.normal() / (1 + np.exp(-(t - rng.random()) * rng.uniform(3, 40)))
        elif kind >= 4:
            steps = rng.normal(size=length) + rng.normal() * 0.1
            if kind == 5:
                steps = lfilter([1], [1, -rng.uniform(0.8, 0.98)], steps)
            row += unit(np.cumsum(steps)) * rng.uniform(0.5, 3)
    return out


def season(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Seasons (n, L) of standard deviation 1, of which some turn into another pattern, grow or fade."""
    period = rng.choice(PERIODS[1:], n)
    at = (np.arange(length) + rng.integers(0, 10_000, (n, 1))) % period[:, None]
    first, second = (np.take_along_axis(pattern(rng, period), at, 1) for _ in range(2))
    when = (np.arange(length) / length - rng.random((n, 1))) * rng.uniform(2, 12, (n, 1))
    share = sometimes(rng, 0.3, n) / (1 + np.exp(-when)) * rng.random((n, 1))
    grows = 1 + sometimes(rng, 0.2, n) * rng.uniform(-0.8, 2, (n, 1)) * np.arange(length) / length
    smooth = 2 * np.pi * (np.arange(length) / log_uniform(rng, 5, 160, (n, 1)) + rng.random((n, 1)))
    waves = np.sin(smooth) + rng.uniform(0, 0.5, (n, 1)) * np.sin(2 * smooth + 1)
    return unit(np.where(rng.random((n, 1)) < 0.8, (1 - share) * first + share * second, waves) * grows)


def structural(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Trend, one or two seasons, and noise."""
    x = trend(rng, n, length) + season(rng, n, length) * sometimes(rng, 0.8, n) * log_uniform(rng, 0.2, 3, (n, 1))
    x += season(rng, n, length) * sometimes(rng, 0.25, n) * log_uniform(rng, 0.2, 2, (n, 1))
    return exponential(rng, x + noise(rng, n, length) * log_uniform(rng, 0.03, 1, (n, 1)), 0.35)


def walks(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Random walks, integrated ARMA, prices; some with a season."""
    x = np.cumsum(noise(rng, n, length) + rng.normal(0, 0.3, (n, 1)), 1)
    twice = rng.random(n) < 0.15
    x[twice] = np.cumsum(x[twice], 1)
    x += season(rng, n, length) * sometimes(rng, 0.4, n) * log_uniform(rng, 0.5, 5, (n, 1))
    return exponential(rng, x, 0.4)


def kernels(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Gaussian processes with random sums and products of kernels (KernelSynth, arXiv 2403.07815), 12 of each."""
    t = np.arange(length)
    gap = np.abs(t[:, None] - t)

    def kernel() -> np.ndarray:
        kind, scale = rng.integers(5), np.exp(rng.uniform(np.log(0.01), 0)) * length
        if kind == 0:
            return np.exp(-((gap / scale) ** 2) / 2)
        if kind == 1:
            period = rng.choice(PERIODS[4:]) if rng.random() < 0.7 else rng.uniform(5, 0.3 * length)
            return np.exp(-2 * (np.sin(np.pi * gap / period) / rng.uniform(0.4, 2)) ** 2)
        if kind == 2:
            return (1 + gap**2 / (2 * rng.uniform(0.1, 4) * scale**2)) ** -1
        if kind == 3:
            shifted = t / length - rng.random()
            return 1 + 3 * shifted[:, None] * shifted
        return np.exp(-gap / scale)

    parts = []
    for _ in range(-(-n // 12)):
        total = kernel()
        for _ in range(rng.integers(0, 4)):
            total = total + kernel() if rng.random() < 0.55 else total * kernel()
        root = np.linalg.cholesky(total + 1e-5 * np.trace(total) / length * np.eye(length))
        parts.append((root @ rng.normal(size=(length, 12))).T)
    x = np.concatenate(parts)[:n]
    return x + noise(rng, n, length) * x.std(1, keepdims=True) * rng.choice([0, 0.05, 0.3], (n, 1))


def counts(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Counts, also rare ones; spikes."""
    rate = np.exp(np.clip(rng.uniform(-2, 3, (n, 1)) + 0.5 * np.clip(structural(rng, n, length), -3, 3), -6, 6))
    x = rng.poisson(rate * rng.gamma(2, 0.5, (n, length))).astype(float)
    spikes = (rng.random((n, length)) < 0.03) * rng.exponential(5, (n, length))
    return np.where(rng.random((n, 1)) < 0.35, noise(rng, n, length) * 0.2 + spikes, x)


def shifts(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """Levels that jump; saw teeth and square waves."""
    jumps = (rng.random((n, length)) < rng.uniform(0.002, 0.03, (n, 1))) * rng.normal(size=(n, length)) * 3
    phase = (np.arange(length) / log_uniform(rng, 4, 150, (n, 1)) + rng.random((n, 1))) % 1
    wave = np.where(rng.random((n, 1)) < 0.5, phase, phase < rng.uniform(0.1, 0.9, (n, 1)))
    x = np.cumsum(jumps, 1) + wave * rng.choice([0, 1, 3], (n, 1))
    return x + noise(rng, n, length) * rng.choice([0.02, 0.2, 1], (n, 1))


def van_der_pol(rng: np.random.Generator, n: int) -> tuple[Callable, np.ndarray, float]:
    """Van der Pol, FitzHugh-Nagumo and Duffing oscillators in one family, some of them driven."""
    mu, w, cube = log_uniform(rng, 0.1, 3, n), rng.uniform(0.5, 2, n), rng.uniform(0, 0.4, n)
    push, speed = rng.uniform(0, 1.2, n) * rng.integers(0, 2, n), rng.uniform(0.2, 1, n)

    def rates(_, s: np.ndarray) -> np.ndarray:
        pull = -w * s[0] - cube * s[0] ** 3 + push * np.cos(s[2])
        return np.stack([s[1], mu * (1 - s[0] ** 2) * s[1] + pull, speed])

    return rates, rng.uniform(-2, 2, (3, n)), 0.25


def pendulums(rng: np.random.Generator, n: int) -> tuple[Callable, np.ndarray, float]:
    """Pendulums, from small swings to turning over, damped or driven."""
    w, damping = rng.uniform(0.5, 2, n), log_uniform(rng, 1e-3, 0.2, n)
    push, speed = rng.uniform(0, 1, n) * rng.integers(0, 2, n), rng.uniform(0.2, 1, n)

    def rates(_, s: np.ndarray) -> np.ndarray:
        return np.stack([s[1], -w * np.sin(s[0]) - damping * s[1] + push * np.cos(s[2]), speed])

    return rates, rng.uniform(-2.5, 2.5, (3, n)), 0.25


def lorenz(rng: np.random.Generator, n: int) -> tuple[Callable, np.ndarray, float]:
    a, b, c = rng.uniform(8, 12, n), rng.uniform(18, 40, n), rng.uniform(2, 3.2, n)

    def rates(_, s: np.ndarray) -> np.ndarray:
        return np.stack([a * (s[1] - s[0]), s[0] * (b - s[2]) - s[1], s[0] * s[1] - c * s[2]])

    return rates, rng.uniform(2, 10, (3, n)), 0.05


def roessler(rng: np.random.Generator, n: int) -> tuple[Callable, np.ndarray, float]:
    a, b, c = rng.uniform(0.1, 0.3, n), rng.uniform(0.1, 0.4, n), rng.uniform(3, 9, n)

    def rates(_, s: np.ndarray) -> np.ndarray:
        return np.stack([-s[1] - s[2], s[0] + a * s[1], b + s[2] * (s[0] - c)])

    return rates, rng.uniform(0.5, 2.5, (3, n)), 0.4


def networks(rng: np.random.Generator, n: int) -> tuple[Callable, np.ndarray, float]:
    """Random recurrent networks in continuous time; a rotation makes most of them oscillate."""
    w, v = rng.normal(size=(n, 8, 3)) * 1.5, rng.normal(size=(n, 3, 8)) * rng.uniform(0.8, 2, (n, 1, 1))
    bias, spin = rng.normal(size=(n, 8)), rng.normal(size=(n, 3, 3)) * rng.choice([0, 1.5, 1.5], (n, 1, 1))
    spin = spin - spin.transpose(0, 2, 1)

    def rates(_, s: np.ndarray) -> np.ndarray:
        state = s.T[:, :, None]
        return (v @ np.tanh(w @ state + bias[:, :, None]) - state + spin @ state)[:, :, 0].T

    return rates, rng.uniform(-1.2, 1.2, (3, n)), 0.25


SYSTEMS = (van_der_pol, pendulums, lorenz, roessler, networks)


def flows(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """The first two states (G, 2, L) of differential equations, solved by Runge-Kutta; some as exponents."""
    rates, state, speed = SYSTEMS[rng.integers(len(SYSTEMS))](rng, count)
    h = speed * log_uniform(rng, 0.3, 1.5, count)
    substeps = int(rng.integers(1, 4))
    path = np.empty((length, 3, count))
    for t in range(-BURN_IN, length):
        for _ in range(substeps):
            state = np.clip(runge_kutta(rates, t, state, h), -1e3, 1e3)
        path[t] = state  # before 0 these are overwritten
    x = path.transpose(2, 1, 0)[:, :2]
    x = unit(x - x.mean(2, keepdims=True)) * log_uniform(rng, 0.3, 2, (count, 1, 1))
    x = np.where(rng.random((count, 1, 1)) < 0.4, np.exp(x), x)
    return x + rng.normal(size=x.shape) * x.std(2, keepdims=True) * rng.choice([0, 0, 0, 0.02, 0.1], (count, 1, 1))


def maps(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Two coupled logistic maps, or the two states of a Henon map: (G, 2, L)."""
    r, x, coupling = rng.uniform(3.2, 4, (2, count)), rng.random((2, count)), rng.uniform(0, 0.3, count)
    coupling *= rng.integers(0, 2, count)
    a, b, y = rng.uniform(1, 1.4, count), rng.uniform(0, 0.3, count), rng.random((2, count)) * 0.1
    is_henon, out = rng.random(count) < 0.3, np.empty((length, 2, count))
    for t in range(length):
        grown = r * x * (1 - x)
        x = (1 - coupling) * grown + coupling * grown[::-1]
        y = np.clip(np.stack([1 - a * y[0] ** 2 + y[1], b * y[0]]), -2, 2)
        out[t] = np.where(is_henon, y, x)
    x = out.transpose(2, 1, 0)
    return x + rng.normal(size=x.shape) * x.std(2, keepdims=True) * rng.choice([0, 0.02], (count, 1, 1))


def follow(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Groups (G, 2, L) of x (G, L) and a series that follows it late, smoother or with noise; in any order."""
    other = np.empty_like(x)
    for row, leader in zip(other, x, strict=True):
        lag = rng.integers(0, 13)
        row[:] = np.concatenate((np.full(lag, leader[0]), leader[: len(leader) - lag]))
        if rng.random() < 0.4:
            a = rng.uniform(0.3, 0.95)
            row[:] = lfilter([1 - a], [1, -a], row - row[0]) + row[0]
    other = unit(other) * rng.choice([-1, 1, 1], (len(x), 1))
    other = other + noise(rng, *x.shape) * rng.choice([0.02, 0.2, 1], (len(x), 1))
    return np.where(rng.random((len(x), 1, 1)) < 0.5, np.stack([unit(x), other], 1), np.stack([other, unit(x)], 1))


SINGLE = {smoothing: 0.32, structural: 0.24, kernels: 0.14, walks: 0.13, counts: 0.05, shifts: 0.04}
PAIRS = {flows: 0.08, maps: 0.02}  # families of two states
FOLLOWING = 0.2  # the share of single series that another one follows


def groups(rng: np.random.Generator, count: int, length: int, pairs: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Groups (G, 2, L) of zero mean and unit spread, shuffled, and which belong together (G); pairs: also PAIRS."""
    families = SINGLE | (PAIRS if pairs else {})
    shares = np.array([*families.values()])
    parts, together = [], []
    for family, number in zip(families, rng.multinomial(count, shares / shares.sum()), strict=True):
        if family in PAIRS and number:
            parts.append(family(rng, number, length))
            together.append(np.ones(number, bool))
        elif number:
            led = rng.binomial(number, FOLLOWING)
            x = family(rng, 2 * number - led, length)
            parts += [follow(rng, x[:led]), x[led:].reshape(-1, 2, length)]
            together.append(np.arange(number) < led)
    x = np.nan_to_num(np.concatenate(parts), posinf=0, neginf=0)
    x = np.clip(unit(x - x.mean(2, keepdims=True)), -60, 60).astype(np.float32)
    order = rng.permutation(count)
    return x[order], np.concatenate(together)[order]
