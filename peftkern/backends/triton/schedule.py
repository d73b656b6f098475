"""The launches of a call, in their order: the backend runs them, and the traffic model counts them.

    forward, dx        one_pass: fused          split: shrink, fused         library: shrink, fused, vendor GEMM
                       each after decode, where a quantised weight is decoded once; library always does
                       base_compute "fp8": quantise, shrink, fused; T is that of x as it is
    the parameters     grad, reduce (grad twice where x needs no gradient: t and dB come from one read of dy)
    with rows          bank (y and s, or dx and t, or t alone), after decode where the weight is quantised;
                       bank_grad (dA and dB of all updates), and a copy of each into a tensor of its own

Where they are large, the parameters' gradients, which wait for memory, run beside dx, which waits for the tensor cores:
all of them where ``shrink`` has made t before; dB alone, and dA afterwards, where dx's own pass makes t.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftkern import _env
from peftkern.backends.base import no_gradients
from peftkern.backends.triton import launch, select, tiles
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.launch import Direction, Gradient, Launch, Parted, VendorProduct
from peftkern.backends.triton.tiles import LIBRARY, SPLIT
from peftkern.call import Call, Gradients, Needs, Pair, PairGradients, PairNeeds

Step = Launch | VendorProduct | Parted

OVERLAP_BYTES = 64 * 2**20  # of x and dy: below, a fork and a join of streams cost what they save


@dataclass(frozen=True)
class Produced:
    """Z [M, P] and T [M, R], once the steps have run: (y, s) forward, (dx, t) backward. ``first`` makes T alone."""

    first: list[Step]
    rest: list[Step]
    Z: Tensor
    T: Tensor

    @property
    def steps(self) -> list[Step]:
        """All steps of the direction."""
        return [*self.first, *self.rest]


@dataclass(frozen=True)
class Backward:
    """Steps in order; ``beside`` may run while ``steps`` does, between ``before`` and ``after``."""

    gradients: PairGradients
    before: list[Step] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    beside: list[Step] = field(default_factory=list)
    after: list[Step] = field(default_factory=list)

    @property
    def all(self) -> list[Step]:
        """All steps, in an order that is right on one stream."""
        return [*self.before, *self.steps, *self.beside, *self.after]


def produce(
    operands: Pair, X: Tensor, backward: bool, arch: Arch, forked: bool = False, onto: Tensor | None = None
) -> Produced:
    """The steps of one direction, by the schedule that is selected for it. ``forked``: others start after ``first``.

    ``onto``: a Z that holds its product with the frozen weight, and perhaps more; the low-rank pair is added to it.
    """
    X = launch.near(X)
    if onto is not None:  # its weight is not read
        operands = operands._replace(weight=operands.weight.with_base_compute(None))
    key = select.pass_of(operands.problem(X.shape[0], X.dtype), backward)
    choice = select.choose(key, arch) if onto is None else select.accumulating(key, arch)
    first: list[Step] = []
    rest: list[Step] = []
    if onto is None and tiles.decodes(key.problem.weight_format, choice):
        decoding, dense = launch.decode(operands.weight, X.dtype)
        operands = operands._replace(weight=dense)
        first.append(decoding)
    direction = Direction(operands, backward, X.dtype)
    P, _, R = direction.extents
    Z, T = X.new_empty(X.shape[0], P) if onto is None else onto, X.new_empty(X.shape[0], R, dtype=torch.float32)
    dependent = choice.schedule == SPLIT and arch.dependent_launch and not forked
    if not choice.one_pass:
        first.append(launch.shrink(direction, X, T, key, arch, followed=dependent))
    rows: Tensor | launch.Codes = X
    if key.problem.base_compute is not None:
        quantising, rows = launch.quantise(operands.weight, X, backward)
        first.insert(0, quantising)
    rest.append(launch.fused(direction, rows, T, Z, choice, arch, dependent, onto is not None))
    if choice.schedule == LIBRARY and onto is None:
        W = operands.weight.data
        rest.append(VendorProduct(X, W if backward else W.T, Z))
    return Produced(first, rest, Z, T)


def backward(
    operands: Pair,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    needs: PairNeeds,
    arch: Arch,
    onto: Tensor | None = None,
) -> Backward:
    """The steps of every gradient that is needed. ``onto``: the dx that this adapter's share is added to."""
    sums = needs.bias or needs.lora_bias
    dy = launch.near(dy)
    side_x = launch.near(x) if needs.lora_A and x is not None else None
    side_dy = dy if needs.lora_B or sums else None
    thin = s.contiguous() if needs.lora_B and s is not None else None
    wide = [side for side in (side_x, side_dy) if side is not None]
    if not needs.x:
        return _without_dx(operands, dy, side_x, thin, needs, arch)
    large = sum(side.numel() * side.itemsize for side in wide) >= OVERLAP_BYTES
    overlapped = bool(wide) and large and _env.settings().overlap
    produced = produce(operands, dy, True, arch, overlapped, onto)
    if not wide:
        return Backward(PairGradients(produced.Z, None, None, None, None), steps=produced.steps)
    direction = Direction(operands, True, dy.dtype)
    t = produced.T
    if not overlapped or produced.first or side_x is None or side_dy is None:
        both, found = launch.grad(direction, side_x, t if side_x is not None else None, side_dy, thin, sums, arch)
        last, made = _reduced(direction, found, needs)
        made = made._replace(x=produced.Z)
        if overlapped and (produced.first or side_x is None):
            return Backward(made, produced.first, produced.rest, [both, last])
        return Backward(made, steps=produced.steps, after=[both, last])
    of_dy, found_dy = launch.grad(direction, None, None, side_dy, thin, sums, arch)
    of_x, found_x = launch.grad(direction, side_x, t, None, None, False, arch)
    last, made = _reduced(direction, Gradient(found_x.x, found_dy.dy), needs)
    return Backward(made._replace(x=produced.Z), [], produced.rest, [of_dy], [of_x, last])


