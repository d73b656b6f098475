"""``inspect_kernels.key``: what an edit of the tree reaches is made anew, and where the tree lies is no edit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")

EDITS = {  # file, old text, new text
    "a plug": ("kernels/dropout.py", ".to(tl.int32) >= threshold", ".to(tl.int32) > threshold"),
    "what a body calls": ("kernels/dot.py", "max_num_imprecise_acc=a.shape[1]", "max_num_imprecise_acc=2 * a.shape[1]"),
    "a body": ("kernels/kept.py", "tl.program_id(0) // columns * BLOCK_M", "BLOCK_M * (tl.program_id(0) // columns)"),
    "launch code": ("launch/operands.py", 'else "ieee"', 'else "tf32"'),
    "an option": ("launch/operands.py", '"num_warps": self.num_warps', '"num_warps": 2 * self.num_warps'),
    "a tile": ("shipped.py", "(128, 256, 64, 8, 3): (5, 5, 6)", "(128, 256, 64, 8, 2): (5, 5, 6)"),
}
# Keys of sm_90's binaries by name, as the tree is and after each edit.
SCRIPT = """
import json, linecache, pathlib, sys

def keys():
    from binaries import inspect_kernels
    from peftkern.backends.triton.arch import ARCHES
    found = {}
    for variant in inspect_kernels.variants(ARCHES["sm_90"]):
        tile, key = inspect_kernels.key(variant, "sm_90")
        found[f"{variant}, {tile}"] = key
    return found

result = {"": keys()}
for name, (file, old, new) in json.loads(sys.argv[1]).items():
    path = pathlib.Path("peftkern/backends/triton", file)
    before = path.read_bytes()
    path.write_bytes(before.replace(old.encode(), new.encode()))
    assert path.read_bytes() != before, name
    for module in [m for m in sys.modules if m.startswith(("peftkern.backends.triton", "binaries"))]:
        del sys.modules[module]
    linecache.checkcache()
    result[name] = keys()
    path.write_bytes(before)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """From a copy of the tree that lies elsewhere, with other line ends."""
    root = tmp_path_factory.mktemp("elsewhere")
    for folder in ("peftkern", "tests/binaries"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in root.rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(EDITS)], cwd=root, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_neither_paths_nor_line_ends_are_in_a_key(keys):
    from binaries import inspect_kernels

    from peftkern.backends.triton.arch import ARCHES

    for variant in inspect_kernels.variants(ARCHES["sm_90"]):
        tile, key = inspect_kernels.key(variant, "sm_90")
        assert keys[""][f"{variant}, {tile}"] == key


def test_an_edit_changes_the_keys_of_what_it_reaches(keys):
    before = keys[""]

    def reached(edit: str) -> set[str]:
        return {name for name in before if keys[edit].get(name) != before[name]}

    def of(*words: str) -> set[str]:
        return {name for name in before if set(words) & set(name.split())}

    # Coded rows say dropout for their tile; their product has no mask, and y's is in shrink.
    assert of("dropout") - of("fp8xfp8", "split", "library", "onto") <= reached("a plug") <= of("dropout")
    assert reached("what a body calls") == reached("launch code") == before.keys() - of("kept", "quantise")
    assert reached("a body") == of("kept")
    assert reached("an option") == before.keys()
    assert reached("a tile") == {name for name in before if "128x256x64 warps=8 stages=3" in name}
