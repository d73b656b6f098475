"""What only the C++ backend has: instruction sets chosen at run time, threads, blocks of rows, raw addresses."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from conftest import NAMES, ROOT, Case, expect, judge, make, run
from instruction_sets import SETS, C, kernels, settings
from pairwise import pairwise

import peftkern
from peftkern import dropout
from peftkern.backends.cpp import call
from peftkern.call import Problem
from peftkern.ops import dispatch
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as
from peftkern.weights import DenseWeight

pytestmark = [
    pytest.mark.skipif(C is None, reason="pure Python install"),
    pytest.mark.usefixtures("poisoned"),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@contextlib.contextmanager
def threads(count: int, openmp: bool = True) -> Iterator[int]:
    """A number of threads, on torch's OpenMP pool or on threads that end with each region."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    C.use_openmp(openmp)
    try:
        yield count
    except AssertionError as error:
        raise AssertionError(f"{count} threads, openmp={openmp}: {error}") from error
    finally:
        C.use_openmp(True)
        torch.set_num_threads(before)


THREADS = [(1, True), (2, True), (3, True), (2, False), (3, False)]


def judge_everywhere(case: Case, tensors=None) -> None:
    """A case in every set and on both schedules, against one truth."""
    tensors = make(case) if tensors is None else tensors
    expected = expect(case, tensors)
    for setting in settings():
        with setting:
            judge(case, "cpp", (tensors, run(case, tensors, "cpp")), expected=expected)


def test_the_best_set_is_taken_and_the_worst_is_always_there():
    assert SETS[-1] == "baseline" and C.instruction_set() == SETS[0]
    with pytest.raises(ValueError, match="no_such_set"):
        C.use("no_such_set")


@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 64), (2, 65), (5, 513), (200, 1030)])
def test_mask_bits(M, K):
    """Every instruction set draws the frozen mask, for seeds and offsets that use all 64 bits.

    Of 206,000 elements a few have the very lane value that is the threshold, wherever it is.
    """
    for state in ([0, 0], [-1, -1], [0x0123456789ABCDEF, -0x0123456789ABCDEF]):
        for p in (1e-4, 0.05, 0.5, 0.9999, 1.0):
            rng_state = torch.tensor(state)
            mask = dropout_mask(M, K, p, rng_state)
            for setting in settings(one_pass=(None,)):
                with setting:
                    words = torch.zeros(M, (K + 63) // 64, dtype=torch.int64)
                    C.keep_bits(dropout.threshold(p), rng_state.data_ptr(), M, K, words.data_ptr())
                    bits = (words.unsqueeze(-1) >> torch.arange(64)) & 1
                    assert torch.equal(bits.reshape(M, -1)[:, :K].bool(), mask), (p, state)


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 64), (2, 65), (19, 513), (40, 1030)])
def test_kept(M, K, p):
    """What is kept, in every instruction set and number of threads: the bits of x, or zero, and nothing beyond."""
    rng_state = torch.tensor([-1, 0x0123456789ABCDEF])
    mask = dropout_mask(M, K, p, rng_state)
    for dtype in (F32, BF16):
        x = torch.randn(M, K + 3).to(dtype)[:, :K]
        expected = torch.where(mask, x, torch.zeros_like(x))
        for name in SETS:
            for count in THREADS:
                with kernels(name), threads(*count):
                    kept = torch.full((M + 1, K), 9.0, dtype=dtype)
                    C.keep(
                        dropout.threshold(p), rng_state.data_ptr(), M, K, call.DTYPES[dtype], x.data_ptr(),
                        x.stride(0), kept.data_ptr(), torch.get_num_threads(),
                    )  # fmt: skip
                    assert torch.equal(kept[:M], expected) and (kept[M] == 9).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("M", [1, 5, 70])
