"""What a release holds, and that the API's page names all that is public. ``make wheels`` builds and tries the rest."""

from __future__ import annotations

import importlib
import pathlib
import re
import shutil
import sys
import tarfile
import zipfile

import pytest
import wheels
from conftest import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> pathlib.Path:
    """That of a copy of the tree, which setuptools writes into."""
    folder = tmp_path_factory.mktemp("tree") / "peftkern"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*_out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    wheels.run(sys.executable, "setup.py", "--quiet", "sdist", cwd=folder, PEFTKERN_NO_EXT="1")
    (archive,) = (folder / "dist").iterdir()
    return archive


def test_the_sdist_holds_what_the_build_and_the_tests_read(sdist):
    wheels.check_sdist(sdist)
    with tarfile.open(sdist) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    kept = [path.relative_to(ROOT) for folder in ("csrc", "tests", "docs") for path in (ROOT / folder).rglob("*.*")]
    assert {path.as_posix() for path in kept if "__pycache__" not in path.parts} <= names


def test_the_pure_wheel_is_the_package_alone(sdist, tmp_path):
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    wheels.run(*command, "--wheel-dir", tmp_path, sdist, cwd=tmp_path, PEFTKERN_NO_EXT="1")
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    wheels.check_wheel(wheel, extension=False)
    with zipfile.ZipFile(wheel) as contents:
        names = set(contents.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "peftkern").rglob("*.py")}
    assert sources | {"peftkern/py.typed"} <= names


def listed() -> dict[str, set[str]]:
    """What the API's page lists of each package."""
    found = re.findall(r"^::: ([\w.]+)\n    options:\n      members: \[([^]]+)\]", PAGE, flags=re.MULTILINE)
    return {module: set(re.findall(r"\w+", members)) for module, members in found}


def test_the_page_of_the_api_names_all_that_is_public():
    modules = {name: set(importlib.import_module(name).__all__) for name in listed()}
    alone = {path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)$", PAGE, flags=re.MULTILINE)}
    everywhere = alone.union(*listed().values())
    assert modules.pop("peftkern") - {"__version__"} <= everywhere
    assert {name: listed()[name] for name in modules} == modules
