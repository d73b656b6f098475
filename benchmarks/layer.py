"""One PEFT LoRA layer, forward and backward: PEFT eager, PEFT compiled, patched by peftkern, and the bare layer.

    python -m benchmarks.layer [--shape llama3-8b.qo] [--rows 2048] [--dtype bf16] [--p 0.05] [--quick]

The same layer object's parameters serve all variants. Before timing, y and every gradient are held to PEFT's own error
under the same dropout mask, against fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peftkern
from benchmarks import linear, packages, products
from benchmarks.linear import Cell, Operands
from peftkern.testing.numerics import relative_error

VARIANTS = ("frozen", "peft", "peft compiled", "peftkern")


def peft_layer(cell: Cell, o: Operands) -> nn.Module:
    """PEFT's own lora.Linear around the cell's frozen weight, with the cell's A and B; on the "default" adapter."""
    from peft import LoraConfig, get_peft_model

    base = nn.Linear(cell.K, cell.N, bias=False, device=cell.device, dtype=cell.dtype)
    base.weight = nn.Parameter(o.W, requires_grad=False)
    config = LoraConfig(r=cell.r, lora_alpha=linear.SCALING * cell.r, lora_dropout=cell.p, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0].train()
    for factor, values in ((layer.lora_A, o.A), (layer.lora_B, o.B)):
        factor["default"].weight = nn.Parameter(values.detach())
    return layer


def _results(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


class Layers:
    """The variants of one cell as calls, with their inputs and the checks."""

    def __init__(self, cell: Cell) -> None:
        from benchmarks import training

        self.cell, self.o = cell, linear.operands(cell)
        self.plain = peft_layer(cell, self.o)
        self.patched = training.shared_copy(self.plain)
        peftkern.patch(self.patched)
        self.A, self.B = self.plain.lora_A["default"].weight, self.plain.lora_B["default"].weight
        self.modules = {"frozen": self.plain.base_layer, "peft": self.plain, "peftkern": self.patched}

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """What the variant's backward differentiates in."""
        return (self.o.x,) if name == "frozen" else (self.o.x, self.A, self.B)

    def call(self, name: str) -> Callable[[], Tensor]:
        """The variant's forward."""
        module = self.modules.get(name) or torch.compile(self.plain, dynamic=False)
        return lambda: module(self.o.x)

    def check(self, name: str) -> str | None:
        """Why ``name`` is wrong, or None: error in y, dx, dA, dB at most 2 err(PEFT) + 1e-6 against fp64.

        The frozen layer and PEFT itself are what the others are judged by. Compiled PEFT draws its own dropout mask,
        so it is judged in evaluation mode.
        """
        from benchmarks import training

        if name in ("frozen", "peft"):
            return None
        own, twin = self.patched, training.with_published_dropout(self.plain)
        if name == "peft compiled":
            own, twin = torch.compile(training.shared_copy(self.plain).eval(), dynamic=False), twin.eval()
        truth = self._gradients(*self._wide(twin))
        for label, mine, theirs, wanted in zip(
            ("y", "dx", "dA", "dB"), self._gradients(own, self.o), self._gradients(twin, self.o), truth, strict=True
        ):
            error, peer = relative_error(mine, wanted), relative_error(theirs, wanted)
            allowed = 2 * max(peer, self._factor_rounding()) + 1e-6
            if not error <= allowed:
                return f"{self.cell.title}: {label} has error {error:.2e}, allowed {allowed:.2e}"
        return None

    def _factor_rounding(self) -> float:
        """PEFT's fp32 factors are rounded to the base dtype by peftkern's default precision, by a roundoff each."""
        return torch.finfo(self.cell.dtype).eps / 2

    def _wide(self, twin: nn.Module) -> tuple[nn.Module, Operands]:
        import copy

        wide = copy.deepcopy(twin).double()
        return wide, self.o._replace(x=self.o.x.detach().double().requires_grad_(), dy=self.o.dy.double())

    def _gradients(self, module: nn.Module, o: Operands) -> list[Tensor]:
        torch.manual_seed(11)
        parameters = [p for p in module.parameters() if p.requires_grad]
        return _results(lambda: module(o.x), (o.x, *parameters), o.dy)


def measure_cell(cell: Cell, names: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    """Check the variants of a cell, then time forward, backward and both.

    Raises: WrongResult where a variant is wrong.
    """
    layers = Layers(cell)
    variants = {name: (layers.call(name), layers.inputs(name)) for name in names}
    return products.measure_variants(cell, variants, layers.o.dy, layers.check, rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen cells."""
    packages.require("peft")
    options = products.parser("layer", __doc__, rounds=25).parse_args(arguments)
    title = "One PEFT layer, forward+backward: r={r}, p={p:g}, {dtype} base, {adapter} adapter"
    products.run("layer", options, measure_cell, VARIANTS, title)


if __name__ == "__main__":
    main()
