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

import numpy as np
import torch
from torch import Tensor, nn

from lora import LoraConfig, inject
from qwen_min import Qwen
from qwen_min.linear import unpack
from qwen_min.model import rotary_tables

LAGS = 4  # a position reads so many of the newest time steps
LOG_OFFSET = 0.05  # added to values before their logarithm
AT_ONCE = 3  # a forecast keeps so many of the K steps and reads them as values; chosen on the validation set
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


class DirectForecaster(nn.Module):
    """The first layers of a decoder between two linear maps. Values are in scaled units."""

    mean: Tensor  # (F) of the features
    spread: Tensor  # (F)
    change_spread: Tensor  # (K, D)
    usual: Tensor  # (D) the largest values of nearly all training series

    def __init__(self, model: Qwen, layers: int, adapters: LoraConfig, series: Tensor, steps: int):
        """Inject adapters into the first `layers` layers of the model, and draw the maps.

        The training series (N, T, D) give the mean and the spread of features and changes; a forecast has K = `steps`
        steps at once. `lora.remove` takes the adapters out again.
        """
        super().__init__()
        unpack(model)  # training does not use packed copies of the weights
        self.config, self.steps, self.num_variables = model.config, steps, series.shape[2]
        self.layers, self.norm = nn.ModuleList(model.model.layers[:layers]), model.model.norm
        inject(self, adapters)
        inputs, wanted = features(series), changes(series, steps)
        self.register_buffer("mean", inputs.mean((0, 1)))
        self.register_buffer("spread", inputs.std((0, 1)) + 1e-6)
        self.register_buffer("change_spread", wanted.std((0, 1)) + 1e-6)
        self.register_buffer("usual", series.amax(1).quantile(USUAL, dim=0).clamp(min=1e-6))  # a variable may be 0
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
