"""mxfp4 and nvfp4: what every byte decodes to, how they are quantised, and weights of other packages' checkpoints."""

import math

import pytest
import torch
from conftest import Target
from e2m1 import GROUPS, decoded, e2m1, e4m3, every_e2m1

import peftkern
from peftkern.weights import FrozenWeight, MXFP4Weight, NVFP4Weight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = list(GROUPS)
EVERY = [("mxfp4", 1.0), ("nvfp4", 1 / 3), ("nvfp4", 2.0**-120)]


@pytest.mark.parametrize(("name", "factor"), EVERY, ids=str)
@pytest.mark.parametrize("K", [512, 511, 40])
def test_every_code_with_every_scale(name, factor, K):
    """Products that are subnormal or overflow too."""
    weight, expected = every_e2m1(name, K, factor)
    assert (expected.abs() < 2.0**-126).logical_and(expected != 0).any() == (name == "mxfp4" or factor < 1e-30)
    for dtype in (F32, BF16, F16, torch.float64):
        found = weight.materialize(dtype)
        assert torch.equal(found, expected.to(dtype)) and torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize(("name", "factor"), EVERY, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_products_see_every_code_with_every_scale(name, factor, dtype, target: Target):
    """y of unit rows is the weight, but for rows of it that overflow: their products with zero are no numbers.

    In bf16 only of what is normal there: PyTorch's own products of bf16 take what is not for zeros.
    """
    for K in (512, 511):
        weight, expected = every_e2m1(name, K, factor)
        W = expected.to(dtype)
        finite = W.isfinite().all(dim=1)
        assert finite.sum() >= len(W) - 2 or dtype == F16
        columns = torch.arange(0, K, 37 if target.backend == "triton" else 3)
        A, B = torch.zeros(1, K, dtype=dtype), torch.zeros(len(W), 1, dtype=dtype)
        for count in (1, 4, 9, len(columns)):
            some = columns[:count]
            x = torch.nn.functional.one_hot(some, K).to(dtype)
            y, wanted = peftkern.lora_linear(x, weight, A, B, backend=target.backend)[:, finite], W[finite][:, some].T
            lost = (wanted.abs() < torch.finfo(BF16).tiny) & (dtype == BF16)
            assert ((y == wanted) | lost).all()


def test_quantising_is_nearest_with_ties_to_even():
    """By every number there is and every middle between two, beside the search of all 16 codes."""
    sizes = [e2m1(code) for code in range(8)]
    points = sorted({*sizes, *((a + b) / 2 for a, b in zip(sizes, sizes[1:], strict=False))})
    near = [math.nextafter(p, side) for p in points for side in (-1.0, 9.0)]
    values = torch.tensor([6.0, *(p for p in [*points, *near] if p <= 6)], dtype=torch.float64).float()
    values = torch.cat((values, -values))

    def nearest(value: float) -> float:
        distance = min(abs(abs(value) - size) for size in sizes)
        code = [c for c in range(8) if abs(abs(value) - sizes[c]) == distance]
        return math.copysign(sizes[min(code, key=lambda c: c & 1)], value)

    expected = torch.tensor([nearest(value) for value in values.tolist()])
    for exponent in (0, -40, 100, -125):
        rows = torch.stack([values, torch.full_like(values, 6.0)], dim=1)  # 6 makes the exponent
        found = FrozenWeight.quantize(rows * 2.0**exponent, "mxfp4")
        assert torch.equal(found.materialize(F32)[:, 0], expected * 2.0**exponent)
        assert (found.scale == 127 + exponent).all()
    rows = torch.stack([values, torch.full_like(values, 6.0)], dim=1) * 448  # a global scale of 1
    assert torch.equal(FrozenWeight.quantize(rows, "nvfp4").materialize(F32)[:, 0], expected * 448)


def test_scales_of_mxfp4_are_those_of_the_specification():
    """floor(log2(amax)) - 2, clamped; 7.9 saturates at 6; a block of zeros, subnormals, the largest number."""
    for largest, exponent, found in (
        (7.9, 0, 6.0), (8.0, 1, 8.0), (4.0, 0, 4.0), (3.3, -1, 3.0), (2.0**-126, -127, 2.0**-126), (0.0, -127, 0.0),
        (2.0**-149, -127, 0.0), (2.0**-128, -127, 2.0**-128), (torch.finfo(F32).max, 125, 6 * 2.0**125),
    ):  # fmt: skip
        weight = FrozenWeight.quantize(torch.tensor([[largest, 0.0]]), "mxfp4")
        assert weight.scale.item() == exponent + 127, largest
        assert weight.materialize(F32)[0, 0].item() == found, largest


def test_scales_of_nvfp4_are_those_of_the_recipe():
    """The tensor's largest number over 6 * 448, a group's over 6 and that, in e4m3; each number nearest."""
    W = torch.randn(5, 72, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 5).unsqueeze(1)
    W[2, :16] = 0
    weight = FrozenWeight.quantize(W, "nvfp4")
    factor = W.abs().max() / (6 * 448)
    assert torch.equal(weight.tables[0][:127], torch.tensor([e4m3(byte) for byte in range(127)]) * factor)
    groups = torch.nn.functional.pad(W, (0, 8)).view(5, 5, 16)
    grid = torch.tensor([e4m3(byte) for byte in range(127)])
    wanted = groups.abs().amax(2) / 6 / factor
    assert torch.equal((weight.scale.float() - wanted).abs(), (grid - wanted.unsqueeze(2)).abs().amin(2))
    sizes = (weight.scale.float() * factor).repeat_interleave(16, 1)[:, :72]
    numbers = torch.tensor([e2m1(code) for code in range(16)])
    best = (numbers * sizes.unsqueeze(2) - W.unsqueeze(2)).abs().amin(2)
    assert torch.equal((weight.materialize(F32) - W).abs(), best)


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4.26), ("nvfp4", 4.51)])
def test_held_bits_a_weight(name, bits):
    weight = FrozenWeight.quantize(torch.ones(()).expand(2048, 2048), name)
    assert 8 * weight.nbytes / 2**22 <= bits
    layer = peftkern.nn.LoRALinear.from_linear(torch.nn.Linear(2048, 2048, bias=False), 1, 1, weight_format=name)
    saved = sum(v.numel() * v.itemsize for k, v in layer.state_dict().items() if "lora" not in k)
    held = sum(v.numel() * v.itemsize for v in layer.buffers())
    assert 8 * held / 2**22 <= bits and 8 * saved / 2**22 <= bits


