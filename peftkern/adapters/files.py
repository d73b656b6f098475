"""``read_adapter`` and ``write_adapter``: PEFT's two files, to and from validated tensors; no module is known here."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern._files import beside
from peftkern.adapters.config import LoRAConfig, matches
from peftkern.ops.check import naming

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_CONFIG_LIMIT = 2**20  # bytes; a config names its layers
_NAME_LIMIT = 500  # letters; patterns run on names
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The fields of LoRATensors, and the end of each one's key.
_ENDS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "bias": "base_layer.bias",
    "weight": "base_layer.weight",
}
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(re.escape(end) for end in _ENDS.values())})", re.DOTALL)


class LoRATensors(NamedTuple):
    """One layer of an adapter.

    lora_A [r, K], lora_B [N, r]; lora_bias and the trained base bias [N], or None; the base weight [N, K] where PEFT
    wrote it beside the adapter (of an output head), else None.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None


class AdapterFile(NamedTuple):
    """A validated adapter: its settings, and the tensors of each layer by the layer's name in the base model."""

    config: LoRAConfig
    layers: dict[str, LoRATensors]


def key_of(name: str, field: str) -> str:
    """The key in the file of a field of LoRATensors."""
    return f"{_PREFIX}{name}.{_ENDS[field]}"


def shapes_of(r: int, K: Any, N: Any) -> dict[str, tuple[Any, ...]]:
    """The shapes of the fields of LoRATensors for a base layer [N, K]."""
    return {"lora_A": (r, K), "lora_B": (N, r), "lora_bias": (N,), "bias": (N,), "weight": (N, K)}


def check_complete(names: Iterable[str], file: AdapterFile) -> None:
    """Raise ValueError for layers that the settings of an adapter name and its tensors lack.

    Args: names: of the layers that there are. A stranger's regex is never run, so one says nothing here.
    """
    targets, excluded = file.config.target_modules, file.config.exclude_modules
    if isinstance(targets, str) or isinstance(excluded, str):
        return
    meant = {name for name in names if matches(targets, name) and not matches(excluded, name)}
    if missing := sorted(meant - set(file.layers)):
        raise ValueError(f"{keys_of(missing)} missing in the file")


def check_base_weight(name: str, layer: LoRATensors, weight: Tensor) -> None:
    """Raise ValueError where PEFT wrote a base weight beside the adapter that is not the model's."""
    if layer.weight is not None and not torch.equal(layer.weight.to(weight.device, weight.dtype), weight):
        raise ValueError(f"{key_of(name, 'weight')} is not the model's weight, and base weights are not loaded")


def check_tensor(
    name: str, field: str, tensor: Tensor, shape: tuple[Any, ...], dtype: torch.dtype, why: str = ""
) -> None:
    """Raise ValueError, naming the key, for another shape, and for a value that is not finite, also not in a dtype."""
    key = key_of(name, field)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key} has shape {tuple(tensor.shape)}; expected is {shape}{why}")
    if not tensor.isfinite().all():
        raise ValueError(f"{key} {shape} holds a NaN or an Inf; every value is finite")
    if tensor.dtype != dtype and not tensor.to(dtype).isfinite().all():
        raise ValueError(f"{key} {shape} has a value that {dtype} cannot hold")


def keys_of(names: Sequence[str]) -> str:
    """The keys of some layers' lora_A, the first few of them."""
    more = f" (and {len(names) - 4} more layers)" if len(names) > 4 else ""
    return ", ".join(key_of(name, "lora_A") for name in names[:4]) + more


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and validate an adapter in PEFT's format (safetensors only); nothing in it is executed.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
    Returns: the settings and, by layer name, tensors on the CPU that are finite, floating, and agree with one another
        and with the ranks of the settings.
    Raises:
        FileNotFoundError: a missing file (a pickled ``adapter_model.bin`` is not read).
        ValueError, TypeError, NotImplementedError: naming the file and the key, with the expected shape.
        ImportError: safetensors is not installed.
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not weights_path.exists() and (folder / "adapter_model.bin").exists():
        raise FileNotFoundError(
            f"{folder} holds a pickled adapter_model.bin, which could run code and is not read: convert it to "
            f"{WEIGHTS_NAME} with PEFT's save_pretrained"
        )
    config = naming(str(config_path), LoRAConfig.from_json, _read_regular(config_path, _CONFIG_LIMIT))
    tensors = naming(str(weights_path), _parsed, _read_regular(weights_path))
    return AdapterFile(config, naming(str(weights_path), _validated, config, tensors))


