"""DeepSpeed's ZeRO-3 in one process, as a module sees it: parameters without data, and hooks that gather them.

Names and order are those of DeepSpeed 0.19. A module's own parameters, those registered with it, and all within a leaf
module are gathered before its forward and before its backward, and let go of after each. What is let go of becomes NaN,
so whoever has kept it, or reads it too early, is seen.
"""

from __future__ import annotations

import enum
import importlib.machinery
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Status(enum.Enum):
    AVAILABLE, NOT_AVAILABLE, INFLIGHT = 1, 2, 3


class _Linear(torch.autograd.Function):
    """F.linear as DeepSpeed replaces it: it saves the parameter, and no view of it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        y = x @ weight.t()
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, dy):
        (x, weight), (_, needs_weight, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        return dy @ weight, rows.t() @ x.flatten(0, -2) if needs_weight else None, rows.sum(0) if needs_bias else None


class ZeRO3:
    """What ``deepspeed.initialize`` does to a model; ``installed`` puts it where the package would be."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id, parameter.ds_shape = number, parameter.shape
            parameter.ds_parts, parameter.ds_active = parameter.data.clone(), set()
            parameter.all_gather = self._all_gather
            self._let_go(parameter)
        self._register(model)

    @staticmethod
    def installed(monkeypatch: pytest.MonkeyPatch) -> None:
        package = types.ModuleType("deepspeed")
        package.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
        package.zero = types.SimpleNamespace(register_external_parameter=_register_external_parameter)
        monkeypatch.setitem(__import__("sys").modules, "deepspeed", package)
        monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias=None: _Linear.apply(x, weight, bias))

    def held(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if parameter.numel()]

    def prefetch(self, parameter: Any) -> None:
        """Begin to gather: the data has its shape, and is not there yet."""
        parameter.data = torch.full(parameter.ds_shape, torch.nan)
        parameter.ds_status = Status.INFLIGHT

    def _register(self, module: Any) -> None:
        module.ds_id = id(module)
        if getattr(module, "_z3_leaf", False):
            for parameter in module.parameters():
                parameter.ds_z3_leaf_module = module
        else:
            for child in module.children():
                self._register(child)
        self._hook(module)

    def _hook(self, module: Any) -> None:
        def gather(module: Any) -> None:
            for parameter in _of(module):
                self._all_gather([parameter])
                parameter.ds_active.add(module.ds_id)

        def let_go(module: Any) -> None:
            for parameter in _of(module):
                parameter.ds_active.discard(module.ds_id)
                if not parameter.ds_active:
                    self._let_go(parameter)

        def before(module, inputs):
            gather(module)
            return tuple(_Then.apply(x, lambda: let_go(module)) if x.requires_grad else x for x in inputs)

        def after(module, inputs, output):
            let_go(module)
            return _Then.apply(output, lambda: gather(module)) if output.requires_grad else output

        before.__module__ = after.__module__ = "deepspeed.runtime.zero.parameter_offload"
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _all_gather(self, parameters: list[Any]) -> None:
        for parameter in parameters:
            if parameter.ds_status is not Status.AVAILABLE:
                parameter.data, parameter.ds_status = parameter.ds_parts.clone(), Status.AVAILABLE

    def _let_go(self, parameter: Any) -> None:
        if parameter.numel():
            parameter.data.fill_(torch.nan)
        parameter.data, parameter.ds_status = parameter.data.new_empty(0), Status.NOT_AVAILABLE

    def end_of_backward(self) -> None:
        """Let go of what modules whose x needs no gradient still have."""
        for parameter in self.model.parameters():
            parameter.ds_active.clear()
            self._let_go(parameter)


class _Then(torch.autograd.Function):
    """The identity, in whose backward something else happens first."""

    @staticmethod
    def forward(ctx, x: Tensor, do: Any) -> Tensor:
        ctx.do = do
        return x.detach()

    @staticmethod
    def backward(ctx, dx):
        ctx.do()
        return dx, None


def _register_external_parameter(module: Any, parameter: nn.Parameter) -> None:
    module.__dict__.setdefault("_external_params", {})[id(parameter)] = parameter


def _of(module: Any) -> list[Any]:
    own = list(module.parameters(recurse=getattr(module, "_z3_leaf", False)))
    return own + list(module.__dict__.get("_external_params", {}).values())
