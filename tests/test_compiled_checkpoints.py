"""torch.compile over checkpoints, dropout, autocast and quantised bases: one graph, the same bits, as few compilations.

PYTHONPATH=tests python tests/test_compiled_checkpoints.py      prints the table of docs/launching.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import randomise
from pairwise import pairwise
from peft import LoraConfig, get_peft_model
from quantised_models import quantised_linear
from test_readme import written
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.integrations.peft import tally, why_not

pytest.importorskip("bitsandbytes")
F32, BF16 = torch.float32, torch.bfloat16
BASES = {
    "fp32": ("dense", F32),
    "bf16": ("dense", BF16),
    "nf4, computes in fp32": ("nf4", F32),
    "nf4, computes in bf16": ("nf4", BF16),
    "int8": ("int8", F32),
}
CHECKPOINTS = {"none": None, "reentrant": True, "non-reentrant": False}
ROWS = pairwise(list(BASES), list(CHECKPOINTS), [0.0, 0.3], [False, True])
SHAPES = ((3, 5), (4, 7), (2, 9))  # batch, length


class Block(nn.Module):
    """Two linears and a checkpoint around them: ``reentrant`` or not, None for none."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.up, self.down, self.reentrant = nn.Linear(64, 128), nn.Linear(128, 64), reentrant

    def inner(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


def quantise(block: Block, kind: str, compute: torch.dtype, nested: bool = True) -> None:
    """Both linears as bitsandbytes' or, "torchao", as torchao's."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, PerTensor, quantize_
        from torchao.quantization.granularity import PerGroup

        quantize_(block.up, Int8WeightOnlyConfig(granularity=PerGroup(16)))
        quantize_(block.down, Int8WeightOnlyConfig(granularity=PerTensor()))
        return
    block.up, block.down = (quantised_linear(linear, kind, compute, nested) for linear in (block.up, block.down))
    setattr(block, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)


def build(
    kind: str, compute: torch.dtype, reentrant: bool | None = None, p: float = 0.0, patched: bool = True,
    nested: bool = True,
) -> nn.Module:  # fmt: skip
    torch.manual_seed(0)
    block = Block(reentrant).to(compute)
    if kind != "dense":
        quantise(block, kind, compute, nested)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=p, target_modules=["up", "down"])
    model = randomise(get_peft_model(block, config)).train()
    if patched:
        assert len(peftkern.patch(model).fast) == 2
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [model.base_model.model.up, model.base_model.model.down]


def step(function: Callable, model: nn.Module, dtype: torch.dtype, shape=SHAPES[0], autocast=False) -> list[Tensor]:
    """The loss and every gradient, under a seed."""
    x = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    torch._dynamo.mark_dynamic(x, (0, 1))
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", BF16, enabled=autocast):
        loss = function(x).float().square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) == 6 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What one test compiles is nothing to the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilations(base: str, checkpoints: str, p: float, autocast: bool, patched: bool) -> dict[str, int | str]:
    """How often each thing that may change between steps compiles; "fails" where the graph does, in PEFT's forward."""
    torch._dynamo.reset()
    kind, dtype = BASES[base]
    model, counts = build(kind, dtype, CHECKPOINTS[checkpoints], p, patched), {}
    with torch.no_grad(), model.disable_adapter():
        model(torch.ones(1, 64, dtype=dtype))  # bitsandbytes moves an int8 weight in its first forward
    counter = CompileCounterWithBackend("eager")  # it is the tracer that decides
    graph = torch.compile(model, fullgraph=True, backend=counter)

    def count(name: str, shapes: Sequence[tuple[int, int]] = SHAPES[:1], scaling: float = 2.0) -> None:
        before = counter.frame_count
        for layer in layers(model):
            layer.scaling["default"] = scaling
        try:
            for shape in shapes:
                step(graph, model, dtype, shape, autocast)
        except RuntimeError:  # the tracer's, or autograd's
            counts[name] = "fails"
        else:
            counts[name] = counter.frame_count - before

    count("the first step")
    count("another batch and length", SHAPES[1:])
    with model.disable_adapter():
        count("adapters off")
    count("adapters on again")
    with model.disable_adapter():
        count("adapters off again", SHAPES[1:])
    count("another scaling", scaling=2.5)
    count("a third scaling", SHAPES, scaling=-1.0)
    return counts


COMPILATIONS = {
    "the first step": 1,
    "another batch and length": 0,
    "adapters off": 1,
    "adapters on again": 0,
    "adapters off again": 0,
    "another scaling": 1,  # from now on the compiler takes it for a variable
    "a third scaling": 0,
}


def some(*short: tuple) -> list[Any]:
    """All rows as parameters, of which the long lane alone runs what is not ``short``."""
    return [pytest.param(row, marks=() if row in short else pytest.mark.long, id=str(row)) for row in ROWS]


@pytest.mark.parametrize("row", some(*(row for row in ROWS if row[2])))
def test_one_graph_whose_loss_and_gradients_are_the_same_bits(row):
    assert cell(*row) == ""


def cell(base: str, checkpoints: str, p: float, autocast: bool) -> str:
    """ "" for one fused graph whose results, of two batches and lengths, are those of the patched model uncompiled."""
    torch._dynamo.reset()
    kind, dtype = BASES[base]
    model = build(kind, dtype, CHECKPOINTS[checkpoints], p)
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(model, fullgraph=True, backend=counter)
    for shape in SHAPES[:2]:
        found = step(graph, model, dtype, shape, autocast)
        if not same(found, step(model, model, dtype, shape, autocast)):
            return f"other bits at {shape}"
    traced = [tally.of(layer).traced for layer in layers(model)]
    return "" if counter.frame_count == 1 and traced == [{"": 1}] * 2 else f"{counter.frame_count} graphs, {traced}"


NF4 = ("nf4, computes in bf16", "non-reentrant", 0.3, True)


@pytest.mark.parametrize("row", some(NF4))
def test_what_changes_compiles_as_often_as_under_peft(row):
    """What PEFT cannot compile in one graph its forward cannot without the adapters, which is the patched layer's too:
    under autocast bitsandbytes' 8-bit forward, which assigns data of another dtype, and its 4-bit backward in fp32.
    """
    theirs, ours = compilations(*row, patched=False), compilations(*row, patched=True)
    assert theirs == COMPILATIONS or set(theirs.values()) == {"fails"}
    off = {name: count for name, count in theirs.items() if name.startswith("adapters off")}
    assert ours == COMPILATIONS | off


def change_bases(model: nn.Module, kind: str, nested: bool) -> None:
    other = build(kind, F32, patched=False, nested=nested)
    for layer, its in zip(layers(model), layers(other), strict=True):
        layer.base_layer = its.base_layer


@pytest.mark.parametrize("kinds", [("nf4", "fp4", "plain nf4"), ("int8",), ("torchao",)], ids=str)
def test_a_graph_reads_the_base_that_the_layer_has_now(kinds):
    """4-bit bases of one shape differ in facts that are no tensors; int8's tensors move in its first own forward."""
    model = build(kinds[0], F32)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    for kind in kinds:
        change_bases(model, kind.split()[-1], nested="plain" not in kind)
        for _ in range(2):
            assert same(step(graph, model, F32), step(model, model, F32))
            with torch.no_grad(), peftkern.disabled():
                model(torch.ones(1, 64))
    assert all(set(tally.of(layer).traced) == {""} for layer in layers(model))


def test_a_graph_sees_that_bitsandbytes_has_repacked_the_weight():
    """Its forward does so in eval mode, on processors that it has a kernel for."""
    model = build("nf4", BF16, nested=False).eval()
    graph, x = torch.compile(model, fullgraph=True, backend="eager"), torch.ones(2, 64, dtype=BF16)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))
        with peftkern.disabled():
            model(x)
        assert torch.equal(graph(x), model(x))
    reasons = [why_not(layer) for layer in layers(model)]
    assert all(reason is None or "has repacked" in reason for reason in reasons)
    traced = [{"": 1} if reason is None else {"": 1, reason: 1} for reason in reasons]
    assert [tally.of(layer).traced for layer in layers(model)] == traced


