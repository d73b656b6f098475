"""save_adapter, load_adapter, read_adapter, write_adapter: PEFT's format both ways, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ATTENTION, ROOT, adapted, injected, llama, logits, randomise
from model_state import assert_same_bits, bits
from torch import nn

import peftkern
from peftkern.adapters import AdapterFile, LoRAConfig, LoRATensors, read_adapter, write_adapter
from peftkern.adapters import files as adapter_files
from peftkern.nn import LoRALinear

safetensors_torch = pytest.importorskip("safetensors.torch")
BF16 = torch.bfloat16
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


# ------------------------------------------------------------------------------------------------ PEFT, both ways

VARIANTS = [
    dict(),
    dict(use_rslora=True),
    dict(lora_bias=True, bias="lora_only", base_bias=True, target_modules=ATTENTION),
    dict(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"k_proj": 5}),
    dict(target_modules=["model.layers.1.mlp.up_proj", "k_proj"]),
    dict(target_modules=r".*layers\.0\..*(q|down)_proj"),
    dict(target_modules=["q_proj", "lm_head"]),
    dict(lora_dropout=0.25, use_rslora=True, rank_pattern={"o_proj": 3}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_our_file_loads_into_peft_and_into_plain_models(options, dtype, tmp_path):
    from peft import PeftModel

    ours = injected(dtype, **options)
    if options.get("bias"):
        with torch.no_grad():
            for name, p in ours.named_parameters():
                p.add_(1.0) if p.requires_grad and name.endswith("proj.bias") else None
    peftkern.save_adapter(ours, tmp_path, task_type="CAUSAL_LM")
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = PeftModel.from_pretrained(llama(dtype, bias=options.get("base_bias", False)), tmp_path)
    peft_state = {k: v for k, v in theirs.state_dict().items() if "lora_" in k}
    assert len(peft_state) == sum("lora_" in name for name in ours.state_dict())
    peftkern.patch(theirs)
    assert torch.equal(logits(theirs), logits(ours))
    loaded = llama(dtype, bias=options.get("base_bias", False)).eval()
    report = peftkern.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(ours)) and report.trainable == 0
    again = injected(dtype, **options)
    with torch.no_grad():
        for p in again.parameters():
            p.mul_(2.0) if p.requires_grad else None
    report = peftkern.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours)) and report.trainable > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_pefts_file_loads_into_injected_and_plain_models(options, tmp_path):
    theirs = adapted(**options).eval()
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    bias = options.get("base_bias", False)
    for model in (llama(bias=bias).eval(), injected(**options)):
        peftkern.load_adapter(model, tmp_path)
        torch.testing.assert_close(logits(model), expected)
    trained = llama(bias=bias)
    report = peftkern.load_adapter(trained, tmp_path, is_trainable=True)
    assert (
        report.trainable == sum(p.numel() for p in theirs.parameters() if "lora_" in "".join(report.names))
        or report.trainable > 0
    )
    logits(trained).sum().backward()
    assert all(layer.lora_B.grad is not None for layer in trained.modules() if isinstance(layer, LoRALinear))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("dtype", [torch.float64, BF16], ids=str)
def test_a_changed_base_is_saved_as_plain_lora_of_the_original(method, dtype, use_rslora, tmp_path):
    from peft import PeftModel

    ours = llama(dtype).eval()
    peftkern.inject(
        ours, r=4, lora_alpha=7, init_lora_weights=method, use_rslora=use_rslora, rank_pattern={"q_proj": 3}
    )
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.add_(0.05 * torch.randn_like(p)) if "lora_" in name else None
    peftkern.save_adapter(ours, tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"{Q0}.lora_A.weight"].shape == (6, 32) and tensors[f"{Q0}.lora_B.weight"].shape == (32, 6)
    plain = llama(dtype).eval()
    start = logits(plain)
    theirs = PeftModel.from_pretrained(llama(dtype), tmp_path)
    peftkern.load_adapter(plain, tmp_path)
    moved = (logits(ours) - start).norm()
    for model in (theirs, plain):
        error = (logits(model) - logits(ours)).norm() / moved
        assert error < (1e-12 if dtype == torch.float64 else 0.1), error  # bf16: rounded residuals; see below
    assert moved > 0.01 * start.norm()


def test_the_base_is_all_that_rounding_costs_a_16_bit_pissa(tmp_path):
    """The file's update is that of the trained factors to fp32; what is left is the residual's rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16).to(BF16))
    original = model[0].weight.detach().clone()
    peftkern.inject(model, r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["0"])
    layer = model[0]
    with torch.no_grad():
        layer.lora_B.add_(torch.randn_like(layer.lora_B))
    peftkern.save_adapter(model, tmp_path)
    A, B, *_ = read_adapter(tmp_path).layers["0"]
    whole = original.double() + 2.0 * B.double() @ A.double()
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    assert (whole - exact).abs().max() <= torch.finfo(BF16).eps * layer.weight.abs().max() / 2 + 1e-5


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_pefts_own_file_of_a_changed_base(method, tmp_path):
    theirs = adapted(zero=True, init_lora_weights=method).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.add_(0.05 * torch.randn_like(p)) if "lora_" in name else None
    theirs.save_pretrained(tmp_path)
    plain = llama().eval()
    peftkern.load_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain), logits(theirs))
    before = bits(model := injected())
    with pytest.raises(ValueError, match=f"init_lora_weights='{method}' of the file changes the base"):
        peftkern.load_adapter(model, tmp_path)
    assert_same_bits(model, before)
    peftkern.save_adapter(plain, tmp_path / "converted")
    other = llama().eval()
    peftkern.load_adapter(other, tmp_path / "converted")
    torch.testing.assert_close(logits(other), logits(theirs))
    before = bits(plain)
    with pytest.raises(ValueError, match="has a weight changed by"):
        peftkern.load_adapter(plain, tmp_path / "converted")
    assert_same_bits(plain, before)


