"""``inject`` and ``eject``: adapters into a model and out of it, without PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkern.adapters.config import LoRAConfig
from peftkern.adapters.targets import find_targets
from peftkern.nn import initialization
from peftkern.nn.lora_linear import LoRALinear


@dataclass(frozen=True)
class InjectReport:
    """The outcome of ``inject``: the adapted layers by name, and the numbers of trained parameters and of all."""

    names: tuple[str, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / max(1, self.total)
        return (
            f"{len(self.names)} layers adapted; {self.trainable:,} of {self.total:,} parameters trained ({share:.2%})"
        )


def inject(
    model: nn.Module,
    *,
    r: int,
    lora_alpha: float,
    target_modules: Sequence[str] | str = "all-linear",
    exclude_modules: Sequence[str] | str = (),
    lora_dropout: float = 0.0,
    bias: str = "none",
    lora_bias: bool = False,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    init_lora_weights: bool | str = True,
) -> InjectReport:
    """Put a LoRALinear in the place of each targeted nn.Linear and Conv1D of a model, in place, and freeze the rest.

    Args:
        model: any module. Layers keep their parameters, dtype, device and mode; tied parameters stay tied, and a module
            that is used under several names stays one (PEFT adapts it under the first name only).
        target_modules: names or their ends after a dot, a regex that matches whole names, or "all-linear", which leaves
            out the output head of a transformers model. exclude_modules: the same, taken away.
        r, lora_alpha, lora_dropout, lora_bias, use_rslora, init_lora_weights: as in ``LoRALinear``.
        bias: "none", or "lora_only" to train the base biases of the adapted layers.
        rank_pattern, alpha_pattern: r and lora_alpha of layers by a regex on the end of their name.
    Returns: the report; ``print`` it.
    Raises: ValueError or TypeError naming the argument, the entry that matched nothing, or the layer that cannot be
        adapted and why; the model is then as it was. RuntimeError for a model that has adapters.
    Deterministic: draws as ``LoRALinear``, in the order of the layers.
    """
    config = LoRAConfig(
        r, lora_alpha, target_modules, exclude_modules, lora_dropout, bias, lora_bias, use_rslora,
        rank_pattern or {}, alpha_pattern or {}, init_lora_weights,
    )  # fmt: skip
    initialization.check_method(init_lora_weights)
    refuse_adapted(model)
    return put_adapters(model, config, find_targets(model, config))


def refuse_adapted(model: nn.Module) -> None:
    """Raises: RuntimeError where the model has adapters, peftkern's or PEFT's."""
    refuse_peft(model)
    if adapted := adapted_layers(model):
        raise RuntimeError(
            f"the model has {len(adapted)} LoRALinear, the first at {next(iter(adapted))!r}: eject first"
        )


def refuse_peft(model: nn.Module) -> None:
    """Raises: RuntimeError for a model with PEFT's adapters: PEFT saves and loads those itself."""
    if any(isinstance(getattr(module, "lora_A", None), nn.ModuleDict) for module in model.modules()):
        raise RuntimeError(
            "the model has adapters of PEFT: use peftkern.patch, save_pretrained and load_adapter of PEFT"
        )


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear below the model, by its first name."""
    return {name: module for name, module in model.named_modules() if name and isinstance(module, LoRALinear)}


def put_adapters(model: nn.Module, config: LoRAConfig, targets: Mapping[str, nn.Module]) -> InjectReport:
    """Replace the targets, which ``find_targets`` has found fit."""
    method = config.init_lora_weights
    for name, module in targets.items():
        initialization.check_weight(module.weight, config.rank(name), method)  # type: ignore[arg-type]
    if initialization.changes_the_base(method):
        _refuse_tied(model, targets, method)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made: dict[nn.Module, LoRALinear] = {}
    try:
        for name, module in targets.items():
            made[module] = LoRALinear.from_linear(
                module, config.rank(name), config.alpha(name), lora_dropout=config.lora_dropout,
                lora_bias=config.lora_bias, use_rslora=config.use_rslora, init_lora_weights=method,
            )  # fmt: skip
    except BaseException:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    model.requires_grad_(False)
    replace(model, made)
    for layer in made.values():
        if config.bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)
    return report_on(model, targets)


def report_on(model: nn.Module, names: Iterable[str]) -> InjectReport:
    """The report of a model whose layers of these names are adapted."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return InjectReport(tuple(names), sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def replace(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module at every name of its old one."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                setattr(parent, name, made[child])
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # no fused inference: it reads the weights past the adapter


def _refuse_tied(model: nn.Module, targets: Mapping[str, nn.Module], method: bool | str) -> None:
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, module in targets.items():
        if len(names[module.weight]) > 1:  # type: ignore[index]
            raise ValueError(
                f"init_lora_weights={method!r} changes the weight of {name!r}, which is tied "
                f"({', '.join(names[module.weight])}): exclude it"  # type: ignore[index]
            )


@torch.no_grad()
def eject(model: nn.Module, *, merge: bool = True) -> tuple[str, ...]:
    """Put plain layers back in the place of every LoRALinear of a model, in place.

    Args:
        model: an injected model.
        merge: whether the adapters are added to the weights (in fp32, rounded once) or dropped. Dropped, a weight is
            the one that was given, tied as it was; after PiSSA and OLoRA it is that to its dtype's rounding. A merged
            weight is tied to nothing.
    Returns: the names of the layers. Everything stays frozen; a Conv1D is a Conv1D again.
    Raises: ValueError where there is no LoRALinear.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no LoRALinear")
    replace(model, {layer: _plain(layer, merge) for layer in layers.values()})
    return tuple(layers)


def _plain(layer: LoRALinear, merge: bool) -> nn.Module:
    weight, bias = layer.base_weight(), layer.bias
    if merge:
        merged = layer.to_linear()
        weight, bias = merged.weight, merged.bias
    N, K = layer.out_features, layer.in_features
    module: nn.Module
    if layer.conv1d is None:
        module = nn.Linear(K, N, bias is not None, "meta", weight.dtype)
    else:
        with torch.device("meta"):
            module = layer.conv1d(N, K)
        weight = weight.t().contiguous() if merge else weight.t()
    own = type(weight) is nn.Parameter
    module.weight = weight if own else nn.Parameter(weight, requires_grad=False)
    module.register_parameter("bias", bias)
    return module.train(layer.training)
