"""The ``library`` schedule: vendor GEMMs with the low-rank pair accumulated in place, on any device torch runs on.

    y = x W^T (+ bias);  y += c s B^T           dx = dy W;  dx += c D(t A)

Two precisions, as in every backend. "base": the factors are rounded to x's dtype and the thin products run there.
"fp32": x and dy are widened and the thin products run in fp32, as PEFT does with its default adapters. So they do in
fp16, whose range holds neither every factor nor every sum: there a factor is rounded to fp16's digits alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.backends.base import Backend, Plan, bias_gradients, rounding, scaled
from peftkern.call import Base, Pair, PairGradients, PairNeeds, Problem


def _thin_dtype(pair: Pair, dtype: torch.dtype) -> torch.dtype:
    """The dtype the thin products run in."""
    wide = pair.precision == "fp32" or dtype == torch.float16  # s and t may be beyond fp16's range
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def _factor(pair: Pair, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B in the thin dtype; under "base" rounded to the compute dtype first."""
    if pair.precision == "base" and factor.dtype != dtype:
        factor = _half(factor) if dtype == torch.float16 else factor.to(dtype)
    return factor.to(_thin_dtype(pair, dtype))


def _half(factor: Tensor) -> Tensor:
    """A factor in fp32, rounded to the eleven digits of fp16 but not to its range."""
    part, exponent = torch.frexp(factor.float())
    return torch.ldexp(part.half().float(), exponent)


def _keep(pair: Pair, M: int) -> Tensor | None:
    if pair.rng_state is None:
        return None
    return dropout.keep_mask(M, pair.lora_A.shape[1], pair.dropout_p, pair.rng_state)


def _apply_keep(value: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """D(value); a NaN that is dropped becomes 0, so it is a select and not a product."""
    if keep is None:
        return value
    return torch.where(keep, value, value.new_zeros(())).mul_(dropout.scale(p))


def _accumulate(target: Tensor, pair: Pair, left: Tensor, right: Tensor) -> None:
    """target += c (left @ right), without a temporary where target has the thin dtype and c is a number."""
    # BLAS skips the product where alpha is 0, but 0 * Inf is NaN
    if pair.scaling_tensor is None and target.dtype == left.dtype and pair.scaling != 0:
        target.addmm_(left, right, alpha=pair.scaling)
    else:
        target.add_(scaled(left @ right, pair))


def add_update(pair: Pair, x: Tensor, y: Tensor) -> Tensor:
    """y += c s B^T in place; returns s = D(x) A^T in fp32 (fp64 for fp64)."""
    thin = _thin_dtype(pair, x.dtype)
    dropped = _apply_keep(x, _keep(pair, x.shape[0]), pair.dropout_p)
    s = dropped.to(thin) @ _factor(pair, pair.lora_A, x.dtype).T
    _accumulate(y, pair, s, _factor(pair, pair.lora_B, x.dtype).T)
    return s.to(torch.promote_types(x.dtype, torch.float32))


def add_update_backward(
    pair: Pair, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx += c D(t A) in place where there is one; dA where there is x and dB where there is s."""
    A, B = _factor(pair, pair.lora_A, dy.dtype), _factor(pair, pair.lora_B, dy.dtype)
    need_t = dx is not None or x is not None
    thin = _thin_dtype(pair, dy.dtype)
    keep = _keep(pair, dy.shape[0]) if need_t else None
    thin_dy = dy.to(thin) if need_t or s is not None else dy
    t = thin_dy @ B if need_t else thin_dy
    dA = dB = None
    if dx is not None:
        if keep is None:
            _accumulate(dx, pair, t, A)
        else:
            dx.add_(scaled(_apply_keep(t @ A, keep, pair.dropout_p), pair))
    if x is not None:
        dropped = _apply_keep(x, keep, pair.dropout_p).to(thin)
        dA = scaled(t.T @ dropped, pair).to(pair.lora_A.dtype)
    if s is not None:
        dB = scaled(thin_dy.T @ s.to(thin), pair).to(pair.lora_B.dtype)
    return dA, dB


class ReferenceBackend(Backend):
    """The backend that refuses nothing: the floor that the kernels have to beat."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        return None

    def plan(self, problem: Problem) -> Plan:
        return Plan("library", f"vendor GEMM{rounding(problem)}")

    def pair(self, pair: Pair, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if y is None:
            y = self._alone(Base(pair.weight, pair.bias), x)
        s = add_update(pair, x, y)
        if pair.lora_bias is not None:
            y += scaled(pair.lora_bias.clone(), pair)
        return y, s

    def pair_backward(
        self, pair: Pair, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: PairNeeds,
        whole: bool = True,
    ) -> PairGradients:  # fmt: skip
        if needs.x and whole:
            dx = self.product(pair.weight, dy, True) if dx is None else self._product_onto(dx, pair.weight, dy)
        dA, dB = add_update_backward(pair, dy, x, s, dx)
        return PairGradients(dx, dA, dB, *bias_gradients(pair, dy, needs))