def write_adapter(
    folder: str | os.PathLike[str], config: LoRAConfig, layers: Mapping[str, LoRATensors], **extra: Any
) -> None:
    """Write an adapter in PEFT's format.

    Args:
        folder: made where it is missing. Files of the same names are replaced, each as a whole or not at all: both are
            written under other names and flushed to the disk before the first takes its place. A kill between the two
            renames leaves the new settings beside the old tensors.
        config, layers: as ``read_adapter`` returns them; the tensors may be on any device.
        extra: further keys of ``adapter_config.json`` that say nothing about the layers, e.g. task_type.
    Raises: ValueError or TypeError for what ``read_adapter`` would refuse, before anything is written; OSError.
    """
    tensors = {
        key_of(name, field): value.detach().to("cpu", copy=True).contiguous()
        for name, layer in layers.items()
        for field, value in layer._asdict().items()
        if value is not None
    }
    _validated(config, tensors)
    weights = _safetensors().save(tensors, {"format": "pt"})
    text = config.to_json(**extra)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as waiting:
        paths = [(folder / CONFIG_NAME, text.encode()), (folder / WEIGHTS_NAME, weights)]
        written = [(waiting.enter_context(beside(path, content)), path) for path, content in paths]
        for temporary, final in written:
            os.replace(temporary, final)
    if os.name == "posix":
        _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_regular(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file (a pipe would block, a device never end), at most ``limit`` bytes of it."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if limit is not None and found.st_size > limit:
            raise ValueError(f"{path} has {found.st_size} bytes; the limit is {limit}")
        return file.read()


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter files need the safetensors package: pip install 'peftkern[io]' (or pip install safetensors)"
        ) from error
    return safetensors.torch


def _parsed(content: bytes) -> dict[str, Tensor]:
    library = _safetensors()
    from safetensors import SafetensorError

    try:
        return library.load(content)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from None
    except KeyError as error:  # a dtype that torch has no name for
        raise TypeError(f"a tensor has the unknown dtype {error}") from None


def _validated(config: LoRAConfig, tensors: Mapping[str, Tensor]) -> dict[str, LoRATensors]:
    """The tensors by layer, each checked."""
    fields = {end: field for field, end in _ENDS.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):  # the library's order is no order
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"unknown key {key!r}; a key is {_PREFIX}<layer>. and one of {', '.join(_ENDS.values())}")
        if len(match[1]) > _NAME_LIMIT:
            raise ValueError(
                f"the layer name {match[1][:80]!r}... has {len(match[1])} letters; the limit is {_NAME_LIMIT}"
            )
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{key} has dtype {tensor.dtype}; it is float16, bfloat16, float32 or float64")
        found.setdefault(match[1], {})[fields[match[2]]] = tensor
    if not found:
        raise ValueError("no tensors")
    layers = {}
    for name, parts in found.items():
        for field in ("lora_A", "lora_B"):
            if field not in parts:
                raise ValueError(f"{key_of(name, field)} is missing beside {', '.join(key_of(name, f) for f in parts)}")
        if config.lora_bias != ("lora_bias" in parts):
            state = "is missing" if config.lora_bias else "is there"
            raise ValueError(f"{key_of(name, 'lora_bias')} {state}, but lora_bias={config.lora_bias}")
        if config.bias == "none" and "bias" in parts:
            raise ValueError(f"{key_of(name, 'bias')} is there, but bias='none'")
        layers[name] = LoRATensors(**parts)
        _check_layer(name, layers[name], config.rank(name))
    return layers


def _check_layer(name: str, layer: LoRATensors, r: int) -> None:
    K = layer.lora_A.shape[-1] if layer.lora_A.ndim == 2 else "in_features"
    N = layer.lora_B.shape[0] if layer.lora_B.ndim == 2 else "out_features"
    expected = shapes_of(r, K, N)
    for field, tensor in layer._asdict().items():
        if tensor is not None:
            check_tensor(name, field, tensor, expected[field], tensor.dtype, f", with r={r}")
