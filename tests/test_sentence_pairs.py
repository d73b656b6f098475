"""sentence-transformers' MultipleNegativesRankingLoss, and its cached form: an encoder that runs twice and more a step.

The loss by hand runs everywhere; the package's own, with its trainer, where it is installed:
pip install sentence-transformers
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from conftest import assert_close, linears, randomise
from peft import LoraConfig, get_peft_model
from test_rl_loop import words
from test_trainer import fresh_accelerate, options, tokenizer  # noqa: F401 - fixtures
from torch import Tensor, nn

import peftkern
from peftkern.integrations.transformers import PeftkernCallback

LAYERS, STEPS = 12, 3
GENERATOR = torch.Generator().manual_seed(6)
PAIRS = [[torch.randint(0, 64, (4, 7), generator=GENERATOR) for _ in range(2)] for _ in range(STEPS)]
Loss = Callable[[nn.Module, list[Tensor]], Tensor]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def adapter(p: float = 0.0) -> LoraConfig:
    targets = r".*encoder\..*\.(query|key|value|dense)"  # the package has a pooler, and does not use it
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=p, target_modules=targets, task_type="FEATURE_EXTRACTION")


def embedded(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean over a sentence's words."""
    return model(input_ids=ids).last_hidden_state.mean(1)


def ranked(anchors: Tensor, positives: Tensor) -> Tensor:
    """Each anchor's own positive against those of the others."""
    scores = 20 * nn.functional.normalize(anchors) @ nn.functional.normalize(positives).T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def at_once(model: nn.Module, pair: list[Tensor]) -> Tensor:
    loss = ranked(*(embedded(model, ids) for ids in pair))
    loss.backward()
    return loss.detach()


def cached(model: nn.Module, pair: list[Tensor]) -> Tensor:
    """GradCache: embeddings without a graph, the loss's gradients by them, then each batch again under its masks."""
    states, without = [], []
    batches = [batch for ids in pair for batch in ids.split(2)]
    with torch.no_grad():
        for batch in batches:
            states.append(torch.get_rng_state())
            without.append(embedded(model, batch))
    leaves = [embedding.requires_grad_() for embedding in without]
    loss = ranked(*(torch.cat(half) for half in (leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :])))
    loss.backward()
    for state, batch, leaf in zip(states, batches, leaves, strict=True):
        torch.set_rng_state(state)
        again = embedded(model, batch)
        assert torch.equal(again, leaf)  # the same masks
        again.backward(leaf.grad)
    return loss.detach()


def trained(patch: bool, loss: Loss, p: float) -> tuple[dict[str, Tensor], nn.Module]:
    """Losses of three steps, the last one's gradients, and the model."""
    model = randomise(get_peft_model(bert(), adapter(p))).train()
    if patch:
        assert len(peftkern.patch(model).fast) == LAYERS
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], 1e-2)
    found = {}
    torch.manual_seed(1)
    for i, pair in enumerate(PAIRS):
        optimizer.zero_grad()
        found[f"loss {i}"] = loss(model, pair)
        optimizer.step()
    return found | {n: q.grad for n, q in model.named_parameters() if q.grad is not None}, model


@pytest.mark.parametrize("loss", [at_once, cached])
def test_the_loss_by_hand_trains_as_pefts(loss):
    (found, model), (expected, _) = (trained(patch, loss, 0.0) for patch in (True, False))
    assert_close(found, expected)
    calls = STEPS * (2 if loss is at_once else 8)
    assert set(map(str, peftkern.report(model).calls.values())) == {str({"fused": calls})}


def test_cached_embeddings_have_the_masks_of_the_ones_with_a_graph():
    found, _ = trained(True, cached, 0.3)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("cache", [False, True], ids=["MultipleNegativesRankingLoss", "Cached"])
def test_sentence_transformers(cache, tmp_path, tokenizer):  # noqa: F811
    """Its own loss under its own trainer."""
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from sentence_transformers import losses, models

    bert().save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    pairs = {"anchor": [words(i, 3 * i) for i in range(8)], "positive": [words(5 * i, i, 7) for i in range(8)]}

    def train(callbacks: list) -> tuple[list[float], nn.Module]:
        transformer = models.Transformer(str(tmp_path / "bert"))
        model = package.SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu")
        torch.manual_seed(0)
        model.add_adapter(adapter())
        randomise(model)
        kind = losses.CachedMultipleNegativesRankingLoss if cache else losses.MultipleNegativesRankingLoss
        settings = options(tmp_path / "run", max_steps=STEPS, gradient_accumulation_steps=1, learning_rate=0.1)
        settings.pop("remove_unused_columns")
        trainer = package.SentenceTransformerTrainer(
            model=model, args=package.SentenceTransformerTrainingArguments(**settings), callbacks=callbacks,
            train_dataset=datasets.Dataset.from_dict(pairs), loss=kind(model),
        )  # fmt: skip
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model

    callback = PeftkernCallback()
    (found, model), (expected, plain) = train([callback]), train([])
    assert len(found) == STEPS
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    assert_close(*({n: q.detach() for n, q in one.named_parameters() if q.requires_grad} for one in (model, plain)))
    counts = peftkern.report(model).calls
    assert len(counts) == len(linears(model)) == LAYERS and not callback.report.skipped
    assert all(one.keys() == {"fused"} and one["fused"] >= 2 * STEPS for one in counts.values())
