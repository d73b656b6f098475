"""Triton kernels in Triton's interpreter with the programs of a grid interleaved.

Protocols between programs can so be tested without a GPU: tickets, release/acquire flags, last arrivers, counters that
reset themselves.

    with interleaved(seed=3, weak_memory=True, max_resident=2) as log:
        kernel[(tiles,)](...)

PairNeeds TRITON_INTERPRET=1. What is known of the interpreter's internals is all in this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from protocols.baton import Deadlock, Launch, LaunchRecord, Options
from protocols.weak_memory import Atomic, RawMemory, WeakMemory

__all__ = ["Deadlock", "LaunchRecord", "Log", "interleaved"]


@dataclasses.dataclass
class Log:
    """What ran inside ``interleaved``, in order."""

    launches: list[LaunchRecord] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def interleaved(
    seed: int = 0,
    *,
    weak_memory: bool = False,
    barriers: bool = False,
    max_resident: int | None = None,
    order: str = "shuffled",
    patience: int = 300,
    max_steps: int = 2_000_000,
) -> Iterator[Log]:
    """Run every Triton launch in the block with its programs interleaved, a new choice at each load, store and atomic.

    Args: seed: of all choices, over all launches of the block; weak_memory: plain stores reach memory late and plain
        loads may be stale, unless release and acquire order them (``protocols.weak_memory``); barriers: with
        ``weak_memory``, a release covers only what was stored before the program's last ``tl.debug_barrier()``;
        max_resident: programs in flight at once, None for all; order: in which programs start, "shuffled" or "program";
        patience: after how many fruitless accesses of every program in flight it is a deadlock; max_steps: accesses of
        one launch.
    Returns: a context manager that gives a ``Log``, filled as launches run.
    Raises: Deadlock, at the launch, if no program in flight gets on; RuntimeError if Triton does not interpret, if its
        internals are not those of 3.6 to 3.9, or inside another ``interleaved``; ValueError for a bad option.
    Deterministic: for a seed, an input and a version of Triton.
    """
    if order not in ("shuffled", "program"):
        raise ValueError(f"order is {order!r}, not 'shuffled' or 'program'")
    if max_resident is not None and max_resident < 1:
        raise ValueError(f"max_resident is {max_resident}, not at least 1")
    if barriers and not weak_memory:
        raise ValueError("barriers=True needs weak_memory=True")
    internals = _Internals.find()
    if isinstance(internals.executor.__call__, _Launcher):
        raise RuntimeError("interleaved() is already active")
    log, options = Log(), Options(max_resident, order == "shuffled", patience, max_steps)
    hooks = _Hooks(internals)
    launcher = _Launcher(internals, hooks, log, options, random.Random(seed), weak_memory, barriers)
    with contextlib.ExitStack() as undo:
        for name, hook in hooks.named().items():
            if hasattr(internals.builder, name):
                setattr(internals.builder, name, hook)  # on the instance, where it hides the class's method
                undo.callback(delattr, internals.builder, name)
        undo.callback(setattr, internals.executor, "__call__", internals.executor.__call__)
        internals.executor.__call__ = launcher
        yield log


class _Internals(NamedTuple):
    """What is used of ``triton.runtime.interpreter``."""

    builder: Any  # its memory operations, and grid_idx and grid_dim
    executor: Any  # the class that runs a grid: __call__ calls self.fn for each program
    handle: Any  # a tensor's numpy data and Triton type
    boolean: Any
    numpy_type: Callable[[Any], np.dtype]
    raw: RawMemory
    acquires: tuple
    releases: tuple
    narrow: Any  # the scope that orders nothing between programs

    @classmethod
    def find(cls) -> _Internals:
        """Raises: RuntimeError if Triton is missing, does not interpret, or has other internals."""
        try:
            import triton
            from triton.runtime import interpreter
        except ImportError as error:
            raise RuntimeError(f"interleaved() needs Triton and numpy: {error}") from error
        try:
            interprets = triton.knobs.runtime.interpret
            load, store = operator.attrgetter("_interpreter.load", "_interpreter.store")(interpreter)
            sem, scope = operator.attrgetter("_ir.MEM_SEMANTIC", "_ir.MEM_SYNC_SCOPE")(interpreter)
            found = cls(
                interpreter.interpreter_builder,
                interpreter.GridExecutor,
                interpreter.TensorHandle,
                triton.language.int1,
                interpreter._get_np_dtype,
                RawMemory(
                    lambda a, dtype: load(a, np.ones(a.shape, dtype=bool), np.zeros(a.shape, dtype=dtype), dtype),
                    lambda a, values: store(a, values, np.ones(a.shape, dtype=bool)),
                ),
                (sem.ACQUIRE, sem.ACQUIRE_RELEASE),
                (sem.RELEASE, sem.ACQUIRE_RELEASE),
                scope.CTA,
            )
            for name in _Hooks.REQUIRED:
                hook, original = getattr(_Hooks, name), getattr(found.builder, name)
                if not _same_start(hook, original):
                    raise AttributeError(f"{name}{inspect.signature(original)}")
            if "set_grid_idx" not in dir(found.builder):
                raise AttributeError("set_grid_idx")
        except AttributeError as error:
            raise RuntimeError(
                f"interleaved() knows Triton's interpreter from 3.6 to 3.9; {triton.__version__} has another: {error}"
            ) from error
        if not interprets:
            raise RuntimeError("interleaved() needs TRITON_INTERPRET=1 before Triton kernels are defined")
        return found


def _same_start(hook: Callable, original: Callable) -> bool:
    """Whether the named parameters of a hook are the first of the method it stands in for."""
    mine = [p.name for p in inspect.signature(hook).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    return list(inspect.signature(original).parameters)[: len(mine)] == mine


class _Launcher:
    """Stands in for the executor's ``__call__``: collects the grid's programs instead of running them one by one, and
    runs them all when the last one is due."""

    def __init__(
        self,
        internals: _Internals,
        hooks: _Hooks,
        log: Log,
        options: Options,
        rng: random.Random,
        weak_memory: bool,
        barriers: bool,
    ) -> None:
        self.internals, self.hooks, self.log, self.options, self.rng = internals, hooks, log, options, rng
        self.weak_memory, self.barriers = weak_memory, barriers
        self.original = internals.executor.__call__

    def __get__(self, executor: Any, owner: Any = None) -> Any:
        return self if executor is None else lambda *args, **kwargs: self.launch(executor, *args, **kwargs)

    def launch(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        """One launch. Raises: Deadlock, and whatever the interpreter raises for a kernel's own errors."""
        kernel = executor.fn
        programs = executor.fn = _Programs(kernel, self)
        try:
            self.original(executor, *args, **kwargs)
        except Exception:
            if programs.deadlock is not None:  # the interpreter has wrapped it
                raise programs.deadlock from None
            raise
        finally:
            executor.fn = kernel

    def run(self, name: str, indices: list[tuple], program: Callable[[], None]) -> None:
        """Run all programs of a grid."""
        builder, hooks = self.internals.builder, self.hooks
        record = LaunchRecord(name, tuple(builder.grid_dim))
        self.log.launches.append(record)
        memory = None
        if self.weak_memory:
            memory = WeakMemory(self.internals.raw, self.rng, len(indices), self.barriers)

        def enter(index: tuple) -> None:
            builder.grid_idx = index

        hooks.launch = Launch(self.options, self.rng, record, indices, program, enter, memory)
        try:
            hooks.launch.run()
        finally:
            hooks.launch = None
            if memory is not None:
                memory.drain_all()
                record.stale = memory.stale


