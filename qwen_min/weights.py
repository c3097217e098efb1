"""Load a checkpoint, strictly, and save one. What is missing, damaged or not supported raises CheckpointError."""

import functools
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwen_min.config import CheckpointError, QwenConfig, read_json
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer

TINY = Path(__file__).parent / "tiny"
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
COMPANIONS = (  # the files of a checkpoint besides its weights and its config.json
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "special_tokens_map.json",
)  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def checkpoint_folder(source: str | Path, files: tuple[str, ...] = ("*.safetensors", "*.json", "*.jinja")) -> Path:
    """The folder of a checkpoint. source: a folder, "tiny" (the embedded checkpoint), or a hub id.

    The `files` of a hub id are downloaded once into the hub's cache (HF_HUB_OFFLINE is honoured);
    "owner/name@revision" pins a commit, tag or branch. An existing folder always wins, even if its name is tiny.
    """
    if Path(source).is_dir():
        return Path(source)
    if str(source) == "tiny":
        return TINY
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))
    if not hub_id:
        raise CheckpointError(f"{source}: no such folder, expected a folder, a hub id 'owner/name[@revision]' or tiny")
    from huggingface_hub import snapshot_download  # a slow import that only hub ids need

    try:
        return Path(snapshot_download(hub_id[1], revision=hub_id[2], allow_patterns=list(files)))
    except Exception as error:  # the hub's library also raises every error of its HTTP library
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{source}: no such folder, and the download from the hub failed ({reason})") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder.

    They are model.safetensors, which wins over the index of an earlier save as in transformers, or those that the index
    lists, or without an index all shards.
    """
    index, names = folder / "model.safetensors.index.json", {"model.safetensors"}
    if not (folder / "model.safetensors").exists():
        names = {path.name for path in folder.glob("model-*-of-*.safetensors")} or names
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            listed: list = [*weight_map.values()] if isinstance(weight_map, dict) else [weight_map]
            if strange := [name for name in listed if not isinstance(name, str) or Path(name).name != name]:
                raise CheckpointError(f"{index}: weight_map has {strange[0]!r}, expected files in the same folder")
            names = set(listed)
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        if (folder / "adapter_config.json").exists():
            there = "an adapter, which needs its checkpoint"
        raise CheckpointError(f"{folder}: missing {', '.join(missing)}; the folder holds {there}")
    return [folder / name for name in sorted(names)]


def end_ids(folder: Path) -> list[int] | None:
    """The tokens that end a text: `eos_token_id` of generation_config.json, else of config.json; None if in neither."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path).get("eos_token_id") if path.exists() else None
        ids: list = found if isinstance(found, list) else [found]
        if found is not None:
            if not all(type(i) is int for i in ids):
                raise CheckpointError(f"{path}: eos_token_id is {found!r}, expected token ids")
            return ids
    return None


def tensor_problems(expected: dict[str, torch.Size], got: dict[str, list[int]]) -> list[str]:
    """One line for each tensor that is missing, unexpected or of the wrong shape. The arguments map names to shapes."""
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in got]
    for name, shape in got.items():
        if name not in expected:
            problems.append(f"unexpected {name} {shape}")
        elif list(expected[name]) != shape:
            problems.append(f"{name} has shape {shape}, expected {list(expected[name])}")
    return problems


