"""TRL's DPO and GRPO with the adapter off as their reference: losses, gradients and adapters are plain PEFT's.

The policy of such a loop goes to a server after every step, as PEFT's files: it serves what the trainer has.
"""

from __future__ import annotations

import pytest
import torch
from conftest import ALL_LINEAR, adapted, linears, llama, logits, randomise
from peft import LoraConfig, PeftModel
from test_trainer import fresh_accelerate, options, tokenizer  # noqa: F401 - fixtures

import peftkern
from peftkern.integrations.transformers import PeftkernCallback

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

STEPS, BOUND = 3, 2e-5
OFF = "its adapters are disabled"


def words(*numbers: int) -> str:
    return " ".join(f"w{number % 61}" for number in numbers)


def recorded(kind: type) -> type:
    """The trainer, and what each of its steps computed: the loss, and the gradient of every trained parameter."""

    class Recorded(kind):
        def training_step(self, model, *arguments, **more):
            loss = super().training_step(model, *arguments, **more)
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            self.__dict__.setdefault("steps", []).append({"loss": loss.detach()} | gradients)
            return loss

    return Recorded


def train(kind: str, folder, tokenizer, callback: PeftkernCallback | None, *, given: bool = False):  # noqa: F811
    """Three steps; ``given``: the model comes with its adapter, of which DPO makes its reference a copy."""
    settings = options(folder, max_steps=STEPS, gradient_accumulation_steps=1, bf16=False, learning_rate=0.05, beta=0.5)
    settings.pop("remove_unused_columns")
    prompts = [words(i, 3 * i) for i in range(8)]
    common = dict(processing_class=tokenizer, callbacks=[] if callback is None else [callback])
    if given:
        common |= dict(model=adapted())
    else:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
        common |= dict(model=llama(), peft_config=config)
    torch.manual_seed(0)
    if kind == "DPO":
        chosen, rejected = ([" " + words(k * i, k + i) for i in range(8)] for k in (5, 7))
        trainer = recorded(trl.DPOTrainer)(
            args=trl.DPOConfig(**settings, max_length=16),
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected}),
            **common,
        )
    else:
        sampling = dict(num_generations=4, max_completion_length=5) | dict(per_device_train_batch_size=4)
        trainer = recorded(trl.GRPOTrainer)(
            args=trl.GRPOConfig(**settings | sampling),
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            reward_funcs=lambda completion_ids, **_: [float(sum(i % 2 for i in ids)) for ids in completion_ids],
            **common,
        )
    if not given:
        randomise(trainer.model)
    trainer.train()
    return trainer


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within BOUND of each tensor's norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert (found[name] - value).norm() <= BOUND * value.norm(), name


@pytest.mark.parametrize(
    ("kind", "given"), [("DPO", False), ("DPO", True), ("GRPO", False)], ids=["DPO", "DPO-copied-reference", "GRPO"]
)
def test_three_steps_are_plain_pefts(kind, given, tmp_path, tokenizer, calls):  # noqa: F811
    expected = train(kind, tmp_path / "plain", tokenizer, None, given=given)
    assert not calls
    callback = PeftkernCallback()
    found = train(kind, tmp_path / "fused", tokenizer, callback, given=given)
    assert len(found.steps) == len(expected.steps) == STEPS and len(expected.steps[0]) == 1 + 2 * 14
    for own, theirs in zip(found.steps, expected.steps, strict=True):
        assert_near(own, theirs)
    trained = {name: p.detach() for name, p in found.model.named_parameters() if p.requires_grad}
    assert_near(trained, {name: p.detach() for name, p in expected.model.named_parameters() if p.requires_grad})

    report = callback.report
    assert len(report.fast) == len(linears(found.model)) == 14 and not report.skipped
    ran = report.calls.values()  # the policy, and PEFT's own forward for the reference and for nothing else
    assert all(one.keys() == ({"fused"} if given else {"fused", OFF}) for one in ran), report
    assert all(one["fused"] >= STEPS and one.get(OFF, STEPS) == STEPS for one in ran), report
    assert len(calls) == sum(one["fused"] for one in ran)


def test_the_policy_is_served_from_pefts_files_after_each_step(tmp_path, tokenizer):  # noqa: F811
    policy = train("DPO", tmp_path / "run", tokenizer, PeftkernCallback()).model.eval()
    with torch.no_grad():
        start = randomise(policy.__class__(llama(), policy.peft_config["default"])).eval()
        assert not torch.allclose(logits(policy), logits(start))
        server = llama().eval()
        bank = peftkern.serve(server, target_modules=ALL_LINEAR)
        for model in (start, policy):
            model.save_pretrained(tmp_path / "policy")
            plain = PeftModel.from_pretrained(llama(), tmp_path / "policy").eval()
            torch.testing.assert_close(logits(plain), logits(model))
            bank.load("policy", tmp_path / "policy")
            with bank.route(["policy", None]):
                served = logits(server)
            torch.testing.assert_close(served[0], logits(model)[0])
            with model.disable_adapter():
                torch.testing.assert_close(served[1], logits(model)[1])
