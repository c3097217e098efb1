"""The installed command `qwen-min`, its verbs and what a package of this project holds."""

import re
import sys
import tomllib
from unittest.mock import Mock

import pytest
import torch

from experiments import __main__ as entry
from experiments import cli
from test_imports import IMPORTED, OURS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("verb", entry.VERBS)
def test_every_verb_explains_itself_under_its_own_name(command, capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        command(verb, "--help")
    assert capsys.readouterr().out.startswith(f"usage: qwen-min {verb} ")


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["fly"], 2)])
def test_without_a_known_verb_all_verbs_are_listed(command, arguments, status):
    found, *printed = command(*arguments)
    assert found == status
    assert all(f"  {verb} " in printed[bool(status)] for verb in entry.VERBS)


def test_a_missing_package_is_told_with_what_installs_it(monkeypatch, refused):
    error = ModuleNotFoundError("No module named 'h5py'", name="h5py")
    monkeypatch.setattr(entry, "import_module", Mock(side_effect=error))
    assert "pip install 'qwen-min[experiments]'" in refused("run")


def declared(*extras: str) -> set[str]:
    """The packages that the project needs, or that some of its extras need, by the names that one imports."""
    lines = [line for extra in extras for line in PROJECT["project"]["optional-dependencies"][extra]]
    lines = lines or PROJECT["project"]["dependencies"]
    return {re.split("[>=[]", line)[0].replace("-", "_") for line in lines}


def test_the_project_declares_every_package_that_it_imports():
    names = declared() | declared("experiments")
    found = {one.partition(".")[0] for imported in IMPORTED.values() for one in imported}
    # imported only where the user has them, or to compare with; these come with openvino_genai, jinja2, statsforecast,
    # matplotlib
    optional = declared("peers") | {"openvino", "markupsafe", "threadpoolctl", "PIL"} | set(entry.EXTRAS["series"])
    through_pandas = {"pyarrow"}  # it reads Parquet
    assert found - {*OURS} - optional - set(sys.stdlib_module_names) == names - through_pandas
    assert all({*entry.EXTRAS[extra]} <= names | declared(extra) for extra in ("experiments", "series"))


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_default_type_is_one_that_the_processor_multiplies(monkeypatch, recwarn, has_bf16, chosen):
    monkeypatch.setattr("qwen_min.linear.multiplies_bfloat16", lambda device: has_bf16)
    assert cli.chosen_dtype(None, "cpu") == chosen
    assert cli.chosen_dtype("float32", "cpu") == torch.float32
    assert not recwarn
    assert cli.chosen_dtype("bfloat16", "cpu") == torch.bfloat16
    assert ["--dtype float32" in str(one.message) for one in recwarn] == ([] if has_bf16 else [True])
