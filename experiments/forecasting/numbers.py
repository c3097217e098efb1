"""A small Qwen2.5 that reads values in place of text: pretrained once, it forecasts any series.

Between the blocks of `qwen_min` and their input and output stand three changes. A token is the newest PATCH values of
one variable at some time, and what its seasons were at the times that it forecasts; tokens may overlap. The head gives
quantiles of the next AHEAD values. And between two blocks, a gate lets the variables of a series see each other.

N series, D variables, L time steps, T tokens, C hidden size, Q = len(LEVELS) quantiles, K = AHEAD steps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.forecasting.seasons import Seasons
from qwen_min.config import QwenConfig
from qwen_min.linear import Linear
from qwen_min.model import Block, RMSNorm, rotary_tables

PATCH, AHEAD = 16, 32
LEVELS = tuple(level / 10 for level in range(1, 10))
SEASONS = 3  # past values beside each value to forecast: two of the shortest season, one of the strongest
FEATURES = 2 * PATCH + 2 * SEASONS * AHEAD + 2  # of a token: values, observed or not, how strong the seasons are
CONFIG = QwenConfig(
    vocab_size=len(LEVELS) * AHEAD,  # the size of the output
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=100.0,
    tie_word_embeddings=False,
)


class Patches(NamedTuple):
    """What the decoder reads of series: T tokens, of which the last ends with the series."""

    features: Tensor  # (N, D, T, FEATURES)
    newest: Tensor  # (N, D, T), the newest observed value of each token: forecasts are changes from it
    ends: Tensor  # (T), the time after each


def patches(x: Tensor, seen: Tensor, seasons: Seasons, stride: int) -> Patches:
    """Tokens every `stride` steps of normalised series x (N, D, L); values that are not seen (N, D, L) count as 0."""
    seen, times, ahead = seen.to(x.dtype), torch.arange(x.shape[-1], device=x.device), torch.arange(AHEAD).to(x.device)
    ends = (times + 1).flip(0)[::stride].flip(0)  # (T)
    times = times.expand(x.shape)
    newest = torch.where(seen > 0, times, -1).cummax(-1).values[..., ends - 1]
    newest = x.gather(-1, newest.clamp(min=0)) * (newest >= 0)
    places = [(ends[:, None] + torch.arange(-PATCH, 0).to(x.device)).expand(*x.shape[:2], -1, -1)]  # (N, D, T, PATCH)
    # of each value to forecast: one of the shortest season before it, two, one of the strongest
    for which, back in ((0, 1), (0, 2), (1, 1)):
        period = seasons.periods[..., which, None]
        places.append(ends[:, None] + (ahead - period * (ahead // period + back))[:, :, None])  # (N, D, T, K)
    index = torch.cat(places, -1)
    known = seen.gather(-1, index.clamp(min=0).flatten(2)).view(index.shape) * (index >= 0)
    values = x.gather(-1, index.clamp(min=0).flatten(2)).view(index.shape) * known
    values[..., PATCH:] -= newest[..., None] * known[..., PATCH:]
    strengths = seasons.strengths[:, :, None].expand(-1, -1, len(ends), -1)
    return Patches(torch.cat((values, known, strengths), -1), newest, ends)


class Mix(nn.Module):
    """Adds to each variable what the others offer at the same time. It starts as the identity."""

    def __init__(self, size: int, inner: int, eps: float):
        super().__init__()
        self.norm = RMSNorm(size, eps)
        self.gate_proj, self.up_proj = Linear(size, inner, bias=True), Linear(size, inner, bias=False)
        self.down_proj = Linear(inner, size, bias=False)

    def forward(self, x: Tensor, together: Tensor | None) -> Tensor:
        """x (N, D, T, C), plus what the other variables add where together (N) is 1; None: everywhere."""
        if x.shape[1] == 1:
            return x
        normed = self.norm(x)
        offered = self.up_proj(normed)
        others = (offered.sum(1, keepdim=True) - offered) / (x.shape[1] - 1)
        added = self.down_proj(nn.functional.silu(self.gate_proj(normed)) * others)
        return x + (added if together is None else added * together[:, None, None, None])


class Numbers(nn.Module):
    """The decoder: series of normalised values to quantiles of what follows each token."""

    def __init__(self, config: QwenConfig = CONFIG):
        super().__init__()
        self.config = config
        size, layers = config.hidden_size, range(config.num_hidden_layers)
        self.read = Linear(FEATURES, size, bias=True)
        self.gate_proj, self.up_proj = Linear(FEATURES, 2 * size, bias=True), Linear(FEATURES, 2 * size, bias=False)
        self.down_proj = Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in layers)
        self.mixes = nn.ModuleList(Mix(size, size // 2, config.rms_norm_eps) for _ in layers)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.head = Linear(size, config.vocab_size, bias=True)
        self.skip = Linear(FEATURES, config.vocab_size, bias=False)

    def start(self, seed: int) -> None:
        """Random weights: it forecasts 0, and no variable sees another."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter.shape[1]), generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for part in (self.head, self.skip, *(mix.down_proj for mix in self.modules() if isinstance(mix, Mix))):
            nn.init.zeros_(part.weight)

    def forward(self, patches: Patches, together: Tensor | None = None) -> Tensor:
        """Quantiles (N, D, T, Q, K) of what follows each token; together as in `Mix.forward`."""
        features, newest, ends = patches
        x = self.read(features)
        x = x + self.down_proj(nn.functional.silu(self.gate_proj(features)) * self.up_proj(features))  # (N, D, T, C)
        cos, sin = rotary_tables((ends / PATCH)[None], self.config, x.dtype)
        for layer, mix in zip(self.layers, self.mixes, strict=True):
            x = mix(layer(x.flatten(0, 1), cos, sin, None, None).view(x.shape), together)
        out = self.head(self.norm(x)) + self.skip(features)
        return newest[..., None, None] + out.unflatten(-1, (len(LEVELS), AHEAD))
