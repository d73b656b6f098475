"""Launches that have been built once, and are started again with other tensors of the same kind.

Building the launches of a call and Triton's own way to a launch (binding forty keywords, specialising, looking the
binary up) take longer than most of the kernels. All of it depends on shapes, strides, dtypes, alignments and settings,
which ``key`` holds, and not on addresses: a call of a known key allocates, fills its addresses in, and enters Triton's
compiled launcher. Specialisation stays Triton's: by a tensor's dtype and whether its address is a multiple of 16, and
by the values of numbers, which are the key's; an address of another class is another key.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peftkern.backends.triton.launch.operands import Launch, VendorProduct, counters

_KEPT = 1024  # keys; then all are forgotten
_known: dict[Any, Prepared] = {}

_ALIGNED = 256  # bytes that a scratch tensor's address is a multiple of, as an allocator's is

# Of the tensors of a call and of every slot's address: an argument; and, with the stream's handle, a launch.
Fill = Callable[[Sequence[Any], Sequence[int]], Any]
Step = Callable[[Sequence[Any], Sequence[int], int], None]


def key(tensors: Sequence[Tensor | None], *facts: Any) -> tuple[Any, ...]:
    """What the launches of a call depend on: of each tensor all but its address, and ``facts``."""
    return facts, tuple(
        [None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors]
    )  # fmt: skip


def known(of: tuple[Any, ...]) -> Prepared | None:
    """What has been prepared for a key."""
    return _known.get(of)


def keep(of: tuple[Any, ...], prepared: Prepared | None) -> None:
    """Remember it, where there is something."""
    if prepared is not None:
        if len(_known) >= _KEPT:
            _known.clear()
        _known[of] = prepared


def forget() -> None:
    """Build every call's launches anew."""
    _known.clear()


class Unknown(Exception):
    """A tensor that is neither given nor allocated by the builder: what it holds cannot be made again."""


