"""Every registered weight format: what it decodes to, what it survives, and that the products see just that."""

import contextlib
import copy
import io

import pytest
import torch
from conftest import NAMES, Case, Target, make, run
from instruction_sets import SETS, kernels

import peftkern
from peftkern.backends.cpp import call
from peftkern.call import Problem
from peftkern.ops import dispatch
from peftkern.weights import FP8Weight, FrozenWeight, Int4Weight, Int8Weight, formats

# Each with the largest error that a step of its grid allows, relative to the largest of what shares a scale.
GRIDS = {
    "int8": (0.5 / 127, [{}, {"group_size": 32}]),
    "int4": (1 / 15, [{}, {"group_size": 16}]),  # half a step of its own, half of the zero point's
    "nf4": (0.153, [{}, {"blocksize": 256, "double_quant": False}]),
    "fp4": (0.168, [{}, {"blocksize": 32, "double_quant": False}]),
    "mxfp4": (0.25, [{}]),  # 8 saturates at 6
    "nvfp4": (0.178, [{}]),  # half of 4 to 6, and a sixteenth of the scale
    "fp8": (16 / 448, [{}, {"scaling": "tensor"}, {"scaling": "block"}]),
}
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
QUANTISED = [(name, options) for name, (_, every) in GRIDS.items() for options in every]
SHAPES = [(1, 1), (3, 65), (5, 4304 // 16), (130, 257), (64, 128)]


def normal(N: int, K: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)).to(dtype)


def same(one: FrozenWeight, other: FrozenWeight) -> bool:
    facts = [(w.format, w.shape, w.group_size, w.dtype, w.device) for w in (one, other)]
    bits = [[t.contiguous().view(torch.uint8) for t in w.tensors] for w in (one, other)]
    return facts[0] == facts[1] and all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_every_format_is_covered():
    assert set(GRIDS) | {"dense"} == set(formats())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), QUANTISED, ids=str)
def test_round_trip(name, options, shape):
    """Within half a step, zeros stay zeros, and what is decoded in fp32 is rounded once."""
    W = normal(*shape)
    W[0] = 0
    weight = FrozenWeight.quantize(W, name, **options)
    decoded = weight.materialize(F32)
    assert decoded.shape == shape == weight.shape and decoded.dtype == F32
    slack = 1.03 if options.get("double_quant", "4" in name[1:]) else 1 + 1e-5  # the scales have errors of their own
    assert (decoded - W).abs().max() <= GRIDS[name][0] * W.abs().max() * slack
    assert not decoded[0].any() or weight.group_size  # a group may hold more than the row
    for dtype in (BF16, F16, F64):
        assert torch.equal(weight.materialize(dtype), decoded.to(dtype))
    again = FrozenWeight.quantize(W, name, **options)
    assert same(weight, again)


@pytest.mark.parametrize("name", formats())
def test_all_zeros(name):
    for shape in ((1, 1), (3, 5), (64, 96)):
        weight = FrozenWeight.quantize(torch.zeros(shape), name)
        assert torch.equal(weight.materialize(F32), torch.zeros(shape))


@pytest.mark.parametrize(("name", "options"), [("dense", {}), *QUANTISED], ids=str)
def test_copies_are_the_same_weight(name, options):
    weight = FrozenWeight.quantize(normal(30, 77, BF16), name, **options)
    assert weight.dtype == BF16
    assert weight.to("cpu") is weight
    file = io.BytesIO()
    torch.save(weight, file)  # torch's plain pickle has no fp8
    file.seek(0)
    assert same(copy.deepcopy(weight), weight) and same(torch.load(file, weights_only=False), weight)
    rebuilt = FrozenWeight.from_operands(
        name, weight.data, weight.scale, weight.group_size, weight.tables, weight.shape
    )
    assert torch.equal(rebuilt.materialize(F32), weight.materialize(F32))
    meta = weight.to("meta")
    assert meta.device.type == "meta" and meta.shape == weight.shape and meta.dtype == BF16
    assert meta.materialize(BF16).shape == weight.shape
    assert meta.nbytes == weight.nbytes


@pytest.mark.parametrize(("name", "options"), [("dense", {}), *QUANTISED], ids=str)
def test_state_dict_is_bit_exact_and_has_no_pickle(name, options):
    weight = FrozenWeight.quantize(normal(30, 77, F16), name, **options)
    file = io.BytesIO()
    torch.save(weight.state_dict("a.weight") | {"a.bias": torch.zeros(3)}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in found.values())
    assert same(FrozenWeight.from_state_dict(found, "a.weight"), weight)


@pytest.mark.parametrize(("name", "options"), QUANTISED, ids=str)
def test_corrupt_entries_name_their_key(name, options):
    """One entry at a time: missing, of another length, of another dtype, with a NaN or a negative scale."""
    good = FrozenWeight.quantize(normal(30, 77), name, **options).state_dict()
    facts = next(key for key in good if "quant_state" in key)

    def message(**changed) -> str:
        entries = {key: value for key, value in (good | changed).items() if value is not None}
        with pytest.raises(ValueError) as error:
            FrozenWeight.from_state_dict(entries)
        return str(error.value)

    for key, value in good.items():
        assert (key if key != facts else "weight.quant_state.*") in message(**{key: None})
        if key == facts:
            continue
        assert key in message(**{key: torch.cat([value, value])})
        assert key in message(**{key: value.to(torch.int32)})
        assert key in message(**{key: "text"})
        if value.dtype == F32:
            for bad in (float("nan"), float("inf"), *([-1.0] if "quant_map" not in key else [])):
                spoilt = value.clone()
                spoilt.view(-1)[0] = bad
                assert key in message(**{key: spoilt})
    assert "weight.surprise" in message(**{"weight.surprise": torch.zeros(1)})
    assert facts in message(**{facts: torch.tensor([1, 2, 3], dtype=torch.uint8)})
    assert facts in message(**{facts: torch.zeros(3)})


