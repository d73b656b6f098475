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
from peftkern.ops import dispatch, eager, norm
from peftkern.weights import FrozenWeight

SCHEMAS = {s.name.removeprefix("peftkern::"): s for s in torch._C._jit_get_all_schemas() if "peftkern::" in s.name}
BACKENDS = [target.backend for target in CPU_TARGETS]
M, K, N = 5, 40, 7
RANKS, PARTS = (3, 4), (2, 3)  # of two adapters, layers or segments: ranks, and rows of a bank's batch
NEEDS = ("need_A", "need_B", "need_bias", "need_lora_bias")
QUANTISED = {"int8": {}, "int8 in groups": {"group_size": 16}, "fp8": {}, "int4": {"group_size": 16}, "nf4": {}}

OPTIONAL = {"bias", "lora_bias", "scaling_tensor", "inside"}  # what a call may leave out
ADJACENT = {"bank_forward rows", "bank_forward inside", "bank_backward rows", "bank_backward inside", "bank_backward s"}
WORDS = {"w_data": "weight", "w_scale": "weight", "w_tables": "weight", "w_format": "format", "group_size": "weight"}
ANY = {"scaling_tensor": {torch.float64, torch.bfloat16}}  # dtypes that are as good
_BATCH = ("forward x", "forward_adapters x", "forward_shared x", "dropped_product rows", "dropped_product w_data")
LEGAL = {  # sizes that nothing else counts; an index may name more rows than segments do; fp32 beside a 16-bit base
    *itertools.product(_BATCH, ("0 short", "0 long")),
    *itertools.product(("bank_forward x", "bank_forward rows", "bank_backward rows"), ("0 long",)),
    ("row_norm w_data", "torch.bfloat16"),
}


def numbers(*shape: int) -> Tensor:
    """Small whole numbers: whatever the order, their sums are exact."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def calls(operator: str, backend: str) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Calls that fit, and the operands that are to be malformed in each; empty for all of them."""
    dense = {"w_data": numbers(N, K), "w_scale": None, "w_format": "dense", "group_size": 0}
    x, dy, bias, c, state = numbers(M, K), numbers(M, N), numbers(N), torch.tensor(0.5), torch.tensor([3, 2**40])
    A, B = [numbers(r, K) for r in RANKS], [numbers(N, r) for r in RANKS]
    thin = [numbers(M, r) for r in RANKS]
    how, all_five = {"precision": "base", "backend": backend}, dict.fromkeys(("need_x", *NEEDS), True)
    settings = {"scaling": 2.0, "scaling_tensor": c, "dropout_p": 0.5, "rng_state": state}
    one = {"lora_A": A[0], "lora_B": B[0], "bias": bias, "lora_bias": bias, **settings, **how}
    several = {name: [value, value] for name, value in ({"lora_bias": bias} | settings).items()}
    several |= {"lora_A": A, "lora_B": B, **how}
    many = {name: [True, True] for name in NEEDS}
    bank = {
        "weight": numbers(N, K), "bias": bias, "lora_A": A, "lora_B": B, "scaling": [2.0, 1.0], "dropout_p": [0.5, 0.0],
        "rng": [3, 2**40, 4, 5], "rows": torch.tensor([4, 0, 3, 1, 2]), "starts": [0, PARTS[0]], "counts": list(PARTS),
        "inside": None, **how,
    }  # fmt: skip
    at_once = {"need_x": True, "need_pairs": [True, True], "need_bias": True}
    bank_s = numbers(sum(r * rows for r, rows in zip(RANKS, PARTS, strict=True)))
    shared = several | {"weight": [numbers(N, K)] * 2, "bias": [bias, bias]}
    rows = {"rows": x, "dropout_p": 0.5, "rng_state": state, "backend": backend}
    pair = {"lora_A": A[0], "lora_B": B[0], "scaling": 2.0, "scaling_tensor": c}
    table: dict[str, dict[str, Any]] = {
        "forward": {"x": x, **dense, **one, "w_tables": None},
        "backward": {"dy": dy, "x": x, "s": thin[0], **dense, **one, **all_five, "w_tables": None},
        "forward_adapters": {"x": x, **dense, "bias": bias, **several},
        "backward_adapters": {"dy": dy, "x": x, "s": thin, **dense, "bias": bias, **several, "need_x": True,
                              **{name: True if name == "need_bias" else need for name, need in many.items()}},
        "row_norm": {**dense, **pair},
        "dropped_product": {**dense, **rows, "backward": False},
        "bank_forward": {"x": x, **bank},
        "bank_backward": {"dy": dy, "x": x, "s": bank_s, **bank, **at_once},
        "forward_shared": {"x": x, **shared},
        "backward_shared": {"dy": [dy, dy], "x": x, "s": thin, **shared, "need_x": True, **many},
    }  # fmt: skip
    assert operator in table, f"{operator} has no call here: write one that fits"
    call = table[operator]
    yield call, ()
    if operator == "dropped_product":
        yield call | {"rows": dy, "backward": True}, ("rows", "rng_state")
    if "inside" in call and backend == "reference":
        yield call | {"inside": torch.tensor([True, False, True, True, False])}, ("inside",)
    for name, options in QUANTISED.items() if "w_data" in call else ():
        weight = FrozenWeight.quantize(numbers(N, K), name.split()[0], **options)
        held = {"w_data": weight.data, "w_scale": weight.scale, "w_format": weight.format}
        held |= {"group_size": weight.group_size}
        if "w_tables" in call:
            yield call | held | {"w_tables": list(weight.tables) or None}, (*held, "w_tables")
        elif not weight.tables:
            yield call | held, tuple(held)


