"""Thin adapter to csrc: one C++ call per direction, with the product with the frozen weight in it or after torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern import _env, dropout
from peftkern.backends.base import Backend, Plan, bias_gradients, rounding
from peftkern.backends.cpp import call, prepack, rows
from peftkern.backends.cpp.call import DECODE_ROWS, DTYPES, address, read_weight, unit_stride
from peftkern.backends.cpp.extension import extension
from peftkern.call import Call, Gradients, Needs, Pair, PairGradients, PairNeeds, Problem
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

    def forward(self, call: Call, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        if call.rows is not None:
            return rows.forward(self, call, x)
        if len(call.bases) == 1 or not _thin_products_together(call, x):
            return super().forward(call, x)
        x = unit_stride(x)
        ys = [torch.nn.functional.linear(x, weight.materialize(x.dtype), bias) for weight, bias in call.bases]
        made = [_forward_call(call.pair(i), x, y, False) for i, y in enumerate(ys)]
        extension()[0].forward_shared([one for one, _, _ in made])
        return ys, [s for _, s, _ in made]

    def backward(
        self, call: Call, dys: Sequence[Tensor], x: Tensor | None, thin: Sequence[Tensor | None], needs: Needs
    ) -> Gradients:
        if call.rows is not None:
            return rows.backward(self, call, dys[0], x, thin[0], needs)
        return super().backward(call, dys, x, thin, needs)

    def pair(self, pair: Pair, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, bias, whole = unit_stride(x), None, False
        if y is None:
            whole, bias = call.one_pass(x.dtype, x.shape[0], pair.weight.format), pair.bias
            if whole:
                y, bias = x.new_empty(x.shape[0], pair.weight.shape[0]), None if bias is None else bias.contiguous()
            elif pair.weight.base_compute is not None:
                y = self.product(pair.weight, x, False)
                y = y if bias is None else y.add_(bias)
            else:
                y = torch.nn.functional.linear(x, pair.weight.materialize(x.dtype), bias)
        forward, s, _held = _forward_call(pair, x, y, whole, bias)
        extension()[0].forward(forward)
        return y, s

    def pair_backward(
        self, pair: Pair, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: PairNeeds,
        whole: bool = True,
    ) -> PairGradients:  # fmt: skip
        onto = dx is not None
        one_pass = whole and call.one_pass(dy.dtype, dy.shape[0], pair.weight.format, False)
        if needs.x and whole:
            dy = unit_stride(dy)
            if dx is None:
                made = dy.new_empty(dy.shape[0], pair.weight.shape[1]) if one_pass else None
                dx = self.product(pair.weight, dy, True) if made is None else made
            elif not one_pass:
                dx = self._product_onto(dx, pair.weight, dy)
        dA = dB = None
        if needs.x or needs.lora_A or needs.lora_B:
            dy = unit_stride(dy)
            A, B = pair.lora_A.contiguous(), pair.lora_B.contiguous()
            dA = torch.empty_like(A) if needs.lora_A else None
            dB = torch.empty_like(B) if needs.lora_B else None
            x = unit_stride(x) if x is not None else None
            s = s.contiguous() if s is not None else None
            problem = call.problem(pair, dy, one_pass)
            _held = read_weight(problem, pair.weight, dy, False) if one_pass and needs.x else None
            extension()[0].backward(
                problem, dy.data_ptr(), dy.stride(0), address(x), 0 if x is None else x.stride(0), address(s),
                A.data_ptr(), B.data_ptr(), address(dx), onto and one_pass, address(dA), address(dB),
            )  # fmt: skip
        return PairGradients(dx, dA, dB, *bias_gradients(pair, dy, needs))

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


def _thin_products_together(members: Call, x: Tensor) -> bool:
    """Whether layers on one x, of one update each, have their thin products in one pass over it behind torch's."""
    fused = any(call.one_pass(x.dtype, x.shape[0], weight.format) for weight, _ in members.bases)
    rounded = any(weight.base_compute is not None for weight, _ in members.bases)
    each = [update.base for update in members.updates] == list(range(len(members.bases)))
    return each and not fused and not rounded and len({update.lora_A.dtype for update in members.updates}) == 1


def _forward_call(
    pair: Pair, x: Tensor, y: Tensor, whole: bool, bias: Tensor | None = None
) -> tuple[Any, Tensor, tuple[Any, ...]]:
    """The extension's view of one forward, its s, and what has to live until it has run."""
    s = x.new_empty(x.shape[0], pair.lora_A.shape[0], dtype=torch.float32)
    A, B = pair.lora_A.contiguous(), pair.lora_B.contiguous()
    lora_bias = None if pair.lora_bias is None else pair.lora_bias.contiguous()
    problem = call.problem(pair, x, whole)
    held = read_weight(problem, pair.weight, x, True) if whole else None
    made = extension()[0].Forward(
        problem, x.data_ptr(), x.stride(0), A.data_ptr(), B.data_ptr(), address(lora_bias), address(bias),
        s.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return made, s, (A, B, lora_bias, held)
