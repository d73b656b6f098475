"""A built extension that must not be run is refused with one warning and a reason, and the reference path is taken."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
from conftest import ROOT

from peftkern import _version
from peftkern.backends.cpp import stamp
from peftkern.backends.cpp.extension import extension

FILES = [pathlib.Path(extension()[0].__file__)] if extension()[0] is not None else []
linux = pytest.mark.skipif(sys.platform != "linux", reason="about ELF files")
built = pytest.mark.skipif(not FILES, reason="pure Python install")
PROGRAM = """
import torch, peftkern
x, W, A, B = torch.ones(3, 8), torch.ones(6, 8), torch.ones(2, 8), torch.ones(6, 2)
for _ in range(2):
    assert peftkern.lora_linear(x, W, A, B)[0, 0] == 24
    assert peftkern.lora_linear(x[:1], W, A, B)[0, 0] == 24
print(peftkern.env_report()["backends"]["cpp"])
"""


def installed(folder: pathlib.Path, name: str, content: bytes) -> subprocess.CompletedProcess[str]:
    """The program above on a copy of the package with ``content`` as its extension."""
    hidden = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "peftkern", folder / "peftkern", ignore=hidden)
    (folder / "peftkern" / name).write_bytes(content)
    environment = os.environ | {"PYTHONPATH": str(folder), "PEFTKERN_BACKEND": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert words in done.stdout
    assert done.stderr.count(done.stdout.strip()) == 1 and len(done.stderr.splitlines()) == 1


def changed(old: bytes, new: bytes) -> bytes:
    content = FILES[0].read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    return content.replace(old, new)


@built
def test_the_genuine_one_is_taken(tmp_path):
    done = installed(tmp_path, FILES[0].name, FILES[0].read_bytes())
    assert done.stdout == "ready\n" and done.stderr == ""


@linux
@built
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_cut_off(tmp_path, share):
    content = FILES[0].read_bytes()
    refused(installed(tmp_path, FILES[0].name, content[: int(share * len(content))]), "rebuild it")


@built
@pytest.mark.parametrize("name", ["_C.cpython-27-x86_64-linux-gnu.so", "_C.cp27-win_amd64.pyd"])
def test_another_python_or_platform(name, tmp_path):
    done = installed(tmp_path, name, FILES[0].read_bytes())
    refused(done, f"built for another Python or platform: {name}")


@linux
@built
def test_another_machine(tmp_path):
    content = bytearray(FILES[0].read_bytes())
    content[18:20] = (0xF3).to_bytes(2, "little")  # e_machine: RISC-V
    refused(installed(tmp_path, FILES[0].name, bytes(content)), "does not load")


@built
def test_another_version(tmp_path):
    version = _version.__version__.encode()
    stale = changed(b"version=" + version + b" ", b"version=" + b"9" * len(version) + b" ")
    refused(installed(tmp_path, FILES[0].name, stale), f"and this is {_version.__version__}: rebuild it")


@linux
def test_another_processor(tmp_path):
    """Compiled where every source may use instructions that no processor of today has."""
    if shutil.which("g++") is None or os.uname().machine != "x86_64":
        pytest.skip("needs g++ for x86-64")
    target = tmp_path / "library.so"
    macros = [f'-DPEFTKERN_VERSION="{_version.__version__}"', '-DPEFTKERN_SOURCES="0"', "-mxop", "-mavx2"]
    subprocess.run(["g++", "-shared", "-fPIC", *macros, ROOT / "csrc/stamp.cpp", "-o", target], check=True)
    version, needed = _version.__version__, ("avx", "avx2", "xop")
    assert stamp.refusal(target, version, None, _Everything()) is None
    reason = stamp.refusal(target, version, None, frozenset())
    assert reason is not None and all(f" {name}," in reason for name in needed)
    if "xop" not in (stamp.processor_features() or ()):
        refused(installed(tmp_path / "package", f"_C{EXTENSION_SUFFIXES[0]}", target.read_bytes()), " xop,")


class _Everything(frozenset):
    def __contains__(self, name: object) -> bool:
        return True


def test_other_sources(tmp_path):
    file, csrc = tmp_path / "_C.so", tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "a.h").write_text("one")
    before = stamp.digest(csrc)
    file.write_bytes(f"...peftkern build: version=1 sources={before} needs=;\0...".encode())
    assert stamp.refusal(file, "1", before, None) is None
    (csrc / "a.h").write_text("two")
    assert "other sources than those in csrc: rebuild it" in stamp.refusal(file, "1", stamp.digest(csrc), None)


@linux
@built
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf here")
def test_nothing_of_torch_is_linked():
    """One build serves every torch: neither a library of its nor a symbol is needed."""
    shown = subprocess.run(
        ["readelf", "-dW", "--dyn-syms", FILES[0]], capture_output=True, text=True, check=True
    ).stdout
    needed = [line.split()[-1] for line in shown.splitlines() if "(NEEDED)" in line or " UND " in line]
    assert any("libc.so" in name for name in needed)
    assert not [name for name in needed if any(word in name for word in ("torch", "c10", "gomp", "iomp", "GOMP"))]


@built
def test_this_build_runs_everywhere():
    """Without flags of the builder's own, only the files chosen at run time use more than the platform's baseline."""
    assert os.environ.get("CFLAGS") or stamp.refusal(FILES[0], _version.__version__, None, frozenset()) is None
