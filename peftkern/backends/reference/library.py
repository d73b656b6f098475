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
from peftkern.backends.base import Backend, Plan, bias_gradients, only, rounding, scaled
from peftkern.ops.bank_problem import BankOperands
from peftkern.ops.problem import Gradients, LoRAOperands, Needs, Problem


def _thin_dtype(operands: LoRAOperands, dtype: torch.dtype) -> torch.dtype:
    """The dtype the thin products run in."""
    wide = operands.precision == "fp32" or dtype == torch.float16  # s and t may be beyond fp16's range
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def _factor(operands: LoRAOperands, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B in the thin dtype; under "base" rounded to the compute dtype first."""
    if operands.precision == "base" and factor.dtype != dtype:
        factor = _half(factor) if dtype == torch.float16 else factor.to(dtype)
    return factor.to(_thin_dtype(operands, dtype))


def _half(factor: Tensor) -> Tensor:
    """A factor in fp32, rounded to the eleven digits of fp16 but not to its range."""
    part, exponent = torch.frexp(factor.float())
    return torch.ldexp(part.half().float(), exponent)


def _keep(operands: LoRAOperands, M: int) -> Tensor | None:
    if operands.rng_state is None:
        return None
    return dropout.keep_mask(M, operands.lora_A.shape[1], operands.dropout_p, operands.rng_state)


def _apply_keep(value: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """D(value); a NaN that is dropped becomes 0, so it is a select and not a product."""
    if keep is None:
        return value
    return torch.where(keep, value, value.new_zeros(())).mul_(dropout.scale(p))


def _accumulate(target: Tensor, operands: LoRAOperands, left: Tensor, right: Tensor) -> None:
    """target += c (left @ right), without a temporary where target has the thin dtype and c is a number."""
    # BLAS skips the product where alpha is 0, but 0 * Inf is NaN
    if operands.scaling_tensor is None and target.dtype == left.dtype and operands.scaling != 0:
        target.addmm_(left, right, alpha=operands.scaling)
    else:
        target.add_(scaled(left @ right, operands))


def add_update(operands: LoRAOperands, x: Tensor, y: Tensor) -> Tensor:
    """y += c s B^T in place; returns s = D(x) A^T in fp32 (fp64 for fp64)."""
    thin = _thin_dtype(operands, x.dtype)
    dropped = _apply_keep(x, _keep(operands, x.shape[0]), operands.dropout_p)
    s = dropped.to(thin) @ _factor(operands, operands.lora_A, x.dtype).T
    _accumulate(y, operands, s, _factor(operands, operands.lora_B, x.dtype).T)
    return s.to(torch.promote_types(x.dtype, torch.float32))


def add_update_backward(
    operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx += c D(t A) in place where there is one; dA where there is x and dB where there is s."""
    A, B = _factor(operands, operands.lora_A, dy.dtype), _factor(operands, operands.lora_B, dy.dtype)
    need_t = dx is not None or x is not None
    thin = _thin_dtype(operands, dy.dtype)
    keep = _keep(operands, dy.shape[0]) if need_t else None
    thin_dy = dy.to(thin) if need_t or s is not None else dy
    t = thin_dy @ B if need_t else thin_dy
    dA = dB = None
    if dx is not None:
        if keep is None:
            _accumulate(dx, operands, t, A)
        else:
            dx.add_(scaled(_apply_keep(t @ A, keep, operands.dropout_p), operands))
    if x is not None:
        dropped = _apply_keep(x, keep, operands.dropout_p).to(thin)
        dA = scaled(t.T @ dropped, operands).to(operands.lora_A.dtype)
    if s is not None:
        dB = scaled(thin_dy.T @ s.to(thin), operands).to(operands.lora_B.dtype)
    return dA, dB


class ReferenceBackend(Backend):
    """Never refuses; the floor that the kernels have to beat."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        return None

    def plan(self, problem: Problem) -> Plan:
        return Plan("library", f"vendor GEMM{rounding(problem)}")

    def forward(self, operands: LoRAOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = operands.weight.factors(x, False)
        bias = None if operands.bias is None else operands.bias.to(rows.dtype)
        y = torch.nn.functional.linear(rows, weight.materialize(rows.dtype), bias).to(x.dtype)
        return y, self.accumulate(operands, x, y)

    def backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
    ) -> Gradients:
        dx = self.product(operands.weight, dy, True) if needs.x else None
        return self.accumulate_backward(operands, dy, x, s, dx, needs)

    def accumulate(self, operands: LoRAOperands, x: Tensor, y: Tensor) -> Tensor:
        s = add_update(operands, x, y)
        if operands.lora_bias is not None:
            y += scaled(operands.lora_bias.clone(), operands)
        return s

    def accumulate_backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: Needs
    ) -> Gradients:
        dA, dB = add_update_backward(operands, dy, x if needs.lora_A else None, s if needs.lora_B else None, dx)
        return Gradients(dx, dA, dB, *bias_gradients(operands, dy, needs))

    def bank_forward(self, operands: BankOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.linear(x, operands.weight, operands.bias)
        parts = []
        for segment in operands.segments:
            if not segment.length:
                continue
            rows, inside = operands.rows_of(segment), operands.inside_of(segment)
            own = y[rows]
            parts.append(add_update(operands.alone(segment), only(x[rows], inside), own).flatten())
            y[rows] = own if inside is None else torch.where(inside, own, y[rows])
        wide = torch.promote_types(x.dtype, torch.float32)
        return y, torch.cat(parts) if parts else x.new_empty(0, dtype=wide)
