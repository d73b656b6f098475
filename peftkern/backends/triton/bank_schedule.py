"""The launches of a call with rows: the backend runs them, and the traffic model counts them.

y and s, or dx and t, or t alone      bank, after decode where the weight is quantised
dA and dB of all updates              bank_grad, and a copy of each into a tensor of its own
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.backends.base import no_gradients
from peftkern.backends.triton import launch, select
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.bank_tiles import bank_tile
from peftkern.backends.triton.launch import Launch, Parted
from peftkern.call import Call, Gradients, Needs

Step = Launch | Parted


@dataclass(frozen=True)
class Produced:
    """Z, and T of all spans, once the steps have run: (y, s) forward, (dx or None, t) backward."""

    steps: list[Launch]
    Z: Tensor | None
    T: Tensor


@dataclass(frozen=True)
class Backward:
    """Steps in order, and the gradients that they leave."""

    steps: list[Step]
    gradients: Gradients


def produce(call: Call, X: Tensor, backward: bool, arch: Arch, product: bool = True) -> Produced:
    """One direction; ``product``: Z as well as T."""
    tile = bank_tile(select.pass_of(call.problem(X.shape[0], X.dtype), backward), arch)
    X = launch.gathered(X)
    weight, steps = call.bases[0].weight, []
    if weight.format != "dense":
        decoding, weight = launch.decode(weight, X.dtype)
        if product:
            steps.append(decoding)
    Z = X.new_empty(X.shape[0], weight.shape[1 if backward else 0]) if product else None
    T = X.new_empty(call.thin_size, dtype=torch.float32)
    decoded = call._replace(bases=(call.bases[0]._replace(weight=weight),))
    steps.append(launch.bank(decoded, X, T, Z, tile, arch, backward))
    return Produced(steps, Z, T)


def backward(call: Call, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs, arch: Arch) -> Backward:
    """The needed gradients of x and the factors; those of rank 0 are empty, and nothing is launched for them."""
    dy = launch.gathered(dy)
    asked = [i for i, (update, need) in enumerate(zip(call.updates, needs.lora_A, strict=True)) if need and update.R]
    some = any(span is not None and span.length for i in asked for span in (call.updates[i].span,))
    steps: list[Step] = []
    found = no_gradients(call)
    dx, t = None, dy.new_empty(0, dtype=torch.float32)
    if needs.x or some:
        produced = produce(call, dy, True, arch, needs.x)
        steps, dx, t = [*produced.steps], produced.Z, produced.T
    if asked:
        assert x is not None and s is not None
        both, parted, made = launch.bank_grad(call, launch.gathered(x), t, dy, s.contiguous(), asked, arch)
        steps += [both, parted]
        for i, (dA, dB) in zip(asked, made, strict=True):
            found.lora_A[i], found.lora_B[i] = dA, dB
    return Backward(steps, found._replace(x=dx))
