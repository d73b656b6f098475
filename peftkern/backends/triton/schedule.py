"""Which launches make a direction, in which order: what the backend runs and the traffic model counts.

forward, dx        one_pass: fused          split: shrink, fused         library: shrink, vendor GEMM, fused
the parameters     grad, reduce (grad twice where x needs no gradient: t and dB come from one read of dy)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.backends.triton import launch, select, tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.launch import Direction, Launch, VendorProduct
from peftkern.backends.triton.tiles import LIBRARY, SPLIT
from peftkern.ops.problem import Gradients, LoRAOperands, Needs

Step = Launch | VendorProduct


@dataclass(frozen=True)
class Produced:
    """Z [M, P] and T [M, R], once the steps have run: (y, s) forward, (dx, t) backward."""

    steps: list[Step]
    Z: Tensor
    T: Tensor


def produce(operands: LoRAOperands, X: Tensor, backward: bool, arch: Arch) -> Produced:
    """The steps of one direction, by the schedule that is selected for it."""
    key = select.pass_of(operands.problem(X.shape[0], X.dtype), backward)
    choice = select.choose(key, arch)
    direction = Direction(operands, backward, X.dtype)
    P, _, R = direction.extents
    Z, T = X.new_empty(X.shape[0], P), X.new_empty(X.shape[0], R, dtype=torch.float32)
    steps: list[Step] = []
    if not choice.one_pass:
        followed = choice.schedule == SPLIT and arch.dependent_launch
        steps.append(launch.shrink(direction, X, T, key, arch, followed))
    if choice.schedule == LIBRARY:
        W = operands.weight.materialize(X.dtype)
        steps.append(VendorProduct(X, W if backward else W.T, Z))
    steps.append(launch.fused(direction, X, T, Z, choice, arch))
    return Produced(steps, Z, T)


def gradients(
    operands: LoRAOperands, dy: Tensor, x: Tensor | None, s: Tensor | None, t: Tensor | None, needs: Needs, arch: Arch
) -> tuple[list[Step], Gradients]:
    """The steps of the parameters' gradients, and what they leave (dx is not theirs). t is None where dx is not needed."""
    direction = Direction(operands, True, dy.dtype)
    sums = needs.bias or needs.lora_bias
    thin = s.contiguous() if needs.lora_B and s is not None else None
    wide_dy = dy if needs.lora_B or sums else None
    steps: list[Step] = []
    side_of_dy = None
    if needs.lora_A and t is None:
        t = dy.new_empty(dy.shape[0], operands.lora_A.shape[0], dtype=torch.float32)
        if thin is not None and tiles.grad_gives_t(dy.dtype, t.shape[1], arch):
            first, found = launch.grad(direction, None, None, dy, thin, sums, arch, t_out=t)
            side_of_dy, wide_dy = found.dy, None
            steps.append(first)
        else:
            key = select.pass_of(operands.problem(dy.shape[0], dy.dtype), True)
            steps.append(launch.shrink(direction, dy, t, key, arch))
    x = x if needs.lora_A else None
    if x is None and wide_dy is None and side_of_dy is None:
        return steps, Gradients(None, None, None, None, None)
    if x is not None or wide_dy is not None:
        both, found = launch.grad(direction, x, t if x is not None else None, wide_dy, thin, sums, arch)
        steps.append(both)
    else:
        found = launch.Gradient(None, None)
    found = launch.Gradient(found.x, side_of_dy or found.dy)

    def fresh(needed: bool, like: Tensor | None) -> Tensor | None:
        return torch.empty_like(like, memory_format=torch.contiguous_format) if needed and like is not None else None

    made = Gradients(
        None, fresh(needs.lora_A, operands.lora_A), fresh(needs.lora_B, operands.lora_B),
        fresh(needs.bias, operands.bias), fresh(needs.lora_bias, operands.lora_bias),
    )  # fmt: skip
    steps.append(launch.reduce(direction, found, made.lora_A, made.lora_B, made.bias, made.lora_bias))
    return steps, made
