"""`scripts/gpu.py` on the CPU: what is sent, what comes back, a plan on several machines."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import random_model, write_checkpoint
from experiments.benchmarking.gguf_file import write_gguf
from qwen_min import QwenConfig
from qwen_min.weights import TINY
from scripts import gpu
from tests import faults, forks, small_plan


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """A checkpoint in bfloat16, and the parts of it that are sent."""
    work = tmp_path_factory.mktemp("sent")
    checkpoint, parts = work / "checkpoint", work / "parts"
    checkpoint.mkdir()
    config = replace(QwenConfig.from_file(TINY / "config.json"), num_hidden_layers=2)
    write_checkpoint(checkpoint, random_model(config), torch.bfloat16)
    save_file(load_file(checkpoint / gpu.WEIGHTS), checkpoint / gpu.WEIGHTS, {"format": "pt"})
    write_gguf(checkpoint, work / "model.gguf", "BF16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "PART", 300_000)
        words = ("--checkpoint", checkpoint, "--gguf", work / "model.gguf", "--wheels")
        assert gpu.main([*map(str, ("parts", parts, *words))]) == 0
    assert max(path.stat().st_size for path in parts.iterdir()) == 300_000
    return checkpoint, parts


def test_parts_expand_to_the_bytes_of_the_checkpoint_or_are_refused(sent, tmp_path):
    machine = shutil.copytree(sent[1], tmp_path / "machine")
    gpu.expand(machine)
    for path in sent[0].iterdir():
        assert (machine / path.name).read_bytes() == path.read_bytes()
    (machine / gpu.WEIGHTS).unlink()
    (machine / f"{gpu.PARTS}.01").unlink()
    with pytest.raises(SystemExit, match="parts of the weights are missing or damaged; copy them again"):
        gpu.expand(machine)
    other = shutil.copytree(sent[0], tmp_path / "other")
    save_file({k: v + 1 for k, v in load_file(other / gpu.WEIGHTS).items()}, other / gpu.WEIGHTS, {"format": "pt"})
    with pytest.raises(SystemExit, match="expand to other bytes than those of the checkpoint"):
        gpu.write_parts(tmp_path / "parts", other, sent[0].parent / "model.gguf", [])


def test_an_archive_that_is_full_lacks_the_oldest_adapters(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ARCHIVE", 2**18 + 2500)
    results = tmp_path / "results"
    for name in ("run/a/adapter/weights", "run/b/adapter/weights", "run/b/state", "run/.lock"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_bytes(torch.randint(256, (1000,), dtype=torch.uint8).numpy().tobytes())
    assert gpu.pack(results, tmp_path / "results.zip") == [results / "run/a/adapter/weights"]
    with ZipFile(tmp_path / "results.zip") as archive:
        assert archive.namelist() == ["run/b/state", "run/b/adapter/weights"]


class Gone(Exception):
    """The machine was taken away."""


@pytest.mark.slow
def test_a_plan_on_two_machines_ends_with_the_bytes_of_an_undisturbed_run(monkeypatch, sent, small_data, tmp_path):
    """The first goes without warning, after an experiment is in the archive. The next one has nothing else."""
    machine, archive, log, pack = tmp_path / "machine", tmp_path / "results.zip", tmp_path / "log", gpu.pack
    words = ["--data", small_data, "--sequences", 2, "--samples", 9]
    monkeypatch.setattr(gpu, "PLAN", ("-m", "tests.small_plan"))
    monkeypatch.setattr(gpu, "PACK_SECONDS", 0.3)

    def pack_and_go(results, archive):
        left_out = [] if (machine / "gone").exists() else pack(results, archive)
        if (results / "run/experiments/trial/metrics.json").exists():
            (machine / "gone").touch()
            raise Gone
        return left_out

    for way, end in ((pack_and_go, pytest.raises(Gone)), (pack, nullcontext())):
        shutil.rmtree(machine, ignore_errors=True)
        shutil.copytree(sent[1], machine)
        monkeypatch.setattr(gpu, "pack", way)
        with end:
            assert gpu.run(machine, archive, 60, "cpu", ["tests", "benchmark"], words) == 0
        with ZipFile(archive) as packed:
            assert ("run/experiments/final/metrics.json" in packed.namelist()) == (way is pack)
    ZipFile(archive).extractall(tmp_path / "results")
    words += ["--model", machine, "--out", tmp_path / "undisturbed"]
    assert forks.run(log, small_plan.main, *words) == 0, log.read_text()
    found, wanted = (faults.contents(tmp_path / run, *faults.FINAL) for run in ("results/run", "undisturbed"))
    differing = {name for name in found | wanted if found.get(name) != wanted.get(name)}
    assert differing == {"plan.json"}  # it has the command
