"""Thin adapter to csrc: one C++ call per direction, with the product with the frozen weight in it or after torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import _env, dropout
from peftkern.backends.base import Backend, Plan, bias_gradients
from peftkern.backends.cpp import packed, prepack
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
        if one_pass(problem.dtype, problem.M, problem.weight_format):
            if problem.weight_format != "dense":
                return Plan(
                    "one_pass", f"{kernels} kernels that decode the frozen {problem.weight_format} weight in place"
                )
            policy = _env.settings().prepack if problem.M > _DECODE_ROWS else "off"
            packed = "" if policy == "off" else f", packed copies: {policy}, {prepack.held_bytes():,} bytes held now"
            return Plan("one_pass", f"{kernels} kernels that read the frozen weight in place{packed}")
        return Plan("split", f"vendor GEMM + {kernels} thin products in blocks of rows")

    def held_bytes(self) -> int:
        return prepack.held_bytes()

    def forward(self, operands: LoRAOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = _unit_stride(x), operands.bias
        if one_pass(x.dtype, x.shape[0], operands.weight.format):
            y = x.new_empty(x.shape[0], operands.weight.shape[0])
            return y, self._forward(operands, x, y, True, None if bias is None else bias.contiguous())
        y = torch.nn.functional.linear(x, operands.weight.materialize(x.dtype), bias)
        return y, self._forward(operands, x, y, False)

    def accumulate(self, operands: LoRAOperands, x: Tensor, y: Tensor) -> Tensor:
        return self._forward(operands, _unit_stride(x), y, False)

    def _forward(self, operands: LoRAOperands, x: Tensor, y: Tensor, whole: bool, bias: Tensor | None = None) -> Tensor:
        """s, and y: written in one pass (``whole``), or accumulated into."""
        s = x.new_empty(x.shape[0], operands.lora_A.shape[0], dtype=torch.float32)
        A, B = operands.lora_A.contiguous(), operands.lora_B.contiguous()
        lora_bias = None if operands.lora_bias is None else operands.lora_bias.contiguous()
        problem, _held = _problem(operands, x, whole, True)
        extension()[0].forward(
            problem, x.data_ptr(), x.stride(0), A.data_ptr(), B.data_ptr(), _address(lora_bias), _address(bias),
            s.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return s

    def backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
    ) -> Gradients:
        dx = None
        whole = one_pass(dy.dtype, dy.shape[0], operands.weight.format)
        if needs.x:
            dy = _unit_stride(dy)
            if whole:
                dx = dy.new_empty(dy.shape[0], operands.weight.shape[1])
            else:
                dx = dy @ operands.weight.materialize(dy.dtype)
        return self._backward(operands, dy, x, s, dx, needs, whole)

    def accumulate_backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: Needs
    ) -> Gradients:
        return self._backward(operands, dy, x, s, dx, needs, False)

    def _backward(self, operands, dy, x, s, dx, needs: Needs, whole: bool) -> Gradients:
        """The gradients; dx is written in one pass (``whole``), or accumulated into."""
        dA = dB = None
        if needs.x or needs.lora_A or needs.lora_B:
            dy = _unit_stride(dy)
            A, B = operands.lora_A.contiguous(), operands.lora_B.contiguous()
            dA = torch.empty_like(A) if needs.lora_A else None
            dB = torch.empty_like(B) if needs.lora_B else None
            x = _unit_stride(x) if x is not None else None
            s = s.contiguous() if s is not None else None
            problem, _held = _problem(operands, dy, whole, False, needs.x)
            extension()[0].backward(
                problem, dy.data_ptr(), dy.stride(0), _address(x), 0 if x is None else x.stride(0), _address(s),
                A.data_ptr(), B.data_ptr(), _address(dx), _address(dA), _address(dB),
            )  # fmt: skip
        return Gradients(dx, dA, dB, *bias_gradients(operands, dy, needs))


def one_pass(dtype: torch.dtype, M: int, weight_format: str) -> bool:
    """Whether y and dx are computed here as a whole, rather than on top of torch's product with the frozen weight.

    That is where it was measured ahead (benchmarks/NOTES.md): with AVX2 and without AVX-512. Elsewhere torch's product
    is as good or better, or nobody has measured. Torch cannot multiply a packed weight, but with a decoded copy of all
    of it: for a handful of rows the copy costs many times the product, whatever the processor.
    """
    return extension()[0].instruction_set() == "avx2" or (weight_format != "dense" and M <= _DECODE_ROWS)


def _problem(operands: LoRAOperands, rows: Tensor, whole: bool, forward: bool, with_weight: bool = True):
    """The kernels' problem, and what must live until their call is over: the weight they read in one pass."""
    (N, K), M = operands.weight.shape, rows.shape[0]
    scaling: float = operands.scaling
    held: list[Tensor] = []
    if operands.scaling_tensor is not None:
        scaling *= float(operands.scaling_tensor)
    weight = panels = None
    reads = whole and with_weight
    if reads and operands.weight.format == "dense":
        weight = _unit_stride_somewhere(operands.weight.materialize(rows.dtype))
        if weight is operands.weight.data and M > _DECODE_ROWS:  # the caller's own tensor: its packed copy
            panels = prepack.panels(extension()[0], weight, _DTYPES[weight.dtype], _weight(weight), forward)
    problem = extension()[0].Problem(
        M, K, N, operands.lora_A.shape[0], _DTYPES[rows.dtype], _DTYPES[operands.lora_A.dtype],
        operands.precision == "base", scaling, dropout.threshold(operands.dropout_p), _address(operands.rng_state),
        torch.get_num_threads(), whole, *_weight(weight), _address(panels),
    )  # fmt: skip
    if reads and operands.weight.format != "dense":
        held = packed.attach(problem, operands.weight)
    return problem, (weight, panels, held)


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
