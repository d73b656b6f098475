"""Two processes: the operators on DTensors, tensor-parallel LoRALinear, DDP by accelerate, FSDP2 by blocks."""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import distributed
import pytest
import torch
import torch.distributed as dist
from calls import call_of
from conftest import Case as Call
from conftest import adapted, assert_close, assert_equal, linears, make, step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import peftkern
from peftkern.call import Pair, arguments
from peftkern.functional import run, run_dora
from peftkern.integrations.peft import layer as peft_layer
from peftkern.integrations.peft import memo
from peftkern.nn import LoRALinear
from peftkern.nn.tensor_parallel import ColwiseLoRALinear, RowwiseLoRALinear
from peftkern.ops import schema
from peftkern.weights import DenseWeight, Int8Weight

WHOLE = Replicate()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.WORLD,))


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


# ---------------------------------------------------------------------------------------------------- the operators


def call(t, place, p: float = 0.0, scaling: float | Tensor = 1.5) -> list[Tensor]:
    """y and the gradients of x, A, B and the biases; ``place(name, tensor)`` shards the operands."""
    leaves = [place(n, getattr(t, n)).detach().requires_grad_() for n in ("x", "lora_A", "lora_B", "bias", "lora_bias")]
    x, A, B, bias, lora_bias = leaves
    weight = place("weight", t.weight)
    rng_state = t.rng_state if p else None
    y = peftkern.lora_linear(
        x, weight, A, B, scaling, bias=bias, lora_bias=lora_bias, dropout_p=p, rng_state=rng_state, backend="reference"
    )
    y.backward(place("dy", t.dy))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


COLUMN = {"weight": Shard(0), "lora_B": Shard(0), "bias": Shard(0), "lora_bias": Shard(0)}
ROW = {"weight": Shard(1), "lora_A": Shard(1), "x": Shard(1)}
BATCH = {"x": Shard(0), "dy": Shard(0)}
PARAMETERS = ("lora_A", "lora_B", "bias", "lora_bias")


def check_sharded(layout: dict[str, Placement], y: Placement, dx: Placement, p: float = 0.0, M: int = 6, N: int = 24):
    """The whole of every result is the unsharded call's, on every rank; parameters' gradients lie as they do."""
    t = make(Call(M, 16, N, 3, p=p, bias=True, lora_bias=True))
    expected = call(t, lambda name, tensor: tensor, p)
    found = call(t, lambda name, tensor: distribute_tensor(tensor, mesh(), [layout.get(name, WHOLE)]), p)
    assert [v.placements[0] for v in found] == [y, dx, *(layout.get(name, WHOLE) for name in PARAMETERS)]
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(whole(value), other)


def check_column() -> None:
    check_sharded(COLUMN, Shard(1), Partial())
    check_sharded(COLUMN, Shard(1), Partial(), p=0.4)


def check_column_that_does_not_divide() -> None:
    check_sharded(COLUMN, Shard(1), Partial(), N=23)


def check_row() -> None:
    check_sharded(ROW, Partial(), Shard(1))


def check_rows_of_x() -> None:
    check_sharded(BATCH, Shard(0), Shard(0))
    check_sharded(BATCH, WHOLE, WHOLE, p=0.4)  # the mask counts the rows of the whole x


def check_operands_come_to_the_weight() -> None:
    """A, B, x and dy in placements that the weight's layout does not want."""
    check_sharded(ROW | {"x": WHOLE, "lora_A": WHOLE, "lora_B": Shard(1), "dy": Shard(1)}, Partial(), Shard(1))
    check_sharded(COLUMN | {"x": Shard(1), "lora_B": WHOLE, "dy": Shard(0)}, Shard(1), Partial())


