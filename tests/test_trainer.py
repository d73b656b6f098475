"""Hugging Face Trainer and TRL's SFTTrainer with PeftkernCallback: the same curves as without it."""

from __future__ import annotations

import pytest
import torch
from conftest import ALL_LINEAR, adapted, linears, llama, randomise
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from peftkern.integrations.peft import PeftkernLoraLinear
from peftkern.integrations.transformers import PeftkernCallback

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(0, 64, (16, 9), generator=torch.Generator().manual_seed(4))
]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """accelerate and the Trainer keep one run's mixed precision for the next."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)


def options(folder, **more) -> dict:
    settings = dict(
        output_dir=str(folder), use_cpu=True, max_steps=4, per_device_train_batch_size=2, optim="sgd",
        gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=3,
        learning_rate=0.5, lr_scheduler_type="constant", remove_unused_columns=False,
    )  # fmt: skip
    return settings | more


def train(folder, callback: PeftkernCallback | None, *, resume: bool | None = None, p: float = 0.0, **more) -> Trainer:
    model = adapted(lora_dropout=p)
    model.enable_input_require_grads()  # which reentrant checkpointing needs
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**options(folder, **more)),
        train_dataset=ROWS,
        callbacks=[] if callback is None else [callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapters(model) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if "lora_" in name}


def assert_same_training(found: Trainer, expected: Trainer) -> None:
    assert len(losses(found)) == len(losses(expected)) > 1
    torch.testing.assert_close(torch.tensor(losses(found)), torch.tensor(losses(expected)), rtol=1e-4, atol=0)
    start = adapters(adapted())
    assert any(not torch.equal(value, start[name]) for name, value in adapters(expected.model).items())
    for value, other in zip(adapters(found.model).values(), adapters(expected.model).values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_trainer_with_accumulation_and_gradient_checkpointing(use_reentrant, tmp_path, calls, capsys):
    checkpointing = {}
    if use_reentrant is not None:
        checkpointing = dict(
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
    expected = train(tmp_path / "plain", None, **checkpointing)
    assert not calls
    capsys.readouterr()
    callback = PeftkernCallback()
    found = train(tmp_path / "fused", callback, **checkpointing)
    assert_same_training(found, expected)
    forwards = 4 * 2 * 14
    assert len(calls) == forwards if use_reentrant is None else forwards < len(calls) <= 2 * forwards
    assert len(callback.report.fast) == 14 and capsys.readouterr().out.count("14 of 14 LoRA layers are fused") == 1


def test_resume_from_a_checkpoint_is_as_if_it_had_not_stopped(tmp_path, calls):
    """With dropout: the generator's state is in the checkpoint, and so are the masks. The files are PEFT's."""
    whole = train(tmp_path / "whole", PeftkernCallback(), p=0.3)
    saving = dict(save_strategy="steps", save_steps=2)
    train(tmp_path / "parts", PeftkernCallback(), p=0.3, max_steps=2, **saving)
    files = {path.name for path in (tmp_path / "parts" / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= files
    resumed = train(tmp_path / "parts", PeftkernCallback(), p=0.3, resume=True, **saving)
    for value, other in zip(adapters(resumed.model).values(), adapters(whole.model).values(), strict=True):
        assert torch.equal(value, other)
    assert len(calls) == (4 + 2 + 2) * 2 * 14


def test_the_callback_finds_the_model_of_model_init_and_unpatches_at_the_end(tmp_path, calls):
    callback = PeftkernCallback(unpatch_at_end=True)
    trainer = Trainer(
        model_init=lambda: adapted(), args=TrainingArguments(**options(tmp_path, max_steps=1)), train_dataset=ROWS,
        eval_dataset=ROWS[:2], callbacks=[callback],
    )  # fmt: skip
    trainer.evaluate()
    assert len(calls) == 14 and callback.report.fast
    trainer.train()
    assert len(calls) == 14 + 2 * 14
    assert not any(type(layer) is PeftkernLoraLinear for layer in linears(trainer.model).values())


def test_bf16_autocast_by_the_trainer(tmp_path, calls):
    expected, found = (train(tmp_path / str(i), c, bf16=True) for i, c in enumerate((None, PeftkernCallback())))
    torch.testing.assert_close(torch.tensor(losses(found)), torch.tensor(losses(expected)), rtol=1e-2, atol=0)
    assert len(calls) == 4 * 2 * 14


# ------------------------------------------------------------------------------------------------------------- TRL


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(61)} | {"<pad>": 61, "<eos>": 62, "<unk>": 63}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def test_sft_trainer_makes_the_adapter_and_the_callback_finds_it(tmp_path, tokenizer, calls):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    texts = datasets.Dataset.from_dict(
        {"text": [" ".join(f"w{7 * i + j}" for j in range(3 + i % 4)) for i in range(8)]}
    )

    def run(folder: str, callbacks: list):
        torch.manual_seed(0)
        settings = options(
            tmp_path / folder, max_length=16, gradient_checkpointing=True, bf16=False
        )  # TRL's own default is bf16
        settings.pop("remove_unused_columns")
        trainer = trl.SFTTrainer(
            model=llama(), args=trl.SFTConfig(**settings), train_dataset=texts, processing_class=tokenizer,
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"),
            callbacks=callbacks,
        )  # fmt: skip
        randomise(trainer.model)
        trainer.train()
        return trainer

    expected = run("plain", [])
    assert not calls
    callback = PeftkernCallback()
    found = run("fused", [callback])
    assert_same_training(found, expected)
    assert len(callback.report.fast) == 14 and len(calls) >= 4 * 2 * 14
