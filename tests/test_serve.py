"""``serve``: many adapters under one transformers model, against PEFT with one at a time and PEFT's own mixed batch."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ALL_LINEAR, TOKENS, llama, randomise
from torch import nn

import peftkern
from peftkern.adapters import LoRAConfig, LoRATensors, read_adapter, write_adapter
from peftkern.bank import MultiLoRALinear

SETTINGS = {"legal": (4, ALL_LINEAR), "medical": (7, ["q_proj", "v_proj"]), "support": (1, ["down_proj"])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Three adapters that PEFT has saved."""
    from peft import LoraConfig, get_peft_model

    found = {}
    for seed, (name, (r, targets)) in enumerate(SETTINGS.items()):
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM")
        model = randomise(get_peft_model(llama(), config), seed)
        found[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(found[name])
    return found


def alone(folder: str | None, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    from peft import PeftModel

    model = llama() if folder is None else PeftModel.from_pretrained(llama(), folder)
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


MIXED = ["legal", None, "support", "medical", "legal"]
BATCH = torch.randint(0, 64, (5, 7), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_one_batch_serves_all_and_the_base(folders) -> None:
    model = llama().eval()
    bank = peftkern.serve(model, folders)
    assert bank.names == tuple(SETTINGS) and len(bank.layers) == 14
    with peftkern.route(MIXED, bank):
        logits = model(input_ids=BATCH).logits
    assert torch.equal(model(input_ids=BATCH, adapters=MIXED).logits, logits)
    for row, name in enumerate(MIXED):
        torch.testing.assert_close(
            logits[row : row + 1], alone(folders.get(name), BATCH[row : row + 1]), atol=1e-5, rtol=1e-4
        )
    base = model(input_ids=BATCH).logits
    assert torch.equal(logits[1], base[1]) and not torch.equal(logits[0], base[0])


@torch.no_grad()
def test_results_are_those_of_pefts_mixed_batch(folders) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(llama(), folders["legal"], adapter_name="legal")
    for name in ("medical", "support"):
        theirs.load_adapter(folders[name], adapter_name=name)
    names = [name or "__base__" for name in MIXED]
    model = llama().eval()
    peftkern.serve(model, folders)
    own = model(input_ids=BATCH, adapters=MIXED).logits
    torch.testing.assert_close(own, theirs.eval()(input_ids=BATCH, adapter_names=names).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_generation_with_a_cache_routes_every_step(folders) -> None:
    model = llama().eval()
    bank = peftkern.serve(model, folders)
    options = dict(max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    with bank.route(MIXED):
        together = model.generate(BATCH, **options)
    for row, name in enumerate(MIXED):
        with bank.route([name]):
            assert torch.equal(model.generate(BATCH[row : row + 1], **options)[0], together[row])
    with bank.route([None] * 5):
        assert not torch.equal(model.generate(BATCH, **options), together)


@torch.no_grad()
def test_adapters_come_and_go_live(folders) -> None:
    model = llama().eval()
    bank = peftkern.serve(model, {"support": folders["support"]}, target_modules="all-linear")
    before = model(input_ids=TOKENS, adapters=["support"] * 2).logits
    bank.load("medical", folders["medical"])
    own = model(input_ids=TOKENS, adapters=["medical"] * 2).logits
    torch.testing.assert_close(own, alone(folders["medical"]), atol=1e-5, rtol=1e-4)
    bank.load("support", folders["legal"])
    assert not torch.allclose(model(input_ids=TOKENS, adapters=["support"] * 2).logits, before)
    bank.remove("support")
    with pytest.raises(ValueError, match="no adapter 'support'; the bank holds 'medical'"):
        model(input_ids=TOKENS, adapters=["support"] * 2)
    assert torch.equal(model(input_ids=TOKENS).logits, model(input_ids=TOKENS, adapters=[None, None]).logits)


@torch.no_grad()
def test_the_argument_does_not_outlive_the_call_nor_an_error(folders) -> None:
    model = llama().eval()
    bank = peftkern.serve(model, folders)
    base = model(input_ids=TOKENS).logits
    with pytest.raises(ValueError, match="one per sequence or per token"):
        model(input_ids=TOKENS, adapters=["legal"] * 3)
    assert torch.equal(model(input_ids=TOKENS).logits, base)
    with bank.route(["legal"] * 2):
        outer = model(input_ids=TOKENS).logits
        with pytest.raises(ValueError, match="no adapter 'nobody'"):
            model(input_ids=TOKENS, adapters=["nobody"] * 2)
        assert torch.equal(model(input_ids=TOKENS, adapters=[None] * 2).logits, base)
        assert torch.equal(model(input_ids=TOKENS).logits, outer)
    assert torch.equal(model(input_ids=TOKENS, adapters=bank.route(["legal"] * 2)).logits, outer)


def test_unserve_puts_the_very_layers_back(folders) -> None:
    model = llama()
    before = dict(model.named_modules())
    keys = model.state_dict().keys()
    bank = peftkern.serve(model, folders)
    assert model.state_dict().keys() == keys
    assert sum(isinstance(module, MultiLoRALinear) for module in model.modules()) == 14
    with pytest.raises(RuntimeError, match="served already"):
        peftkern.serve(model, folders)
    peftkern.unserve(bank)
    assert dict(model.named_modules()) == before and not model._forward_pre_hooks and not model._forward_hooks
    with pytest.raises(ValueError, match="serves no model"):
        peftkern.unserve(bank)


@pytest.mark.parametrize("kind", ["unknown layer", "no linear", "wrong shape", "missing file", "pickle", "nothing"])
def test_whatever_is_wrong_is_named_and_leaves_the_model_alone(folders, tmp_path, kind: str) -> None:
    model = llama()
    before, trained = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    layer, factors = "model.layers.0.self_attn.q_proj", LoRATensors(torch.zeros(2, 32), torch.zeros(32, 2))
    expected = ValueError, "adapter 'bad': .*"
    if kind == "unknown layer":
        write_adapter(tmp_path, LoRAConfig(2, 2), {layer: factors, "model.gone": factors})
        expected = ValueError, "adapter 'bad': base_model.model.model.gone.lora_A.weight: the model has no such layer"
    elif kind == "no linear":
        write_adapter(tmp_path, LoRAConfig(2, 2), {"model.norm": factors})
        expected = TypeError, "model.norm cannot carry adapters: a LlamaRMSNorm is no nn.Linear"
    elif kind == "wrong shape":
        write_adapter(tmp_path, LoRAConfig(2, 2), {layer: LoRATensors(torch.zeros(2, 31), factors.lora_B)})
        expected = ValueError, r"adapter 'bad': .*q_proj.lora_A.weight has shape \(2, 31\); expected is \(2, 32\)"
    elif kind == "missing file":
        expected = FileNotFoundError, "adapter 'bad': .*adapter_config.json"
    elif kind == "pickle":
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        expected = FileNotFoundError, "adapter 'bad': .*pickled adapter_model.bin"
    with pytest.raises(expected[0], match=expected[1] if kind != "nothing" else "needs adapters or target_modules"):
        peftkern.serve(model, {} if kind == "nothing" else folders | {"bad": tmp_path})
    assert dict(model.named_modules()) == before and [p.requires_grad for p in model.parameters()] == trained
    assert not model._forward_pre_hooks


def test_gpt2s_conv1d_and_a_plain_module_are_served() -> None:
    import transformers

    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).eval()
    twin = copy.deepcopy(gpt2)
    bank = peftkern.serve(gpt2, target_modules=["c_attn"])
    bank.add("a", LoRAConfig(3, 3, ["c_attn"]))
    A, B = bank.parameters("a")
    with torch.no_grad():
        B.normal_(std=0.3)
        twin.transformer.h[0].attn.c_attn.weight += (B @ A).T
        own = gpt2(input_ids=TOKENS, adapters=["a"] * 2).logits
        torch.testing.assert_close(own, twin(input_ids=TOKENS).logits, atol=1e-5, rtol=1e-4)
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    bank = peftkern.serve(plain, target_modules="all-linear")
    bank.add("a", LoRAConfig(2, 2, "all-linear"))
    assert plain(torch.randn(3, 4), adapters=["a", None, "a"]).shape == (3, 2)


def test_read_files_are_taken_as_they_are(folders) -> None:
    model = llama()
    assert peftkern.serve(model, {"a": read_adapter(folders["support"])}).names == ("a",)


def shortened(folder: str, to: str, without: str) -> str:
    """The adapter without some of its layers, as a file that was cut, or whose layers were renamed, has it."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    path = f"{to}/adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if without not in key}, path)
    return to


WAYS = {
    "load_adapter": lambda folder: peftkern.load_adapter(llama(), folder),
    "serve": lambda folder: peftkern.serve(llama(), {"a": folder}),
    "serve of what was read": lambda folder: peftkern.serve(llama(), {"a": read_adapter(folder)}),
    "load": lambda folder: peftkern.serve(llama(), target_modules="all-linear").load("a", folder),
    "add": lambda folder: peftkern.serve(llama(), target_modules="all-linear").add("a", *read_adapter(folder)),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_lacks_layers_of_its_settings_is_refused_by_every_way_in(way, folders, tmp_path) -> None:
    WAYS[way](folders["legal"])
    half = shortened(folders["legal"], str(tmp_path / "half"), "layers.1.")
    with pytest.raises(ValueError, match=r"layers\.1\..*lora_A.weight.* \(and 3 more layers\) missing in the file"):
        WAYS[way](half)


@torch.no_grad()
def test_the_output_heads_adapter_is_served_as_pefts_file_has_it(tmp_path) -> None:
    """PEFT writes the head's base weight beside it; one that is not the model's is refused."""
    from peft import LoraConfig, get_peft_model

    theirs = randomise(get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))).eval()
    theirs.save_pretrained(tmp_path)
    assert read_adapter(tmp_path).layers["lm_head"].weight is not None
    model = llama().eval()
    peftkern.serve(model, {"a": tmp_path})
    own = model(input_ids=TOKENS, adapters=["a", "a"]).logits
    torch.testing.assert_close(own, theirs(input_ids=TOKENS).logits, atol=1e-5, rtol=1e-4)
    other = llama()
    other.lm_head.weight += 1
    with pytest.raises(ValueError, match="'a': base_model.model.lm_head.base_layer.weight is not the model's weight"):
        peftkern.serve(other, {"a": tmp_path})
    assert type(other.lm_head) is nn.Linear
