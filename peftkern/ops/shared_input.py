"""The operators of several layers that read one x, y_i = x W_i^T + bias_i + c_i (D_i(x) A_i^T B_i^T + lora_bias_i).

The lists hold one entry for each layer. ``forward_shared`` returns every y_i and then every s_i; ``backward_shared``
the gradients asked for: x, which is the sum over the layers, and for each lora_A, lora_B, bias, lora_bias.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peftkern._on_import import on_import
from peftkern.ops import dispatch, flops, inputs
from peftkern.ops.define import define
from peftkern.ops.problem import LoRAOperands, Needs
from peftkern.weights import DenseWeight

_MEMBERS = (
    "Tensor[] weight, Tensor[] lora_A, Tensor[] lora_B, Tensor?[] bias, Tensor?[] lora_bias, float[] scaling, "
    "Tensor?[] scaling_tensor, float[] dropout_p, Tensor?[] rng_state, str precision, str backend"
)
_LISTS = ("weight", "lora_A", "lora_B", "bias", "lora_bias", "scaling", "scaling_tensor", "dropout_p", "rng_state")


def _members(weights, *lists_and_precision) -> list[LoRAOperands]:
    *lists, precision = lists_and_precision
    inputs.check_lists(1, **dict(zip(_LISTS, (weights, *lists), strict=True)))
    columns = [*lists, [precision] * len(weights)]
    return [LoRAOperands(DenseWeight(weight), *fields) for weight, *fields in zip(weights, *columns, strict=True)]


def _given_forward(x: Tensor, *fields) -> list[LoRAOperands]:
    members = _members(*fields)
    for i, operands in enumerate(members):
        inputs.naming(f"layer {i}", inputs.check_forward, operands, x)
    return members


def _forward(x: Tensor, *arguments) -> list[Tensor]:
    *fields, backend = arguments
    ys, thin = zip(*dispatch.forward_shared(_given_forward(x, *fields), x, backend), strict=True)
    return [*ys, *thin]


def _forward_fake(x: Tensor, *arguments) -> list[Tensor]:
    members = _given_forward(x, *arguments[:-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    ys = [x.new_empty(x.shape[0], operands.lora_B.shape[0]) for operands in members]
    return ys + [x.new_empty(x.shape[0], operands.lora_A.shape[0], dtype=wide) for operands in members]


def _given_backward(dys, x, thin, *arguments) -> tuple[list[LoRAOperands], list[Needs], str]:
    *fields, backend, need_x, need_A, need_B, need_bias, need_lora_bias = arguments
    members = _members(*fields)
    inputs.check_lists(
        1, weight=members, dy=dys, s=thin, need_A=need_A, need_B=need_B, need_bias=need_bias,
        need_lora_bias=need_lora_bias,
    )  # fmt: skip
    needs = [Needs(need_x, *need) for need in zip(need_A, need_B, need_bias, need_lora_bias, strict=True)]
    for i, operands in enumerate(members):
        inputs.naming(f"layer {i}", inputs.check_backward, operands, dys[i], x, thin[i], needs[i])
        if dys[i].shape[0] != dys[0].shape[0]:
            raise ValueError(f"each dy has as many rows as x, got {dys[0].shape[0]} and {dys[i].shape[0]}")
        if operands.weight.shape[1] != members[0].weight.shape[1]:
            raise ValueError(f"weights of shapes {members[0].weight.shape} and {operands.weight.shape} share no x")
    return members, needs, backend


def _backward(dys: list[Tensor], x: Tensor | None, thin: list[Tensor | None], *arguments) -> list[Tensor]:
    members, needs, backend = _given_backward(dys, x, thin, *arguments)
    found = dispatch.backward_shared(members, dys, x, thin, needs, backend)
    return [gradient for one in found for gradient in one if gradient is not None]


def _backward_fake(dys: list[Tensor], x, thin, *arguments) -> list[Tensor]:
    members, needs, _ = _given_backward(dys, x, thin, *arguments)
    shapes = [dys[0].new_empty(dys[0].shape[0], members[0].weight.shape[1])] if needs[0].x else []
    for operands, need in zip(members, needs, strict=True):
        parameters = (operands.lora_A, operands.lora_B, operands.bias, operands.lora_bias)
        shapes += [
            p.new_empty(p.shape) for p, wanted in zip(parameters, need[1:], strict=True) if wanted and p is not None
        ]
    return shapes


_define = functools.partial(define, torch.library.Library("peftkern", "FRAGMENT"))
forward = _define(f"forward_shared(Tensor x, {_MEMBERS}) -> Tensor[]", _forward, _forward_fake)
backward = _define(
    f"backward_shared(Tensor[] dy, Tensor? x, Tensor?[] s, {_MEMBERS}, bool need_x, bool[] need_A, bool[] need_B, "
    "bool[] need_bias, bool[] need_lora_bias) -> Tensor[]",
    _backward,
    _backward_fake,
)

on_import("torch.utils.flop_counter", flops.register_shared)
