"""Mixed batches by ``adapter_names``: PEFT's results, gradients and errors, from one call of the bank a layer."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import ALL_LINEAR, adapted, assert_close, assert_equal, linears, pooled, randomise
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft import mixed_batch
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as

NAMES = ["second", "__base__", "default", "third", "second", "default"]
IDS = torch.randint(0, 64, (len(NAMES), 5), generator=torch.Generator().manual_seed(3))
BF16 = torch.bfloat16
MORE = {
    "second": dict(r=2, lora_alpha=5, target_modules=ALL_LINEAR, use_rslora=True),
    "third": dict(r=7, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
}


def mixed(dtype: torch.dtype = torch.float32, more=MORE, **options) -> nn.Module:
    """A model of three adapters, of which one covers a few layers only, all of them trained."""
    model = adapted(dtype, **options)
    for name, settings in more.items():
        model.add_adapter(name, LoraConfig(**settings))
    randomise(model).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def step(model: nn.Module, names=NAMES) -> dict[str, Tensor]:
    """Logits and every gradient."""
    model.zero_grad()
    found = model(input_ids=IDS, labels=IDS, adapter_names=list(names))
    found.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach()} | gradients


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many adapters each call of the bank has had."""
    seen: list[int] = []
    genuine = mixed_batch.run_rows

    def spy(x, weight, bias, updates, rows):
        seen.append(len(updates))
        return genuine(x, weight, bias, updates, rows)

    monkeypatch.setattr(mixed_batch, "run_rows", spy)
    return seen


@pytest.mark.parametrize("options", [{}, dict(base_bias=True)], ids=["no bias", "base bias"])
@pytest.mark.parametrize("fuse", [False, True])
def test_logits_and_gradients_are_pefts(calls, options, fuse) -> None:
    model = mixed(**options)
    expected = step(model)
    peftkern.patch(model, share=fuse)
    assert_close(step(model), expected)
    assert sorted(calls) == [2] * 10 + [3] * 4  # of the 7 layers in each of 2 blocks, "third" is on 2


@pytest.mark.parametrize("dtypes", ["fp32 adapters", "bf16 adapters", "one of each"])
def test_a_bf16_base_is_as_exact_as_pefts(calls, dtypes) -> None:
    model = mixed(BF16)
    for name, parameter in model.named_parameters():
        if "lora_" in name and (dtypes == "bf16 adapters" or (dtypes == "one of each" and ".second." in name)):
            parameter.data = parameter.data.bfloat16()
    truth, theirs = step(copy.deepcopy(model).double()), step(model)
    peftkern.patch(model)
    found = step(model)
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()} and len(calls) == 14
    assert_as_good_as(*(values.pop("logits") for values in (found, theirs, truth)), "the logits")
    assert_as_good_as(*(pooled(values, truth) for values in (found, theirs, truth)), "the gradients")


def test_under_autocast(calls) -> None:
    model = mixed()
    truth = step(copy.deepcopy(model).double())
    with torch.autocast("cpu", BF16):
        theirs = step(model)
        peftkern.patch(model)
        found = step(model)
    assert len(calls) == 14 and {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()}
    assert_as_good_as(*(values.pop("logits") for values in (found, theirs, truth)), "the logits")
    assert_as_good_as(*(pooled(values, truth) for values in (found, theirs, truth)), "the gradients")


