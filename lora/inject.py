"""Add LoRA layers to a model, merge them and remove them. Only the model's `torch.nn.Linear` modules are used."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from lora.layer import LoRALinear


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter.

    rank r; alpha: the update is scaled by alpha / r; targets: the modules to adapt, by their names or the last parts of
    them, as in peft. Raises ValueError when rank is not a positive integer, alpha is not a positive number, or targets
    is not a sequence of names.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank!r}, expected a positive integer")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < 1e30:
            raise ValueError(f"LoRA alpha is {self.alpha!r}, expected a positive number")
        names = tuple(self.targets) if isinstance(self.targets, list | tuple | set) else ()
        if not (names and all(isinstance(name, str) for name in names)):
            raise ValueError(f"LoRA targets are {self.targets!r}, expected names such as ('q_proj', 'v_proj')")
        object.__setattr__(self, "targets", tuple(sorted(set(names))))  # equal settings are equal, and have a hash


def inject(model: nn.Module, config: LoraConfig) -> list[str]:
    """Freeze the model, replace each Linear that is a target by a LoRALinear, and return the names of these modules.

    The adapter's weights are drawn from torch's global generator. Raises ValueError as `new_layers`.
    """
    layers = new_layers(model, config)
    put_in(model, layers)
    return list(layers)


def new_layers(model: nn.Module, config: LoraConfig) -> dict[str, LoRALinear]:
    """A LoRALinear for each Linear of a model that is a target, by its name; the model stays as it is.

    Raises ValueError when a target matches no Linear, or one whose weight is not a parameter of it alone: merging
    would lose the update, or change another layer.
    """
    linears = _plain_linears(model)
    adapted = [name for name in linears if f".{name}".endswith(tuple(f".{target}" for target in config.targets))]
    if unmatched := sorted(t for t in config.targets if not any(f".{name}".endswith(f".{t}") for name in adapted)):
        present = ", ".join(sorted(set(map(_last_part, linears)))) or "none"
        raise ValueError(f"no Linear is called {', '.join(unmatched)}: nothing to adapt; the model's are {present}")
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    owners = Counter(id(parameter) for module in modules for parameter in module.parameters(recurse=False))
    for name in adapted:
        if owners[id(linears[name]._parameters.get("weight"))] != 1:
            raise ValueError(f"the weight of {name} is shared or computed from others, so it cannot be adapted")
    return {name: LoRALinear(linears[name], config.rank, config.alpha) for name in adapted}


def _plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of a model by name, without those inside a LoRALinear; one that has two names is there twice."""
    inside = {part for layer in model.modules() if isinstance(layer, LoRALinear) for part in layer.modules()}
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, nn.Linear) and module not in inside}


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def put_in(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    """Put the layers of `new_layers` in, and freeze all other parameters but those of earlier adapters."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    adapters = set(adapter_parameters(model).values())
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by module name. Raises ValueError when it has none, as what follows does."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA layer; call inject first")
    return layers


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's tensors by name, as `tensors_of`."""
    return tensors_of(lora_layers(model))


def tensors_of(layers: dict[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """By name, layer by layer: `<module>.lora_A.weight` (r, I), `<module>.lora_B.weight` (O, r)."""
    return {
        f"{name}.{part}.weight": getattr(layer, part).weight
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }


def config_of(model: nn.Module) -> LoraConfig:
    """The settings that all LoRA layers of a model share. Raises ValueError when their ranks or alphas differ."""
    layers = lora_layers(model)
    settings = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(f"the LoRA layers have several (rank, alpha): {sorted(settings)}; expected the same in all")
    others = set(map(_last_part, _plain_linears(model)))  # adapted in some layers only, they need their full names
    names = {name if _last_part(name) in others else _last_part(name) for name in layers}
    return LoraConfig(*settings.pop(), tuple(names))


def merge_and_unload(model: nn.Module) -> None:
    """Add the adapter to the weights: the model is an ordinary one then, and costs the same as before `inject`.

    Raises AdapterError as `LoRALinear.merged_weight`, and changes nothing then.
    """
    layers = lora_layers(model)
    merged = {name: layer.merged_weight() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.base_layer.weight.data = merged[name]
        model.set_submodule(name, layer.base_layer)


def remove(model: nn.Module) -> None:
    """Remove the LoRA layers; the base weights stay frozen."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base_layer)