def check_row_with_dropout() -> None:
    """Forward and backward of a rank share one mask, another one on each rank, the same again for the same state."""
    eye = torch.eye(64)

    def once() -> tuple[Tensor, Tensor]:
        x, W, A = (distribute_tensor(v, mesh(), [Shard(1)]) for v in (torch.ones(8, 64), torch.zeros(64, 64), eye))
        B = distribute_tensor(eye, mesh(), [WHOLE])
        x.requires_grad_()
        y = peftkern.lora_linear(x, W, A, B, dropout_p=0.5, rng_state=torch.tensor([3, dist.get_rank()]))
        y.backward(DTensor.from_local(torch.ones(8, 64), mesh(), [WHOLE]))
        return whole(y.detach()), whole(x.grad)

    (y, dx), (again, _) = once(), once()
    assert torch.equal(y, dx) and torch.equal(y, again) and set(y.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(y[:, :32], y[:, 32:])


def check_int8_by_column_and_a_tensor_scaling() -> None:
    t = make(Call(6, 16, 24, 3, bias=True, lora_bias=True))
    t.weight = Int8Weight.pack(t.weight)
    scaling = torch.tensor(0.5)

    def place(name: str, value):
        if isinstance(value, Int8Weight):
            return Int8Weight(*(distribute_tensor(v, mesh(), [Shard(0)]) for v in (value.data, value.scale)))
        return distribute_tensor(value, mesh(), [COLUMN.get(name, WHOLE)])

    expected, found = call(t, lambda name, value: value, scaling=scaling), call(t, place, scaling=scaling)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(whole(value), other)


def check_what_cannot_be_is_an_error() -> None:
    t = make(Call(6, 16, 24, 3))
    W = distribute_tensor(t.weight, mesh(), [Shard(0)])
    x = distribute_tensor(t.x, mesh(), [WHOLE])
    with pytest.raises(TypeError, match="lora_B must be a DTensor"):
        peftkern.lora_linear(x, W, t.lora_A, t.lora_B)
    with pytest.raises(NotImplementedError, match="frozen weight is Shard"):
        peftkern.lora_linear(x, DTensor.from_local(t.weight, mesh(), [Partial()]), t.lora_A, t.lora_B)
    A, B = (distribute_tensor(value, mesh(), [WHOLE]) for value in (t.lora_A, t.lora_B))
    operands = Pair(DenseWeight(W), A, B, None, None, 1.0, None, 0.0, None, "base")
    twice = call_of([operands, operands])
    with pytest.raises(NotImplementedError, match="one base and one update of all rows, got 1 and 2"):
        run(x, twice)
    with pytest.raises(NotImplementedError, match="row_norm.default has no rule for DTensors"):
        run_dora(x, call_of([operands]), torch.ones(24))
    dy, no = distribute_tensor(t.dy, mesh(), [WHOLE]), [False] * 2
    with pytest.raises(NotImplementedError, match="one base and one update of all rows, got 1 and 2"):
        schema.backward([dy], x, [None, None], *arguments(twice), True, [False], no, no, no)


# -------------------------------------------------------------------------------------------------- tensor parallel


def mlp(p: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    up = LoRALinear(16, 24, 4, 8, lora_bias=True, lora_dropout=p)
    model = nn.Sequential(up, nn.GELU(), LoRALinear(24, 16, 4, 8, lora_bias=True))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def check_column_then_row_trains_like_one_process() -> None:
    one = mlp(p=0.3)
    two = parallelize_module(copy.deepcopy(one), mesh(), {"0": ColwiseLoRALinear(), "2": RowwiseLoRALinear()})
    assert two[0].weight.to_local().shape == (12, 16) and two[2].lora_A.to_local().shape == (4, 12)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (one, two)]
    for seed in range(3):
        losses = []
        for model, optimizer in zip((one, two), optimizers, strict=True):
            torch.manual_seed(seed)
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0])
    for (name, value), other in zip(two.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(value), other, msg=lambda m, n=name: f"{n}: {m}")


def check_tensor_parallel_layers_compile_in_one_graph() -> None:
    """Column, then row, with dropout: the mask of the first rank's state, as without the compiler."""
    torch._dynamo.reset()
    two = parallelize_module(mlp(p=0.3), mesh(), {"0": ColwiseLoRALinear(), "2": RowwiseLoRALinear()})
    x, results = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)), []
    for model in (two, torch.compile(two, fullgraph=True, backend="aot_eager")):
        two.zero_grad()
        torch.manual_seed(dist.get_rank())
        loss = model(x).square().mean()
        loss.backward()
        results.append([loss.detach(), *(whole(p.grad) for p in two.parameters() if p.grad is not None)])
    assert len(results[0]) == 7
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(whole(found), whole(expected))


def check_the_styles_are_for_lora_linear_only() -> None:
    with pytest.raises(TypeError, match="ColwiseLoRALinear is for LoRALinear, not Linear"):
        parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh(), {"0": ColwiseLoRALinear()})


def check_a_patched_peft_layer_under_tensor_parallelism_is_pefts() -> None:
    model = adapted()
    layer = linears(model)["base_model.model.model.layers.0.mlp.up_proj"]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    expected = layer(x).detach().chunk(2, dim=-1)[dist.get_rank()]
    peftkern.patch(model)
    parallelize_module(layer, mesh(), {"base_layer": ColwiseParallel(), "lora_B.default": ColwiseParallel()})
    assert peftkern.patch(nn.ModuleList([layer])).skipped
    torch.testing.assert_close(layer(x).detach(), expected)


# --------------------------------------------------------------------------------------------------- data parallel

