"""One PEFT layer as shipped, a small Llama's training step, and both as CUDA graphs; others' paths where importable."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import cells, graphs, measure
from benchmarks.gpu.bench import Bench, Wrong
from benchmarks.gpu.plan import BF16, key_of
from benchmarks.gpu.task import REFUSED, Result, Task
from benchmarks.linear import SCALING, Cell

_ROWS = (8192, 2048)
_SLOW_COMPILE = 240.0


def tasks(bench: Bench) -> list[Task]:
    """Layers eager, the model, then what compiles for long."""
    if importlib.util.find_spec("peft") is None:
        return [Task("layer", lambda: {"status": REFUSED, "error": "peft is not installed"})]
    plan = bench.plan
    rows = [M for M in _ROWS if M in plan.rows] or list(plan.rows[:1])
    big, more = ([plan.cell(layer, M) for layer in plan.layers] for M in (rows[0], rows[-1]))

    def layers(names: tuple[str, ...], found: list[Cell], limit: float = 120.0) -> list[Task]:
        label = "layer" if len(names) == 3 else "layer compiled"
        return [
            Task(f"{label} {key_of(c)}", lambda c=c: layer_cell(bench, c, names), limit, cells.about(c)) for c in found
        ]

    eager = ("frozen", "peft", "peftkern")
    models = [Task(f"model p={p:g}", lambda p=p: model_step(bench, p), _SLOW_COMPILE) for p in (0.05, 0.0)]
    compiled = layers((*eager, "peft compiled"), big, _SLOW_COMPILE) if plan.compiled else []
    return [*layers(eager, big), *models, *compiled[:4], *_others(bench, big), *layers(eager, more), *compiled[4:]]


# ---------------------------------------------------------------------------------------------------------- one layer


def layer_cell(bench: Bench, cell: Cell, names: tuple[str, ...]) -> Result:
    """PEFT's lora.Linear and the same layer patched, in both phases, checked as ``benchmarks.layer`` checks them."""
    from benchmarks.layer import Layers

    layers = Layers(cell)
    for name in names:
        reason = layers.check(name)
        if reason is not None:
            raise Wrong(f"{name}: {reason}")
    result: Result = {"times": {}, "peak_mib": {}}
    calls = {name: layers.call(name) for name in names}
    runs = {name: _both(call, layers.inputs(name), layers.o.dy) for name, call in calls.items()}
    for phase, timed in (("forward", calls), ("forward+backward", runs)):
        result["times"][phase] = measure.summary(bench.time(dict(timed)), "frozen")
    if cell.device == "cuda":
        result["peak_mib"] = {name: cells.peak_mib(run) for name, run in runs.items()}
    return result


def _both(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), inputs, dy)


def _others(bench: Bench, found: list[Cell]) -> list[Task]:
    """Unsloth's single projection where it can be imported. Liger has no LoRA linear of its own to compare."""
    if importlib.util.find_spec("unsloth") is None:
        return [
            Task("others", lambda: {"status": REFUSED, "error": "unsloth is not installed; Liger has no LoRA linear"})
        ]
    return [Task(f"unsloth {key_of(c)}", lambda c=c: _unsloth(bench, c), 120.0, cells.about(c)) for c in found[:4]]


def _unsloth(bench: Bench, cell: Cell) -> Result:
    """Unsloth's LoRA_W without dropout, which it does not have, beside peftkern without dropout."""
    from dataclasses import replace

    from unsloth.kernels.fast_lora import LoRA_W

    from benchmarks.gpu.variants import Linear

    one = Linear(replace(cell, p=0.0, adapter_dtype=BF16), bench.plan)
    o = one.o

    def forward() -> Tensor:
        return LoRA_W.apply(o.x.unsqueeze(0), o.W, None, o.A, o.B, SCALING).squeeze(0)

    def both() -> tuple[Tensor, ...]:
        y = forward()
        return (y.detach(), *torch.autograd.grad(y, one.inputs, o.dy))

    for name, run in (("peftkern", None), ("unsloth", both)):
        reason = one.check(name, run)[1]
        if reason is not None:
            raise Wrong(f"{name}: {reason}")
    one.forget_truth()
    runs = {"frozen": one.both("frozen"), "peftkern": one.both("peftkern"), "unsloth": both}
    return {"times": {"forward+backward": measure.summary(bench.time(runs), "frozen")}}


# -------------------------------------------------------------------------------------------------------- the model


def small_llama(bench: Bench) -> Any:
    """A Llama of a few blocks with random weights, frozen, in training mode, without checkpointing."""
    import transformers

    plan = bench.plan
    hidden, inner = plan.hidden
    heads = max(4, hidden // 128)
    config = transformers.LlamaConfig(
        vocab_size=plan.vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=plan.blocks,
        num_attention_heads=heads, num_key_value_heads=max(2, heads // 4), max_position_embeddings=max(64, plan.tokens),
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(plan.device):
        model = transformers.LlamaForCausalLM(config)
    return model.to(BF16).requires_grad_(False).train()


def model_step(bench: Bench, p: float) -> Result:
    """A training step frozen, under PEFT and under peftkern, eager and as CUDA graphs; gradients are checked first."""
    from benchmarks import memory, smollm2, training

    plan = bench.plan
    models = training.variants(small_llama(bench), smollm2.lora_config(p))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(plan.vocabulary, (1, plan.tokens), generator=generator).to(plan.device)
    short = ids[:, : max(16, plan.tokens // 8)]
    checked = training.check_gradients(models["peft"], models["peftkern"], short)
    if not checked["ok"]:
        raise Wrong(f"peftkern differs from PEFT by more than the base's roundings: {checked}")
    runs: dict[str, Any] = {name: _step(training.loss, model, ids) for name, model in models.items()}
    result: Result = {"check": checked, "blocks": plan.blocks, "tokens": plan.tokens, "hidden": plan.hidden}
    result["times"] = measure.summary(bench.time(dict(runs)), "frozen")
    result["saved_mib"] = {
        name: round(memory.saved_for_backward(lambda m=m: training.loss(m, ids), m).mib, 1)
        for name, m in models.items()
    }
    if plan.device == "cuda":
        result["peak_mib"] = {name: cells.peak_mib(run) for name, run in runs.items()}
    if plan.compare_graphs:
        result["graphs"] = _graph_steps(bench, runs)
    return result


def _step(loss: Callable[[Any, Tensor], Tensor], model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """Forward and backward with fresh gradients; no host synchronisation."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        value = loss(model, ids)
        value.backward()
        return value.detach()

    return run


def _graph_steps(bench: Bench, runs: dict[str, Any]) -> Result:
    """The same steps, captured; a replayed loss must be the eager one up to what another dropout mask moves."""
    captured, failed = {}, {}
    for name, run in runs.items():
        try:
            graph = graphs.Captured(run)
            eager, replayed = run().item(), graph().item()
            if not math.isclose(eager, replayed, rel_tol=0.02):
                raise Wrong(f"the replayed loss is {replayed}, the eager one {eager}")
            captured[name] = graph
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - said in the record
            failed[name] = f"{type(error).__name__}: {str(error)[:400]}"
    found: Result = {"failed": failed}
    if "frozen" in captured:
        found["times"] = measure.summary(bench.time(dict(captured)), "frozen")
    return found
