"""Pretrain the embedded checkpoint that writes text, on n series of T = 100 time steps and 2 variables."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from experiments.forecasting import numbers
from experiments.forecasting.encoding import SCALED_MAX, Encoding
from experiments.training.pretraining import write_checkpoint
from experiments.training.settings import Training
from experiments.training.synthetic import log_uniform, runge_kutta
from qwen_min.loss import next_token_loss
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer
from qwen_min.weights import TINY

# of the same size as `numbers`; the tokens are the 256 bytes and the end of text
CONFIG = replace(
    numbers.CONFIG, vocab_size=257, max_position_embeddings=2048, rope_theta=10_000.0, tie_word_embeddings=True
)
NUM_STEPS = 100
SUBSTEPS = 10  # Runge-Kutta steps between two time steps
STEPS, BATCH, RATE = 4000, 8, 1e-2  # the latter at its peak
HELD_OUT = 256  # series whose loss the card names


def integrate(rates, state: np.ndarray, burn_in: int) -> np.ndarray:
    """Integrate n systems with state (2, n) by fourth-order Runge-Kutta: (n, T, 2), the time steps after burn_in."""
    path, h = [], 1 / SUBSTEPS
    for step in range(burn_in + NUM_STEPS):
        path.append(state)
        for t in step + h * np.arange(SUBSTEPS):
            state = runge_kutta(rates, t, state, h)
    return np.stack(path[burn_in:]).transpose(2, 0, 1)


def oscillators(rng: np.random.Generator, n: int) -> np.ndarray:
    """Damped linear oscillators, half of them driven: position and velocity."""
    omega = 2 * np.pi / log_uniform(rng, 6, 60, n)
    damping = log_uniform(rng, 1e-3, 0.3, n)
    drive, drive_omega = rng.integers(0, 2, n) * omega**2, 2 * np.pi / log_uniform(rng, 6, 60, n)
    phase = rng.uniform(0, 2 * np.pi, n)

    def rates(t, state):
        x, v = state
        return np.stack([v, drive * np.cos(drive_omega * t + phase) - 2 * damping * omega * v - omega**2 * x])

    return integrate(rates, np.stack([rng.normal(size=n), omega * rng.normal(size=n)]), burn_in=0)


def van_der_pol(rng: np.random.Generator, n: int) -> np.ndarray:
    """Relaxation oscillators, from almost a sine to sharp spikes: position and velocity."""
    mu = log_uniform(rng, 0.05, 4, n)
    speed = (2 * np.pi + 1.6 * mu) / log_uniform(rng, 8, 60, n)  # the cycle takes about 2 pi + 1.6 mu

    def rates(_, state):
        x, v = state
        return speed * np.stack([v, mu * (1 - x**2) * v - x])

    return integrate(rates, rng.uniform(-2, 2, (2, n)), burn_in=20)


def sums_of_sines(rng: np.random.Generator, n: int) -> np.ndarray:
    """One to three sines, with the same periods in both variables but different phases and strengths."""
    t = np.arange(NUM_STEPS)[None, :, None, None]
    omega = 2 * np.pi / log_uniform(rng, 5, 60, (n, 1, 1, 3))
    strength = rng.uniform(0.2, 1, (n, 1, 2, 3)) * (np.arange(3) < rng.integers(1, 4, (n, 1, 1, 1)))
    return (strength * np.sin(omega * t + rng.uniform(0, 2 * np.pi, (n, 1, 2, 3)))).sum(-1)


def logistic_growth(rng: np.random.Generator, n: int) -> np.ndarray:
    """Growth to a capacity of 1, or decline from it; the variables are independent."""
    t = np.arange(NUM_STEPS)[None, :, None]
    rate = log_uniform(rng, 0.03, 0.5, (n, 1, 2)) * rng.choice([-1, 1], (n, 1, 2))
    return 1 / (1 + np.exp(-rate * (t - rng.uniform(0, NUM_STEPS, (n, 1, 2)))))


def ar2(rng: np.random.Generator, n: int) -> np.ndarray:
    """Noisy second-order autoregressions with complex roots; the variables are independent."""
    radius, angle = rng.uniform(0.8, 1, (n, 2)), 2 * np.pi / log_uniform(rng, 5, 60, (n, 2))
    noise = log_uniform(rng, 1e-3, 0.3, (n, 1))
    path = [rng.normal(size=(n, 2)), rng.normal(size=(n, 2))]
    for _ in range(NUM_STEPS - 2):
        kick = noise * rng.normal(size=(n, 2))
        path.append(2 * radius * np.cos(angle) * path[-1] - radius**2 * path[-2] + kick)
    return np.stack(path, axis=1)


def random_walks(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, NUM_STEPS, 2)).cumsum(axis=1)


FAMILIES = {
    oscillators: 0.3, van_der_pol: 0.25, sums_of_sines: 0.25, logistic_growth: 0.1, ar2: 0.05, random_walks: 0.05
}  # fmt: skip


def series(seed: int, n: int) -> np.ndarray:
    """n series (n, T, 2) of all families, shuffled; each variable is scaled to a random range within 0 to 9.99."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, list(FAMILIES.values()))
    raw = np.concatenate([family(rng, count) for family, count in zip(FAMILIES, counts, strict=True)])
    low, high = raw.min(axis=1, keepdims=True), raw.max(axis=1, keepdims=True)
    top = log_uniform(rng, 0.2, SCALED_MAX, (n, 1, 2))
    bottom = top * rng.uniform(0, 0.8, (n, 1, 2)) * rng.integers(0, 2, (n, 1, 2))
    return rng.permutation(bottom + (top - bottom) * (raw - low) / (high - low))