def test_the_bare_product(M, dtype):
    """The product with the frozen weight alone, both ways: no low-rank pair, no address of one."""
    t = make(Case(M, 257, 65, 1, dtype))
    for rows, backward in ((t.x, False), (t.dy, True)):
        peer = rows @ (t.weight if backward else t.weight.T)
        truth = rows.double() @ (t.weight.double() if backward else t.weight.double().T)
        for setting in settings():
            with setting:
                found = dispatch.backend_named("cpp").product(DenseWeight(t.weight), rows, backward)
                assert_as_good_as(found, peer, truth)


# Rows around the block of 192 (64, 16), the tile (12, 6) and the handful (4), columns around the chunk of 256 and the
# tile, ranks around the tile, odd counts everywhere.
EDGES = [
    (1, 257, 35, 17),
    (3, 31, 5, 1),
    (4, 514, 66, 33),
    (5, 256, 32, 16),
    (389, 130, 49, 7),
    (63, 255, 33, 15),
    (65, 257, 31, 17),
    (64, 256, 32, 16),
    (130, 513, 257, 33),
    (16, 255, 63, 5),
    (2, 30, 514, 2),
]


DTYPES = [(F32, "base"), *((narrow, precision) for narrow in (BF16, F16) for precision in ("base", "fp32"))]


@pytest.mark.parametrize(("dtype", "precision"), DTYPES, ids=str)
@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_edges(edge, dtype, precision):
    judge_everywhere(Case(*edge, dtype, F32, 0.1, bias=True, lora_bias=True, precision=precision))


@pytest.mark.parametrize("M", [1, 40, 200])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_threads(dtype, M):
    """Right for any number of threads, also more than there are blocks, and the same bits every time."""
    case = Case(M, 96, 80, 16, dtype, F32, 0.2, lora_bias=True)
    tensors = make(case)
    expected = expect(case, tensors)
    for one_pass in (True, False):
        for count in THREADS:
            with kernels(SETS[0], one_pass), threads(*count):
                found = run(case, tensors, "cpp")
                judge(case, "cpp", (tensors, found), expected=expected)
                again = run(case, tensors, "cpp")
                assert all(torch.equal(found[name], again[name]) for name in NAMES if found[name] is not None)


def test_fp16_conversions():
    """Every finite fp16 value, subnormals too, survives the accumulation into y, and halves round to even."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(F16)
    values = values[values.isfinite()].reshape(1, -1)  # [1, K]
    K = values.shape[1]
    A, B = torch.zeros(1, 1), torch.zeros(1, 1)
    one = torch.ones(1, 1).half()
    for setting in settings():
        with setting:
            y = forward(values.T.contiguous(), one, A, B)
            assert y.shape == (K, 1) and torch.equal(y, values.T)  # W = 1, and an update of 0: y is read and written
            # y + c s B^T at the midpoint between neighbours: 1 + 2^-11 is 1, being even; 1 + 3 2^-11 is 1 + 2^-9
            for delta, expected in ((2.0**-11, 1.0), (3 * 2.0**-11, 1 + 2.0**-9), (2.0**-10, 1 + 2.0**-10)):
                y = forward(one, one, torch.tensor([[delta]]), torch.ones(1, 1), precision="fp32")
                assert y.item() == expected


def forward(x, W, A, B, **options):
    return peftkern.lora_linear(x, W, A, B, backend="cpp", **options)


def test_one_pool_of_threads():
    """On Linux the work runs on torch's own OpenMP pool; a second pool would fight it for the cores."""
    if "libgomp" in open("/proc/self/maps").read():
        assert C.parallel_runtime() == "openmp"


