"""``MultiLoRALinear``: a frozen nn.Linear under a bank of adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkern import dropout
from peftkern.bank.bank import AdapterBank
from peftkern.bank.routes import Route, current_route
from peftkern.call import Rows, Span, Update
from peftkern.integrations import quantised
from peftkern.multi_lora import run_rows
from peftkern.nn.lora_linear import why_not_linear
from peftkern.weights import DenseWeight


def why_not_served(module: nn.Module) -> str | None:
    """The reason why a bank cannot take the module's place, or None: for a linear that is plain or quantised."""
    return None if quantised.is_quantised(module) else why_not_linear(module)


class MultiLoRALinear(nn.Module):
    """A linear layer whose weight is frozen and of whose rows each takes one of a bank's adapters, or none.

    Formula:
        y[m] = x[m] W^T + bias + c_e (D_e(x_e) A_e^T)[i] B_e^T for row m, which is row i of those of adapter e.

    Args:
        linear: an nn.Linear, or GPT-2's ``Conv1D``, whose parameters are shared and frozen; or a layer of bitsandbytes
            (4 or 8 bits), which becomes the child ``base_layer``: its weight is read where it lies, and y is in x's
            dtype, as bitsandbytes' own is.
        bank: the adapters; the layer is attached to it.
        name: of the layer in the model: what its tensors are called in an adapter's file.

    Which row takes which adapter is what ``with peftkern.route(ids)`` says, or the ``route`` argument; without either,
    or where the route is of another bank, every row is the base. Adapters are no parameters of this module: they belong
    to the bank (``bank.parameters(name)``, ``bank.save``), so state_dict is that of the base.

    Raises: TypeError for a module that is no plain linear; ValueError at the call where the ids do not fit x.
    Numerics, Deterministic: as ``multi_lora_linear``. A row of the base has the bits that it has without adapters.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    base_layer: nn.Module | None

    def __init__(self, linear: nn.Linear | Any, bank: AdapterBank, name: str) -> None:
        super().__init__()
        given: Any = linear
        reason = why_not_served(linear)
        if reason is not None:
            raise TypeError(f"{name} cannot carry adapters: {reason}")
        if quantised.is_quantised(linear):
            self.base_layer, self.weight = given, None
            self.register_parameter("bias", None)
            self.out_features, self.in_features = given.out_features, given.in_features
        else:
            self.base_layer = None
            by_row = isinstance(linear, nn.Linear)
            self.weight = given.weight if by_row else nn.Parameter(given.weight.detach().t(), requires_grad=False)
            self.register_parameter("bias", given.bias)
            self.out_features, self.in_features = map(int, self.weight.shape)
        self.requires_grad_(False)
        self.bank, self.name = bank, name
        self.train(linear.training)
        bank.attach(name, self)

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """y [..., N] for x [..., K]."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x is [..., {self.in_features}], got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"all tensors must be on one device, got x on {x.device}, weight on {self.device}")
        updates, rows = self._updates(x, current_route() if route is None else route)
        if self.weight is not None:
            return run_rows(x, DenseWeight(self.weight), self.bias, updates, rows)
        found = quantised.frozen(self.base_layer)
        if isinstance(found, str):
            raise RuntimeError(f"{self.name}: {found}")
        return quantised.run_rows(x, found[0], self.base_layer.bias, found[1], updates, rows)  # type: ignore[union-attr, arg-type]

    @property
    def device(self) -> torch.device:
        """The weight's device."""
        weight: Any = self.weight if self.base_layer is None else self.base_layer.weight
        return weight.device

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The factors' dtype: fp32 beside anything narrower."""
        return torch.float32 if self.weight is None else torch.promote_types(self.weight.dtype, torch.float32)

    def _updates(self, x: Tensor, route: Route | None) -> tuple[list[Update], Rows]:
        """An update for each adapter of the batch that covers this layer, and the rows of the batch."""
        updates: list[Update] = []
        if route is None or route.bank is not self.bank:
            return updates, Rows(torch.empty(0, dtype=torch.int64, device=x.device), None)
        plan = route.plan(x.shape[:-1], x.device)
        for id, start, count in plan.spans:
            adapter = route.adapters[id]
            factors = adapter.factors.get(self.name)
            if factors is None:
                continue
            p = adapter.config.lora_dropout if self.training else 0.0
            p = p if dropout.threshold(p) else 0.0
            key = adapter.rng_state(route.batch_number(adapter), self.name) if p else (0, 0)
            A, B, scaling = factors
            updates.append(Update(A, B, None, None, None, scaling, p, 0, Span(start, count, *key)))
        return updates, Rows(plan.rows, plan.inside)

    def _apply(self, fn, recurse: bool = True) -> MultiLoRALinear:
        """A move of the layer takes its adapters to the same device; their dtype stays."""
        super()._apply(fn, recurse)
        self.bank.move(self.name, self.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"adapters={len(self.bank)}"
        )
