"""One call: every frozen weight that reads one x, and every low-rank update of them.

    y_b = x W_b^T + bias_b + sum over the updates u of base b of  c_u (D_u(x) A_u^T B_u^T + lora_bias_u)

One adapter is a base and an update; several adapters are several updates of one base; layers that share x are several
bases; a bank of adapters is updates that have rows of their own (``Rows``, ``Span``). This is the only place where the
operands are packed, for autograd (``split``) and for the operators (``arguments``), and unpacked again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.weights import FrozenWeight, split_format


@dataclass(frozen=True, slots=True)
class Problem:
    """The key of a pair, or of a call with rows: all that a backend may look at to say whether, and how, it runs it.

    ``dtype`` is the compute dtype (x, y, dense weight); ``adapter_dtype`` that of lora_A and lora_B;
    ``precision`` is "base" (factors rounded to ``dtype``) or "fp32" (factors kept in fp32). Where there are
    ``several_adapters`` in the batch, R is the largest rank; ``ids_on_device``: the host does not know whose rows
    are whose. ``scaled_steps``: e4m3 on both sides, and a scale for every step of what is contracted.
    """

    device_type: str
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    weight_format: str = "dense"
    dropout: bool = False
    bias: bool = False
    lora_bias: bool = False
    precision: str = "base"
    several_adapters: bool = False
    ids_on_device: bool = False
    scaled_steps: bool = False

    @property
    def base_compute(self) -> str | None:
        """The format that the rows of the frozen product are rounded to, or None: a fact of the weight's format."""
        return split_format(self.weight_format)[1]


class Base(NamedTuple):
    """One frozen linear: the weight [N, K], and its bias [N] or None."""

    weight: FrozenWeight
    bias: Tensor | None


class Span(NamedTuple):
    """An update's rows, ``Rows.numbers[start : start + length]`` of x, and the two numbers that key their dropout mask.

    Row number i of the span, not of x, keys the mask, so it does not depend on who else is in the batch.
    """

    start: int
    length: int
    seed: int
    offset: int


class Update(NamedTuple):
    """One low-rank update of a base: lora_A [R, K], lora_B [N, R], lora_bias [N] or None.

    ``scaling`` multiplies the 0-d ``scaling_tensor`` where there is one. ``rng_state`` is int64 [2], and None where
    nothing is dropped (``dropout_p == 0``) or a ``span`` has the numbers. ``base`` is the position of the base.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    scaling_tensor: Tensor | None
    rng_state: Tensor | None
    scaling: float
    dropout_p: float
    base: int = 0
    span: Span | None = None

    @property
    def R(self) -> int:
        """The rank."""
        return self.lora_A.shape[0]


class Rows(NamedTuple):
    """The rows of x by update: ``numbers`` int64 [m] on x's device.

    Where ``inside``, bool [m], is there, the adapters' ids are on a device: a span's length is the most rows that it
    can have, and those that are its own, which come first, are inside.
    """

    numbers: Tensor
    inside: Tensor | None

    def of(self, span: Span) -> tuple[Tensor, Tensor | None]:
        """The numbers of a span's rows, and bool [length, 1]: which of them are its own; None where all are."""
        own = slice(span.start, span.start + span.length)
        return self.numbers[own], None if self.inside is None else self.inside[own].unsqueeze(1)


class Pair(NamedTuple):
    """A base with one update of all rows: what one pass over x multiplies."""

    weight: FrozenWeight
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    lora_bias: Tensor | None
    scaling: float
    scaling_tensor: Tensor | None
    dropout_p: float
    rng_state: Tensor | None
    precision: str

    def update(self) -> Update:
        """The update, without the base."""
        A, B, lora_bias = self.lora_A, self.lora_B, self.lora_bias
        return Update(A, B, lora_bias, self.scaling_tensor, self.rng_state, self.scaling, self.dropout_p)

    def problem(self, M: int, dtype: torch.dtype) -> Problem:
        """The key of a pair with M rows in compute dtype ``dtype``."""
        return Problem(*self.key(M, dtype))

    def key(self, M: int, dtype: torch.dtype) -> tuple:
        """The fields of ``problem``: every call looks its backend up by them, and making an object costs 2 us."""
        weight, A, _, bias, lora_bias, _, _, _, rng_state, precision = self
        N, K = weight.shape
        return (
            A.device.type, M, K, N, A.shape[0], dtype, A.dtype, weight.format,
            rng_state is not None, bias is not None, lora_bias is not None, precision, False, False,
            weight.base_compute is not None and weight.group_size > 0,
        )  # fmt: skip