def test_a_base_that_cannot_be_taken_runs_pefts_forward_in_the_graph():
    model, plain = build("nf4", F32), build("nf4", F32, patched=False)
    for one in (model, plain):
        for layer in layers(one):
            layer.base_layer.weight.quant_state.offset = torch.tensor(float("nan"))
    reason = why_not(layers(model)[0])
    assert reason is not None and "cannot be taken" in reason
    graph = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.ones(2, 64)
    assert torch.equal(graph(x).isnan(), plain(x).isnan())
    assert [tally.of(layer).traced for layer in layers(model)] == [{reason: 1}] * 2


def table() -> list[str]:
    """What was found, as Markdown; the compilations are those of ``COMPILATIONS``, one after the other."""
    heads = ["base", "checkpoints", "dropout", "autocast", "one graph, same bits", "compilations", "PEFT's"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in ROWS:
        ours, theirs = (compilations(*row, patched=patched).values() for patched in (True, False))
        counts = ["fails" if set(found) == {"fails"} else " ".join(map(str, found)) for found in (ours, theirs)]
        base, checkpoints, p, autocast = row
        said = [base, checkpoints, str(p), "bf16" if autocast else "off", cell(*row) or "yes", *counts]
        lines.append(f"| {' | '.join(said)} |")
    return lines


@pytest.mark.long
def test_the_readme_has_the_table():
    assert "\n".join(table()) in written()


if __name__ == "__main__":
    print("\n".join(table()))
