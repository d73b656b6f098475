"""``lora_linear``: validation, the dtype rule, and the way down to 2-D."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peftkern import _env, autograd, dora, dropout
from peftkern.autograd import flattened, unflattened
from peftkern.backends.base import Backend
from peftkern.backends.reference import formula
from peftkern.call import Base, Call, Pair, Update
from peftkern.ops import check, dispatch, eager
from peftkern.weights import DenseWeight, FrozenWeight

_KEPT = 64  # numbers of rows whose backend a pair remembers


def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    rng_state: Tensor | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with a frozen weight and a trainable low-rank update, fused.

    Formula:
        y = x W^T + c (D(x) A^T) B^T + bias + c lora_bias, with c = scaling and D inverted dropout.

    Args:
        x: [..., K], any strides; any number of leading dimensions, zero rows too.
        weight: [N, K], frozen: a tensor of x's dtype, or a FrozenWeight of any format. An fp8 one may carry
            ``base_compute="fp8"``: the frozen products round x and dy to e4m3, see ``FP8ComputedWeight``.
        lora_A: [R, K], in x's compute dtype or float32. R = 0 is the base layer alone.
        lora_B: [N, R], in lora_A's dtype.
        scaling: a number, or a 0-d tensor that is read at every call without synchronising.
        bias, lora_bias: [N]; lora_bias is multiplied by the scaling, as in PEFT.
        dropout_p: the probability of dropping an element of x before A; resolution 1/65536.
        training: dropout is off when False.
        rng_state: int64 [2] (seed, offset) on x's device; drawn from torch's generator when None.
        precision: "base" (default: the factors are rounded to the compute dtype in registers, as autocast would do, but
            of fp16 to its digits and not to its range) or "fp32" (they are used in full, as PEFT does with fp32
            adapters).
        backend: "auto", "triton", "cpp" or "reference"; default PEFTKERN_BACKEND.

    Returns: y [..., N] in x's compute dtype (under autocast: autocast's dtype, by F.linear's rule).

    Raises:
        ValueError: shapes that do not fit, tensors on different devices, a weight that requires grad, a bad option.
        TypeError: dtypes that do not fit, or an argument that is not a tensor.
        RuntimeError: an explicitly requested backend that cannot run this call, with the reason.

    Numerics: fp32 accumulation; c and dropout's scale multiply the accumulator. A NaN at a dropped position becomes 0.
        Gradients have their parameter's dtype. Double backward is an error. Under torch.func, forward-mode AD,
        torch.export and JIT tracing it is the formula in PyTorch's own operators, in fp32 or wider.
    Deterministic: yes, bitwise, forward and backward, for a fixed rng_state, backend and thread count.
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """
    x, call = _prepare(
        x, weight, lora_A, lora_B, scaling, bias, lora_bias, dropout_p if training else 0.0, rng_state, precision,
        backend,
    )  # fmt: skip
    return run(x, call)[0]


def run(x: Tensor, call: Call, half: bool = False) -> list[Tensor]:
    """Every y [..., N_b] of a call whose operands are known to fit; x [..., K] is in the compute dtype.

    ``half``: the products are in fp16 of an x in another dtype, which y and dx have; of one base, where it trains.
    """
    if not looked_through() and trains(x, call):
        y = autograd.lora(x, call, half)
        return [y] if len(call.bases) == 1 else list(y)
    flat = flattened(x)
    if looked_through():
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # promote_types would be a node of a graph
        ys: Sequence[Tensor] = [y.to(x.dtype) for y in formula.forward_call(call, flat.to(wide))]
    else:
        ys = eager.forward(call, flat)[0]
    return [unflattened(y, x.shape) for y in ys]


