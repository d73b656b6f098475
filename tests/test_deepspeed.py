"""The real DeepSpeed on two processes: ZeRO-2 and ZeRO-3 of patched models train as plain PEFT's, fused.

Runs where deepspeed is installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed
What runs everywhere is test_zero3.py, whose stand-in does what DeepSpeed's hooks do.
"""

from __future__ import annotations

import importlib.util
import logging
import os

import distributed
import pytest
import torch
import torch.distributed as dist
from conftest import TOKENS, adapted
from torch import nn

import peftkern

F32, BF16 = torch.float32, torch.bfloat16
STEPS, MANY, LAYERS = 3, 32, 14
# Nothing is kept longer than a module needs it, and what comes next is fetched ahead, or not.
STAGE3 = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
Trained = tuple[list[torch.Tensor], dict[str, torch.Tensor], peftkern.PatchReport]


def engine_of(model: nn.Module, stage: int, dtype: torch.dtype, prefetch: int, rate: float):
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    zero = {"stage": stage} | (STAGE3 | {"stage3_prefetch_bucket_size": prefetch} if stage == 3 else {})
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "bf16": {"enabled": dtype == BF16},
        "optimizer": {"type": "AdamW", "params": {"lr": rate, "torch_adam": True}},
    }  # fmt: skip
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def train(
    patch: str, stage: int = 3, dtype: torch.dtype = F32, reentrant: bool | None = None, prefetch: int = 0,
    steps: int = STEPS, **options,
) -> Trained:  # fmt: skip
    """Losses, adapters and the report; ``patch``: "before" or "after" the engine is made, "later" after a step, ""."""
    import deepspeed

    model = adapted(dtype).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.config.use_cache = False
    if patch == "before":
        peftkern.patch(model, **options)
    engine = engine_of(model, stage, dtype, prefetch, rate=1e-2 if steps == STEPS else 1e-3)
    if patch == "after":
        peftkern.patch(model, **options)
    losses, tokens = [], TOKENS.roll(dist.get_rank(), 1)
    for step in range(steps):
        if patch == "later" and step == 1:
            peftkern.patch(model, **options)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    report = peftkern.report(model)
    held = [p for name, p in model.named_parameters() if "lora_" in name]
    with deepspeed.zero.GatheredParameters(held) if stage == 3 else torch.no_grad():
        adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    engine.destroy()
    return losses, adapters, report


def assert_trains_as_pefts(patch: str, calls: int = STEPS, dtype: torch.dtype = F32, **how) -> None:
    (own, adapters, report), (losses, expected, _) = train(patch, dtype=dtype, **how), train("", dtype=dtype, **how)
    tolerance = 2e-5 if dtype == F32 else 1e-2
    torch.testing.assert_close(own, losses, rtol=tolerance, atol=0)
    assert own[-1] < own[0]
    for name, value in expected.items():
        assert value.numel() and (adapters[name] - value).norm() <= 10 * tolerance * value.norm(), name
    assert len(report.fast) == LAYERS and not report.skipped, report
    assert [counts.get("fused") for counts in report.calls.values()] == [calls] * LAYERS, report
    others = [set(counts) - {"fused"} for counts in report.calls.values()]
    assert all(not reasons for reasons in others), report


def check_zero2() -> None:
    for patch in ("before", "after"):
        assert_trains_as_pefts(patch, stage=2)


def check_zero2_and_zero3_over_32_steps() -> None:
    for stage in (2, 3):
        assert_trains_as_pefts("before", calls=MANY, stage=stage, steps=MANY)


def check_zero3() -> None:
    for patch in ("before", "after"):
        assert_trains_as_pefts(patch)
    assert_trains_as_pefts("later", calls=STEPS - 1)


def check_zero3_that_fetches_ahead() -> None:
    assert_trains_as_pefts("before", prefetch=10_000)


def check_zero3_in_bf16_over_32_steps() -> None:
    assert_trains_as_pefts("before", calls=MANY, dtype=BF16, steps=MANY)


def check_zero3_behind_checkpoints() -> None:
    for reentrant in (True, False):
        assert_trains_as_pefts("before", calls=2 * STEPS, reentrant=reentrant)


def check_zero3_runs_layers_of_one_x_alone() -> None:
    """Each gets an x of its own: DeepSpeed's hooks make one for every layer."""
    assert_trains_as_pefts("before", share=True)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return distributed.run_in_two(__file__, seconds=600)


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, outcome: dict[str, str]) -> None:
    assert name in outcome, "an earlier check failed"
    assert not outcome[name], outcome[name]


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    distributed.main(CHECKS)
