"""Run a plan on a GPU that is rented by the minute, on machines without a network.

    python -m scripts.gpu parts FOLDER --checkpoint CHECKPOINT --gguf FILE
    python -m scripts.gpu run FOLDER RESULTS.zip --minutes 9 --plan study --dtype bfloat16

`parts` writes what a machine needs besides this repository into files of at most 48 MiB: the checkpoint, as the
quantized tensors of the GGUF file that it was made of, and wheels of packages that the machine may lack. Copy the
repository and FOLDER there, in as many transfers as it takes, and RESULTS.zip if an earlier machine left one.

`run` expands the checkpoint to the bytes that it had, and does what RESULTS.zip does not have yet: the CUDA tests, a
benchmark next to transformers and peft, if it has them, and the plan; other arguments are those of experiments.run.
After --minutes it stops. RESULTS.zip, of at most 16 MiB, is written anew every minute and at the end, so that nothing
more is lost when the machine goes. Start it again, there or elsewhere, until its exit status, which is that of the
plan, is 0.
"""

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM, signal
from zipfile import ZIP_DEFLATED, ZipFile

from experiments.storage.files import make_folder, write_whole

ROOT = Path(__file__).parents[1]
PART, ARCHIVE = 48 * 2**20, 16 * 2**20  # bytes: the most of a file that is sent, and of what is brought back
WEIGHTS, PARTS, SUMS = "model.safetensors", "weights.npz", "sha256.json"
PLATFORMS = [f"--platform=manylinux{year}_x86_64" for year in ("2014", "_2_27", "_2_28")]
PLAN = ("-m", "experiments.run")
PACK_SECONDS, STOP_SECONDS = 60, 20  # between two archives; for a command that is told to stop
MOST_SECONDS = {"tests": 240, "benchmark": 180}


def write_parts(folder: Path, checkpoint: Path, gguf_file: Path, wheels: list[str]) -> None:
    """Write the parts of a checkpoint, and wheels for Python 3.12 on x86-64, into a new folder."""
    import gguf
    import numpy as np

    from qwen_min import QwenConfig
    from qwen_min.weights import tensor_headers

    folder.mkdir(parents=True)
    config = QwenConfig.from_file(checkpoint / "config.json")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers).mapping
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    if config.tie_word_embeddings and "output.weight" in tensors:
        tensors["token_embd.weight"] = tensors["output.weight"]  # the same matrix, with more bits
    stored = {}
    for name in tensor_headers(checkpoint):
        stem, _, kind = name.rpartition(".")
        tensor = tensors[f"{names[stem][1]}.{kind}"]
        stored[f"{name} {tensor.tensor_type.value}"] = tensor.data
    np.savez(buffer := BytesIO(), **stored)
    content = buffer.getvalue()
    for number, start in enumerate(range(0, len(content), PART)):
        (folder / f"{PARTS}.{number:02}").write_bytes(content[start : start + PART])
    for path in checkpoint.glob("*.json"):
        shutil.copy(path, folder)
    with (checkpoint / WEIGHTS).open("rb") as file:
        expanded = hashlib.file_digest(file, "sha256").hexdigest()
    sums = {"parts": hashlib.sha256(content).hexdigest(), "expanded": expanded}
    (folder / SUMS).write_text(json.dumps(sums))
    expand(folder)
    (folder / WEIGHTS).unlink()
    if wheels:
        options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", *PLATFORMS, "-d", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, *wheels], check=True)
    if large := [path.name for path in folder.iterdir() if path.stat().st_size > PART]:
        sys.exit(f"{folder}: {', '.join(large)} have more than {PART} bytes")


def expand(folder: Path) -> None:
    """Write the weights from their parts, unless they are there. Exits if these are other bytes than those sent."""
    import gguf
    import numpy as np
    import torch
    from safetensors.torch import save

    if (folder / WEIGHTS).exists():
        return
    sums = json.loads((folder / SUMS).read_text())
    content = b"".join(path.read_bytes() for path in sorted(folder.glob(f"{PARTS}.*")))
    if hashlib.sha256(content).hexdigest() != sums["parts"]:
        sys.exit(f"{folder}: parts of the weights are missing or damaged; copy them again")
    tensors = {}
    with np.load(BytesIO(content)) as stored:
        for key, data in stored.items():
            name, kind = key.split()
            values = gguf.dequantize(data, gguf.GGMLQuantizationType(int(kind)))
            tensors[name] = torch.from_numpy(values).to(torch.bfloat16)
    content = save(tensors, {"format": "pt"})
    if hashlib.sha256(content).hexdigest() != sums["expanded"]:
        sys.exit(f"{folder}: the parts expand to other bytes than those of the checkpoint")
    write_whole(folder / WEIGHTS, content)