@pytest.mark.parametrize("fact", ["shape", "dtype", "group_size"])
@pytest.mark.parametrize("value", [None, -1, "float8", [30], [30, -77], [30, 2**60], "__class__", 1.5, True])
def test_corrupt_facts_name_theirs(fact, value):
    from peftkern.weights.saved import pack_facts

    good = FrozenWeight.quantize(normal(30, 77), "int4").state_dict()
    key = "weight.quant_state.peftkern__int4"
    facts = {"shape": [30, 77], "group_size": 128, "dtype": "float32"}
    good[key] = pack_facts(facts)
    FrozenWeight.from_state_dict(good)
    good[key] = pack_facts(facts | {fact: value})
    with pytest.raises(ValueError, match=f"{key}: {fact}"):
        FrozenWeight.from_state_dict(good)


def test_what_cannot_be_quantised():
    W = normal(8, 32)
    for name in GRIDS:
        for bad in (float("nan"), float("inf")):
            spoilt = W.clone()
            spoilt[2, 3] = bad
            with pytest.raises(ValueError, match="NaN or Inf"):
                FrozenWeight.quantize(spoilt, name)
        with pytest.raises(ValueError, match="2-D"):
            FrozenWeight.quantize(W[0], name)
        with pytest.raises(TypeError, match="int64"):
            FrozenWeight.quantize(W.long(), name)
        with pytest.raises(TypeError, match="surprise"):
            FrozenWeight.quantize(W, name, surprise=1)
    for name, options, text in (
        ("int8", {"group_size": 24}, "power of two"), ("int4", {"group_size": 8}, "from 16"),
        ("nf4", {"blocksize": 16}, "from 32"), ("fp4", {"blocksize": 8192}, "4096"), ("fp8", {"scaling": "x"}, "'x'"),
        ("int3", {}, "unknown weight format"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            FrozenWeight.quantize(W, name, **options)
    with pytest.raises(ValueError, match="weight.zero_point is beyond 15"):
        Int4Weight(
            torch.zeros(2, 8, dtype=torch.uint8),
            torch.ones(2, 1),
            16,
            (torch.full((2, 1), 16, dtype=torch.uint8),),
            (2, 16),
        )
    with pytest.raises(ValueError, match="weight.scale is on meta"):
        Int8Weight(torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="group_size is 0 or 128"):
        FP8Weight(torch.zeros(2, 8).to(torch.float8_e4m3fn), torch.ones(2), 64)


@pytest.mark.parametrize(("M", "p"), [(7, 0.2), (33, 0.0)])
@pytest.mark.parametrize(("dtype", "adapter"), [(F32, F32), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize(("name", "options"), QUANTISED, ids=str)
def test_products_see_the_materialised_weight(name, options, dtype, adapter, M, p, target: Target, monkeypatch):
    """y, dx and the gradients, bit for bit those of the dense weight; x's dtype decides, whatever was quantised.

    On C++ in the kernels' own pass for both: otherwise the dense weight may be given to torch's product, with its bits.
    """
    monkeypatch.setattr(call, "one_pass", lambda *_: True)
    few = target.backend == "cpp" and M <= call.FEW_ROWS and "avx512" in SETS
    with kernels("avx2") if few else contextlib.nullcontext():  # AVX-512 leaves those rows of a packed weight to AVX2
        _check_products(name, options, Case(M, 77, 50, 8, dtype, adapter, p, bias=True), target)


def _check_products(name: str, options: dict, case: Case, target: Target) -> None:
    t = make(case, target.device)
    t.weight = FrozenWeight.quantize(t.weight.float(), name, **options)
    packed = run(case, t, target.backend)
    for needs in (("lora_A", "lora_B"), ("x",)):  # what backward does not read is not saved
        part = run(case, t, target.backend, needs)
        assert all(torch.equal(part[name], packed[name]) for name in ("y", *needs))
    t.weight = t.weight.materialize(case.dtype)
    dense = run(case, t, target.backend)
    for name in NAMES[:-1]:
        assert torch.equal(packed[name], dense[name]), name


def test_held_bytes_of_nf4_are_at_most_4_13_bits_a_weight():
    shape = (2048, 2048)
    weight = FrozenWeight.quantize(torch.ones(()).expand(shape), "nf4")
    assert 8 * weight.nbytes / 2**22 <= 4.13
    layer = peftkern.nn.LoRALinear.from_linear(
        torch.nn.Linear(*shape, bias=False), 1, 1, weight_format="nf4", blocksize=64
    )
    saved = sum(v.numel() * v.itemsize for k, v in layer.state_dict().items() if "lora" not in k)
    held = sum(v.numel() * v.itemsize for v in layer.buffers())
    assert 8 * held / 2**22 <= 4.13 and 8 * saved / 2**22 <= 4.13


@pytest.mark.parametrize("weight_format", formats())
def test_rows_too_long_for_32_bits_within_a_tile_are_refused(weight_format):
    pytest.importorskip("triton")
    triton = dispatch.backend_named("triton")

    def refused(M: int, K: int, N: int) -> str | None:
        return triton.supports(Problem("cuda", M, K, N, 8, BF16, F32, weight_format))

    assert refused(16, 2**23 - 16, 2**20) is None  # 2^43 elements
    assert "rows of 8388608 elements" in refused(16, 2**23, 16)
    assert "rows of 8388624 elements" in refused(16, 16, 2**23 + 16)
    assert "M = 2147483648 rows" in refused(2**31, 16, 16)
