"""Two processes: packed bases in parts, a rank's bytes counted, gathered as bytes."""

from __future__ import annotations

import gc
import os
from typing import Any

import distributed
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import llama, randomise
from fsdp_training import (
    LAYERS,
    TOKENS,
    UNITS,
    adapters,
    assert_fused,
    assert_same,
    blocks,
    local,
    lora_layers,
    mesh,
    patched,
    quantised,
    sharded,
    trained,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import peftkern
from peftkern.nn import LoRALinear

STEPS = {"nf4": 32}  # of the others 3
BYTES = (torch.uint8, torch.int8)


def live(dtypes: tuple[torch.dtype, ...] = BYTES) -> int:
    """The memory of all tensors of these dtypes that this process has, whoever holds them; not what gc has frozen."""
    gc.collect()
    tensors: list[Any] = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    storages = {}
    for tensor in tensors:
        if tensor.dtype in dtypes and not tensor.is_meta:
            storage = local(tensor).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# --------------------------------------------------------------------------------------------------------- LoRALinear


def packed(weight_format: str, seed: int = 0) -> nn.Module:
    model = llama(seed=seed, widths=(64, 96)).train()
    del model.model.layers[1:]
    for parent in list(model.model.layers.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                setattr(parent, name, LoRALinear.from_linear(linear, 4, 8, weight_format=weight_format))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return randomise(model)


def in_parts(model: nn.Module) -> nn.Module:
    assert len(peftkern.shardable(model)) == LAYERS and not peftkern.shardable(model)
    for unit in (*blocks(model), model):
        fully_shard(unit, mesh=mesh())
    return model


def weights(model: nn.Module) -> list[Tensor]:
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    return [tensor for layer in layers for tensor in layer.frozen_weight().tensors]


def check_lora_linear_in_parts() -> None:
    gc.freeze()  # what all the modules have made is looked through no more
    for weight_format in ("nf4", "fp4", "int8", "int4", "fp8"):
        nothing, twin = live(), packed(weight_format)
        size = sum(tensor.numel() * tensor.itemsize for tensor in weights(twin))
        expected, others = trained(twin, STEPS.get(weight_format, 3), TOKENS), live()
        model = in_parts(packed(weight_format))
        padding = live() - others - size / 2
        assert 0 <= padding <= 16 * 6 * LAYERS / 2, (weight_format, padding)  # of each tensor, to a multiple of 16
        print(model)  # gathers nothing: one rank alone may do it
        found = trained(model, STEPS.get(weight_format, 3))
        assert live() - others - size / 2 == padding, weight_format
        assert_same(found, expected)
        del model, twin
        assert live() == nothing


def check_lora_linear_saved_and_loaded() -> None:
    folder = os.path.join(os.environ["PEFTKERN_TEST_STORE"], "checkpoint")
    for weight_format in ("nf4", "int8"):
        one, other = packed(weight_format), packed(weight_format, seed=1)
        expected, plain = weights(one), one.state_dict()
        assert not all(map(torch.equal, weights(other), expected))
        peftkern.shardable(one)
        assert one.state_dict().keys() == plain.keys()  # as a layer that is not shardable has it
        other_plain = packed(weight_format, seed=1)
        peftkern.shardable(other_plain)
        other_plain.load_state_dict(plain)
        assert all(map(torch.equal, weights(other_plain), expected))
        model = in_parts(packed(weight_format))
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        dcp.save(model.state_dict(), checkpoint_id=folder)
        in_parts(other)
        parts = other.state_dict()
        dcp.load(parts, checkpoint_id=folder)
        other.load_state_dict(parts)
        single = packed(weight_format, seed=1)
        peftkern.shardable(single)
        single.load_state_dict(whole)
        for each in (other, single):
            assert all(map(torch.equal, weights(each), expected)), weight_format


# ------------------------------------------------------------------------------------------------------- bitsandbytes


def check_bitsandbytes_in_parts() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for kind, storage in (("fp4", torch.bfloat16), ("nf4", torch.uint8), ("nf4", torch.bfloat16), ("int8", None)):
        dtypes = (*BYTES, torch.bfloat16)
        model, twin = (patched(quantised(kind, storage)) for _ in range(2))
        held = [layer.base_layer.weight for layer in lora_layers(model)]
        size, whole = sum(weight.numel() * weight.itemsize for weight in held), live(dtypes)
        del held
        peftkern.shardable(model)
        sharded(model, adapters)
        assert len(peftkern.report(model).fast) == LAYERS, str(peftkern.report(model))
        assert live(dtypes) == whole - size / 2, kind
        found = trained(model, 32 if storage is torch.bfloat16 and kind == "nf4" else 3)
        assert_fused(model, len(found[0]))
        assert live(dtypes) == whole - size / 2, kind
        assert_same(found, trained(twin, len(found[0]), TOKENS))
        with torch.no_grad(), model.disable_adapter(), twin.disable_adapter():  # bitsandbytes' own forward
            logits = [each(input_ids=TOKENS[0]).logits for each in (model, twin)]
        torch.testing.assert_close(*logits)


def check_bitsandbytes_in_bf16() -> None:
    """As QLoRA is set up for FSDP: bytes stored as bf16, computed in it, every unit's policy of it too."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for kind, storage in (("nf4", torch.bfloat16), ("int8", None)):
        model, plain = (quantised(kind, storage, torch.bfloat16) for _ in range(2))
        peftkern.patch(model)
        for each in (model, plain):
            peftkern.shardable(each)
            sharded(each, UNITS["leaves and bases"], mp_policy=policy)
        found, expected = (trained(each, 8)[0] for each in (model, plain))
        assert_fused(model, 8)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


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
