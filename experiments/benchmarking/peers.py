"""The programs to compare with, by name."""

import sys
from importlib.util import find_spec

from experiments.benchmarking.engines import Engine, LlamaCpp, LlamaCppQ8, OpenVINO, OpenVINOQ8
from experiments.benchmarking.side import OURS, BenchmarkError, Side
from experiments.benchmarking.torch_sides import Ours, Transformers

PEERS: dict[str, dict[str, type[Side]]] = {  # the sides of each, by their names in the table
    "transformers": {"transformers": Transformers},
    "llama.cpp": {"llama.cpp bf16": LlamaCpp, "llama.cpp Q8_0": LlamaCppQ8},
    "openvino": {"OpenVINO fp16": OpenVINO, "OpenVINO Q8_0": OpenVINOQ8},
}


def chosen(names: str, device: str) -> dict[str, type[Side]]:
    """The sides of this project and of peers, by their names in the table.

    names: "none", "all" (those that are installed and run on the device), or names separated by commas. Raises
    BenchmarkError for a name that is none, and for a peer that was named but cannot be measured here.
    """
    wanted = {"none": [], "all": list(PEERS)}.get(names, names.split(","))
    if strange := [name for name in wanted if name not in PEERS]:
        raise BenchmarkError(f"--peers names {strange[0]!r}, expected all, none, or some of {','.join(PEERS)}")
    sides: dict[str, type[Side]] = {OURS: Ours}
    for name in wanted:
        if reason := _hindrance(name, device):
            if names != "all":
                raise BenchmarkError(reason)
            print(f"left out: {reason}", file=sys.stderr)
        else:
            sides |= PEERS[name]
    return sides


def _hindrance(name: str, device: str) -> str:
    """Why a peer cannot be measured here; empty if it can."""
    (first, *_) = PEERS[name].values()
    if missing := [package for package in first.packages if find_spec(package) is None]:
        return f'{name} needs the package {missing[0]}; install it: pip install "qwen-min[peers]"'
    if issubclass(first, Engine) and device != "cpu":
        return f"{name} is measured on the CPU only, got --device {device}; leave it out of --peers"
    return ""
