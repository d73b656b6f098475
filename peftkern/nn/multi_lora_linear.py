"""``MultiLoRALinear``: a frozen nn.Linear under a bank of adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkern import dropout
from peftkern.bank_autograd import BankSettings
from peftkern.multi_lora import apply
from peftkern.nn.adapter_bank import AdapterBank
from peftkern.nn.lora_linear import why_not_linear
from peftkern.nn.routing import Route, current_route


class MultiLoRALinear(nn.Module):
    """A linear layer whose weight is frozen and of whose rows each takes one of a bank's adapters, or none.

    Formula:
        y[m] = x[m] W^T + bias + c_e (D_e(x_e) A_e^T)[i] B_e^T for row m, which is row i of those of adapter e.

    Args:
        linear: an nn.Linear, or GPT-2's ``Conv1D``, whose parameters are shared and frozen.
        bank: the adapters; the layer is attached to it.
        name: of the layer in the model: what its tensors are called in an adapter's file.

    Which row takes which adapter is what ``with peftkern.route(ids)`` says, or the ``route`` argument; without either,
    or where the route is of another bank, every row is the base. Adapters are no parameters of this module: they belong
    to the bank (``bank.parameters(name)``, ``bank.save``), so state_dict is that of the base.

    Raises: TypeError for a module that is no plain linear; ValueError at the call where the ids do not fit x.
    Numerics, Deterministic: as ``multi_lora_linear``. A row of the base has the bits that it has without adapters.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear | Any, bank: AdapterBank, name: str) -> None:
        super().__init__()
        reason = why_not_linear(linear)
        if reason is not None:
            raise TypeError(f"{name} cannot carry adapters: {reason}")
        given: Any = linear
        by_row = isinstance(linear, nn.Linear)
        self.weight = given.weight if by_row else nn.Parameter(given.weight.detach().t(), requires_grad=False)
        self.register_parameter("bias", given.bias)
        self.requires_grad_(False)
        self.out_features, self.in_features = map(int, self.weight.shape)
        self.bank, self.name = bank, name
        self.train(linear.training)
        bank.attach(name, self)

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """y [..., N] for x [..., K]."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x is [..., {self.in_features}], got {tuple(x.shape)}")
        if x.device != self.weight.device:
            raise ValueError(f"all tensors must be on one device, got x on {x.device}, weight on {self.weight.device}")
        settings, factors = self._segments(x, current_route() if route is None else route)
        return apply(x, self.weight, self.bias, settings, factors)

    def _segments(self, x: Tensor, route: Route | None) -> tuple[BankSettings, list[Tensor]]:
        """What each adapter of the batch that covers this layer has to do with it."""
        if route is None or route.bank is not self.bank:
            return BankSettings([], [], [], torch.empty(0, dtype=torch.int64, device=x.device), [], [], "base", ""), []
        plan = route.plan(x.shape[:-1], x.device)
        settings = BankSettings([], [], [], plan.rows, [], [], "base", "", plan.inside)
        factors: list[Tensor] = []
        for span in plan.spans:
            adapter = route.adapters[span.id]
            pair = adapter.factors.get(self.name)
            if pair is None:
                continue
            p = adapter.config.lora_dropout if self.training else 0.0
            p = p if dropout.threshold(p) else 0.0
            settings.scaling.append(pair.scaling)
            settings.dropout_p.append(p)
            settings.rng.extend(adapter.rng_state(route.batch_number(adapter), self.name) if p else (0, 0))
            settings.starts.append(span.start)
            settings.counts.append(span.length)
            factors += pair[:2]
        return settings, factors

    def _apply(self, fn, recurse: bool = True) -> MultiLoRALinear:
        """A move of the layer takes its adapters to the same device; their dtype stays."""
        super()._apply(fn, recurse)
        self.bank.move(self.name, self.weight.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"adapters={len(self.bank)}"
        )
