"""What trainings share beside the loop: adapters, their files, and the versions that decide a result."""

import hashlib
import platform
import shutil
from pathlib import Path

import torch
from torch import nn

import flops
import lora
import qwen_min
from experiments import forecasting, training
from experiments.forecasting.adapter import Trained, write_trained
from experiments.storage.files import sync
from experiments.training.settings import Training
from lora import inject, save_adapter


def inject_adapter(model: nn.Module, settings: Training) -> None:
    """Inject the adapter of the settings, if they have a rank, as their seed decides."""
    if settings.rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            inject(model, settings.lora)


def write_adapter(model: nn.Module, folder: Path, trained: Trained) -> None:
    """Write the model's adapter and its record into folder/adapter; a kill leaves that whole or absent."""
    partial = folder / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(model, partial, trained.checkpoint)
    write_trained(partial, trained)
    for file in (*partial.iterdir(), partial):
        sync(file)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    partial.rename(folder / "adapter")


def clear(folder: Path) -> None:
    for state in folder.glob("*state.*"):
        state.unlink()


def software() -> dict[str, str]:
    """The versions and a hash of the sources that decide a result, for the record of a run."""
    digest = hashlib.sha256()
    for package in (qwen_min, lora, flops, forecasting, training):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(path.read_bytes())
    return {"python": platform.python_version(), "torch": torch.__version__, "sources_sha256": digest.hexdigest()}
