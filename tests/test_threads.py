"""The extension's threads: torch's own pool, as many as torch is told, in forked workers and from many callers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader, Dataset

import peftkern
from peftkern.backends.cpp.extension import extension

pytestmark = pytest.mark.skipif(extension()[0] is None, reason="pure Python install")

POOL = """
import os, torch, peftkern
from peftkern.backends.cpp.extension import extension
x, W, A, B = torch.ones(200, 64, requires_grad=True), torch.ones(48, 64), torch.ones(4, 64), torch.ones(48, 4)
def threads_after(work):
    work()
    return len(os.listdir("/proc/self/task"))
def ours():
    for rows in (x, x[:2]):
        peftkern.lora_linear(rows, W, A, B, backend="cpp").sum().backward()
def torchs():
    for _ in range(3):
        torch.randn(1000, 1000).exp_()
torch.set_num_threads(1)
before = threads_after(lambda: None)
found = [threads_after(ours) - before]
torch.set_num_threads(3)
found += [threads_after(ours) - before, threads_after(torchs) - before, threads_after(ours) - before]
torch.set_num_threads(1)
found += [threads_after(ours) - before]
print(extension()[0].parallel_runtime(), *found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_one_pool_that_follows_set_num_threads():
    """Our calls start the two workers that torch's own work then uses; none before torch is told of three threads."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", POOL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runtime, *started = done.stdout.split()
    if runtime != "openmp":
        pytest.skip("torch brings no OpenMP runtime here")
    assert started == ["0", "2", "2", "2", "2"]


def call(seed: int) -> list[torch.Tensor]:
    """y of two rows, and y and every gradient of ninety."""
    generator = torch.Generator().manual_seed(seed)
    x, W, A, B = (torch.randn(shape, generator=generator) for shape in ((90, 96), (80, 96), (5, 96), (80, 5)))
    few = peftkern.lora_linear(x[:2], W, A, B, backend="cpp")
    operands = tuple(tensor.requires_grad_() for tensor in (x, A, B))
    y = peftkern.lora_linear(x, W, A, B, dropout_p=0.1, rng_state=torch.tensor([seed, 1]), backend="cpp")
    return [few, y.detach(), *torch.autograd.grad(y.square().sum(), operands)]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Calls(Dataset):
    """What a call gives in the worker that loads it."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return call(index)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_forked_workers(two_threads):
    """A worker is forked from a process whose pool has run, and has none of its threads."""
    call(0)
    loader = DataLoader(Calls(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork")
    found = list(loader)
    torch.set_num_threads(1)  # as torch sets in a worker
    for index, results in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(results, call(index), strict=True))


def test_many_callers_at_once(two_threads):
    expected = [call(seed) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(15):
            if not all(torch.equal(a, b) for a, b in zip(call(seed), expected[seed], strict=True)):
                wrong.append(seed)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
