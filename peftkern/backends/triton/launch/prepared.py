"""Launches that have been built once, and are started again with other tensors of the same kind.

Building the launches of a call and Triton's own way to a launch (binding forty keywords, specialising, looking the
binary up) take longer than most of the kernels. All of it depends on shapes, strides, dtypes, alignments and settings,
which ``key`` holds, and not on addresses: a call of a known key allocates, fills its addresses in, and enters Triton's
compiled launcher. Specialisation stays Triton's: by a tensor's dtype and whether its address is a multiple of 16, and
by the values of numbers, which are the key's; an address of another class is another key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peftkern.backends.triton.launch.operands import Launch, VendorProduct, counters

_KEPT = 1024  # keys; then all are forgotten
_known: dict[Any, Prepared] = {}

Fill = Callable[[Sequence[Any]], Any]


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

    Each step has its compiled kernel, from its first start. Slots are the given tensors, then what is allocated.
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
        self._fresh: list[tuple[torch.Size, torch.dtype]] = []
        self._steps = [self._step(step, kernel) for step, kernel in zip(steps, kernels, strict=True)]
        self._results = [None if result is None else self._slot(result) for result in results]
        del self._slots, self._storages, self._given

    def run(self, given: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
        """Start them with other tensors of the same key. Returns: the results."""
        slots: list[Any] = [*given, *[torch.empty(size, dtype=dtype, device=device) for size, dtype in self._fresh]]
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        for start in self._steps:
            start(slots, stream)
        return [None if slot is None else slots[slot] for slot in self._results]

    def _slot(self, tensor: Tensor) -> int:
        """Where a tensor's like stands: a new slot for one that is allocated."""
        slot = self._slots.get(id(tensor))
        if slot is None:
            if tensor.untyped_storage().data_ptr() in self._storages or not tensor.is_contiguous():
                raise Unknown
            slot = self._slots[id(tensor)] = self._count + len(self._fresh)
            self._fresh.append((tensor.shape, tensor.dtype))
            if tensor.numel():
                self._storages[tensor.untyped_storage().data_ptr()] = slot  # a second view of it would be Unknown
        return slot

    def _step(self, step: Any, kernel: Any) -> Callable[[Sequence[Any], int], None]:
        if isinstance(step, VendorProduct):
            return self._product(step)
        names = step.kernel.arg_names
        if any(name not in step.arguments for name in names):  # and has a default, which Triton's binder would fill in
            raise Unknown
        bound = [step.arguments[name] for name in names]
        filled = [(i, self._fill(name, value)) for i, (name, value) in enumerate(zip(names, bound, strict=True))]
        fills = [(i, fill) for i, made in filled for fill in made]
        for i, _ in fills:
            bound[i] = None  # what is kept holds no tensor
        grid = (*step.grid, 1, 1)[:3]

        def start(slots: Sequence[Any], stream: int) -> None:
            arguments = bound.copy()
            for i, fill in fills:
                arguments[i] = fill(slots)
            runtime = triton.knobs.runtime
            enter, metadata = runtime.launch_enter_hook, None
            if enter is not None and getattr(enter, "calls", True):
                metadata = kernel.launch_metadata(step_grid, stream, *arguments)
            kernel.run(
                *grid, stream, kernel.function, kernel.packed_metadata, metadata, enter, runtime.launch_exit_hook,
                *arguments,
            )  # fmt: skip

        step_grid = step.grid
        return start

    def _product(self, step: VendorProduct) -> Callable[[Sequence[Any], int], None]:
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

        def start(slots: Sequence[Any], stream: int) -> None:
            VendorProduct(slots[left], slots[right].T if transposed else slots[right], slots[out]).run()

        return start

    def _fill(self, name: str, value: Any) -> list[Fill]:
        """How an argument is made of other slots; nothing for one that stays as it is."""
        if name == "counters" and value is not None:
            return [lambda slots: counters(slots[0])]
        if isinstance(value, Tensor):
            slot = self._slot(value)
            return [lambda slots: slots[slot]]
        if isinstance(value, TensorDescriptor):
            slot, facts = self._slot(value.base), value.__dict__ | {"base": None}
            return [lambda slots: _described(facts, slots[slot])]
        if isinstance(value, tuple):
            parts = [self._fill("", one) for one in value]
            if any(parts):
                made = [(i, part[0]) for i, part in enumerate(parts) if part]
                rest = tuple(None if part else one for one, part in zip(value, parts, strict=True))
                return [lambda slots: _tuple(rest, made, slots)]
        return []


def _described(facts: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """A descriptor of another base: what its constructor checks, the key holds."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(facts, base=base)
    return made


def _tuple(value: tuple[Any, ...], parts: Sequence[tuple[int, Fill]], slots: Sequence[Any]) -> tuple[Any, ...]:
    made = list(value)
    for i, part in parts:
        made[i] = part(slots)
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
