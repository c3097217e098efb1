"""`qwen-min look`: the numbers on the page are those of the model, and a text is never more than text."""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from html import escape

import numpy as np
import pytest
import torch

from experiments import look
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.grammar import ALPHABET, Grammar, may_be_wide
from experiments.forecasting.text import TextForecaster
from qwen_min import load
from qwen_min.attention import attention, reference_attention
from qwen_min.loss import token_losses
from qwen_min.weights import TINY

SERIES = "2.92,5.74;2.56,5.77;2.41,5.90;2.52,6.20;2.90,6.30;3.40,6.10;3.62,5.80;3.30,5.72"
HOSTILE = "</script><img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def page_of(folder, text, *more):
    """The page of a text, and the numbers in it."""
    path = folder / "page.html"
    assert look.main([text, "--out", str(path), *more]) == 0
    html = path.read_text()
    return html, json.loads(re.search(r"^const data = (.*);$", html, re.MULTILINE)[1])


def test_the_numbers_on_the_page_are_those_of_the_model(tmp_path, monkeypatch):
    data = page_of(tmp_path, SERIES)[1]
    model, tokenizer = load("tiny")  # loses its layers below
    ids = torch.tensor([data["ids"]])
    assert tokenizer.decode(ids[0]).startswith(SERIES + ";")
    read = []
    monkeypatch.setattr("qwen_min.model.attention", lambda *args: (read.append(args), attention(*args))[1])
    losses = token_losses(model.model(ids)[0, :-1], model.head_weight, ids[0, 1:])
    assert data["surprise"] == [None, *(pytest.approx(loss, abs=1e-4) for loss in losses.tolist())]
    identity = torch.eye(ids.shape[1]).expand(1, 2, -1, -1)  # as values: the result is the weights
    heads = torch.cat([reference_attention(q, k, identity, mask)[0] for q, k, _, mask in read])
    stored = np.frombuffer(b64decode(data["weights"]), np.uint8).reshape(len(heads), -1)
    assert np.abs(stored / 255 - heads[:, *np.tril_indices(ids.shape[1])].numpy()).max() < 0.51 / 255
    tops = (torch.tensor(data[name]).split(look.TOP, dim=1) for name in ("likeliest", "thousandths"))
    for likeliest, thousandths in reversed([*zip(*tops, strict=True)]):
        shares = model(ids)[0].softmax(-1)  # as if the layer were the last one
        top = shares.gather(1, likeliest)
        assert torch.allclose(top, shares.topk(look.TOP).values, atol=1e-5)
        assert torch.allclose(thousandths / 1000, top, atol=0.00051)
        model.model.layers = model.model.layers[:-1]
    assert not model.model.layers


def test_the_forecast_is_the_forecaster_s_and_shows_what_the_grammar_excluded(tmp_path, tiny):
    model, tokenizer = tiny
    html, data = page_of(tmp_path, SERIES)
    encoding = Encoding(1.0)
    values = encoding.decode(SERIES, 8, 2)
    forecast = TextForecaster(model, tokenizer, encoding).forecast([values], look.HORIZON, samples=0).values[0]
    written = encoding.encode(forecast)
    assert tokenizer.decode(data["ids"]) == f"{SERIES};{written}"
    rows = re.findall(r"<tr><td>(.)</td><td>[\d.]+ %</td>(.*?)</tr>", html, re.DOTALL)
    assert "".join(character for character, _ in rows) == written
    grammar = Grammar(tokenizer, 2, 2)
    choices = grammar.choices(written, may_be_wide(values))
    shares = model(torch.tensor([data["ids"]]))[0].softmax(-1)[-1 - len(rows) : -1].tolist()
    for (character, cells), allowed, each in zip(rows, choices, shares, strict=True):
        by_character = {one: each[grammar.ids[one]] for one in ALPHABET}
        assert character == max(allowed, key=by_character.__getitem__)
        cells = re.findall(r'<td( class="out")? style="--part: (.*?)">', cells)
        assert [not excluded for excluded, _ in cells] == [one in allowed for one in ALPHABET]
        assert [float(share) for _, share in cells] == pytest.approx(list(by_character.values()), abs=0.0006)


@pytest.mark.parametrize("text", ["Foxes eat hares", "0.92,0.7", "0.92,0.74;0.56", "0.92,0.74;0.5,0.7", "100.25;1.00"])
def test_what_is_no_series_of_whole_steps_has_no_forecast(tmp_path, text):
    html, data = page_of(tmp_path, text)
    assert len(data["ids"]) == len(text)
    assert "<h2>Forecast" not in html


def test_no_text_and_no_name_becomes_markup(tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    shutil.copytree(TINY, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    del vocabulary[next(name for name, i in vocabulary.items() if i == 255)]
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 255, "content": HOSTILE, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    html, data = page_of(tmp_path, f'a"b {HOSTILE}\n&lt;\u202e', "--model", str(folder))
    assert {HOSTILE.replace(" ", "␣"), "\\n"} <= {*data["names"].values()}
    assert "<img" not in html
    assert html.count("</script>") == 2
    assert escape(HOSTILE.replace(" ", "␣")) in html
    assert "\u202e" not in html


@pytest.mark.parametrize(("text", "out", "message"), [
    ("7", "page.html", "take 1 [+] 0 tokens, expected 2 to 627, .* give a longer text"),
    ("1.00;" * 122, "page.html", "take 610 [+] 24 tokens, .* give a shorter text"),
    ("text", "page.txt", "expected a name that ends in .html"),
])  # fmt: skip
def test_what_no_page_can_show_is_refused_with_what_to_do(tmp_path, refused, text, out, message):
    assert re.search(message, refused("look", text, "--out", tmp_path / out))
    assert not (tmp_path / out).exists()


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH")
def test_a_browser_runs_the_page_without_errors(tmp_path):
    page_of(tmp_path, SERIES)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    page = (tmp_path / "page.html").as_uri()
    done = subprocess.run([CHROMIUM, *options, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    assert "Layer 1, head 1 looks most at" in done.stdout
