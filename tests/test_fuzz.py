"""Malformed files: a reader returns a valid result or raises an error that it documents.

It raises no other error, and it takes little more memory than the size of the file. Each reader gets a good file with
changed bytes and, if the file is JSON, with replaced values. For a long search:
`FUZZ_EXAMPLES=20000 python -m pytest tests/test_fuzz.py`.
"""

import copy
import gzip
import json
import os
import resource
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from conftest import GROUPED, adapted, random_model
from experiments.forecasting.adapter import read_trained
from experiments.forecasting.encoding import Encoding
from experiments.report import build as report
from experiments.storage.files import RunError, read_json, to_json
from experiments.storage.runfolder import open_run
from experiments.study import data
from experiments.study.evaluation import Evaluation, evaluate
from experiments.tables import following, read_series
from experiments.training.loop import load_state
from experiments.training.settings import TrainingError
from flops import Ledger, LedgerError
from lora import AdapterError, LoraConfig, adapter_parameters, load_adapter, save_adapter
from qwen_min import Qwen, Tokenizer
from qwen_min.config import CheckpointError
from qwen_min.weights import TINY, load, load_weights, weight_files
from tests import small_plan
from tests.faults import contents

pytestmark = pytest.mark.slow
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 40))
MEMORY = 2 * 2**30  # bytes, in addition to those that the process has already
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[*HealthCheck],
    derandomize="FUZZ_EXAMPLES" not in os.environ,  # the test suite tries the same examples each time
)
DEEP = json.loads("[" * 900 + "]" * 900)
CHOSEN = [None, True, False, 0, -1, 1, 2, 3, 10**30, 2**31, 2**63, 1e308, 0.5, float("nan"), float("inf"), "", "x",
          "nan", "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", [], {}, {"": None}, [[]], DEEP]  # fmt: skip
VALUES = st.one_of(st.sampled_from(CHOSEN), st.integers(), st.floats(), st.text(max_size=8))


@pytest.fixture(autouse=True, scope="module")
def little_memory(finished):
    """Limit the memory: a reader that believes a header's claim of terabytes fails with MemoryError.

    The run that is read was made before, without the limit.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def changed_bytes(draw, good: bytes) -> bytes:
    """A good file with some bytes overwritten, inserted or removed, or with its end cut off; rarely random bytes."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        # headers are at the beginning, and they are changed more often
        at = draw(st.integers(0, min(len(content), 256) if draw(st.booleans()) else len(content)))
        piece = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"9" * 12])))
        kind = draw(st.sampled_from(["over", "over", "in", "out", "cut"]))
        end = {"over": at + len(piece), "in": at, "out": at + len(piece), "cut": len(content)}[kind]
        content[at:end] = piece if kind in ("over", "in") else b""
    return bytes(content)


def _paths(value, path=()) -> list[tuple]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [path, *(found for key, inner in pairs if len(path) < 7 for found in _paths(inner, (*path, key)))]