def tensor_headers(folder: Path) -> dict[str, tuple[Path, str, list[int]]]:
    """(file, dtype, shape) of every tensor of a checkpoint folder, by name, from the headers of the files."""
    headers = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    if name in headers:
                        raise CheckpointError(f"{folder}: {name} appears in two files, expected it in one")
                    header = file.get_slice(name)
                    headers[name] = path, header.get_dtype(), list(header.get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    return headers


def load_weights(
    model: torch.nn.Module, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Replace the (meta) parameters of `model` by the tensors of a checkpoint folder.

    dtype None keeps the checkpoint's dtype, the widest if it has several. If the config ties the head to the embedding
    and the checkpoint stores a head nevertheless, it must equal the embedding. On CUDA, cuDNN's attention is turned off
    for the whole process. Raises CheckpointError, which lists every missing, unexpected or misshapen tensor, or names
    the damaged file or the tensor with NaN or infinity; the model is then unchanged.
    """
    expected = {name: parameter.shape for name, parameter in model.state_dict().items()}
    headers = tensor_headers(folder)
    tensors: dict[str, torch.Tensor] = {}
    tied = HEAD not in expected and {HEAD, EMBEDDING} <= headers.keys() and headers[HEAD][1:] == headers[EMBEDDING][1:]
    if tied:
        expected[HEAD] = expected[EMBEDDING]
    problems = tensor_problems(expected, {name: shape for name, (_, _, shape) in headers.items()})
    others = {name: kind for name, (_, kind, _) in headers.items() if kind not in FLOAT_DTYPES}
    problems += [f"{name} has dtype {kind}, expected one of {', '.join(FLOAT_DTYPES)}" for name, kind in others.items()]
    if problems:
        raise CheckpointError(f"{folder}: does not match its config.json:\n  " + "\n  ".join(problems))
    dtype = dtype or functools.reduce(torch.promote_types, {FLOAT_DTYPES[kind] for _, kind, _ in headers.values()})
    for name, (path, _, _) in headers.items():
        try:
            # the file is mapped into memory, and all that was read of it counts until it is closed
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensor = file.get_tensor(name)
                tensors[name] = tensor.to(dtype, copy=tensor.device.type == "cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
        if not torch.stack(tensors[name].aminmax()).isfinite().all():
            raise CheckpointError(f"{path}: {name} has NaN or infinity in {tensors[name].dtype}")
    if tied and not torch.equal(tensors.pop(HEAD), tensors[EMBEDDING]):
        raise CheckpointError(f"{folder}: config.json ties the head, but {HEAD} differs from {EMBEDDING}")
    model.load_state_dict(tensors, strict=True, assign=True)
    if torch.device(device).type == "cuda":
        # On recent GPUs torch prefers cuDNN's attention for bf16. It takes up to half a second to plan each new shape,
        # raises an error where no plan fits instead of falling back to another kernel, and has produced wrong text and
        # NaN gradients (github.com/pytorch/pytorch/issues/193893 and 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)


def save(model: Qwen, folder: Path, source: Path) -> None:
    """Write a checkpoint that this project and transformers can load: the model's weights in their dtype.

    The config, the tokenizer and the chat template are those of the checkpoint folder `source`, from which the model
    came. The folder appears whole or not at all. Raises CheckpointError when it exists, or when the model's tensors or
    their dtype are not those of a checkpoint, as under an adapter, or its config is not that of `source`.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; name another folder")
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Qwen(model.config).state_dict().items()}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    problems = tensor_problems(expected, {name: list(tensor.shape) for name, tensor in tensors.items()})
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= {*FLOAT_DTYPES.values()}:
        problems.append(f"their dtypes are {dtypes}, expected one of {', '.join(FLOAT_DTYPES)} for all")
    if problems:
        raise CheckpointError("the model has other tensors than a checkpoint:\n  " + "\n  ".join(problems))
    config = read_json(source / "config.json")
    if QwenConfig.from_dict(config) != model.config:
        raise CheckpointError(
            f"{source}: its config.json is not the model's; name the checkpoint that the model came from"
        )
    config.pop("dtype", None)  # transformers 5 would prefer it
    config["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        partial = Path(temporary) / "checkpoint"
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in COMPANIONS:
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(folder)


def load(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[Qwen, Tokenizer]:
    """Load a checkpoint: (the model, frozen and in eval mode, its tokenizer).

    source: a folder, a hub id, or "tiny" for the embedded checkpoint, as in `checkpoint_folder`. dtype None keeps the
    checkpoint's dtype. Raises CheckpointError when any part of it is missing, damaged or not supported.
    """
    folder = checkpoint_folder(source)
    config = QwenConfig.from_file(folder / "config.json")
    tokenizer = Tokenizer(folder / "tokenizer.json", end_ids(folder))
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, more than vocab_size {config.vocab_size}"
        )
    names = tensor_headers(folder)
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    if len(layers) != config.num_hidden_layers:  # checked before that many layers are built
        found = f"{len(layers)} layers, with names such as {min(names, default='none')}"
        raise CheckpointError(f"{folder}: the files have {found}; config.json says {config.num_hidden_layers} layers")
    with torch.device("meta"):
        model = Qwen(config)
    load_weights(model, folder, device, dtype)
    return model.eval().requires_grad_(False), tokenizer
