"""Thin adapter to csrc: one C++ call per direction, with the product with the frozen weight in it or after torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.backends.base import Backend, Plan, bias_gradients
from peftkern.backends.cpp.extension import extension
from peftkern.ops.problem import Gradients, LoRAOperands, Needs, Problem

_DECODE_ROWS = 16
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # problem.h, DType


class CppBackend(Backend):
    """CPU training: y and dx with everything that LoRA adds, by own kernels or on top of torch's GEMM."""

    name = "cpp"

    def unavailable(self) -> str | None:
        return extension()[1]

    @property
    def broken(self) -> bool:
        return extension()[2]

    def supports(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"it runs on the CPU, not on {problem.device_type}"
        if problem.R == 0:
            return "r = 0 has no low-rank pair"
        if problem.dtype not in _DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {problem.dtype}"
        return None

    def plan(self, problem: Problem) -> Plan:
        module = extension()[0]
        if module is None:
            return Plan("split", "not built")
        kernels = module.instruction_set()
        if one_pass(problem.dtype, problem.M):
            return Plan("one_pass", f"{kernels} kernels that read the frozen weight in place")
        return Plan("split", f"vendor GEMM + {kernels} thin products in blocks of rows")

    def forward(self, operands: LoRAOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _unit_stride(x)
        weight, bias = operands.weight.materialize(x.dtype), operands.bias
        if one_pass(x.dtype, x.shape[0]):
            weight, y = _unit_stride_somewhere(weight), x.new_empty(x.shape[0], weight.shape[0])
            return y, self._forward(operands, x, y, weight, None if bias is None else bias.contiguous())
        y = torch.nn.functional.linear(x, weight, bias)
        return y, self._forward(operands, x, y)

    def accumulate(self, operands: LoRAOperands, x: Tensor, y: Tensor) -> Tensor:
        return self._forward(operands, _unit_stride(x), y)

    def forward_shared(self, members: Sequence[LoRAOperands], x: Tensor) -> list[tuple[Tensor, Tensor]]:
        if one_pass(x.dtype, x.shape[0]) or len({operands.lora_A.dtype for operands in members}) > 1:
            return super().forward_shared(members, x)
        x = _unit_stride(x)
        ys = [torch.nn.functional.linear(x, one.weight.materialize(x.dtype), one.bias) for one in members]
        calls = [_forward_call(operands, x, y) for operands, y in zip(members, ys, strict=True)]
        extension()[0].forward_shared([call for call, _, _ in calls])
        return [(y, s) for y, (_, s, _) in zip(ys, calls, strict=True)]

    def _forward(
        self, operands: LoRAOperands, x: Tensor, y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """s, and y: written in one pass where the weight is given, else accumulated into."""
        call, s, _ = _forward_call(operands, x, y, weight, bias)
        extension()[0].forward(call)
        return s

    def backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
    ) -> Gradients:
        weight = dx = None
        whole = one_pass(dy.dtype, dy.shape[0])
        if needs.x:
            dy, weight = _unit_stride(dy), operands.weight.materialize(dy.dtype)
            if whole:
                weight = _unit_stride_somewhere(weight)
            dx = dy.new_empty(dy.shape[0], weight.shape[1]) if whole else dy @ weight
        return self._backward(operands, dy, x, s, dx, needs, whole, weight)

    def backward_onto(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor, needs: Needs
    ) -> Gradients:
        if not one_pass(dy.dtype, dy.shape[0]):
            return super().backward_onto(operands, dy, x, s, dx, needs)
        weight = _unit_stride_somewhere(operands.weight.materialize(dy.dtype))
        return self._backward(operands, dy, x, s, dx, needs, True, weight, onto=True)

    def accumulate_backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: Needs
    ) -> Gradients:
        return self._backward(operands, dy, x, s, dx, needs, False, None)

    def _backward(
        self, operands, dy, x, s, dx, needs: Needs, whole: bool, weight: Tensor | None, onto: bool = False
    ) -> Gradients:
        """The gradients; in one pass (``whole``) dx is written, or added to where ``onto``, else accumulated into."""
        dA = dB = None
        if needs.x or needs.lora_A or needs.lora_B:
            dy = _unit_stride(dy)
            A, B = operands.lora_A.contiguous(), operands.lora_B.contiguous()
            dA = torch.empty_like(A) if needs.lora_A else None
            dB = torch.empty_like(B) if needs.lora_B else None
            x = _unit_stride(x) if x is not None else None
            s = s.contiguous() if s is not None else None
            extension()[0].backward(
                _problem(operands, dy, weight, whole), dy.data_ptr(), dy.stride(0), _address(x),
                0 if x is None else x.stride(0), _address(s), A.data_ptr(), B.data_ptr(), _address(dx), onto,
                _address(dA), _address(dB),
            )  # fmt: skip
        return Gradients(dx, dA, dB, *bias_gradients(operands, dy, needs))


def _forward_call(
    operands: LoRAOperands, x: Tensor, y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Any, Tensor, tuple[Tensor | None, ...]]:
    """The extension's view of one forward, its s, and what has to live until it has run."""
    s = x.new_empty(x.shape[0], operands.lora_A.shape[0], dtype=torch.float32)
    A, B = operands.lora_A.contiguous(), operands.lora_B.contiguous()
    lora_bias = None if operands.lora_bias is None else operands.lora_bias.contiguous()
    call = extension()[0].Forward(
        _problem(operands, x, weight, weight is not None), x.data_ptr(), x.stride(0), A.data_ptr(), B.data_ptr(),
        _address(lora_bias), _address(bias), s.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return call, s, (A, B, lora_bias)


def one_pass(dtype: torch.dtype, M: int) -> bool:
    """Whether y and dx are computed here as a whole, rather than on top of torch's product with the frozen weight.

    That is where it was measured ahead (benchmarks/NOTES.md): with AVX2 and without AVX-512, 16-bit dtypes always and
    fp32 for a handful of rows. Elsewhere torch's product is as good or better, or nobody has measured.
    """
    return extension()[0].instruction_set() == "avx2" and (dtype != torch.float32 or M <= _DECODE_ROWS)


def _problem(operands: LoRAOperands, rows: Tensor, weight: Tensor | None, whole: bool):
    N, K = operands.weight.shape
    scaling = operands.scaling
    if operands.scaling_tensor is not None:
        scaling *= float(operands.scaling_tensor)
    return extension()[0].Problem(
        rows.shape[0], K, N, operands.lora_A.shape[0], _DTYPES[rows.dtype], _DTYPES[operands.lora_A.dtype],
        operands.precision == "base", scaling, dropout.threshold(operands.dropout_p), _address(operands.rng_state),
        torch.get_num_threads(), whole, *_weight(weight),
    )  # fmt: skip


def _unit_stride(rows: Tensor) -> Tensor:
    """Rows whose elements lie next to each other: one copy where they do not (a transposed or expanded tensor)."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _unit_stride_somewhere(weight: Tensor) -> Tensor:
    """A weight whose rows or columns (Conv1D's view) are contiguous: one copy where neither are."""
    return weight if 1 in weight.stride() or 1 in weight.shape else weight.contiguous()


def _weight(weight: Tensor | None) -> tuple[int, int, bool]:
    """Address, distance of its rows, and whether it is its columns that are contiguous."""
    if weight is None:
        return 0, 0, False
    transposed = weight.stride(1) != 1 and weight.shape[1] != 1
    return weight.data_ptr(), weight.stride(1 if transposed else 0), transposed


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
