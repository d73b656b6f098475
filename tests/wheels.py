"""``make wheels``: the archives of a release into dist/, and each wheel tried where there is no source tree.

The sdist is made of the tree, and everything else of the sdist alone: a pure wheel and, for each Python, one with the
extension. A wheel is installed into an environment of its own and runs ``tests/smoke`` from a folder that holds nothing
else. This Python's environment reads torch, PEFT and pytest where the tree's own has them; further Pythons, named as
arguments, install them.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
NEEDED = {"setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md", "README.md", "Makefile", "csrc/stamp.cpp",
          "csrc/include/call.h", "tests/conftest.py", "tests/smoke/test_installed.py", "benchmarks/NOTES.md",
          "docs/design.md"}  # fmt: skip
LABEL = "import sys; print('cp%d%d' % sys.version_info[:2])"
SOURCE = """
import pathlib, sys, peftkern
place = pathlib.Path(peftkern.__file__).resolve()
sys.exit(None if place.is_relative_to(pathlib.Path(sys.prefix).resolve()) else f"{place} is not the wheel's")
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints; what it says where it fails. It sees no PYTHONPATH."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_sdist(archive: Path) -> None:
    with tarfile.open(archive) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    if missing := NEEDED - names:
        raise SystemExit(f"{archive.name} lacks {', '.join(sorted(missing))}")
    if built := [name for name in names if name.endswith((".so", ".pyd", ".pyc"))]:
        raise SystemExit(f"{archive.name} holds {', '.join(built)}")


def check_wheel(wheel: Path, extension: bool) -> None:
    """The package and its metadata, with one extension or none; nothing else."""
    with zipfile.ZipFile(wheel) as contents:
        names = contents.namelist()
    allowed = re.compile(r"peftkern(-[\w.]+\.dist-info|\.libs)?/")
    if foreign := [name for name in names if not allowed.match(name) or name.endswith((".cpp", ".h", ".pyc"))]:
        raise SystemExit(f"{wheel.name} holds {', '.join(foreign)}")
    if len([name for name in names if re.fullmatch(r"peftkern/_C\.[\w.-]+", name)]) != extension:
        raise SystemExit(f"{wheel.name}: wanted {int(extension)} extension")


def environment(folder: Path, python: str | Path) -> Path:
    """A fresh environment's Python."""
    run(python, "-m", "venv", folder)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def build(python: Path, sdist: Path, folder: Path, **options: str) -> Path:
    """The wheel that this Python makes of the sdist."""
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist, **options)
    (wheel,) = folder.glob("*.whl")
    return wheel


def try_out(python: Path, wheel: Path, expected: str, torch: str | None) -> str:
    """Install a wheel and run the smoke tests; what they say at the end.

    ``expected`` is what ``python -m peftkern env`` says of the extension. Without ``torch`` to install, the libraries
    are the tree's: a path of a .pth file, of which Python reads no further .pth, and so no editable install.
    """
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if torch is None:
        run(*pip, "--no-deps", "--force-reinstall", wheel)
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    else:
        run(*pip, torch)
        run(*pip, f"{wheel}[peft,io]", "pytest")
    empty = python.parent.parent / "empty"
    shutil.copytree(ROOT / "tests" / "smoke", empty, ignore=shutil.ignore_patterns("__pycache__"))
    run(python, "-c", SOURCE, cwd=empty)
    state = run(python, "-m", "peftkern", "env", cwd=empty)
    if f"cpp: {expected}" not in state:
        raise SystemExit(f"{wheel.name}: wanted cpp: {expected}\n{state}")
    told = run(python, "-m", "pytest", "-q", "--disable-warnings", cwd=empty, HF_HUB_OFFLINE="1").splitlines()[-1]
    if "skipped" in told or "xfailed" in told:
        raise SystemExit(f"{wheel.name}: {told}")
    return told


def released(wheel: Path, tools: Path) -> Path:
    """The wheel in dist/: on Linux under the tag of the oldest system that its symbols allow."""
    if platform.system() != "Linux":
        return Path(shutil.copy2(wheel, DIST))
    before = set(DIST.iterdir())
    run(tools / "auditwheel", "repair", "--wheel-dir", DIST, wheel, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    (made,) = set(DIST.iterdir()) - before
    if "manylinux" not in made.name:
        raise SystemExit(f"auditwheel made {made.name}, which is no manylinux wheel")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="each builds and tries a wheel of its own")
    parser.add_argument(
        "--tools", type=Path, required=True, help="folder of build's, twine's and auditwheel's commands"
    )
    parser.add_argument("--torch", required=True, help="what another Python installs first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # outside the tree, whose pyproject.toml would be pytest's
        make(Path(folder), options.tools.resolve(), options.pythons, options.torch)


def make(work: Path, tools: Path, pythons: list[str], torch: str) -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    run(tools / "python", "-m", "build", "--sdist", "--outdir", DIST)
    (sdist,) = DIST.iterdir()
    check_sdist(sdist)
    print(sdist.name, flush=True)

    python = environment(work / "pure", sys.executable)
    pure = build(python, sdist, work / "pure" / "wheel", PEFTKERN_NO_EXT="1")
    check_wheel(pure, extension=False)
    told = try_out(python, pure, "the C++ extension is not built", None)
    print(f"{Path(shutil.copy2(pure, DIST)).name}: {told}", flush=True)

    own = run(sys.executable, "-c", LABEL).strip()
    for name in pythons:
        label = run(name, "-c", LABEL).strip()
        python = environment(work / label, name)
        wheel = released(build(python, sdist, work / label / "wheel", PEFTKERN_FORCE_EXT="1"), tools)
        check_wheel(wheel, extension=True)
        told = try_out(python, wheel, "ready", None if label == own else torch)
        print(f"{wheel.name}: {told}", flush=True)
    run(tools / "twine", "check", "--strict", *sorted(DIST.iterdir()))


if __name__ == "__main__":
    main()
