"""The error rule, the one that tests and benchmarks share.

err = ||e||_F / ||truth||_F against fp64,   pass iff err(ours) <= 2 err(torch, same roundings) + 1e-6
"""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the error over that of the truth.

    Args: value: any shape and floating dtype; truth: the same shape, fp64.
    Returns: a float; inf where ``value`` holds a NaN or an infinity, the norm of the error itself where the truth is 0.
    Raises: ValueError if the shapes differ.
    """
    if value.shape != truth.shape:
        raise ValueError(f"the value has shape {tuple(value.shape)}, the truth {tuple(truth.shape)}")
    value, truth = value.double(), truth.double()
    if not value.isfinite().all():
        return math.inf
    size, error = truth.norm().item(), (value - truth).norm().item()
    return error if size == 0 else error / size


def assert_as_good_as(ours: Tensor, torch_result: Tensor, truth: Tensor, name: str = "the result") -> None:
    """Hold ``ours`` to the rule.

    Args: ours: what is judged; torch_result: plain PyTorch, same roundings; truth: fp64; name: for the message.
    Raises: AssertionError with both errors.
    """
    error, peer = relative_error(ours, truth), relative_error(torch_result, truth)
    if not error <= 2 * peer + 1e-6:
        raise AssertionError(f"{name}: error {error:.3e}, allowed 2 x {peer:.3e} + 1e-6")
