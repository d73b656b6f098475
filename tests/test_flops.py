"""What PyTorch's FLOP counter says of the two operators, against products counted by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from calls import call_of
from conftest import ALL_LINEAR, ROOT, Case, adapted, leaves_of, make, step
from torch.utils.flop_counter import FlopCounterMode

import peftkern
from peftkern.call import Pair
from peftkern.functional import run, run_dora
from peftkern.weights import DenseWeight

M, K, N, R = 6, 16, 24, 3
FORWARD = 2 * M * (N * K + R * K + N * R)
BACKWARD = {  # needs -> t and the gradients
    ("x", "lora_A", "lora_B"): 2 * M * (N * R + N * K + R * K + R * K + N * R),
    ("lora_A", "lora_B"): 2 * M * (N * R + R * K + N * R),
    ("x",): 2 * M * (N * R + N * K + R * K),
    ("lora_B",): 2 * M * N * R,
    ("lora_A", "bias"): 2 * M * (N * R + R * K),
    ("bias", "lora_bias"): 0,
}


def counted(function, *arguments) -> tuple[int, object]:
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
    return counter.get_total_flops(), result


@pytest.mark.parametrize("weight_format", ["dense", "int8"])
@pytest.mark.parametrize("needs", BACKWARD, ids="+".join)
def test_hand_counts(needs, weight_format):
    case = Case(M, K, N, R, bias=True, lora_bias=True, weight_format=weight_format)
    t = make(case)
    leaf = leaves_of(t, needs)

    def forward():
        vectors = dict(bias=leaf["bias"], lora_bias=leaf["lora_bias"], dropout_p=0.3)
        return peftkern.lora_linear(leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"], 2.0, **vectors)

    flops, y = counted(forward)
    assert flops == FORWARD
    assert counted(y.backward, t.dy)[0] == BACKWARD[needs]


def test_a_patched_model_counts_what_peft_counts():
    """PEFT's autograd makes the same products; dx of the first layers' input, which nobody asks for, neither."""
    model = adapted(target_modules=ALL_LINEAR)
    expected = counted(step, model)[0]
    peftkern.patch(model)
    assert counted(step, model)[0] == expected > 0
    peftkern.patch(model, share=True)
    step(model)
    assert len(peftkern.shared_inputs(model)) == 4 and counted(step, model)[0] == expected


@pytest.mark.parametrize("needs", BACKWARD, ids="+".join)
def test_hand_counts_of_several_adapters(needs):
    """The frozen product once, the thin ones for each adapter."""
    ranks = (3, 6)
    ones = [make(Case(M, K, N, r, bias=True, lora_bias=True)) for r in ranks]
    leaves = [leaves_of(t, needs) for t in ones]
    weight, first = DenseWeight(ones[0].weight), leaves[0]
    adapters = [
        Pair(weight, v["lora_A"], v["lora_B"], first["bias"], v["lora_bias"], 2.0, None, 0.0, None, "base")
        for v in leaves
    ]
    flops, (y,) = counted(run, first["x"], call_of(adapters))
    assert flops == 2 * M * (N * K + sum(r * K + N * r for r in ranks))
    shared = 2 * M * N * K if "x" in needs else 0
    thin = BACKWARD[needs] - shared  # of rank R, to which it is proportional
    assert counted(y.backward, ones[0].dy)[0] == shared + sum(thin * r // R for r in ranks)


def test_hand_count_of_dora():
    t = make(Case(M, K, N, R))
    operands = Pair(DenseWeight(t.weight), t.lora_A, t.lora_B, None, None, 2.0, None, 0.0, None, "base")
    assert counted(run_dora, t.x, call_of([operands]), torch.ones(N))[0] == FORWARD + 2 * N * R * K


@pytest.mark.parametrize(
    "imports",
    [
        "import peftkern; from torch.utils.flop_counter import FlopCounterMode",
        "from torch.utils.flop_counter import FlopCounterMode; import peftkern",
    ],
)
def test_formulas_are_there_in_any_order_of_imports(imports):
    program = f"""
import torch
{imports}
import sys
with FlopCounterMode(display=False) as counter:
    peftkern.lora_linear(torch.ones({M}, {K}), torch.ones({N}, {K}), torch.ones({R}, {K}), torch.ones({N}, {R}))
assert counter.get_total_flops() == {FORWARD}, counter.get_total_flops()
assert torch.ops.peftkern.forward in counter.get_flop_counts()["Global"]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
