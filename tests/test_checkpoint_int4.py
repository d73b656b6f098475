"""Linear layers of GPTQ's and AWQ's checkpoints, read as they are; what is not read is refused by its name."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Target
from torch.nn.functional import linear

import peftkern
from peftkern.weights import FrozenWeight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the columns in an int32, from its lowest nibble on
KINDS = ["gptq", "awq"]


def words(rows: list[list[int]], order: tuple[int, ...], bits: int = 4) -> torch.Tensor:
    """int32 [rows, columns * bits / 32], 32 / bits neighbours of a row in each."""
    count = 32 // bits
    found = []
    for row in rows:
        eights = [row[i : i + count] for i in range(0, len(row), count)]
        unsigned = [sum(codes[column] << bits * place for place, column in enumerate(order)) for codes in eights]
        found.append([word - 2**32 if word >= 2**31 else word for word in unsigned])
    return torch.tensor(found, dtype=torch.int32)


def transposed(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def checkpoint(
    kind: str, N: int = 24, K: int = 64, size: int = 32, dtype: torch.dtype = F16
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a layer with every code, and what it is in fp32, one number at a time."""
    generator = torch.Generator().manual_seed(N + K)
    q = torch.randint(16, (K, N), generator=generator).tolist()
    z = torch.randint(1 if kind == "gptq" else 0, 16, (K // size, N), generator=generator).tolist()
    scales = torch.rand(K // size, N, generator=generator).to(dtype)
    s = scales.double().tolist()
    W = [[(q[k][n] - z[k // size][n]) * s[k // size][n] for k in range(K)] for n in range(N)]
    expected = torch.tensor(W, dtype=torch.float64).float()
    if kind == "awq":
        return {"qweight": words(q, AWQ_ORDER), "qzeros": words(z, AWQ_ORDER), "scales": scales}, expected
    stored = [[zero - 1 for zero in row] for row in z]
    plain = tuple(range(8))
    entries = {"qweight": words(transposed(q), plain).T.contiguous(), "qzeros": words(stored, plain), "scales": scales}
    return entries | {"g_idx": torch.tensor([k // size for k in range(K)], dtype=torch.int32)}, expected


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize(("N", "K", "size"), [(24, 64, 32), (8, 128, 128), (40, 48, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoints_layer_is_taken_over_as_it_is(kind, N, K, size, dtype):
    given, expected = checkpoint(kind, N, K, size, dtype)
    entries = {f"model.layers.0.mlp.down_proj.{key}": value for key, value in given.items()}
    name = "model.layers.0.mlp.down_proj.weight"
    bias = {"model.layers.0.mlp.down_proj.bias": torch.ones(N)}
    weight = FrozenWeight.from_state_dict(entries | bias, name)
    assert weight.format == "int4" and weight.shape == (N, K) and weight.group_size == size and weight.dtype == dtype
    for wanted in (F32, BF16, F16):
        assert torch.equal(weight.materialize(wanted), expected.to(wanted))
    again = FrozenWeight.from_state_dict(weight.state_dict(name), name)
    assert torch.equal(again.materialize(F32), expected) and again.dtype == dtype
    given.pop("g_idx", None)
    assert torch.equal(FrozenWeight.from_state_dict(given).materialize(F32), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_layer(kind, target: Target):
    given, expected = checkpoint(kind, 40, 128, 32)
    weight = FrozenWeight.from_state_dict(given)
    A, B = torch.randn(2, 128), torch.randn(40, 2)
    for M in (1, 5):
        x = torch.randn(M, 128)
        wanted = linear(x, expected) + 0.5 * linear(linear(x, A), B)
        y = peftkern.lora_linear(x, weight, A, B, 0.5, backend=target.backend)
        assert (y - wanted).norm() <= 1e-5 * wanted.norm()


def message(entries: dict) -> str:
    with pytest.raises(ValueError) as error:
        FrozenWeight.from_state_dict(entries)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_in_a_checkpoint_names_its_key(kind):
    good, _ = checkpoint(kind)
    assert set(good) == {"qweight", "qzeros", "scales"} | ({"g_idx"} if kind == "gptq" else set())
    for key in ("qweight", "qzeros", "scales"):
        rest = {other: value for other, value in good.items() if other != key}
        assert f"{key} is missing or not a tensor: int4" in message(rest) == message(good | {key: "text"})
        assert f"{key} is a" in message(good | {key: good[key].to(torch.int64 if key != "scales" else torch.float64)})
        assert f"{key} is a" in message(good | {key: good[key][0]})
        for cut in (good[key][:-1], good[key][:, :-1], good[key][:0], good[key][:, :0]):
            text = message(good | {key: cut})
            assert key in text or (key == "scales" and text == f"qzeros is int32 [{len(cut)}, 3], got int32 [2, 3]")
    for value in (math.nan, math.inf, -1.0):
        spoilt = good["scales"].clone()
        spoilt[1, 3] = value
        assert message(good | {"scales": spoilt}).startswith("scales has ")
    assert "qweight has no data" in message({key: value.to("meta") for key, value in good.items()})
    assert "unexpected: weight_scale_inv: int4" in message(good | {"weight_scale_inv": torch.ones(1)})


def test_orders_of_groups_are_gptqs():
    good, expected = checkpoint("gptq")
    wide = good | {"g_idx": good["g_idx"].long()}
    assert torch.equal(FrozenWeight.from_state_dict(wide).materialize(F32), expected)
    for key in (good["g_idx"].flip(0), good["g_idx"][torch.randperm(64)], good["g_idx"] * 0):
        assert "g_idx is not k // 32" in message(good | {"g_idx": key})
    assert "g_idx is int32 [64], got int32 [63]" in message(good | {"g_idx": good["g_idx"][:-1]})
    assert "g_idx is int32 [64], got float32 [64]" in message(good | {"g_idx": good["g_idx"].float()})


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_numbers_of_bits_are_named(bits):
    N, K = 32, 64
    entries = {
        "qweight": torch.zeros(K * bits // 32, N, dtype=torch.int32),
        "qzeros": torch.zeros(2, N * bits // 32, dtype=torch.int32),
        "scales": torch.ones(2, N, dtype=F16),
    }
    assert f"qzeros has zero points of {bits} bits" in message(entries)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_powers_of_two(kind):
    for K, size in ((96, 96), (72, 24), (64, 8)):
        text = message(checkpoint(kind, 8, K, size)[0])
        assert "scales" in text and f"a group's size is a power of two from 16 to 1073741824, not {size}" in text
    whole, expected = checkpoint(kind, 8, 256, 256)  # group_size -1
    assert torch.equal(FrozenWeight.from_state_dict(whole).materialize(F32), expected)


def test_zero_points_that_packages_read_differently_are_refused():
    """What GPTQ stores is one less, and 15 wraps in some; a symmetric checkpoint of gptq_v2 stores 8 everywhere."""
    good, _ = checkpoint("gptq")
    assert "qzeros is 8 everywhere" in message(good | {"qzeros": torch.full_like(good["qzeros"], -0x77777778)})
    symmetric = FrozenWeight.from_state_dict(good | {"qzeros": torch.full_like(good["qzeros"], 0x77777777)})
    assert (symmetric.tables[0] == 8).all()
    spoilt = good["qzeros"].clone()
    spoilt[1, 2] = -1
    assert "qzeros has 15" in message(good | {"qzeros": spoilt})
