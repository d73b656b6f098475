"""The repository of ``make hub``, without the ``kernels`` package that loads it there: names, imports, the layer."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, adapted, logits
from peft.tuners import lora

from peftkern.integrations.kernels import LoraLinear

# As `kernels` imports a variant.
LOAD = """
import importlib.util, json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
x, weight, A, B = torch.ones(3, 8), torch.ones(6, 8), torch.ones(2, 8, requires_grad=True), torch.ones(6, 2)
y = module.lora_linear(x, weight, A, B, backend=sys.argv[2])
y.sum().backward()
assert y[0, 0] == 24 and A.grad[0, 0] == 18 and module.layers.LoraLinear.has_backward
assert getattr(torch.ops, name).forward and not hasattr(torch.ops.peftkern, "forward")
assert not [other for other in sys.modules if other.partition(".")[0] == "peftkern"]
print(module.env_report()["backends"]["cpp"])
"""


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> dict[str, pathlib.Path]:
    build = runpy.run_path(str(ROOT / "tests" / "hub" / "build.py"))["build"]
    return {path.name: path for path in build(tmp_path_factory.mktemp("hub"))}


def test_nothing_is_imported_by_the_packages_own_name(variants):
    for path in (path for folder in variants.values() for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level or node.module.partition(".")[0] != "peftkern", path
            elif isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] != "peftkern" for alias in node.names), path
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"peftkern(::|\.)[\w.]*", node.value), path


def test_there_is_a_variant_for_each_backend(variants):
    about = {name: json.loads((folder / "metadata.json").read_text()) for name, folder in variants.items()}
    assert {"torch-cpu", "torch-cuda", "torch-rocm"} <= about.keys()
    assert all(entry["backend"]["type"] in name for name, entry in about.items())
    assert all((folder / "backends" / "triton" / "kernels").is_dir() for folder in variants.values())
    assert all(("stable-abi" in name) == bool(list(folder.glob("_C*"))) for name, folder in variants.items())


def test_a_variant_is_loaded_under_its_own_name(variants):
    for name in ("torch-cpu", *(name for name in variants if "stable-abi" in name)):
        folder = variants[name]
        done = subprocess.run(
            [sys.executable, "-c", LOAD, folder, "auto"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert (done.stdout == "ready\n") == ("stable-abi" in name), done.stdout


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["cuda", "rocm"])
def test_tritons_kernels_run_under_another_name(variants, backend):
    command = [sys.executable, "-c", LOAD, variants[f"torch-{backend}"], "triton"]
    done = subprocess.run(command, cwd=variants["torch-cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_layer_is_a_forward_for_pefts_own_class(monkeypatch):
    model = adapted().eval()
    theirs = logits(model)
    with model.disable_adapter():
        alone = logits(model)
    layers = [layer for layer in model.modules() if type(layer) is lora.Linear]
    for layer in layers:
        layer.forward = types.MethodType(LoraLinear.forward, layer)
    with model.disable_adapter():
        assert torch.equal(logits(model), alone)  # by PEFT's own forward
    monkeypatch.setattr(lora.Linear, "forward", None)
    torch.testing.assert_close(logits(model), theirs)
