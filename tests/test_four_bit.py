"""nf4 and fp4 against their specification, element by element, and against bitsandbytes where it follows it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from peftkern.weights import FrozenWeight
from peftkern.weights.four_bit import FP4_CODE, NF4_CODE, NF4Weight, dynamic_code
from peftkern.weights.saved import pack_facts

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}
COLUMNS = (1, 2, 31, 32, 33, 64, 65, 96, 129, 256, 269, 430)
SWEEP = list(
    itertools.product((F32, BF16, F16), (False, True), (1, 3, 64), COLUMNS, (32, 64, 128, 256, 512, 1024, 2048, 4096))
)
# The encoder's thresholds as the format's CUDA source has them: the next code above each, not at it.
NF4_THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip


def random_entries(N: int, K: int, blocksize: int, nested: bool, quant_type: str, seed: int) -> dict:
    """A state_dict in bitsandbytes' layout whose every byte and scale is random."""
    generator = torch.Generator().manual_seed(seed)
    n = N * K
    blocks = -(-n // blocksize)
    facts = {"quant_type": quant_type, "blocksize": blocksize, "dtype": "bfloat16", "shape": [N, K]}
    entries = {
        "weight": torch.randint(256, ((n + 1) // 2, 1), dtype=torch.uint8, generator=generator),
        "weight.quant_map": torch.tensor(CODES[quant_type]),
        "weight.absmax": torch.rand(blocks, generator=generator) + 0.01,
    }
    if nested:
        entries["weight.absmax"] = torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator)
        entries["weight.nested_absmax"] = torch.rand(-(-blocks // 256), generator=generator)
        entries["weight.nested_quant_map"] = dynamic_code()
        facts |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        facts["nested_offset"] = float(torch.rand((), generator=generator))
    entries[f"weight.quant_state.bitsandbytes__{quant_type}"] = pack_facts(facts)
    return entries


def specified(entries: dict, quant_type: str) -> np.ndarray:
    """The format as it is written down: an index for every element, fp32 products, nothing by blocks or rows."""
    key = f"weight.quant_state.bitsandbytes__{quant_type}"
    facts = json.loads(bytes(entries[key].numpy()))
    array = {name: value.numpy() for name, value in entries.items()}
    (N, K), packed = facts["shape"], array["weight"].ravel()
    i = np.arange(N * K)
    nibble = np.where(i % 2 == 0, packed[i // 2] >> 4, packed[i // 2] & 15)
    block = i // facts["blocksize"]
    absmax = array["weight.absmax"][block]
    if "nested_offset" in facts:
        absmax = array["weight.nested_quant_map"][absmax] * array["weight.nested_absmax"][block // 256]
        absmax = absmax + np.float32(facts["nested_offset"])
    return (array["weight.quant_map"][nibble] * absmax).reshape(N, K)


@pytest.mark.parametrize("quant_type", CODES)
def test_the_decoder_is_the_specification_bit_for_bit(quant_type):
    assert len(SWEEP) >= 1000
    for seed, (dtype, nested, N, K, blocksize) in enumerate(SWEEP):
        entries = random_entries(N, K, blocksize, nested, quant_type, seed)
        want = torch.from_numpy(specified(entries, quant_type)).to(dtype)
        found = FrozenWeight.from_state_dict(entries).materialize(dtype)
        integer = torch.int32 if dtype == F32 else torch.int16
        assert found.dtype == dtype and found.shape == (N, K)
        assert torch.equal(found.view(integer), want.view(integer)), (dtype, nested, N, K, blocksize)


def test_the_decoder_walks_large_weights_in_pieces():
    """More elements than one piece; the last piece ends within a block, and within a byte."""
    for blocksize in (32, 4096):
        entries = random_entries(521, 1537, blocksize, True, "nf4", 0)
        found = FrozenWeight.from_state_dict(entries).materialize(F32)
        assert torch.equal(found, torch.from_numpy(specified(entries, "nf4")))


def test_the_encoder_takes_the_nearest_code():
    thresholds = torch.tensor(NF4_THRESHOLDS)
    above = torch.nextafter(thresholds, torch.tensor(2.0))
    assert NF4Weight.encode(thresholds).tolist() == list(range(15))
    assert NF4Weight.encode(above).tolist() == list(range(1, 16))
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, code in CODES.items():
        packed = FrozenWeight.quantize(
            torch.cat([values, torch.ones(1)]).view(1, -1), name, blocksize=4096, double_quant=False
        )
        distance = (packed.materialize(F32)[0, :1000] - values).abs()
        assert torch.equal(distance, (values.unsqueeze(1) - torch.tensor(code)).abs().amin(dim=1)), name


@pytest.mark.parametrize("storage", [BF16, F16, F32])
def test_packed_bytes_stored_as_another_dtype(storage):
    entries = random_entries(8, 64, 64, True, "nf4", 0)
    want = FrozenWeight.from_state_dict(entries)
    entries["weight"] = entries["weight"].view(-1).view(storage).unsqueeze(1)
    found = FrozenWeight.from_state_dict(entries)
    assert torch.equal(found.data, want.data) and torch.equal(found.materialize(F32), want.materialize(F32))


def test_metadata_that_does_not_fit_is_named():
    good = random_entries(8, 64, 64, True, "nf4", 0)
    key = "weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(good[key].tolist()))

    def message(changed: dict) -> str:
        with pytest.raises(ValueError) as error:
            FrozenWeight.from_state_dict({k: v for k, v in (good | changed).items() if v is not None})
        return str(error.value)

    def of_facts(**changed) -> str:
        return message({key: pack_facts({k: v for k, v in (facts | changed).items() if v != "gone"})})

    for part in ("nested_absmax", "nested_quant_map"):
        assert f"weight.{part} is missing" in message({f"weight.{part}": None})
    assert "nested_offset" in of_facts(nested_offset="gone") and "nested_offset" in of_facts(nested_offset="nan")
    assert "nested_offset" in of_facts(nested_offset=float("nan")) and "nested_blocksize" in of_facts(
        nested_blocksize=128
    )
    assert "nested_dtype" in of_facts(nested_dtype="load")
    for value in ("gone", "manual_seed", "int8", 3):
        assert "dtype" in of_facts(dtype=value)
    for value in ("gone", 0, 16, 48, 8192, -64, 64.0, "64"):
        assert "blocksize" in of_facts(blocksize=value)
    for value in ("gone", [8], [8, 65], [4, 64], [0, 64], [-8, -64], [8, 64, 1], [8.0, 64]):
        assert "weight is" in of_facts(shape=value) or "shape" in of_facts(shape=value)
    assert "quant_type" in of_facts(quant_type="fp4")
    plain = {"weight.nested_absmax": None, "weight.nested_quant_map": None}
    not_nested = pack_facts({k: v for k, v in facts.items() if "nested" not in k})
    assert "weight.absmax is float32 [8]" in message(plain | {key: not_nested})
    for length in (15, 17):
        assert "weight.quant_map is float32 [16]" in message({"weight.quant_map": torch.zeros(length)})
    assert "weight.nested_quant_map is float32 [256]" in message({"weight.nested_quant_map": torch.zeros(16)})
    assert "weight.nested_absmax has negative" in message({"weight.nested_absmax": torch.tensor([-1.0])})
    with pytest.raises(ValueError, match="all there or none"):
        NF4Weight(good["weight"][:, 0], good["weight.absmax"], 64, (torch.zeros(16), torch.zeros(1)), (8, 64))


# ------------------------------------------------------------------------------------------------------- bitsandbytes


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("quant_type", CODES)
def test_decoder_and_encoder_are_bitsandbytes(quant_type, bnb):
    """What bitsandbytes packs is decoded as specified; and as it decodes, where its blocks end with rows, since its
    AVX-512 decoder (0.50.2) takes it that they do."""
    checked = 0
    for dtype, nested, N, K, blocksize in SWEEP[::7]:
        if K % 2 or N * K == 2:  # it compiles something for each odd K; it takes a single byte for a transposed weight
            continue
        W = torch.randn(N, K, generator=torch.Generator().manual_seed(K)).to(dtype)
        W[0, : K // 2] = 0
        packed, state = bnb.functional.quantize_4bit(
            W, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        entries = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()} | {"weight": packed}
        taken = FrozenWeight.from_state_dict(entries)
        own = FrozenWeight.quantize(W, quant_type, blocksize=blocksize, double_quant=nested)
        wanted = torch.from_numpy(specified(entries, quant_type)).to(dtype)
        assert torch.equal(taken.materialize(dtype), wanted), (dtype, nested, N, K, blocksize)
        if K % blocksize == 0:
            theirs = bnb.functional.dequantize_4bit(packed, state)
            assert torch.equal(wanted, theirs), (dtype, nested, N, K, blocksize)
            checked += 1
        if not nested:
            assert torch.equal(own.materialize(dtype), taken.materialize(dtype))
        else:
            assert torch.equal(own.tables[2], taken.tables[2])
        again = taken.state_dict()
        assert set(again) == set(entries)
        assert all(torch.equal(again[k], v) for k, v in entries.items() if "quant_state" not in k)
        facts = next(key for key in entries if "quant_state" in key)
        assert json.loads(bytes(again[facts].tolist())) == json.loads(bytes(entries[facts].tolist()))
    of_whole_rows = [K for *_, K, blocksize in SWEEP[::7] if K % blocksize == 0]
    assert checked == len(of_whole_rows) > 10


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", CODES)
def test_a_layer_of_bitsandbytes(quant_type, nested, bnb):
    from peftkern.integrations.bitsandbytes import from_bitsandbytes

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 48, quant_type=quant_type, compress_statistics=nested, compute_dtype=F32)
    with pytest.raises(ValueError, match="not quantised yet"):
        from_bitsandbytes(layer)
    layer.to("cpu")
    weight = from_bitsandbytes(layer)
    assert (weight.format, weight.shape, weight.dtype) == (quant_type, (48, 128), F32)
    assert weight.data.data_ptr() == layer.weight.data.data_ptr()
    theirs = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert torch.equal(weight.materialize(F32), theirs)
    theirs = {name: value for name, value in layer.state_dict().items() if name != "bias"}
    assert torch.equal(FrozenWeight.from_state_dict(theirs).materialize(F32), weight.materialize(F32))
    state = bnb.functional.QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in weight.state_dict().items() if k != "weight"}, torch.device("cpu")
    )
    assert state.shape == (48, 128) and state.nested == nested and torch.equal(state.absmax, weight.scale)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked"):
        from_bitsandbytes(layer)
    with pytest.raises(TypeError, match="not Linear"):
        from_bitsandbytes(torch.nn.Linear(2, 2))


def test_an_8_bit_layer_of_bitsandbytes(bnb):
    from peftkern.integrations.bitsandbytes import from_bitsandbytes

    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(80, 48, has_fp16_weights=False)
    before = layer.weight.detach().clone()
    layer.to("cpu")
    weight = from_bitsandbytes(layer)
    assert (weight.format, weight.shape) == ("int8", (48, 80))
    assert (weight.materialize(F32) - before.float()).abs().max() <= before.abs().max() * (0.5 / 127 + 1e-3)
