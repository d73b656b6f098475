"""Thin adapter to csrc: one C++ call per direction, with the product with the frozen weight in it or after torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.backends.base import Backend, Plan, bias_gradients, rounding
from peftkern.backends.cpp import call, quantised, rows
from peftkern.backends.cpp.call import DTYPES, address, read_weight, unit_stride
from peftkern.backends.cpp.extension import extension
from peftkern.call import Base, Call, Gradients, Needs, Pair, PairGradients, PairNeeds, Problem
from peftkern.weights import FrozenWeight, split_format


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
        if problem.weight_format != "dense" and split_format(problem.weight_format)[0] not in quantised.FORMATS:
            return f"there is no C++ decoder for weight format {problem.weight_format!r}"
        return None

    def plan(self, problem: Problem) -> Plan:
        module = extension()[0]
        if module is None:
            return Plan("split", "not built")
        kernels = module.instruction_set()
        if problem.base_compute is not None:
            return Plan("split", f"frozen product{rounding(problem)}, then {kernels} thin products")
        own_y, own_dx = (
            call.one_pass(problem.dtype, problem.M, problem.weight_format, forward, True, problem.precision)
            for forward in (True, False)
        )
        if own_y and problem.weight_format != "dense":
            text = f"{kernels} kernels that decode the frozen {problem.weight_format} weight in place"
            return Plan("one_pass", text)
        if own_y:
            torchs = "" if own_dx else ", dx on top of torch's product"
            return Plan("one_pass", f"{kernels} kernels that read the frozen weight in place{torchs}")
        return Plan("split", f"vendor GEMM + {kernels} thin products in blocks of rows")

    def forward(self, call: Call, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        if call.rows is not None:
            return rows.forward(self, call, x)
        if len(call.bases) == 1 or not _thin_products_together(call, x):
            return super().forward(call, x)
        x = unit_stride(x)
        ys = [self.beneath(base, x) for base in call.bases]
        made = [_forward_call(call.pair(i), x, y) for i, y in enumerate(ys)]
        extension()[0].forward_shared([one for one, _, _ in made])
        return ys, [s for _, s, _ in made]

    def backward(
        self, call: Call, dys: Sequence[Tensor], x: Tensor | None, thin: Sequence[Tensor | None], needs: Needs
    ) -> Gradients:
        if call.rows is not None:
            return rows.backward(self, call, dys[0], x, thin[0], needs)
        return super().backward(call, dys, x, thin, needs)

    def pair(self, pair: Pair, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, weight, bias = unit_stride(x), pair.weight, pair.bias
        whole = y is None and call.takes(weight, x, True, pair.precision)
        if whole:
            y, bias = x.new_empty(x.shape[0], weight.shape[0]), None if bias is None else bias.contiguous()
        elif y is None:
            y = self.beneath(Base(weight, bias), x)
        s, A, B, lora_bias = _thin(pair, x)
        problem, *settings = call.of_pair(pair, x, whole)
        problem, _held = read_weight(problem, weight, x) if whole else (problem, None)
        extension()[0].forward(
            problem, *settings, x.data_ptr(), x.stride(0), A.data_ptr(), B.data_ptr(), address(lora_bias),
            address(bias) if whole else 0, s.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y, s

    def pair_backward(
        self, pair: Pair, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: PairNeeds,
        whole: bool = True,
    ) -> PairGradients:  # fmt: skip
        need_x, need_A, need_B, _, _ = needs
        weight, A, B = pair[:3]
        dy, onto = unit_stride(dy), dx is not None
        one_pass = whole and call.takes(weight, dy, False, pair.precision)
        if need_x and whole:
            if dx is None:
                dx = dy.new_empty(dy.shape[0], weight.shape[1]) if one_pass else self.product(weight, dy, True)
            elif not one_pass:
                dx = self._product_onto(dx, weight, dy)
        dA = dB = None
        if need_x or need_A or need_B:
            A, B = A.contiguous(), B.contiguous()
            dA, dB = torch.empty_like(A) if need_A else None, torch.empty_like(B) if need_B else None
            x = None if x is None else unit_stride(x)
            s = None if s is None else s.contiguous()
            problem, *settings = call.of_pair(pair, dy, one_pass)
            problem, _held = read_weight(problem, weight, dy) if one_pass and need_x else (problem, None)
            extension()[0].backward(
                problem, *settings, dy.data_ptr(), dy.stride(0), address(x), 0 if x is None else x.stride(0),
                address(s), A.data_ptr(), B.data_ptr(), address(dx), onto and one_pass, address(dA), address(dB),
            )  # fmt: skip
        return PairGradients(dx, dA, dB, *bias_gradients(pair, dy, needs))

    def beneath(self, base: Base, x: Tensor) -> Tensor:
        """y of a base, in which the kernels then add the low-rank pair."""
        weight, bias = base
        if weight.base_compute is None:
            return torch.nn.functional.linear(x, weight.materialize(x.dtype), bias)
        y = self.product(weight, x, False)
        return y if bias is None else y.add_(bias)

    def product(self, weight: FrozenWeight, rows: Tensor, backward: bool) -> Tensor:
        if weight.base_compute is not None:
            rounded, met = weight.factors(rows, backward)
            return self.product(met, rounded, backward).to(rows.dtype)
        dense = weight.format == "dense" and weight.data.dtype == rows.dtype
        if dense and backward and not call.takes(weight, rows, False):
            return rows @ weight.data
        if rows.dtype not in DTYPES or not call.takes(weight, rows, not backward):
            return super().product(weight, rows, backward)
        return self.own_product(weight, rows, backward)

    def own_product(self, weight: FrozenWeight, rows: Tensor, backward: bool) -> Tensor:
        """rows W^T, or, in ``backward``, rows W, by the kernels whatever the rule says; see ``product``."""
        rows = unit_stride(rows)
        made = rows.new_empty(rows.shape[0], weight.shape[1 if backward else 0])
        problem, _held = read_weight(call.of_base(weight.shape, rows, True), weight, rows)
        given, out = (problem, 0.0, 0, 0, rows.data_ptr(), rows.stride(0)), made.data_ptr()
        if backward:
            extension()[0].backward(*given, 0, 0, 0, 0, 0, out, False, 0, 0)
        else:
            extension()[0].forward(*given, 0, 0, 0, 0, 0, out)
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
    fused = any(call.takes(weight, x, True, members.precision) for weight, _ in members.bases)
    rounded = any(weight.base_compute is not None for weight, _ in members.bases)
    each = [update.base for update in members.updates] == list(range(len(members.bases)))
    return each and not fused and not rounded and len({update.lora_A.dtype for update in members.updates}) == 1


def _thin(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """An s to be filled, and lora_A, lora_B and lora_bias as the kernels read them."""
    _, A, B, _, lora_bias, *_ = pair
    s = x.new_empty(x.shape[0], A.shape[0], dtype=torch.float32)
    return s, A.contiguous(), B.contiguous(), None if lora_bias is None else lora_bias.contiguous()


def _forward_call(pair: Pair, x: Tensor, y: Tensor) -> tuple[Any, Tensor, tuple[Any, ...]]:
    """The extension's view of one forward on top of y, its s, and what has to live until it has run."""
    s, A, B, lora_bias = _thin(pair, x)
    made = extension()[0].Forward(
        *call.of_pair(pair, x, False), x.data_ptr(), x.stride(0), A.data_ptr(), B.data_ptr(), address(lora_bias), 0,
        s.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return made, s, (A, B, lora_bias)
