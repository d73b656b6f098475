"""torch.ops.peftkern called directly: what does not fit is an error with names and values, not a read out of bounds."""

from __future__ import annotations

import pytest
import torch
from conftest import Case, Target, make

import peftkern  # noqa: F401  (defines the operators)

M, K, N, R = 5, 12, 7, 3
NAMES = ["x", "w_data", "lora_A", "lora_B", "bias", "lora_bias"]


def operands(backend: str, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    t = make(Case(M, K, N, R, dtype, torch.float32, 0.5, bias=True, lora_bias=True))
    return {
        "x": t.x, "w_data": t.weight, "w_scale": None, "w_format": "dense", "group_size": 0, "lora_A": t.lora_A,
        "lora_B": t.lora_B, "bias": t.bias, "lora_bias": t.lora_bias, "scaling": 2.0, "scaling_tensor": None,
        "dropout_p": 0.5, "rng_state": t.rng_state, "precision": "base", "backend": backend,
    }  # fmt: skip


def forward(backend: str, dtype: torch.dtype = torch.float32, **changes):
    return torch.ops.peftkern.forward(**(operands(backend, dtype) | changes))


def backward(backend: str, dtype: torch.dtype = torch.float32, **changes):
    given = operands(backend, dtype)
    _, s = torch.ops.peftkern.forward(**given)
    needs = dict.fromkeys(("need_x", "need_A", "need_B", "need_bias", "need_lora_bias"), True)
    return torch.ops.peftkern.backward(dy=torch.ones(M, N, dtype=dtype), **(given | {"s": s} | needs | changes))


WRONG = [
    ("x", torch.zeros(M, K + 1), ValueError, f"({M}, {K + 1})"),
    ("x", torch.zeros(M, K, 1), ValueError, f"({M}, {K}, 1)"),
    ("w_data", torch.zeros(K), ValueError, f"({K},)"),
    ("w_data", torch.zeros(N + 1, K), ValueError, f"({N + 1}, {K})"),
    ("lora_A", torch.zeros(R, K - 1), ValueError, f"({R}, {K - 1})"),
    ("lora_A", torch.zeros(()), ValueError, "lora_A"),
    ("lora_B", torch.zeros(N, R + 1), ValueError, f"({N}, {R + 1})"),
    ("bias", torch.zeros(N - 1), ValueError, f"({N - 1},)"),
    ("lora_bias", torch.zeros(1, N), ValueError, f"(1, {N})"),
    ("x", torch.zeros(M, K, dtype=torch.float64), TypeError, "float64"),
    ("w_data", torch.zeros(N, K, dtype=torch.bfloat16), TypeError, "bfloat16"),
    ("lora_A", torch.zeros(R, K, dtype=torch.float16), TypeError, "float16"),
    ("bias", torch.zeros(N, dtype=torch.int32), TypeError, "int32"),
    ("rng_state", torch.zeros(1, dtype=torch.int64), ValueError, "(1,)"),
    ("rng_state", torch.zeros(2, dtype=torch.int32), ValueError, "int32"),
    ("rng_state", torch.zeros(4, dtype=torch.int64)[::2], ValueError, "stride (2,)"),
    ("rng_state", None, ValueError, "rng_state"),
    ("scaling_tensor", torch.ones(2), ValueError, "(2,)"),
]


@pytest.mark.parametrize("call", [forward, backward])
@pytest.mark.parametrize(("name", "value", "error", "words"), WRONG, ids=[f"{w[0]}-{w[3]}" for w in WRONG])
def test_what_does_not_fit_is_named(backend, call, name, value, error, words):
    with pytest.raises(error) as caught:
        call(backend, **{name: value})
    assert words in str(caught.value)


@pytest.mark.parametrize("call", [forward, backward])
@pytest.mark.parametrize("name", [*NAMES, "rng_state"])
def test_two_devices(backend, call, name):
    with pytest.raises(ValueError, match="meta") as caught:
        call(backend, **{name: operands(backend)[name].to("meta")})
    assert "cpu" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("dy", torch.zeros(M, N + 1), f"({M}, {N + 1})"),
        ("dy", torch.zeros(M - 1, N), f"({M}, {K})"),
        ("x", None, f"x is torch.float32 ({M}, {K})"),
        ("s", None, f"s is torch.float32 ({M}, {R})"),
        ("s", torch.zeros(M, R - 1), f"({M}, {R - 1})"),
        ("s", torch.zeros(M, R, dtype=torch.bfloat16), "bfloat16"),
    ],
    ids=str,
)
def test_backward_alone(backend, name, value, words):
    given = operands(backend)
    _, s = torch.ops.peftkern.forward(**given)
    needs = dict.fromkeys(("need_x", "need_A", "need_B", "need_bias", "need_lora_bias"), True)
    with pytest.raises((ValueError, TypeError)) as caught:
        torch.ops.peftkern.backward(**({"dy": torch.zeros(M, N)} | given | {"s": s} | needs | {name: value}))
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_s_do_not_matter(backend, dtype, poisoned):
    _, s = forward(backend, dtype)
    spread = torch.full((M, 2 * R), torch.nan)[:, ::2].copy_(s)
    expected, found = backward(backend, dtype, s=s), backward(backend, dtype, s=spread)
    assert len(found) == 5 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_int8_operands_are_checked(target: Target):
    if target.device != "cpu":
        pytest.skip("this test is about the CPU")
    data = torch.zeros(N, K, dtype=torch.int8)
    for scale in (None, torch.ones(N - 1), torch.ones(N, dtype=torch.float64)):
        with pytest.raises(ValueError, match="weight.scale"):
            forward(target.backend, w_data=data, w_scale=scale, w_format="int8")