@pytest.mark.parametrize("default", [BF16, torch.float64], ids=str)
def test_s_does_not_depend_on_the_default_dtype(default):
    """The kernels write fp32 into s, whatever torch.empty would have made."""
    case = Case(70, 96, 80, 16, F32, p=0.1)
    tensors = make(case)
    expected = run(case, tensors, "cpp")
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = run(case, tensors, "cpp")
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES if expected[name] is not None)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_unaligned_rows(dtype):
    """Addresses that are multiples of the element's size and of nothing else; the bytes around them stay untouched."""
    case = Case(35, 70, 66, 9, dtype, F32, 0.1)
    tensors = make(case)
    guard = torch.full((1 + 35 * 71,), 7.0, dtype=dtype)
    view = guard[1:].view(35, 71)[:, :70]
    view.copy_(tensors.x)
    tensors.x = view
    tensors.lora_A = torch.cat([torch.zeros(1), tensors.lora_A.flatten()])[1:].view(9, 70)
    judge_everywhere(case, tensors)
    assert (guard[1:].view(35, 71)[:, 70] == 7).all() and guard[0] == 7


def test_a_missing_extension_is_said(monkeypatch):
    backend = dispatch.backend_named("cpp")
    monkeypatch.setattr("peftkern.backends.cpp.backend.extension", lambda: (None, "not built here", False))
    assert backend.unavailable() == "not built here" and not backend.broken


def test_what_lies_behind_an_odd_row_is_not_read_as_a_number():
    """bf16 elements are multiplied in pairs: the neighbour of the last one must not come in, not even times zero."""
    case = Case(35, 71, 67, 5, BF16, F32)
    tensors = make(case)
    for name in ("x", "dy"):
        value = getattr(tensors, name)
        guarded = torch.full((value.shape[0], value.shape[1] + 1), torch.nan, dtype=BF16)
        guarded[:, :-1] = value
        setattr(tensors, name, guarded[:, :-1])
    judge_everywhere(case, tensors)


def test_an_infinity_stays_one():
    """Ranks are padded to a vector: infinity times a padding zero must not reach y as NaN."""
    x = torch.ones(3, 8).bfloat16()
    x[1, 2] = torch.inf
    for setting in settings():
        with setting:
            y = forward(x, torch.ones(4, 8).bfloat16(), torch.ones(5, 8), torch.ones(4, 5))
            assert (y[1] == torch.inf).all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("R", [1, 3, 9, 17])
@pytest.mark.parametrize("M", [1, 2, 4])
def test_the_next_row_of_a_factor_is_not_read_as_a_number(M, R):
    """A row shorter than a vector is loaded with what lies behind it, none of which may come in, even times zero."""
    K, N, r = 19, 21, R - 1
    x, W, dy = torch.ones(M, K, requires_grad=True), torch.ones(N, K), torch.ones(M, N)
    for setting in settings():
        with setting:
            A, B = torch.ones(R, K), torch.ones(N, R)
            B[7, r] = torch.inf
            A.requires_grad_(), B.requires_grad_()
            y = forward(x, W, A, B)
            dA = torch.autograd.grad(y, A, dy)[0]
            assert y.isinf().any(0).nonzero().flatten().tolist() == [7]
            assert (~dA.isfinite()).any(1).nonzero().flatten().tolist() == [r]
            A, B = torch.ones(R, K), torch.ones(N, R, requires_grad=True)
            A[r, 0] = torch.inf
            dx, dB = torch.autograd.grad(forward(x, W, A, B), (x, B), dy)
            assert (~dx.isfinite()).any(0).nonzero().flatten().tolist() == [0]
            assert (~dB.isfinite()).any(0).nonzero().flatten().tolist() == [r]


