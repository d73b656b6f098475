"""The bank: adapters by name, live, from and to PEFT's files, and what a batch sees while the table changes."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch
from conftest import llama
from torch import nn

from peftkern.adapters import LoRAConfig, LoRATensors, read_adapter, write_adapter
from peftkern.bank import AdapterBank, MultiLoRALinear
from peftkern.bank import bank as banks

K, N = 24, 16


def bank_of(*names: str, dtype: torch.dtype = torch.float32, ranks: tuple[int, ...] = (2, 5, 1)) -> AdapterBank:
    """A bank over one layer "block.proj", with adapters that are not zero."""
    torch.manual_seed(0)
    bank = AdapterBank()
    bank.layer = MultiLoRALinear(nn.Linear(K, N, dtype=dtype), bank, "block.proj")
    for name, r in zip(names, ranks, strict=False):
        bank.add(name, LoRAConfig(r, 2 * r), tensors(r), seed=r)
    return bank


def tensors(
    r: int, seed: int = 0, layer: str = "block.proj", dtype: torch.dtype = torch.float32
) -> dict[str, LoRATensors]:
    g = torch.Generator().manual_seed(seed + r)
    return {layer: LoRATensors(torch.randn(r, K, generator=g).to(dtype), torch.randn(N, r, generator=g).to(dtype))}


X = torch.randn(3, K, generator=torch.Generator().manual_seed(9))


def expected(bank: AdapterBank, name: str | None, x: torch.Tensor = X) -> torch.Tensor:
    layer = bank.layer
    y = x @ layer.weight.T + layer.bias
    if name is not None:
        f = bank[name].factors["block.proj"]
        y = y + f.scaling * (x @ f.lora_A.T @ f.lora_B.T)
    return y


def test_each_row_takes_its_adapter() -> None:
    bank = bank_of("a", "b", "c")
    with bank.route(["c", None, "a"]):
        y = bank.layer(X)
    for row, name in enumerate(("c", None, "a")):
        torch.testing.assert_close(y[row], expected(bank, name, X[row]))
    assert bank["b"].factors["block.proj"].scaling == 2.0 and bank["b"].factors["block.proj"].lora_A.shape == (5, K)


def test_an_adapter_that_came_in_inference_mode_trains() -> None:
    bank = bank_of("a")
    with torch.inference_mode():
        bank.add("b", LoRAConfig(2, 4, ["proj"]), is_trainable=True)
        bank.replace("a", LoRAConfig(2, 4), tensors(2), is_trainable=True)
        route = bank.route(["a", "b", None])
        with route:
            bank.layer(X)
    with route:
        bank.layer(X).square().sum().backward()
    assert all(f.grad is not None for name in bank.names for f in bank.parameters(name))


def test_ids_are_never_given_out_again() -> None:
    bank = bank_of("a", "b")
    assert (bank.id_of("a"), bank.id_of("b"), len(bank), bank.names) == (0, 1, 2, ("a", "b"))
    bank.remove("b")
    assert bank.add("c", LoRAConfig(2, 2), tensors(2)) == 2 and "b" not in bank
    with pytest.raises(ValueError, match=r"no adapter with id 1; the bank has ids \[0, 2\]"):
        bank.route([1])
    bank.replace("a", LoRAConfig(3, 3), tensors(3))
    assert bank.id_of("a") == 0 and bank["a"].factors["block.proj"].lora_A.shape == (3, K)


def test_hundreds_of_adapters_of_their_own_ranks_take_their_own_memory() -> None:
    bank = bank_of()
    ranks = [1 + i % 7 for i in range(300)]
    for i, r in enumerate(ranks):
        bank.add(f"adapter {i}", LoRAConfig(r, r), tensors(r, i))
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for n in bank.names for p in bank.parameters(n)
    }
    assert sum(storages.values()) == 4 * sum(ranks) * (K + N)
    names = [f"adapter {i}" for i in (299, 0, 150)]
    with bank.route(names):
        y = bank.layer(X)
    for row, name in enumerate(names):
        torch.testing.assert_close(y[row], expected(bank, name, X[row]))


def test_a_route_keeps_what_is_removed_or_replaced_and_the_next_one_does_not() -> None:
    bank = bank_of("a", "b", "c")
    before = {name: expected(bank, name) for name in "abc"}
    with bank.route(["a", "b", "c"]):
        bank.remove("a")
        bank.replace("b", LoRAConfig(4, 4), tensors(4, 77))
        y = bank.layer(X)
        for row, name in enumerate("abc"):
            torch.testing.assert_close(y[row], before[name][row])
    with pytest.raises(ValueError, match=r"no adapter 'a'; the bank holds 'b', 'c'"):
        bank.route(["a"])
    with bank.route(["b"] * 3):
        torch.testing.assert_close(bank.layer(X), expected(bank, "b"))
    assert not torch.allclose(expected(bank, "b"), before["b"])


def test_an_adapter_that_no_route_holds_is_freed() -> None:
    import weakref

    bank = bank_of("a")
    parameter = weakref.ref(bank.parameters("a")[0])
    with bank.route(["a"] * 3):
        bank.remove("a")
        assert parameter() is not None
        bank.layer(X)
    assert parameter() is None


def test_in_place_changes_are_seen_by_the_next_call() -> None:
    bank = bank_of("a")
    with bank.route(["a"] * 3):
        first = bank.layer(X)
        with torch.no_grad():
            bank.parameters("a")[1].mul_(2)
        torch.testing.assert_close(bank.layer(X), expected(bank, "a"))
        assert not torch.allclose(bank.layer(X), first)


def test_another_thread_may_swap_adapters_during_a_forward() -> None:
    """Every row is that of one whole adapter, old or new; none is torn, nothing fails."""
    bank = bank_of("a", ranks=(3,))
    versions = [tensors(3, seed) for seed in range(2)]
    outcomes = []
    for version in versions:
        bank.replace("a", LoRAConfig(3, 6), version)
        outcomes.append(expected(bank, "a"))
    stop, errors = threading.Event(), []

    def swap() -> None:
        i = 0
        while not stop.is_set():
            try:
                bank.replace("a", LoRAConfig(3, 6), versions[i % 2])
                bank.add("passing", LoRAConfig(3, 6), versions[0])
                bank.remove("passing")
            except Exception as error:  # noqa: BLE001 - reported below
                errors.append(error)
            i += 1

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    try:
        for _ in range(150):
            with bank.route(["a"] * 3):
                y, again = bank.layer(X), bank.layer(X)
            assert torch.equal(y, again)
            seen.add(next(i for i, outcome in enumerate(outcomes) if torch.allclose(y, outcome, atol=1e-4)))
    finally:
        stop.set()
        thread.join()
    assert not errors and seen == {0, 1}


def test_files_go_both_ways_and_load_into_peft(tmp_path) -> None:
    from peft import PeftModel

    import peftkern

    model = llama()
    plain = copy.deepcopy(model)
    bank = peftkern.serve(model, target_modules=["q_proj", "down_proj"])
    config = LoRAConfig(
        3, 6, ["q_proj", "down_proj"], lora_dropout=0.25, use_rslora=True, rank_pattern={"down_proj": 5}
    )
    bank.add("mine", config)
    with torch.no_grad():
        for parameter in bank.parameters("mine"):
            parameter.normal_(std=0.2)
    bank.save("mine", tmp_path / "mine", task_type="CAUSAL_LM")
    assert json.loads((tmp_path / "mine/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    ids = torch.arange(12).view(2, 6)
    with bank.route(["mine"] * 2):
        own = model.eval()(input_ids=ids).logits
    theirs = PeftModel.from_pretrained(plain, tmp_path / "mine").eval()(input_ids=ids).logits
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)
    assert bank.load("again", tmp_path / "mine") == 1
    for (key, a), (other, b) in zip(bank["mine"].named_parameters(), bank["again"].named_parameters(), strict=True):
        assert key == other and torch.equal(a, b) and not b.requires_grad
    before = bank["again"]
    assert bank.load("again", tmp_path / "mine") == 1 and bank["again"] is not before


@pytest.mark.parametrize(
    ("config", "given", "error", "message"),
    [
        (LoRAConfig(2, 2), tensors(3), ValueError, r"lora_A.weight has shape \(3, 24\); expected is \(2, 24\)"),
        (
            LoRAConfig(2, 2),
            tensors(2, layer="block.other"),
            ValueError,
            "block.other.lora_A.weight: the bank has no layer",
        ),
        (LoRAConfig(2, 2), {}, ValueError, "at least one layer"),
        (LoRAConfig(2, 2, ["other"]), None, ValueError, "names none of the bank's layers 'block.proj'"),
        (LoRAConfig(2, 2, lora_bias=True), tensors(2), NotImplementedError, "lora_bias=True"),
        (LoRAConfig(2, 2, bias="lora_only"), tensors(2), NotImplementedError, "bias='lora_only'"),
        (LoRAConfig(2, 2, init_lora_weights="pissa"), tensors(2), NotImplementedError, "init_lora_weights='pissa'"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(config, given, error, message) -> None:
    bank = bank_of("a")
    before = bank["a"]
    for put, name in ((bank.add, "new"), (bank.replace, "a")):
        with pytest.raises(error, match=message):
            put(name, config, given)
    assert bank.names == ("a",) and bank["a"] is before and bank.add("next", LoRAConfig(2, 2), tensors(2)) == 1


def test_values_that_the_layer_cannot_hold_are_refused() -> None:
    bank = bank_of(dtype=torch.float16)
    given = tensors(2, dtype=torch.float64)["block.proj"]
    given.lora_A[0, 0] = 1e300
    with pytest.raises(ValueError, match="a value that torch.float32 cannot hold"):
        bank.add("a", LoRAConfig(2, 2), {"block.proj": given})
    given.lora_A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="lora_A.weight .* holds a NaN"):
        bank.add("a", LoRAConfig(2, 2), {"block.proj": given})
    bank.add("narrow", LoRAConfig(2, 2), tensors(2, dtype=torch.float16))
    bank.add("wide", LoRAConfig(2, 2), tensors(2))
    assert [bank.parameters(name)[0].dtype for name in bank.names] == [torch.float16, torch.float32]


def test_names_are_checked() -> None:
    bank = bank_of("a")
    with pytest.raises(ValueError, match="an adapter 'a' already"):
        bank.add("a", LoRAConfig(2, 2), tensors(2))
    with pytest.raises(ValueError, match="no adapter 'b' to replace; the bank holds 'a'"):
        bank.replace("b", LoRAConfig(2, 2), tensors(2))
    for call in (bank.remove, bank.parameters, bank.id_of, lambda name: bank.save(name, "nowhere")):
        with pytest.raises(ValueError, match="no adapter 'b'"):
            call("b")
    with pytest.raises(TypeError, match="name is a string, not 3"):
        bank.add(3, LoRAConfig(2, 2), tensors(2))
    with pytest.raises(ValueError, match="layer 'block.proj' already"):
        MultiLoRALinear(nn.Linear(K, N), bank, "block.proj")


@pytest.mark.parametrize("kind", ["pickle", "no B", "NaN", "wrong base", "unknown layer", "cut off"])
def test_a_hostile_file_is_never_half_loaded(tmp_path, kind: str) -> None:
    bank = bank_of("a")
    before, table = bank["a"], bank.names
    write_adapter(tmp_path, LoRAConfig(2, 2, ["proj"]), tensors(2))
    weights = tmp_path / "adapter_model.safetensors"
    if kind == "pickle":
        weights.unlink()
        (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    elif kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:-8])
    else:
        from safetensors.torch import load_file, save_file

        found = load_file(weights)
        a, b = sorted(found)
        if kind == "no B":
            del found[b]
        elif kind == "NaN":
            found[a][0, 0] = float("nan")
        elif kind == "wrong base":
            found[a] = torch.zeros(2, K + 1)
        else:
            found = {key.replace("proj", "gone"): value for key, value in found.items()}
        save_file(found, weights)
    for name in ("a", "new"):
        with pytest.raises((ValueError, FileNotFoundError)):
            bank.load(name, tmp_path)
    assert bank.names == table and bank["a"] is before


def test_a_copy_has_a_bank_of_its_own_and_a_cast_leaves_the_adapters() -> None:
    bank = bank_of("a")
    layer = copy.deepcopy(bank.layer)
    assert layer.bank is not bank and layer.bank.names == ("a",)
    with layer.bank.route(["a"] * 3):
        torch.testing.assert_close(layer(X), expected(bank, "a"))
    assert layer.bank in banks.live_banks
    bank.layer.to(torch.float64)
    assert bank.parameters("a")[0].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_move_takes_the_adapters_along() -> None:
    bank = bank_of("a")
    y = expected(bank, "a")
    bank.layer.cuda()
    with bank.route(["a"] * 3):
        torch.testing.assert_close(bank.layer(X.cuda()).cpu(), y)


def test_read_adapter_files_are_taken_too(tmp_path) -> None:
    bank = bank_of()
    write_adapter(tmp_path, LoRAConfig(2, 2, ["proj"]), tensors(2))
    assert bank.load("a", read_adapter(tmp_path)) == 0 and bank.layers == ("block.proj",)