def _without_dx(
    operands: Pair, dy: Tensor, x: Tensor | None, thin: Tensor | None, needs: PairNeeds, arch: Arch
) -> Backward:
    """The parameters alone: t and dB from one read of dy where one launch can do both."""
    direction = Direction(operands, True, dy.dtype)
    sums = needs.bias or needs.lora_bias
    steps: list[Step] = []
    side_dy, of_dy, t = (dy if thin is not None or sums else None), None, None
    if x is not None:
        t = dy.new_empty(dy.shape[0], operands.lora_A.shape[0], dtype=torch.float32)
        if thin is not None and tiles.grad_gives_t(dy.dtype, t.shape[1], operands.precision, arch):
            first, found = launch.grad(direction, None, None, dy, thin, sums, arch, t_out=t)
            side_dy, of_dy = None, found.dy
        else:
            key = select.pass_of(operands.problem(dy.shape[0], dy.dtype), True)
            first = launch.shrink(direction, dy, t, key, arch)
        steps.append(first)
    found = Gradient(None, None)
    if x is not None or side_dy is not None:
        rest, found = launch.grad(direction, x, t, side_dy, thin, sums, arch)
        steps.append(rest)
    if not steps:
        return Backward(PairGradients(None, None, None, None, None))
    last, made = _reduced(direction, Gradient(found.x, of_dy or found.dy), needs)
    return Backward(made, steps=[*steps, last])


def _reduced(direction: Direction, found: Gradient, needs: PairNeeds) -> tuple[Launch, PairGradients]:
    """The second stage, and the fresh gradients that it writes; dx is not among them."""
    operands = direction.operands

    def fresh(needed: bool, like: Tensor | None) -> Tensor | None:
        return torch.empty_like(like, memory_format=torch.contiguous_format) if needed and like is not None else None

    made = PairGradients(
        None, fresh(needs.lora_A, operands.lora_A), fresh(needs.lora_B, operands.lora_B),
        fresh(needs.bias, operands.bias), fresh(needs.lora_bias, operands.lora_bias),
    )  # fmt: skip
    return launch.reduce(direction, found, made.lora_A, made.lora_B, made.bias, made.lora_bias), made


def produce_rows(
    call: Call, X: Tensor, backward: bool, arch: Arch, product: bool = True
) -> tuple[list[Step], Tensor | None, Tensor]:
    """One direction of a call with rows: the steps, Z, and T of all spans; without ``product`` T alone."""
    key = select.pass_of(call.problem(X.shape[0], X.dtype), backward)
    choice = select.choose(key, arch)
    X = launch.gathered(X)
    weight, steps = call.bases[0].weight, list[Step]()
    if tiles.decodes(weight.format, choice):
        decoding, weight = launch.decode(weight, X.dtype)
        call = call._replace(bases=(call.bases[0]._replace(weight=weight),))
        if product:
            steps.append(decoding)
    Z = X.new_empty(X.shape[0], key.P) if product else None
    T = X.new_empty(call.thin_size, dtype=torch.float32)
    return [*steps, launch.bank(call, X, T, Z, choice.tile, arch, backward)], Z, T


def backward_rows(
    call: Call, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs, arch: Arch
) -> tuple[list[Step], Gradients]:
    """The needed gradients of x and the factors; those of rank 0 are empty, and nothing is launched for them."""
    dy = launch.gathered(dy)
    asked = [i for i, (update, need) in enumerate(zip(call.updates, needs.lora_A, strict=True)) if need and update.R]
    spans = [call.updates[i].span for i in asked]
    steps: list[Step] = []
    found = no_gradients(call)
    dx, t = None, dy.new_empty(0, dtype=torch.float32)
    if needs.x or any(span is not None and span.length for span in spans):
        steps, dx, t = produce_rows(call, dy, True, arch, needs.x)
    if asked:
        assert x is not None and s is not None
        both, parted, made = launch.bank_grad(call, launch.gathered(x), t, dy, s.contiguous(), asked, arch)
        steps += [both, parted]
        for i, (dA, dB) in zip(asked, made, strict=True):
            found.lora_A[i], found.lora_B[i] = dA, dB
    return steps, found._replace(x=dx)