def spread(value: Tensor) -> Tensor:
    """The same numbers with something between them."""
    wide = torch.ones([2 * size for size in value.shape]).mul(torch.nan).to(value.dtype)
    return wide[tuple(slice(None, None, 2) for _ in value.shape)].copy_(value)


def adjacent(operator: str, name: str) -> bool:
    """Whether an operand has to be contiguous."""
    return name == "rng_state" or f"{operator} {name}" in ADJACENT


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
        yield "list short", value[:-1]
        yield "list long", [*value, value[-1]]
        yield "empty list", []
        for i, entry in enumerate(value):
            others = malformed(name, entry, dense)
            yield from ((f"{i}: {what}", [*value[:i], other, *value[i + 1 :]]) for what, other in others)
    elif name in ("starts", "counts"):
        yield from (("negative", -1), ("too large", M + 1), ("near 2^63", 2**63 - 1))
    elif name == "dropout_p":
        yield from ((str(p), p) for p in (-0.5, 1.5, float("nan")))
    elif name == "group_size" and value:
        yield from (("no power of two", 24), ("another", 2 * value))
    elif isinstance(value, str):
        yield "unknown", "unknown"


class Reached(Exception):
    """A kernel has been run."""


@pytest.fixture
def barred(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend can be called."""

    def reached(*arguments: Any, **options: Any) -> None:
        raise Reached

    names = ["forward", "backward", "accumulate", "accumulate_backward", "forward_shared", "backward_onto", "product"]
    for backend, name in itertools.product(BACKENDS, [*names, "kept", "bank_forward", "bank_backward"]):
        monkeypatch.setattr(type(dispatch.backend_named(backend)), name, reached)
    monkeypatch.setattr(norm, "row_norm", reached)


def ways(operator: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The operator, its fake implementation, and its implementation as the package itself calls it."""
    called = getattr(torch.ops.peftkern, operator)
    order = [argument.name for argument in SCHEMAS[operator].arguments if not argument.kwarg_only]

    def on_meta(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    def fake(call: dict[str, Any]) -> Any:
        return called(**pytree.tree_map_only(Tensor, on_meta, call))

    def undispatched(call: dict[str, Any]) -> Any:
        tables = {"w_tables": call["w_tables"]} if "w_tables" in call else {}
        return getattr(eager, operator)(*(call[name] for name in order), **tables)

    found = {"real": lambda call: called(**call), "fake": fake}
    return found | ({"eager": undispatched} if hasattr(eager, operator) else {})


def applies(way: str, operand: str, what: str) -> bool:
    """A fake sees no values and runs nowhere; the package has its index of rows from a plan, and leaves nothing out."""
    of_values = "value" in what or (operand, what) == ("bank_forward x", "0 short")
    if way == "fake":
        return not (of_values or operand.endswith(" backend") or "another device" in what)
    return way == "real" or not (of_values or "missing" in what)


@pytest.mark.parametrize("operator", SCHEMAS)
def test_what_does_not_fit_is_named_before_a_kernel_runs(operator, barred):
    faults, tried = [], 0
    for backend in BACKENDS:
        for call, chosen in calls(operator, backend):
            with pytest.raises(Reached):
                getattr(torch.ops.peftkern, operator)(**call)
            for name in chosen or call:
                for what, value in malformed(name, call[name], adjacent(operator, name)):
                    if (f"{operator} {name}", what) in LEGAL and "w_data" not in chosen:
                        continue
                    for way, run in ways(operator).items():
                        if applies(way, f"{operator} {name}", what):
                            tried += 1
                            found = outcome(run, call | {name: value}, f"{name}|{WORDS.get(name, name)}")
                            faults += [f"{way} {backend} {call.get('w_format', '')} {name} {what}: {found}"] * (
                                found != ""
                            )
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
        for call, chosen in calls(operator, backend):
            expected = pytree.tree_leaves(called(**call))
            for name in chosen or call:
                if adjacent(operator, name):
                    continue
                value = pytree.tree_map_only(Tensor, spread, call[name])
                found = pytree.tree_leaves(called(**(call | {name: value})))
                if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                    faults.append(f"{backend} {call.get('w_format', '')} {name}")
            assert expected and not any(value.isnan().any() for value in expected)
    assert not faults, faults
