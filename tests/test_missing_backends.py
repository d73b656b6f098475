"""No Triton, no compiler, no extension; what is missing is left out with one warning."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, Case, Target, check

import peftkern
from peftkern import environment
from peftkern.backends.cpp.backend import CppBackend
from peftkern.backends.triton.backend import TritonBackend
from peftkern.call import Problem
from peftkern.ops import dispatch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EXTENSION = list((ROOT / "peftkern").glob("_C*.so"))


def installed(folder, package: str, distribution: str, version: str) -> None:
    """A distribution of one package, as pip leaves it."""
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (metadata / "top_level.txt").write_text(package + "\n")


def test_a_package_is_found_whatever_its_distribution_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("pretended", "absent"))
    installed(tmp_path, "pretended", "pretended-windows", "3.7.0")
    monkeypatch.syspath_prepend(tmp_path)
    versions = peftkern.env_report()["versions"]
    assert versions["pretended"] == "3.7.0 (pretended-windows)" and versions["absent"] == "not installed"


def test_two_copies_of_other_versions_are_told_apart(tmp_path, monkeypatch):
    installed(tmp_path, "peftkern", "peftkern", "9.9.9")
    monkeypatch.syspath_prepend(tmp_path)
    told = peftkern.env_report()["versions"]["peftkern"]
    assert told == f"{peftkern.__version__} (another copy is installed: 9.9.9)"


def gone(monkeypatch, backend: type, reason: str | None, broken: bool) -> None:
    monkeypatch.setattr(backend, "unavailable", lambda self: reason)
    monkeypatch.setattr(backend, "broken", property(lambda self: broken))


@pytest.mark.parametrize(
    ("device", "backend", "broken", "warned"),
    [("cuda", TritonBackend, False, 1), ("cpu", CppBackend, False, 0), ("cpu", CppBackend, True, 1)],
    ids=["no triton on a GPU", "no extension", "broken extension"],
)
def test_it_falls_back_with_one_warning(device, backend, broken, warned, dispatch_env, monkeypatch, caplog):
    dispatch_env(PEFTKERN_BACKEND="auto")
    gone(monkeypatch, backend, "simulated: out of order", broken)
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        for M in range(1, 5):
            assert dispatch.select(Problem(device, M, 24, 16, 4, F32, F32), "").name == "reference"
    assert [record.getMessage().count("simulated: out of order") for record in caplog.records] == [1] * warned
    for variable, argument in (("auto", backend.name), (backend.name, "")):  # asked for by name, it fails loudly
        dispatch_env(PEFTKERN_BACKEND=variable)
        with pytest.raises(RuntimeError, match="simulated: out of order"):
            dispatch.select(Problem(device, 1, 24, 16, 4, F32, F32), argument)
    assert peftkern.env_report()["backends"][backend.name] == "simulated: out of order"


@pytest.mark.parametrize(
    ("sets", "features", "named"),
    [
        (["avx512bf16", "avx512", "avx2", "baseline"], {"avx512_bf16", "amx_bf16"}, "cpu (AVX512-BF16, AMX)"),
        (["avx512bf16", "avx512", "avx2", "baseline"], {"avx512_bf16"}, "cpu (AVX512-BF16)"),
        (["avx512", "avx2", "baseline"], {"avx512f"}, "cpu (AVX-512)"),
        (["avx2", "baseline"], {"avx2"}, "cpu (AVX2)"),
        (["baseline"], None, f"cpu ({torch.backends.cpu.get_cpu_capability()})"),
        (None, {"amx_bf16"}, f"cpu ({torch.backends.cpu.get_cpu_capability()}, AMX)"),
    ],
)
def test_the_processor_is_named_by_what_it_multiplies_with(sets, features, named, monkeypatch):
    module = None if sets is None else types.SimpleNamespace(instruction_sets=lambda: sets)
    monkeypatch.setattr(environment, "extension", lambda: (module, None, False))
    monkeypatch.setattr(environment.stamp, "processor_features", lambda: features)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peftkern.env_report()["device"] == named


def test_the_numerics_are_the_same_after_a_fallback(dispatch_env, monkeypatch):
    gone(monkeypatch, CppBackend, "simulated: out of order", True)
    dispatch_env(PEFTKERN_BACKEND="auto")
    check(Case(34, 48, 40, 8, BF16, F32, 0.2, bias=True), Target("auto", "cpu"))


def test_a_bad_variable_names_the_values(dispatch_env):
    dispatch_env(PEFTKERN_BACKEND="cuda")
    with pytest.raises(ValueError, match="PEFTKERN_BACKEND='cuda' is not one of auto, triton, cpp, reference"):
        peftkern.lora_linear(*(torch.eye(4) for _ in range(4)))


@pytest.mark.parametrize("missing", [["triton"], ["peftkern._C"], ["triton", "peftkern._C", "peft", "transformers"]])
def test_it_works_where_packages_are_missing(missing):
    program = f"""
import json, sys, torch
sys.modules.update(dict.fromkeys({missing!r}))  # importing any of these is a ModuleNotFoundError
import peftkern
layer = peftkern.nn.LoRALinear(8, 6, 2, 4, lora_dropout=0.5)
layer(torch.ones(3, 8)).sum().backward()
assert layer.lora_B.grad.shape == (6, 2)
print(json.dumps(peftkern.env_report()["backends"]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PEFTKERN_BACKEND": "auto"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    backends = json.loads(done.stdout)
    assert backends["reference"] == "ready"
    assert (backends["cpp"] == "ready") == (bool(EXTENSION) and "peftkern._C" not in missing)
    assert "triton" not in missing or backends["triton"] == "triton is not installed"


def test_a_built_extension_is_ready():
    """It may not silently be left out: where the file is, the backend runs."""
    assert not EXTENSION or peftkern.env_report()["backends"]["cpp"] == "ready"
