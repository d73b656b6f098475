"""``LoRALinear`` with a quantised base: what it holds, how it moves, saves, loads and merges."""

import copy
import io

import pytest
import torch
from torch import nn

from peftkern.nn import LoRALinear
from peftkern.testing.numerics import assert_as_good_as
from peftkern.weights import FrozenWeight, formats

FORMATS = [name for name in formats() if name != "dense"]


def layer(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> LoRALinear:
    torch.manual_seed(seed)
    made = LoRALinear.from_linear(nn.Linear(77, 50, dtype=dtype), 4, 8, lora_bias=True, weight_format=name, **options)
    nn.init.normal_(made.lora_B)
    return made


def bits(module: nn.Module) -> list[torch.Tensor]:
    return [buffer.contiguous().view(torch.uint8) for buffer in module.buffers() if buffer is not None]


@pytest.mark.parametrize("name", FORMATS)
def test_it_holds_no_dense_weight_and_trains(name):
    torch.manual_seed(0)
    linear = nn.Linear(77, 50)
    made = LoRALinear.from_linear(linear, 4, 8, weight_format=name)
    assert made.weight is None and name in repr(made)
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    x = torch.randn(6, 77, requires_grad=True)
    y = made(x)
    held = made.to_linear()  # B is zero: the base alone
    assert_as_good_as(y, held(x), nn.functional.linear(x.double(), held.weight.double(), held.bias.double()))
    y.sum().backward()
    assert x.grad is not None and made.lora_B.grad.abs().sum() > 0
    weight = made.frozen_weight()
    assert isinstance(weight, FrozenWeight) and weight.format == name
    assert (weight.materialize(torch.float32) - linear.weight).norm() < 0.2 * linear.weight.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_a_cast_of_the_module_leaves_the_packed_weight_alone(name):
    made = layer(name)
    before = bits(made)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.to("cpu")):
        assert cast(made) is made
        assert all(torch.equal(a, b) for a, b in zip(bits(made), before, strict=True))
    assert made.lora_A.dtype == torch.float64
    assert made.to(torch.bfloat16)(torch.randn(3, 77, dtype=torch.bfloat16)).dtype == torch.bfloat16
    made.to("meta")
    assert all(buffer.is_meta for buffer in made.buffers())


@pytest.mark.parametrize("name", FORMATS)
def test_state_dict_round_trip(name):
    model = nn.Sequential(layer(name), nn.ReLU(), layer(name, seed=1) if name != "int8" else nn.Linear(50, 3))
    model[2] = nn.Identity() if isinstance(model[2], LoRALinear) else model[2]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = nn.Sequential(layer(name, seed=5), nn.ReLU(), copy.deepcopy(model[2]))
    x = torch.randn(4, 77)
    assert not torch.equal(other(x), model(x))
    assert str(other.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    assert torch.equal(other(x), model(x)) and all(
        torch.equal(a, b) for a, b in zip(bits(other), bits(model), strict=True)
    )
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    on_meta = nn.Sequential(layer(name, seed=6), nn.ReLU(), copy.deepcopy(model[2])).to("meta")
    on_meta.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(on_meta(x), model(x))


def test_loading_is_strict():
    made = layer("nf4")
    good = made.state_dict()
    before = bits(made)

    def message(state: dict) -> str:
        with pytest.raises(RuntimeError) as error:
            made.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(bits(made), before, strict=True))
        return str(error.value)

    assert '"weight"' in message({key: value for key, value in good.items() if not key.startswith("weight")})
    assert "weight.absmax is missing" in message({k: v for k, v in good.items() if k != "weight.absmax"})
    assert "nested" in message({k: v for k, v in good.items() if "nested" not in k})
    assert "surprise" in message(good | {"surprise": torch.zeros(1)})
    assert "weight.surprise" in message(good | {"weight.surprise": torch.zeros(1)})
    assert "format: nf4 here, int8" in message(layer("int8").state_dict())
    assert "parts" in message(layer("nf4", double_quant=False).state_dict())
    assert "group size: 64 here, 128" in message(layer("nf4", blocksize=128).state_dict())
    assert "weight" in message(layer("dense").state_dict())
    dense = layer("dense")
    with pytest.raises(RuntimeError, match="weight.absmax"):
        dense.load_state_dict(good)


@pytest.mark.parametrize("name", FORMATS)
def test_merge_is_refused_and_to_linear_gives_the_sum_in_full(name):
    made = layer(name, torch.bfloat16)
    before = bits(made)
    with pytest.raises(NotImplementedError, match=name):
        made.merge()
    with pytest.raises(RuntimeError, match="not merged"):
        made.unmerge()
    linear = made.to_linear()
    assert linear.weight.dtype == torch.bfloat16 and all(
        torch.equal(a, b) for a, b in zip(bits(made), before, strict=True)
    )
    want = made.frozen_weight().materialize(torch.float32) + made.scaling * made.lora_B @ made.lora_A
    assert torch.equal(linear.weight, want.to(torch.bfloat16))


def test_options_belong_to_the_format():
    with pytest.raises(TypeError, match="blocksize"):
        layer("int8", blocksize=64)
    with pytest.raises(TypeError, match="blocksize"):
        layer("dense", blocksize=64)
    with pytest.raises(ValueError, match="unknown weight format 'nf5'"):
        layer("nf5")


def test_fsdp2_leaves_the_packed_weight_whole(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        made = layer("nf4")
        x, before = torch.randn(3, 77), bits(made)
        want = made(x).detach()
        fully_shard(made, mesh=mesh)
        made(x).sum().backward()
        assert torch.equal(made(x), want)
        assert all(torch.equal(a, b) for a, b in zip(bits(made), before, strict=True))
    finally:
        destroy_process_group()


@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_a_compiled_layer_with_a_packed_weight_trains(weight_format):
    torch.compiler.reset()
    linear = torch.nn.Linear(25, 15, dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(linear, 4, 8, weight_format=weight_format)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 25, dtype=torch.bfloat16)

    def step(module) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = module(leaf)
        y.sum().backward()
        return [y, leaf.grad, layer.lora_A.grad, layer.lora_B.grad]

    expected = step(layer)
    found = step(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
