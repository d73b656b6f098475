"""Packed copies of frozen weights: the same bits as without, never stale, gone with the weight."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import peftkern
from peftkern import _env
from peftkern.backends.cpp import call, prepack
from peftkern.backends.cpp.extension import extension

M, K, N, R = 20, 96, 40, 4


@pytest.fixture(autouse=True)
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PEFTKERN_PREPACK=both, on kernels that multiply by the frozen weight themselves."""
    if extension()[0] is None:
        pytest.skip("pure Python install")
    monkeypatch.setattr(call, "one_pass", lambda *_: True)
    policy(monkeypatch, "both")
    prepack.drop()
    yield
    prepack.drop()
    _env.settings.cache_clear()


def policy(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PEFTKERN_PREPACK", value)
    _env.settings.cache_clear()


def step(weight: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """y, dx, dA and dB of one call."""
    generator = torch.Generator().manual_seed(seed)
    x, A, B, dy = (torch.randn(shape, generator=generator) for shape in ((M, K), (R, K), (N, R), (M, N)))
    x, dy = x.to(weight.dtype).requires_grad_(), dy.to(weight.dtype)
    A.requires_grad_(), B.requires_grad_()
    state = torch.tensor([3, 4])
    y = peftkern.lora_linear(x, weight, A, B, dropout_p=0.2, rng_state=state, backend="cpp")
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy)]


def assert_follows(weight: torch.Tensor) -> None:
    """The packed product has the bits of the one that reads the weight where it lies."""
    found, expected = step(weight), step(weight.clone())
    for packed, plain in zip(found, expected, strict=True):
        assert torch.equal(packed, plain)


def packed(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight that has its copies."""
    weight = torch.randn(N, K).to(dtype)
    step(weight), step(weight)
    assert prepack.held_bytes() > 0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_as_without(dtype):
    assert_follows(packed(dtype))


def test_every_instruction_set_has_its_own_panels():
    C = extension()[0]
    before, weight = C.instruction_set(), packed()
    try:
        for name in C.instruction_sets():
            C.use(name)
            assert_follows(weight)
    finally:
        C.use(before)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_any_strides(layout):
    whole = torch.randn(K, N).T if layout == "transposed" else torch.randn(N, 2 * K)[:, ::2][:, :K]
    step(whole), step(whole)
    assert_follows(whole)


def test_policies(monkeypatch):
    """off packs nothing, forward for y alone, both twice as much; what is held is said."""
    held = {}
    for value in ("off", "forward", "both"):
        policy(monkeypatch, value)
        prepack.drop()
        weight = torch.randn(N, K)
        step(weight), step(weight)
        held[value] = peftkern.env_report()["held_bytes"]
        shown = str(peftkern.explain(torch.randn(M, K), weight, torch.randn(R, K), torch.randn(N, R), backend="cpp"))
        assert (f"packed copies: {value}, {held[value]:,} bytes" in shown) == (value != "off")
    C = extension()[0]
    padded = -(-N // C.panel_columns()) * C.panel_columns() * K * 4
    assert held["off"] == 0 and held["forward"] == padded and held["both"] > held["forward"]
    policy(monkeypatch, "sometimes")
    with pytest.raises(ValueError, match="PEFTKERN_PREPACK='sometimes' is not one of off, forward, both"):
        _env.settings()


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing is an error."""
    monkeypatch.setattr(prepack, "_pack", lambda *_: pytest.fail("packed"))


def test_a_weight_seen_once_is_not_packed(never):
    step(torch.randn(N, K))


def test_temporaries_of_autocast_are_not_packed(never):
    weight, x, A, B = torch.randn(N, K), torch.randn(M, K), torch.randn(R, K), torch.randn(N, R)
    A.requires_grad_()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            y = peftkern.lora_linear(x, weight, A, B, backend="cpp")
        y.float().sum().backward()


def test_a_handful_of_rows_packs_nothing(never):
    weight = torch.randn(N, K)
    for _ in range(3):
        peftkern.lora_linear(torch.randn(16, K), weight, torch.randn(R, K), torch.randn(N, R), backend="cpp")


CHANGES = {
    "in_place": lambda w: w.mul_(1.5),
    "data_in_place": lambda w: setattr(w, "data", w.data.add_(1e-3 * torch.randn(N, K))),  # as PEFT merges
    "through_data": lambda w: w.data.add_(torch.randn(N, 1) @ torch.randn(1, K)),  # no version, no address changes
    "data_assigned": lambda w: setattr(w, "data", torch.randn(N, K)),
    "data_of_another_shape": lambda w: setattr(w, "data", torch.randn(K, N).T),
    "copied": lambda w: w.copy_(torch.randn(N, K)),
    "to_bf16": lambda w: setattr(w, "data", w.data.bfloat16()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change):
    weight = packed()
    CHANGES[change](weight)
    assert_follows(weight)


def test_load_state_dict_and_moves_of_a_layer():
    layer = nn.Linear(K, N, bias=False).requires_grad_(False)
    step(layer.weight), step(layer.weight)
    layer.load_state_dict({"weight": torch.randn(N, K)})
    assert_follows(layer.weight)
    layer.to(torch.bfloat16)
    assert_follows(layer.weight)
    layer.to("meta")
    assert layer.weight.is_meta


def test_merge_and_unmerge():
    """PEFT's own merge moves the weight under an unchanged address and version."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=R, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N, bias=False)), config)
    peftkern.patch(model)
    weight, x = model.base_model.model[0].base_layer.weight, torch.randn(M, K)
    for _ in range(2):
        model(x).sum().backward()
    assert prepack.held_bytes() > 0
    model.merge_adapter()
    assert_follows(weight)
    model.unmerge_adapter()
    assert_follows(weight)


def test_backward_refuses_a_weight_that_changed_in_between():
    weight = packed()
    x, A, B = torch.randn(M, K, requires_grad=True), torch.randn(R, K, requires_grad=True), torch.randn(N, R)
    y = peftkern.lora_linear(x, weight, A, B, backend="cpp")
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_and_pickles_have_their_own():
    weight = packed()
    held = prepack.held_bytes()
    twin, loaded = copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))
    assert prepack.held_bytes() == held
    twin.mul_(3)
    for other in (twin, loaded, weight):
        step(other), step(other)
        assert_follows(other)


def test_the_bytes_go_with_the_weight():
    weight = packed()
    assert prepack.held_bytes() > 0
    del weight
    gc.collect()
    assert prepack.held_bytes() == 0


def test_a_weight_that_changes_while_threads_call():
    """Every product is that of one of the weights that were there, and afterwards of the last."""
    weight, values = packed(), [torch.randn(N, K) for _ in range(2)]
    allowed = [step(value) for value in values]
    weight.data = values[0]
    wrong, stop = [], threading.Event()

    def work() -> None:
        while not stop.is_set():
            for number, result in enumerate(step(weight)):
                if not any(torch.equal(result, results[number]) for results in allowed):
                    wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(200):
        weight.data = values[turn % 2]
        time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_follows(weight)