class Prepared:
    """The launches of one call. ``given``: the tensors of the call that made them, ``results`` those that it returned.

    Each step has its compiled kernel, from its first start. Slots are the given tensors, then what is allocated: the
    results and what the vendor's products read or write, a tensor each, and then all the rest in one.
    """

    def __init__(
        self, given: Sequence[Tensor | None], steps: Sequence[Any], kernels: Sequence[Any], results: Sequence[Any]
    ) -> None:
        present = [tensor for tensor in given if tensor is not None]
        self._slots = {id(tensor): slot for slot, tensor in enumerate(given) if tensor is not None}
        if len(self._slots) < len(present):  # one tensor in two places, which are two tensors in another call
            raise Unknown
        self._storages = {t.untyped_storage().data_ptr(): i for i, t in enumerate(given) if t is not None and t.numel()}
        self._given, self._count = given, len(given)
        self._fresh: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []
        self._offsets: list[int] = []  # of what is scratch alone
        self._size = 0
        self._results = [None if result is None else self._slot(result) for result in results]
        products = [self._product(step) if isinstance(step, VendorProduct) else None for step in steps]
        self._last = self._count + len(self._fresh)  # from here on, addresses alone
        self._steps = [
            product or self._launch(step, kernel)
            for product, step, kernel in zip(products, steps, kernels, strict=True)
        ]
        del self._slots, self._storages, self._given

    def run(self, given: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
        """Start them with other tensors of the same key. Returns: the results."""
        tensors: list[Any] = [*given]
        for size, stride, dtype in self._fresh:
            tensors.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if self._size:
            scratch = torch.empty_strided((self._size,), (1,), dtype=torch.uint8, device=device)
            start = scratch.data_ptr()
            addresses += [start + offset for offset in self._offsets]
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        for step in self._steps:
            step(tensors, addresses, stream)
        return [None if slot is None else tensors[slot] for slot in self._results]

    def _slot(self, tensor: Tensor, scratch: bool = False) -> int:
        """Where a tensor's like stands: a new slot for one that is allocated."""
        slot = self._slots.get(id(tensor))
        if slot is None:
            if tensor.untyped_storage().data_ptr() in self._storages or not tensor.is_contiguous():
                raise Unknown
            if scratch:
                slot = self._last + len(self._offsets)
                self._offsets.append(self._size)
                self._size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
            else:
                slot = self._count + len(self._fresh)
                self._fresh.append((tuple(tensor.shape), tensor.stride(), tensor.dtype))
            self._slots[id(tensor)] = slot
            if tensor.numel():
                self._storages[tensor.untyped_storage().data_ptr()] = slot  # a second view of it would be Unknown
        return slot

    def _launch(self, step: Any, kernel: Any) -> Step:
        names = step.kernel.arg_names
        if any(name not in step.arguments for name in names):  # and has a default, which Triton's binder would fill in
            raise Unknown
        bound = [step.arguments[name] for name in names]
        filled = [(i, self._fill(name, value)) for i, (name, value) in enumerate(zip(names, bound, strict=True))]
        fills = [(i, fill) for i, fill in filled if fill is not None]
        for i, _ in fills:
            bound[i] = None  # what is kept holds no tensor
        places = [(i, fill) for i, fill in fills if isinstance(fill, int)]
        others = [(i, fill) for i, fill in fills if not isinstance(fill, int)]
        launch = _launcher(kernel, step.grid, len(bound))

        def start(tensors: Sequence[Any], addresses: Sequence[int], stream: int) -> None:
            arguments = bound.copy()
            for i, slot in places:
                arguments[i] = addresses[slot]
            for i, fill in others:
                arguments[i] = fill(tensors, addresses)
            launch(stream, arguments)

        return start

    def _product(self, step: VendorProduct) -> Step:
        left, out, base = self._slot(step.left), self._slot(step.out), step.right
        transposed = id(base) not in self._slots
        right = self._storages.get(base.untyped_storage().data_ptr()) if transposed else self._slots[id(base)]
        weight = None if right is None or right >= self._count else self._given[right]
        if (
            right is None
            or weight is None
            or (transposed and base.shape != weight.T.shape or base.data_ptr() != weight.data_ptr())
        ):
            raise Unknown

        def start(tensors: Sequence[Any], addresses: Sequence[int], stream: int) -> None:
            VendorProduct(tensors[left], tensors[right].T if transposed else tensors[right], tensors[out]).run()

        return start

    def _fill(self, name: str, value: Any) -> Fill | int | None:
        """How an argument is made of slots: the slot whose address it is, or how; None for one that stays as it is."""
        if name == "counters" and value is not None:
            return lambda tensors, addresses: counters(tensors[0]).data_ptr()
        if isinstance(value, Tensor):
            return self._slot(value, scratch=True)
        if isinstance(value, TensorDescriptor):
            slot, facts = self._slot(value.base, scratch=True), value.__dict__ | {"base": None}
            return lambda tensors, addresses: _described(facts, addresses[slot])
        if isinstance(value, tuple):
            parts = [(i, self._fill("", one)) for i, one in enumerate(value)]
            made = [(i, part) for i, part in parts if part is not None]
            if made:
                rest = [None if part is not None else one for one, (_, part) in zip(value, parts, strict=True)]
                return lambda tensors, addresses: _tuple(rest, made, tensors, addresses)
        return None


def _launcher(kernel: Any, grid: tuple[int, ...], count: int) -> Callable[[int, list[Any]], None]:
    """What starts a kernel on a stream, with ``count`` arguments in the order of its names.

    Where nobody watches launches, and the kernel asks for no scratch, what Triton's own launcher hands to its compiled
    half is always the same but for the stream and the arguments. It is asked once, with marks in their places.
    """
    whole = (*grid, 1, 1)[:3]

    def watched(stream: int, arguments: list[Any]) -> None:
        runtime = triton.knobs.runtime
        enter, metadata = runtime.launch_enter_hook, None
        if _watches(enter):
            metadata = kernel.launch_metadata(grid, stream, *arguments)
        facts = kernel.function, kernel.packed_metadata, metadata, enter, runtime.launch_exit_hook
        kernel.run(*whole, stream, *facts, *arguments)

    launcher = kernel.run
    if getattr(launcher, "global_scratch_size", 1) or getattr(launcher, "profile_scratch_size", 1):
        return watched
    stream_mark, marks = object(), tuple(object() for _ in range(count))
    handed: list[Any] = []
    asked = copy.copy(launcher)
    asked.launch = lambda *given: handed.extend(given)
    asked(*whole, stream_mark, kernel.function, kernel.packed_metadata, None, None, None, *marks)
    one = handed[-1:] == [marks]  # as one argument; by older versions, each as one
    if stream_mark not in handed or not (one or tuple(handed[-count:]) == marks):
        return watched
    at = handed.index(stream_mark)
    before, after = tuple(handed[:at]), tuple(handed[at + 1 : -1 if one else -count])
    compiled, runtime = launcher.launch, triton.knobs.runtime

    def start(stream: int, arguments: list[Any]) -> None:
        if _watches(runtime.launch_enter_hook) or _watches(runtime.launch_exit_hook):
            watched(stream, arguments)
        elif one:
            compiled(*before, stream, *after, tuple(arguments))
        else:
            compiled(*before, stream, *after, *arguments)

    return start


def _watches(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


class _Address(int):
    """A number that a descriptor takes for its tensor."""

    def data_ptr(self) -> int:
        return self


def _described(facts: dict[str, Any], address: int) -> TensorDescriptor:
    """A descriptor of another base: what its constructor checks, the key holds."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(facts, base=_Address(address))
    return made


def _tuple(
    value: list[Any], parts: Sequence[tuple[int, Fill | int]], tensors: Sequence[Any], addresses: Sequence[int]
) -> tuple[Any, ...]:
    made = value.copy()
    for i, part in parts:
        made[i] = addresses[part] if isinstance(part, int) else part(tensors, addresses)
    return tuple(made)


def prepare(
    given: Sequence[Tensor | None], steps: Sequence[Launch | VendorProduct], kernels: Sequence[Any],
    results: Sequence[Tensor | None],
) -> Prepared | None:  # fmt: skip
    """The launches for the next call, or None where they hold a tensor that cannot be made again."""
    launches = [kernel for step, kernel in zip(steps, kernels, strict=True) if not isinstance(step, VendorProduct)]
    if any(kernel is None for kernel in launches) or any(
        getattr(step.kernel, "pre_run_hooks", None) for step in steps if isinstance(step, Launch)
    ):
        return None
    try:
        return Prepared(given, steps, kernels, results)
    except Unknown:
        return None