TOKENS = [torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(rank)) for rank in range(2)]


def mean_step() -> dict[str, Tensor]:
    """The mean of both ranks' losses, and its gradients, in one process without peftkern."""
    model = adapted().train()
    loss = sum(model(input_ids=tokens, labels=tokens).loss for tokens in TOKENS) / 2
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def my_step(model: nn.Module, backward=lambda loss: loss.backward()) -> dict[str, Tensor]:
    """The same from this rank's tokens, as the wrapped model reduces it."""
    tokens = TOKENS[dist.get_rank()]
    loss = model(input_ids=tokens, labels=tokens).loss
    backward(loss)
    total = loss.detach().clone()
    dist.all_reduce(total)
    found = {n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": total / 2} | found


class counted(contextlib.ExitStack):
    """How many calls took the fast path."""

    count = 0

    def __enter__(self) -> counted:
        for owner, name in ((peft_layer, "fused"), (memo.Memo, "run")):
            self.enter_context(mock.patch.object(owner, name, self.spy(getattr(owner, name))))
        return self

    def spy(self, genuine):
        def run(*arguments):
            self.count += 1
            return genuine(*arguments)

        return run


def check_ddp_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = adapted().train()
    peftkern.patch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    with counted() as calls:
        assert_close(my_step(model, accelerator.backward), mean_step())
    assert calls.count == 14
    optimizer.step()


def check_ddp_with_gradient_checkpointing_and_accumulation() -> None:
    model = adapted().train()
    peftkern.patch(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    wrapped = nn.parallel.DistributedDataParallel(model)
    with counted() as calls:
        with wrapped.no_sync():
            my_step(wrapped)
        found = my_step(wrapped)
    assert calls.count == 4 * 14  # two micro-batches, each forward and again in backward
    expected = mean_step()
    assert_close(found, {name: value if name == "loss" else 2 * value for name, value in expected.items()})


def sharded(model: nn.Module, **options) -> nn.Module:
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def check_fsdp2_by_blocks() -> None:
    expected = mean_step()
    for order in ("before", "after"):
        model = adapted().train()
        if order == "before":
            peftkern.patch(model)
        sharded(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        if order == "after":
            peftkern.patch(model)
        with counted() as calls:
            assert_close(my_step(model), expected)
        assert calls.count == 14, (order, calls.count)
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()


def check_fsdp2_with_checkpointing_and_dropout() -> None:
    model = adapted(lora_dropout=0.4).train()
    peftkern.patch(model)
    expected = step(copy.deepcopy(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    with counted() as calls:
        found = step(sharded(model))
    assert_close({name: whole(value) for name, value in found.items()}, expected)
    assert calls.count == 28


def check_fsdp2_mixed_precision() -> None:
    model = adapted().train()
    peftkern.patch(model)
    with counted() as calls:
        found = step(sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
    assert calls.count == 14
    plain = step(sharded(adapted().train(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
    torch.testing.assert_close(found["loss"], plain["loss"], rtol=1e-2, atol=1e-2)


def fsdp1(unit: str, patched: bool) -> tuple[int, dict[str, Tensor]]:
    """How many layers were fast, and a step with this rank's shards of the gradients."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = adapted().train()
    if patched:
        peftkern.patch(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    policy = fsdp_auto_wrap_policy(model) if unit == "leaves" else ModuleWrapPolicy({LlamaDecoderLayer})
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=None if unit == "root" else policy,
        ignored_states=frozen if unit == "blocks, frozen apart" else None,
    )  # fmt: skip
    with counted() as calls:
        found = my_step(wrapped)
    return calls.count, found


@pytest.mark.filterwarnings("ignore:.*requires_grad")
def check_fsdp1_with_original_parameters() -> None:
    """A unit's frozen weights are views of what trains: PEFT's forward, unless they are left out of the units."""
    expected = mean_step()["loss"]
    for unit in ("root", "blocks", "leaves", "blocks, frozen apart"):
        (_, plain), (fast, found) = fsdp1(unit, False), fsdp1(unit, True)
        torch.testing.assert_close(found["loss"], expected)
        assert sum(value.numel() for value in found.values()) > 100, unit
        if unit in ("leaves", "blocks, frozen apart"):
            assert fast == 14
            assert_close(*({name: value for name, value in one.items() if value.numel()} for one in (found, plain)))
        else:
            assert not fast, unit
            assert_equal(found, plain)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_") and name != "check_sharded"}


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    return distributed.run_in_two(__file__)


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, outcome: dict[str, str]) -> None:
    distributed.judge(name, outcome)


if __name__ == "__main__":
    distributed.main(CHECKS)