class Call(NamedTuple):
    """Bases, the updates of them in the order of their bases, and how they are to be multiplied.

    ``precision`` is "base" or "fp32", ``backend`` a name, "auto", or "" for what PEFTKERN_BACKEND says. With ``rows``
    there is one base, and every update has a span.
    """

    bases: tuple[Base, ...]
    updates: tuple[Update, ...]
    precision: str = "base"
    backend: str = ""
    rows: Rows | None = None

    @property
    def thin_size(self) -> int:
        """Elements of s in a call with rows: [length, R] of each update, one behind the other."""
        return sum(update.span.length * update.R for update in self.updates if update.span is not None)

    def parameters(self) -> tuple[list[Tensor | None], ...]:
        """Each base's bias, and each update's lora_A, lora_B and lora_bias: what has gradients, in ``Needs``' order."""
        columns: Iterator[Any] = ([update[field] for update in self.updates] for field in range(3))
        return [bias for _, bias in self.bases], *columns

    def flat_parameters(self) -> list[Tensor | None]:
        """``parameters`` in one list."""
        if len(self.updates) == 1 == len(self.bases):
            return [self.bases[0].bias, *self.updates[0][:3]]
        return [one for column in self.parameters() for one in column]

    def pair(self, i: int, bias: bool = True) -> Pair:
        """Update i with its base; ``bias``: the base's too."""
        A, B, lora_bias, scaling_tensor, rng_state, scaling, p, base, _ = self.updates[i]
        weight, own = self.bases[base]
        own = own if bias else None
        return Pair(weight, A, B, own, lora_bias, scaling, scaling_tensor, p, rng_state, self.precision)

    def pairs(self) -> Iterator[tuple[int, int, bool, Pair]]:
        """For each update its number, its base's number, whether it is the first of its base, and the pair.

        The first of a base has the base's bias.
        """
        last = -1
        for i, update in enumerate(self.updates):
            first = update.base != last
            last = update.base
            yield i, last, first, self.pair(i, first)

    def keys(self, M: int, dtype: torch.dtype) -> tuple[tuple, ...]:
        """The fields of every ``Problem`` in the call."""
        if self.rows is not None:
            return (self._key_of_rows(M, dtype),)
        if len(self.updates) == 1:
            return (self.pair(0).key(M, dtype),)
        return tuple(pair.key(M, dtype) for _, _, _, pair in self.pairs())

    def problem(self, M: int, dtype: torch.dtype) -> Problem:
        """The key of a call that has one: of one update, or with rows."""
        (key,) = self.keys(M, dtype)
        return Problem(*key)

    def _key_of_rows(self, M: int, dtype: torch.dtype) -> tuple:
        ((weight, bias),), updates, rows = self.bases, self.updates, self.rows
        N, K = weight.shape
        return (
            weight.device.type, M, K, N, max((u.R for u in updates), default=0), dtype,
            updates[0].lora_A.dtype if updates else dtype, weight.format, any(u.dropout_p > 0 for u in updates),
            bias is not None, any(u.lora_bias is not None for u in updates), self.precision, True,
            rows is not None and rows.inside is not None, weight.base_compute is not None and weight.group_size > 0,
        )  # fmt: skip


class PairNeeds(NamedTuple):
    """The gradients of a pair that a backend must return; one that is False is not computed."""

    x: bool
    lora_A: bool
    lora_B: bool
    bias: bool
    lora_bias: bool


