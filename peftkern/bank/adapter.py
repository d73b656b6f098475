"""``Adapter``: one of the adapters of a bank, and how its factors are made."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from peftkern.adapters.config import LoRAConfig, matches, some
from peftkern.adapters.files import AdapterFile, LoRATensors, check_base_weight, check_complete, check_tensor, key_of
from peftkern.nn import initialization

if TYPE_CHECKING:
    from peftkern.bank.linear import MultiLoRALinear

lock = threading.RLock()  # held while a table changes or is looked through, never during a forward


class Factors(NamedTuple):
    """One layer of an adapter: lora_A [r, K], lora_B [N, r], and the scaling."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float


class Adapter:
    """One adapter: its settings and its factors by layer, each of its true rank.

    ``seed`` and ``batches`` key its dropout: the mask of a layer in its batch number n is Philox with the key ``seed``
    and the offset (n << 32) + crc32(layer), so it depends on neither the other adapters nor the other rows.
    """

    def __init__(self, name: str, id: int, config: LoRAConfig, factors: dict[str, Factors], seed: int) -> None:
        self.name, self.id, self.config, self.factors, self.seed = name, id, config, factors, seed
        self.batches = 0

    def next_batch(self) -> int:
        """Number a batch."""
        with lock:
            self.batches += 1
            return self.batches - 1

    def rng_state(self, batch: int, layer: str) -> tuple[int, int]:
        """(seed, offset) of a layer's mask in a batch."""
        return self.seed, (batch << 32) + zlib.crc32(layer.encode())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every factor, under PEFT's key."""
        for layer, factors in self.factors.items():
            yield key_of(layer, "lora_A"), factors.lora_A
            yield key_of(layer, "lora_B"), factors.lora_B

    def parameters(self) -> list[nn.Parameter]:
        """Every factor: what an optimiser takes."""
        return [parameter for _, parameter in self.named_parameters()]


def initialised(layers: Mapping[str, MultiLoRALinear], config: LoRAConfig) -> dict[str, Factors]:
    """New factors for the layers that config.target_modules names. Raises: ValueError where there is none."""
    rule = config.target_modules
    everything = isinstance(rule, str) and rule.lower() == "all-linear"
    named = [layer for layer in layers if everything or matches(rule, layer)]
    chosen = [layer for layer in named if not matches(config.exclude_modules, layer)]
    if not chosen:
        raise ValueError(f"target_modules={rule!r} names none of the bank's layers {quoted(layers)}")
    factors = {}
    for layer in chosen:
        module, r = layers[layer], config.rank(layer)
        like: dict[str, Any] = {"device": module.device, "dtype": module.adapter_dtype}
        A = torch.empty(r, module.in_features, **like)
        B = torch.empty(module.out_features, r, **like)
        initialization.init_factors(A, B, config.init_lora_weights)
        factors[layer] = Factors(nn.Parameter(A), nn.Parameter(B), config.scaling(layer))
    return factors


def copied(
    layers: Mapping[str, MultiLoRALinear], config: LoRAConfig, tensors: Mapping[str, LoRATensors]
) -> dict[str, Factors]:
    """Copies of an adapter's tensors. Raises: ValueError or NotImplementedError naming the key."""
    if not tensors:
        raise ValueError("an adapter has tensors for at least one layer")
    for name in tensors:
        if name not in layers:
            raise ValueError(f"{key_of(name, 'lora_A')}: the bank has no layer {name!r}; it has {quoted(layers)}")
    check_complete(layers, AdapterFile(config, dict(tensors)))
    return {name: _fitted(name, tensors[name], layer, config) for name, layer in layers.items() if name in tensors}


def check_plain(config: LoRAConfig) -> None:
    """Raises: NotImplementedError for an adapter that is more than a low-rank update of frozen layers."""
    for field, value, plain in (("bias", config.bias, "none"), ("lora_bias", config.lora_bias, False)):
        if value != plain:
            raise NotImplementedError(f"{field}={value!r}: a bank's adapters are lora_A and lora_B alone")
    if initialization.changes_the_base(config.init_lora_weights):
        raise NotImplementedError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base, which adapters share: save a plain LoRA"
        )


def quoted(names: Iterable[str]) -> str:
    """The first few names as they are in the source, for a message."""
    return some([repr(name) for name in names])


def _fitted(name: str, given: LoRATensors, layer: MultiLoRALinear, config: LoRAConfig) -> Factors:
    """A copy of a layer's tensors, in a dtype that the layer computes with."""
    N, K, weight = layer.out_features, layer.in_features, layer.weight
    r = config.rank(name)
    for field, tensor in (("lora_bias", given.lora_bias), ("bias", given.bias)):
        if tensor is not None:
            raise NotImplementedError(f"{key_of(name, field)}: a bank's adapters are lora_A and lora_B alone")
    if weight is not None:
        check_base_weight(name, given, weight)
    own = layer.adapter_dtype if weight is None else weight.dtype
    dtype = own if given.lora_A.dtype == given.lora_B.dtype == own else layer.adapter_dtype
    copies = []
    for field, tensor, shape in (("lora_A", given.lora_A, (r, K)), ("lora_B", given.lora_B, (N, r))):
        check_tensor(name, field, tensor, shape, dtype)
        copies.append(nn.Parameter(tensor.detach().to(layer.device, dtype, copy=True).contiguous()))
    return Factors(copies[0], copies[1], config.scaling(name))
