"""``AdapterBank``: the adapters that share one frozen model, by name."""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkern.nn import initialization, routing
from peftkern.nn.adapter_config import LoRAConfig, matches
from peftkern.nn.adapter_files import (
    AdapterFile,
    LoRATensors,
    check_base_weight,
    check_complete,
    key_of,
    read_adapter,
    write_adapter,
)
from peftkern.segments import on_device

if TYPE_CHECKING:
    from peftkern.nn.multi_lora_linear import MultiLoRALinear

_lock = threading.RLock()  # held while a table changes or is looked through, never during a forward


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
        with _lock:
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


class AdapterBank:
    """Adapters by name over the ``MultiLoRALinear`` layers of one frozen model, which route each row to one of them.

    Each adapter has tensors of its own, of its true rank: memory is the base and the adapters, whatever their ranks,
    and adding one copies no other. An adapter may cover any of the layers; on the others its rows are the base's.
    ``replace`` and ``remove`` change the table alone: a route made before keeps the adapter that it was made with, to
    the end of its batch, also where another thread changes the table meanwhile. In-place changes of a parameter (an
    optimiser's step) are seen by the next call. Ids are given out once and never again.
    """

    def __init__(self) -> None:
        self._layers: dict[str, MultiLoRALinear] = {}
        self._adapters: dict[str, Adapter] = {}
        self._next_id = 0
        self.served: Any = None  # what ``unserve`` undoes
        routing.live_banks.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        routing.live_banks.add(self)  # a copy is alive too

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, oldest first."""
        return tuple(self._adapters)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that adapters can cover."""
        return tuple(self._layers)

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __getitem__(self, name: str) -> Adapter:
        """The adapter of that name. Raises: ValueError for an unknown one."""
        adapter = self._adapters.get(name)
        if adapter is None:
            raise ValueError(f"there is no adapter {name!r}; the bank holds {_some(self._adapters)}")
        return adapter

    def id_of(self, name: str) -> int:
        """The number that stands for the adapter in a tensor of ids. Raises: ValueError for an unknown name."""
        return self[name].id

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's factors, for an optimiser of its own. Raises: ValueError for an unknown name."""
        return self[name].parameters()

    def route(self, ids: routing.Ids) -> routing.Route:
        """``peftkern.route(ids, bank)`` with this bank."""
        return routing.route(ids, self)

    def attach(self, name: str, layer: MultiLoRALinear) -> None:
        """Make a layer known under its name in the model. Raises: ValueError where there is one of that name."""
        if name in self._layers:
            raise ValueError(f"the bank has a layer {name!r} already")
        self._layers[name] = layer

    def move(self, layer: str, device: torch.device) -> None:
        """Take the adapters of a layer to a device."""
        for adapter in self._adapters.values():
            for parameter in adapter.factors.get(layer, ())[:2]:
                if parameter.device != device:
                    parameter.data = parameter.data.to(device)

    def add(
        self,
        name: str,
        config: LoRAConfig,
        tensors: Mapping[str, LoRATensors] | None = None,
        *,
        is_trainable: bool = False,
        seed: int | None = None,
    ) -> int:
        """Add an adapter.

        Args:
            name: of the adapter, new to the bank.
            config: r, lora_alpha (also by layer), lora_dropout, use_rslora; target_modules where there are no tensors.
            tensors: factors by layer name, which are copied; without them the layers that config.target_modules names
                start as config.init_lora_weights says (Kaiming or Gaussian A, zero B).
            is_trainable: whether the factors require grad.
            seed: of the adapter's dropout; drawn from torch's generator when None.
        Returns: the adapter's id.
        Raises: ValueError, TypeError or NotImplementedError naming the key, with the bank as it was.
        """
        return self._put(name, config, tensors, is_trainable, seed, fresh=True).id

    def replace(
        self,
        name: str,
        config: LoRAConfig,
        tensors: Mapping[str, LoRATensors] | None = None,
        *,
        is_trainable: bool = False,
        seed: int | None = None,
    ) -> None:
        """Put another adapter under a name, and id, that the bank holds. Arguments and errors are those of ``add``."""
        self._put(name, config, tensors, is_trainable, seed, fresh=False)

    def load(self, name: str, folder: str | os.PathLike[str] | AdapterFile, *, is_trainable: bool = False) -> int:
        """Add an adapter, or replace the one of that name, from PEFT's files. Returns: its id.

        Raises: those of ``read_adapter`` and ``add``; ValueError for a layer that the bank does not have. The bank is
        then as it was.
        """
        file = folder if isinstance(folder, AdapterFile) else read_adapter(folder)
        with _lock:
            return self._put(name, file.config, file.layers, is_trainable, None, fresh=name not in self._adapters).id

    def save(self, name: str, folder: str | os.PathLike[str], **extra: str) -> None:
        """Write an adapter in PEFT's format (``write_adapter``; ``extra``: task_type, base_model_name_or_path).

        Raises: ValueError for an unknown name; those of ``write_adapter``.
        """
        adapter = self[name]
        tensors = {layer: LoRATensors(f.lora_A, f.lora_B) for layer, f in adapter.factors.items()}
        write_adapter(folder, adapter.config, tensors, **extra)

    def remove(self, name: str) -> None:
        """Forget an adapter; routes that were made before keep it. Raises: ValueError for an unknown name."""
        with _lock:
            self[name]
            self._adapters = {other: adapter for other, adapter in self._adapters.items() if other != name}

    def _put(
        self,
        name: str,
        config: LoRAConfig,
        tensors: Mapping[str, LoRATensors] | None,
        is_trainable: bool,
        seed: int | None,
        fresh: bool,
    ) -> Adapter:
        if not isinstance(name, str):
            raise TypeError(f"an adapter's name is a string, not {name!r}")
        _check_plain(config)
        with torch.inference_mode(False):  # a server's thread may load what is trained later
            factors = self._initialised(config) if tensors is None else self._copied(config, tensors)
        for pair in factors.values():
            pair.lora_A.requires_grad_(is_trainable), pair.lora_B.requires_grad_(is_trainable)
        if seed is None:
            seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
        with _lock:
            old = self._adapters.get(name)
            if fresh and old is not None:
                raise ValueError(f"the bank has an adapter {name!r} already: replace or remove it")
            if not fresh and old is None:
                raise ValueError(f"there is no adapter {name!r} to replace; the bank holds {_some(self._adapters)}")
            adapter = Adapter(name, self._next_id if old is None else old.id, config, factors, seed)
            self._next_id += old is None
            self._adapters = self._adapters | {name: adapter}
        return adapter

    def _initialised(self, config: LoRAConfig) -> dict[str, Factors]:
        rule = config.target_modules
        everything = isinstance(rule, str) and rule.lower() == "all-linear"
        chosen = [
            layer
            for layer in self._layers
            if (everything or matches(rule, layer))
            and not (config.exclude_modules and matches(config.exclude_modules, layer))
        ]
        if not chosen:
            raise ValueError(f"target_modules={rule!r} names none of the bank's layers {_some(self._layers)}")
        factors = {}
        for layer in chosen:
            module, r = self._layers[layer], config.rank(layer)
            like: dict[str, Any] = {"device": module.device, "dtype": module.adapter_dtype}
            A = torch.empty(r, module.in_features, **like)
            B = torch.empty(module.out_features, r, **like)
            initialization.init_factors(A, B, config.init_lora_weights)
            factors[layer] = Factors(nn.Parameter(A), nn.Parameter(B), _scaling(config, layer))
        return factors

    def _copied(self, config: LoRAConfig, tensors: Mapping[str, LoRATensors]) -> dict[str, Factors]:
        if not tensors:
            raise ValueError("an adapter has tensors for at least one layer")
        for name in tensors:
            if name not in self._layers:
                raise ValueError(
                    f"{key_of(name, 'lora_A')}: the bank has no layer {name!r}; it has {_some(self._layers)}"
                )
        check_complete(self._layers, AdapterFile(config, dict(tensors)))
        return {
            name: _fitted(name, tensors[name], layer, config) for name, layer in self._layers.items() if name in tensors
        }

    def resolve(self, ids: routing.Ids) -> tuple[Tensor, dict[int, Adapter]]:
        """Ids of names and numbers, int64 on the CPU, and the adapters that they name, as they are now.

        Ids on a device stay where they are, and every adapter goes with them.

        Raises: ValueError, TypeError: see ``route``.
        """
        with _lock:
            table = {adapter.id: adapter for adapter in self._adapters.values()}
            if isinstance(ids, Tensor):
                found = _tensor(ids)
            else:
                found = torch.tensor(self._numbers(ids), dtype=torch.int64, device="cpu")
        if found.ndim not in (1, 2):
            raise ValueError(f"adapter ids are [batch] or [batch, tokens], got {list(found.shape)}")
        if on_device(found):
            return found, table
        used = [id for id in found.unique().tolist() if id != -1]
        for id in used:
            if id not in table:
                raise ValueError(f"there is no adapter with id {id}; the bank has ids {sorted(table)} and -1, the base")
        return found, {id: table[id] for id in used}

    def _numbers(self, ids: object) -> list:
        if isinstance(ids, (str, bytes)) or not isinstance(ids, (list, tuple)):
            raise TypeError(f"adapter ids are a list of names, numbers and None, or a tensor, not {ids!r}")
        rows = [self._numbers(entry) if isinstance(entry, (list, tuple)) else self._number(entry) for entry in ids]
        lengths = {len(row) if isinstance(row, list) else -1 for row in rows}
        if len(lengths) > 1:
            raise ValueError(f"adapter ids are one per sequence or as many for each sequence, got {ids!r}")
        return rows

    def _number(self, entry: object) -> int:
        if entry is None:
            return -1
        if isinstance(entry, str):
            return self[entry].id
        if isinstance(entry, int) and not isinstance(entry, bool):
            return entry
        raise TypeError(f"an adapter id is a name, a number or None, not {entry!r}")


