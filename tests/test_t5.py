"""T5 in fp16, of which transformers keeps wo in fp32: an encoder-decoder whose layers take x in two dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TOKENS, linears, pooled, randomise, step
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import peftkern
from peftkern.testing.numerics import assert_as_good_as

F32, F16 = torch.float32, torch.float16


def t5(folder, feed_forward: str, widened: bool) -> nn.Module:
    """Loaded in fp16 as a checkpoint is; ``widened``: with PEFT's adapters in fp32, else each in its layer's dtype."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj=feed_forward,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    base = T5ForConditionalGeneration.from_pretrained(folder, dtype=F16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(q|k|v|o|wi|wi_0|wi_1|wo)", task_type="SEQ_2_SEQ_LM")
    return randomise(get_peft_model(base, config, autocast_adapter_dtype=widened))


@pytest.mark.parametrize("widened", [True, False], ids=["fp32 adapters", "adapters like their layers"])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_wo_in_fp32_beside_fp16(feed_forward, widened, tmp_path):
    model = t5(tmp_path, feed_forward, widened)
    truth, expected = step(copy.deepcopy(model).double()), step(model)
    report, seen = peftkern.patch(model), {}
    assert len(report.fast) == len(linears(model)) == (36 if feed_forward == "gated-gelu" else 32), report
    for name, layer in linears(model).items():
        layer.register_forward_hook(lambda layer, xs, y, name=name: seen.update({name: (xs[0].dtype, y.dtype)}))
    found = step(model)
    assert {dtypes for name, dtypes in seen.items() if name.endswith(".wo")} == {(F32, F32)}
    assert {dtypes for name, dtypes in seen.items() if not name.endswith(".wo")} == {(F16, F16)}
    assert set(map(str, peftkern.report(model).calls.values())) == {"{'fused': 1}"}
    assert {n: value.dtype for n, value in found.items()} == {n: value.dtype for n, value in expected.items()}
    assert_as_good_as(*(pooled(one, truth) for one in (found, expected, truth)), "the gradients")
    losses = (one["loss"].double() for one in (found, expected))
    torch.testing.assert_close(*losses, rtol=torch.finfo(F16).eps * 2, atol=0)


def test_generation_is_fused(tmp_path):
    """With a cache, by greedy search: the very words of plain PEFT."""
    model = t5(tmp_path, "relu", True).eval()
    words = dict(input_ids=TOKENS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = model.generate(**words)
    peftkern.patch(model)
    assert torch.equal(model.generate(**words), expected)
    counts = peftkern.report(model).calls
    assert len(counts) == 32 and all(one.keys() == {"fused"} for one in counts.values())
