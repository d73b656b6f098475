"""One computation in five forms, and what goes with each: a generated matrix, of which every cell works or is refused.

PYTHONPATH=tests python tests/test_forms.py      prints it; docs/design.md has it too
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from calls import all_of, bank_of, call_of, check_operators
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peftkern import functional
from peftkern.backends.reference import formula
from peftkern.call import Call, Pair, Span
from peftkern.ops import check, dispatch
from peftkern.weights import DenseWeight, FrozenWeight

FORMS = {
    "one adapter": "one update of one base",
    "several adapters": "updates of one base, summed",
    "a shared input": "several bases, with an update each",
    "DoRA": "one update, and a magnitude",
    "a bank": "updates of some rows each",
}
QUANTISED = ("nf4", "fp4", "mxfp4", "nvfp4", "int4", "int8", "fp8")
M, K, N = 9, 32, 24
BACKENDS = [name for name in ("reference", "cpp") if dispatch.backend_named(name).unavailable() is None]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


@dataclasses.dataclass
class Made:
    """A call of a form, its x and dys, and DoRA's magnitude."""

    call: Call
    x: Tensor
    dys: list[Tensor]
    magnitude: Tensor | None = None

    def run(self, x: Tensor | None = None) -> list[Tensor]:
        x = self.x if x is None else x
        if self.call.rows is not None:
            check.forward(self.call, x)  # as every way in does
        if self.magnitude is not None:
            return [functional.run_dora(x, self.call, self.magnitude)]
        return functional.run(x, self.call)

    def leaves(self) -> list[Tensor]:
        parameters = [one for column in self.call.parameters() for one in column]
        return [one for one in (self.x, *parameters, self.magnitude) if one is not None and one.requires_grad]

    def step(self) -> list[Tensor]:
        ys = self.run()
        return [*ys, *torch.autograd.grad(ys, self.leaves(), self.dys)]


def make(
    form: str, dtype: torch.dtype = torch.float32, format: str = "dense", p: float = 0.0, bias: bool = False,
    lora_bias: bool = False, tensor_scaling: bool = False, backend: str = "",
) -> Made:  # fmt: skip
    """Operands of a form, all of which are trained but the weights."""

    def weight(seed: int) -> FrozenWeight:
        W, options = normal(N, K, seed=seed, scale=K**-0.5), {"group_size": 16} if format == "int4" else {}
        if format == "dense":
            return DenseWeight(W.to(dtype))
        stored, compute = ("fp8", "fp8") if format == "fp8xfp8" else (format, None)
        return FrozenWeight.quantize(W, stored, base_compute=compute, **options)

    def pair(i: int) -> Pair:
        A, B = normal(3 + i, K, seed=i, scale=K**-0.5).requires_grad_(), normal(N, 3 + i, seed=i).requires_grad_()
        vector = normal(N, seed=i).requires_grad_()
        own = normal(N, seed=9 + i).to(dtype).requires_grad_() if bias else None
        c, tensor = (1.0, torch.tensor(0.75)) if tensor_scaling else (1.5 - i / 2, None)
        state = torch.tensor([i + 1, 2**40 + i]) if p else None
        return Pair(weight(i), A, B, own, vector if lora_bias else None, c, tensor, p, state, "base")

    x = normal(M, K, seed=5).to(dtype).requires_grad_()
    pairs = [pair(i) for i in range(1 if form in ("one adapter", "DoRA") else 2)]
    dys = [normal(M, N, seed=7 + i).to(dtype) for i in range(len(pairs) if form == "a shared input" else 1)]
    call = call_of(pairs, form == "a shared input", backend)
    if form == "a bank":
        spans, numbers = [Span(0, 4, 1, 2), Span(4, 3, 3, 4)], torch.tensor([0, 2, 4, 8, 1, 3, 5])
        bank = bank_of(pairs[0].weight, pairs[0].bias, [one[1:3] for one in pairs], spans, numbers, p=[p, p])
        updates = [
            one._replace(lora_bias=two.lora_bias, scaling=two.scaling, scaling_tensor=two.scaling_tensor)
            for one, two in zip(bank.updates, call.updates, strict=True)
        ]
        call = bank._replace(updates=tuple(updates), backend=backend)
    magnitude = (normal(N, seed=3).abs() + 0.5).requires_grad_() if form == "DoRA" else None
    return Made(call, x, dys, magnitude)


