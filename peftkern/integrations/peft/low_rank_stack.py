"""A parameter with its low-rank update, W + c L R, that is never formed where only products with it are wanted.

PEFT folds the update into the parameter, all experts of it, before a module's forward reads it. ``LowRankStack`` stands
in for the folded tensor: an expert's slice, a transpose, and a product of rows with either are done with the factors.
Whatever else is asked of it forms the tensor by PEFT's own means, once, and goes on with that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from peftkern.call import Base, Call, Update
from peftkern.functional import lora_linear, run
from peftkern.integrations.peft.read import Adapter, Parts, why_not_input
from peftkern.ops import dispatch
from peftkern.weights import DenseWeight


class LowRankStack(Tensor):
    """weight + scaling left right, of one matrix [N, K] or a stack of them [E, N, K]; a tensor without memory.

    Args: weight: [.., N, K]; left: [.., N, R]; right: [.., R, K]; scaling: a number or a 0-d tensor; fold: forms the
        sum, differentiable in the factors.
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    scaling: float | Tensor
    fold: Callable[[], Tensor]
    slices: tuple[tuple[Tensor, ...], ...] | None

    @staticmethod
    def __new__(
        cls, weight: Tensor, left: Tensor, right: Tensor, scaling: float | Tensor, fold: Callable[[], Tensor]
    ) -> LowRankStack:
        self = Tensor._make_wrapper_subclass(
            cls, weight.shape, weight.stride(), dtype=weight.dtype, layout=weight.layout, device=weight.device
        )
        self.weight, self.left, self.right, self.scaling, self.fold = weight, left, right, scaling, fold
        self.slices = None
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _METADATA:
            return func(args[0].weight, *args[1:], **kwargs)
        args, kwargs = pytree.tree_map_only(LowRankStack, lambda stack: stack.fold(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a function without the class
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} was asked of a parameter whose low-rank update is not folded in")

    def swap(self) -> LowRankStack:
        """The transpose: (W + c L R)^T = W^T + c R^T L^T."""
        weight, left, right = (factor.transpose(-2, -1) for factor in (self.weight, self.right, self.left))
        return LowRankStack(weight, left, right, self.scaling, lambda: self.fold().transpose(-2, -1))

    def expert(self, index: int) -> LowRankStack:
        """One expert's matrix. One node splits all of them, so that backward writes each stacked gradient once, with
        exact zeros for an expert that nobody used."""
        if self.slices is None:
            self.slices = self.weight.unbind(0), self.left.unbind(0), self.right.unbind(0)
        weight, left, right = (slices[index] for slices in self.slices)
        return LowRankStack(weight, left, right, self.scaling, lambda: self.fold()[index])


def _linear(input: Tensor, weight: LowRankStack, bias: Tensor | None = None) -> Tensor:
    """x W^T + c (x R^T) L^T + bias for one matrix."""
    if not isinstance(weight, LowRankStack) or weight.weight.ndim != 2:
        return NotImplemented
    W, A, B, c = weight.weight, weight.right, weight.left, weight.scaling
    autocasting = dispatch.autocasting(W.device.type)
    if bias is not None and (type(bias) not in (Tensor, Parameter) or (bias.dtype != W.dtype and not autocasting)):
        return NotImplemented
    if why_not_input(Parts(W, bias, [Adapter(A, B, None, 0.0, c)], W.dtype), input) is not None:
        return NotImplemented
    if autocasting or isinstance(c, Tensor):
        return lora_linear(input, W, A, B, c, bias=bias)
    return run(input, Call((Base(DenseWeight(W), bias),), (Update(A, B, None, None, None, float(c), 0.0),)))[0]


def _matmul(input: Tensor, other: LowRankStack, *, out: Tensor | None = None) -> Tensor:
    """x (W + c L R) for one matrix."""
    if not isinstance(other, LowRankStack) or out is not None:
        return NotImplemented
    return _linear(input, other.swap())


def _grouped(
    input: Tensor,
    other: LowRankStack,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch's grouped product, outside autocast as it is: rows offs[e - 1] to offs[e] of x with expert e [K, N].

    Rows past the last group, which torch leaves undefined, are 0.
    """
    if not isinstance(other, LowRankStack) or offs is None or bias is not None or out_dtype not in (None, input.dtype):
        return NotImplemented
    if (other.weight.ndim, input.ndim) != (3, 2):
        return NotImplemented
    stack, M, ends = other.swap(), input.shape[0], offs.tolist()
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    *groups, rest = input.split([*counts, M - ends[-1]])
    pieces = []
    with torch.autocast(input.device.type, enabled=False):
        for index, rows in enumerate(groups):
            if rows.shape[0] or M == 0:  # without any row, the experts' own products give the zero gradients
                piece = _linear(rows, stack.expert(index))
                if piece is NotImplemented:
                    return NotImplemented
                pieces.append(piece)
    if rest.shape[0]:
        pieces.append(input.new_zeros(rest.shape[0], stack.weight.shape[1]))
    return torch.cat(pieces)


def _getitem(self: LowRankStack, index: Any) -> LowRankStack:
    """One expert, by a number or a 0-d tensor of integers, which torch, too, reads on the host."""
    number = index.ndim == 0 and index.dtype == torch.int64 if type(index) is Tensor else type(index) is int
    return self.expert(int(index)) if number and self.weight.ndim == 3 else NotImplemented


def _transpose(self: LowRankStack, dim0: int, dim1: int) -> LowRankStack:
    ndim = self.weight.ndim
    return self.swap() if {dim0 % ndim, dim1 % ndim} == {ndim - 2, ndim - 1} else NotImplemented


def _mT(self: LowRankStack, *_: Any) -> LowRankStack:
    return self.swap()


def _T(self: LowRankStack, *_: Any) -> LowRankStack:
    return self.swap() if self.weight.ndim == 2 else NotImplemented


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    torch._grouped_mm: _grouped,
    Tensor.__getitem__: _getitem,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.mT.__get__: _mT,  # type: ignore[attr-defined]
    Tensor.T.__get__: _T,  # type: ignore[attr-defined]
    Tensor.t: _T,
    torch.t: _T,
}
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_meta")),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
}