def run_pair(x: Tensor, pair: Pair, backends: dict[Any, Backend] | None = None) -> Tensor:
    """``run`` of a pair that computes in x's dtype, and whose tensors outlive every graph.

    ``backends`` is the caller's, who keeps it: what has been chosen for the pair, by number of rows.
    """
    M = x.shape[:-1].numel()
    if M == 0 or eager.watched(x):
        return run(x, Call((Base(pair.weight, pair.bias),), (pair.update(),), pair.precision))[0]
    key = M, _env.settings()
    backend = None if backends is None else backends.get(key)
    if backend is None:
        backend = dispatch.backend_of_pair(pair, M, x.dtype)
        if backends is not None:
            if len(backends) >= _KEPT:
                backends.clear()
            backends[key] = backend
    if torch.is_grad_enabled() and (x.requires_grad or _require_grad(pair[1:5])):  # its parameters
        return autograd.lora_pair(x, pair, backend)
    return unflattened(dispatch.pair(backend, pair, flattened(x))[0], x.shape)


def run_in(x: Tensor, call: Call, compute: torch.dtype) -> Tensor:
    """y of a call of one base that rounds x to ``compute``, as it does dy; y and dx are in x's own dtype."""
    if compute == x.dtype:
        return run(x, call)[0]
    if compute == torch.float16 and not looked_through() and trains(x, call):
        return run(x, call, half=True)[0]
    return run(x.to(compute), call)[0].to(x.dtype)


def run_dora(x: Tensor, call: Call, magnitude: Tensor) -> Tensor:
    """y of a call of one base and one update, without lora_bias, its rows scaled to ``magnitude``: see ``dora``."""
    if call.updates[0].lora_bias is not None:
        raise NotImplementedError("DoRA has no lora_bias")
    flat = flattened(x)
    if looked_through() or trains(flat, call) or (torch.is_grad_enabled() and magnitude.requires_grad):
        y = dora.dora(flat, call, magnitude)
    else:
        y = dora.products(flat, call, magnitude)[0]
    return unflattened(y, x.shape)


def looked_through() -> bool:
    """Whether a torch.func transform, forward-mode AD, torch.export or a JIT trace wants PyTorch's own operators.

    To the first two the kernels would be constants, or an error; of the others the result must run and train elsewhere.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
    )


def trains(x: Tensor, call: Call) -> bool:
    """Whether autograd wants anything of a call."""
    return torch.is_grad_enabled() and (x.requires_grad or _require_grad(call.flat_parameters()))


def _require_grad(parameters: Iterable[Any]) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in parameters)


def _prepare(
    x, weight, lora_A, lora_B, scaling, bias, lora_bias, dropout_p, rng_state, precision, backend
) -> tuple[Tensor, Call]:
    """Validate, apply autocast's rule, draw the RNG state."""
    weight = frozen(weight)
    named = {"x": x, "weight": weight.data, "lora_A": lora_A, "lora_B": lora_B, "bias": bias, "lora_bias": lora_bias}
    beside = {f"weight.{part}": held for part, held in zip(weight.parts, weight.tensors[1:], strict=False)}
    check.devices(named | beside)
    check.shapes(x, weight, lora_A, lora_B, bias, lora_bias)
    if weight.data.requires_grad:
        raise ValueError("weight requires grad, but only the adapter is trained: call weight.requires_grad_(False)")
    if precision not in (None, "base", "fp32"):
        raise ValueError(f"precision={precision!r} is not one of None, 'base', 'fp32'")
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p is a number, not {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p} is not a probability")
    x, weight, bias = autocast(x, weight, bias)
    check.dtypes(x, weight, lora_A, lora_B, bias, lora_bias)
    c, scaling_tensor = split_scaling(scaling, x)
    if dropout.threshold(dropout_p) == 0:
        dropout_p, rng_state = 0.0, None
    elif rng_state is None:
        rng_state = dropout.draw_rng_state(x.device)
    elif not isinstance(rng_state, Tensor):
        raise TypeError(f"rng_state is a tensor int64 [2], not {type(rng_state).__name__}")
    else:
        check.rng_state(rng_state, x.device)
        rng_state = rng_state.contiguous()  # kernels read two adjacent integers
    update = Update(lora_A, lora_B, lora_bias, scaling_tensor, rng_state, c, dropout_p)
    return x, Call((Base(weight, bias),), (update,), precision or "base", backend or "")


