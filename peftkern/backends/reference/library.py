"""The ``library`` schedule: vendor GEMMs with the low-rank pair accumulated in place, on any device torch runs on.

    y = x W^T (+ bias);  y += c s B^T           dx = dy W;  dx += c D(t A)

Two precisions, as in every backend. "base": the factors are rounded to x's dtype and the thin products run there.
"fp32": x and dy are widened and the thin products run in fp32, as PEFT does with its default adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.backends.base import Backend, Plan, bias_gradients, scaled
from peftkern.ops.problem import Gradients, LoRAOperands, Needs, Problem


def _thin_dtype(operands: LoRAOperands, dtype: torch.dtype) -> torch.dtype:
    """The dtype the thin products run in."""
    wide = operands.precision == "fp32" or dtype == torch.float16  # s and t may be beyond fp16's range
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def _factor(operands: LoRAOperands, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B in the thin dtype; under "base" rounded to the compute dtype first."""
    if operands.precision == "base":
        factor = factor.to(dtype)
    return factor.to(_thin_dtype(operands, dtype))


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


class ReferenceBackend(Backend):
    """Never refuses; the floor that the kernels have to beat."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        return None

    def plan(self, problem: Problem) -> Plan:
        return Plan("library", "vendor GEMM")

    def forward(self, operands: LoRAOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.linear(x, operands.weight.materialize(x.dtype), operands.bias)
        return y, self.accumulate(operands, x, y)

    def backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
    ) -> Gradients:
        dx = dy @ operands.weight.materialize(dy.dtype) if needs.x else None
        return self.accumulate_backward(operands, dy, x, s, dx, needs)

    def accumulate(self, operands: LoRAOperands, x: Tensor, y: Tensor) -> Tensor:
        thin = _thin_dtype(operands, x.dtype)
        dropped = _apply_keep(x, _keep(operands, x.shape[0]), operands.dropout_p)
        s = dropped.to(thin) @ _factor(operands, operands.lora_A, x.dtype).T
        return self._expand(operands, x, s, y)

    def forward_shared(self, members: Sequence[LoRAOperands], x: Tensor) -> list[tuple[Tensor, Tensor]]:
        if any(operands.rng_state is not None for operands in members):  # each mask makes an x of its own
            return super().forward_shared(members, x)
        factors = [_factor(operands, operands.lora_A, x.dtype) for operands in members]
        thin = (x.to(_thin_dtype(members[0], x.dtype)) @ torch.cat(factors).T).split([len(A) for A in factors], 1)
        results = []
        for operands, s in zip(members, thin, strict=True):
            y = torch.nn.functional.linear(x, operands.weight.materialize(x.dtype), operands.bias)
            results.append((y, self._expand(operands, x, s.contiguous(), y)))
        return results

    def _expand(self, operands: LoRAOperands, x: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """y += c s B^T + c lora_bias in place; s as it is saved."""
        _accumulate(y, operands, s, _factor(operands, operands.lora_B, x.dtype).T)
        if operands.lora_bias is not None:
            y += scaled(operands.lora_bias.clone(), operands)
        return s.to(torch.promote_types(x.dtype, torch.float32))

    def accumulate_backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: Needs
    ) -> Gradients:
        A, B = _factor(operands, operands.lora_A, dy.dtype), _factor(operands, operands.lora_B, dy.dtype)
        thin = _thin_dtype(operands, dy.dtype)
        keep = _keep(operands, dy.shape[0]) if needs.x or needs.lora_A else None
        thin_dy = dy.to(thin) if needs.x or needs.lora_A or needs.lora_B else dy
        t = thin_dy @ B if needs.x or needs.lora_A else thin_dy
        dA = dB = None
        if needs.x:
            assert dx is not None
            if keep is None:
                _accumulate(dx, operands, t, A)
            else:
                dx.add_(scaled(_apply_keep(t @ A, keep, operands.dropout_p), operands))
        if needs.lora_A:
            assert x is not None
            dropped = _apply_keep(x, keep, operands.dropout_p).to(thin)
            dA = scaled(t.T @ dropped, operands).to(operands.lora_A.dtype)
        if needs.lora_B:
            assert s is not None
            dB = scaled(thin_dy.T @ s.to(thin), operands).to(operands.lora_B.dtype)
        return Gradients(dx, dA, dB, *bias_gradients(operands, dy, needs))
