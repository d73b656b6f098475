"""Two processes: FSDP2 and FSDP1, whatever their units are."""

from __future__ import annotations

from collections.abc import Callable

import distributed
import pytest
import torch
from conftest import ALL_LINEAR, randomise
from fsdp_training import (
    LAYERS,
    TOKENS,
    UNITS,
    Losses,
    adapters,
    assert_fused,
    assert_same,
    blocks,
    lora_layers,
    mesh,
    patched,
    sharded,
    small,
    trained,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import peftkern

# -------------------------------------------------------------------------------------------------------------- FSDP2


def check_fsdp2_leaves_over_32_steps() -> None:
    model = sharded(patched(small()), adapters)
    found = trained(model, 32)
    assert all(isinstance(p, DTensor) and isinstance(p.grad, DTensor | None) for p in model.parameters())
    assert_fused(model, 32)
    assert_same(found, trained(small(), 32, TOKENS))


def check_fsdp2_units_of_every_kind() -> None:
    expected = trained(small(), 2, TOKENS)
    for name, units in UNITS.items():
        for before in (True, False):
            model = small()
            if before:
                peftkern.patch(model)
            sharded(model, units)
            kinds = [type(layer) for layer in lora_layers(model)]
            if not before:
                report = peftkern.patch(model)
                assert len(report.fast) == LAYERS, f"{name}: {report}"
            found = trained(model, 2)
            assert_fused(model, 2)
            assert_same(found, expected)
            peftkern.unpatch(model)
            assert before or [type(layer) for layer in lora_layers(model)] == kinds
            assert set(peftkern.report(model).skipped.values()) == {"it is not patched"}
            trained(model, 1)


def check_fsdp2_in_bf16_over_32_steps() -> None:
    """As accelerate has it: parameters, inputs and outputs of every unit in bf16; as LlamaFactory: the base alone."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    for dtype, units, options in (
        (torch.float32, "leaves and bases", {"mp_policy": policy}),
        (torch.bfloat16, "leaves", {}),
    ):
        model, plain = (sharded(each, UNITS[units], **options) for each in (patched(small(dtype)), small(dtype)))
        found, expected = (trained(each, 32)[0] for each in (model, plain))
        assert_fused(model, 32)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def check_a_policy_of_the_adapters_alone() -> None:
    """bf16 beside a base in fp32 is PEFT's, with the reason; y is in PEFT's dtype, whatever the units cast."""
    mixed = {"x is torch.bfloat16, the base torch.float32, the adapter torch.bfloat16"}
    for policy, reasons in (
        (MixedPrecisionPolicy(torch.bfloat16), mixed),
        (MixedPrecisionPolicy(output_dtype=torch.float64), {"fused"}),
    ):
        model, dtypes = patched(small()), set()
        for layer in lora_layers(model):
            layer.register_forward_hook(lambda layer, inputs, y, seen=dtypes: seen.add(y.dtype))
            for child in adapters(layer):
                fully_shard(child, mesh=mesh(), mp_policy=policy)
        trained(sharded(model), 1)
        assert dtypes == {torch.float32}
        assert set().union(*peftkern.report(model).calls.values()) == reasons


def check_fsdp2_with_checkpointing_and_dropout() -> None:
    model = patched(small(lora_dropout=0.4))

    def step() -> Losses:
        torch.manual_seed(0)
        return trained(model, 1, [TOKENS[0]])

    expected = step()
    randomise(model)  # as it was before
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    sharded(model, adapters)
    assert_same(step(), expected)
    assert_fused(model, 3)


def check_fsdp2_of_dora_and_of_two_adapters() -> None:
    from peft import LoraConfig

    def build(dora: bool) -> nn.Module:
        model = small(use_dora=dora)
        if not dora:
            model.add_adapter("other", LoraConfig(r=3, target_modules=ALL_LINEAR))
            model.base_model.set_adapter(["default", "other"])
            randomise(model, 2)
        return model

    def units(layer: nn.Module) -> list[nn.Module]:
        return [child for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector) for child in part.values()]

    for dora in (True, False):
        model = sharded(patched(build(dora)), units)
        found = trained(model, 2)
        assert_fused(model, 2)
        assert_same(found, trained(build(dora), 2, TOKENS))


def check_what_is_pefts_beside_units_is_fused_again() -> None:
    """Adapters that are off, and a leaf that somebody watches."""
    off, watched = "its adapters are disabled", "lora_A has hooks"
    model, plain = sharded(patched(small()), adapters), sharded(small(), adapters)
    for each in (model, plain):
        for layer in lora_layers(each):
            layer.lora_A["default"].register_forward_hook(lambda child, inputs, y: 2 * y)
    with torch.no_grad():
        found, expected = (each(input_ids=TOKENS[0]).logits for each in (model, plain))
        with model.disable_adapter(), plain.disable_adapter():
            without, base = (each(input_ids=TOKENS[0]).logits for each in (model, plain))
    assert torch.equal(found, expected) and torch.equal(without, base) and not torch.equal(found, base)
    assert list(peftkern.report(model).calls.values()) == [{watched: 1, off: 1}] * LAYERS
    assert set(peftkern.report(model).skipped.values()) == {watched}
    for layer in lora_layers(model):
        layer.lora_A["default"]._forward_hooks.popitem()
    trained(model, 1)
    assert list(peftkern.report(model).calls.values()) == [{watched: 1, off: 1, "fused": 1}] * LAYERS
    assert len(peftkern.report(model).fast) == LAYERS


# -------------------------------------------------------------------------------------------------------------- FSDP1


def fsdp1(before: bool, policy: Callable[[nn.Module], object], use_dora: bool = False, **options) -> nn.Module:
    model = small(use_dora=use_dora)
    if before:
        peftkern.patch(model)
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy(model), device_id=cpu, **options)
    return wrapped if before else patched(wrapped)


def check_fsdp1_leaves_of_dora() -> None:
    from peft.utils.other import fsdp_auto_wrap_policy

    expected = trained(small(use_dora=True), 2, TOKENS)[0]
    for original in (True, False):
        for before in (True, False):
            model = fsdp1(before, fsdp_auto_wrap_policy, use_orig_params=original, use_dora=True)
            assert len(peftkern.report(model).fast) == LAYERS, str(peftkern.report(model))
            torch.testing.assert_close(trained(model, 2)[0], expected, rtol=2e-5, atol=2e-5)
            assert_fused(model, 2)


def check_fsdp1_units_of_frozen_and_trained_parameters() -> None:
    expected = trained(small(), 2, TOKENS)[0]
    kinds = {type(block) for block in blocks(small())}
    for before in (True, False):
        model = fsdp1(before, lambda model: ModuleWrapPolicy(kinds), use_orig_params=True)
        torch.testing.assert_close(trained(model, 2)[0], expected, rtol=2e-5, atol=2e-5)
        report = peftkern.report(model)
        assert list(report.skipped.values()) == ["its base weight requires grad"] * LAYERS, str(report)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    return distributed.run_in_two(__file__)


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, outcome: dict[str, str]) -> None:
    distributed.judge(name, outcome)


if __name__ == "__main__":
    distributed.main(CHECKS)
