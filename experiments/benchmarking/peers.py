"""The programs to compare with, by name."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from experiments.benchmarking.side import OURS, BenchmarkError, Side


class Peer(NamedTuple):
    """A program, and what it takes to measure it."""

    packages: tuple[str, ...]
    extra: str  # of this project, which installs the packages
    sides: dict[str, str]  # by the name in the table: module and class
    cpu_only: bool = False


HERE = "experiments.benchmarking"
PEERS = {
    "transformers": Peer(("transformers", "peft"), "peers", {"transformers": f"{HERE}.transformers:Transformers"}),
    "llama.cpp": Peer(
        ("xllamacpp", "gguf"),
        "peers",
        {"llama.cpp bf16": f"{HERE}.llama_cpp:LlamaCppBF16", "llama.cpp Q8_0": f"{HERE}.llama_cpp:LlamaCppQ8"},
        cpu_only=True,
    ),
    "openvino": Peer(
        ("openvino_genai", "gguf"),
        "peers",
        {"OpenVINO fp16": f"{HERE}.openvino:OpenVINOF16", "OpenVINO Q8_0": f"{HERE}.openvino:OpenVINOQ8"},
        cpu_only=True,
    ),
    "litgpt": Peer(("litgpt",), "litgpt", {"litgpt": f"{HERE}.litgpt:LitGPT"}),
}


def chosen(names: str, device: str) -> dict[str, type[Side]]:
    """The sides of this project and of peers, by their names in the table.

    names: "none", "all" (those that are installed and run on the device), or names separated by commas. Raises
    BenchmarkError for a name that is none, and for a peer that was named but cannot be measured here.
    """
    wanted = {"none": [], "all": list(PEERS)}.get(names, names.split(","))
    if strange := [name for name in wanted if name not in PEERS]:
        raise BenchmarkError(f"--peers names {strange[0]!r}, expected all, none, or some of {','.join(PEERS)}")
    sides = {OURS: _load(f"{HERE}.ours:Ours")}
    for name in wanted:
        if reason := _hindrance(name, device):
            if names != "all":
                raise BenchmarkError(reason)
            print(f"left out: {reason}", file=sys.stderr)
        else:
            sides |= {label: _load(place) for label, place in PEERS[name].sides.items()}
    return sides


def _hindrance(name: str, device: str) -> str:
    """Why a peer cannot be measured here; empty if it can."""
    peer = PEERS[name]
    if missing := [package for package in peer.packages if find_spec(package) is None]:
        return f'{name} needs the package {missing[0]}; install it: pip install "qwen-min[{peer.extra}]"'
    if peer.cpu_only and device != "cpu":
        return f"{name} is measured on the CPU only, got --device {device}; leave it out of --peers"
    return ""


def _load(place: str) -> type[Side]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