def truth(made: Made) -> list[Tensor]:
    """Every y and gradient by the formula, differentiated by autograd, in fp64."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    call, x, magnitude = made.call, made.x.detach().double().requires_grad_(), wide(made.magnitude)
    bases = tuple(
        base._replace(weight=DenseWeight(base.weight.materialize(torch.float64)), bias=wide(base.bias))
        for base in call.bases
    )
    updates = tuple(
        update._replace(lora_A=wide(update.lora_A), lora_B=wide(update.lora_B), lora_bias=wide(update.lora_bias))
        for update in call.updates
    )
    exact = Made(call._replace(bases=bases, updates=updates), x, [dy.double() for dy in made.dys], magnitude)
    if magnitude is None:
        ys = formula.forward_call(exact.call, x)
    else:
        ((weight, bias),), (update,) = bases, updates
        c = update.scaling * (1 if update.scaling_tensor is None else float(update.scaling_tensor))
        total = weight.data + c * update.lora_B.detach() @ update.lora_A.detach()
        gain = magnitude / total.norm(dim=1)
        plain = formula.forward_call(exact.call._replace(bases=(bases[0]._replace(bias=None),)), x)[0]
        ys = [plain * gain + (0 if bias is None else bias)]
    return [*ys, *torch.autograd.grad(ys, exact.leaves(), exact.dys)]


def agree(form: str, tolerance: float = 1e-5, **options) -> None:
    """y and every gradient against fp64, on each backend."""
    for backend in BACKENDS:
        made = make(form, backend=backend, **options)
        found, expected = made.step(), truth(made)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert (one.double() - other).norm() <= tolerance * other.norm() + 1e-12, (form, options, backend)


# --------------------------------------------------------------------------------------------------------- the features


def operator_checks(form: str) -> None:
    made = make(form, bias=True)
    call = made.call
    if form == "DoRA":
        call = call._replace(bases=(call.bases[0]._replace(bias=None),))
    frozen = call._replace(
        bases=tuple(b._replace(bias=None if b.bias is None else b.bias.detach()) for b in call.bases),
        updates=tuple(u._replace(lora_A=u.lora_A.detach(), lora_B=u.lora_B.detach()) for u in call.updates),
    )
    check_operators(frozen, made.x.detach(), made.dys, all_of(frozen))


def dropout(form: str) -> None:
    if form != "DoRA":  # whose formula with dropout is another; tests/test_dora_dropout.py has it
        agree(form, p=0.4)
    made = make(form, p=0.4)
    assert all(torch.equal(a, b) for a, b in zip(made.step(), make(form, p=0.4).step(), strict=True))
    assert not torch.equal(made.run()[0], make(form).run()[0])


def autocast(form: str) -> None:
    """In a region of autocast the operators take their operands as they are: no bit changes."""
    made = make(form, torch.bfloat16)
    expected = made.step()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(made.step(), expected, strict=True))


def flops(form: str) -> None:
    made = make(form)
    with FlopCounterMode(display=False) as counter:
        made.run()
    rows = [M if update.span is None else update.span.length for update in made.call.updates]
    expected = 2 * M * N * K * len(made.call.bases)
    expected += sum(2 * m * update.R * (K + N) for m, update in zip(rows, made.call.updates, strict=True))
    expected += 2 * N * 3 * K if form == "DoRA" else 0  # the row norms
    assert counter.get_total_flops() == expected


@contextlib.contextmanager
def one_of_two_ranks() -> Iterator[None]:
    """A process group whose other member does not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def dtensors(form: str) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

    with one_of_two_ranks():
        mesh, made = init_device_mesh("cpu", (2,)), make(form)

        def place(tensor: Tensor, placement) -> DTensor:
            return DTensor.from_local(tensor.detach(), mesh, [placement], run_check=False)

        bases = tuple(b._replace(weight=DenseWeight(place(b.weight.data, Shard(0)))) for b in made.call.bases)
        updates = tuple(
            u._replace(lora_A=place(u.lora_A, Replicate()), lora_B=place(u.lora_B, Shard(0))) for u in made.call.updates
        )
        call = made.call._replace(bases=bases, updates=updates)
        magnitude = None if made.magnitude is None else place(made.magnitude, Shard(0))
        (y,) = Made(call, place(made.x, Replicate()), made.dys, magnitude).run()
        assert y.placements == (Shard(1),) and torch.equal(y.to_local(), made.run()[0])