def checkpoint(spelling: str, name: str, N: int = 6, K: int = 96) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight as another package saves it, with a bias, and what it is in fp32."""
    generator = torch.Generator().manual_seed(N + K)
    data = torch.randint(256, (N, K // 2), generator=generator, dtype=torch.uint8)
    if spelling == "gpt-oss":
        scale = torch.randint(255, (N, K // 32), generator=generator, dtype=torch.uint8)
        entries = {f"{name}_blocks": data.view(N, K // 32, 16), f"{name}_scales": scale, f"{name}_bias": torch.ones(N)}
        return entries, decoded(data, torch.exp2(scale.double() - 127).float(), 32, K)
    scale = torch.randint(127, (N, K // 16), generator=generator, dtype=torch.uint8)
    entries = {f"{name}_scale": scale.view(torch.float8_e4m3fn), "input_scale": torch.ones(())}
    sizes = torch.tensor([e4m3(byte) for byte in range(127)])[scale.int()]
    if spelling == "ModelOpt":
        factor = torch.tensor(0.0123)
        return entries | {name: data, f"{name}_scale_2": factor}, decoded(data, sizes * factor, 16, K)
    divisor = torch.tensor([8123.7])
    found = {f"{name}_packed": data, f"{name}_global_scale": divisor, f"{name}_shape": torch.tensor([N, K])}
    return entries | found, decoded(data, sizes / divisor, 16, K)


SPELLINGS = {"gpt-oss": "mxfp4", "ModelOpt": "nvfp4", "compressed-tensors": "nvfp4"}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_checkpoints_weight_is_taken_over_as_it_is(spelling, name):
    """The bytes are the checkpoint's own, decoded bit for bit, and saved by our names from there on."""
    entries, expected = checkpoint(spelling, name)
    weight = FrozenWeight.from_state_dict(entries | {"another": torch.ones(1)}, name)
    assert weight.format == SPELLINGS[spelling] and weight.shape == (6, 96) and weight.dtype == BF16
    assert torch.equal(weight.materialize(F32), expected)
    data = next(value for value in entries.values() if value.dtype == torch.uint8 and value.numel() == 6 * 48)
    assert weight.data.data_ptr() == data.data_ptr()
    again = FrozenWeight.from_state_dict(weight.state_dict(name), name)
    assert torch.equal(again.materialize(F32), expected) and again.dtype == BF16


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_wrong_in_a_checkpoint_names_its_key(spelling):
    good, _ = checkpoint(spelling, "weight")

    def message(entries: dict) -> str:
        with pytest.raises(ValueError) as error:
            FrozenWeight.from_state_dict(entries)
        return str(error.value)

    parts = [key for key in good if key.startswith("weight") and key not in ("weight_bias", "weight_shape")]
    assert len(parts) == {"mxfp4": 2, "nvfp4": 3}[SPELLINGS[spelling]]
    for key in parts:
        rest = {other: value for other, value in good.items() if other != key}
        assert key in message(rest) and SPELLINGS[spelling] in message(rest)
        assert key in message(good | {key: "text"})
        assert key in message(good | {key: torch.cat([good[key].reshape(1, -1)] * 2)})
        assert key in message(good | {key: good[key].to(torch.int32)})
        assert key in message(good | {key: good[key].unsqueeze(0).expand(2, *good[key].shape)})
        bad = [0x7F, 0x81, 0xFF] if good[key].dtype == torch.float8_e4m3fn else [255] if key == "weight_scales" else []
        for byte in bad:
            spoilt = good[key].view(torch.uint8).clone()
            spoilt[1, 2] = byte
            assert key in message(good | {key: spoilt.view(good[key].dtype)})
        if good[key].dtype == F32:
            wrong = [float("nan"), float("inf"), -1.0, *([0.0] if spelling == "compressed-tensors" else [])]
            for value in wrong:
                text = message(good | {key: torch.full_like(good[key], value)})
                assert key in text and (value != 0 or "is 0" in text)
    for other in SPELLINGS:
        if SPELLINGS[other] == SPELLINGS[spelling] and other != spelling:
            both = good | checkpoint(other, "weight")[0]
            assert "unexpected: weight" in message(both)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_of_a_format_is_refused(name):
    good = FrozenWeight.quantize(torch.randn(3, 40), name)
    cls = MXFP4Weight if name == "mxfp4" else NVFP4Weight
    with pytest.raises(ValueError, match=f"weight: group_size is {cls.group}, not 64"):
        cls(good.data, good.scale, 64, good.tables, good.shape)
    with pytest.raises(ValueError, match="tables, not"):
        cls(good.data, good.scale, cls.group, (*good.tables, torch.ones(1)), good.shape)
    for byte in [255] if name == "mxfp4" else [0x7F, 0xFF, 0x81]:
        scale = good.scale.view(torch.uint8).clone()
        scale[2, 1] = byte
        with pytest.raises(ValueError, match=r"weight\.scale has "):
            cls(good.data, scale.view(good.scale.dtype), cls.group, good.tables, good.shape)
