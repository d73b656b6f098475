"""What every test shares: the targets, poisoned memory, and one way to build, run and judge a call."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it on CUDA

import lanes  # before torch, whose libraries read what it sets
import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern import _env
from peftkern.backends.reference import formula
from peftkern.backends.triton import select
from peftkern.call import Pair
from peftkern.ops import dispatch
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as
from peftkern.weights import DenseWeight, FrozenWeight

pytest_addoption, pytest_collection_modifyitems = lanes.pytest_addoption, lanes.pytest_collection_modifyitems
ROOT = pathlib.Path(peftkern.__file__).parent.parent
NAMES = ("y", "x", "lora_A", "lora_B", "bias", "lora_bias")  # y and what can have a gradient
TRAINABLE = NAMES[1:]
Found = dict[str, Tensor | None]


class Target(NamedTuple):
    """Where a test runs: ``backend`` is asked for by name, so that a silent fallback cannot pass for it."""

    backend: str
    device: str


CPU_TARGETS = [
    Target(name, "cpu") for name in ("reference", "cpp") if dispatch.backend_named(name).unavailable() is None
]
GPU_TARGETS = [Target(name, "cuda") for name in ("triton", "reference") if torch.cuda.is_available()]
TARGETS = [pytest.param(target, id=target.backend) for target in CPU_TARGETS] + [
    pytest.param(target, id=f"{target.backend}-cuda", marks=pytest.mark.gpu) for target in GPU_TARGETS
]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend that can run on this machine."""
    return request.param


@pytest.fixture
def backend(target: Target) -> str:
    """The target's backend, for tests that build their own tensors on the CPU."""
    if target.device != "cpu":
        pytest.skip("this test is about the CPU")
    return target.backend


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN until somebody writes it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def dispatch_env(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``dispatch_env(PEFTKERN_BACKEND="...")`` sets variables; every cached decision is forgotten before and after."""

    def forget() -> None:
        for cached in (_env.settings, dispatch._select, dispatch._warn_if_better_was_expected):
            cached.cache_clear()
        select.forget()

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        forget()

    set_variables()
    yield set_variables
    monkeypatch.undo()
    forget()


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """Where an H200's own table would be; none is shipped, unless the test writes one to ``tables.shipped``."""
    from peftkern.backends.triton import arch, select, tables

    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "shipped", lambda name: tmp_path / "shipped" / f"{name}.json")
    select.forget()
    yield tables.cache_path(dataclasses.replace(arch.ARCHES["sm_90"], product="NVIDIA H200"))
    select.forget()


# ---------------------------------------------------------- one call: its description, tensors, run and judgement


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of lora_linear; ``make`` gives its tensors."""

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    p: float = 0.0
    bias: bool = False
    lora_bias: bool = False
    precision: str = "base"
    scaling: float = 1.75
    weight_format: str = "dense"

    def __str__(self) -> str:
        short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
        parts = [f"{self.M}x{self.K}x{self.N}", f"r{self.R}", short[self.dtype]]
        parts += [f"ad_{short[self.adapter_dtype]}"] if self.adapter_dtype not in (None, self.dtype) else []
        parts += [f"p{self.p:g}"] if self.p else []
        parts += [name for name in ("bias", "lora_bias") if getattr(self, name)]
        parts += ["fp32"] if self.precision == "fp32" else []
        parts += [self.weight_format] if self.weight_format != "dense" else []
        return "-".join(parts)


@dataclasses.dataclass
class Tensors:
    """The tensors of one case; ``weight`` is a tensor or a FrozenWeight."""

    x: Tensor
    weight: Tensor | FrozenWeight
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    lora_bias: Tensor | None
    dy: Tensor
    rng_state: Tensor


def make(case: Case, device: str = "cpu", seed: int = 0) -> Tensors:
    """Gaussian operands of magnitude 1 in, about 1 out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).to(device, dtype)

    M, K, N, R = case.M, case.K, case.N, case.R
    wide, adapter = case.dtype, case.adapter_dtype or case.dtype
    weight: Tensor | FrozenWeight = normal(N, K, dtype=wide, scale=K**-0.5)
    if case.weight_format != "dense":
        weight = FrozenWeight.quantize(weight, case.weight_format)
    return Tensors(
        x=normal(M, K, dtype=wide),
        weight=weight,
        lora_A=normal(R, K, dtype=adapter, scale=K**-0.5),
        lora_B=normal(N, R, dtype=adapter, scale=max(R, 1) ** -0.5),
        bias=normal(N, dtype=wide) if case.bias else None,
        lora_bias=normal(N, dtype=adapter) if case.lora_bias else None,
        dy=normal(M, N, dtype=wide),
        rng_state=torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator).to(device),
    )


