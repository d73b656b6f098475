"""Thin adapter to csrc: one C++ call per direction, with the product with the frozen weight in it or after torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern import _env, dropout
from peftkern.backends.base import Backend, Plan, bias_gradients, rounding
from peftkern.backends.cpp import bank, call, prepack
from peftkern.backends.cpp.call import DECODE_ROWS, DTYPES, address, read_weight, unit_stride
from peftkern.backends.cpp.extension import extension
from peftkern.ops.bank_problem import BankBackward, BankGradients, BankOperands
from peftkern.ops.problem import Gradients, LoRAOperands, Needs, Problem
from peftkern.weights import FrozenWeight


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
        if problem.ids_on_device:
            return "it reads each adapter's rows on the host"
        if problem.R == 0 and not problem.several_adapters:
            return "r = 0 has no low-rank pair"
        if problem.dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {problem.dtype}"
        return None

    def plan(self, problem: Problem) -> Plan:
        module = extension()[0]
        if module is None:
            return Plan("split", "not built")
        kernels = module.instruction_set()
        if problem.base_compute is not None:
            return Plan("split", f"frozen product{rounding(problem)}, then {kernels} thin products")
        if call.one_pass(problem.dtype, problem.M, problem.weight_format):
            if problem.weight_format != "dense":
                return Plan(
                    "one_pass", f"{kernels} kernels that decode the frozen {problem.weight_format} weight in place"
                )
            policy = _env.settings().prepack if problem.M > DECODE_ROWS else "off"
            packed = "" if policy == "off" else f", packed copies: {policy}, {prepack.held_bytes():,} bytes held now"
            torchs = "" if call.one_pass(problem.dtype, problem.M, "dense", False) else ", dx on top of torch's product"
            return Plan("one_pass", f"{kernels} kernels that read the frozen weight in place{packed}{torchs}")
        return Plan("split", f"vendor GEMM + {kernels} thin products in blocks of rows")

    def held_bytes(self) -> int:
        return prepack.held_bytes()

    def forward(self, operands: LoRAOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = unit_stride(x), operands.bias
        if call.one_pass(x.dtype, x.shape[0], operands.weight.format):
            y = x.new_empty(x.shape[0], operands.weight.shape[0])
            return y, self._forward(operands, x, y, True, None if bias is None else bias.contiguous())
        if operands.weight.base_compute is not None:
            y = self.product(operands.weight, x, False)
            y = y if bias is None else y.add_(bias)
        else:
            y = torch.nn.functional.linear(x, operands.weight.materialize(x.dtype), bias)
        return y, self._forward(operands, x, y, False)

    def accumulate(self, operands: LoRAOperands, x: Tensor, y: Tensor) -> Tensor:
        return self._forward(operands, unit_stride(x), y, False)

    def forward_shared(self, members: Sequence[LoRAOperands], x: Tensor) -> list[tuple[Tensor, Tensor]]:
        fused = any(call.one_pass(x.dtype, x.shape[0], operands.weight.format) for operands in members)
        if fused or len({operands.lora_A.dtype for operands in members}) > 1:
            return super().forward_shared(members, x)
        x = unit_stride(x)
        ys = [torch.nn.functional.linear(x, one.weight.materialize(x.dtype), one.bias) for one in members]
        calls = [_forward_call(operands, x, y, False) for operands, y in zip(members, ys, strict=True)]
        extension()[0].forward_shared([one for one, _, _ in calls])
        return [(y, s) for y, (_, s, _) in zip(ys, calls, strict=True)]

    def _forward(self, operands: LoRAOperands, x: Tensor, y: Tensor, whole: bool, bias: Tensor | None = None) -> Tensor:
        """s, and y: written in one pass (``whole``), or accumulated into."""
        forward, s, _held = _forward_call(operands, x, y, whole, bias)
        extension()[0].forward(forward)
        return s

    def backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
    ) -> Gradients:
        dx = None
        whole = call.one_pass(dy.dtype, dy.shape[0], operands.weight.format, False)
        if needs.x:
            dy = unit_stride(dy)
            if whole:
                dx = dy.new_empty(dy.shape[0], operands.weight.shape[1])
            else:
                dx = self.product(operands.weight, dy, True)
        return self._backward(operands, dy, x, s, dx, needs, whole)

    def backward_onto(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor, needs: Needs
    ) -> Gradients:
        if not call.one_pass(dy.dtype, dy.shape[0], operands.weight.format, False):
            return super().backward_onto(operands, dy, x, s, dx, needs)
        return self._backward(operands, dy, x, s, dx, needs, True, onto=True)

    def accumulate_backward(
        self, operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: Needs
    ) -> Gradients:
        return self._backward(operands, dy, x, s, dx, needs, False)

    def _backward(self, operands, dy, x, s, dx, needs: Needs, whole: bool, onto: bool = False) -> Gradients:
        """The gradients; in one pass (``whole``) dx is written, or added to where ``onto``, else accumulated into."""
        dA = dB = None
        if needs.x or needs.lora_A or needs.lora_B:
            dy = unit_stride(dy)
            A, B = operands.lora_A.contiguous(), operands.lora_B.contiguous()
            dA = torch.empty_like(A) if needs.lora_A else None
            dB = torch.empty_like(B) if needs.lora_B else None
            x = unit_stride(x) if x is not None else None
            s = s.contiguous() if s is not None else None
            problem = call.problem(operands, dy, whole)
            _held = read_weight(problem, operands.weight, dy, False) if whole and needs.x else None
            extension()[0].backward(
                problem, dy.data_ptr(), dy.stride(0), address(x), 0 if x is None else x.stride(0), address(s),
                A.data_ptr(), B.data_ptr(), address(dx), onto, address(dA), address(dB),
            )  # fmt: skip
        return Gradients(dx, dA, dB, *bias_gradients(operands, dy, needs))

    def product(self, weight: FrozenWeight, rows: Tensor, backward: bool) -> Tensor:
        if weight.base_compute is not None:
            rounded, met = weight.factors(rows, backward)
            return self.product(met, rounded, backward).to(rows.dtype)
        if rows.dtype not in DTYPES or not call.one_pass(rows.dtype, rows.shape[0], weight.format, not backward):
            return super().product(weight, rows, backward)
        rows = unit_stride(rows)
        made = rows.new_empty(rows.shape[0], weight.shape[1 if backward else 0])
        problem = call.base_problem(weight.shape, rows, True)
        _held = read_weight(problem, weight, rows, not backward)
        module = extension()[0]
        if backward:
            module.backward(problem, rows.data_ptr(), rows.stride(0), 0, 0, 0, 0, 0, made.data_ptr(), False, 0, 0)
        else:
            module.forward(module.Forward(problem, rows.data_ptr(), rows.stride(0), 0, 0, 0, 0, 0, made.data_ptr()))
        return made

    def kept(self, x: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor:
        if x.dtype not in DTYPES:
            return super().kept(x, dropout_p, rng_state)
        x = unit_stride(x)
        kept = x.new_empty(x.shape)
        extension()[0].keep(
            dropout.threshold(dropout_p), rng_state.data_ptr(), *x.shape, DTYPES[x.dtype], x.data_ptr(), x.stride(0),
            kept.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return kept

    def bank_forward(self, operands: BankOperands, x: Tensor) -> tuple[Tensor, Tensor]:
        return bank.forward(operands, x)

    def bank_backward(self, operands: BankOperands, given: BankBackward) -> BankGradients:
        return bank.backward(operands, given)


def _forward_call(
    operands: LoRAOperands, x: Tensor, y: Tensor, whole: bool, bias: Tensor | None = None
) -> tuple[Any, Tensor, tuple[Any, ...]]:
    """The extension's view of one forward, its s, and what has to live until it has run."""
    s = x.new_empty(x.shape[0], operands.lora_A.shape[0], dtype=torch.float32)
    A, B = operands.lora_A.contiguous(), operands.lora_B.contiguous()
    lora_bias = None if operands.lora_bias is None else operands.lora_bias.contiguous()
    problem = call.problem(operands, x, whole)
    held = read_weight(problem, operands.weight, x, True) if whole else None
    made = extension()[0].Forward(
        problem, x.data_ptr(), x.stride(0), A.data_ptr(), B.data_ptr(), address(lora_bias), address(bias),
        s.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return made, s, (A, B, lora_bias, held)
