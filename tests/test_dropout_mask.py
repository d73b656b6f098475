"""The dropout mask: published Philox vectors, our frozen layout, and the same bits through every backend."""

from __future__ import annotations

import hashlib

import pytest
import torch
from conftest import Target

import peftkern
from peftkern import dropout
from peftkern.testing import dropout_mask
from peftkern.testing.numerics import assert_as_good_as

# Random123's known answers for Philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
FROZEN_ROWS = ["1110010101000100", "0010000101001010", "0001110100001001", "1010100001111001"]
FROZEN_SHA256 = "21531b58c12688d9dbcd26939deb332badfb21a63bb9cf870771c0d87da83478"
STATES = [(0, 0), (1, 0), (0x0123456789ABCDEF, 0x0FEDCBA987654321), (-1, -1), (-(2**63), 2**63 - 1)]


def philox_in_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper states it, in Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def kept_in_integers(row: int, col: int, p: float, seed: int, offset: int) -> bool:
    """One element of the mask, straight from the definition in words."""
    seed, offset = seed % 2**64, offset % 2**64
    counter = (col // 8, row, offset % 2**32, offset >> 32)
    word = philox_in_integers(counter, (seed % 2**32, seed >> 32))[col % 8 // 2]
    lane = word >> 16 if col % 2 else word & 0xFFFF
    return lane >= round(65536 * p)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert philox_in_integers(counter, key) == words
    found = dropout._philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(word.item() for word in found) == words


@pytest.mark.parametrize(("seed", "offset"), STATES)
def test_layout_is_the_frozen_one(seed, offset):
    M, K, p = 5, 21, 0.4
    expected = [[kept_in_integers(row, col, p, seed, offset) for col in range(K)] for row in range(M)]
    assert dropout_mask(M, K, p, torch.tensor([seed, offset])).tolist() == expected


def test_frozen_vector():
    """Our own vector: it may never change, or saved RNG states stop meaning the same training run."""
    state = torch.tensor([0x0123456789ABCDEF, 0x0FEDCBA987654321])
    mask = dropout_mask(4, 16, 0.5, state)
    rows = ["".join("01"[kept] for kept in row) for row in mask.tolist()]
    assert rows == FROZEN_ROWS
    large = dropout_mask(257, 1003, 0.1, state).to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(large).hexdigest() == FROZEN_SHA256


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_over_everything_rows_columns_and_lanes(p):
    """Within five standard deviations of the binomial, on a fixed state: in all, and for each row, column and lane."""
    M, K = 1024, 1024
    kept = dropout_mask(M, K, p, torch.tensor([1234, 5678])).double()
    exact = 1 - dropout.threshold(p) / 65536
    for sample in (kept.reshape(1, -1), kept, kept.T, kept.reshape(M, -1, 8).permute(2, 0, 1).reshape(8, -1)):
        deviation = (exact * (1 - exact) / sample.shape[1]) ** 0.5
        assert (sample.mean(1) - exact).abs().max() < 5 * deviation


def test_masks_of_other_states_are_unrelated():
    first = dropout_mask(256, 256, 0.5, torch.tensor([7, 0]))
    for state in ([8, 0], [7, 1], [7, 2**32], [7 + 2**32, 0]):
        agreement = (dropout_mask(256, 256, 0.5, torch.tensor(state)) == first).double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / 256


@pytest.mark.parametrize(("M", "K"), [(0, 12), (3, 0), (0, 0)])
def test_masks_of_nothing(M, K):
    assert dropout_mask(M, K, 0.5, torch.zeros(2, dtype=torch.int64)).shape == (M, K)


@pytest.mark.parametrize(
    ("p", "t", "factor"),
    [
        (0.0, 0, 1.0),
        (0.5, 32768, 2.0),
        (0.05, 3277, 65536 / 62259),
        (1.0, 65536, 0.0),
        (1e-9, 0, 1.0),
        (0.999999, 65536, 0.0),
    ],
)
def test_threshold_and_scale(p, t, factor):
    assert (dropout.threshold(p), dropout.scale(p)) == (t, factor)


# ------------------------------------------------------------------------------------------------ through lora_linear


def reveal(target: Target, M: int, K: int, p: float, state, dtype, **options):
    """D seen in y, dx, dA and dB of a layer with W = 0, A = I and B = I: there, y = D(x) and dx = D(dy)."""
    options = dict(dropout_p=p, rng_state=torch.tensor(state, device=target.device), backend=target.backend) | options
    adapter = options.pop("adapter_dtype", dtype)
    eye = torch.eye(K, device=target.device, dtype=adapter)
    x = torch.ones(M, K, device=target.device, dtype=dtype, requires_grad=True)
    W, A, B = (
        torch.zeros(K, K, device=target.device, dtype=dtype),
        eye.clone().requires_grad_(),
        eye.clone().requires_grad_(),
    )
    y = peftkern.lora_linear(x, W, A, B, **options)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    rows = torch.eye(M, K, device=target.device, dtype=dtype)  # dy = I: dA = D(x) and dB = D(x), row for row
    dA, dB = torch.autograd.grad(y, (A, B), rows)
    return y.detach(), dx, dA, dB


@pytest.mark.parametrize("state", STATES[1:])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (1, 8), (3, 7), (17, 65), (130, 200), (65, 512)])
def test_every_backend_and_product_has_the_same_mask(target, M, K, state):
    p = 0.3
    mask = dropout_mask(M, K, p, torch.tensor(state)).to(target.device)
    y, dx, dA, dB = reveal(target, M, K, p, state, torch.float32)
    expected = mask * torch.tensor(dropout.scale(p), dtype=torch.float32, device=target.device)
    assert torch.equal(y, expected)
    assert torch.equal(dx, expected)
    rows = min(M, K)
    assert torch.equal(dA[:rows], expected[:rows]) and not dA[rows:].any()
    assert torch.equal(dB[:rows], expected[:rows]) and not dB[rows:].any()


