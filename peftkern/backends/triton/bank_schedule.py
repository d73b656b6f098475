"""Which launches make a call whose rows have adapters of their own: what the backend runs and the traffic model counts.

y and s, or dx and t, or t alone      bank
dA and dB of all adapters             bank_grad, and a copy of each into a tensor of its own
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.backends.triton import launch, select
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.bank_tiles import bank_tile
from peftkern.backends.triton.launch import Launch, Parted
from peftkern.ops.bank_problem import BankBackward, BankGradients, BankOperands

Step = Launch | Parted


@dataclass(frozen=True)
class Produced:
    """Z, and T of all segments, once the steps have run: (y, s) forward, (dx or None, t) backward."""

    steps: list[Launch]
    Z: Tensor | None
    T: Tensor


@dataclass(frozen=True)
class Backward:
    """Steps in order, and the gradients that they leave."""

    steps: list[Step]
    gradients: BankGradients


def produce(operands: BankOperands, X: Tensor, backward: bool, arch: Arch, product: bool = True) -> Produced:
    """One direction; ``product``: Z as well as T."""
    tile = bank_tile(select.pass_of(operands.problem(X.shape[0], X.dtype), backward), arch)
    X = launch.gathered(X)
    Z = X.new_empty(X.shape[0], operands.weight.shape[1 if backward else 0]) if product else None
    T = X.new_empty(operands.thin_size, dtype=torch.float32)
    return Produced([launch.bank(operands, X, T, Z, tile, arch, backward)], Z, T)


def backward(operands: BankOperands, given: BankBackward, arch: Arch) -> Backward:
    """What is needed of dx and the pairs; a pair of rank 0 is empty, and there is nothing to launch for it."""
    dy, x, s, need_x, need_pairs = given
    dy = launch.gathered(dy)
    asked = [i for i, (one, need) in enumerate(zip(operands.segments, need_pairs, strict=True)) if need and one.R]
    some = any(operands.segments[i].length for i in asked)
    steps: list[Step] = []
    dx, t = None, dy.new_empty(0, dtype=torch.float32)
    if need_x or some:
        produced = produce(operands, dy, True, arch, need_x)
        steps, dx, t = [*produced.steps], produced.Z, produced.T
    pairs: list[tuple[Tensor, Tensor] | None] = [
        (torch.empty_like(one.lora_A), torch.empty_like(one.lora_B)) if need and not one.R else None
        for one, need in zip(operands.segments, need_pairs, strict=True)
    ]
    if asked:
        assert x is not None and s is not None
        both, parted, made = launch.bank_grad(operands, launch.gathered(x), t, dy, s.contiguous(), asked, arch)
        steps += [both, parted]
        for i, pair in zip(asked, made, strict=True):
            pairs[i] = pair
    return Backward(steps, (dx, pairs))