def test_each_sequence_is_as_with_its_adapter_alone_and_the_base_as_without(calls) -> None:
    model = mixed()
    peftkern.patch(model)
    found = step(model)["logits"]
    with torch.no_grad(), peftkern.disabled():
        for row, name in enumerate(NAMES):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=IDS[row : row + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=IDS[row : row + 1]).logits
            torch.testing.assert_close(found[row : row + 1], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("names", [["__base__"] * 6, ["third"] * 6, ["default"] * 5 + ["__base__"]])
def test_batches_of_one_adapter_or_none(calls, names) -> None:
    model = mixed()
    expected = step(model, names) if set(names) != {"__base__"} else {}
    with torch.no_grad():
        logits = model(input_ids=IDS, adapter_names=names).logits
        peftkern.patch(model)
        torch.testing.assert_close(model(input_ids=IDS, adapter_names=names).logits, logits, atol=2e-5, rtol=1e-4)
    assert len(calls) == 14
    if expected:
        assert_close(step(model, names), expected)


def layer_of(**options) -> nn.Module:
    return next(iter(linears(mixed(**options)).values()))


def test_dropout_is_drawn_for_each_adapters_own_rows(calls, monkeypatch) -> None:
    layer = layer_of(lora_dropout=0.4)
    drawn: list[list] = []
    genuine = mixed_batch.draw_states
    monkeypatch.setattr(mixed_batch, "draw_states", lambda p: drawn.append(genuine(p)) or drawn[-1])
    peftkern.patch(layer)
    layer.train()
    x, dy = torch.randn(6, 5, 32, requires_grad=True), torch.randn(6, 5, 32)
    y = layer(x, adapter_names=NAMES)
    y.backward(dy)
    expected, dx = layer.base_layer(x.detach()), dy @ layer.base_layer.weight
    for i, (name, p) in enumerate((("second", 0.0), ("default", 0.4), ("third", 0.0))):
        rows = [row for row, other in enumerate(NAMES) if other == name]
        A, B, c = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        keep = torch.ones(len(rows), 5, 32)
        if p:
            keep = dropout_mask(len(rows) * 5, 32, p, torch.tensor(drawn[0][i])).view(-1, 5, 32)
            keep = keep * (65536 / (65536 - round(65536 * p)))
        dropped, t = x.detach()[rows] * keep, dy[rows] @ B.detach()
        expected[rows] += c * dropped @ A.detach().T @ B.detach().T
        dx[rows] += c * (t @ A.detach()) * keep
        torch.testing.assert_close(A.grad, c * t.flatten(0, 1).T @ dropped.flatten(0, 1))
        torch.testing.assert_close(
            B.grad, c * dy[rows].flatten(0, 1).T @ (dropped @ A.detach().T).flatten(0, 1), atol=1e-5, rtol=1e-4
        )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, dx)
    assert calls == [3] and len(drawn) == 1


def test_rows_are_worked_out_once_a_batch(calls, monkeypatch) -> None:
    model, planned = mixed(), []
    genuine = mixed_batch.plan_rows
    monkeypatch.setattr(mixed_batch, "plan_rows", lambda *given: planned.append(len(given[0])) or genuine(*given))
    mixed_batch._rows.cache_clear()
    peftkern.patch(model)
    names = list(NAMES)
    with torch.inference_mode():
        before = model(input_ids=IDS, adapter_names=names).logits.clone()
    assert planned == [30] and len(calls) == 14
    step(model, names)  # what inference mode has left in the cache is good for training
    assert planned == [30]
    names[0] = "__base__"  # the same list, another batch
    with torch.no_grad():
        after = model(input_ids=IDS, adapter_names=names).logits
    assert planned == [30, 30] and not torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:], before[1:])
    with torch.no_grad():
        model(input_ids=IDS[:, :1], adapter_names=tuple(names))
    assert planned == [30, 30, 6]


@torch.no_grad()
def test_a_stream_has_rows_of_its_own(calls, monkeypatch) -> None:
    """On another stream those of the first may not be there yet."""
    layer, planned, streams = layer_of(), [], iter((1, 1, 2))
    genuine = mixed_batch.plan_rows
    monkeypatch.setattr(mixed_batch, "plan_rows", lambda *given: planned.append(len(given[0])) or genuine(*given))
    monkeypatch.setattr(mixed_batch, "_stream", lambda x: next(streams), raising=False)
    mixed_batch._rows.cache_clear()
    peftkern.patch(layer)
    for _ in range(3):
        layer(torch.randn(6, 5, 32), adapter_names=NAMES)
    assert planned == [30, 30]


@torch.no_grad()
@pytest.mark.parametrize("search", [dict(), dict(num_beams=2)])
def test_generation_is_pefts(calls, search) -> None:
    model = mixed()
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, **search)
    expected = model.generate(input_ids=IDS, adapter_names=list(NAMES), **options)
    peftkern.patch(model)
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=list(NAMES), **options), expected)
    assert len(calls) == 14 * 5