def test_a_runtime_that_gives_fewer_threads_than_asked():
    program = (
        "import torch, peftkern; torch.manual_seed(0); torch.set_num_threads(3)\n"
        "from peftkern.testing.numerics import assert_as_good_as\n"
        "shapes = (300, 40), (24, 40), (4, 40), (24, 4), (300, 24)\n"
        "values = [torch.randn(shape) for shape in shapes]\n"
        "def grads(backend, dtype):\n"
        "    x, W, A, B, dy = (value.to(dtype) for value in values)\n"
        "    A.requires_grad_(), B.requires_grad_()\n"
        "    return torch.autograd.grad(peftkern.lora_linear(x, W, A, B, backend=backend), (A, B), dy)\n"
        "trio = grads('cpp', torch.float32), grads('reference', torch.float32), grads('reference', torch.float64)\n"
        "for ours, plain, truth in zip(*trio): assert_as_good_as(ours, plain, truth)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_THREAD_LIMIT": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WEIGHTS = {
    "transposed": lambda W: W.T.contiguous().T,
    "sliced": lambda W: torch.cat([W, W], 1)[:, : W.shape[1]],
    "unaligned": lambda W: torch.cat([W[:1, :1].flatten(), W.flatten()])[1:].view(W.shape),
    "neither_contiguous": lambda W: W.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "expanded": lambda W: W[:1].expand(W.shape),
}


@pytest.mark.parametrize(("layout", "dtype", "M"), pairwise(list(WEIGHTS), (F32, BF16, F16), (2, 70)), ids=str)
def test_a_weight_is_read_where_it_lies(layout, dtype, M):
    case = Case(M, 300, 70, 9, dtype, F32, bias=True)
    tensors = make(case)
    tensors.weight = WEIGHTS[layout](tensors.weight)
    judge_everywhere(case, tensors)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("M", [2, 100])
def test_one_pass_has_the_same_bits_for_any_number_of_threads(monkeypatch, M, dtype):
    """y and dx, whose sums no thread shares with another; of rows that stream dA and dB too."""
    monkeypatch.setattr(call, "one_pass", lambda *_: True)
    case = Case(M, 300, 130, 9, dtype, F32, 0.2)
    tensors = make(case)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(run(case, tensors, "cpp"))
    torch.set_num_threads(before)
    shared = ("y", "x", "lora_A", "lora_B") if M <= call.STREAMED_ROWS else ("y", "x")
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in shared)


@pytest.mark.parametrize("case", [Case(2, 40, 24, 3), Case(70, 40, 24, 3, p=0.3), Case(70, 24, 40, 3)], ids=str)
def test_nothing_is_written_beside_the_outputs(monkeypatch, case):
    """y, s, dx, dA and dB lie between guards."""
    monkeypatch.setattr(call, "one_pass", lambda *_: True)
    guarded: list[torch.Tensor] = []
    genuine = torch.Tensor.new_empty

    def between_guards(tensor, *shape, dtype=None):
        size = torch.Size(shape).numel()
        memory = genuine(tensor, 16 + size + 16, dtype=dtype or tensor.dtype).fill_(7.0)
        guarded.append(memory)
        return memory[16 : 16 + size].fill_(torch.nan).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", between_guards)
    tensors = make(case)
    found = run(case, tensors, "cpp")
    monkeypatch.undo()
    judge(case, "cpp", (tensors, found))
    assert len(guarded) >= 3  # y, s, dx
    assert all((memory[:16] == 7).all() and (memory[-16:] == 7).all() for memory in guarded)


def test_a_block_of_wide_rows_takes_no_more_than_16_mib():
    """264 rows of 49152, as where a head is adapted, would be 52 MB for every thread, for good."""
    program = """if True:
        import resource, torch, peftkern
        from peftkern.backends.cpp import call
        call.one_pass = lambda *_: True
        torch.set_num_threads(1)
        x, W = torch.ones(264, 49152), torch.ones(16, 49152)
        A, B = torch.ones(2, 49152), torch.ones(16, 2)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peftkern.lora_linear(x[:1], W, A, B, backend="cpp")
        before = peak()
        y = peftkern.lora_linear(x, W, A, B, backend="cpp")
        assert (y == 3 * 49152).all()
        print((peak() - before) // 1024)
    """
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 32  # MiB: the block, its panels and the factors'


def test_a_format_without_a_decoder_is_refused_by_name(monkeypatch):
    from peftkern.backends.cpp import quantised

    backend, problem = dispatch.backend_named("cpp"), Problem("cpu", 4, 64, 64, 2, torch.float32, torch.float32, "nf4")
    assert backend.supports(problem) is None
    monkeypatch.delitem(quantised.FORMATS, "nf4")
    assert backend.supports(problem) == "there is no C++ decoder for weight format 'nf4'"