@pytest.mark.parametrize("precision", ["base", "fp32"])
@pytest.mark.parametrize("adapter_dtype", ["as x", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mask_does_not_depend_on_the_dtype(target, dtype, adapter_dtype, precision):
    M, K, p = 33, 72, 0.1
    adapter_dtype = dtype if adapter_dtype == "as x" else adapter_dtype
    mask = dropout_mask(M, K, p, torch.tensor([3, 4])).to(target.device)
    found = reveal(target, M, K, p, [3, 4], dtype, adapter_dtype=adapter_dtype, precision=precision)
    for product in found[:2]:
        assert torch.equal(product != 0, mask)
    for gradient in found[2:]:
        assert torch.equal(gradient[:M] != 0, mask)


def test_row_counter_goes_on_over_leading_dimensions_and_past_16_bits(target):
    M, K, p = 70_000, 9, 0.5
    mask = dropout_mask(M, K, p, torch.tensor([5, 6])).to(target.device)
    eye = torch.eye(K, device=target.device)
    y = peftkern.lora_linear(
        torch.ones(7, 100, 100, K, device=target.device), torch.zeros_like(eye), eye, eye,
        dropout_p=p, rng_state=torch.tensor([5, 6], device=target.device), backend=target.backend,
    )  # fmt: skip
    assert torch.equal(y.reshape(M, K) != 0, mask)


def test_p_zero_and_eval_are_no_dropout_and_draw_nothing(target):
    state = torch.get_rng_state() if target.device == "cpu" else torch.cuda.get_rng_state()
    plain = reveal(target, 5, 12, 0.0, [1, 2], torch.float32)
    eye = torch.eye(12, device=target.device)
    for options in (dict(dropout_p=0.0), dict(dropout_p=1e-9), dict(dropout_p=0.7, training=False)):
        y = peftkern.lora_linear(eye, torch.zeros_like(eye), eye, eye, backend=target.backend, **options)
        assert torch.equal(y, eye)
    for product in plain:
        assert set(product.unique().tolist()) <= {0.0, 1.0}
    after = torch.get_rng_state() if target.device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(state, after)


@pytest.mark.parametrize("p", [1.0, 0.999999])
def test_p_one_leaves_the_base_alone(target, p):
    generator = torch.Generator().manual_seed(0)
    x, W, A, B, dy = (
        torch.randn(shape, generator=generator).to(target.device)
        for shape in ((6, 24), (10, 24), (4, 24), (10, 4), (6, 10))
    )
    x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
    y = peftkern.lora_linear(x, W, A, B, dropout_p=p, backend=target.backend)
    y.backward(dy)
    base = torch.nn.functional.linear(x, W)  # the base product sees the undropped x
    assert_as_good_as(y, base, x.double() @ W.double().T)
    assert_as_good_as(x.grad, dy @ W, dy.double() @ W.double())
    assert not A.grad.any() and not B.grad.any()


def test_the_state_is_drawn_from_torchs_generator(target):
    def draw():
        eye = torch.eye(64, device=target.device)
        options = dict(dropout_p=0.5, backend=target.backend)
        return peftkern.lora_linear(torch.ones_like(eye), torch.zeros_like(eye), eye, eye, **options)

    torch.manual_seed(11)
    first, second = draw(), draw()
    torch.manual_seed(11)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second)
    torch.manual_seed(12)
    assert not torch.equal(draw(), first)


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(2),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64, device="meta"),
    ],
    ids=["float", "three", "0-d", "meta"],
)
def test_a_bad_state_is_a_value_error_that_names_it(state):
    eye = torch.eye(4)
    with pytest.raises(ValueError, match="rng_state is int64"):
        peftkern.lora_linear(eye, eye, eye, eye, dropout_p=0.5, rng_state=state)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_bad_probability_is_a_value_error(p):
    eye = torch.eye(4)
    with pytest.raises(ValueError, match="not a probability"):
        peftkern.lora_linear(eye, eye, eye, eye, dropout_p=p)
