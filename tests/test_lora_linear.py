"""nn.LoRALinear: construction, adoption of layers, merge and export, state, and life as an nn.Linear."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from conftest import Target
from torch import nn

from peftkern.nn import LoRALinear
from peftkern.testing.numerics import assert_as_good_as

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def trained(device: str = "cpu", seed: int = 0, **options) -> LoRALinear:
    """A layer whose adapter is not zero."""
    torch.manual_seed(seed)
    layer = LoRALinear(24, 16, 4, 8, **(dict(lora_bias=True) | options), device=device)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_bias):
            if parameter is not None:
                parameter.normal_()
    return layer


def bits(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- construction


def test_initial_values_are_pefts():
    torch.manual_seed(0)
    layer = LoRALinear(400, 300, 8, 16, lora_bias=True)
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = sqrt(5)
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.abs().max() > 0.99 * bound
    assert abs(layer.lora_A.std() - bound / math.sqrt(3)) < 0.02 * bound and abs(layer.lora_A.mean()) < 0.05 * bound
    assert not layer.lora_B.any() and not layer.lora_bias.any()
    x = torch.randn(5, 400)
    wide = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_as_good_as(layer(x), nn.functional.linear(x, layer.weight, layer.bias), wide)


def test_the_base_is_initialised_as_nn_linear():
    torch.manual_seed(7)
    base = nn.Linear(24, 16)
    torch.manual_seed(7)
    layer = LoRALinear(24, 16, 4, 8)
    assert torch.equal(base.weight, layer.weight) and torch.equal(base.bias, layer.bias)


@pytest.mark.parametrize(("dtype", "adapter"), [(F32, F32), (BF16, F32), (F16, F32), (F64, F64), (None, F32)], ids=str)
def test_dtypes_and_what_is_trained(dtype, adapter):
    layer = LoRALinear(24, 16, 4, 8, lora_bias=True, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == (dtype or F32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.lora_bias.dtype == adapter
    assert [name for name, value in layer.named_parameters() if value.requires_grad] == [
        "lora_A",
        "lora_B",
        "lora_bias",
    ]
    y = layer(torch.ones(3, 24, dtype=dtype))
    y.sum().backward()
    assert y.dtype == (dtype or F32) and layer.weight.grad is None and layer.lora_B.grad.dtype == adapter


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_state_dict_keys(bias, lora_bias):
    layer = LoRALinear(24, 16, 4, 8, bias=bias, lora_bias=lora_bias)
    expected = {"weight", "lora_A", "lora_B"} | ({"bias"} if bias else set()) | ({"lora_bias"} if lora_bias else set())
    assert set(layer.state_dict()) == expected
    layer.merge()
    assert set(layer.state_dict()) == expected


def test_scaling_and_rslora():
    plain, rank_stable = LoRALinear(24, 16, 4, 8), LoRALinear(24, 16, 4, 8, use_rslora=True)
    assert plain.scaling == 2.0 and rank_stable.scaling == 4.0
    for layer, c in ((plain, 2.0), (rank_stable, 4.0)):
        nn.init.normal_(layer.lora_B)
        x = torch.randn(5, 24)
        exact = (x.double() @ (layer.weight + c * layer.lora_B @ layer.lora_A).double().T + layer.bias).float()
        torch.testing.assert_close(layer(x), exact)


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(r=0), "r is at least 1, got 0"), (dict(r=-1), "got -1"), (dict(lora_dropout=1.5), "not a probability")],
)
def test_bad_arguments(options, words):
    arguments = dict(in_features=8, out_features=6, r=2, lora_alpha=4) | options
    with pytest.raises(ValueError, match=words):
        LoRALinear(**arguments)
    if "r" not in options:
        with pytest.raises(ValueError, match=words):
            LoRALinear.from_linear(nn.Linear(8, 6), 2, 4, **options)


def test_meta_device_makes_no_memory():
    layer = LoRALinear(24, 16, 4, 8, device="meta")
    assert all(value.device.type == "meta" for value in layer.parameters())


# ---------------------------------------------------------------------------------------------------------- adoption


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_shares_the_storage(bias):
    linear = nn.Linear(24, 16, bias=bias).eval()
    x = torch.randn(5, 24)
    expected = linear(x)
    layer = LoRALinear.from_linear(linear, 4, 8, lora_dropout=0.5, lora_bias=True)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not linear.weight.requires_grad
    assert (layer.in_features, layer.out_features, layer.lora_dropout, layer.training) == (24, 16, 0.5, False)
    assert_as_good_as(layer(x), expected, linear.double()(x.double()))


def test_from_linear_keeps_ties():
    embedding = nn.Embedding(32, 24)
    head = nn.Linear(24, 32, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": LoRALinear.from_linear(head, 4, 8)})
    assert model["head"].weight is model["embedding"].weight
    with torch.no_grad():
        embedding.weight.fill_(2.0)
    assert (model["head"].weight == 2.0).all()


def test_from_conv1d():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(16, 24)
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 5, 24)
    layer = LoRALinear.from_linear(conv, 4, 8)
    assert layer.weight.shape == (16, 24) and layer.weight.data_ptr() == conv.weight.data_ptr()
    torch.testing.assert_close(layer(x), conv(x))
    layer(x).sum().backward()
    assert layer.lora_B.grad.any() and conv.weight.grad is None
    assert not conv.weight.requires_grad or layer.weight is not conv.weight


@pytest.mark.parametrize(
    "module", [nn.Conv2d(3, 3, 1), nn.Embedding(4, 4), nn.Identity()], ids=lambda m: type(m).__name__
)
def test_from_linear_refuses_others_by_name(module):
    with pytest.raises(TypeError, match=type(module).__name__):
        LoRALinear.from_linear(module, 4, 8)


# --------------------------------------------------------------------------------------------------- merge and export


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bias", [False, True])
def test_merge_computes_in_fp32_and_unmerge_restores_every_bit(bias, dtype):
    layer = trained(bias=bias, dtype=dtype)
    x = torch.randn(7, 24, dtype=dtype)
    before, y = bits(layer), layer(x)
    layer.merge()
    expected = (layer.weight.float() + 2.0 * (layer.lora_B @ layer.lora_A)).to(dtype)
    offset = 2.0 * layer.lora_bias.detach() + (layer.bias.float() if bias else 0.0)
    assert torch.equal(layer(x), nn.functional.linear(x, expected, offset.to(dtype)))
    assert same_bits(before, bits(layer)) and not same_bits({"y": y}, {"y": layer(x)})
    layer.unmerge()
    assert same_bits(before, bits(layer)) and torch.equal(layer(x), y)


def test_merging_twice_and_unmerging_twice_are_refused():
    layer = trained()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()
    layer.unmerge()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_to_linear_is_a_copy_of_the_merged_layer(bias, merged):
    layer = trained(bias=bias).eval()
    if merged:
        layer.merge()
    before = bits(layer)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and not linear.training and (layer.merged_weight is not None) == merged
    x = torch.randn(7, 24)
    torch.testing.assert_close(linear(x), layer(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        linear.weight.zero_(), linear.bias.zero_()
    assert same_bits(before, bits(layer)) and layer(x).any()


def test_to_linear_without_any_bias_has_none():
    assert trained(bias=False, lora_bias=False).to_linear().bias is None


def test_a_merged_layer_passes_gradients_to_x():
    layer = trained()
    layer.merge()
    x = torch.randn(7, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.merged_weight.sum(0).expand(7, 24))


# -------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("bias", [False, True])
def test_loading_while_merged_is_never_stale(bias):
    layer, other = trained(bias=bias, lora_bias=bias), trained(seed=1, bias=bias, lora_bias=bias)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    x = torch.randn(7, 24)
    assert layer.merged_weight is not None
    other.merge()
    assert torch.equal(layer(x), other(x))
    layer.unmerge(), other.unmerge()
    assert torch.equal(layer(x), other(x)) and same_bits(bits(layer), bits(other))


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("copier", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_equal_and_independent(copier, merged):
    layer = trained(lora_dropout=0.25).eval()
    if merged:
        layer.merge()
    twin = copier(layer)
    x = torch.randn(7, 24)
    assert torch.equal(twin(x), layer(x)) and same_bits(bits(layer), bits(twin))
    assert repr(twin) == repr(layer) and not twin.training
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    y = layer(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), y)


def test_state_dict_through_torch_save_and_weights_only_load():
    layer, other = trained(dtype=BF16), trained(seed=1, dtype=BF16)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(7, 24, dtype=BF16)
    assert torch.equal(layer(x), other(x))


def test_moving_dtype_and_repr():
    layer = trained(lora_bias=False).to(F64)
    assert layer(torch.ones(2, 24, dtype=F64)).dtype == F64
    for words in ("in_features=24", "out_features=16", "r=4", "lora_alpha=8", "bias=True", "use_rslora=False"):
        assert words in repr(layer)


# ----------------------------------------------------------------------------------------------------------- training


def test_training_fits_a_low_rank_change_and_leaves_the_base_alone(target: Target, dispatch_env):
    dispatch_env(PEFTKERN_BACKEND=target.backend)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8)).to(target.device)
    for index in (0, 1):
        model[index] = LoRALinear.from_linear(model[index], 4, 8)
    x = torch.randn(64, 24, device=target.device)
    goal = model(x).detach() + x @ torch.randn(24, 8, device=target.device)
    base = [model[index].weight.clone() for index in (0, 1)]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(150):
        loss = (model(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    assert all(torch.equal(model[index].weight, base[index]) for index in (0, 1))


def test_stands_where_an_nn_linear_stands():
    """In a transformer layer's feed-forward part, which calls its linears and reads nothing else."""
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = block(x)
    block.linear1 = LoRALinear.from_linear(block.linear1, 4, 8)
    block.linear2 = LoRALinear.from_linear(block.linear2, 4, 8)
    torch.testing.assert_close(block(x), expected)


