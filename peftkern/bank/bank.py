"""``AdapterBank``: the adapters that share one frozen model, by name."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkern.adapters.config import LoRAConfig
from peftkern.adapters.files import AdapterFile, LoRATensors, read_adapter, write_adapter
from peftkern.bank.adapter import Adapter, check_plain, copied, initialised, lock, quoted
from peftkern.bank.routes import Ids, Route
from peftkern.segments import check_dtype, on_device

if TYPE_CHECKING:
    from peftkern.bank.linear import MultiLoRALinear

live_banks: weakref.WeakSet[AdapterBank] = weakref.WeakSet()


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
        live_banks.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        live_banks.add(self)  # a copy is alive too

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
            raise ValueError(f"there is no adapter {name!r}; the bank holds {quoted(self._adapters)}")
        return adapter

    def id_of(self, name: str) -> int:
        """The number that stands for the adapter in a tensor of ids. Raises: ValueError for an unknown name."""
        return self[name].id

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's factors, for an optimiser of its own. Raises: ValueError for an unknown name."""
        return self[name].parameters()

    def route(self, ids: Ids) -> Route:
        """``peftkern.route(ids, bank)`` with this bank."""
        return route(ids, self)

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
        with lock:
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
        with lock:
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
        check_plain(config)
        with torch.inference_mode(False):  # a server's thread may load what is trained later
            factors = initialised(self._layers, config) if tensors is None else copied(self._layers, config, tensors)
        for pair in factors.values():
            pair.lora_A.requires_grad_(is_trainable), pair.lora_B.requires_grad_(is_trainable)
        if seed is None:
            seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
        with lock:
            old = self._adapters.get(name)
            if fresh and old is not None:
                raise ValueError(f"the bank has an adapter {name!r} already: replace or remove it")
            if not fresh and old is None:
                raise ValueError(f"there is no adapter {name!r} to replace; the bank holds {quoted(self._adapters)}")
            adapter = Adapter(name, self._next_id if old is None else old.id, config, factors, seed)
            self._next_id += old is None
            self._adapters = self._adapters | {name: adapter}
        return adapter

    def resolve(self, ids: Ids) -> tuple[Tensor, dict[int, Adapter]]:
        """Ids of names and numbers, int64 on the CPU, and the adapters that they name, as they are now.

        Ids on a device stay where they are, and every adapter goes with them.

        Raises: ValueError, TypeError: see ``route``.
        """
        with lock:
            table = {adapter.id: adapter for adapter in self._adapters.values()}
            if isinstance(ids, Tensor):
                check_dtype(ids)
                found = ids.detach().to(torch.int64, copy=True)
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


def route(ids: Ids, bank: AdapterBank | None = None) -> Route:
    """Send the sequences or tokens of a batch to their adapters: ``with peftkern.route(ids): model(...)``.

    Args:
        ids: one entry per sequence [batch], or per token [batch, tokens]: adapters' names, None for the base, or their
            ids (``bank.id_of(name)``), -1 for the base; or an int64 or int32 tensor of ids, which is copied. One on a
            GPU stays there, and nothing waits for it: a graph that captures the route too is replayed with other ids
            (and with the dropout masks that it captured: they are keyed by numbers of the host).
            The rows of an id that is no adapter's are then the base's, or with PEFTKERN_CHECK_IDS=1 an error. Where
            Triton does not run it costs as if all rows were each adapter's; a list is faster, if there is one.
        bank: whose adapters are meant; without it, the only bank that is alive in the process.
    Returns: a Route: a context manager, and what the ``route`` argument of ``MultiLoRALinear`` takes. It holds on to
        its adapters: one that is removed or replaced meanwhile is used until the route is dropped.
    Raises: ValueError for an unknown name or id, ragged ids, or where it is not clear which bank is meant; TypeError
        for ids of another kind.
    """
    if bank is None:
        if len(live_banks) > 1:
            gc.collect()
        found = list(live_banks)
        if len(found) != 1:
            raise ValueError(f"{len(found)} adapter banks are alive: say which one is meant, route(ids, bank)")
        bank = found[0]
    return Route(bank, *bank.resolve(ids))