def grads(y: Tensor, leaves: Found, dy: Tensor) -> Found:
    """y and the gradient of each leaf that wants one, by name; None for the others."""
    y.backward(dy)
    return {"y": y.detach()} | {name: None if leaf is None else leaf.grad for name, leaf in leaves.items()}


def leaves_of(t: Tensors, needs: tuple[str, ...] = TRAINABLE) -> Found:
    """Fresh leaves over the same memory and strides."""
    fields = {name: getattr(t, name) for name in TRAINABLE}
    return {n: None if v is None else v.detach().requires_grad_(n in needs) for n, v in fields.items()}


def run(case: Case, t: Tensors, backend: str, needs: tuple[str, ...] = TRAINABLE, **options) -> Found:
    """y and the gradients by lora_linear."""
    leaf = leaves_of(t, needs)
    arguments = dict(scaling=case.scaling, dropout_p=case.p, rng_state=t.rng_state, precision=case.precision) | options
    y = peftkern.lora_linear(
        leaf["x"], t.weight, leaf["lora_A"], leaf["lora_B"],
        bias=leaf["bias"], lora_bias=leaf["lora_bias"], backend=backend, **arguments,
    )  # fmt: skip
    return grads(y, leaf, t.dy)


def run_plain(case: Case, t: Tensors) -> Found:
    """The same by out-of-place PyTorch operators and autograd, with the same roundings."""
    leaf = leaves_of(t)
    thin = torch.promote_types(case.dtype, torch.float32) if case.precision == "fp32" else case.dtype
    x, W = leaf["x"], t.weight if isinstance(t.weight, Tensor) else t.weight.materialize(case.dtype)
    dropped = x
    if case.p:
        kept = dropout_mask(case.M, case.K, case.p, t.rng_state)
        lanes = round(65536 * case.p)
        dropped = torch.where(kept, x, torch.zeros_like(x)) * (65536 / (65536 - lanes) if lanes < 65536 else 0.0)
    s = dropped.to(thin) @ leaf["lora_A"].to(thin).T
    update = s @ leaf["lora_B"].to(thin).T
    if leaf["lora_bias"] is not None:
        update = update + leaf["lora_bias"].to(thin)
    y = torch.nn.functional.linear(x, W, leaf["bias"]) + (case.scaling * update).to(case.dtype)
    return grads(y, leaf, t.dy)


