"""``make hub``: the package as a repository that the ``kernels`` package loads.

    build.toml                        what it is, for kernel-builder
    build/torch-<backend>/            Python, Triton's sources and the tables, for any processor: cpu, cuda, rocm
    build/torch-stable-abi211-cpu-*/  the same with the C++ extension of this machine and this Python

A variant is a Python package that is imported under a name of its own, beside others of its kind and an installed
peftkern. So imports are made relative, names in strings are taken from the package's own, and the operators get a
namespace; the copy is otherwise the tree's. The extension links nothing of torch, and so fits its stable ABI.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "peftkern"
NOARCH = ("cpu", "cuda", "rocm")
VERSION = 1  # of the kernel: another one where its interface changes
BUILD = f"""[general]
name = "peftkern"
edition = 5
version = {VERSION}
license = "Apache-2.0"
backends = {json.dumps(NOARCH)}

[torch-noarch]
"""
# The package's own name, wherever it was loaded.
_OWN = "__name__.partition('.')[0]"


def relative(source: str, depth: int, namespace: str) -> str:
    """A module's source without the name peftkern, but in texts; ``depth`` is how many folders up the package is."""
    dots = "." * (depth + 1)
    source = re.sub(r"^( *)from peftkern import ", rf"\1from {dots} import ", source, flags=re.MULTILINE)
    source = re.sub(r"^( *)from peftkern\.([\w.]+) import ", rf"\1from {dots}\2 import ", source, flags=re.MULTILINE)
    source = source.replace("torch.ops.peftkern", f"torch.ops.{namespace}").replace('"peftkern::', f'"{namespace}::')
    source = source.replace('Library("peftkern"', f'Library("{namespace}"')
    return re.sub(r'f?"peftkern\.([\w{][\w.{}]*)"', rf'f"{{{_OWN}}}.\1"', source)


def digest() -> str:
    files = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:7]


def write_variant(folder: Path, backend: str, extension: Path | None) -> None:
    """One variant's package and its metadata."""
    name = f"_peftkern_{backend}_{digest()}"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "_C.*", "py.typed", "__main__.py"))
    for path in folder.rglob("*.py"):
        path.write_text(relative(path.read_text(), len(path.relative_to(folder).parts) - 1, name))
    (folder / "layers.py").write_text('from .integrations.kernels import LoraLinear\n\n__all__ = ["LoraLinear"]\n')
    with (folder / "__init__.py").open("a") as init:
        init.write('\n_LAZY["layers"] = f"{__name__}.layers"  # for `kernels`; it imports PEFT\n')
    if extension is not None:
        shutil.copy2(extension, folder)
    about = {"name": "peftkern", "id": name, "version": VERSION, "kernels-minver": "0.17.0", "license": "Apache-2.0"}
    about |= {"python-depends": [], "backend": {"type": backend}}
    (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")


def build(target: Path) -> list[Path]:
    """Write the repository anew; its variants."""
    shutil.rmtree(target, ignore_errors=True)
    built = [path for suffix in EXTENSION_SUFFIXES if (path := PACKAGE / f"_C{suffix}").exists()]
    variants: list[tuple[Path, str, Path | None]] = [
        (target / "build" / f"torch-{backend}", backend, None) for backend in NOARCH
    ]
    if built:
        machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
        name = f"torch-stable-abi211-cpu-{machine}-{platform.system().lower()}"
        variants.append((target / "build" / name, "cpu", built[0]))
    for variant in variants:
        write_variant(*variant)
    (target / "build.toml").write_text(BUILD)
    return [folder for folder, _, _ in variants]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the repository's folder, which is written anew")
    for variant in build(parser.parse_args().target):
        print(variant)


if __name__ == "__main__":
    main()
