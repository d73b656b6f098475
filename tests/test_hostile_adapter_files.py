"""Adapter files that mean harm, are damaged or belong to another model: refused by name, and the model is untouched."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from conftest import ALL_LINEAR, injected, llama, logits
from model_state import assert_same_bits, bits

import peftkern
from peftkern.nn import LoRALinear

safetensors_torch = pytest.importorskip("safetensors.torch")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path) -> Path:
    peftkern.save_adapter(injected(), tmp_path)
    return tmp_path


def refused(folder: Path, error: type[Exception] | tuple, words: str, plain: bool = True, **options) -> None:
    """The file is refused, in these words, by an injected model and a plain one, which stay as they are."""
    for model in [injected(**options)] + ([llama().eval()] if plain else []):
        before, random_state = bits(model), torch.get_rng_state()
        with pytest.raises(error, match=words):
            peftkern.load_adapter(model, folder)
        assert_same_bits(model, before)
        assert torch.equal(torch.get_rng_state(), random_state)


def weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def with_header(folder: Path, change) -> None:
    """Rewrite the header; ``change`` gets it as a dict and returns text or a dict."""
    content = weights(folder).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = change(json.loads(content[8 : 8 + length]))
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    weights(folder).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def with_tensors(folder: Path, change) -> None:
    tensors = safetensors_torch.load_file(weights(folder))
    tensors = {key: value.clone() for key, value in tensors.items()}
    change(tensors)
    safetensors_torch.save_file(tensors, weights(folder))


def with_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PEFTKERN_TEST_BOMB"],))


def test_a_pickle_is_neither_read_nor_run(folder, monkeypatch):
    crater = folder.parent / "crater"
    monkeypatch.setenv("PEFTKERN_TEST_BOMB", str(crater))
    bomb = pickle.dumps(Bomb())
    weights(folder).write_bytes(bomb)
    refused(folder, ValueError, "not a safetensors file")
    weights(folder).unlink()
    (folder / "adapter_model.bin").write_bytes(bomb)
    refused(folder, FileNotFoundError, "pickled adapter_model.bin")
    (folder / "adapter_config.json").write_bytes(bomb)
    assert not crater.exists()


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file(folder, keep):
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content[:keep])
    refused(folder, ValueError, "adapter_model.safetensors: not a safetensors file")


def test_a_file_with_more_at_its_end(folder):
    weights(folder).write_bytes(weights(folder).read_bytes() + b"\0")
    refused(folder, ValueError, "not a safetensors file")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 10**8 + 1])
def test_a_huge_header_length(folder, length):
    weights(folder).write_bytes(struct.pack("<Q", length) + weights(folder).read_bytes()[8:])
    refused(folder, ValueError, "not a safetensors file")


def moved(key: str, change):
    def apply(header):
        header[key]["data_offsets"] = change(header[key]["data_offsets"])
        return header

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda header: "{" * 1000,
        lambda header: "[1, 2]",
        lambda header: "\x00\xff",
        lambda header: "[" * 10**6,
        moved(f"{Q0}.lora_A.weight", lambda at: [at[0] + 2**40, at[1] + 2**40]),
        moved(f"{Q0}.lora_A.weight", lambda at: [at[0] - 4, at[1] - 4]),
        moved(f"{Q0}.lora_A.weight", lambda at: [at[1], at[0]]),
        moved(f"{Q0}.lora_A.weight", lambda at: [-4, at[1]]),
        moved(f"{Q0}.lora_A.weight", lambda at: [at[0], at[1] + 4]),
        lambda header: header | {f"{Q0}.lora_A.weight": header[f"{Q0}.lora_A.weight"] | {"shape": [2**62, 4]}},
        lambda header: header | {f"{Q0}.lora_A.weight": header[f"{Q0}.lora_A.weight"] | {"dtype": "OBJECT"}},
        lambda header: header | {f"{Q0}.lora_A.weight": 3},
    ],
)
def test_a_header_that_lies(folder, change):
    with_header(folder, change)
    refused(folder, ValueError, "adapter_model.safetensors: not a safetensors file")


def set_to(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


def fill(key, value):
    return lambda tensors: tensors[key].__setitem__((0, 0), value)


A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop(B0), ValueError, f"{B0} is missing beside {A0}"),
        (lambda t: t.pop(A0), ValueError, f"{A0} is missing beside {B0}"),
        (lambda t: (t.pop(A0), t.pop(B0)), ValueError, f"{A0} missing in the file"),
        (set_to(A0, torch.zeros(4, 33)), ValueError, rf"{A0} has shape \(4, 33\); expected is \(4, 32\)"),
        (set_to(B0, torch.zeros(31, 4)), ValueError, rf"{B0} has shape \(31, 4\); expected is \(32, 4\)"),
        (set_to(A0, torch.zeros(5, 32)), ValueError, rf"{A0} has shape \(5, 32\); expected is \(4, 32\)"),
        (set_to(A0, torch.zeros(32, 4)), ValueError, rf"{A0} has shape \(32, 4\); expected is \(4, "),
        (set_to(A0, torch.zeros(128)), ValueError, rf"{A0} has shape \(128,\); expected is \(4, 'in_features'\)"),
        (set_to(B0, torch.zeros(0, 4)), ValueError, rf"{B0} has shape \(0, 4\); expected is \(32, 4\)"),
        (fill(A0, float("nan")), ValueError, rf"{A0} \(4, 32\) holds a NaN or an Inf"),
        (fill(B0, -float("inf")), ValueError, rf"{B0} \(32, 4\) holds a NaN or an Inf"),
        (set_to(A0, torch.eye(4, 32, dtype=torch.float64) * 1e300), ValueError, rf"{A0} \(4, 32\) has a value"),
        (set_to(A0, torch.zeros(4, 32, dtype=torch.int32)), TypeError, f"{A0} has dtype torch.int32"),
        (set_to(A0, torch.zeros(4, 32, dtype=torch.float8_e4m3fn)), TypeError, f"{A0} has dtype torch.float8"),
        (set_to(f"{Q0}.lora_B.bias", torch.zeros(32)), ValueError, f"{Q0}.lora_B.bias is there, but lora_bias=False"),
        (set_to(f"{Q0}.base_layer.bias", torch.zeros(32)), ValueError, "base_layer.bias is there, but bias='none'"),
        (set_to(f"{Q0}.lora_magnitude_vector", torch.zeros(32)), ValueError, "unknown key .*lora_magnitude_vector"),
        (set_to(f"{Q0}.lora_embedding_A", torch.zeros(4, 4)), ValueError, "unknown key .*lora_embedding_A"),
        (set_to("base_model.model.lm_head.weight", torch.zeros(4, 4)), ValueError, "unknown key .*lm_head.weight"),
        (set_to("../../etc/passwd", torch.zeros(4)), ValueError, "unknown key '../../etc/passwd'"),
        (set_to(f"{Q0}.__class__.lora_A.weight", torch.zeros(4, 4)), ValueError, "__class__.lora_B.weight is missing"),
        (
            set_to(f"{Q0}.base_layer.weight", torch.zeros(32, 32)),
            ValueError,
            "base_layer.weight is not the model's weight",
        ),
        (
            set_to(f"{Q0}.base_layer.weight", torch.zeros(2, 2)),
            ValueError,
            r"has shape \(2, 2\); expected is \(32, 32\)",
        ),
        (set_to(f"base_model.model.{'a' * 501}.lora_A.weight", torch.zeros(4, 4)), ValueError, "has 501 letters"),
        (lambda t: t.clear(), ValueError, "no tensors"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, error, words):
    with_tensors(folder, change)
    refused(folder, error, words)


@pytest.mark.parametrize(
    "name", ["__class__", "model.layers.9.mlp.up_proj", "model.layers.0.mlp.act_fn", "model", "a\n.b"]
)
def test_a_layer_that_the_model_lacks(folder, name):
    def add(tensors):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(4, 32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(32, 4)

    with_tensors(folder, add)
    refused(folder, (ValueError, TypeError), f"base_model.model.{name}.lora_A.weight")


def test_a_model_with_other_layers_is_refused(folder):
    refused(
        folder,
        ValueError,
        "lora_A.weight.* in the file, but the model has no LoRALinear there",
        False,
        target_modules=["q_proj"],
    )
    refused(
        folder, ValueError, "lm_head.lora_A.weight missing in the file", False, target_modules=[*ALL_LINEAR, "lm_head"]
    )


def test_an_injected_model_with_other_ranks_or_biases_is_refused(folder):
    refused(folder, ValueError, rf"{A0} has shape \(4, 32\); expected is \(3, 32\)", False, r=3)
    refused(folder, ValueError, f"{Q0}.lora_B.bias is missing, but lora_bias=True in the model", False, lora_bias=True)
    refused(
        folder,
        ValueError,
        f"{Q0}.base_layer.bias .* is missing, but the bias is trained",
        False,
        bias="lora_only",
        base_bias=True,
    )


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(peft_type="LOHA"), NotImplementedError, "peft_type='LOHA' is not 'LORA'"),
        (dict(peft_type=None), NotImplementedError, "peft_type=None"),
        (dict(use_dora=True), NotImplementedError, "use_dora=True is not supported"),
        (dict(modules_to_save=["lm_head"]), NotImplementedError, r"modules_to_save=\['lm_head'\] is not supported"),
        (dict(target_parameters=["experts.w"]), NotImplementedError, "target_parameters"),
        (dict(arrow_config={"a": 1}), NotImplementedError, "arrow_config"),
        (dict(feature_of_2031="on"), NotImplementedError, "feature_of_2031='on' is not supported"),
        (dict(init_lora_weights="pissa_niter_4"), NotImplementedError, "cannot be repeated"),
        (dict(init_lora_weights=["pissa"]), (NotImplementedError, TypeError), "init_lora_weights"),
        (dict(init_lora_weights="corda"), NotImplementedError, "init_lora_weights='corda'"),
        (dict(r=0), ValueError, "r is at least 1, got 0"),
        (dict(r=True), TypeError, "r is an int, not True"),
        (dict(r="4"), TypeError, "r is an int, not '4'"),
        (
            dict(r=5),
            ValueError,
            r"layers.0.mlp.down_proj.lora_A.weight has shape \(4, 48\); expected is \(5, 48\), with r=5",
        ),
        (dict(lora_alpha=float("nan")), ValueError, "lora_alpha is finite"),
        (dict(lora_alpha=10**400), ValueError, "lora_alpha is finite"),
        (dict(lora_alpha={"a": 1}), TypeError, "lora_alpha is a number"),
        (dict(lora_dropout=2.0), ValueError, "lora_dropout=2.0"),
        (dict(use_rslora="yes"), TypeError, "use_rslora is a bool, not 'yes'"),
        (dict(bias="all"), ValueError, "bias='all'"),
        (dict(bias="lora_only", lora_bias=True), ValueError, "lora_B.bias is missing, but lora_bias=True"),
        (dict(target_modules=[1]), TypeError, "target_modules is a string or a list of strings"),
        (dict(rank_pattern={"0.*q_proj": 3}), ValueError, rf"{A0} has shape \(4, 32\); expected is \(3, 32\)"),
        (dict(rank_pattern=[1]), TypeError, "rank_pattern is a dict"),
        (dict(rank_pattern={"(": 3}), ValueError, "is not a regular expression"),
        (dict(alpha_pattern={"q_proj": "x"}), TypeError, r"alpha_pattern\['q_proj'\] is a number"),
        (dict(alpha_pattern={"(a+)+b": 3}), ValueError, "too complex to be run from a file"),
        (dict(alpha_pattern={"(a|a)*b": 3}), ValueError, "too complex to be run from a file"),
        (dict(alpha_pattern={".*.*.*.*.*b": 3}), ValueError, "too complex to be run from a file"),
        (dict(alpha_pattern={"a?" * 30 + "a" * 30: 3}), ValueError, "too complex to be run from a file"),
        (dict(alpha_pattern={"(a|a)" * 30 + "b": 3}), ValueError, "too complex to be run from a file"),
    ],
    ids=str,
)
def test_a_config_that_is_not_plain_lora(folder, changes, error, words):
    with_config(folder, **changes)
    refused(folder, error, words)


@pytest.mark.parametrize(
    "text", [b"", b"nul", b"[1]", b"\xff\xfe{", b"{" * 10, b"[" * 10**5, b"1" * 5000, b" " * (2**20 + 1)]
)
def test_a_config_that_is_no_object(folder, text):
    (folder / "adapter_config.json").write_bytes(text)
    refused(folder, ValueError, "adapter_config.json")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, FileNotFoundError, name)


def test_a_plain_model_needs_every_layer_that_the_config_names(folder):
    def drop(tensors):
        for key in [key for key in tensors if "layers.1.self_attn.k_proj" in key]:
            del tensors[key]

    with_tensors(folder, drop)
    refused(folder, ValueError, "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight missing in the file")


def test_a_regex_of_a_stranger_is_not_run_on_names(folder):
    with_config(folder, target_modules="(.*)*" * 20 + "x", exclude_modules="(a+)+" * 20)
    model = llama().eval()
    peftkern.load_adapter(model, folder)
    assert torch.equal(logits(model), logits(injected()))


def test_a_model_on_the_meta_device_is_refused(folder):
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match="is on the meta device"):
        peftkern.load_adapter(model, folder)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