def test_a_base_bias_may_be_trained():
    layer = trained()
    layer.bias.requires_grad_()
    layer(torch.ones(7, 24)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((16,), 7.0))


def test_an_unfrozen_weight_is_a_value_error():
    layer = trained()
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight requires grad"):
        layer(torch.ones(7, 24))


def test_training_draws_a_mask_and_evaluation_does_not(target: Target, dispatch_env):
    dispatch_env(PEFTKERN_BACKEND=target.backend)
    layer = LoRALinear(32, 24, 4, 8, lora_dropout=0.5, device=target.device)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(16, 32, device=target.device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_new_values_are_used_after_a_step_and_a_reload(target: Target, dispatch_env):
    dispatch_env(PEFTKERN_BACKEND=target.backend)
    layer = LoRALinear(32, 24, 4, 8, device=target.device)
    x = torch.randn(16, 32, device=target.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for change in ("step", "copy", "data", "load"):
        before = layer(x)
        if change == "step":
            before.square().sum().backward()
            optimizer.step()
        elif change == "copy":
            with torch.no_grad():
                layer.lora_B.normal_()
        elif change == "data":
            layer.lora_A.data = torch.randn_like(layer.lora_A)
        else:
            layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
        exact = torch.nn.functional.linear(x, layer.weight + 2 * layer.lora_B @ layer.lora_A, layer.bias)
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_fp16_with_a_gradient_scaler(p: float, target: Target):
    """Overflowing gradients are seen by the scaler and the step is skipped; the next ones train."""
    device = target.device
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32, device=device, dtype=torch.float16)
    layer = LoRALinear.from_linear(linear, r=4, lora_alpha=8, lora_dropout=p)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=1000)
    x = torch.randn(16, 48, device=device, dtype=torch.float16)
    wanted = torch.randn(16, 32, device=device)
    losses, scales = [], []
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(layer(x).float(), wanted)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**24 and scales[-1] == scales[-10] > 1
    assert losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in parameters)
