"""The operators forward and backward on DTensors: which shards each rank multiplies, what its results are shards of.

One layout per mesh dimension, chosen by the frozen weight, which is never moved; the other operands come to it:

    layout   w_data    lora_A    lora_B    x         y         s         dx        dA        dB        biases' gradients
    column   Shard(0)  whole     Shard(0)  whole     Shard(1)  whole     Partial   Partial   Shard(0)  Shard(0)
    row      Shard(1)  Shard(1)  whole     Shard(1)  Partial   Partial   Shard(1)  Shard(1)  Partial   whole
    batch    whole     whole     whole     Shard(0)  Shard(0)  Shard(0)  Shard(0)  Partial   Partial   Partial
    whole    whole everywhere

Biases are Shard(0) in ``column``; in ``row`` the first rank adds them. Parameters' gradients leave as their parameter
lies. Dropout counts rows and columns of the whole x: in ``column`` every rank sees it; in ``row`` a rank counts its own
columns, in a stream of its own, so the mask is not the one of an unsharded call; ``batch`` is not taken with dropout.
A call of one base and one update is taken, of all rows; any other, and those of DoRA, are refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard

from peftkern import call as calls
from peftkern.call import Base, Call, Update
from peftkern.weights import FrozenWeight

WHOLE, FIRST, SECOND, SUM = Replicate(), Shard(0), Shard(1), Partial()
_STREAM = 0x9E3779B97F4A7C15 - 2**64  # an odd step between the ranks' dropout offsets, as int64


class _Layout(NamedTuple):
    """Placements along one mesh dimension; ``d_*`` of the gradients as they are computed."""

    w_data: Placement
    lora_A: Placement
    lora_B: Placement
    vectors: Placement
    x: Placement
    s: Placement
    y: Placement
    dy: Placement
    dx: Placement
    d_lora_A: Placement
    d_lora_B: Placement
    d_vectors: Placement


_COLUMN = _Layout(FIRST, WHOLE, FIRST, FIRST, WHOLE, WHOLE, SECOND, SECOND, SUM, SUM, FIRST, FIRST)
_ROW = _Layout(SECOND, SECOND, WHOLE, WHOLE, SECOND, SUM, SUM, WHOLE, SECOND, SECOND, SUM, WHOLE)
_BATCH = _Layout(WHOLE, WHOLE, WHOLE, WHOLE, FIRST, FIRST, FIRST, FIRST, FIRST, SUM, SUM, SUM)
_WHOLE = _Layout(*[WHOLE] * 12)


class _Sharded:
    """One call's tensors by name, its mesh, and its layout along each of the mesh's dimensions."""

    def __init__(self, call: Call, rows: str, **tensors: Tensor | None) -> None:
        """``tensors``: those beside the call's; ``rows`` names the one whose first dimension counts tokens."""
        if len(call.bases) != 1 or len(call.updates) != 1 or call.rows is not None:
            raise NotImplementedError(
                f"a call with DTensors has one base and one update of all rows, got {len(call.bases)} and "
                f"{len(call.updates)}{'' if call.rows is None else ' of some rows'}"
            )
        (self.base,), (self.update,), self.call = call.bases, call.updates, call
        weight = self.base.weight
        self.named = {"w_data": weight.data, "w_scale": weight.scale, "bias": self.base.bias, **tensors}
        held: Any = self.update[: calls.UPDATE]
        self.named |= dict(zip(self.update._fields, held, strict=False))
        self.mesh: DeviceMesh = next(v.device_mesh for v in self.named.values() if isinstance(v, DTensor))
        for name, value in self.named.items():
            if isinstance(value, DTensor) and value.device_mesh != self.mesh:
                raise ValueError(
                    f"all DTensors must be on one mesh, got {name} on {value.device_mesh}, not {self.mesh}"
                )
        if weight.format not in ("dense", "int8"):
            raise NotImplementedError(f"a weight of format {weight.format!r} cannot be a DTensor")
        weights, tokens = self.placements("w_data"), self.placements(rows)
        self.layouts = [self._layout(w, t) for w, t in zip(weights, tokens, strict=True)]

    def placements(self, name: str) -> tuple[Placement, ...]:
        """A plain tensor is the same on every rank."""
        value = self.named[name]
        return value.placements if isinstance(value, DTensor) else (WHOLE,) * self.mesh.ndim

    def _layout(self, weight: Placement, tokens: Placement) -> _Layout:
        if weight == FIRST:
            return _COLUMN
        if weight == SECOND:
            return _ROW
        if weight != WHOLE:
            raise NotImplementedError(
                f"a frozen weight is Shard(0), Shard(1) or Replicate() along a mesh, not {weight}"
            )
        return _BATCH if tokens == FIRST and self.named["rng_state"] is None else _WHOLE

    def local(self, name: str, field: str = "") -> Tensor | None:
        """This rank's part of an argument in the layouts' placements."""
        value, wanted = self.named[name], [getattr(layout, field or name) for layout in self.layouts]
        if isinstance(value, DTensor):
            if list(value.placements) != wanted:  # a sum is never asked for, only kept: s of a row layout
                value = value.redistribute(placements=wanted)
            return value.to_local()
        if value is not None and any(placement != WHOLE for placement in wanted):
            raise TypeError(f"{name} must be a DTensor where the frozen weight or x is sharded along {wanted}")
        return value

    def local_arguments(self) -> list[Any]:
        """The call of this rank's parts, as the operators take it."""
        found = {name: self.local(name) for name in ("w_data", "lora_A", "lora_B")}
        rows = [rank for rank, layout in zip(self._ranks(), self.layouts, strict=True) if layout is _ROW]
        for name in ("bias", "lora_bias", "w_scale"):
            wanted = "vectors" if name != "w_scale" else "lora_B"  # one per output channel
            value = self.local(name, wanted)
            # Every rank of a row layout adds its vectors to its part of the sum: all but the first add zero.
            found[name] = torch.zeros_like(value) if value is not None and name != "w_scale" and any(rows) else value
        found["scaling_tensor"] = _whole(self.named["scaling_tensor"])
        found["rng_state"] = self._stream(_whole(self.named["rng_state"]), rows)
        data: Any = found["w_data"]
        weight = self.base.weight
        local = FrozenWeight.from_operands(weight.format, data, found["w_scale"], weight.group_size, (), data.shape)
        names: Any = self.update._fields[: calls.UPDATE]
        update = Update._make((*(found[name] for name in names), *self.update[calls.UPDATE :]))
        bases = (Base(local, found["bias"]),)
        return calls.arguments(self.call._replace(bases=bases, updates=(update,)))

    def _ranks(self) -> list[int]:
        return [self.mesh.get_local_rank(dimension) for dimension in range(self.mesh.ndim)]

    def _stream(self, rng_state: Tensor | None, rows: list[int]) -> Tensor | None:
        """The mesh's first rank's state, so that ranks need not be seeded alike; a step apart along row layouts."""
        if rng_state is None:
            return None
        # Gathered, since torch.compile traces no broadcast.
        every = DTensor.from_local(rng_state, self.mesh, [FIRST] * self.mesh.ndim, run_check=False)
        rng_state = every.full_tensor()[:2]
        step = 0
        for rank in rows:
            step = step * 65537 + rank
        return rng_state + torch.tensor([0, _STREAM], device=rng_state.device) * step if step else rng_state

    def wrap(self, local: Tensor, field: str, shape: tuple[int, ...]) -> DTensor:
        """A result as a contiguous DTensor of a global shape."""
        placements = [getattr(layout, field) for layout in self.layouts]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _whole(value: Tensor | None) -> Tensor | None:
    return value.full_tensor() if isinstance(value, DTensor) else value


