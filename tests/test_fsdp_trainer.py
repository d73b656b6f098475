"""Two processes: FSDP2 and FSDP1 by the Trainer and accelerate, with their own wrap policies."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence

import distributed
import pytest
import torch
import torch.distributed as dist
from fsdp_training import TOKENS, assert_fused, local, lora_layers, patched, quantised, small
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


@contextlib.contextmanager
def accelerate_on_cpus() -> Iterator[None]:
    """accelerate does not look at its plugin for FSDP, which the Trainer and its launcher make, where it has no GPU."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    made = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **options) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            shared = {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
            PartialState._shared_state.update(shared)
            self.__dict__.update(shared, fsdp_plugin=fsdp_plugin)
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(AcceleratorState, "__init__", init)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)


def by_the_trainer(model: nn.Module, config: dict, callbacks: Sequence = (), **options) -> Tensor:
    """The loss of each of 32 steps."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.cat(TOKENS)] * 16
    settings = dict(
        use_cpu=True, max_steps=32, per_device_train_batch_size=1, learning_rate=1e-2, logging_steps=1, seed=3,
        save_strategy="no", report_to=[], disable_tqdm=True, fsdp=True, fsdp_config=dict(config),
    )  # fmt: skip
    with accelerate_on_cpus(), tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **settings, **options)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))
        trainer.train()
    assert isinstance(trainer.model, FSDPModule if config["version"] == 2 else FullyShardedDataParallel)
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


FSDP1 = {"version": 1, "sync_module_states": False}
# the configuration, whether in bf16, whether patched before; by PEFT's policy FSDP1 has a unit for each trainable leaf
CASES: list[tuple[dict, bool, bool]] = [
    ({"version": 2}, False, True),
    ({"version": 2, "cpu_ram_efficient_loading": True, "activation_checkpointing": True}, True, False),
    (FSDP1 | {"use_orig_params": True}, True, False),
    (FSDP1 | {"use_orig_params": False}, False, True),
]


def check_the_trainer_over_32_steps() -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from peftkern.integrations.transformers import PeftkernCallback

    class Late(PeftkernCallback):
        def on_init_end(self, *args, **more) -> None:
            """Leaves the model alone, which is not sharded yet."""

    for config, bf16, before in CASES:
        expected = by_the_trainer(small(), config, bf16=bf16)
        assert len(expected) == 32 and expected[-1] < expected[0] - 0.1
        model = patched(small()) if before else small()
        found = by_the_trainer(model, config, [] if before else [Late()], bf16=bf16)
        assert_fused(model, 64 if "activation_checkpointing" in config else 32)
        torch.testing.assert_close(found, expected, rtol=1e-2 if bf16 else 2e-5, atol=1e-2 if bf16 else 2e-5)


def check_qlora_by_the_trainer() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    options = ("nf4", torch.bfloat16, torch.bfloat16)
    for config in ({"version": 2}, FSDP1 | {"use_orig_params": True}):
        model = patched(quantised(*options))
        size = sum(layer.base_layer.weight.numel() for layer in lora_layers(model))
        found = by_the_trainer(model, config, bf16=True)
        held = torch.tensor(sum(local(layer.base_layer.weight).numel() for layer in lora_layers(model)))
        dist.all_reduce(held)
        assert held == size, config  # the ranks have each weight once, together
        assert_fused(model, 32)
        expected = by_the_trainer(quantised(*options), config, bf16=True)
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