@st.composite
def changed_json(draw, good) -> bytes:
    """A good document with some values replaced or removed, or with changed bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(json.dumps(good).encode()))
    whole = [copy.deepcopy(good)]
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(_paths(whole)[1:]))
        owner = whole
        for key in above:
            owner = owner[key]
        if draw(st.booleans()) or owner is whole:
            owner[last] = copy.deepcopy(draw(VALUES))
        else:
            del owner[last]
    return json.dumps(whole[0]).encode()


WEIGHTS = {name: t.clone() for name, t in random_model(GROUPED).state_dict().items()}


def read_weights(path):
    with torch.device("meta"):
        model = Qwen(GROUPED)
    try:
        load_weights(model, path.parent)
        assert not model.head_weight.is_meta
    except CheckpointError:
        assert model.head_weight.is_meta  # unchanged


def read_checkpoint(path):
    """A config with arbitrary sizes is refused before any memory is taken for them."""
    for name in ("model.safetensors", "tokenizer.json"):
        (path.parent / name).symlink_to(TINY / name)
    model, _ = load(path.parent)
    model(torch.tensor([[1]]))


def read_index(path):
    (path.parent / "model-00001-of-00001.safetensors").touch()
    assert all(found.parent == path.parent for found in weight_files(path.parent))


def read_record(path):
    trained = read_trained(path.parent)
    if trained.encoding.scale is not None:
        assert (trained.encoding.scaled(np.ones((3, np.size(trained.encoding.scale)))) < np.inf).all()


def read_adapter(path):
    for name in ADAPTER.keys() - {path.name}:
        (path.parent / name).write_bytes(ADAPTER[name])
    model = random_model(GROUPED)
    try:
        load_adapter(model, path.parent)
    except AdapterError:
        with pytest.raises(ValueError, match="no LoRA layer"):
            adapter_parameters(model)


def read_plan(path):
    with open_run(path.parent, PLAN["identity"], {}) as continued:
        assert continued


def read_ledger(path):
    ledger = Ledger(path, budget=100)
    assert ledger.spent == sum(ledger.by_experiment().values()) >= 0


def read_state(path):
    tensors = {name: tensor.clone() for name, tensor in STATE.items()}
    try:
        load_state(path, tensors)
        assert tensors["losses"].isfinite().all()
    except TrainingError:
        assert all(torch.equal(tensors[name], value) for name, value in STATE.items())


def read_evaluation(path):
    assume(read_json(path) != [])  # an empty state is valid, and the evaluation would use the model
    assert evaluate(None, None, Encoding(1.0), np.ones((2, 80, 2)), 70, 10, state=path).values.shape == (2, 10, 2)


def read_trajectories(path):
    found = data.read(path)
    assert ((found >= 0) & (found < np.inf)).all()


def read_table(path):
    for missing in ("error", "interpolate"):
        with suppress(data.DataError):
            for one in read_series(path, missing=missing):
                assert np.isfinite(one.to_numpy()).all()
                assert len(one) == 1 or len(following(one.index, 3)) == 3


STATE = {"lora_A": torch.ones(2, 3), "losses": torch.ones(2), "done": torch.tensor(1)}
ONES = np.ones((8, 100, 2), np.float32)
with TemporaryDirectory() as made:
    save_adapter(adapted(random_model(GROUPED), LoraConfig(rank=2, alpha=2)), made)
    ADAPTER = contents(Path(made), "*")
    data.write(Path(made) / "a.h5", ONES)
    HDF5 = (Path(made) / "a.h5").read_bytes()
DATED = b"date;load\n" + b"".join(b"%02d.01.2023;1.23%d,5\n" % (day, day % 10) for day in range(1, 32))
INDEX = {"metadata": {}, "weight_map": dict.fromkeys(WEIGHTS, "model-00001-of-00001.safetensors")}
PLAN = {"identity": {"plan": "quick", "experiments": [{"name": "untrained"}], "seed": 0}, "model": "tiny"}
RECORD = {
    "scale": [0.5, 2.0], "decimals": 2, "offset": [-1.0, 0.0], "checkpoint": "tiny", "checkpoint_sha256": "0" * 64,
    "variables": ["a", "b"], "tokens": 768,
}  # fmt: skip
TOKENIZER = (TINY / "tokenizer.json").read_bytes()
DEBITS = b"".join(b'{"experiment": "a", "step": %d, "flops": 10}\n' % i for i in range(9)) + (
    b'{"experiment": "b", "step": 0, "flops": 1, "steps": 9}\n'
)
EVALUATION = Evaluation(["1.00"] * 2, np.ones((2, 10, 2)), np.ones((2, 7)), np.ones((2, 7)), np.ones(2))
READERS = {  # by name of the file: changed contents, who reads it, what he may raise
    "config.json": (changed_json(json.loads((TINY / "config.json").read_text())), read_checkpoint, CheckpointError),
    "model.safetensors.index.json": (changed_json(INDEX), read_index, CheckpointError),
    "tokenizer.json": (
        st.one_of(changed_bytes(TOKENIZER), changed_json(json.loads(TOKENIZER))), Tokenizer, CheckpointError
    ),
    "adapter_config.json": (changed_json(json.loads(ADAPTER["adapter_config.json"])), read_adapter, ()),
    "adapter_model.safetensors": (changed_bytes(ADAPTER["adapter_model.safetensors"]), read_adapter, ()),
    "encoding.json": (changed_json(RECORD), read_record, AdapterError),
    "plan.json": (changed_json(PLAN), read_plan, RunError),
    "ledger.jsonl": (changed_bytes(DEBITS), read_ledger, LedgerError),
    "part.state.json": (changed_json(json.loads(to_json([EVALUATION]))), read_evaluation, RunError),
    "model.safetensors": (changed_bytes(save(WEIGHTS)), read_weights, ()),
    "state.safetensors": (changed_bytes(save(STATE)), read_state, ()),
    "a.h5": (changed_bytes(HDF5[:4096]).map(lambda head: head + HDF5[4096:]), read_trajectories, data.DataError),
    "series.h5": (changed_bytes(HDF5), read_table, ()),
    "dated.csv": (st.one_of(changed_bytes(DATED), changed_bytes(DATED[:60])), read_table, ()),
    "dated.csv.gz": (changed_bytes(gzip.compress(DATED)), read_table, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@fuzz
@given(source=st.data())
def test_a_file(name, source, tmp_path_factory):
    contents, read, error = READERS[name]
    path, content = tmp_path_factory.mktemp("fuzzed") / name, source.draw(contents)
    path.write_bytes(content)
    with suppress(error):
        read(path)
    assert path.read_bytes() == content


def test_hdf5_that_claims_terabytes_or_points_elsewhere(tmp_path):
    good = tmp_path / "good.h5"
    good.write_bytes(HDF5)
    (tmp_path / "raw").write_bytes(ONES.tobytes())
    raw, layout = [(tmp_path / "raw", 0, ONES.nbytes)], h5py.VirtualLayout(ONES.shape, ONES.dtype)
    layout[:] = h5py.VirtualSource(good, "trajectories", ONES.shape)
    cases = {
        "claims": lambda f: f.create_dataset("trajectories", (2**17, 100, 2), np.float64, chunks=(1, 100, 2)),
        "soft link": lambda f: f.__setitem__("trajectories", h5py.ExternalLink(good, "trajectories")),
        "raw bytes": lambda f: f.create_dataset("trajectories", ONES.shape, ONES.dtype, external=raw),
        "virtual": lambda f: f.create_virtual_dataset("trajectories", layout),
    }
    for name, make in cases.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            make(file)
        with pytest.raises(data.DataError, match=r"at most|in the file itself"):
            data.read(tmp_path / f"{name}.h5")


@fuzz
@given(source=st.data())
def test_run_folder(source, finished, tmp_path_factory):
    """Change any file from which a report is drawn."""
    drawn_from = shutil.ignore_patterns("adapter", "figures", "report.*", ".lock")
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("results") / "run", ignore=drawn_from)
    path = source.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    good = path.read_bytes()
    path.write_bytes(source.draw(changed_json(json.loads(good)) if path.suffix == ".json" else changed_bytes(good)))
    with pytest.MonkeyPatch.context() as patch:
        small_plan.install(put=patch.setattr)
        with suppress(RunError):
            report.write_comparison(folder.parent)
        with suppress(RunError):
            report.write_report(folder)
