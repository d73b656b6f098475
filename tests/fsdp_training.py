"""A PEFT model of one block in parts on two processes, trained beside the same model on one."""

from __future__ import annotations

from collections.abc import Callable

import distributed
import torch
import torch.distributed as dist
from conftest import ALL_LINEAR, adapted, llama, randomise
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import peftkern

LAYERS = 7
TOKENS = [torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
Losses = tuple[Tensor, dict[str, Tensor]]


def small(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A PEFT model of one block."""
    model = adapted(dtype, **options).train()
    del model.base_model.model.model.layers[1:]
    return model


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    found = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(found) == LAYERS
    return found


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
    for unit in [*(unit for layer in lora_layers(model) for unit in units(layer)), *blocks(model), model]:
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


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def quantised(kind: str, storage: torch.dtype | None = None, compute: torch.dtype = torch.float32) -> nn.Module:
    """PEFT over bitsandbytes' layers."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    model = llama(compute, widths=(64, 128)).train()
    del model.model.layers[1:]
    for parent in list(model.model.layers.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                N, K = linear.weight.shape
                if kind == "int8":
                    layer: nn.Module = bnb.nn.Linear8bitLt(K, N, False, has_fp16_weights=False)
                else:
                    layer = bnb.nn.Linear4bit(K, N, False, compute, quant_type=kind, quant_storage=storage)
                layer.weight.data = linear.weight.data
                setattr(parent, name, layer.to("cpu"))
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
    return randomise(get_peft_model(model, config)).train()