def forward(_: type, operator: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> list[Tensor]:
    """``torch.ops.peftkern.forward`` where an operand is a DTensor: y and s are."""
    x, *rest = arguments
    sharded = _Sharded(calls.from_arguments(*rest), "x", x=x)
    y, s = operator(sharded.local("x"), *sharded.local_arguments())
    M, (N, R) = x.shape[0], sharded.update.lora_B.shape
    return [sharded.wrap(y, "y", (M, N)), sharded.wrap(s, "s", (M, R))]


def backward(_: type, operator: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> list[Tensor]:
    """``torch.ops.peftkern.backward`` where an operand is a DTensor: so is every gradient."""
    (dy, *_), x, (s, *_), *rest = arguments
    *fields, need_x, need_bias, need_A, need_B, need_lora_bias = rest
    sharded = _Sharded(calls.from_arguments(*fields), "dy", dy=dy, x=x, s=s)
    lists = [[sharded.local("dy")], sharded.local("x"), [sharded.local("s")]]
    local = operator(*lists, *sharded.local_arguments(), need_x, need_bias, need_A, need_B, need_lora_bias)
    flags = (need_x, *need_bias, *need_A, *need_B, *need_lora_bias)
    needed = [name for name, need in zip(("x", "bias", "lora_A", "lora_B", "lora_bias"), flags, strict=True) if need]
    found: list[Tensor] = []
    for name, gradient in zip(needed, local, strict=True):
        parameter: Any = sharded.named[name]
        if name == "x":
            found.append(sharded.wrap(gradient, "dx", (dy.shape[0], sharded.update.lora_A.shape[1])))
        else:
            field = f"d_{name}" if name in ("lora_A", "lora_B") else "d_vectors"
            whole = sharded.wrap(gradient, field, tuple(parameter.shape))
            found.append(whole.redistribute(placements=sharded.placements(name)))
    return found


def refused(_: type, operator: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> NoReturn:
    """An operator without a rule: a DTensor has no address that a kernel could read."""
    raise NotImplementedError(
        f"{operator} has no rule for DTensors: of peftkern's operators, forward and backward have"
    )


def register() -> None:
    """Tell torch.library, once DTensor has been imported."""
    torch.library.register_torch_dispatch("peftkern::forward", DTensor, forward)
    torch.library.register_torch_dispatch("peftkern::backward", DTensor, backward)
    for name in ("row_norm", "dropped_product"):
        torch.library.register_torch_dispatch(f"peftkern::{name}", DTensor, refused)
