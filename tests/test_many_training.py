"""Several adapters trained in one batch learn what each learns alone; packing of their jobs."""

from __future__ import annotations

import pytest
import torch
from conftest import ALL_LINEAR, llama

import peftkern
from peftkern.adapters import LoRAConfig
from peftkern.bank import join_batches, losses_by_job, pack_jobs

# rank, alpha, dropout, learning rate, rows, tokens, optimiser
JOBS = {
    "a": (4, 8, 0.1, 1e-3, 2, 7, torch.optim.AdamW),
    "b": (2, 1, 0.0, 5e-3, 1, 9, torch.optim.AdamW),
    "c": (7, 7, 0.3, 2e-2, 3, 4, torch.optim.SGD),
}


def sequences(job: str, step: int) -> list[torch.Tensor]:
    rows, tokens = JOBS[job][4:6]
    g = torch.Generator().manual_seed(1000 * step + ord(job))
    return [torch.randint(0, 64, (tokens - i,), generator=g) for i in range(rows)]  # of different lengths


def train(jobs: list[str], steps: int = 20, present=lambda job, step: True) -> dict[str, list[torch.Tensor]]:
    """Every adapter's parameters after a training in common."""
    bank = peftkern.serve(model := llama().train(), target_modules="all-linear")
    optimisers = {}
    for job in jobs:
        r, alpha, p, rate, _, _, kind = JOBS[job]
        torch.manual_seed(ord(job))
        bank.add(job, LoRAConfig(r, alpha, ALL_LINEAR, lora_dropout=p), is_trainable=True, seed=ord(job))
        optimisers[job] = kind(bank.parameters(job), rate)
    for step in range(steps):
        now = [job for job in jobs if present(job, step)]
        batch = join_batches({job: sequences(job, step) for job in now})
        with bank.route(batch.route):
            losses = losses_by_job(model(batch.input_ids, attention_mask=batch.attention_mask).logits, batch)
            sum(losses.values()).backward()
        for job in now:
            optimisers[job].step()
            optimisers[job].zero_grad()
    return {job: [p.detach().clone() for p in bank.parameters(job)] for job in jobs}


def test_adapters_learn_together_what_they_learn_alone() -> None:
    together = train(list(JOBS))
    for job in JOBS:
        alone = train([job])[job]
        for a, b in zip(together[job], alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().mean().item())
    assert any(B.abs().max() > 1e-3 for B in together["a"][1::2])


def test_a_job_that_pauses_is_not_touched_by_the_others() -> None:
    paused = train(["a", "b"], 6, present=lambda job, step: job == "b" or step < 3)
    for a, b in zip(paused["a"], train(["a"], 3)["a"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().mean().item())


def test_training_in_common_is_deterministic() -> None:
    first, second = train(list(JOBS), 3), train(list(JOBS), 3)
    assert all(torch.equal(a, b) for job in JOBS for a, b in zip(first[job], second[job], strict=True))


def test_without_dropout_it_is_what_peft_learns_alone() -> None:
    from peft import LoraConfig, get_peft_model

    together = train(list(JOBS), 5)["b"]
    r, alpha, p, rate, _, _, kind = JOBS["b"]
    model = get_peft_model(llama().train(), LoraConfig(r=r, lora_alpha=alpha, target_modules=ALL_LINEAR))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    bank = peftkern.serve(llama(), target_modules="all-linear")
    torch.manual_seed(ord("b"))
    bank.add("b", LoRAConfig(r, alpha, ALL_LINEAR))
    with torch.no_grad():
        for parameter, start in zip(own, bank.parameters("b"), strict=True):
            parameter.copy_(start)
    optimiser = kind(own, rate)
    for step in range(5):
        ids = torch.stack(sequences("b", step))
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    for a, b in zip(together, own, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-4 * b.abs().mean().item())


def test_a_checkpointed_model_draws_the_same_masks_again() -> None:
    bank = peftkern.serve(model := llama().train(), target_modules="all-linear")
    torch.manual_seed(0)
    bank.add("a", LoRAConfig(4, 8, ALL_LINEAR, lora_dropout=0.3), is_trainable=True, seed=1)
    with torch.no_grad():
        for B in bank.parameters("a")[1::2]:
            B.normal_(std=0.1)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        bank["a"].batches = 0
        with bank.route(["a", "a"]):
            model(torch.arange(14).view(2, 7)).logits.square().mean().backward()
        found.append([p.grad.clone() for p in bank.parameters("a")])
        for p in bank.parameters("a"):
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and any(g.any() for g in found[0])


def test_jobs_are_balanced_by_tokens() -> None:
    tokens = {"a": 700, "b": 300, "c": 300, "d": 400, "e": 100, "f": 200}
    packs = pack_jobs(tokens, 1024)
    assert sorted(name for pack in packs for name in pack) == sorted(tokens) and len(packs) == 2
    assert sorted(sum(tokens[name] for name in pack) for pack in packs) == [1000, 1000]
    assert pack_jobs(tokens, 700)[0] == ["a"] and max(sum(map(tokens.get, p)) for p in pack_jobs(tokens, 700)) <= 700
    assert pack_jobs({}, 8) == [] and pack_jobs({"a": 8, "b": 8}, 8) == [["a"], ["b"]]
    for bad in (0, 9):
        with pytest.raises(ValueError, match=f"job 'a' has {bad} tokens a step"):
            pack_jobs({"a": bad}, 8)


def test_a_joined_batch_pads_and_routes_padding_to_the_base() -> None:
    batch = join_batches({"a": [torch.tensor([5, 6, 7]), torch.tensor([8])], "b": torch.tensor([[1, 2]])}, pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9], [1, 2, 9]]
    assert batch.labels.tolist() == [[5, 6, 7], [8, -100, -100], [1, 2, -100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]] and batch.jobs == ("a", "a", "b")
    assert batch.route == [["a"] * 3, ["a", None, None], ["b", "b", None]]
    logits = torch.randn(3, 3, 11)
    losses = losses_by_job(logits, batch)
    b = torch.nn.functional.cross_entropy(logits[2, :1], torch.tensor([2]))
    torch.testing.assert_close(losses["b"], b)
    for bad in ({}, {"a": [torch.tensor([], dtype=torch.int64)]}):
        with pytest.raises(ValueError, match="at least one"):
            join_batches(bad)
