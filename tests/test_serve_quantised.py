"""Many adapters over one base in bitsandbytes' 4 or 8 bits: served and trained as over the dequantised base."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ALL_LINEAR, llama
from quantised_models import quantised_linear
from torch import Tensor, nn

import peftkern
from peftkern.adapters import LoRAConfig
from peftkern.bank import AdapterBank, MultiLoRALinear
from peftkern.integrations.bitsandbytes import from_bitsandbytes
from peftkern.testing.numerics import assert_as_good_as

pytest.importorskip("bitsandbytes")
KINDS = [("nf4", torch.float32), ("nf4", torch.bfloat16), ("fp4", torch.float32), ("int8", None)]
IDS = torch.randint(0, 64, (4, 7), generator=torch.Generator().manual_seed(3))
MIXED = ["a", None, "b", "a"]


def packed(kind: str, compute: torch.dtype | None) -> nn.Module:
    """A model of which every linear layer but the head is quantised."""
    model = llama()
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                setattr(parent, name, quantised_linear(linear, kind, compute))
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """Its twin with the very weights that it holds, in fp64."""
    twin = llama()
    theirs = dict(model.named_modules())
    for name, module in twin.named_modules():
        if type(module) is nn.Linear and type(theirs[name]) is not nn.Linear:
            module.weight.data = from_bitsandbytes(theirs[name]).materialize(torch.float32)
    return twin.double()


def adapters(bank: AdapterBank) -> AdapterBank:
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        bank.add(name, LoRAConfig(3 + seed, 6, ALL_LINEAR), is_trainable=True)
        with torch.no_grad():
            for factors in bank[name].factors.values():
                factors.lora_B.normal_(std=0.2)
    return bank


def like(bank: AdapterBank, twin: nn.Module) -> AdapterBank:
    """The same adapters over the twin, in fp64."""
    own = peftkern.serve(twin, target_modules=ALL_LINEAR)
    for name in bank.names:
        own.add(name, bank[name].config, is_trainable=True)
        for layer, factors in own[name].factors.items():
            for mine, theirs in zip(factors[:2], bank[name].factors[layer][:2], strict=True):
                mine.data = theirs.detach().double()
    return own


def step(model: nn.Module, bank: AdapterBank) -> dict[str, Tensor]:
    with bank.route(MIXED):
        found = model(input_ids=IDS, labels=IDS)
    found.loss.backward()
    gradients = {f"{name} {key}": p.grad for name in bank.names for key, p in bank[name].named_parameters()}
    return {"logits": found.logits.detach()} | gradients


@pytest.mark.parametrize(("kind", "compute"), KINDS, ids=str)
def test_logits_and_gradients_are_those_of_the_dequantised_base(kind, compute):
    model = packed(kind, compute)
    twin = dequantised(model)
    bank = adapters(peftkern.serve(model, target_modules=ALL_LINEAR))
    assert len(bank.layers) == 14 and all(
        module.weight is None for module in model.modules() if isinstance(module, MultiLoRALinear)
    )
    truth, found = step(twin, like(bank, twin)), step(model, bank)
    dense = copy.deepcopy(twin).float()  # the same adapters on the dense weights, in the compute dtype's roundings
    with torch.autocast("cpu", compute or torch.bfloat16, enabled=compute == torch.bfloat16):
        dense_bank = next(m.bank for m in dense.modules() if isinstance(m, MultiLoRALinear))
        for name in dense_bank.names:
            for factors in dense_bank[name].factors.values():
                for factor in factors[:2]:
                    factor.data, factor.grad = factor.data.float(), None
        peer = step(dense, dense_bank)
    assert found.keys() == truth.keys()
    for names in (["logits"], [name for name in truth if name != "logits"]):
        pools = [[(of[n].double() / truth[n].norm()).flatten() for n in names] for of in (found, peer, truth)]
        assert_as_good_as(*map(torch.cat, pools), names[0])


def test_a_row_of_the_base_is_the_base_and_unserve_gives_the_layers_back():
    model = packed("nf4", torch.float32)
    layers = {name: module for name, module in model.named_modules() if "Linear4bit" in type(module).__name__}
    bank = adapters(peftkern.serve(model.eval(), target_modules=ALL_LINEAR))
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        mixed = model(input_ids=IDS, adapters=MIXED).logits
        assert torch.equal(mixed[1], base[1]) and not torch.allclose(mixed[0], base[0])
    peftkern.unserve(bank)
    assert {name: module for name, module in model.named_modules() if name in layers} == layers


def test_an_adapter_is_saved_and_loaded_over_it(tmp_path):
    model = packed("nf4", torch.float32).eval()
    bank = adapters(peftkern.serve(model, target_modules=ALL_LINEAR))
    with torch.no_grad():
        expected = model(input_ids=IDS, adapters=["b"] * 4).logits
        bank.save("b", tmp_path / "b", task_type="CAUSAL_LM")
        other = packed("nf4", torch.float32).eval()
        peftkern.serve(other, {"again": tmp_path / "b"})
        assert torch.equal(other(input_ids=IDS, adapters=["again"] * 4).logits, expected)


def test_what_is_not_quantised_yet_is_named():
    import bitsandbytes as bnb

    layer = MultiLoRALinear(bnb.nn.Linear4bit(16, 8, compute_dtype=torch.float32), AdapterBank(), "some.layer")
    with pytest.raises(RuntimeError, match=r"some\.layer: .*not quantised yet"):
        layer(torch.ones(2, 16))
