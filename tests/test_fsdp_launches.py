"""Two processes: FSDP2 and FSDP1 as accelerate, the Trainer and LlamaFactory set them up, and packed bases in parts."""

from __future__ import annotations

import types
from collections.abc import Callable

import distributed
import pytest
import torch
import torch.distributed as dist
from conftest import ALL_LINEAR, adapted, linears, llama, randomise
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

import peftkern
from peftkern.nn import LoRALinear

LAYERS = 7
TOKENS = [torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
Losses = tuple[Tensor, dict[str, Tensor]]


def small(**options) -> nn.Module:
    """A PEFT model of one block."""
    model = adapted(**options).train()
    del model.base_model.model.model.layers[1:]
    return model


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.WORLD,))


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def trained(model: nn.Module, steps: int, batches: list[Tensor] | None = None) -> Losses:
    """The mean loss of each step over the ranks, or over batches, and the gradients of the last one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    mine = [TOKENS[dist.get_rank()]] if batches is None else batches
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        mean = sum(model(input_ids=tokens, labels=tokens).loss for tokens in mine) / len(mine)
        mean.backward()
        losses.append(mean.detach().float())
        optimizer.step()
    total = torch.stack(losses)
    if batches is None:
        dist.all_reduce(total)
        total /= distributed.WORLD
    return total, {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Losses, expected: Losses, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, gradient in expected[1].items():
        size = gradient.abs().max()
        torch.testing.assert_close(found[1][name] / size, gradient / size, rtol=0, atol=10 * tolerance, msg=name)


def assert_fused(model: nn.Module, calls: int) -> None:
    report = peftkern.report(model)
    assert len(report.fast) == LAYERS and not report.skipped, str(report)
    assert list(report.calls.values()) == [{"fused": calls}] * LAYERS, str(report)


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]


def sharded(model: nn.Module, units: Callable[[nn.Module], list[nn.Module]] = lambda layer: [], **options) -> nn.Module:
    """FSDP2 by blocks, after the units of each LoRA layer."""
    for unit in [*(unit for layer in linears(model).values() for unit in units(layer)), *blocks(model), model]:
        fully_shard(unit, mesh=mesh(), **options)
    return model


def adapters(layer: nn.Module) -> list[nn.Module]:
    return [layer.lora_A["default"], layer.lora_B["default"]]


UNITS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "blocks": lambda layer: [],
    "leaves": adapters,
    "leaves and bases": lambda layer: [*adapters(layer), layer.base_layer],
    "LoRA layers": lambda layer: [layer],
}


def patched(model: nn.Module) -> nn.Module:
    peftkern.patch(model)
    return model


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
            if not before:
                report = peftkern.patch(model)
                assert len(report.fast) == LAYERS, f"{name}: {report}"
            found = trained(model, 2)
            assert_fused(model, 2)
            assert_same(found, expected)


def check_fsdp2_by_accelerate() -> None:
    """What ``accelerate launch`` does with its policies by class and by size, and the Trainer with PEFT's."""
    utils = pytest.importorskip("accelerate.utils", reason="accelerate is not installed")
    from peft.utils.other import fsdp_auto_wrap_policy

    expected = trained(small(), 2, TOKENS)
    for policy in (transformer_auto_wrap_policy, size_based_auto_wrap_policy, "PEFT's"):
        model = patched(small())
        plugin = utils.FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, min_num_params=100,
            auto_wrap_policy=fsdp_auto_wrap_policy(model) if policy == "PEFT's" else policy,
        )  # fmt: skip
        state = types.SimpleNamespace(fsdp_plugin=plugin)
        accelerator = types.SimpleNamespace(state=state, mixed_precision="no", is_main_process=True)
        accelerator.torch_device_mesh = None
        with torch.device("cpu"):
            model = utils.fsdp_utils.fsdp2_prepare_model(accelerator, model)
        apart = [layer for layer in linears(model).values() if isinstance(layer.base_layer, FSDPModule)]
        assert bool(apart) == (policy is size_based_auto_wrap_policy)
        found = trained(model, 2)
        assert_fused(model, 2)
        assert_same(found, expected)