class PairGradients(NamedTuple):
    """dx [M, K], dA [R, K], dB [N, R], dbias [N], dlora_bias [N]; one is None where it is not needed.

    dx has x's dtype, the others their parameter's (from an fp32 accumulator).
    """

    x: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    lora_bias: Tensor | None


class Needs(NamedTuple):
    """The gradients that a call must return: of x, of each base's bias, and of each update's A, B and lora_bias."""

    x: bool
    bias: Sequence[bool]
    lora_A: Sequence[bool]
    lora_B: Sequence[bool]
    lora_bias: Sequence[bool]

    def of(self, i: int, base: int, first: bool) -> PairNeeds:
        """The needs of update i of a base; the first of a base has the bias's."""
        return PairNeeds(self.x, self.lora_A[i], self.lora_B[i], first and self.bias[base], self.lora_bias[i])


class Gradients(NamedTuple):
    """The gradients of a call: dx is the sum over the bases. One is None where it is not needed."""

    x: Tensor | None
    bias: list[Tensor | None]
    lora_A: list[Tensor | None]
    lora_B: list[Tensor | None]
    lora_bias: list[Tensor | None]

    def asked_for(self) -> list[Tensor]:
        """The gradients that are there, in the fields' order."""
        flat = (self.x, *self.bias, *self.lora_A, *self.lora_B, *self.lora_bias)
        return [gradient for gradient in flat if gradient is not None]


def returned(needs: Needs, found: Sequence[Tensor]) -> Gradients:
    """The opposite of ``Gradients.asked_for``."""
    each = iter(found)
    x = next(each) if needs.x else None
    return Gradients(x, *([next(each) if need else None for need in needed] for needed in needs[1:]))


class Layout(NamedTuple):
    """The constants of a call: all of it beside its tensors."""

    bases: tuple[tuple[str, int, tuple[int, int], int], ...]  # format, group_size, shape, tables
    updates: tuple[tuple[float, float, int, Span | None], ...]  # Update's fields from ``scaling`` on
    precision: str
    backend: str
    rows: bool


UPDATE = 5  # tensors of an update


def split(call: Call) -> tuple[Layout, list[Tensor | None]]:
    """A call as constants and a flat list of tensors, for autograd: ``parameters`` first, column by column; then data,
    scale and tables of each base, scaling_tensor and rng_state of each update, and the tensors of ``Rows``.
    """
    facts = tuple((w.format, w.group_size, w.shape, len(w.tables)) for w, _ in call.bases)
    updates: Any = tuple(update[UPDATE:] for update in call.updates)
    layout = Layout(facts, updates, call.precision, call.backend, call.rows is not None)
    return layout, [*call.flat_parameters(), *others(call)]


def others(call: Call) -> list[Tensor | None]:
    """The tensors of a call that are never trained, in ``split``'s order."""
    found: list[Tensor | None] = []
    for weight, _ in call.bases:
        found += (weight.data, weight.scale, *weight.tables)
    for update in call.updates:
        found += (update.scaling_tensor, update.rng_state)
    return found if call.rows is None else [*found, *call.rows]


def join(layout: Layout, tensors: Sequence[Any]) -> Call:
    """The opposite of ``split``."""
    each, E = iter(tensors), len(layout.updates)
    biases, A, B, lora_bias = (list(itertools.islice(each, count)) for count in (len(layout.bases), E, E, E))
    bases, updates = [], []
    for bias, (format, group_size, shape, tables) in zip(biases, layout.bases, strict=True):
        data, scale, *rest = itertools.islice(each, 2 + tables)
        bases.append(Base(FrozenWeight.from_operands(format, data, scale, group_size, tuple(rest), shape), bias))
    for i, facts in enumerate(layout.updates):
        updates.append(Update(A[i], B[i], lora_bias[i], next(each), next(each), *facts))
    rows = Rows(*each) if layout.rows else None
    return Call(tuple(bases), tuple(updates), layout.precision, layout.backend, rows)