def test_conv1d_both_ways(tmp_path):
    import transformers
    from peft import PeftModel

    def gpt2():
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config).eval()

    ours = gpt2()
    peftkern.inject(ours, r=4, lora_alpha=8)
    randomise(ours)
    peftkern.save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(gpt2(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours))
    theirs.save_pretrained(tmp_path / "peft")
    for folder in (tmp_path, tmp_path / "peft"):
        plain = gpt2()
        peftkern.load_adapter(plain, folder)
        assert torch.equal(logits(plain), logits(ours))


def test_a_scaling_changed_by_hand_and_a_merged_model_are_saved(tmp_path):
    ours = injected()
    for layer in ours.modules():
        if isinstance(layer, LoRALinear):
            layer.scaling = 0.375
    expected = logits(ours)
    ours.model.layers[0].mlp.up_proj.merge()
    peftkern.save_adapter(ours, tmp_path)
    plain = llama().eval()
    peftkern.load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), expected)
    assert read_adapter(tmp_path).config.lora_alpha == 1.5


def test_a_merged_layer_runs_on_the_loaded_adapter(tmp_path):
    peftkern.save_adapter(injected(), tmp_path)
    model = randomise(injected(), seed=5)
    layer = model.model.layers[0].mlp.up_proj
    layer.merge()
    peftkern.load_adapter(model, tmp_path)
    assert layer.merged_weight is not None
    torch.testing.assert_close(logits(model), logits(injected()))


def test_a_compiled_and_a_parallel_wrapper_are_looked_through(tmp_path):
    model = injected()
    peftkern.save_adapter(nn.DataParallel(torch.compile(model)), tmp_path)
    plain = llama().eval()
    peftkern.load_adapter(torch.compile(plain), tmp_path)
    assert torch.equal(logits(plain), logits(model))


def test_a_peft_model_is_told_its_own_way(tmp_path):
    for call in (peftkern.save_adapter, peftkern.load_adapter):
        with pytest.raises(RuntimeError, match="adapters of PEFT: use .*save_pretrained and load_adapter of PEFT"):
            call(adapted(), tmp_path)
    with pytest.raises(ValueError, match="has no LoRALinear"):
        peftkern.save_adapter(llama(), tmp_path)
    assert not os.listdir(tmp_path)


