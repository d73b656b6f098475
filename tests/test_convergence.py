"""Training of mini models on real text, with and without peftkern: every loss, what the model says after, the adapter.

Five families with random weights, 32 steps of AdamW each. The text is Python's own documentation, byte by byte, which
every Python brings along.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops import dispatch
from peftkern.testing.numerics import assert_as_good_as, relative_error

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import families  # noqa: E402
from benchmarks.training import with_published_dropout  # noqa: E402

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
STEPS, ROWS, LENGTH = 32, 4, 32
SIZE = families.Size(hidden=32, intermediate=48, layers=2, heads=4, vocabulary=128, positions=LENGTH)
LOSS_RTOL = {F32: 2e-5, BF16: 1e-2}
SEEDS = {F32: (1,), BF16: (1, 2, 3)}
TRUTH = {F32: F64, BF16: F32}  # one precision up: PEFT's distance from it is what the base's roundings do to a training


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny problems, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def batches() -> list[Tensor]:
    """STEPS batches to train on, and one to judge by."""
    from pydoc_data import topics

    text = "".join(topics.topics.values()).encode("ascii", "replace")
    ids = torch.tensor(list(text))
    starts = torch.randint(len(ids) - LENGTH, (STEPS + 1, ROWS), generator=torch.Generator().manual_seed(0))
    return [torch.stack([ids[start : start + LENGTH] for start in row]) for row in starts.tolist()]


class Curve(NamedTuple):
    losses: Tensor
    log_probabilities: Tensor
    adapter: Tensor  # how far all its parameters moved, in one vector
    report: peftkern.PatchReport | None


def adapted(family: str, base: torch.dtype, dropout_p: float, seed: int = 1, **options) -> nn.Module:
    model = families.build(family, SIZE, base)
    model.set_experts_implementation("eager")  # torch's grouped product knows no fp64
    torch.manual_seed(seed)
    return peft.get_peft_model(model, families.lora_config(family, dropout_p, r=4, alpha=8, **options))


def train(family: str, model: nn.Module, patch: bool) -> Curve:
    report = peftkern.patch(model) if patch else None
    trained = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimiser = torch.optim.AdamW(trained, lr=5e-3)
    torch.manual_seed(2)
    model.train()
    losses = []
    for ids in batches()[:-1]:
        optimiser.zero_grad()
        loss = loss_of(family, model, ids)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=families.batch(family, batches()[-1])["input_ids"]).logits
    moved = [(new.detach() - old).flatten() for new, old in zip(trained, before, strict=True)]
    return Curve(torch.tensor(losses, dtype=F64), logits.double().log_softmax(-1), torch.cat(moved).double(), report)


def as_it_is(model: nn.Module) -> nn.Module:
    """Adapters stay fp32 beside a 16-bit base."""
    return model


def pooled(curves: list[Curve]) -> Curve:
    """The losses of the first run and the results of all: in bf16 the error at a run's end is four times another's."""
    _, log_probabilities, adapter, _ = zip(*curves, strict=True)
    return curves[0]._replace(log_probabilities=torch.stack(log_probabilities), adapter=torch.cat(adapter))


def loss_of(family: str, model: nn.Module, ids: Tensor) -> Tensor:
    """In fp32 for a 16-bit base: some families leave that to the caller, and a bf16 loss has steps of 0.4 %."""
    batch = families.batch(family, ids)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if family != "bert":
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits.to(torch.promote_types(logits.dtype, F32))
    return nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=families.IGNORED)


def assert_same_training(own: Curve, plain: Curve, exact: Curve, base: torch.dtype) -> None:
    """Every loss by the tolerance of the base; the results by the error rule, with a wider training as the truth."""
    torch.testing.assert_close(own.losses, plain.losses, rtol=LOSS_RTOL[base], atol=0)
    for name in ("log_probabilities", "adapter"):
        assert_as_good_as(getattr(own, name), getattr(plain, name), getattr(exact, name), name)
    assert own.losses[-4:].mean() < own.losses[:4].mean() - 0.5  # it did learn


@pytest.mark.parametrize("base", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", families.NAMES)
def test_training_is_pefts(family, base):
    own, plain, exact = (
        pooled([train(family, cast(adapted(family, base, 0.0, seed)), patch) for seed in SEEDS[base]])
        for cast, patch in ((as_it_is, True), (as_it_is, False), (lambda model: model.to(TRUTH[base]), False))
    )
    assert_same_training(own, plain, exact, base)
    assert own.report.fast and not own.report.skipped, own.report


@pytest.mark.parametrize("base", [F32, BF16], ids=["fp32", "bf16"])
def test_training_with_dropout_is_pefts_under_the_same_masks(base):
    own = train("llama", adapted("llama", base, 0.1), patch=True)
    plain = train("llama", with_published_dropout(adapted("llama", base, 0.1)), patch=False)
    exact = train("llama", with_published_dropout(adapted("llama", base, 0.1)).to(TRUTH[base]), patch=False)
    assert_same_training(own, plain, exact, base)
    without = train("llama", adapted("llama", base, 0.0), patch=False)
    assert relative_error(own.losses, without.losses) > 1e-4  # the masks did something


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"bias": "lora_only"}, {"use_rslora": True}], ids=str)
def test_training_of_what_others_exclude_is_pefts(options):
    own, plain, exact = (
        train("qwen2", adapted("qwen2", F32, 0.0, **options).to(dtype), patch)
        for dtype, patch in ((F32, True), (F32, False), (F64, False))
    )
    assert_same_training(own, plain, exact, F32)
    assert not own.report.skipped


@pytest.mark.filterwarnings("ignore:.*tie")  # PEFT remarks on merging such a head
def test_training_with_an_adapter_on_a_tied_head_is_pefts():
    def tied(dtype: torch.dtype) -> nn.Module:
        model = families.build("llama", SIZE)
        model.lm_head.weight = model.get_input_embeddings().weight
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])
        return peft.get_peft_model(model, config).to(dtype)

    model = tied(F32)
    own, plain, exact = (
        train("llama", m, patch) for m, patch in ((model, True), (tied(F32), False), (tied(F64), False))
    )
    assert_same_training(own, plain, exact, F32)
    assert any(name.endswith("lm_head") for name in own.report.fast) and not own.report.skipped
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.skipif(dispatch.backend_named("cpp").unavailable() is not None, reason="no C++ extension")
def test_backends_train_alike(dispatch_env):
    """Dropout and all: they draw the same bits."""
    curves = []
    for name in ("cpp", "reference"):
        dispatch_env(PEFTKERN_BACKEND=name)
        curves.append(train("llama", adapted("llama", F32, 0.1), patch=True))
        assert set(curves[-1].report.backends.values()) == {name}
    torch.testing.assert_close(curves[0].losses, curves[1].losses, rtol=LOSS_RTOL[F32], atol=0)
