"""The README and the pages of docs/: every Python snippet run as it stands on a tiny model, every link followed."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import adapted, llama
from torch import nn

import peftkern

README = pathlib.Path(__file__).parent.parent / "README.md"
PAGES = {page.stem: page for page in (README, *sorted(README.parent.glob("docs/*.md")))}
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(32).view(4, 8)]


def written() -> str:
    """All pages, one after the other."""
    return "\n".join(page.read_text() for page in PAGES.values())


def snippets() -> dict[str, str]:
    """Heading, or heading and number, of each Python snippet."""
    found: dict[str, str] = {}
    for section in re.split(r"^##+ ", written(), flags=re.MULTILINE):
        heading = section.split("\n", 1)[0]
        for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)):
            found[heading if i == 0 else f"{heading} {i + 1}"] = code
    return found


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def batch() -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in ROWS]) for name in ("input_ids", "labels")}


def arguments(kind: Any = None, **more: Any) -> Any:
    from transformers import TrainingArguments

    common = dict(output_dir="out", use_cpu=True, max_steps=2, save_strategy="no", report_to=[], disable_tqdm=True)
    return (kind or TrainingArguments)(**common | more)


def fused(names: dict[str, Any]) -> None:
    """What a patched model must have been: all fourteen layers fast."""
    assert len(peftkern.patch(names["model"]).fast) == 14


def a_model() -> dict[str, Any]:
    return {"model": llama()}


def operands() -> dict[str, Any]:
    linear, x = nn.Linear(8, 6), torch.randn(3, 8)
    return {
        "linear": linear, "x": x, "weight": linear.weight.detach(), "bias": linear.bias, "scaling": 2.0,
        "lora_A": torch.randn(4, 8), "lora_B": torch.randn(6, 4),
    }  # fmt: skip


def two_adapters() -> dict[str, Any]:
    for name in ("legal", "medical"):
        adapted().save_pretrained(f"adapters/{name}")
    return {"model": llama().eval(), "input_ids": torch.arange(24).view(3, 8)}


def the_trainer() -> dict[str, Any]:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    return {"model": adapted(), "arguments": arguments(remove_unused_columns=False), "dataset": ROWS}


def trl() -> dict[str, Any]:
    kind = pytest.importorskip("trl", reason="trl is not installed").SFTConfig
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(61)} | {"<pad>": 61, "<eos>": 62, "<unk>": 63}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    texts = datasets.Dataset.from_dict({"text": [f"w{i} w{i + 1} w{i + 2}" for i in range(8)]})
    settings = arguments(kind, max_length=16, bf16=False)
    return {"model": llama(), "arguments": settings, "dataset": texts, "tokenizer": tokenizer}


def accelerate() -> dict[str, Any]:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    return {"model": model, "optimizer": optimizer, "loader": torch.utils.data.DataLoader(ROWS, batch_size=2)}


def a_checkpoint() -> dict[str, Any]:
    from safetensors.torch import save_file

    name = "model.layers.0.mlp.up_proj.weight"
    saved = {name: torch.ones(6, 8).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    save_file(saved, "model.safetensors")
    return operands()


def a_model_and_a_batch() -> dict[str, Any]:
    return {"model": adapted(), "batch": batch()}


def on_a_gpu() -> dict[str, Any]:
    on = {name: tensor.cuda() for name, tensor in batch().items()}
    return {"model": adapted().cuda(), "batch": on, "loader": [on, on]}


def plain_models() -> dict[str, Any]:
    return {"model": llama(), "another_model": llama()}


def an_mlp() -> dict[str, Any]:
    up, down = nn.Linear(8, 16), nn.Linear(16, 8)
    adapted_up, adapted_down = (peftkern.nn.LoRALinear.from_linear(layer, 4, 8) for layer in (up, down))
    mlp = nn.Sequential()
    mlp.add_module("up", adapted_up)
    mlp.add_module("down", adapted_down)
    return {"mlp": mlp, "mesh": torch.distributed.init_device_mesh("cpu", (1,))}


GIVEN: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None] | None]] = {
    "With PEFT: one line": (a_model, fused),
    "Without PEFT": (operands, None),
    "Many adapters, one model, one batch": (two_adapters, None),
    "the Hugging Face Trainer": (the_trainer, fused),
    "TRL": (trl, lambda names: fused({"model": names["trainer"].model})),
    "accelerate": (accelerate, None),
    "a checkpoint in fp8, GPTQ or AWQ": (a_checkpoint, None),
    "FSDP2": (lambda: {"model": adapted()}, lambda names: names["model"](**batch()).loss.backward()),
    "torch.compile": (a_model_and_a_batch, lambda names: names["loss"].backward()),
    "torch.compile by blocks": (a_model_and_a_batch, lambda names: names["loss"].backward()),
    "a CUDA graph": (on_a_gpu, lambda names: float(names["loss"])),
    "no PEFT at all": (plain_models, None),
    "tensor parallelism": (an_mlp, lambda names: names["mlp"](torch.randn(2, 8)).sum().backward()),
}


def anchors(page: pathlib.Path) -> set[str]:
    """What a link into a page may end with."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_short_and_its_links_lead_somewhere(name: str):
    page = PAGES[name]
    text = page.read_text()
    assert len(text.splitlines()) <= (150 if page == README else 200)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_snippet_is_run_by_a_test():
    assert set(snippets()) == set(GIVEN)


@pytest.mark.parametrize(
    "heading",
    [pytest.param(name, marks=[pytest.mark.gpu] if given is on_a_gpu else []) for name, (given, _) in GIVEN.items()],
)
def test_snippet(heading, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if heading in ("FSDP2", "tensor parallelism"):
        request.getfixturevalue("one_process")
    if heading.startswith("torch.compile"):  # in one graph; the C++ that torch makes of it takes a minute to compile
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    given, check = GIVEN[heading]
    names = given()
    exec(compile(snippets()[heading], heading, "exec"), names)
    if check is not None:
        check(names)