def _tensor(ids: Tensor) -> Tensor:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter ids are int64 or int32, not {ids.dtype}")
    return ids.detach().to(torch.int64, copy=True)


def _check_plain(config: LoRAConfig) -> None:
    """Raises: NotImplementedError for an adapter that is more than a low-rank update of frozen layers."""
    for field, value, plain in (("bias", config.bias, "none"), ("lora_bias", config.lora_bias, False)):
        if value != plain:
            raise NotImplementedError(f"{field}={value!r}: a bank's adapters are lora_A and lora_B alone")
    if initialization.changes_the_base(config.init_lora_weights):
        raise NotImplementedError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base, which adapters share: save a plain LoRA"
        )


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
    copies = []
    for field, tensor, shape in (("lora_A", given.lora_A, (r, K)), ("lora_B", given.lora_B, (N, r))):
        key = key_of(name, field)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}; expected is {shape}")
        dtype = own if given.lora_A.dtype == given.lora_B.dtype == own else layer.adapter_dtype
        copy = tensor.detach().to(layer.device, dtype, copy=True).contiguous()
        if not copy.isfinite().all():
            raise ValueError(f"{key} {shape} holds a NaN, an Inf or a value that {dtype} cannot hold")
        copies.append(nn.Parameter(copy))
    return Factors(copies[0], copies[1], _scaling(config, name))


def _scaling(config: LoRAConfig, layer: str) -> float:
    r = config.rank(layer)
    return config.alpha(layer) / (math.sqrt(r) if config.use_rslora else r)


def _some(names: Mapping[str, object]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:8])
    return (shown or "none") + (f" and {len(names) - 8} more" if len(names) > 8 else "")
