"""Add LoRA layers to a model, merge them and remove them. Only the model's `torch.nn.Linear` modules are used."""

from dataclasses import dataclass

from torch import nn

from lora.layer import LoRALinear


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter.

    rank r; alpha: the update is scaled by alpha / r; targets: the modules to adapt, by the last part of their names.
    Raises ValueError when rank is not a positive integer, alpha is not a positive number, or targets is not a sequence
    of names.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank!r}, expected a positive integer")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < 1e30:
            raise ValueError(f"LoRA alpha is {self.alpha!r}, expected a positive number")
        names = () if isinstance(self.targets, str) else tuple(self.targets)
        if not (names and all(isinstance(name, str) for name in names)):
            raise ValueError(f"LoRA targets are {self.targets!r}, expected names such as ('q_proj', 'v_proj')")


def inject(model: nn.Module, config: LoraConfig) -> list[str]:
    """Freeze the model, replace each Linear that is a target by a LoRALinear, and return the names of these modules.

    The adapter's weights are drawn from torch's global generator. Raises ValueError, and changes nothing, when a target
    matches no Linear.
    """
    last_parts = {
        name: name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    }
    adapted = [name for name, last in last_parts.items() if last in config.targets]
    if unmatched := sorted(set(config.targets) - set(last_parts.values())):
        present = ", ".join(sorted(set(last_parts.values()) - {"base_layer"})) or "none"
        raise ValueError(f"no Linear is called {', '.join(unmatched)}: nothing to adapt; the model's are {present}")
    for parameter_name, parameter in model.named_parameters():
        if "lora_" not in parameter_name:
            parameter.requires_grad_(False)
    for name in adapted:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoRALinear(getattr(owner, child), config.rank, config.alpha))
    return adapted


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by module name. Raises ValueError when it has none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA layer; call inject first")
    return layers


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's tensors by name, layer by layer: `<module>.lora_A.weight` (r, I), `<module>.lora_B.weight` (O, r).

    Raises ValueError when the model has no LoRA layer.
    """
    return {
        f"{name}.{part}.weight": getattr(layer, part).weight
        for name, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


def config_of(model: nn.Module) -> LoraConfig:
    """The settings that all LoRA layers of a model share.

    Raises ValueError when the model has no LoRA layer, or when the ranks or alphas of its layers differ.
    """
    layers = lora_layers(model)
    settings = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(f"the LoRA layers have several (rank, alpha): {sorted(settings)}; expected the same in all")
    (rank, alpha), names = settings.pop(), {name.rpartition(".")[2] for name in layers}
    return LoraConfig(rank, alpha, tuple(sorted(names)))


def merge(model: nn.Module) -> None:
    """Merge all LoRA layers, or none if one raises. A merged model costs the same as the base model.

    Raises ValueError when the model has no LoRA layer, or as `LoRALinear.merge` does.
    """
    layers = [layer for layer in lora_layers(model).values() if not layer.merged]
    for done, layer in enumerate(layers):
        try:
            layer.merge()
        except ValueError:
            for earlier in layers[:done]:
                earlier.unmerge()
            raise


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, bit for bit. Raises ValueError when the model has no LoRA layer."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> None:
    """Merge the adapter for good: the model is an ordinary one then, with the merged weights under the usual names.

    Raises ValueError as `merge` does, and changes nothing then.
    """
    merge(model)
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)


def remove(model: nn.Module) -> None:
    """Remove the LoRA layers. The base weights are those before `inject`, bit for bit, and stay frozen.

    Raises ValueError when the model has no LoRA layer.
    """
    for name, layer in lora_layers(model).items():
        layer.unmerge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
