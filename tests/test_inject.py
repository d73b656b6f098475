"""inject and eject: which layers are adapted (PEFT's rules), what is frozen, what is refused, and the way back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ALL_LINEAR, ATTENTION, adapted, assert_close, linears, llama, logits, randomise, step
from torch import nn

import peftkern
from peftkern.nn import LoRALinear


def tiny() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6, bias=False))
    return nn.ModuleDict(
        {"embed": nn.Embedding(10, 6), "block": block, "norm": nn.LayerNorm(6), "head": nn.Linear(6, 4)}
    )


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    ).eval()


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def snapshot(model: nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    return {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)}


def assert_untouched(model: nn.Module, before: dict[str, tuple[torch.Tensor, bool]]) -> None:
    after = snapshot(model)
    assert list(after) == list(before)
    for name, (value, trained) in before.items():
        assert torch.equal(after[name][0], value) and after[name][1] == trained, name


# ------------------------------------------------------------------------------------------------- what is adapted


@pytest.mark.parametrize(
    "rule",
    [
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj", "v_proj"]),
        dict(target_modules=["model.layers.1.mlp.up_proj", "k_proj"]),
        dict(target_modules=r".*layers\.0\..*(q|down)_proj"),
        dict(target_modules="all-linear", exclude_modules=["o_proj", "model.layers.0.mlp.up_proj"]),
        dict(target_modules=ALL_LINEAR, exclude_modules=r".*\.mlp\..*"),
        dict(target_modules=["q_proj", "lm_head"]),
        dict(
            target_modules=ALL_LINEAR, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7, "^model.*down_proj": 3}
        ),
        dict(target_modules=ATTENTION, alpha_pattern={r"layers.0.*": 5, "k_proj": 3}, use_rslora=True),
    ],
    ids=str,
)
def test_layers_ranks_and_scalings_are_pefts(rule):
    theirs = linears(adapted(**rule))
    ours = llama()
    report = peftkern.inject(ours, r=4, lora_alpha=8, **rule)
    assert {f"base_model.model.{name}" for name in report.names} == set(theirs)
    for name, layer in adapters(ours).items():
        peer = theirs[f"base_model.model.{name}"]
        assert (layer.r, layer.scaling) == (peer.r["default"], peer.scaling["default"]), name
        assert layer.lora_A.dtype == peer.lora_A["default"].weight.dtype


def test_all_linear_adapts_conv1d_and_not_the_head():
    model = gpt2()
    expected = logits(model)
    report = peftkern.inject(model, r=2, lora_alpha=4)
    assert len(report.names) == 8 and not any("lm_head" in name for name in report.names)
    torch.testing.assert_close(logits(model), expected)


def test_the_report_counts_and_everything_else_is_frozen():
    model = tiny()
    report = peftkern.inject(model, r=2, lora_alpha=4, target_modules=["0", "2"])
    assert report.names == ("block.0", "block.2")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"block.{i}.lora_{side}" for i in (0, 2) for side in "AB"}
    assert report.trainable == sum(trained.values()) == 2 * (6 + 8) * 2
    assert report.total == sum(p.numel() for p in model.parameters())
    assert str(report).startswith("2 layers adapted; 56 of 260 parameters trained")


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_biases(bias, lora_bias):
    model = tiny()
    peftkern.inject(model, r=2, lora_alpha=4, target_modules=["0", "2"], bias=bias, lora_bias=lora_bias)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    expected = {"block.0.bias"} if bias == "lora_only" else set()
    assert trained == expected | ({"block.0.lora_bias", "block.2.lora_bias"} if lora_bias else set())


def test_a_training_step_is_pefts():
    theirs = adapted(lora_bias=False)
    ours = llama()
    peftkern.inject(ours, r=4, lora_alpha=8, target_modules=ALL_LINEAR)
    with torch.no_grad():
        for name, layer in adapters(ours).items():
            peer = theirs.get_submodule(f"base_model.model.{name}")
            layer.lora_A.copy_(peer.lora_A["default"].weight)
            layer.lora_B.copy_(peer.lora_B["default"].weight)
    expected = {
        n.replace("base_model.model.", "").replace(".default.weight", ""): value for n, value in step(theirs).items()
    }
    assert_close(step(ours), expected)


def test_the_mode_and_dtype_of_a_layer_are_kept():
    model = llama(torch.bfloat16).eval()
    peftkern.inject(model, r=4, lora_alpha=8)
    for layer in adapters(model).values():
        assert not layer.training and layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32


def test_a_fused_encoder_layer_sees_its_adapters_in_evaluation():
    """torch's inference path for nn.TransformerEncoderLayer reads linear1.weight and calls nothing."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, 2).eval()
    report = peftkern.inject(model, r=2, lora_alpha=4)
    assert {name.rpartition(".")[2] for name in report.names} == {"linear1", "linear2"}  # not the attention's out_proj
    randomise(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, model(x).detach())
    peftkern.eject(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)