def frozen(weight: Tensor | FrozenWeight) -> FrozenWeight:
    """A weight as a FrozenWeight. Raises: TypeError for anything that is none."""
    if isinstance(weight, FrozenWeight):
        return weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a tensor or a FrozenWeight, not {type(weight).__name__}")
    return DenseWeight(weight)


def autocast(x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> tuple[Tensor, FrozenWeight, Tensor | None]:
    """F.linear's rule: floating operands but fp64 take autocast's dtype; the adapter is read as it is."""
    device = x.device.type
    if not dispatch.autocasting(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    if weight.compute_dtype is not None:
        weight = DenseWeight(cast(weight.data))
    return cast(x), weight, None if bias is None else cast(bias)


def split_scaling(scaling: float | Tensor, x: Tensor) -> tuple[float, Tensor | None]:
    """(factor, None) for a number; (1, tensor) for a 0-d tensor, moved to x's device.

    A number that the compiler has seen change is a tensor in its graph too: as the operators' float it would be a
    constant, and every new value a compilation.
    """
    if not isinstance(scaling, Tensor):
        if not isinstance(scaling, (int, float)):
            raise TypeError(f"scaling is a number or a 0-d tensor, not {type(scaling).__name__}")
        if not -math.inf < scaling < math.inf:  # not isfinite: Dynamo cannot trace it on a symbolic float
            raise ValueError(f"scaling={scaling} is not finite")
        if torch.compiler.is_compiling() and _is_symbolic(scaling):
            return 1.0, x.new_ones((), dtype=torch.promote_types(x.dtype, torch.float32)) * scaling
        return float(scaling), None
    if scaling.ndim != 0 or not scaling.is_floating_point():
        raise ValueError(f"a tensor scaling is 0-d and floating, got {scaling.dtype} {tuple(scaling.shape)}")
    if scaling.requires_grad:
        raise ValueError("scaling is not trained: pass a tensor that does not require grad")
    return 1.0, scaling.to(x.device)


def _is_symbolic(number: float) -> bool:
    """Whether the compiler traces a number as unknown; asks without adding a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # heavy; loaded wherever something compiles

    return not (statically_known_true(number >= 0) or statically_known_true(number < 0))


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; prints as text."""

    backend: str
    schedule: str
    tile: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"backend  {self.backend}", f"schedule {self.schedule}", f"tile     {self.tile or '-'}"]
        lines += [f"not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def explain(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    rng_state: Tensor | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Explanation:
    """Say how ``lora_linear`` would run these arguments, without running them.

    Args: those of ``lora_linear``, with the same checks and the same errors.
    Returns: an Explanation with the backend taken, its schedule and tile, and every other backend with its reason.
    """
    if training and dropout_p and rng_state is None:
        rng_state = torch.zeros(2, dtype=torch.int64, device=x.device)  # draws nothing from the caller's generator
    x, call = _prepare(
        x, weight, lora_A, lora_B, scaling, bias, lora_bias, dropout_p if training else 0.0, rng_state, precision,
        backend,
    )  # fmt: skip
    problem = call.problem(x.numel() // max(1, x.shape[-1]), x.dtype)
    chosen = dispatch.select(problem, call.backend)
    refused = {}
    for name in ("triton", "cpp", "reference"):
        if name != chosen.name:
            reason = dispatch.refusal(dispatch.backend_named(name), problem)
            refused[name] = reason or "can run this call, but comes later in the order of preference"
    plan = chosen.plan(problem)
    refused |= {f"schedule {name}": reason for name, reason in plan.refused.items()}
    return Explanation(chosen.name, plan.schedule, plan.tile, refused)
