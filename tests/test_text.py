"""The commands that write text, and chat templates, on the embedded checkpoint."""

import io
import json
import shutil
import sys

import pytest

from experiments import text
from qwen_min import CheckpointError, generate
from qwen_min.chat import ChatTemplate
from qwen_min.generation import stream
from qwen_min.sampling import Sampling
from qwen_min.weights import TINY

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def chat_model(tmp_path):
    """The embedded checkpoint with a chat template."""
    folder = tmp_path / "chatty"
    shutil.copytree(TINY, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def test_the_stream_equals_generate_and_ends_before_the_end_token(model):
    rules = Sampling(temperature=1.0, top_k=30, repetition_penalty=1.2)
    whole = generate(model, [5, 9, 2], 20, temperature=1.0, top_k=30, repetition_penalty=1.2, seed=3).tokens[0].tolist()
    assert list(stream(model, [5, 9, 2], 20, sampling=rules, seed=3)) == whole
    assert list(stream(model, [5, 9, 2], 20, [whole[7]], rules, 3)) == whole[: whole.index(whole[7])]


@pytest.mark.parametrize("written", ["0.92,0.74;", "naïve 🦊 λ", "a<|im_end|>b"])
def test_streamed_characters_are_those_of_the_whole_text(tiny, written):
    _, tokenizer = tiny
    ids = tokenizer.encode(written)
    add = tokenizer.stream()
    assert "".join(map(add, ids)) == tokenizer.decode(ids)


def test_generate_prints_the_prompt_and_what_follows(capsys, tiny):
    model, tokenizer = tiny
    prompt = "1.00,2.00;1.10,1.90;"
    assert text.main(["generate", prompt, "--model", "tiny", "--dtype", "float32", "--temperature", "0",
                      "--repetition-penalty", "1", "--max-tokens", "20"]) == 0  # fmt: skip
    wanted = tokenizer.decode(generate(model, tokenizer.encode(prompt), 20).tokens[0])
    out, err = capsys.readouterr()
    assert out == prompt + wanted + "\n"
    assert "20 tokens in" in err
    assert "tokens/s" in err


def test_samples_differ_and_a_seed_repeats_them(capsys):
    def written(*more):
        text.main(["generate", "1.00,2.00;", "--model", "tiny", "--max-tokens", "12", *more])
        return capsys.readouterr().out

    first = written("--num-samples", "2")
    assert written("--num-samples", "2") == first
    one, other = first.strip().split("\n\n")
    assert one != other
    assert written().strip() == one


def test_chat_answers_each_line_with_the_earlier_ones_in_mind(monkeypatch, capsys, chat_model):
    prompts = []
    monkeypatch.setattr(
        text.Writer, "write", lambda self, ids, seed: prompts.append(self.tokenizer.decode(ids)) or ["7"]
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nnever read\n"))
    assert text.main(["chat", "--model", str(chat_model), "--system", "be brief"]) == 0
    assert prompts == ["s:be brief;u:one;a:", "s:be brief;u:one;a:7;u:two;a:"]


def test_chat_on_the_embedded_checkpoint(monkeypatch, capsys, chat_model):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1.00,2.00;\n"))
    assert text.main(["chat", "--model", str(chat_model), "--max-tokens", "8"]) == 0
    assert len(capsys.readouterr().out.strip()) >= 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "1.00", "--max-tokens", "99999"], "exceed the model's"),
        (["generate", "1.00", "--temperature", "-1"], "temperature is -1.0, expected"),
        (["generate", "1.00", "--top-p", "2"], "top_p is 2.0, expected"),
        (["chat"], "has no chat template"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert text.main([*arguments, "--model", "tiny"]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ")
    assert message in err
    assert "\n" not in err


@pytest.mark.parametrize("content", [None, "not json", "[]", "{}", json.dumps({"chat_template": "{% if %}"})])
def test_a_folder_without_a_readable_template_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"template|readable"):
        ChatTemplate(tmp_path)


def test_a_template_may_refuse_a_conversation(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(CheckpointError, match="roles must alternate"):
        ChatTemplate(tmp_path).render([{"role": "user", "content": "hello"}])