def run_truth(case: Case, t: Tensors) -> Found:
    """The same by the formula, in fp64."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    weight = t.weight if isinstance(t.weight, FrozenWeight) else DenseWeight(t.weight)
    operands = Pair(
        DenseWeight(weight.materialize(torch.float64)), wide(t.lora_A), wide(t.lora_B), wide(t.bias), wide(t.lora_bias),
        case.scaling, None, case.p, t.rng_state if round(65536 * case.p) else None, case.precision,
    )  # fmt: skip
    y, s = formula.forward(operands, t.x.double())
    found = formula.backward(operands, t.dy.double(), t.x.double(), s)._asdict()
    return {"y": y} | {name: None if getattr(t, name) is None else found[name] for name in TRAINABLE}


def expect(case: Case, t: Tensors, backend: str = "cpp", **options) -> tuple[Found, Found]:
    """What ``judge`` compares with: plain PyTorch with the same roundings, and the truth in fp64."""
    peer = run_plain(case, t) if backend == "reference" else run(case, t, "reference", **options)
    return peer, run_truth(case, t)


def judge(
    case: Case, backend: str, *trials: tuple[Tensors, Found], expected: tuple[Found, Found] | None = None
) -> None:
    """The error rule, for y and each gradient, pooled over the trials; and each one's dtype, shape and device.

    ``expected``: what ``expect`` gave for the one trial, where a test judges many results on the same operands.
    """
    judged: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {name: ([], [], []) for name in NAMES}
    for t, found in trials:
        peer, truth = expected or expect(case, t, backend)
        for name in NAMES:
            value, like = found[name], t.dy if name == "y" else getattr(t, name)
            if like is None:
                assert value is None
                continue
            assert value is not None, f"{name} is missing"
            assert (value.shape, value.dtype, value.device) == (like.shape, like.dtype, like.device), name
            for pool, tensor in zip(judged[name], (value, peer[name], truth[name]), strict=True):
                pool.append(tensor.flatten())
    for name, pools in judged.items():
        if pools[0]:
            assert_as_good_as(*(torch.cat(pool) for pool in pools), f"{name} of {case}")


def check(case: Case, target: Target, needs: tuple[str, ...] = TRAINABLE, **options) -> None:
    """Run and judge a case; the tiniest several times, so that a norm is never that of a few lucky roundings."""
    smallest = min(case.M * case.N, case.M * case.K, case.M * case.R, case.K * case.R, case.N * case.R)
    threads, trials = torch.get_num_threads(), []
    if case.M * case.K * case.N < 2**18:
        torch.set_num_threads(1)  # waking a second thread takes longer than these
    try:
        for seed in range(-(-32 // max(1, smallest))):
            t = make(case, target.device, seed)
            trials.append((t, run(case, t, target.backend, needs, **options)))
        judge(case, target.backend, *trials)
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------- tiny models of PEFT

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(2))


def llama(
    dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = False, widths: tuple[int, int] = (32, 48)
) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=widths[0], intermediate_size=widths[1], num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=32, attention_bias=bias,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def adapted(dtype: torch.dtype = torch.float32, *, base_bias: bool = False, zero: bool = False, **options) -> nn.Module:
    """A PEFT model whose adapters are not zero."""
    from peft import LoraConfig, get_peft_model

    settings = dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM") | options
    model = get_peft_model(llama(dtype, bias=base_bias), LoraConfig(**settings))
    return model if zero else randomise(model)


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def injected(dtype: torch.dtype = torch.float32, *, base_bias: bool = False, **options) -> nn.Module:
    """A model without PEFT whose adapters are not zero."""
    model = llama(dtype, bias=base_bias).eval()
    peftkern.inject(model, **(dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR) | options))
    return randomise(model)


def logits(model: nn.Module, **options) -> torch.Tensor:
    return model(input_ids=TOKENS, **options).logits


def step(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """The loss and every gradient, under a seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def pooled(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """All of a model's gradients in one vector, each by the size of its truth: one small tensor is mostly luck."""
    return torch.cat([(gradients[n] / truth[n].norm()).flatten().double() for n in sorted(truth) if n != "loss"])


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """fp32 reorderings only: torch's own default tolerance, relative to each tensor's size."""
    assert found.keys() == expected.keys()
    for name in expected:
        size = expected[name].abs().max()
        torch.testing.assert_close(found[name] / size, expected[name] / size, msg=lambda m, n=name: f"{n}: {m}")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners import lora

    return {name: module for name, module in model.named_modules() if isinstance(module, lora.Linear)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The shapes that went through the fast path."""
    from peftkern.integrations.peft import layer as integration
    from peftkern.integrations.peft import memo

    seen: list[tuple] = []
    genuine = integration.fused

    def spy(x, parts):
        seen.append(tuple(x.shape))
        return genuine(x, parts)

    monkeypatch.setattr(integration, "fused", spy)
    run = memo.Memo.run
    monkeypatch.setattr(memo.Memo, "run", lambda self, x: seen.append(tuple(x.shape)) or run(self, x))
    return seen


@pytest.fixture
def one_thread():
    """With more, torch's own sums over the rows of an expert (batched_mm) differ in their last bit from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
