"""How a model is launched, whether its layers are fused, and that 32 steps are plain PEFT's: docs/launching.md's table.

``PYTHONPATH=tests python tests/test_launches.py`` prints it. What one process can do is done here; ``SHOWN``
names the tests of the rest.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import pytest
import test_zero3
import torch
from conftest import ALL_LINEAR, ROOT, adapted, llama, randomise
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from quantised_models import quantise
from test_readme import written
from test_trainer import options
from torch import nn
from zero3_stand_in import ZeRO3

import peftkern
from peftkern.integrations.transformers import PeftkernCallback

pytestmark = pytest.mark.filterwarnings("ignore")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STEPS = 32
EXACT, ROUNDED = 2e-5, 1e-2  # how near losses are in fp32, and where something is rounded to 16 bits
BATCHES = [torch.randint(3, 60, (2, n), generator=torch.Generator().manual_seed(n)) for n in (7, 8, 12, 5)]
Losses = list[float]
Trained = tuple[nn.Module, Losses]


class Launch(NamedTuple):
    """What trains a model, patched or not, and how near its losses are to those of plain PEFT."""

    train: Callable[[bool], Trained]
    near: float
    needs: str = "peft"


class Shown(NamedTuple):
    """What a test of another file asserts: how many layers are fused, or why not; over how many steps, how near."""

    fused: str
    losses: str
    test: str


# ------------------------------------------------------------------------------------------------- loops of one's own


def steps(model: nn.Module, call: Callable | None = None, autocast: torch.dtype | None = None) -> Trained:
    """AdamW on the batches in turn; under autocast to fp16 with a scaler, as it is used."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=autocast == F16)
    losses = []
    for i in range(STEPS):
        optimizer.zero_grad()
        tokens = BATCHES[i % len(BATCHES)]
        with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
            loss = (model if call is None else call)(input_ids=tokens, labels=tokens).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return model, losses


def plainly(patched: bool, dtype: torch.dtype = F32, autocast: torch.dtype | None = None) -> Trained:
    model = adapted(dtype).train()
    if patched:
        peftkern.patch(model)
    return steps(model, autocast=autocast)


