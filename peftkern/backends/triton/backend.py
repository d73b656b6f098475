"""The Triton backend as the dispatcher sees it; Triton is imported by the first call that it runs."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from peftkern.backends.base import Backend, Plan
from peftkern.backends.triton import select, tiles
from peftkern.ops.problem import Gradients, LoRAOperands, Needs, Problem

_OLDEST = (3, 6)


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


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TritonBackend(Backend):
    """Two launches at most forward (one in ``one_pass``); backward adds two for each parameter's gradient."""

    name = "triton"

    def unavailable(self) -> str | None:
        reason = _missing()
        if reason is None and not torch.cuda.is_available() and not _interpreted():
            return "there is no CUDA or ROCm device, and TRITON_INTERPRET is not 1"
        return reason

    def supports(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda" and not (problem.device_type == "cpu" and _interpreted()):
            return f"Triton kernels do not run on {problem.device_type} tensors"
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the kernels compute in float32, bfloat16 or float16, not {problem.dtype}"
        if problem.adapter_dtype not in (torch.float32, problem.dtype):
            return f"adapters are {problem.dtype} or float32, not {problem.adapter_dtype}"
        if problem.R == 0:
            return "r = 0 has no low-rank pair"
        if problem.R > tiles.MAX_R:
            return f"r = {problem.R} is larger than {tiles.MAX_R}"
        from peftkern.backends.triton import launch

        if not launch.loads(problem.weight_format):
            return f"there is no Triton loader for weight format {problem.weight_format!r}"
        return None

    def plan(self, problem: Problem) -> Plan:
        here = torch.device(problem.device_type)
        device = torch.device("cuda", torch.cuda.current_device()) if here.type == "cuda" else here
        choice = select.choose(problem, select.arch_of(device), backward=False)
        return Plan(choice.schedule, str(choice.tile))

    def forward(self, operands: LoRAOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        with _on(x.device):
            return _produce(operands, x, backward=False)

    def backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
    ) -> Gradients:
        with _on(dy.device):
            dx = t = None
            if needs.x:
                dx, t = _produce(operands, dy, backward=True)
            elif needs.lora_A:
                t = _shrink(operands, dy, backward=True)
            dA = None
            if needs.lora_A:
                assert x is not None and t is not None
                dA = _gradient_of_A(operands, x, t)
            return Gradients(dx, dA, *_gradients_from_dy(operands, dy, s, needs))


def _shrink(operands: LoRAOperands, X: Tensor, backward: bool) -> Tensor:
    """T [M, R] by the ``shrink`` body."""
    from peftkern.backends.triton import launch

    T = X.new_empty(X.shape[0], operands.lora_A.shape[0], dtype=torch.float32)
    launch.shrink(launch.Direction(operands, backward, X.dtype), X, T, select.arch_of(X.device)).run()
    return T


def _produce(operands: LoRAOperands, X: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """Z [M, P] and T [M, R]: (y, s) forward, (dx, t) backward."""
    from peftkern.backends.triton import launch

    choice = select.choose(operands.problem(X.shape[0], X.dtype), select.arch_of(X.device), backward)
    direction = launch.Direction(operands, backward, X.dtype)
    P, _, R = direction.extents
    Z = X.new_empty(X.shape[0], P)
    if choice.one_pass:
        T = X.new_empty(X.shape[0], R, dtype=torch.float32)
    else:
        T = _shrink(operands, X, backward)
    launch.fused(direction, X, T, Z, choice).run()
    return Z, T


def _gradient_of_A(operands: LoRAOperands, x: Tensor, t: Tensor) -> Tensor:
    """dA [R, K] = c t^T D(x)."""
    from peftkern.backends.triton import launch

    first, partial, _ = launch.grad(operands, x, t, sums=False, masked=True, arch=select.arch_of(x.device))
    first.run()
    assert partial is not None
    dA = torch.empty_like(operands.lora_A, memory_format=torch.contiguous_format)
    launch.reduce(partial, dA.T, launch.adapter_scale(operands), operands.scaling_tensor).run()
    return dA


def _gradients_from_dy(
    operands: LoRAOperands, dy: Tensor, s: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dB [N, R] = c dy^T s, dbias [N] = sum dy, dlora_bias [N] = c sum dy, in one pass over dy."""
    from peftkern.backends.triton import launch

    sums = needs.bias or needs.lora_bias
    if not (needs.lora_B or sums):
        return None, None, None
    thin = s.contiguous() if needs.lora_B and s is not None else None
    first, partial, total = launch.grad(operands, dy, thin, sums, masked=False, arch=select.arch_of(dy.device))
    first.run()

    def reduced(source: Tensor | None, like: Tensor | None, scaling: float, scaling_tensor: Tensor | None) -> Tensor:
        assert source is not None and like is not None
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        launch.reduce(source, out.view(source.shape[1:]), scaling, scaling_tensor).run()
        return out

    c = operands.scaling, operands.scaling_tensor
    return (
        reduced(partial, operands.lora_B, *c) if needs.lora_B else None,
        reduced(total, operands.bias, 1.0, None) if needs.bias else None,
        reduced(total, operands.lora_bias, *c) if needs.lora_bias else None,
    )