def test_without_safetensors_the_extra_is_named(monkeypatch, tmp_path):
    model = injected()
    peftkern.save_adapter(model, tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (peftkern.save_adapter, peftkern.load_adapter):
        with pytest.raises(ImportError, match=r"pip install 'peftkern\[io\]'"):
            call(model, tmp_path)


# ------------------------------------------------------------------------------------ files without any module


def sample(**config) -> AdapterFile:
    torch.manual_seed(0)
    layers = {name: LoRATensors(torch.randn(4, 6), torch.randn(8, 4)) for name in ("a.q", "b.q")}
    return AdapterFile(LoRAConfig(4, 8, ("q",), **config), layers)


def test_read_gives_what_write_was_given(tmp_path):
    adapter = sample(rank_pattern={"never": 3}, use_rslora=True, exclude_modules=["z"], lora_dropout=0.5)
    write_adapter(tmp_path / "deep" / "folder", adapter.config, adapter.layers, task_type="CAUSAL_LM")
    config, layers = read_adapter(tmp_path / "deep" / "folder")
    assert config == adapter.config
    for name, layer in adapter.layers.items():
        assert torch.equal(layers[name].lora_A, layer.lora_A) and torch.equal(layers[name].lora_B, layer.lora_B)
    assert json.loads((tmp_path / "deep" / "folder" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_views_and_shared_tensors_are_written(tmp_path):
    square = torch.randn(4, 4)
    write_adapter(tmp_path, LoRAConfig(4, 8), {"a": LoRATensors(square, square.T)})
    assert torch.equal(read_adapter(tmp_path).layers["a"].lora_B, square.T)


@pytest.mark.parametrize("fails_at", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_files_and_no_others(fails_at, tmp_path, monkeypatch):
    adapter = sample()
    write_adapter(tmp_path, *adapter)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(adapter_files.os, fails_at, fail)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(tmp_path, LoRAConfig(4, 99), adapter.layers)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_refused_value_is_not_written(tmp_path):
    adapter = sample()
    adapter.layers["b.q"].lora_B[1, 1] = float("inf")
    with pytest.raises(ValueError, match=r"base_model.model.b.q.lora_B.weight \(8, 4\) holds a NaN or an Inf"):
        write_adapter(tmp_path / "new", *adapter)
    assert not (tmp_path / "new").exists()


def test_a_killed_save_leaves_a_whole_file(tmp_path):
    code = f"""
import sys, torch
from peftkern.adapters import LoRAConfig, LoRATensors, write_adapter
print("ready", flush=True)
for i in range(10**6):
    A, B = torch.full((4, 99_999), float(i)), torch.full((7, 4), float(i))
    write_adapter({str(tmp_path)!r}, LoRAConfig(4, 8), {{"a": LoRATensors(A, B)}})
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    child.stdout.readline()
    while not (tmp_path / "adapter_model.safetensors").exists():
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.13)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    A, B, *_ = read_adapter(tmp_path).layers["a"]
    assert (A == A[0, 0]).all() and (B == A[0, 0]).all()


@pytest.mark.skipif(os.name != "posix", reason="symbolic links and pipes")
def test_a_link_in_the_folder_is_replaced_and_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).symlink_to(precious)
    write_adapter(folder, *sample())
    assert precious.read_text() == "keep me" and not (folder / "adapter_config.json").is_symlink()
    read_adapter(folder)


@pytest.mark.skipif(os.name != "posix", reason="symbolic links and pipes")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_pipe_a_folder_or_a_device_is_no_file(make, name, tmp_path):
    write_adapter(tmp_path, *sample())
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises((ValueError, OSError), match="not a regular file|Is a directory"):
        read_adapter(tmp_path)


# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("pattern", "layer"),
    [
        (r"layers\.\d+\.mlp\.up_proj", "model.layers.11.mlp.up_proj"),
        (r"^model\.layers\.(0|1|[2-9])\..*(?:up|down)_proj", "model.layers.7.mlp.down_proj"),
        ("up_proj", "up_proj"),
    ],
)
def test_usual_patterns_of_a_file_are_run(pattern, layer):
    config = LoRAConfig.from_json(LoRAConfig(4, 8, alpha_pattern={pattern: 3}, rank_pattern={pattern: 2}).to_json())
    assert (config.rank(layer), config.alpha(layer)) == (2, 3)
    assert (config.rank("model.layers.12.attn.xup_proj"), config.alpha("q_proj")) == (4, 8)


def test_layers_to_transform_is_no_obstacle(tmp_path):
    theirs = adapted(target_modules=["q_proj"], layers_to_transform=[1]).eval()
    theirs.save_pretrained(tmp_path)
    model = llama().eval()
    assert peftkern.load_adapter(model, tmp_path).names == ("model.layers.1.self_attn.q_proj",)
    torch.testing.assert_close(logits(model), logits(theirs))


def test_layers_that_one_config_cannot_describe_are_refused(tmp_path):
    model = nn.Sequential(LoRALinear(4, 4, 2, 4, lora_bias=True), LoRALinear(4, 4, 2, 4))
    with pytest.raises(ValueError, match="some layers have a lora_bias"):
        peftkern.save_adapter(model, tmp_path)


def test_an_awkward_choice_of_layers_is_described_exactly(tmp_path):
    """ "fc" is also the end of "block.fc", which is not adapted, and has another rank than "a.b"."""
    from peft import PeftModel

    def make():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {n: nn.Linear(4, 4) for n in ("fc", "other")} | {"block": nn.ModuleDict({"fc": nn.Linear(4, 4)})}
        )

    model = make()
    model["fc"] = LoRALinear.from_linear(model["fc"], 3, 5)
    model["other"] = LoRALinear.from_linear(model["other"], 2, 4, use_rslora=True)
    randomise(model)
    peftkern.save_adapter(model, tmp_path)
    plain = make()
    assert peftkern.load_adapter(plain, tmp_path).names == ("fc", "other")
    theirs = PeftModel.from_pretrained(make(), tmp_path).base_model.model
    x = torch.randn(3, 4)
    for name in ("fc", "other"):
        torch.testing.assert_close(plain[name](x), model[name](x))
        torch.testing.assert_close(theirs[name](x), model[name](x))
    assert type(theirs["block"]["fc"]) is nn.Linear
