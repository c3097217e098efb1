"""Numbers in, numbers out: a time step is one position of the decoder, and a linear head forecasts K steps at once.

Text takes ten tokens for a time step, or six, and the model chooses one digit after the other. Here a linear map turns
the newest values into the input of the decoder's first layer, in place of the embedding. A second one turns the last
hidden state into the changes of each variable over the next 1 to K steps, and into a scale that says how sure the model
is of each. Only the first layers of the decoder take part. They are frozen and have LoRA adapters; the two maps are
trained.

n series or windows, B batch size, T time steps, D variables, K steps that are forecast at once, F features of a time
step, C hidden size, N contexts, h steps of a forecast.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import flops
from experiments.forecasting.settings import Training
from experiments.forecasting.training import TrainingError
from flops.model import linear, total
from flops.primitives import ABS, ADD, EXP, MUL, reduction
from flops.training import BACKWARD_PER_FORWARD, block_backward, linear_backward, rms_norm_backward
from lora import inject
from qwen_min import Qwen
from qwen_min.config import QwenConfig
from qwen_min.linear import unpack
from qwen_min.model import rotary_tables

LAGS = 4  # a position reads so many of the newest time steps
LOG_OFFSET = 0.05  # added to values before their logarithm
AT_ONCE = 3  # a forecast keeps so many of the K steps and reads them as values; chosen on the validation set
REPEATS = 4  # how often an epoch reads a window, on average
PERIODS = (10.0, 1.0, 0.1)  # of the sines and cosines of the newest value: they tell close values apart
FEATURES_PER_VARIABLE = 2 * LAGS + 2 * len(PERIODS)
USUAL = 0.99  # this share of the training series stays below what counts as a usual value; chosen on the validation set


def features(series: Tensor) -> Tensor:
    """The features (B, T, F) of each step of series (B, T, D).

    They are the newest LAGS values, their logarithms, which tell low populations apart, and sines and cosines of the
    newest value. Before its first step, a series has the value of that step.
    """
    num_steps = series.shape[1]
    padded = torch.cat((series[:, :1].expand(-1, LAGS - 1, -1), series), dim=1)
    newest = torch.cat([padded[:, LAGS - 1 - lag :][:, :num_steps] for lag in range(LAGS)], dim=-1)
    waves = [wave(2 * math.pi / period * series) for period in PERIODS for wave in (torch.sin, torch.cos)]
    return torch.cat((newest, torch.log(newest.clamp(min=0) + LOG_OFFSET), *waves), dim=-1)


def changes(series: Tensor, steps: int) -> Tensor:
    """How much series (B, T, D) will have changed after 1 to K = `steps` more steps: (B, T - K, K, D)."""
    return series.unfold(1, steps + 1, 1).movedim(-1, 2)[:, :, 1:] - series[:, :-steps, None]


def check(model: Qwen, settings: Training, num_steps: int, steps: int) -> None:
    """Raise TrainingError when the model has too few layers, or series of num_steps steps are too short for a window
    and the K = `steps` steps after it.
    """
    available = len(model.model.layers)
    assert settings.direct_layers is not None
    if settings.direct_layers > available:
        raise TrainingError(
            f"direct_layers is {settings.direct_layers}, expected 1 to {available}, the layers of the model; choose "
            "another --model or --plan"
        )
    assert settings.context is not None
    if settings.context + steps > num_steps:
        raise TrainingError(
            f"the series have {num_steps} time steps, expected at least {settings.context + steps}, a window of "
            f"{settings.context} and the {steps} after it; use longer series, or choose another --plan"
        )


class DirectForecaster(nn.Module):
    """The first layers of a decoder between two linear maps. Values are in scaled units."""

    mean: Tensor  # (F) of the features
    spread: Tensor  # (F)
    change_spread: Tensor  # (K, D)
    usual: Tensor  # (D) the largest values of nearly all training series

    def __init__(self, model: Qwen, settings: Training, series: Tensor, steps: int):
        """Inject adapters into the first `settings.direct_layers` layers of the model, and draw the maps.

        The training series (n, T, D) give the mean and the spread of features and changes. `lora.remove` takes the
        adapters out again. Raises TrainingError as `check` does.
        """
        super().__init__()
        check(model, settings, series.shape[1], steps)
        unpack(model)  # training does not use packed copies of the weights
        self.config, self.steps, self.num_variables = model.config, steps, series.shape[2]
        self.layers, self.norm = nn.ModuleList(model.model.layers[: settings.direct_layers]), model.model.norm
        inject(self, settings.lora)
        inputs, wanted = features(series), changes(series, steps)
        self.register_buffer("mean", inputs.mean((0, 1)))
        self.register_buffer("spread", inputs.std((0, 1)) + 1e-6)
        self.register_buffer("change_spread", wanted.std((0, 1)) + 1e-6)
        self.register_buffer("usual", series.amax(1).quantile(USUAL, dim=0))
        self.read = nn.Linear(inputs.shape[2], model.config.hidden_size)
        self.head = nn.Linear(model.config.hidden_size, 2 * steps * self.num_variables)
        nn.init.normal_(self.read.weight, std=0.02)  # as large as a row of the embedding
        for zero in (self.read.bias, self.head.weight, self.head.bias):
            nn.init.zeros_(zero)
        self.to(model.head_weight.device)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The changes to expect after each step of normalised features (B, T, F), and the logarithm of their scale.

        Both are (B, T, K, D), in units of the spread of each change.
        """
        x = self.read(inputs).to(self.norm.weight.dtype)
        cos, sin = rotary_tables(torch.arange(x.shape[1], device=x.device)[None], self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, None, None)
        out = self.head(self.norm(x).float()).unflatten(-1, (2, self.steps, self.num_variables))
        location, log_scale = out.unbind(2)
        return location, log_scale

    def normalised(self, series: Tensor) -> Tensor:
        """The features (B, T, F) of series (B, T, D), as the decoder reads them."""
        return (features(series) - self.mean) / self.spread

    @torch.inference_mode()
    def forecast(self, contexts: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """Continue contexts (N, T, D): the medians (N, h, D), and the scales (N, K, D) of the first K steps.

        Each pass gives the next AT_ONCE steps, which the following pass reads. The scales are those that the model has
        at the end of the contexts. Medians below 0 become 0, because populations are not negative.

        A variable with a value above the usual ones is made smaller for the model, by a factor, and its forecast is
        made larger again: when a population is multiplied by a factor, the equations of Rosenzweig and MacArthur stay
        the same, with other constants.
        """
        known = torch.from_numpy(contexts).float().to(self.mean.device)
        factor = (self.usual / known.amax(1)).clamp(max=1)[:, None]  # (N, 1, D)
        known = known * factor
        num_known, scales = known.shape[1], []
        while known.shape[1] < num_known + horizon:
            location, log_scale = (out[:, -1] for out in self(self.normalised(known)))  # (N, K, D)
            scales.append(log_scale.exp() * self.change_spread)
            found = known[:, -1:] + location[:, :AT_ONCE] * self.change_spread[:AT_ONCE]
            known = torch.cat((known, found.clamp(min=0)), dim=1)
        medians = known[:, num_known : num_known + horizon] / factor
        return medians.double().cpu().numpy(), (scales[0] / factor).double().cpu().numpy()


def nats(medians: np.ndarray, scales: np.ndarray, truth: np.ndarray, width: float) -> np.ndarray:
    """The mean nats of the values of each true series (N, h, D), rounded to `width`, under Laplace distributions: (N).

    The probability of a rounded value is that of all values that are rounded to it, so the nats are never negative and
    compare with those of digits.
    """
    near, far = np.abs(truth - medians) - width / 2, np.abs(truth - medians) + width / 2  # the sides of that interval
    outside = near / scales + math.log(2) - np.log1p(-np.exp(-width / scales))  # both on one side of the median
    around = -np.log1p(-(np.exp(np.minimum(near, 0) / scales) + np.exp(-far / scales)) / 2)
    return np.where(near > 0, outside, around).mean(axis=(1, 2))


def laplace_loss(location: Tensor, log_scale: Tensor, target: Tensor) -> Tensor:
    """The mean nats of targets under Laplace distributions; all three have the same shape."""
    return ((target - location).abs() * (-log_scale).exp() + log_scale).mean() + math.log(2)


class DirectWindows:
    """Windows of series for `experiments.forecasting.training.train`."""

    def __init__(self, forecaster: DirectForecaster, series: Tensor, rounded: Tensor, settings: Training):
        """Windows of `settings.context` steps, which begin at every `settings.stride` steps of series (n, T, D).

        The model reads the rounded values, as in the contexts of a test, and learns to forecast the exact ones. The
        more the values of a series vary, the more often an epoch has its windows, on average REPEATS times: the series
        that vary most decide a mean squared error.
        """
        length, steps = settings.context, forecaster.steps
        assert length is not None  # a plan fills it in before the training
        starts = range(0, series.shape[1] - length - steps + 1, settings.stride)
        device = forecaster.mean.device
        inputs = forecaster.normalised(rounded.to(device))
        wanted = changes(series, steps) + (series - rounded)[:, :-steps, None]  # from the value that was read
        wanted = wanted.to(device) / forecaster.change_spread
        self.inputs = torch.cat([inputs[:, start : start + length] for start in starts])  # (n, T, F)
        self.targets = torch.cat([wanted[:, start : start + length] for start in starts])  # (n, T, K, D)
        swing = series.var(1).sum(1).sqrt()  # (n)
        often = (REPEATS * swing / swing.mean().clamp(min=1e-6)).round().clamp(min=1).long()
        self.order = torch.arange(len(self.inputs)).repeat_interleave(often.repeat(len(starts)))
        self.forecaster, self.device = forecaster, device
        self.parameters = {name: p for name, p in forecaster.named_parameters() if p.requires_grad}

    def __len__(self) -> int:
        """The number of windows in an epoch."""
        return len(self.order)

    def num_targets(self, rows: Tensor) -> int:
        """The number of values that are forecast."""
        return len(rows) * self.targets[0].numel()

    def loss(self, rows: Tensor) -> Tensor:
        """The mean nats of the changes in the windows in rows (B, on the CPU)."""
        rows = self.order[rows].to(self.device, non_blocking=True)
        location, log_scale = self.forecaster(self.inputs[rows])
        return laplace_loss(location, log_scale, self.targets[rows])


def step_flops(
    config: QwenConfig, settings: Training, ahead: int, num_variables: int, convention: str = "exact"
) -> int:
    """FLOPs of one optimizer step of a forecaster of K = `ahead` steps, as `flops.training_step` counts one of text.

    Features and targets are made once, before the training, and do not count.
    """
    assert settings.context is not None
    assert settings.direct_layers is not None
    config = replace(config, num_hidden_layers=settings.direct_layers)
    batch, length, ranks = settings.batch // settings.accumulate, settings.context, settings.ranks
    rows, hidden, outputs = batch * length, config.hidden_size, 2 * ahead * num_variables
    num_features, values = FEATURES_PER_VARIABLE * num_variables, rows * ahead * num_variables
    forward = flops.forward(replace(config, vocab_size=outputs), batch, length, convention=convention, ranks=ranks)
    part = total(forward) + linear(rows, num_features, hidden, bias=True) + rows * outputs * ADD  # the head's bias
    part += values * (ADD + ABS + ADD + EXP + MUL + ADD) + reduction(values) + MUL + ADD  # the loss
    if convention == "exact":
        part += values * (MUL + 3 * MUL + ADD + MUL + ADD + ADD)  # its gradients, over the number of values
        part += linear_backward(rows, hidden, outputs, bias=True, rank=0, needs_x=True, trains=True)
        part += rms_norm_backward(rows, hidden, trains=False)
        layer, _ = block_backward(config, batch, length, ranks, needs_x=True)
        part += config.num_hidden_layers * total(layer)
        part += linear_backward(rows, num_features, hidden, bias=True, rank=0, needs_x=False, trains=True)
    else:
        part *= 1 + BACKWARD_PER_FORWARD
    return part * settings.accumulate
