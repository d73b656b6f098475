"""A module's frozen weight in a format of its own: buffers that keep their dtypes, and entries of the state_dict."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkern.weights import FrozenWeight

_ALIGNMENT = 16  # bytes, of each tensor's place among the others


class Piece(NamedTuple):
    """Where one of a weight's tensors is among the bytes of all of them."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, data: Tensor) -> Tensor:
        """The tensor, on the bytes' memory."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return data[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class Held(NamedTuple):
    """The facts of a held weight beside its tensors. ``pieces`` where they are one parameter."""

    format: str
    group_size: int
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: int
    pieces: tuple[Piece, ...] = ()


class FrozenBuffers(nn.Module):
    """A module with a ``weight``: its own parameter, or a FrozenWeight held as buffers ``weight_0``, ``weight_1``, ...

    The buffers move with the module and never change their dtype, whatever ``module.to(dtype)`` or ``half()`` ask for.
    In the state_dict they are what ``FrozenWeight.state_dict`` calls them; a weight that is loaded has to have the
    format, shape and grouping of the one that is there.

    ``hold_bytes`` makes them one parameter of bytes, ``weight_bytes``, which FSDP2 shards. While it is sharded it is in
    the state_dict under that name, like any other parameter; whoever holds bytes loads either kind.
    """

    weight: nn.Parameter | None
    weight_bytes: nn.Parameter
    held: Held | None

    def hold(self, weight: FrozenWeight) -> None:
        """Take a weight's tensors over, in the place of the parameter."""
        self.weight = None
        for i, tensor in enumerate(weight.tensors):
            self.register_buffer(f"weight_{i}", tensor, persistent=False)
        self.held = Held(weight.format, weight.group_size, weight.shape, weight.dtype, len(weight.tensors))

    @torch.no_grad()
    def hold_bytes(self) -> bool:
        """Make the buffers one frozen parameter of bytes. Returns: False where there are none, for a dense weight."""
        if self.held is None or self.held.pieces:
            return False
        tensors = self._tensors()
        pieces, end = [], 0
        for tensor in tensors:
            pieces.append(Piece(end, tensor.dtype, tuple(tensor.shape)))
            end += -(-tensor.numel() * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT
        data = torch.zeros(end, dtype=torch.uint8, device=tensors[0].device)
        for i, (piece, tensor) in enumerate(zip(pieces, tensors, strict=True)):
            piece.of(data).copy_(tensor)
            del self._buffers[f"weight_{i}"]
        self.weight_bytes = nn.Parameter(data, requires_grad=False)
        self.held = self.held._replace(pieces=tuple(pieces))
        return True

    def _tensors(self) -> list[Tensor]:
        """Those of the held weight; gathered from all ranks, which have to ask together, where it is sharded."""
        assert self.held is not None
        if not self.held.pieces:
            return [self.get_buffer(f"weight_{i}") for i in range(self.held.tensors)]
        data: Any = self.weight_bytes
        whole = data.full_tensor() if hasattr(data, "full_tensor") else data
        return [piece.of(whole) for piece in self.held.pieces]

    def frozen_weight(self) -> Tensor | FrozenWeight:
        """The weight as ``lora_linear`` takes it."""
        if self.held is None:
            assert self.weight is not None
            return self.weight
        data, scale, *tables = self._tensors()
        weight = FrozenWeight.from_operands(
            self.held.format, data, scale, self.held.group_size, tuple(tables), self.held.shape
        )
        weight.dtype = self.held.dtype
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        if self.held is None or self.held.pieces:
            return super()._apply(fn, recurse)
        names = [f"weight_{i}" for i in range(self.held.tensors)]
        before = [self._buffers.pop(name) for name in names]
        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in zip(names, before, strict=True):
                self._buffers[name] = tensor
        for name, tensor in zip(names, before, strict=True):
            assert tensor is not None
            found = fn(tensor)
            self._buffers[name] = found if found.dtype == tensor.dtype else tensor.to(found.device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.held is not None and not self._is_sharded():
            destination.pop(f"{prefix}weight_bytes", None)
            weight = self.frozen_weight()
            assert isinstance(weight, FrozenWeight)
            destination.update(weight.state_dict(f"{prefix}weight"))

    def _is_sharded(self) -> bool:
        return hasattr(self._parameters.get("weight_bytes"), "full_tensor")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        name = f"{prefix}weight"
        if self.held is None or self._is_sharded() or (self.held.pieces and f"{name}_bytes" in state_dict):
            unexpected_keys += unexpected
            return
        if self.held.pieces:
            missing_keys.remove(f"{name}_bytes")
        mine = [key for key in state_dict if key == name or key.startswith(f"{name}.")]
        unexpected_keys += [key for key in unexpected if key not in mine]
        if not mine:
            missing_keys.append(name)
            return
        try:
            weight = FrozenWeight.from_state_dict(state_dict, name)
            self._require_like(weight)  # but for base_compute, which is no fact of what is saved
        except ValueError as error:
            error_msgs.append(str(error))
            return
        assert self.held is not None
        self.held = self.held._replace(dtype=weight.dtype)
        for i, (own, tensor) in enumerate(zip(self._tensors(), weight.tensors, strict=True)):
            if self.held.pieces:
                own.detach().copy_(tensor)
            elif own.is_meta or local_metadata.get("assign_to_params_buffers", False):
                self._buffers[f"weight_{i}"] = tensor
            else:
                own.copy_(tensor)

    def _require_like(self, weight: FrozenWeight) -> None:
        """Raise ValueError unless a weight has this one's format, shape and grouping."""
        own = self.frozen_weight()
        assert isinstance(own, FrozenWeight)
        for what, mine, theirs in (
            ("format", own.stored, weight.format),
            ("shape", own.shape, weight.shape),
            ("group size", own.group_size, weight.group_size),
            ("parts", [list(t.shape) for t in own.tensors], [list(t.shape) for t in weight.tensors]),
        ):
            if mine != theirs:
                raise ValueError(f"the frozen weight's {what}: {mine} here, {theirs} in the state_dict")
