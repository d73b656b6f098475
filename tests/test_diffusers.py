"""Diffusers' UNet2DConditionModel and Flux transformer, with adapters of their own loaders: plain PEFT's, and fused."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import assert_close, linears, pooled, randomise
from peft import LoraConfig
from torch import Tensor, nn

import peftkern
from peftkern.testing.numerics import assert_as_good_as

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
FLUX_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp", "proj_out"]
FILE = "pytorch_lora_weights.safetensors"
Model = tuple[nn.Module, dict[str, Tensor]]


def unet() -> Model:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(7)}
    return model, inputs | {"encoder_hidden_states": torch.randn(2, 5, 24)}


def flux() -> Model:
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 9, 4), "encoder_hidden_states": torch.randn(2, 5, 24)}
    inputs |= {"pooled_projections": torch.randn(2, 12), "timestep": torch.tensor([0.3, 0.8])}
    return model, inputs | {"img_ids": torch.randn(9, 3).round(), "txt_ids": torch.zeros(5, 3)}


MODELS: dict[str, tuple[Callable[[], Model], list[str]]] = {
    "UNet2DConditionModel": (unet, UNET_TARGETS),
    "FluxTransformer2DModel": (flux, FLUX_TARGETS),
}
Both = tuple[nn.Module, nn.Module, dict[str, Tensor]]


@pytest.fixture(params=MODELS)
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    """The model with two adapters under plain PEFT, the same patched, and a batch."""
    build, targets = MODELS[request.param]
    torch.manual_seed(0)
    plain, inputs = build()
    plain.requires_grad_(False)
    for name, r in (("style", 4), ("subject", 3)):
        plain.add_adapter(LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets), name)
    randomise(plain)
    patched = copy.deepcopy(plain)
    report = peftkern.patch(patched)
    assert len(report.fast) == len(linears(patched)) > 10 and not report.skipped, report
    yield plain, patched, inputs
    counts = peftkern.report(patched).calls
    assert len(counts) == len(linears(patched)) and all(one["fused"] for one in counts.values())


def step(model: nn.Module, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(**inputs, **options).sample
    y.square().mean().backward()
    return {"y": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def reasons(model: nn.Module) -> set[str]:
    """Why calls so far were not fused."""
    return {reason for counts in peftkern.report(model).calls.values() for reason in counts} - {"fused"}


def assert_same(both: Both, **options) -> dict[str, Tensor]:
    """One step of each, judged against the same in fp64; what the patched model gave."""
    plain, patched, inputs = both
    wide = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    truth = step(copy.deepcopy(plain).double(), wide, **options)
    found, expected = step(patched, inputs, **options), step(plain, inputs, **options)
    assert found.keys() == expected.keys() == truth.keys()
    assert_as_good_as(*(pooled(one, truth) for one in (found, expected, truth)))
    return found


def test_adapters_by_weight_and_the_scale_of_a_call(both):
    plain, patched, inputs = both
    found: list[Tensor] = []
    scale = "joint_attention_kwargs" if "txt_ids" in inputs else "cross_attention_kwargs"
    for names, weights in (("style", 0.5), (["style", "subject"], [0.7, -0.4]), (["subject"], None)):
        for model in (plain, patched):
            model.set_adapters(names, weights)
        found += [assert_same(both)["y"], assert_same(both, **{scale: {"scale": 0.3}})["y"]]
    assert not any(torch.allclose(one, other) for i, one in enumerate(found) for other in found[:i])
    assert not reasons(patched)


def test_fused_into_the_base_disabled_and_back(both):
    """diffusers' fuse_lora is PEFT's merge."""
    plain, patched, inputs = both
    expected = assert_same(both)
    with torch.no_grad():
        for do, undo in (("fuse_lora", "unfuse_lora"), ("disable_lora", "enable_lora")):
            for model in (plain, patched):
                getattr(model, do)()
            assert torch.equal(patched(**inputs).sample, plain(**inputs).sample)
            for model in (plain, patched):
                getattr(model, undo)()
    assert reasons(patched) == {"its adapter is merged", "its adapters are disabled"}
    assert_close(assert_same(both), expected)


def test_gradient_checkpointing(both):
    expected = assert_same(both)
    for model in both[:2]:
        model.enable_gradient_checkpointing()
        model.train()
    assert_close(assert_same(both), expected)
    assert not reasons(both[1])


def saved(both: Both, folder: pathlib.Path, seed: int) -> pathlib.Path:
    """A file of the adapter "style" with other values."""
    other = randomise(copy.deepcopy(both[0]), seed)
    other.save_lora_adapter(folder / str(seed), "style")
    return folder / str(seed)


@pytest.mark.parametrize("target_rank", [None, 6])
def test_hotswap(both, target_rank, tmp_path):
    """Loaded over an adapter in use; to a higher rank it is padded, and its scaling a tensor."""
    plain, patched, inputs = both
    first, second = (saved(both, tmp_path, seed) for seed in (5, 6))
    found = []
    for model in (plain, patched):
        model.delete_adapters(["style", "subject"])
        if target_rank:
            model.enable_lora_hotswap(target_rank=target_rank)
        model.load_lora_adapter(first, adapter_name="default", prefix=None, weight_name=FILE)
    peftkern.patch(patched)  # deleting the last adapter takes the layers away
    found.append(assert_same(both)["y"])
    layer = next(iter(linears(patched).values()))
    assert len(layer.lora_A["default"].weight) == (target_rank or 4)
    assert isinstance(layer.scaling["default"], Tensor) == bool(target_rank)
    for model in (plain, patched):
        model.load_lora_adapter(second, adapter_name="default", prefix=None, weight_name=FILE, hotswap=True)
    found.append(assert_same(both)["y"])
    assert not torch.allclose(*found) and not reasons(patched)
