"""The interface of every frozen weight format to the rest of the package."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftkern.weights import saved

_FORMATS: dict[str, type[FrozenWeight]] = {}


class FrozenWeight(ABC):
    """A weight ``[N, K]`` that is never trained, in one storage format.

    The format is one subclass; the kernels see its operands only (``data``, ``scale``, ``format``, ``group_size``,
    ``tables``) and decode them in their tile loader. ``materialize`` is the format's definition: a loader is right iff
    it agrees. Every element is decoded in fp32 and rounded once to the dtype that is asked for.

    Args:
        data: the payload, on any device; its dtype and layout belong to the format.
        scale: the format's scales, or None.
        group_size: how many neighbouring elements share a scale; 0 where the format has no groups.
        tables: what else is needed to decode: zero points, codes, scales of the scales.
        shape: (N, K); needed where ``data`` does not say it.
        dtype: of the weight that was quantised. It is saved, and the kernels do not look at it: they compute in x's.
    """

    format: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()  # what scale and tables are called in a state_dict, after the weight's name
    packed: ClassVar[bool] = False  # whether ``data`` is something else than [N, K], so that the shape must be told
    marker: ClassVar[str]  # of the state_dict entry that says what format this is
    spellings: ClassVar[tuple[tuple[str, ...], ...]] = ()  # what others' checkpoints add to a weight's name
    base_compute: ClassVar[str | None] = None  # what the rows of a product are rounded to; None: they stay as they are

    def __init_subclass__(cls) -> None:
        if "format" in cls.__dict__:
            cls.marker = cls.__dict__.get("marker", f"peftkern__{cls.format}")
            _FORMATS[cls.format] = cls

    def __init__(
        self,
        data: Tensor,
        scale: Tensor | None = None,
        group_size: int = 0,
        tables: tuple[Tensor, ...] = (),
        shape: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        *,
        name: str = "weight",
    ) -> None:
        self.data, self.scale, self.group_size, self.tables = data, scale, group_size, tuple(tables)
        self.shape: tuple[int, int] = tuple(data.shape if shape is None else shape)  # type: ignore[assignment]
        self.dtype = dtype or (data.dtype if data.dtype in saved.DTYPES.values() else torch.float32)
        self.validate(name)

    def validate(self, name: str) -> None:
        """Raise ValueError, naming the tensor as a state_dict does, unless this is a weight of the format."""
        self.check_layout(name)
        if not self.data.is_meta:
            self.check_values(name)

    @abstractmethod
    def check_layout(self, name: str) -> None:
        """The half of ``validate`` that reads no value: dtypes, sizes, devices. The operators ask at every call."""

    def check_values(self, name: str) -> None:
        """The other half: scales that are finite and not negative; a format with more to check says so itself."""
        if self.scale is not None:
            saved.require_finite(f"{name}.scale", self.scale)

    @abstractmethod
    def materialize(self, dtype: torch.dtype) -> Tensor:
        """The weight as a dense ``[N, K]`` tensor of ``dtype``."""

    def factors(self, rows: Tensor, backward: bool) -> tuple[Tensor, FrozenWeight]:
        """The factors of rows W^T, or, in ``backward``, of rows W: the rows as they are rounded, which may be in a
        wider dtype, and the weight that they meet.
        """
        return rows, self

    def with_base_compute(self, base_compute: str | None) -> FrozenWeight:
        """The same tensors as a weight whose products are computed otherwise.

        Args: base_compute: None (in x's dtype), or "fp8" of an fp8 weight, see ``FP8ComputedWeight``.
        Raises: ValueError for another value, or "fp8" of another format.
        """
        found = [c for c in _FORMATS.values() if c.marker == self.marker and c.base_compute == base_compute]
        if not found:
            text = f"base_compute={base_compute!r} of a weight of format {self.stored!r}"
            raise ValueError(f"{text}: it is None, or 'fp8' of an 'fp8' weight")
        return self._of_like(found[0].format, self.data, self.scale, self.tables)

    @classmethod
    @abstractmethod
    def pack(cls, tensor: Tensor) -> FrozenWeight:
        """Convert a dense, finite ``[N, K]`` tensor into this format."""

    @property
    def device(self) -> torch.device:
        """The payload's device."""
        return self.data.device

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype x must have, or None where the format computes in x's own dtype."""
        return None

    @property
    def stored(self) -> str:
        """The format without what ``base_compute`` makes of it."""
        return split_format(self.format)[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is held, in the order data, scale, tables."""
        return (self.data, *(() if self.scale is None else (self.scale,)), *self.tables)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors)

    @staticmethod
    def quantize(tensor: Tensor, format: str, *, base_compute: str | None = None, **options: Any) -> FrozenWeight:
        """Convert a dense weight ``[N, K]`` into ``format``.

        Args:
            tensor: floating, on any device.
            format: "int8" (options: group_size=0, one scale an output channel, or a power of two of at least 16 along
                K), "int4" (group_size=128), "nf4" and "fp4" (blocksize=64, double_quant=True), "mxfp4" and "nvfp4"
                (no options), "fp8" (scaling="row", "tensor" or "block"), or "dense".
            base_compute: of the products with it: None, in x's dtype; "fp8" (of an fp8 weight), in e4m3 on both sides.
            options: the format's own.
        Returns: a FrozenWeight on the same device.
        Raises: ValueError for an unknown format, a tensor that is not 2-D, NaN or Inf in it, an option's value, or a
            base_compute that the format does not have; TypeError for an integer tensor or an unknown option.
        """
        cls = _format_class(format, formats())
        if tensor.ndim != 2:
            raise ValueError(f"a frozen weight is 2-D [N, K], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"a floating weight is quantised, not {tensor.dtype}")
        if format != "dense" and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"the weight has NaN or Inf, which {format} cannot hold")
        weight = cls.pack(tensor.detach(), **options)
        weight.dtype = tensor.dtype
        return weight.with_base_compute(base_compute)

    @staticmethod
    def from_operands(
        format: str,
        data: Tensor,
        scale: Tensor | None,
        group_size: int,
        tables: tuple[Tensor, ...] = (),
        shape: tuple[int, int] | None = None,
    ) -> FrozenWeight:
        """Rebuild a weight from what the operators carry; it was validated when it was first made.

        Raises: ValueError for an unknown format; NotImplementedError for a packed one without ``shape``.
        """
        cls = _format_class(format, _FORMATS)
        if cls.packed and shape is None:
            raise NotImplementedError(f"a weight of format {format!r} is for a plain forward and backward alone")
        weight = object.__new__(cls)
        weight.data, weight.scale, weight.group_size, weight.tables = data, scale, group_size, tuple(tables)
        weight.shape = tuple(shape if cls.packed else data.shape)  # type: ignore[assignment, arg-type]
        weight.dtype = torch.float32
        return weight

    def mapped(self, function: Callable[[Tensor], Tensor]) -> FrozenWeight:
        """The weight with every tensor replaced by ``function`` of it, which keeps dtypes and shapes."""
        scale = None if self.scale is None else function(self.scale)
        return self._of_like(self.format, function(self.data), scale, tuple(map(function, self.tables)))

    def _of_like(self, format: str, data: Tensor, scale: Tensor | None, tables: tuple[Tensor, ...]) -> FrozenWeight:
        weight = self.from_operands(format, data, scale, self.group_size, tables, self.shape)
        weight.dtype = self.dtype
        return weight

    def holding(self, tensors: Sequence[Tensor]) -> FrozenWeight:
        """The weight with others in the place of ``tensors``."""
        each = iter(tensors)
        return self.mapped(lambda _: next(each))

    def to(self, device: torch.device | str) -> FrozenWeight:
        """A copy on another device, or self where it is there already."""
        if self.data.device == torch.device(device):
            return self
        return self.mapped(lambda tensor: tensor.to(device))

    def state_dict(self, name: str = "weight") -> dict[str, Tensor]:
        """The weight as named tensors, without pickle: what ``from_state_dict`` reads, bit for bit.

        nf4 and fp4 have the names that bitsandbytes gives them, and it can read them.
        """
        found = {name: self.data}
        found |= {f"{name}.{part}": tensor for part, tensor in zip(self.parts, self.tensors[1:], strict=True)}
        facts = {"shape": list(self.shape), "group_size": self.group_size, "dtype": saved.dtype_name(self.dtype)}
        found[f"{name}.quant_state.{self.marker}"] = saved.pack_facts(facts)
        return found

    @staticmethod
    def from_state_dict(state_dict: Mapping[str, Tensor], name: str = "weight") -> FrozenWeight:
        """Read a weight that ``state_dict``, or bitsandbytes' ``Linear4bit``, has saved; nothing is unpickled.

        So is a 2-D weight of a checkpoint, whose codes and scales are taken over as they are: in mxfp4 by gpt-oss's
        names, ``NAME_blocks`` and ``NAME_scales``; in nvfp4 by ModelOpt's, ``NAME``, ``NAME_scale`` and
        ``NAME_scale_2``, or by compressed-tensors', ``NAME_packed``, ``NAME_scale`` and ``NAME_global_scale``; in fp8
        by DeepSeek's and Qwen's, ``NAME`` and ``NAME_scale_inv``, a scale for every 128 x 128 block, or one; in int4 by
        GPTQ's and AWQ's, ``qweight``, ``qzeros``, ``scales`` and GPTQ's ``g_idx`` in the place of NAME's last word.

        Args: state_dict: what may hold other tensors too; name: of the weight in it.
        Raises: ValueError naming the key that is missing, unexpected, or holds what it should not.
        """
        entries = {key[len(name) + 1 :]: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
        if name in state_dict:
            entries[""] = state_dict[name]
        marked = [key for key in entries if key.startswith("quant_state.")]
        markers = {cls.marker: cls for cls in _FORMATS.values() if cls.base_compute is None}
        found_spelling = None if marked else _spelled(state_dict, name)
        if found_spelling is not None:
            return found_spelling
        known = ", ".join(sorted(markers))
        if len(marked) != 1 or marked[0].removeprefix("quant_state.") not in markers:
            found = ", ".join(f"{name}.{key}" for key in marked) or "none"
            spelled = "; ".join(f"{c.format}: {', '.join(keys)}" for c, keys in _spellings(name))
            raise ValueError(f"{name}.quant_state.* names one of {known}, found {found}; nor is there all of {spelled}")
        cls = markers[marked[0].removeprefix("quant_state.")]
        facts = saved.unpack_facts(entries.pop(marked[0]), f"{name}.{marked[0]}")
        return cls.from_saved(saved.Saved(name, entries, facts, f"{name}.{marked[0]}"))

    @classmethod
    def from_checkpoint(cls, keys: Sequence[str], tensors: Sequence[Tensor]) -> FrozenWeight:
        """The weight that another package has saved under these names, in the order of one of ``spellings``."""
        raise NotImplementedError(f"{cls.format} has no spelling but its own")

    @classmethod
    def from_saved(cls, content: saved.Saved) -> FrozenWeight:
        """The weight from the entries of a state_dict."""
        shape, dtype = content.shape(), content.dtype()
        data, rest = content.take(""), [content.take(part) for part in cls.parts]
        content.finish()
        scale, tables = (rest[0] if rest else None), tuple(rest[1:])
        return cls(data, scale, content.integer("group_size"), tables, shape, dtype, name=content.name)

    def __repr__(self) -> str:
        (N, K), compute = self.shape, "" if self.base_compute is None else f", base_compute={self.base_compute!r}"
        return f"FrozenWeight(format={self.stored!r}, N={N}, K={K}, device={str(self.device)!r}{compute})"


def _format_class(format: str, known: Collection[str]) -> type[FrozenWeight]:
    if format not in known:
        raise ValueError(f"unknown weight format {format!r}; known: {', '.join(sorted(known))}")
    return _FORMATS[format]


def _spellings(name: str) -> list[tuple[type[FrozenWeight], list[str]]]:
    """The keys of a weight by every spelling of others."""
    own = [cls for cls in _FORMATS.values() if cls.base_compute is None]
    return [(cls, [_key(name, part) for part in spelling]) for cls in own for spelling in cls.spellings]


def _key(name: str, part: str) -> str:
    """A part that begins with a letter is beside the name, in the place of its last word; the others follow it."""
    return name.removesuffix(name.rpartition(".")[2]) + part if part[:1].isalpha() else name + part


def _spelled(state_dict: Mapping[str, Tensor], name: str) -> FrozenWeight | None:
    """The weight by the spelling of which most keys are there, the shorter of two; None where there is but the name.

    Raises: ValueError.
    """
    every = _spellings(name)
    present = {key for _, keys in every for key in keys if key in state_dict}
    if not present - {name}:
        return None
    cls, keys = max(every, key=lambda one: (len(present.intersection(one[1])), -len(one[1])))
    about = f"{cls.format} is saved as {', '.join(keys)}"
    missing = [key for key in keys if not isinstance(state_dict.get(key), Tensor)]
    if missing:
        raise ValueError(f"{missing[0]} is missing or not a tensor: {about}")
    if present.difference(keys):
        raise ValueError(f"unexpected: {', '.join(sorted(present.difference(keys)))}: {about}")
    return cls.from_checkpoint(keys, [state_dict[key] for key in keys])


@functools.cache
def split_format(format: str) -> tuple[str, str | None]:
    """The format as it is stored and quantised to, and base_compute: both are in what the operators call a format."""
    cls = _FORMATS[format]
    found = next(name for name, c in _FORMATS.items() if c.marker == cls.marker and c.base_compute is None)
    return found, cls.base_compute


def formats(computed: bool = False) -> tuple[str, ...]:
    """The names of the registered formats, as weights are stored; with ``computed`` those with a base_compute too."""
    return tuple(sorted(name for name, cls in _FORMATS.items() if computed or cls.base_compute is None))
