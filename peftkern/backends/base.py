"""The interface of a backend to the dispatcher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftkern import dropout
from peftkern.call import Base, Call, Gradients, Needs, Pair, PairGradients, PairNeeds, Problem, Update
from peftkern.weights import FrozenWeight


@dataclass(frozen=True)
class Plan:
    """A backend's way to run a problem: its schedule and tile, and the schedules it refuses, for ``explain``."""

    schedule: str
    tile: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


class Backend(ABC):
    """One implementation. Instances hold no state that a call can change."""

    name: ClassVar[str]

    @abstractmethod
    def unavailable(self) -> str | None:
        """The reason why this backend cannot run at all on this machine, or None."""

    @property
    def broken(self) -> bool:
        """True where it is installed but fails to load, which deserves a warning."""
        return False

    @abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """The reason why this backend cannot run ``problem``, or None."""

    @abstractmethod
    def plan(self, problem: Problem) -> Plan:
        """The schedule and tile it would take."""

    @abstractmethod
    def pair(self, pair: Pair, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y [M, N] in x's dtype and s = D(x) A^T [M, R], unscaled, in fp32 (fp64 for fp64). M >= 1.

        With a contiguous y: y += c s B^T + c lora_bias in place; the weight and ``pair.bias`` have no say then.
        """

    @abstractmethod
    def pair_backward(
        self, pair: Pair, dy: Tensor, x: Tensor | None, s: Tensor | None, dx: Tensor | None, needs: PairNeeds,
        whole: bool = True,
    ) -> PairGradients:  # fmt: skip
        """The needed gradients. x is None unless needs.lora_A, s unless needs.lora_B. dy may have any strides.

        A contiguous dx, None unless needs.x, is added to in place: dy W + c D(dy B A), or without ``whole`` the latter.
        """

    def forward(self, call: Call, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """y [M, N] of each base and s of each update; with rows one s, the spans' [count, R] one behind the other.

        M >= 1. It runs pair after pair, where each has its thin product in its own pass over x.
        """
        if call.rows is not None:
            return self._forward_rows(call, x)
        ys: list[Tensor | None] = [None] * len(call.bases)
        thin = []
        for _, base, _, pair in call.pairs():
            y, s = self.pair(pair, x, ys[base])
            ys[base] = y
            thin.append(s)
        return [self._alone(base, x) if y is None else y for base, y in zip(call.bases, ys, strict=True)], thin

    def backward(
        self, call: Call, dys: Sequence[Tensor], x: Tensor | None, thin: Sequence[Tensor | None], needs: Needs
    ) -> Gradients:
        """Every gradient that is needed; dx, the sum over bases and updates, is made in one buffer. M >= 1."""
        if call.rows is not None:
            return self._backward_rows(call, dys[0], x, thin[0], needs)
        found = no_gradients(call)
        dx = None
        for i, base, first, pair in call.pairs():
            need = needs.of(i, base, first)
            own_x, own_s = x if need.lora_A else None, thin[i] if need.lora_B else None
            one = self.pair_backward(pair, dys[base], own_x, own_s, dx, need, whole=first)
            dx = one.x
            found.lora_A[i], found.lora_B[i], found.lora_bias[i] = one.lora_A, one.lora_B, one.lora_bias
            if first:
                found.bias[base] = one.bias
        for b in set(range(len(call.bases))) - {update.base for update in call.updates}:
            if needs.x:
                own = self.product(call.bases[b].weight, dys[b], True)
                dx = own if dx is None else dx.add_(own)
            found.bias[b] = bias_gradient(call.bases[b].bias, dys[b], needs.bias[b])
        return found._replace(x=dx)

    def product(self, weight: FrozenWeight, rows: Tensor, backward: bool) -> Tensor:
        """rows W^T, or, in ``backward``, rows W. M >= 1."""
        dtype = rows.dtype
        rows, weight = weight.factors(rows, backward)
        W = weight.materialize(rows.dtype)
        return (rows @ W if backward else torch.nn.functional.linear(rows, W)).to(dtype)

    def kept(self, x: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor:
        """x [M, K] where an element survives, else 0 (for a NaN too), unscaled; fresh and contiguous. M >= 1."""
        M, K = x.shape
        keep = dropout.keep_mask(M, K, dropout_p, rng_state)
        return torch.where(keep, x, x.new_zeros(())).contiguous()

    def _product_onto(self, dx: Tensor, weight: FrozenWeight, dy: Tensor) -> Tensor:
        """dx += dy W in place."""
        if weight.base_compute is not None:
            return dx.add_(self.product(weight, dy, True))
        return dx.addmm_(dy, weight.materialize(dy.dtype))

    def _alone(self, base: Base, x: Tensor) -> Tensor:
        """y of a base: with torch's bias in the product where that is one of x's own dtype."""
        rows, weight = base.weight.factors(x, False)
        bias = None if base.bias is None else base.bias.to(rows.dtype)
        return torch.nn.functional.linear(rows, weight.materialize(rows.dtype), bias).to(x.dtype)

    def _forward_rows(self, call: Call, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """``forward`` of a call with rows, update after update, on gathered rows."""
        y = self._alone(call.bases[0], x)
        thin = []
        for _, update, pair, rows, inside in spans(call):
            if update.R:
                own, s = self.pair(pair, only(x[rows], inside), y[rows])
                thin.append(s.flatten())
                y[rows] = own if inside is None else torch.where(inside, own, y[rows])
        wide = torch.promote_types(x.dtype, torch.float32)
        add_lora_bias(call, y)
        return [y], [torch.cat(thin) if thin else x.new_empty(0, dtype=wide)]

    def _backward_rows(self, call: Call, dy: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs) -> Gradients:
        """``backward`` of a call with rows; exact zeros for an update without any."""
        found = no_gradients(call)
        dx = self.product(call.bases[0].weight, dy, True) if needs.x else None
        at = 0
        for i, update, pair, rows, inside in spans(call):
            size = rows.numel() * update.R
            if size:
                own_x = own_s = own_dx = None
                if needs.lora_A[i]:
                    assert x is not None and s is not None
                    own_x, own_s = only(x[rows], inside), s[at : at + size].view(-1, update.R)
                if dx is not None:
                    own_dx = dx[rows]
                need = PairNeeds(needs.x, needs.lora_A[i], needs.lora_A[i], False, False)
                one = self.pair_backward(pair, only(dy[rows], inside), own_x, own_s, own_dx, need, whole=False)
                if dx is not None and own_dx is not None:
                    dx[rows] = own_dx if inside is None else torch.where(inside, own_dx, dx[rows])
                found.lora_A[i], found.lora_B[i] = one.lora_A, one.lora_B
                at += size
        fill_rows(call, dy, needs, found)
        return found._replace(x=dx)


def no_gradients(call: Call) -> Gradients:
    """Gradients that are None each, to be filled."""
    updates = len(call.updates)
    return Gradients(None, [None] * len(call.bases), [None] * updates, [None] * updates, [None] * updates)


def spans(call: Call) -> Iterator[tuple[int, Update, Pair, Tensor, Tensor | None]]:
    """Each update of some rows that has any: its number, it, its pair, which draws its mask from the span, and the
    answer of ``Rows.of``.
    """
    assert call.rows is not None
    for i, update in enumerate(call.updates):
        if update.span is not None and update.span.length:
            pair = call.pair(i, bias=False)._replace(lora_bias=None)
            if update.dropout_p:  # filled in there: a copy from the host could not be captured
                words = [torch.full((), n, dtype=torch.int64, device=pair.lora_A.device) for n in update.span[2:]]
                pair = pair._replace(rng_state=torch.stack(words))
            yield i, update, pair, *call.rows.of(update.span)


def add_lora_bias(call: Call, y: Tensor) -> None:
    """y += c lora_bias of the updates of some rows, in place."""
    if any(update.lora_bias is not None for update in call.updates):
        for _, update, _, rows, inside in spans(call):
            if update.lora_bias is not None:
                added = y[rows] + (update.scaling * update.lora_bias).to(y.dtype)
                y[rows] = added if inside is None else torch.where(inside, added, y[rows])


def fill_rows(call: Call, dy: Tensor, needs: Needs, found: Gradients) -> None:
    """The gradients of a call with rows that are no products: of the biases, and zeros for an update without rows."""
    found.bias[0] = bias_gradient(call.bases[0].bias, dy, needs.bias[0])
    if any(needs.lora_bias):
        for i, update, _, rows, inside in spans(call):
            if needs.lora_bias[i] and update.lora_bias is not None:
                total = _total(only(dy[rows], inside)) * update.scaling
                found.lora_bias[i] = total.to(update.lora_bias.dtype)
    for place, (column, needed) in enumerate(zip(found[2:], needs[2:], strict=True)):
        for i, (gradient, need) in enumerate(zip(column, needed, strict=True)):
            like: Any = call.updates[i][place]
            if need and gradient is None and like is not None:
                column[i] = torch.zeros_like(like)


def _total(dy: Tensor) -> Tensor:
    """The sum over rows, from a wide accumulator and in its dtype."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


def bias_gradient(bias: Tensor | None, dy: Tensor, need: bool) -> Tensor | None:
    """dbias = sum of dy over rows, in the bias's dtype."""
    return None if bias is None or not need else _total(dy).to(bias.dtype)


def only(value: Tensor, inside: Tensor | None) -> Tensor:
    """Zeros in the rows that are another adapter's: neither their values nor their NaN get into a gradient."""
    return value if inside is None else torch.where(inside, value, value.new_zeros(()))


def rounding(problem: Problem) -> str:
    """The words that a plan adds where the frozen product rounds its rows."""
    return " of rows rounded to e4m3" if problem.base_compute else ""


def scaled(value: Tensor, pair: Pair) -> Tensor:
    """c * value, in place and without reading a tensor's value on the host."""
    if pair.scaling_tensor is not None:
        value = value.mul_(pair.scaling_tensor.to(value.dtype))
    return value if pair.scaling == 1.0 else value.mul_(pair.scaling)


def bias_gradients(pair: Pair, dy: Tensor, needs: PairNeeds) -> tuple[Tensor | None, Tensor | None]:
    """dbias = sum dy and dlora_bias = c sum dy over rows, in the parameters' dtypes."""
    dbias = bias_gradient(pair.bias, dy, needs.bias)
    if pair.lora_bias is None or not needs.lora_bias:
        return dbias, None
    return dbias, scaled(_total(dy), pair).to(pair.lora_bias.dtype)
