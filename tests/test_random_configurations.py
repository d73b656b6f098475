"""Hunting wrong gradients: random configurations of one LoRA layer against PEFT's own layer, patched and not.

Every draw is a ``Configuration``; a failing one is shrunk and printed, and ``random_layers.hunt`` of it is the
reproduction. The default run is the same at every time, and the long lane's its continuation; ``pytest --cases 50000``
looks further, elsewhere each time.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from random_layers import BF16, F64, Configuration, build, configurations, hunt  # noqa: E402

from benchmarks import memory  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
DEFAULT_CASES, LONG_CASES = 500, 2000


@pytest.fixture(autouse=True)
def one_thread(caplog):
    """Tiny problems, which threads only slow down; and patch() warns of each layer that it does not fuse."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with caplog.at_level("ERROR", logger="peftkern"):
        yield
    torch.set_num_threads(threads)


def hunting(config: pytest.Config, share: float = 1.0, **options) -> settings:
    """The default run is the same each time; one of a length that was asked for looks elsewhere each time."""
    cases = config.getoption("--cases")
    length = cases or (LONG_CASES if config.getoption("--long") else DEFAULT_CASES)
    return settings(
        max_examples=int(length * share), derandomize=cases is None, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("backend", "share"), [("auto", 1.0), ("reference", 0.1)])
def test_every_configuration_is_pefts(backend, share, pytestconfig, dispatch_env):
    dispatch_env(PEFTKERN_BACKEND=backend)
    profile, seen = hunting(pytestconfig, share), Counter()

    @profile
    @given(configurations())
    def judge(case: Configuration):
        fast = hunt(case)
        assert fast or not case.vanilla, "a vanilla layer is not on the fast path"
        seen["cases"] += 1
        seen["fast" if fast else "PEFT's own forward"] += 1
        seen["vanilla" if case.vanilla else "other"] += 1

    judge()
    print(dict(seen))
    assert seen["cases"] >= profile.max_examples
    assert min(seen["vanilla"], seen["other"]) >= profile.max_examples // 8  # of each kind enough to mean something


def test_memory_held_by_autograd_is_x_and_s(pytestconfig):
    """Of every vanilla layer: nothing that is no parameter but x, and of each adapter s, two RNG integers and a 0-d
    scaling; of DoRA also two vectors of length N and h, of y's size, which the magnitude's gradient needs.
    """

    @hunting(pytestconfig, share=0.1)
    @given(configurations(vanilla=True))
    def weigh(case: Configuration):
        layer = build(case)
        x = torch.randn(*case.leading, case.K).to(case.x_dtype).requires_grad_(case.x_needs_grad)
        saved = memory.saved_for_backward(lambda: layer(x), layer).total
        assert saved == expected_bytes(case, x)

    weigh()


def expected_bytes(case: Configuration, x: torch.Tensor) -> int:
    M, wide, total = x.numel() // case.K, 8 if case.x_dtype == F64 else 4, 0
    trains = case.bias == "trains" or case.x_needs_grad
    for adapter in case.used:
        A, B, lora_bias = adapter.trains
        trains = trains or A or B or adapter.dora or (lora_bias and adapter.lora_bias)
        drops = case.training and round(65536 * adapter.p) > 0
        total += M * adapter.r * wide * (B or (adapter.dora and drops)) + {"tensor": 4, "fp64 tensor": 8}.get(
            adapter.scaling, 0
        )
        total += 16 if drops else 0
        total += (M * x.itemsize + 2 * wide) * case.N if adapter.dora else 0
    return trains * (total + x.nbytes * any(adapter.trains[0] for adapter in case.used))


def test_the_hunt_finds_a_wrong_gradient(monkeypatch, pytestconfig):
    """A gradient of B that is 2 % off, in one corner only: a rank above 8 with dropout, in bf16."""
    from peftkern.ops import dispatch

    genuine = dispatch.backward

    def wrong(call, *arguments):
        gradients = genuine(call, *arguments)
        for i, update in enumerate(call.updates):
            corner = update.R > 8 and update.dropout_p and call.bases[update.base].weight.data.dtype == BF16
            if corner and gradients.lora_B[i] is not None:
                gradients.lora_B[i] = gradients.lora_B[i] * 1.02
        return gradients

    monkeypatch.setattr(dispatch, "backward", wrong)

    @hunting(pytestconfig, phases=[Phase.generate])
    @given(configurations())
    def judge(case: Configuration):
        hunt(case)

    with pytest.raises(AssertionError, match="lora_B"):
        judge()