# ------------------------------------------------------------------------------------------------------------- ties


def test_tied_weights_stay_tied():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    peftkern.inject(model, r=2, lora_alpha=4, target_modules=["c_attn", "lm_head"])
    assert model.lm_head.weight is model.transformer.wte.weight and isinstance(model.lm_head, LoRALinear)
    peftkern.eject(model, merge=False)
    assert model.lm_head.weight is model.transformer.wte.weight and type(model.lm_head) is nn.Linear


def test_a_shared_module_stays_one():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    report = peftkern.inject(model, r=2, lora_alpha=4, target_modules=["a"])
    assert report.names == ("a",) and model["a"] is model["b"] and isinstance(model["b"], LoRALinear)
    peftkern.eject(model)
    assert model["a"] is model["b"] and type(model["a"]) is nn.Linear


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_weight_refuses_a_tied_one(method):
    model = gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'lm_head', which is tied \(transformer.wte.weight, lm_head.weight\)"):
        peftkern.inject(model, r=2, lora_alpha=4, target_modules=["lm_head"], init_lora_weights=method)
    assert_untouched(model, before)


# ---------------------------------------------------------------------------------------------------------- refusals


def hooked(model):
    model["block"][0].register_forward_hook(lambda *_: None)


def with_forward(model):
    model["block"][0].forward = lambda x: x


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(target_modules=["0", "q_proj", "nope"]), ValueError, r"nothing is named \['q_proj', 'nope'\]"),
        (dict(target_modules=["q_proj"]), ValueError, "linear layers are named 0, 2, head"),
        (dict(target_modules=r"lock\.0"), ValueError, "nothing is named"),
        (dict(target_modules=["0"], exclude_modules=["2"]), ValueError, r"exclude_modules: nothing is named \['2'\]"),
        (dict(target_modules=["0"], exclude_modules=["block.0"]), ValueError, "no layer is left"),
        (dict(rank_pattern={"q_proj": 3}), ValueError, "rank_pattern: 'q_proj' matches no adapted layer"),
        (dict(alpha_pattern={"q_proj": 3}), ValueError, "alpha_pattern: 'q_proj' matches no adapted layer"),
        (dict(rank_pattern={"0": 0}), ValueError, r"rank_pattern\['0'\] is at least 1, got 0"),
        (dict(alpha_pattern={"(": 1}), ValueError, "is not a regular expression"),
        (dict(target_modules=["0", "embed"]), TypeError, "embed: a Embedding is no nn.Linear"),
        (dict(target_modules=["block"]), TypeError, "block: a Sequential is no nn.Linear"),
        (dict(r=0), ValueError, "r is at least 1, got 0"),
        (dict(r=2.0), TypeError, "r is an int"),
        (dict(lora_alpha=float("nan")), ValueError, "lora_alpha is finite"),
        (dict(lora_dropout=2), ValueError, "lora_dropout=2 is not a probability"),
        (dict(bias="all"), ValueError, "bias='all' is not 'none' or 'lora_only'"),
        (dict(target_modules=3), TypeError, "target_modules is a string or a list of strings, not 3"),
        (dict(init_lora_weights="magic"), ValueError, "'magic' is not one of True, 'gaussian', 'pissa'"),
        (dict(init_lora_weights="pissa", r=7), ValueError, r"needs r <= min\(8, 6\), got r=7"),
        (dict(init_lora_weights="pissa", alpha_pattern={"2": -4}), ValueError, "needs a positive scaling"),
    ],
    ids=str,
)  # fmt: skip
def test_a_refusal_names_what_is_wrong_and_touches_nothing(options, error, words):
    model = tiny()
    model["head"].requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=words):
        peftkern.inject(model, **(dict(r=2, lora_alpha=4) | options))
    assert_untouched(model, before)
    assert not adapters(model) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("damage", [hooked, with_forward])