def check_fsdp2_mixed_precision() -> None:
    """As accelerate has it: parameters, inputs and outputs of every unit in bf16."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    model = sharded(patched(small()), UNITS["leaves and bases"], mp_policy=policy)
    found = trained(model, 8)
    assert_fused(model, 8)
    plain = trained(sharded(small(), UNITS["leaves and bases"], mp_policy=policy), 8)
    torch.testing.assert_close(found[0], plain[0], rtol=1e-2, atol=1e-2)


def check_a_policy_of_the_adapters_alone() -> None:
    """bf16 beside a base in fp32 is PEFT's, with the reason; y is in PEFT's dtype, whatever the units cast."""
    mixed = {"x is torch.bfloat16, the base torch.float32, the adapter torch.bfloat16"}
    for policy, reasons in (
        (MixedPrecisionPolicy(torch.bfloat16), mixed),
        (MixedPrecisionPolicy(output_dtype=torch.float64), {"fused"}),
    ):
        model, dtypes = patched(small()), set()
        for layer in linears(model).values():
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
        for layer in linears(each).values():
            layer.lora_A["default"].register_forward_hook(lambda child, inputs, y: 2 * y)
    with torch.no_grad():
        found, expected = (each(input_ids=TOKENS[0]).logits for each in (model, plain))
        with model.disable_adapter(), plain.disable_adapter():
            without, base = (each(input_ids=TOKENS[0]).logits for each in (model, plain))
    assert torch.equal(found, expected) and torch.equal(without, base) and not torch.equal(found, base)
    assert list(peftkern.report(model).calls.values()) == [{watched: 1, off: 1}] * LAYERS
    assert set(peftkern.report(model).skipped.values()) == {watched}
    for layer in linears(model).values():
        layer.lora_A["default"]._forward_hooks.popitem()
    trained(model, 1)
    assert list(peftkern.report(model).calls.values()) == [{watched: 1, off: 1, "fused": 1}] * LAYERS
    assert len(peftkern.report(model).fast) == LAYERS


# -------------------------------------------------------------------------------------------------------------- FSDP1


def fsdp1(before: bool, policy: Callable[[nn.Module], object], **options) -> nn.Module:
    model = small()
    if before:
        peftkern.patch(model)
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy(model), device_id=cpu, **options)
    return wrapped if before else patched(wrapped)


@pytest.mark.filterwarnings("ignore:.*requires_grad")
def check_fsdp1_by_the_trainer() -> None:
    """PEFT's policy, which the Trainer applies, makes units of the leaves, with and without use_orig_params."""
    from peft.utils.other import fsdp_auto_wrap_policy

    expected = trained(small(), 3, TOKENS)[0]
    for original in (True, False):
        for before in (True, False):
            model = fsdp1(before, fsdp_auto_wrap_policy, use_orig_params=original)
            assert len(peftkern.report(model).fast) == LAYERS, str(peftkern.report(model))
            torch.testing.assert_close(trained(model, 3)[0], expected, rtol=2e-5, atol=2e-5)
            assert_fused(model, 3)


@pytest.mark.filterwarnings("ignore:.*requires_grad")
def check_fsdp1_units_of_frozen_and_trained_parameters() -> None:
    expected = trained(small(), 2, TOKENS)[0]
    kinds = {type(block) for block in blocks(small())}
    for before in (True, False):
        model = fsdp1(before, lambda model: ModuleWrapPolicy(kinds), use_orig_params=True)
        torch.testing.assert_close(trained(model, 2)[0], expected, rtol=2e-5, atol=2e-5)
        report = peftkern.report(model)
        assert list(report.skipped.values()) == ["its base weight requires grad"] * LAYERS, str(report)


# ------------------------------------------------------------------------------------------------------- packed bases


