"""The kernels outside Python, by one small driver: other processors, sanitizers and valgrind."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest
from conftest import ROOT

KERNELS = ["csrc/cpu/parallel.cpp", "csrc/cpu/isa_baseline.cpp"]
CROSS = "aarch64-linux-gnu-g++"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the kernels are not built on Windows")


def build(compiler: str, target: pathlib.Path, *flags: str) -> pathlib.Path:
    """The driver with the baseline kernels."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    command = [compiler, "-std=c++17", "-Wall", "-Werror", *flags, "tests/cpp/small_cases.cpp", *KERNELS]
    done = subprocess.run(
        [*command, "-o", str(target), "-ldl", "-pthread"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def run(*command: str | pathlib.Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_aarch64_compiles_and_is_right(tmp_path):
    driver = build(CROSS, tmp_path / "driver", "-O2", "-static", "-Wno-psabi")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("it compiles; there is no emulator to run it")
    assert "every case is right" in run(emulator, driver)


def test_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    driver = build("g++", tmp_path / "driver", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert "every case is right" in run(driver)


def test_valgrind_finds_nothing(tmp_path):
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("no valgrind here")
    driver = build("g++", tmp_path / "driver", "-O2", "-g1")
    assert "every case is right" in run(valgrind, "-q", "--error-exitcode=9", "--leak-check=full", driver)
