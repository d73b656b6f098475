"""The Triton backend as the dispatcher sees it; Triton is imported by the first call that it runs."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern import _env
from peftkern.backends.base import Backend, Plan, add_lora_bias, fill_rows
from peftkern.backends.triton import select, tiles
from peftkern.backends.triton.arch import Arch, arch_of
from peftkern.call import Call, Gradients, Needs, Pair, PairGradients, PairNeeds, Problem

_OLDEST = (3, 6)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _missing() -> str | None:
    """Why Triton cannot be used, whatever the device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton
    except Exception as error:  # noqa: BLE001 - a broken installation is a reason, not a crash
        return f"triton does not import: {error}"
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < _OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST))}"
    return None


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _launching() -> tuple[Any, Any]:
    """The modules that import Triton: ``launch`` and ``schedule``."""
    from peftkern.backends.triton import launch, schedule

    return launch, schedule


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TritonBackend(Backend):
    """One launch forward in ``one_pass``, two in ``split``; backward the same for dx, and two for the parameters.

    Of several adapters one launch forward, and backward one for dx and one for the factors' gradients of them all,
    which are then copied apart.
    """

    name = "triton"

    def unavailable(self) -> str | None:
        reason = _missing()
        if reason is None and not torch.cuda.is_available() and not _interpreted():
            return "there is no CUDA or ROCm device, and TRITON_INTERPRET is not 1"
        if reason is None and torch.cuda.is_available() and not torch.version.hip:
            capability = torch.cuda.get_device_capability()
            if capability < (8, 0):
                return f"a GPU of compute capability {capability[0]}.{capability[1]} is older than 8.0"
        return reason

    def supports(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda" and not (problem.device_type == "cpu" and _interpreted()):
            return f"Triton kernels do not run on {problem.device_type} tensors"
        if problem.several_adapters and torch.version.hip:
            return "rows with adapters of their own need programs to see what others stored, which is not so on gfx942"
        if problem.dtype not in _DTYPES:
            return f"the kernels compute in float32, bfloat16 or float16, not {problem.dtype}"
        if problem.adapter_dtype not in (torch.float32, problem.dtype):
            return f"adapters are {problem.dtype} or float32, not {problem.adapter_dtype}"
        if problem.several_adapters and problem.base_compute is not None:
            return f"rows with adapters of their own are multiplied as they are, not rounded to {problem.base_compute}"
        if problem.R == 0 and not problem.several_adapters:
            return "r = 0 has no low-rank pair"
        if problem.R > tiles.MAX_R:
            return f"r = {problem.R} is larger than {tiles.MAX_R}"
        longest = max(problem.K, problem.N)
        if longest >= tiles.FAR:
            return f"rows of {longest} elements are {tiles.FAR} or more: offsets within a tile have 32 bits"
        if problem.M >= 2**31:
            return f"M = {problem.M} rows are more than 32 bits count"
        if problem.base_compute is not None:
            reason = tiles.codes_refusal(problem, 0, _arch_here(problem.device_type))
            if reason is not None:
                return reason
        from peftkern.backends.triton import launch

        if not launch.loads(problem.weight_format):
            return f"there is no Triton loader for weight format {problem.weight_format!r}"
        return None

    def plan(self, problem: Problem) -> Plan:
        arch = _arch_here(problem.device_type)
        launch = select.pass_of(problem, backward=False)
        choice = select.choose(launch, arch)
        if problem.several_adapters:
            looked_up = "adapters looked up by row, and the gradients of all of them in one launch"
            return Plan(choice.schedule, f"{choice.tile}, {looked_up}")
        decoded = ", after the weight is decoded once" if tiles.decodes(problem.weight_format, choice) else ""
        coded = ", x rounded to e4m3 by a launch before, on FP8 tensor cores" if problem.base_compute else ""
        return Plan(choice.schedule, f"{choice.tile}{decoded}{coded}", tiles.refusals(launch, arch))

    def pair(self, pair: Pair, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        launch, schedule = _launching()
        given = (x, *pair[1:5], pair.scaling_tensor, pair.rng_state, y, *pair.weight.tensors)
        key = _key(pair, given, "forward")
        with _on(x.device):
            prepared = launch.known(key)
            if prepared is not None and not _capturing(x):
                Z, T = prepared.run(given, x.device)
                return Z, T
            produced = schedule.produce(pair, x, backward=False, arch=arch_of(x.device), onto=y)
            kernels = _run(produced.steps)
        _keep(key, given, (pair.rng_state,), produced.steps, kernels, (produced.Z, produced.T))
        return produced.Z, produced.T

    def pair_backward(
        self, pair: Pair, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: PairNeeds,
        whole: bool = True,
    ) -> PairGradients:  # fmt: skip
        launch, schedule = _launching()
        if whole and dx is not None:
            dx = self._product_onto(dx, pair.weight, dy)
        given = (dy, x, s, dx, *pair[1:5], pair.scaling_tensor, pair.rng_state, *pair.weight.tensors)
        key = _key(pair, given, needs)
        with _on(dy.device):
            prepared = launch.known(key)
            if prepared is not None and not _capturing(dy):
                return PairGradients(*prepared.run(given, dy.device))
            plan = schedule.backward(pair, dy, x, s, needs, arch_of(dy.device), onto=dx)
            if plan.beside and dy.is_cuda:
                _run(plan.before)
                _run_beside(plan, dy.device)
                _run(plan.after)
                return plan.gradients
            kernels = _run(plan.all)
        _keep(key, given, (pair.rng_state, s), plan.all, kernels, plan.gradients)
        return plan.gradients

    def _forward_rows(self, call: Call, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        _, schedule = _launching()
        with _on(x.device):
            steps, y, s = schedule.produce_rows(call, x, backward=False, arch=arch_of(x.device))
            _run(steps)
        add_lora_bias(call, y)
        return [y], [s]

    def _backward_rows(self, call: Call, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs) -> Gradients:
        _, schedule = _launching()
        with _on(dy.device):
            steps, gradients = schedule.backward_rows(call, dy, x, s, needs, arch_of(dy.device))
            _run(steps)
        fill_rows(call, dy, needs, gradients)
        return gradients

    def kept(self, x: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor:
        if x.dtype not in _DTYPES:
            return super().kept(x, dropout_p, rng_state)
        from peftkern.backends.triton import launch

        kept = x.new_empty(x.shape)
        with _on(x.device):
            launch.kept(x, kept, dropout_p, rng_state).run()
        return kept


@functools.lru_cache(maxsize=64)
def _side_stream(device: torch.device, stream: int) -> torch.cuda.Stream:
    """The one beside the caller's stream: callers that share none do not meet on it, nor in each other's captures."""
    return torch.cuda.Stream(device)


def _run_beside(plan: Any, device: torch.device) -> None:
    """The plan's two branches on two streams that fork from and join the caller's; under capture too.

    dx is launched first: its tiles fill the units, and what is beside it takes those that its last wave leaves.
    """
    here = torch.cuda.current_stream(device)
    side = _side_stream(device, here.cuda_stream)
    side.wait_stream(here)
    try:
        _run(plan.steps)
        with torch.cuda.stream(side):
            _run(plan.beside)
    finally:  # whatever is freed after this, on an error too, is reused in the order of ``here``
        here.wait_stream(side)


def _run(steps: Iterable[Any]) -> list[Any]:
    """Start them. Returns: what Triton has compiled for each, None for a product of the vendor's."""
    return [step.run() for step in steps]


def _key(pair: Pair, given: Sequence[Tensor | None], direction: Any) -> Any:
    """What the launches of a pair depend on, or None for a weight that is not only decoded, and is not prepared."""
    launch, weight = _launching()[0], pair.weight
    if weight.base_compute is not None:
        return None
    numbers = (pair.scaling, pair.dropout_p, pair.precision, weight.format, weight.group_size, weight.shape, direction)
    tf32 = given[0].dtype == torch.float32 and launch.tf32()  # type: ignore[union-attr]
    return launch.key(given, weight.data.device, numbers, _env.settings(), select.state(), tf32)


def _keep(
    key: Any, given: Sequence[Any], adjacent: Sequence[Tensor | None], steps: Sequence[Any], kernels: Sequence[Any],
    results: Any,
) -> None:  # fmt: skip
    """Remember the launches, where nothing that they read is a copy of what was given, as of ``adjacent`` it may be."""
    launch = _launching()[0]
    copied = any(t is not None and not t.is_contiguous() for t in adjacent)
    if key is not None and not copied and all(t is None or launch.near(t) is t for t in given):
        launch.keep(key, launch.prepare(given, steps, kernels, results))


def _capturing(like: Tensor) -> bool:
    """Whether a graph is captured: it gets counters of its own."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _arch_here(device_type: str) -> Arch:
    device = torch.device(device_type)
    return arch_of(torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device)