def trained(ids: torch.Tensor, steps: int, seed: int) -> Qwen:
    """Train a model on ids (n, T), each row once, by Muon and AdamW; weights are fp32, products bf16 by autocast."""
    torch.manual_seed(seed)
    model = Qwen(CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "layers" not in name]
    optimizers = [  # not this project's Muon, which is faster: the weights that ship were made with torch's
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    settings = Training(None, RATE, None, steps, cosine=True)
    for step in trange(steps, desc="pretrain", mininterval=5):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = settings.rate(step)
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, ids[step * BATCH : (step + 1) * BATCH])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


def pretrain(out: Path, steps: int, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(TINY / "tokenizer.json", out)  # the 256 bytes in GPT-2's order: numeric text gets the ids of Qwen2.5
    tokenizer, encoding = Tokenizer(out / "tokenizer.json"), Encoding(scale=1.0)
    all_series = series(seed, steps * BATCH + HELD_OUT)
    ids = torch.tensor([tokenizer.encode(encoding.encode(one)) for one in all_series])
    model = trained(ids[:-HELD_OUT], steps, seed).to(torch.bfloat16)
    with torch.no_grad():
        losses = [next_token_loss(model.float(), rows).item() for rows in ids[-HELD_OUT:].split(32)]
    families = ", ".join(f"{family.__name__} {share:.0%}" for family, share in FAMILIES.items())
    card = f"""# The embedded checkpoint

A Qwen2.5 decoder of {sum(p.numel() for p in model.parameters()):,} parameters. It was pretrained from scratch on series
that are not predator-prey, written as text. Tests, examples and the default run use it in place of the real weights,
which have to be downloaded.

| | |
|---|---|
| command | `qwen-min pretrain tiny FOLDER --steps {steps} --seed {seed}` |
| data | {len(ids) - HELD_OUT:,} series of 100 x 2 values, each read once: {families} |
| steps | {steps} of {BATCH} x {ids.shape[1]} tokens, Muon and AdamW, peak rate {RATE} |
| threads | {torch.get_num_threads()} |
| held-out loss | {np.mean(losses):.4f} nats per token over {HELD_OUT} further series |

The same command gives the same weights on the same machine and number of threads. Weights are bf16.
"""
    end = {"bos_token_id": None, "eos_token_id": tokenizer.pad_id, "use_sliding_window": False}
    write_checkpoint(out, model.to(torch.bfloat16), "Qwen2ForCausalLM", card, **end)
