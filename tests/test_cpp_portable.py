"""The kernels outside Python, by one small driver: other processors, sanitizers and valgrind."""

from __future__ import annotations

import os
import pathlib
import platform
import shutil
import subprocess

import pytest
from conftest import ROOT
from mutants import isa_flags

from peftkern.backends.cpp import stamp

CROSS, WINDOWS = "aarch64-linux-gnu-g++", "x86_64-w64-mingw32-g++-posix"
pytestmark = [
    pytest.mark.long,  # a compilation of the kernels for each
    pytest.mark.xdist_group("the portable driver"),
    pytest.mark.skipif(os.name == "nt", reason="the kernels are not built on Windows"),
]


COMPILERS = ["g++", "g++-11", "clang++", "clang++-14"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]


def compiler_named(name: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    return name


def compile_with(compiler: str, *arguments: str | pathlib.Path) -> None:
    """A warning is an error."""
    command = [compiler_named(compiler), "-std=c++17", "-Wall", "-Wextra", "-Werror", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build(compiler: str, target: pathlib.Path, *flags: str) -> pathlib.Path:
    """The driver with the kernels that it runs."""
    sources = ["tests/cpp/small_cases.cpp", "tests/cpp/few_kernels.cpp", "csrc/cpu/parallel.cpp"]
    compile_with(compiler, *flags, *sources, "-o", target, "-ldl", "-pthread")
    return target


def run(*command: str | pathlib.Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def drawn(output: str) -> str:
    """What names the masks that a driver drew, which are the same everywhere."""
    assert "every case is right" in output
    return output.partition("masks ")[2].strip()


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> str:
    """Those of the baseline kernels of the machine's own compiler."""
    return drawn(run(build("g++", tmp_path_factory.mktemp("baseline") / "driver", "-O1")))


def test_aarch64_compiles_and_is_right(tmp_path, masks):
    driver = build(CROSS, tmp_path / "driver", "-O2", "-static", "-Wno-psabi")
    compile_with(CROSS, "-fsyntax-only", "-Wno-psabi", "csrc/cpu/isa_baseline.cpp")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("it compiles; there is no emulator to run it")
    assert drawn(run(emulator, driver)) == masks


@pytest.mark.parametrize("source", ["parallel", "isa_baseline", "isa_avx2", "isa_avx512", "isa_avx512bf16"])
def test_windows_compiles(source):
    """With mingw's headers. Not run: its GCC does not align AVX's vectors on the stack; clang-cl builds there."""
    compile_with(WINDOWS, "-fsyntax-only", *isa_flags().get(source, []), f"csrc/cpu/{source}.cpp")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compilers_do_not_warn_and_their_kernels_are_right(compiler, tmp_path, masks):
    compile_with(compiler, "-fsyntax-only", "csrc/cpu/isa_baseline.cpp")
    assert drawn(run(build(compiler, tmp_path / "driver", "-O3"))) == masks


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction set of another processor")
@pytest.mark.parametrize("compiler", ["g++", "clang++-14"])
def test_avx2_draws_the_same_masks(compiler, tmp_path, masks):
    driver = build(compiler, tmp_path / "driver", "-O2", "-DSET=avx2", "-DPEFTKERN_ISA=avx2", *AVX2)
    if "avx2" not in (stamp.processor_features() or ()):
        pytest.skip("it compiles; this processor does not run it")
    assert drawn(run(driver)) == masks


def test_threads_do_not_race(tmp_path):
    """The path on std::thread, which is what runs where torch brings no OpenMP."""
    driver = build("g++", tmp_path / "driver", "-O1", "-g1", "-fsanitize=thread")
    done = subprocess.run([driver, "quick"], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not start: the kernel places memory where it cannot (vm.mmap_rnd_bits)")
    assert done.returncode == 0 and "every case is right" in done.stdout, done.stdout + done.stderr


def test_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    driver = build("g++", tmp_path / "driver", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert "every case is right" in run(driver)


def test_valgrind_finds_nothing(tmp_path):
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("no valgrind here")
    driver = build("g++", tmp_path / "driver", "-O1", "-g1")
    assert "every case is right" in run(valgrind, "-q", "--error-exitcode=9", "--leak-check=full", driver, "quick")
