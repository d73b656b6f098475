"""Models of five families with random weights, of any size: what tests train and what benchmarks time.

Nothing here is downloaded. Their own dropout is off, so that two runs differ by the adapter's alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = ("llama", "qwen2", "gpt2", "mixtral", "bert")
IGNORED = -100  # the label of a position that has no loss


@dataclass(frozen=True)
class Size:
    """Extents of a model; a family that has no use for one leaves it out."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    positions: int


def build(name: str, size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A frozen model in training mode, without a key-value cache; the same one for the same arguments.

    Args: name: of NAMES: a Llama, Qwen2 (biases on q, k and v), GPT-2 (Conv1D), Mixtral (4 experts, 2 for each token)
        or a BERT encoder with its masked-language head.
    """
    import transformers

    shared = dict(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, vocab_size=size.vocabulary, max_position_embeddings=size.positions,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=size.hidden**-0.5,
    )  # fmt: skip
    grouped = shared | dict(num_key_value_heads=size.heads // 2, use_cache=False)
    torch.manual_seed(seed)
    model: Any
    if name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped))
    elif name == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**grouped))
        for name, bias in model.named_parameters():  # which transformers starts at zero
            if name.endswith("bias"):
                torch.nn.init.normal_(bias, std=0.02)
    elif name == "mixtral":
        config = transformers.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2)
        model = transformers.MixtralForCausalLM(config)
    elif name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=size.hidden, n_inner=size.intermediate, n_layer=size.layers, n_head=size.heads,
            vocab_size=size.vocabulary, n_positions=size.positions, bos_token_id=None, eos_token_id=None,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, loss_type="ForCausalLMLoss",
            initializer_range=size.hidden**-0.5,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    elif name == "bert":
        config = transformers.BertConfig(**shared, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.BertForMaskedLM(config)
    else:
        raise ValueError(f"family {name!r} is not one of {', '.join(NAMES)}")
    return model.to(dtype).requires_grad_(False).train()


def lora_config(name: str, dropout_p: float = 0.0, r: int = 16, alpha: int = 32, **options: Any) -> Any:
    """LoRA on every layer that PEFT's "all-linear" finds; in a Mixtral these are router and experts too.

    PEFT's adapter of stacked experts refuses dropout, so a Mixtral with dropout has its attention adapted alone.
    """
    from peft import LoraConfig

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets = attention if name == "mixtral" and dropout_p else "all-linear"
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout_p, target_modules=targets, fan_in_fan_out=name == "gpt2", **options
    )


def batch(name: str, ids: Tensor) -> dict[str, Tensor]:
    """The model's arguments for ids [rows, length]: each asks for the next token, for BERT every seventh is hidden."""
    if name != "bert":
        return {"input_ids": ids, "labels": ids}
    hidden = torch.arange(ids.shape[1], device=ids.device) % 7 == 3
    return {"input_ids": ids.masked_fill(hidden, 0), "labels": ids.masked_fill(~hidden, IGNORED)}