# What both operators take of a call. ``w_facts``: N, K, group size and number of tables of each base; ``spans``: the
# four numbers of each update's span where there are rows.
SCHEMA = (
    "Tensor[] w_data, Tensor?[] w_scale, Tensor[] w_tables, str w_format, int[] w_facts, Tensor?[] bias, "
    "Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_bias, Tensor?[] scaling_tensor, Tensor?[] rng_state, "
    "float[] scaling, float[] dropout_p, int[] base, int[] spans, Tensor? rows, Tensor? inside, "
    "str precision, str backend"
)


def arguments(call: Call) -> list[Any]:
    """A call as the operators take it."""
    weights = [weight for weight, _ in call.bases]
    columns = [list(column) for column in zip(*call.updates, strict=True)] or [[] for _ in Update._fields]
    *fields, spans = columns
    numbers = [number for span in spans if span is not None for number in span]
    facts = [number for w in weights for number in (*w.shape, w.group_size, len(w.tables))]
    rows = (None, None) if call.rows is None else call.rows
    return [
        [w.data for w in weights], [w.scale for w in weights], [table for w in weights for table in w.tables],
        ",".join(w.format for w in weights), facts, [bias for _, bias in call.bases],
        *fields, numbers, *rows, call.precision, call.backend,
    ]  # fmt: skip


def from_arguments(w_data, w_scale, w_tables, w_format, w_facts, bias, *fields_and_rest) -> Call:
    """The opposite of ``arguments``. Raises: ValueError for lists that do not fit each other."""
    *fields, numbers, index, inside, precision, backend = fields_and_rest
    formats = w_format.split(",")
    check_lists(1, w_data=w_data, w_scale=w_scale, w_format=formats, bias=bias, w_facts=w_facts[::4])
    check_lists(0, **dict(zip(Update._fields, fields, strict=False)))
    if len(w_facts) % 4 or sum(w_facts[3::4]) != len(w_tables) or min(w_facts) < 0:
        raise ValueError(f"w_facts has four numbers a base, and {len(w_tables)} tables in all, got {list(w_facts)}")
    bases, tables = [], iter(w_tables)
    for i, (data, scale, format, own) in enumerate(zip(w_data, w_scale, formats, bias, strict=True)):
        facts = w_facts[4 * i : 4 * i + 4]
        bases.append(Base(weight_of(data, scale, list(itertools.islice(tables, facts[3])), format, facts), own))
    spans: list[Span | None] = [None] * len(fields[0])
    if index is not None:
        if len(numbers) != 4 * len(spans):
            raise ValueError(f"spans are four numbers for each of {len(spans)} updates, got {len(numbers)}")
        spans = [Span(*numbers[4 * i : 4 * i + 4]) for i in range(len(spans))]
    elif numbers or inside is not None:
        raise ValueError("spans and inside are for updates of some rows, and there are no rows")
    updates = tuple(map(Update._make, zip(*fields, spans, strict=True)))
    rows = None if index is None else Rows(index, inside)
    return Call(tuple(bases), updates, precision, backend, rows)


def weight_of(
    data: Tensor, scale: Tensor | None, tables: Sequence[Tensor], format: str, facts: Sequence[int]
) -> FrozenWeight:
    """A weight as the operators take it. Raises: ValueError where the facts are not those of the tensors."""
    if len(facts) != 4 or facts[3] != len(tables):
        raise ValueError(f"w_facts is N, K, the group size and the number of tables, {len(tables)}, got {list(facts)}")
    N, K, group_size, _ = facts
    weight = FrozenWeight.from_operands(format, data, scale, group_size, tuple(tables), (N, K))
    if weight.shape != (N, K):
        raise ValueError(f"w_facts says that a weight is {(N, K)}, which is {weight.shape}")
    return weight


def check_lists(least: int, **lists: Sequence[Any]) -> None:
    """Raise ValueError unless all are of one length, ``least`` or more."""
    lengths = set(map(len, lists.values()))
    if len(lengths) > 1 or min(lengths) < least:
        found = ", ".join(f"{name} {len(entries)}" for name, entries in lists.items())
        raise ValueError(f"lists of one call have one length, {least} or more, got {found}")