def test_a_layer_that_is_more_than_a_linear_is_refused(damage):
    model = tiny()
    damage(model)
    with pytest.raises(TypeError, match="block.0: .*hooks or a forward of its own"):
        peftkern.inject(model, r=2, lora_alpha=4)


def test_a_subclass_with_another_forward_and_an_attentions_out_proj_are_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="0: Scaled has a forward of its own"):
        peftkern.inject(nn.Sequential(Scaled(4, 4)), r=2, lora_alpha=4)
    with pytest.raises(TypeError, match="reads its weight and does not call it"):
        peftkern.inject(nn.MultiheadAttention(8, 2), r=2, lora_alpha=4, target_modules=["out_proj"])


def test_a_second_call_is_refused():
    model = tiny()
    peftkern.inject(model, r=2, lora_alpha=4, target_modules=["0"])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="1 LoRALinear, the first at 'block.0': eject first"):
        peftkern.inject(model, r=2, lora_alpha=4, target_modules=["2"])
    assert_untouched(model, before)


def test_a_peft_model_is_refused():
    with pytest.raises(RuntimeError, match="adapters of PEFT: use peftkern.patch"):
        peftkern.inject(adapted(), r=2, lora_alpha=4)


# ----------------------------------------------------------------------------------------------------------- way back


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", [True, "pissa", "olora"])
def test_eject_merges_and_restores_classes_and_keys(make, method):
    model = make().eval()
    kinds = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    peftkern.inject(model, r=4, lora_alpha=8, init_lora_weights=method)
    randomise(model)
    expected = logits(model)
    names = peftkern.eject(model)
    assert len(names) == {llama: 14, gpt2: 8}[make]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_eject_without_merging_gives_back_every_bit(make):
    model = make().eval()
    before = snapshot(model)
    peftkern.inject(model, r=4, lora_alpha=8)
    randomise(model)
    peftkern.eject(model, merge=False)
    for name, value in model.named_parameters(remove_duplicate=False):
        assert torch.equal(value, before.pop(name)[0])
    assert not before
    with pytest.raises(ValueError, match="has no LoRALinear"):
        peftkern.eject(model)


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("method", [True, "pissa"])
def test_an_injected_model_is_copied_and_pickled(through, method):
    model = gpt2()
    peftkern.inject(model, r=4, lora_alpha=8, init_lora_weights=method)
    randomise(model)
    twin = through(model)
    assert torch.equal(logits(twin), logits(model))
    peftkern.eject(twin)
    assert adapters(model) and not adapters(twin)
    torch.testing.assert_close(logits(twin), logits(model), rtol=1e-4, atol=1e-5)


def test_injecting_an_empty_model_and_filling_it_later():
    with torch.device("meta"):
        model = tiny()
    peftkern.inject(model, r=2, lora_alpha=4)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    torch.manual_seed(3)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for layer in adapters(model).values():
        assert layer.weight.abs().max() <= layer.in_features**-0.5 and not layer.lora_B.any() and layer.lora_A.any()
        assert not layer.weight.requires_grad and layer.lora_B.requires_grad


def test_skip_init_makes_a_layer():
    layer = nn.utils.skip_init(LoRALinear, 6, 4, 2, 4)
    assert not layer.lora_A.is_meta and layer.weight.shape == (4, 6)


def test_importing_peftkern_imports_no_more():
    code = (
        "import sys, peftkern; assert 'peftkern.nn' not in sys.modules; peftkern.inject, peftkern.save_adapter;"
        "print(*sorted({'peft', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
