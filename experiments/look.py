"""Show a text inside a model, on a page that any browser opens.

    python -m experiments.look "0.92,0.74;0.56,0.77;0.41,0.90;"

The page colours each token by how much it surprises the model, draws the attention of every head, and lists the
likeliest next tokens after each layer (the logit lens). A text that is a series, as the one above, is continued; then
the page also has the probabilities of each character of the forecast, and what the grammar of numbers excluded.
"""

import argparse
import math
import re
import sys
from base64 import b64encode
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from experiments.storage.interruption import Interruption

if TYPE_CHECKING:  # --help need not wait for torch
    from torch import Tensor

    from experiments.forecasting.grammar import Grammar
    from qwen_min import Qwen, Tokenizer

HORIZON = 3  # time steps of a forecast
TOP = 5  # tokens that the logit lens lists after each layer
MOST_WEIGHTS = 3 * 2**20  # attention weights on a page, a byte each; all else is smaller


def options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("text", help="the text to show")
    add("--model", default="tiny", help="checkpoint: a folder, a hub id or the embedded tiny (default %(default)s)")
    add("--out", type=Path, default=Path("look.html"), help="page to write or replace (default %(default)s)")


def inside(model: "Qwen", ids: "Tensor") -> "tuple[Tensor, Tensor]":
    """Read T tokens ids (1, T) with L layers of H heads.

    Returns the attention weights (L, H, T, T), a row for each token that reads, and the output of each layer after the
    model's norm, (L, T, C): what the output matrix would get if the layer were the last one.
    """
    import torch

    from qwen_min.attention import reference_attention
    from qwen_min.model import rotary_tables, rotate

    decoder: Any = model.model
    weights, hidden, num_tokens = [], [], ids.shape[1]
    x = decoder.embed_tokens(ids)  # (1, T, C)
    cos, sin = rotary_tables(torch.arange(num_tokens)[None], model.config, x.dtype)
    for layer in decoder.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        projected = (projection(normed) for projection in (attention.q_proj, attention.k_proj))
        q, k = (rotate(one.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2), cos, sin) for one in projected)
        # with the identity matrix as values, the output of attention is its weights
        weights.append(reference_attention(q, k, torch.eye(num_tokens).expand(1, k.shape[1], -1, -1), None))
        x = layer(x, cos, sin, None, None)
        hidden.append(decoder.norm(x))
    return torch.cat(weights), torch.cat(hidden)


def read_series(text: str, tokenizer: "Tokenizer") -> "tuple[str, Grammar | None, list[bool]]":
    """A text, the grammar of its forecast, and the variables that may have a second digit (`Grammar.follow`).

    A series gets a `;` after its last time step. There is no grammar for a text that is no series of whole time steps.
    """
    from experiments.forecasting.encoding import Encoding
    from experiments.forecasting.grammar import Grammar, may_be_wide

    if first := re.match(r"[0-9]+\.([0-9]{1,6})\b", text):
        series = text.removesuffix(";") + ";"
        grammar = Grammar(tokenizer, len(first[1]), series.partition(";")[0].count(",") + 1)
        with suppress(ValueError):
            grammar.choices(series)
            values = Encoding(1.0, grammar.decimals).decode(series, series.count(";"), grammar.num_variables)
            return series, grammar, may_be_wide(values).tolist()
    return text, None, []


def work(args: argparse.Namespace, _: Interruption) -> None:
    """Load the model, read the text and write the page."""
    import torch

    from experiments.forecasting.grammar import ALPHABET, decode
    from experiments.report.build import write_pages
    from qwen_min import load
    from qwen_min.generation import prefill
    from qwen_min.linear import pack
    from qwen_min.loss import token_losses

    if args.out.suffix != ".html":
        raise cli.CommandError(f"--out {args.out}: expected a name that ends in .html")
    model, tokenizer = load(args.model)
    config, head = model.config, model.head_weight
    text, grammar, wide = read_series(args.text, tokenizer)
    ids, num_values, forecast = tokenizer.encode(text), HORIZON * len(wide), []
    num_read, room = len(ids), grammar.columns(num_values) if grammar else 0
    heads = config.num_hidden_layers * config.num_attention_heads
    most = min(math.isqrt(2 * MOST_WEIGHTS // heads), config.max_position_embeddings)
    if num_read < 2 or num_read + room > most:
        raise cli.CommandError(
            f"the text and its forecast take {num_read} + {room} tokens, expected 2 to {most}, so that a page can hold "
            f"the attention of {heads} heads; give a {'longer' if num_read < 2 else 'shorter'} text"
        )
    if grammar:
        pack(model)
        cache, last = prefill(model, torch.tensor([ids]), room)
        written = decode(model, grammar, cache, last, num_values, wide=[wide])[0]
        ids += [grammar.ids[character] for character in written]
    weights, hidden = inside(model, torch.tensor([ids]))
    surprise = token_losses(hidden[-1, :-1], head, torch.tensor(ids[1:])).tolist()
    if grammar:
        before = (hidden[-1, num_read - 1 : -1] @ head.T).softmax(-1)  # (n, V), before each of n characters
        for character, allowed, shares in zip(written, grammar.choices(written, wide), before, strict=True):
            candidates = [(one, shares[grammar.ids[one]].item(), one in allowed) for one in ALPHABET]
            shares[[grammar.ids[one] for one in allowed]] = 0
            forecast.append((character, shares.sum().item(), candidates))
    tops = [(layer @ head.T).softmax(-1).topk(TOP) for layer in hidden]
    shares, likeliest = (torch.cat(parts, dim=-1) for parts in zip(*tops, strict=True))  # (T, L TOP)
    past, used = torch.tril_indices(len(ids), len(ids)), {*ids, *likeliest.flatten().tolist()}
    control = {i: name for name, i in tokenizer.control_tokens.items()}
    data = {
        "ids": ids,
        "names": {i: repr(control.get(i) or tokenizer.decode([i]))[1:-1].replace(" ", "␣") for i in used},
        "surprise": [None, *surprise],  # in nats
        "likeliest": likeliest.tolist(),
        "thousandths": (1000 * shares).round().int().tolist(),
        "weights": b64encode((255 * weights[:, :, *past]).round().byte().numpy().tobytes()).decode(),
    }
    mean, uniform = sum(surprise[: num_read - 1]) / (num_read - 1), math.log(config.vocab_size)
    verdict = f"The mean surprise is {mean:.2f} nats; if every token were equally likely, it would be {uniform:.2f}."
    values = {"num_read": num_read, "uniform": uniform, "config": config, "top": TOP, "forecast": forecast}
    write_pages([args.out], "look", title=f"A text inside the model {args.model}", verdict=verdict, data=data, **values)
    print(args.out)


parser, main = cli.command("experiments.look", __doc__, options, work)

if __name__ == "__main__":
    sys.exit(main())