class _Programs:
    """Looks to the executor like the kernel it is about to call for each program of the grid."""

    def __init__(self, kernel: Callable, launcher: _Launcher) -> None:
        self.kernel, self.launcher = kernel, launcher
        self.indices: list[tuple] = []
        self.deadlock: Deadlock | None = None
        self.__name__ = kernel.__name__
        self.__signature__ = inspect.signature(kernel)
        self.__globals__ = kernel.__globals__

    def __call__(self, **kwargs: Any) -> None:
        builder = self.launcher.internals.builder
        self.indices.append(tuple(builder.grid_idx))
        if len(self.indices) == math.prod(builder.grid_dim):
            try:
                self.launcher.run(self.__name__, self.indices, lambda: self.kernel(**kwargs))
            except Deadlock as deadlock:
                self.deadlock = deadlock
                raise


class _Hooks:
    """Stand in for the builder's memory operations: let other programs run first, then do the access."""

    REQUIRED = (
        "create_masked_load",
        "create_masked_store",
        "create_atomic_rmw",
        "create_atomic_cas",
        "create_barrier",
    )
    SINCE_3_9 = ("create_atomic_load", "create_atomic_store", "create_atomic_poll")

    def __init__(self, internals: _Internals) -> None:
        self.internals = internals
        self.launch: Launch | None = None
        self.names = self.REQUIRED + self.SINCE_3_9
        self.originals: dict[str, Any] = {name: getattr(internals.builder, name, None) for name in self.names}

    def named(self) -> dict[str, Callable]:
        """The hooks by the name of the method that each stands in for."""
        return {name: getattr(self, name) for name in self.names}

    def _step(self) -> tuple[Launch, int, WeakMemory | None]:
        if self.launch is None:
            raise RuntimeError("a memory operation of Triton's interpreter outside a launch")
        return self.launch, self.launch.step(), self.launch.memory

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any, **kwargs: Any) -> Any:
        """A plain load."""
        launch, program, memory = self._step()
        where, addresses = _selected(ptrs, mask)
        if memory is not None and memory.settle(program, addresses, self._type(ptrs).itemsize):
            launch.changed()
        result = self.originals["create_masked_load"](ptrs, mask, other, *rest, **kwargs)
        if memory is not None:
            values = result.data[where]
            memory.age(program, addresses, values)
            result.data[where] = values
        launch.saw(("load", addresses.tobytes(), result.data.tobytes()))
        return result

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        """A plain store."""
        launch, program, memory = self._step()
        launch.changed()
        if memory is None:
            return self.originals["create_masked_store"](ptrs, value, mask, *rest, **kwargs)
        where, addresses = _selected(ptrs, mask)
        memory.store(program, addresses, np.broadcast_to(value.data, ptrs.data.shape)[where])
        return None

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        """An atomic read-modify-write."""
        return self._atomic("create_atomic_rmw", (rmwOp, ptr, val, mask, sem, scope), ptr, mask, sem, scope)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        """An atomic compare-and-swap."""
        mask = self._all(ptr)
        return self._atomic("create_atomic_cas", (ptr, cmp, val, sem, scope), ptr, mask, sem, scope)

    def create_atomic_load(self, ptr: Any, mask: Any, sem: Any, scope: Any) -> Any:
        """An atomic load, of the newest value."""
        call = (ptr, mask, None, None, True)
        return self._atomic("create_masked_load", call, ptr, mask, sem, scope)

    def create_atomic_store(self, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        """An atomic store."""
        return self._atomic("create_masked_store", (ptr, val, mask, None), ptr, mask, sem, scope)

    def create_atomic_poll(self, ptr: Any, expected: Any, timeout_ns: Any, sem: Any, scope: Any) -> Any:
        """Atomic loads until each has found what it waits for; with a timeout it gives up at a random time."""
        timed = isinstance(timeout_ns, self.internals.handle)  # else an empty value of the compiler
        left = self.launch.rng.randint(1, 20) if timed and self.launch is not None else math.inf
        matched = np.zeros(ptr.data.shape, dtype=bool)
        while not matched.all() and left > 0:
            found = self.create_atomic_load(ptr, self._all(ptr), sem, scope)
            matched |= found.data == expected.data
            left -= 1
        return self.internals.handle(matched, self.internals.boolean)

    def create_barrier(self) -> None:
        """``tl.debug_barrier()``: between the threads of one program."""
        if self.launch is not None and self.launch.memory is not None:
            self.launch.memory.barrier(self.launch.current.number)

    def _all(self, ptr: Any) -> Any:
        return self.internals.handle(np.ones_like(ptr.data, dtype=bool), self.internals.boolean)

    def _type(self, ptr: Any) -> np.dtype:
        return self.internals.numpy_type(ptr.get_element_ty())

    def _atomic(self, name: str, call: tuple, ptr: Any, mask: Any, sem: Any, scope: Any) -> Any:
        """Do an atomic with the interpreter's method ``name``, in one go, and account for what it orders."""
        launch, program, memory = self._step()
        where, addresses = _selected(ptr, mask)
        wide = scope != self.internals.narrow
        acquire, release = wide and sem in self.internals.acquires, wide and sem in self.internals.releases
        dtype = self._type(ptr)
        if memory is not None:
            memory.before_atomic(program, addresses, dtype.itemsize, release)
        old = self.internals.raw.load(addresses, dtype)
        result = self.originals[name](*call)
        changed = _bits(old) != _bits(self.internals.raw.load(addresses, dtype))
        if memory is not None:
            wrote = np.full(changed.shape, name != "create_masked_load")
            if name == "create_masked_store":
                memory.forget_release(addresses)
            wrote = changed if name == "create_atomic_cas" else wrote
            memory.after_atomic(program, Atomic(addresses, old, wrote, changed, acquire, release))
        if changed.any():
            launch.changed()
        else:
            launch.saw((name, addresses.tobytes(), old.tobytes()))
        return result


def _selected(ptrs: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where the mask is set, and the addresses there."""
    where = np.broadcast_to(np.asarray(mask.data, dtype=bool), ptrs.data.shape)
    return where, ptrs.data[where]


def _bits(values: np.ndarray) -> np.ndarray:
    """The values as integers, so that a NaN equals itself."""
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")
