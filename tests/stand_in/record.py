"""What the stand-in's driver was given, as values that compare: the same launch is an equal ``Launch``."""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_FORMATS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
_ATTRIBUTES = {2: "cooperative", 4: "cluster", 5: "cluster scheduling", 6: "dependent"}  # CUlaunchAttributeID
_TENSOR_MAP = struct.Struct("Q6B2x5Q4Q5I")


class RawLaunch(ctypes.Structure):
    """driver.c's ``Launch``."""

    _fields_ = [
        ("function", ctypes.c_uint64), ("stream", ctypes.c_uint64), ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3), ("shared_memory", ctypes.c_uint32), ("attributes", ctypes.c_uint32),
        ("attribute_ids", ctypes.c_int32 * 8), ("attribute_values", ctypes.c_int32 * 8), ("params", ctypes.c_uint32),
        ("sizes", ctypes.c_uint16 * 128), ("bytes", ctypes.POINTER(ctypes.c_uint8)),
    ]  # fmt: skip

    def parameters(self) -> list[bytes]:
        """The kernel's, as they were passed."""
        sizes = self.sizes[: self.params]
        content = ctypes.string_at(self.bytes, sum(sizes))
        ends = list(itertools.accumulate(sizes, initial=0))
        return [content[begin:end] for begin, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Pointer:
    """An address: the tensor that it points into, and bytes from its first element.

    Of a tensor that nobody has named, "new 0", "new 1", ... in the order of their first use, and the address modulo 16.
    """

    name: str
    offset: int


@dataclass(frozen=True)
class Descriptor:
    """A tensor map, outermost dimension first, and the shape and strides that the kernel gets beside it."""

    base: Pointer
    type: int  # CUtensorMapDataType
    shape: tuple[int, ...]
    stride_bytes: tuple[int, ...]  # of all dimensions but the innermost
    box: tuple[int, ...]
    swizzle: int
    fill: int
    beside: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One launch, or one product of the vendor's ("vendor"), which has neither binary nor grid."""

    kernel: str
    binary: str  # Triton's hash of all that it was compiled from
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_memory: int
    stream: int
    attributes: dict[str, int]
    arguments: dict[str, Any]  # by parameter: numbers, Pointers, Descriptors, constants, and tuples of these


class Names:
    """Addresses to ``Pointer``."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._new: dict[int, str] = {}
        self._known = []
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            begin = storage.data_ptr()
            self._known.append((name, begin, begin + storage.nbytes(), tensor.data_ptr()))

    def pointer(self, address: int) -> Pointer:
        """The name of an address."""
        for name, begin, end, first in self._known:
            if begin <= address < end:
                return Pointer(name, address - first)
        return Pointer(self._new.setdefault(address, f"new {len(self._new)}"), address % 16)


def decode(raw: RawLaunch, kernel: Any, names: Names) -> Launch:
    """A launch of a ``CompiledKernel``. Raises: ValueError where its parameters are not the binary's."""
    parameters = raw.parameters()
    given = iter(parameters)
    constants = {_path(path, kernel.src.fn.arg_names): value for path, value in kernel.src.constants.items()}
    arguments = {
        name: _value(type, (i,), constants, given, names) for i, (name, type) in enumerate(kernel.src.signature.items())
    }
    scratch = list(given)
    if any(any(pointer) for pointer in scratch):
        raise ValueError(f"{kernel.name} got {len(scratch)} parameters more than its signature has: {scratch}")
    return Launch(
        kernel.src.fn.__name__, kernel.hash, tuple(raw.grid), tuple(raw.block), raw.shared_memory, raw.stream,
        {_ATTRIBUTES.get(raw.attribute_ids[i], str(raw.attribute_ids[i])): raw.attribute_values[i]
         for i in range(raw.attributes)},
        arguments,
    )  # fmt: skip


def _path(path: Any, names: list[str]) -> tuple[int, ...]:
    return (names.index(path),) if isinstance(path, str) else tuple(path)


def _value(
    type: Any, path: tuple[int, ...], constants: Mapping[tuple[int, ...], Any], given: Iterator[bytes], names: Names
) -> Any:
    """The next argument of a signature's type, as Triton's launcher lays it out."""
    if isinstance(type, tuple):
        return tuple(_value(one, (*path, i), constants, given, names) for i, one in enumerate(type))
    if type == "constexpr":
        return _constant(constants.get(path))
    if type.startswith("tensordesc"):
        rank = type.split("[")[1].split("]")[0].count(",") + 1
        address, *fields = _TENSOR_MAP.unpack_from(next(given))
        found_rank, kind, swizzle, _, _, fill = fields[:6]
        if found_rank != rank:
            raise ValueError(f"a descriptor of {found_rank} dimensions for {type}")
        shape, strides, box = fields[6:11], fields[11:15], fields[15:20]
        beside = [_number("i32", next(given)) for _ in range(rank)] + [_number("i64", next(given)) for _ in range(rank)]
        return Descriptor(
            names.pointer(address), kind, tuple(shape[rank - 1 :: -1]), tuple(strides[: rank - 1][::-1]),
            tuple(box[rank - 1 :: -1]), swizzle, fill, tuple(beside),
        )  # fmt: skip
    if type.startswith("*"):
        return names.pointer(_number("u64", next(given)))
    return _number(type, next(given))


def _number(type: str, content: bytes) -> Any:
    return struct.unpack(_FORMATS[type], content)[0]


def _constant(value: Any) -> Any:
    """A constant of the compiled kernel: a number or text as it is, a plug or a dtype by name."""
    value = getattr(value, "value", value)
    if isinstance(value, tuple | list):
        return tuple(map(_constant, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", str(value))
