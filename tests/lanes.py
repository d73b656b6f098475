"""Which tests a run takes, and what a process of tests tells torch's libraries before they are loaded.

=============  ==========================  =================================================================
marker         runs with                   what it is
=============  ==========================  =================================================================
(none)         ``make unit``               everything that a processor alone can show
interpreter    ``TRITON_INTERPRET=1``      the Triton kernels on the CPU, in a process of their own
long           ``--long``                  what repeats or widens another test at many times its cost
gpu            a CUDA device               what needs one
=============  ==========================  =================================================================

A test of another lane is deselected, and so is never reported as skipped. ``PEFTKERN_MAX_ISA=avx2`` (or ``baseline``)
runs the CPU suite as on a processor without the newer instructions: torch's libraries hear of it, too.
"""

from __future__ import annotations

import getpass
import os
import tempfile

import pytest

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
# What ATen, oneDNN and MKL call the instruction sets.
LESSER = {
    "baseline": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
}

_most = os.environ.get("PEFTKERN_MAX_ISA", "")
if _most in LESSER:
    _names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    os.environ.update(zip(_names, LESSER[_most], strict=True))
    # The compiler's cache does not ask for which instruction set a graph was made.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(
        tempfile.gettempdir(), f"torchinductor_{_most}_{getpass.getuser()}"
    )
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: threads that spin for each other would starve the neighbour
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, help="random configurations to try, other ones at every run")
    parser.addoption("--long", action="store_true", help="the long lane, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of other lanes out."""
    import torch

    def here(item: pytest.Item) -> bool:
        marks = {mark.name for mark in item.iter_markers()}
        return (
            ("interpreter" in marks) == INTERPRETER
            and ("gpu" not in marks or torch.cuda.is_available())
            and ("long" not in marks or config.getoption("--long"))
        )

    kept = [item for item in items if here(item)]
    config.hook.pytest_deselected(items=[item for item in items if not here(item)])
    items[:] = kept
