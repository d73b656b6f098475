"""torch.ops.peftkern called directly: what does not fit is an error that names it, not a read out of bounds.

One generated table: every operator that there is, with each operand malformed in every way that its type knows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import CPU_TARGETS
from torch import Tensor
from torch.utils import _pytree as pytree

import peftkern  # noqa: F401  (defines the operators)
from peftkern.call import Base, Call, Rows, Span, Update, arguments
from peftkern.ops import dispatch, norm, schema
from peftkern.weights import DenseWeight, FrozenWeight

SCHEMAS = {s.name.removeprefix("peftkern::"): s for s in torch._C._jit_get_all_schemas() if "peftkern::" in s.name}
BACKENDS = [target.backend for target in CPU_TARGETS]
M, K, N = 5, 40, 7
RANKS, PARTS = (3, 4), (2, 3)  # of two adapters, layers or segments: ranks, and rows of a bank's batch
QUANTISED = {
    "int8": {}, "int8 in groups": {"group_size": 16}, "fp8": {}, "int4": {"group_size": 16}, "nf4": {}, "mxfp4": {},
    "nvfp4": {},
}  # fmt: skip

OPTIONAL = {"bias", "lora_bias", "scaling_tensor", "inside", "w_scale"}  # what a call may leave out
WORDS = {"w_data": "weight", "w_scale": "weight", "w_tables": "weight|w_facts|tables", "w_format": "format|w_format",
         "w_facts": "weight|w_facts|tables|blocksize|group_size", "spans": "spans|Span|rows", "base": "base",
         "inside": "inside|rows", "bias": "bias|base"}  # fmt: skip
ANY = {"scaling_tensor": {torch.float64, torch.bfloat16}}  # dtypes that are as good


def numbers(*shape: int) -> Tensor:
    """Small whole numbers: whatever the order, their sums are exact."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def weight_of(weight: FrozenWeight | None = None) -> dict[str, Any]:
    """A weight as the operators of DoRA take it."""
    names = ("w_data", "w_scale", "w_tables", "w_format", "w_facts")
    return dict(zip(names, schema.weight_arguments(weight or DenseWeight(numbers(N, K))), strict=True))


def a_call(form: str, backend: str, weight: FrozenWeight | None = None) -> Call:
    """One update of one base, two updates of one, two bases with one each, or two updates of some rows."""
    bias, c, state = numbers(N), torch.tensor(0.5), torch.tensor([3, 2**40])
    bases = [Base(weight or DenseWeight(numbers(N, K)), bias) for _ in range(1 + (form == "shared"))]
    updates = [
        Update(numbers(r, K), numbers(N, r), bias, c, state, 2.0, 0.5, i * (form == "shared"))
        for i, r in enumerate(RANKS[: 1 if form == "one" else 2])
    ]
    if "rows" not in form:
        return Call(tuple(bases), tuple(updates), "base", backend)
    inside = torch.tensor([True, False, True, True, False]) if "device" in form else None
    keys = [(0, PARTS[0], 3, 2**40), (PARTS[0], PARTS[1], 4, 5)]
    updates = [
        one._replace(scaling_tensor=None, rng_state=None, span=Span(*key))
        for one, key in zip(updates, keys, strict=True)
    ]
    return Call(tuple(bases), tuple(updates), "base", backend, Rows(torch.tensor([4, 0, 3, 1, 2]), inside))


def both(call: Call) -> dict[str, dict[str, Any]]:
    """What the two operators of calls take, by name."""
    names = [argument.name for argument in SCHEMAS["forward"].arguments][1:]
    given = dict(zip(names, arguments(call), strict=True))
    thin = [numbers(M, update.R) for update in call.updates]
    if call.rows is not None:
        thin = [numbers(call.thin_size)]
    yes = [True] * len(call.updates)
    needs = {"need_x": True, "need_bias": [True] * len(call.bases), "need_A": yes, "need_B": yes, "need_lora_bias": yes}
    x, dy = numbers(M, K), [numbers(M, N) for _ in call.bases]
    return {"forward": {"x": x, **given}, "backward": {"dy": dy, "x": x, "s": thin, **given, **needs}}


