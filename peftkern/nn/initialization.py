"""The starts of an adapter: Kaiming and Gaussian (B is zero), PiSSA and OLoRA (taken out of the base weight)."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

_PISSA_NITER = re.compile(r"pissa_niter_(\d+)")


def changes_the_base(method: bool | str) -> bool:
    """True where the start c B A is subtracted from the base weight."""
    return method in ("pissa", "olora") or (isinstance(method, str) and _PISSA_NITER.fullmatch(method) is not None)


def check_method(method: bool | str) -> None:
    """Raises: ValueError for an initialisation that is not one of those of ``init_factors``."""
    if method is not True and method != "gaussian" and not changes_the_base(method):
        raise ValueError(
            f"init_lora_weights={method!r} is not one of True, 'gaussian', 'pissa', 'pissa_niter_<n>', 'olora'"
        )


def check_weight(weight: Tensor, r: int, method: bool | str) -> None:
    """Raises: ValueError where PiSSA or OLoRA cannot be taken from this weight [N, K]."""
    check_method(method)
    if not changes_the_base(method):
        return
    if weight.is_meta:
        raise ValueError(f"init_lora_weights={method!r} reads the weight, which is on the meta device")
    if r > min(weight.shape):
        raise ValueError(f"init_lora_weights={method!r} needs r <= min{tuple(weight.shape)}, got r={r}")
    if not weight.isfinite().all():
        raise ValueError(f"init_lora_weights={method!r} reads the weight, which holds a NaN or an Inf")


@torch.no_grad()
def init_factors(lora_A: Tensor, lora_B: Tensor, method: bool | str) -> None:
    """Fill A [r, K] Kaiming-uniform (True) or with N(0, 1/r^2) ("gaussian"), and B [N, r] with zeros, as PEFT."""
    if method == "gaussian":
        lora_A.normal_(std=1 / lora_A.shape[0])
    else:
        torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    lora_B.zero_()


@torch.no_grad()
def split_weight(weight: Tensor, r: int, scaling: float, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Take a low-rank part out of a weight, so that residual + c B A is the weight again.

    Formula:
        PiSSA, with W = U S V^T: B = U_r sqrt(S_r / c), A = sqrt(S_r / c) V_r^T ("pissa_niter_<n>": randomised subspace
        iteration instead of the full SVD). OLoRA, with W = Q R: B = Q_r, A = R_r. residual = W - c B A.
    Args:
        weight: [N, K], finite. r: at most min(N, K). scaling: c, positive for PiSSA.
        method: "pissa", "pissa_niter_<n>" or "olora".
    Returns: A [r, K] and B [N, r] in fp32 (fp64 for an fp64 weight), and the residual in the weight's dtype.
    Raises: ValueError, naming the method.
    Numerics: computed in fp32 (fp64 for an fp64 weight); the residual is rounded once.
    Deterministic: yes, but "pissa_niter_<n>" draws from torch's generator.
    Source: Meng et al. 2024 (PiSSA); Buyukakyuz 2024 (OLoRA). PEFT's factors, bit for bit, which
        PEFT then rounds to the weight's dtype.
    """
    check_weight(weight, r, method)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with torch.autocast(weight.device.type, enabled=False):
        if method == "olora":
            Q, R = torch.linalg.qr(wide)
            A, B = R[:r].contiguous(), Q[:, :r].contiguous()
        else:
            if scaling <= 0:
                raise ValueError(f"init_lora_weights={method!r} needs a positive scaling, got {scaling}")
            niter = _PISSA_NITER.fullmatch(method)
            if niter is None:
                U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
            else:
                U, S, V = torch.svd_lowrank(wide, r, niter=int(niter[1]))
                Vh = V.t()
            root = torch.diag(torch.sqrt(S[:r] / scaling))
            A, B = root @ Vh[:r], U[:, :r] @ root
        residual = (wide - scaling * B @ A).to(weight.dtype)
    return A, B, residual