def run(folder: Path, archive: Path, minutes: float, device: str, leave_out: list[str], words: list[str]) -> int:
    """Do what there is time for; the exit status of the plan, or that of a stopped one."""
    deadline = time.monotonic() + 60 * minutes
    for wheel in folder.glob("*.whl"):
        ZipFile(wheel).extractall(folder / "site")  # all that is to do for wheels without scripts
    sys.path.insert(0, str(folder / "site"))
    expand(folder)
    results = folder / "results"
    if not results.exists() and archive.exists():
        shutil.rmtree(partial := folder / "results.partial", ignore_errors=True)
        ZipFile(archive).extractall(partial)
        partial.rename(results)
    make_folder(results)
    commands = {
        "tests": ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"),
        "benchmark": ("-m", "experiments.benchmark", "--short", "--runs", 3, "--model", folder, "--device", device),
        "plan": (*PLAN, "--model", folder, "--device", device, "--out", results / "run", *words),
    }
    status = 128 + SIGTERM
    try:
        for name, command in commands.items():
            log, started = results / f"{name}.txt", time.monotonic()
            left = deadline - started
            if left > 0 and name not in leave_out and (name == "plan" or not log.exists()):
                seconds = min(left, MOST_SECONDS.get(name, left))
                status = work(command, log, seconds, folder / "site", lambda: pack(results, archive))
                print(f"{name}: exit status {status}, {time.monotonic() - started:.0f} s", flush=True)
    finally:
        for path in pack(results, archive):
            print(f"{archive} has no room for {path}")
    return status


def work(command: tuple, log: Path, seconds: float, site: Path, pack) -> int:
    """The exit status of a Python command, which is told to stop after so many seconds; `log` gets what it prints."""
    end, partial, words = time.monotonic() + seconds, log.with_suffix(".partial"), [sys.executable, *map(str, command)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    options: dict = {"stderr": subprocess.STDOUT, "cwd": ROOT, "env": env}
    options["preexec_fn"] = lambda: ctypes.CDLL(None).prctl(1, SIGKILL)  # it ends when this process does
    with partial.open("wb") as out, subprocess.Popen(words, stdout=out, **options) as process:
        try:
            while process.poll() is None and (left := end - time.monotonic()) > 0:
                try:
                    process.wait(min(left, PACK_SECONDS))
                except subprocess.TimeoutExpired:
                    process.send_signal(SIGSTOP)  # files stay as they are
                    pack()
                    process.send_signal(SIGCONT)
        finally:
            process.terminate()
            process.send_signal(SIGCONT)  # if `pack` has failed
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    partial.replace(log)
    return process.returncode


def pack(results: Path, archive: Path) -> list[Path]:
    """Write the results into the archive; the files that have no room in it.

    Adapters come last, the oldest after all others: the rest of a plan does not read them.
    """
    files = [path for path in results.rglob("*") if path.is_file() and not path.name.startswith(".")]
    left_out = []
    with ZipFile(buffer := BytesIO(), "w", ZIP_DEFLATED) as packed:
        for path in sorted(files, key=lambda path: ("adapter" in path.parent.name, -path.stat().st_mtime)):
            if buffer.tell() + path.stat().st_size < ARCHIVE - 2**18:  # the list of names takes some, too
                packed.write(path, path.relative_to(results))
            else:
                left_out.append(path)
    write_whole(archive, buffer.getvalue())
    return left_out


def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu", description=__doc__, formatter_class=form)
    verbs = parser.add_subparsers(dest="verb", required=True)
    parts = verbs.add_parser("parts", help="write what to send into a new folder")
    parts.add_argument("folder", type=Path)
    parts.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint, in bfloat16")
    parts.add_argument("--gguf", type=Path, required=True, help="the file that it was made of")
    parts.add_argument("--wheels", nargs="*", default=["h5py", "gguf"], help="packages to send (default h5py gguf)")
    there = verbs.add_parser("run", help="do what there is time for; further arguments are those of experiments.run")
    there.add_argument("folder", type=Path, help="what `parts` wrote")
    there.add_argument("archive", type=Path, help="zip file that the results come from and go to")
    there.add_argument("--minutes", type=float, default=9, help="when to stop (default %(default)s)")
    there.add_argument("--device", default="cuda", help="torch device (default %(default)s)")
    there.add_argument("--leave-out", nargs="*", default=[], choices=MOST_SECONDS, help="what to leave out")
    args, words = parser.parse_known_args(argv)
    if args.verb == "parts":
        if words:
            parser.error(f"unrecognized arguments: {' '.join(words)}")
        write_parts(args.folder, args.checkpoint, args.gguf, args.wheels)
        return 0
    signal(SIGTERM, lambda number, _: sys.exit(128 + number))
    return run(args.folder.resolve(), args.archive.resolve(), args.minutes, args.device, args.leave_out, words)


if __name__ == "__main__":
    sys.exit(main())