def calls(operator: str, backend: str) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Forms, calls that fit, and the operands that are to be malformed in each; empty for all of them."""
    assert operator in ("forward", "backward", "row_norm", "dropped_product"), f"{operator} has no call here: write one"
    packed = {
        name: FrozenWeight.quantize(numbers(N, K), name.split()[0], **options) for name, options in QUANTISED.items()
    }
    if operator in ("forward", "backward"):
        for form in ("one", "several", "shared", "rows"):
            yield form, both(a_call(form, backend))[operator], ()
        if backend == "reference":
            yield "rows, ids on a device", both(a_call("rows, ids on a device", backend))[operator], ("inside",)
        for name, weight in packed.items():
            for form in ("one", "rows"):
                yield f"{form} {name}", both(a_call(form, backend, weight))[operator], tuple(weight_of())
        return
    x, dy, state = numbers(M, K), numbers(M, N), torch.tensor([3, 2**40])
    if operator == "row_norm":
        others = {"lora_A": numbers(3, K), "lora_B": numbers(N, 3), "scaling": 2.0, "scaling_tensor": torch.tensor(0.5)}
    else:
        others = {"rows": x, "dropout_p": 0.5, "rng_state": state, "backward": False, "backend": backend}
        yield "", weight_of() | others | {"rows": dy, "backward": True}, ("rows", "rng_state")
    yield "", weight_of() | others, ()
    for name, weight in packed.items():
        yield name, weight_of(weight) | others, tuple(weight_of())


def legal(operator: str, form: str, name: str, what: str) -> bool:
    """What fits too: sizes that nothing else counts, an optional part, fp32 beside a 16-bit base."""
    if operator == "dropped_product":
        return (name, what) in {("rows", "0 short"), ("rows", "0 long")} or (name == "w_data" and what in _ROWS_OF_W)
    if operator == "row_norm":
        return (name, what) == ("w_data", "torch.bfloat16") and not form
    if "rows" in form and name == "rows" and what == "0 long":
        return True  # numbers that no span asks for
    if "rows" in form and name == "x" and what in ("0 short", "0 long"):
        return operator == "forward" and what == "0 long"
    if name == "x" and what in ("0 short", "0 long"):
        return operator == "forward"
    if name == "base" and form == "several":
        return False
    return False


_ROWS_OF_W = ("0 short", "0 long")


def spread(value: Tensor) -> Tensor:
    """The same numbers with something between them."""
    wide = torch.ones([2 * size for size in value.shape]).mul(torch.nan).to(value.dtype)
    return wide[tuple(slice(None, None, 2) for _ in value.shape)].copy_(value)


def adjacent(form: str, name: str) -> bool:
    """Whether an operand has to be contiguous."""
    return name in ("rng_state", "inside") or ("rows" in form and name in ("rows", "s"))


def malformed_tensor(name: str, value: Tensor, dense: bool) -> Iterator[tuple[str, Any]]:
    for d, size in enumerate(value.shape):
        yield f"{d} short", value.narrow(d, 0, size - 1)
        yield f"{d} long", torch.cat([value, value.narrow(d, 0, 1)], d)
    yield "one more dimension", value.unsqueeze(0)
    if value.ndim:
        yield "one dimension less", value.select(0, 0)
    for dtype in {torch.int32, torch.float64, torch.bfloat16, torch.float8_e5m2} - {value.dtype} - ANY.get(name, set()):
        yield str(dtype), value.to(dtype)
    yield "another device", value.to("meta")
    if dense:
        yield "strides", spread(value)


def malformed(name: str, value: Any, dense: bool) -> Iterator[tuple[str, Any]]:
    """What an operand must not be instead."""
    if isinstance(value, Tensor):
        yield from malformed_tensor(name, value, dense)
        if name not in OPTIONAL:
            yield "missing", None
        if name == "rows" and value.dtype == torch.int64:
            for row in (-1, M):
                yield f"value {row}", torch.where(value == 1, row, value)
    elif isinstance(value, list):
        if value:
            yield "list short", value[:-1]
            yield "list long", [*value, value[-1]]
            yield "empty list", []
        for i, entry in enumerate(value):
            others = malformed_number(name, entry, i % 4) if name in NUMBERS else malformed(name, entry, dense)
            yield from ((f"{i}: {what}", [*value[:i], other, *value[i + 1 :]]) for what, other in others)
    elif name == "dropout_p":
        yield from ((str(p), p) for p in (-0.5, 1.5, float("nan")))
    elif isinstance(value, str):
        yield "unknown", "unknown"


NUMBERS = ("w_facts", "spans", "base")


def malformed_number(name: str, value: int, field: int) -> Iterator[tuple[str, int]]:
    """One of the four numbers of a weight or a span, or a base's."""
    if name == "base":
        yield from (("negative", -1), ("too large", 2))
    elif name == "spans" and field < 2:  # start and length; the others key a mask
        yield from (("negative", -1), ("too large", M + 1), ("near 2^63", 2**63 - 1))
    elif name == "w_facts" and (field != 2 or value):
        yield from ((f"field {field}: {what}", other) for what, other in (("less", value - 1), ("more", value + 1)))
        if field == 2:
            yield from (("no power of two", 24), ("another", 2 * value))