def compiled(form: str) -> None:
    torch._dynamo.reset()
    made = make(form, p=0.3, bias=True)
    expected = made.step()
    ys = torch.compile(lambda x: made.run(x), fullgraph=True, backend="aot_eager")(made.x)
    found = [*ys, *torch.autograd.grad(ys, made.leaves(), made.dys)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def eager(form: str) -> None:
    """Past the dispatcher and through it, which a mode makes it take, are the same bits."""
    made = make(form, p=0.3)
    expected = made.step()
    with FlopCounterMode(display=False):
        assert all(torch.equal(a, b) for a, b in zip(made.step(), expected, strict=True))


def on_triton(form: str) -> None:
    """The backend takes it on a GPU; that its kernels are right the interpreter lane shows."""
    made = make(form, p=0.3, bias=True, lora_bias=form != "DoRA")
    triton = dispatch.backend_named("triton")
    for key in made.call.keys(M, torch.bfloat16):
        from peftkern.call import Problem

        reason = triton.supports(dataclasses.replace(Problem(*key), device_type="cuda"))
        if reason is not None:
            raise NotImplementedError(reason)


FEATURES: dict[str, Callable[[str], None]] = {
    "operator checks": operator_checks,
    **{name: lambda form, name=name: agree(form, 1e-5, format=name) for name in QUANTISED},
    "fp8 base compute": lambda form: agree(form, 0.1, format="fp8xfp8"),
    "lora_bias": lambda form: agree(form, lora_bias=True),
    "a tensor as scaling": lambda form: agree(form, tensor_scaling=True),
    "the bias's gradient": lambda form: agree(form, bias=True),
    "dropout": dropout,
    "autocast": autocast,
    "FLOPs": flops,
    "DTensor": dtensors,
    "compiled, fullgraph": compiled,
    "eager": eager,
    "fused on Triton": on_triton,
}
# What does not go, and by which words it is refused.
REFUSED = {
    ("DoRA", "lora_bias"): "DoRA has no lora_bias",
    ("a bank", "a tensor as scaling"): "the scaling of an update of some rows is a number, not a tensor",
    ("several adapters", "DTensor"): "one base and one update of all rows",
    ("a shared input", "DTensor"): "one base and one update of all rows",
    ("DoRA", "DTensor"): "no rule for DTensors",
    ("a bank", "DTensor"): "one base and one update of all rows",
}


def cell(form: str, feature: str) -> str:
    """Whether it works, "" , or by which words it is refused. Raises: whatever a wrong result raises."""
    try:
        FEATURES[feature](form)
    except NotImplementedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("form", FORMS)
def test_it_works_or_is_refused_by_name(form, feature):
    expected, found = REFUSED.get((form, feature), ""), cell(form, feature)
    assert expected in found and bool(expected) == bool(found), found


def table() -> Sequence[str]:
    """The matrix as Markdown."""
    lines = [f"| | {' | '.join(FORMS)} |", "|---" * (1 + len(FORMS)) + "|"]
    for feature in FEATURES:
        cells = ["refused" if cell(form, feature) else "yes" for form in FORMS]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