def checkpointed(patched: bool, reentrant: bool) -> Trained:
    model = adapted().train()
    if patched:
        peftkern.patch(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return steps(model)


def qlora_model(kind: str, compute: torch.dtype, checkpoints: bool = True) -> nn.Module:
    """As every tutorial has it: quantised, prepared, with checkpoints, and adapters in fp32."""
    base = llama(compute, widths=(64, 128))
    base = prepare_model_for_kbit_training(quantise(base, kind, compute), checkpoints)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
    return randomise(get_peft_model(base, config)).train()


def qlora(patched: bool, kind: str, compute: torch.dtype) -> Trained:
    model = qlora_model(kind, compute)
    if patched:
        peftkern.patch(model)
    return steps(model, autocast=compute)


def compiled(patched: bool, kind: str = "") -> Trained:
    """In one graph, beside PEFT's without; the C++ that torch makes of it by default takes a minute to compile."""
    torch._dynamo.reset()
    model = qlora_model(kind, BF16, checkpoints=False) if kind else adapted().train()
    del model.base_model.model.model.layers[1:]  # half the time
    model.config.use_cache = False
    if not patched:
        return steps(model, autocast=BF16 if kind else None)
    peftkern.patch(model)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    return steps(model, graph, autocast=BF16 if kind else None)


def trainer(patched: bool) -> Trained:
    """transformers' own, whose callback patches."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for tokens in BATCHES for row in tokens[:, :5]]
    with tempfile.TemporaryDirectory() as folder:
        more = dict(max_steps=STEPS, gradient_accumulation_steps=1, optim="adamw_torch", learning_rate=1e-3)
        made = Trainer(
            model=adapted(), args=TrainingArguments(**options(folder, **more)), train_dataset=rows,
            callbacks=[PeftkernCallback()] if patched else [],
        )  # fmt: skip
        made.train()
    return made.model, [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def zero3(patched: bool) -> Trained:
    """Over a stand-in for DeepSpeed, whose optimiser updates what the ranks hold."""
    with pytest.MonkeyPatch.context() as patching:
        ZeRO3.installed(patching)
        model = test_zero3.model_of()
        if patched:
            peftkern.patch(model)
        partitions, losses = ZeRO3(model), []
        held = {p: nn.Parameter(p.ds_parts) for p in model.parameters() if p.requires_grad}  # the same memory
        optimizer = torch.optim.AdamW(held.values(), 1e-3)
        for _ in range(STEPS):
            loss = model(test_zero3.X).square().mean()
            loss.backward()
            partitions.end_of_backward()
            for parameter, part in held.items():
                part.grad, parameter.grad = parameter.grad, None
            optimizer.step()
            losses.append(loss.item())
    return model, losses


def offloaded(patched: bool) -> Trained:
    import accelerate

    model = adapted().train()
    if patched:
        peftkern.patch(model)
    for block in model.base_model.model.model.layers:  # the adapters stay where their optimiser is
        for layer in block.modules():
            if hasattr(layer, "base_layer"):
                accelerate.cpu_offload(layer.base_layer)
    return steps(model)


LAUNCHES = {
    "a loop, fp32": Launch(plainly, EXACT),
    "a bf16 base, fp32 adapters": Launch(functools.partial(plainly, dtype=BF16), ROUNDED),
    "autocast to bf16": Launch(functools.partial(plainly, autocast=BF16), ROUNDED),
    "autocast to fp16, GradScaler": Launch(functools.partial(plainly, autocast=F16), ROUNDED),
    "checkpoints, reentrant": Launch(functools.partial(checkpointed, reentrant=True), EXACT),
    "checkpoints, non-reentrant": Launch(functools.partial(checkpointed, reentrant=False), EXACT),
    **{
        f"QLoRA, {kind} in {name}": Launch(functools.partial(qlora, kind=kind, compute=of), ROUNDED, "bitsandbytes")
        for kind in ("nf4", "int8")
        for name, of in (("bf16", BF16), ("fp16", F16))
    },
    "torch.compile, fp32": Launch(compiled, EXACT),
    "torch.compile, QLoRA's nf4 in bf16": Launch(functools.partial(compiled, kind="nf4"), ROUNDED, "bitsandbytes"),
    "the Trainer": Launch(trainer, EXACT, "accelerate"),
    "ZeRO-3 (a stand-in for DeepSpeed)": Launch(zero3, EXACT),
    "a base offloaded by accelerate": Launch(offloaded, EXACT, "accelerate"),
}  # fmt: skip


SHOWN = {
    "TRL's DPOTrainer and GRPOTrainer": Shown("14 of 14", "3 steps, 2e-05", "test_three_steps_are_plain_pefts"),
    "TRL's SFTTrainer": Shown(
        "14 of 14", "4 steps, 1e-04", "test_sft_trainer_makes_the_adapter_and_the_callback_finds_it"
    ),
    "Diffusers' UNet and Flux transformer": Shown("all", "1 step", "test_adapters_by_weight_and_the_scale_of_a_call"),
    "T5 in fp16, wo in fp32": Shown("all", "1 step", "test_wo_in_fp32_beside_fp16"),
    "sentence-transformers": Shown("12 of 12", "3 steps, 2e-05", "test_sentence_transformers"),
    "DDP by accelerate": Shown("14 of 14", "1 step", "check_ddp_by_accelerate"),
    "FSDP2, adapters, LoRA layers or blocks as units": Shown(
        "7 of 7", "2 steps, 2e-05", "check_fsdp2_units_of_every_kind"
    ),
    "FSDP2, every adapter a unit": Shown("7 of 7", "32 steps, 2e-05", "check_fsdp2_leaves_over_32_steps"),
    "FSDP2 in bf16": Shown("7 of 7", "32 steps, 1e-02", "check_fsdp2_in_bf16_over_32_steps"),
    "FSDP2 and FSDP1 by the Trainer": Shown("7 of 7", "32 steps, 2e-05", "check_the_trainer_over_32_steps"),
    "the same, QLoRA's nf4 in bf16": Shown("7 of 7", "32 steps, 1e-02", "check_qlora_by_the_trainer"),
    "FSDP1, units of frozen and trained": Shown(
        "no: its base weight requires grad", "2 steps, 2e-05", "check_fsdp1_units_of_frozen_and_trained_parameters"
    ),
    "ZeRO-2 and ZeRO-3 by DeepSpeed": Shown("14 of 14", "32 steps, 2e-05", "check_zero2_and_zero3_over_32_steps"),
    "ZeRO-3 by DeepSpeed, bf16": Shown("14 of 14", "32 steps, 1e-02", "check_zero3_in_bf16_over_32_steps"),
    "tensor parallelism of PEFT's layers": Shown(
        "no: a weight of type DTensor", "1 forward", "check_a_patched_peft_layer_under_tensor_parallelism_is_pefts"
    ),
}
HEADS = ("how it is launched", "fused", "losses, how near to plain PEFT's")


def measured(launch: Launch) -> tuple[str, str]:
    """How many layers were fused at all calls, or the reasons, and how near the losses are."""
    (_, expected), (model, found) = launch.train(False), launch.train(True)
    assert len(found) == len(expected) == STEPS and sum(found[-4:]) < sum(found[:4]), found
    furthest = max(abs(own - theirs) / theirs for own, theirs in zip(found, expected, strict=True))
    assert furthest <= launch.near, furthest
    report = peftkern.report(model)
    reasons = {reason.removesuffix(" (traced)") for of in report.calls.values() for reason in of}
    fused = f"{len(report.fast)} of {len(report.fast) + len(report.skipped)}"
    return fused if reasons == {"fused"} else f"no: {', '.join(sorted(reasons))}", f"{STEPS} steps, {launch.near:.0e}"


def row(name: str) -> str:
    """Of the table, as Markdown."""
    if name in SHOWN:
        fused, losses, _ = SHOWN[name]
    else:
        fused, losses = measured(LAUNCHES[name])
    return f"| {name} | {fused} | {losses} |"


@pytest.mark.parametrize("name", [*LAUNCHES, *SHOWN])
def test_the_readme_says_so(name):
    if name in LAUNCHES:
        pytest.importorskip(LAUNCHES[name].needs, reason=f"{LAUNCHES[name].needs} is not installed")
    else:
        assert any(f"def {SHOWN[name].test}(" in file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert row(name) in written().splitlines()


def test_the_readme_has_no_other_rows():
    text = written().split(f"| {' | '.join(HEADS)} |")[1].split("\n\n")[0]
    names = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[2:]]
    assert names == [*LAUNCHES, *SHOWN]


def main() -> None:
    logging.getLogger("peftkern").setLevel(logging.ERROR)
    print(f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", sep="\n")
    for name in (*LAUNCHES, *SHOWN):
        with contextlib.redirect_stdout(io.StringIO()):
            line = row(name)
        print(line, flush=True)


if __name__ == "__main__":
    main()