class Reached(Exception):
    """A kernel has been run."""


@pytest.fixture
def barred(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend can be called."""

    def reached(*arguments: Any, **options: Any) -> None:
        raise Reached

    names = ["forward", "backward", "pair", "pair_backward", "product", "kept"]
    for backend, name in itertools.product(BACKENDS, names):
        monkeypatch.setattr(type(dispatch.backend_named(backend)), name, reached)
    monkeypatch.setattr(norm, "without_autocast", reached)  # which row_norm, no backend's, enters


def ways(operator: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The operator, and its fake implementation."""
    called = getattr(torch.ops.peftkern, operator)

    def on_meta(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    def fake(call: dict[str, Any]) -> Any:
        return called(**pytree.tree_map_only(Tensor, on_meta, call))

    return {"real": lambda call: called(**call), "fake": fake}


def applies(way: str, form: str, name: str, what: str) -> bool:
    """A fake sees no values and runs nowhere."""
    of_values = "value" in what or ("rows" in form and (name, what) == ("x", "0 short"))
    return way == "real" or not (of_values or name == "backend" or "another device" in what)


@pytest.mark.parametrize("operator", SCHEMAS)
def test_what_does_not_fit_is_named_before_a_kernel_runs(operator, barred):
    faults, tried = [], 0
    for backend in BACKENDS:
        for form, call, chosen in calls(operator, backend):
            with pytest.raises(Reached):
                getattr(torch.ops.peftkern, operator)(**call)
            for name in chosen or call:
                for what, value in malformed(name, call[name], adjacent(form, name)):
                    if legal(operator, form, name, what) and "w_data" not in chosen:
                        continue
                    for way, run in ways(operator).items():
                        if applies(way, form, name, what):
                            tried += 1
                            found = outcome(run, call | {name: value}, f"{name}|{WORDS.get(name, name)}")
                            faults += [f"{way} {backend} {form} {name} {what}: {found}"] * (found != "")
    assert tried > 100 and not faults, f"{len(faults)} of {tried}:\n" + "\n".join(faults)


def outcome(run: Callable[[dict[str, Any]], Any], call: dict[str, Any], words: str) -> str:
    """What is wrong with how a call that does not fit ends."""
    try:
        run(call)
    except Reached:
        return "a kernel has run"
    except (ValueError, TypeError, RuntimeError) as error:
        named = re.search(rf"\b({words})\b", str(error))
        return "" if named else f"not named by {type(error).__name__}: {error}"
    return "it has a result"


@pytest.mark.parametrize("operator", SCHEMAS)
def test_strides_change_no_bit(operator):
    """Legal ones, with NaN or other numbers between the elements."""
    called, faults = getattr(torch.ops.peftkern, operator), []
    for backend in BACKENDS:
        for form, call, chosen in calls(operator, backend):
            expected = pytree.tree_leaves(called(**call))
            for name in chosen or call:
                if adjacent(form, name):
                    continue
                value = pytree.tree_map_only(Tensor, spread, call[name])
                found = pytree.tree_leaves(called(**(call | {name: value})))
                if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                    faults.append(f"{backend} {form} {name}")
            assert expected and not any(value.isnan().any() for value in expected)
    assert not faults, faults
