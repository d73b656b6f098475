"""q, k, v, gate and up of a Llama block, forward and backward: alone, and those that share an x as one node.

    python -m benchmarks.shared_input [--hidden 576 2048] [--rows 512] [--rounds 15] [--dtypes fp32 bf16] [--p 0 0.05]

Attention itself and the products that share no x are left out: they are the same in both. The gradients of both are
held to each other before anything is timed.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

import peftkern
from benchmarks import harness, packages
from peftkern.testing.numerics import relative_error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Block(nn.Module):
    """What reads a shared x in a Llama block of this width: two x, five layers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        head, wide = hidden // 3 // 64 * 64, round(hidden * 8 / 3 / 64) * 64
        for name, width in (("q", hidden), ("k", head), ("v", head), ("gate", wide), ("up", wide)):
            setattr(self, name, nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        other = x * 0.5
        return self.q(x), self.k(x), self.v(x), self.gate(other), self.up(other)


def measure(hidden: int, rows: int, dtype: torch.dtype, p: float, rounds: int) -> list[harness.Timing]:
    """Time both ways of one block, forward and backward, after their gradients were compared.

    Raises: harness.WrongResult where they differ by more than roundings.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_dropout=p, target_modules=["q", "k", "v", "gate", "up"], init_lora_weights=False)
    alone = get_peft_model(Block(hidden).to(dtype), config).train()
    shared = copy.deepcopy(alone)
    peftkern.patch(alone)
    peftkern.patch(shared, share=[("q", "k", "v"), ("gate", "up")])
    x = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    dys = [torch.randn_like(y) for y in alone(x)]

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        wanted = (x, *(parameter for parameter in model.parameters() if parameter.requires_grad))
        return torch.autograd.grad(model(x * 1), wanted, dys)

    def seeded(model: nn.Module) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        return run(model)

    def check() -> str | None:
        error = max(map(relative_error, seeded(shared), seeded(alone)))
        found = len(peftkern.shared_inputs(shared))
        return None if found == 2 and error <= 4 * torch.finfo(dtype).eps else f"{found} groups, error {error:.2e}"

    cases = [
        harness.Case("alone", lambda: run(alone), lambda: None),
        harness.Case("shared", lambda: run(shared), check),
    ]
    return harness.measure(cases, rounds, label=f"{hidden} {dtype} p={p:g}")


def main() -> None:
    """Print one line for each cell."""
    packages.require("peft")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--p", type=float, nargs="+", default=[0.0, 0.05])
    options = parser.parse_args()
    for hidden in options.hidden:
        for name in options.dtypes:
            for p in options.p:
                alone, shared = measure(hidden, options.rows, DTYPES[name], p, options.rounds)
                print(
                    f"hidden {hidden} {name} p={p:<4g} alone {alone.median * 1e3:8.2f} ms  shared "
                    f"{shared.median * 1e3:8.2f} ms  {shared.ratio:.3f}x ({shared.ratio_q1:.3f} to "
                    f"{shared.ratio_q3:.3f}; fastest {shared.ratio_best:.3f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