def test_what_changes_later_is_seen(calls) -> None:
    model = mixed()
    peftkern.patch(model)
    step(model)
    layer = next(iter(linears(model).values()))
    layer.scaling["second"] *= 3
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(-2)
        found = model(input_ids=IDS, adapter_names=NAMES).logits
        with peftkern.disabled():
            expected = model(input_ids=IDS, adapter_names=NAMES).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert len(calls) == 28


def hooked(model: nn.Module) -> None:
    for layer in linears(model).values():
        layer.lora_A["second"].register_forward_hook(lambda *_: None)


def scaled_by_tensors(model: nn.Module) -> None:
    for layer in linears(model).values():
        layer.scaling["second"] = torch.tensor(layer.scaling["second"])


@pytest.mark.parametrize("change", [hooked, scaled_by_tensors])
def test_what_the_bank_does_not_take_runs_pefts_forward(calls, change) -> None:
    model = mixed()
    change(model)
    names = ["second", "default", "__base__"] * 2
    expected = step(model, names)
    peftkern.patch(model)
    assert_equal(step(model, names), expected)
    assert not calls
    step(model, ["default", "__base__"] * 3)  # the adapters of this batch are plain
    assert len(calls) == 14


def test_an_adapter_with_lora_bias_beside_one_without(calls) -> None:
    model = mixed(more=MORE | {"second": MORE["second"] | dict(lora_bias=True)}, base_bias=True)
    expected, truth = step(model), step(copy.deepcopy(model).double())
    peftkern.patch(model)
    found = step(model)
    assert len(calls) == 14 and any("lora_B.second.bias" in name for name in found)
    for names in (["logits"], [name for name in truth if name != "logits"]):
        pools = [
            torch.cat([(of[n].double() / truth[n].norm()).flatten() for n in names]) for of in (found, expected, truth)
        ]
        assert_as_good_as(*pools, str(names[:1]))


def test_disabled_adapters_are_disabled(calls) -> None:
    model = mixed()
    peftkern.patch(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, adapter_names=NAMES).logits, model(input_ids=IDS).logits)
    assert not calls


def merged(model: nn.Module) -> None:
    model.merge_adapter()


def with_dora(model: nn.Module) -> None:
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))


@pytest.mark.parametrize(
    ("names", "change"),
    [
        (["second", "nobody"] * 3, None),
        (["second"] * 5, None),
        (["second"] * 6, merged),
        (["second"] * 6, lambda model: model.train()),
        (["dora"] * 6, with_dora),
    ],
    ids=["unknown name", "too few", "merged", "training", "dora"],
)  # fmt: skip
def test_errors_are_pefts(calls, names, change) -> None:
    models = mixed(), mixed()
    peftkern.patch(models[1])
    errors = []
    for model in models:
        if change is not None:
            change(model)
        with pytest.raises(ValueError) as raised:
            model(input_ids=IDS, adapter_names=names)
        errors.append(str(raised.value))
    assert errors[0] == errors[1] and not any(calls)


@pytest.mark.filterwarnings("ignore:.*tie")
def test_conv1d(calls) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(transformers.GPT2LMHeadModel(config), settings)
    model.add_adapter("second", settings)
    randomise(model).eval()
    names = ["second", "__base__", "default"] * 2
    with torch.no_grad():
        expected = model(input_ids=IDS, adapter_names=names).logits
        peftkern.patch(model)
        torch.testing.assert_close(model(input_ids=IDS, adapter_names=names).logits, expected)
    assert calls == [2]


def test_other_arguments_run_pefts_forward(calls) -> None:
    layer = layer_of()
    x = torch.randn(6, 5, 32)
    expected = layer(x, adapter_names=NAMES, alora_offsets=None)
    peftkern.patch(layer)
    assert torch.equal(layer(x, adapter_names=NAMES, alora_offsets=None), expected) and not calls
    torch.testing.assert_close(layer(x, adapter_names=None), layer(x))
    assert layer(x[:0], adapter_names=[]).shape == (0, 5, 32) and not calls