def local_bytes(model: nn.Module, name: str) -> int:
    """What this rank has of the base layers' parameters, and of their buffers."""
    tensors = [p for n, p in (*model.named_parameters(), *model.named_buffers()) if name in n and "lora_" not in n]
    held = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.itemsize for tensor in held)


def check_lora_linear_over_sharded_bytes() -> None:
    for weight_format in ("nf4", "fp4", "int8", "int4", "fp8"):
        model, twin = (injected_packed(weight_format) for _ in range(2))
        before, saved = local_bytes(model, "_proj"), model.state_dict()
        assert len(peftkern.shardable(model)) == LAYERS and not peftkern.shardable(model)
        assert local_bytes(model, "_proj") <= before + 16 * 6 * LAYERS
        assert model.state_dict().keys() == saved.keys()
        model.load_state_dict(saved)
        sharded_plain(model)
        print(model)  # gathers nothing: one rank alone may do it
        assert local_bytes(model, "_proj") <= before / 2 + 16 * 6 * LAYERS, weight_format
        assert_same(trained(model, 3), trained(twin, 3, TOKENS))
        assert local_bytes(model, "_proj") <= before / 2 + 16 * 6 * LAYERS, weight_format
        model.load_state_dict(model.state_dict())
        for one, other in zip(packed(model), packed(twin), strict=True):
            assert all(map(torch.equal, one.frozen_weight().tensors, other.frozen_weight().tensors))


def packed(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def injected_packed(weight_format: str) -> nn.Module:
    model = llama(widths=(64, 96)).train()
    del model.model.layers[1:]
    for parent in list(model.model.layers.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                setattr(parent, name, LoRALinear.from_linear(linear, 4, 8, weight_format=weight_format))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return randomise(model)


def sharded_plain(model: nn.Module) -> nn.Module:
    for unit in (*blocks(model), model):
        fully_shard(unit, mesh=mesh())
    return model


def quantised(kind: str, storage: torch.dtype | None) -> nn.Module:
    """PEFT over bitsandbytes' layers."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    model = llama(widths=(64, 128)).train()
    del model.model.layers[1:]
    for parent in list(model.model.layers.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                N, K = linear.weight.shape
                if kind == "int8":
                    layer: nn.Module = bnb.nn.Linear8bitLt(K, N, False, has_fp16_weights=False)
                else:
                    layer = bnb.nn.Linear4bit(K, N, False, torch.float32, quant_type=kind, quant_storage=storage)
                layer.weight.data = linear.weight.data
                setattr(parent, name, layer.to("cpu"))
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
    return randomise(get_peft_model(model, config))


def check_bitsandbytes_in_parts() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for kind, storage in (("nf4", torch.uint8), ("nf4", torch.bfloat16), ("fp4", torch.bfloat16), ("int8", None)):
        model, twin = (patched(quantised(kind, storage)) for _ in range(2))
        before = local_bytes(model, "base_layer")
        peftkern.shardable(model)
        sharded(model, adapters)
        assert len(peftkern.report(model).fast) == LAYERS, str(peftkern.report(model))
        assert local_bytes(model, "base_layer") == before / 2
        found = trained(model, 3)
        assert_fused(model, 3)
        assert local_bytes(model, "base_layer") == before / 2
        assert_same(found, trained(twin, 3, TOKENS))
        with torch.no_grad(), model.disable_adapter(), twin.disable_adapter():  # bitsandbytes' own forward
            logits = [each(input_ids=TOKENS[0]).logits for each in (model, twin)]
        torch.testing.assert_close(*logits)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    return distributed.run_in_two(__file__)


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, outcome: dict[str, str]) -> None:
    assert name in outcome, "an earlier check failed"
    if outcome[name].startswith(distributed.SKIPPED):
        pytest.skip(outcome[name])
    assert not outcome[name], outcome[name]


if __name__ == "__main__":
    distributed.main(CHECKS)
