"""The frozen weights of bitsandbytes', torchao's, transformers' and gptqmodel's layers, as the kernels take them.

None of them is imported.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import multi_lora
from peftkern.call import Rows, Update
from peftkern.integrations import gptqmodel, torchao
from peftkern.integrations.bitsandbytes import from_bitsandbytes, int8_operands, quant_state, read_bitsandbytes
from peftkern.integrations.fine_grained_fp8 import from_fp8_linear, read_fp8_linear
from peftkern.ops import dispatch
from peftkern.weights import FrozenWeight

_BASES = {
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.LinearNF4",
    "bitsandbytes.nn.modules.LinearFP4",
    "bitsandbytes.nn.modules.Linear8bitLt",
    *(f"torchao.quantization.{kind}" for kind in torchao.KINDS),  # the weight of a plain nn.Linear
}
_OF_TORCHAO = ("zero_point", "block_size", *torchao.OF_INPUTS)
_FP8_LINEAR = "transformers.integrations.finegrained_fp8.FP8Linear"
_WHOLE = {_FP8_LINEAR, gptqmodel.GPTQ, gptqmodel.AWQ}  # which are not read as units of FSDP
_PLAIN = (nn.Parameter, Tensor)  # bitsandbytes' weights are where FSDP has gathered them
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)
_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], FrozenWeight]] = weakref.WeakKeyDictionary()


def is_quantised(base: Any) -> bool:
    """Whether a base layer is bitsandbytes' own Linear4bit or Linear8bitLt, transformers' FP8Linear, gptqmodel's plain
    TorchLinear or AwqTorchLinear, or an nn.Linear with one of torchao's weights; no subclass of somebody else's."""
    kind = type(base)
    return _name(kind) in _WHOLE or is_bitsandbytes(type(base._parameters.get("weight")) if kind is nn.Linear else kind)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_bitsandbytes(kind: type) -> bool:
    """Whether this is one of bitsandbytes' classes of layers; or torchao's of weights."""
    return _name(kind) in _BASES


def frozen(base: Any) -> tuple[FrozenWeight, torch.dtype | None] | str:
    """(weight, the dtype it is multiplied in or None for x's own), or why it cannot be taken.

    The weight shares the layer's memory, but for that of gptqmodel's layers.
    """
    return _traced(base) if torch.compiler.is_compiling() else _held(base)


def _traced(base: Any) -> tuple[FrozenWeight, torch.dtype | None] | str:
    """``frozen`` in a compiler's graph, which reads the layer at every call, and judges it when it is traced."""
    reason = _why_not(base)
    if reason is not None:
        return reason
    if "qweight" in base._buffers:
        return "a compiler traces it, and its int4 weight is put in order outside of graphs"
    if type(base) is nn.Linear:
        return torchao.read_torchao(base.weight), None
    if _name(type(base)) == _FP8_LINEAR:
        return read_fp8_linear(base), None
    return read_bitsandbytes(base), getattr(base, "compute_dtype", None)


def _why_not(base: Any) -> str | None:
    found = _held(base)
    return found if isinstance(found, str) else None


_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result imports the compiler


def _held(base: Any) -> tuple[FrozenWeight, torch.dtype | None] | str:
    """``frozen`` elsewhere. The weight is made once and again whenever the layer holds other tensors."""
    weight = base._buffers["qweight"] if "qweight" in base._buffers else base._parameters["weight"]
    if weight is None:
        return "its base weight is not there"
    state, data = weight.__dict__, weight
    held: tuple[Any, ...]
    copied: tuple[Any, ...]
    if "qweight" in base._buffers:
        copied = gptqmodel.buffers(base)
        held, compute = (*copied, *(getattr(base, name, None) for name in gptqmodel.BESIDE)), None
    elif "weight_scale_inv" in base._parameters:
        if weight.requires_grad:
            return "its base weight requires grad"
        copied = (base._parameters["weight_scale_inv"],)
        held, compute = (*copied, base._parameters.get("activation_scale"), base.block_size), None
    elif "qdata" in state:
        data, copied = weight.qdata, (weight.scale,)
        held, compute = (data, *copied, *map(state.get, _OF_TORCHAO)), None
    elif "quant_state" in state or "quant_state" in base.__dict__:
        found, copied = quant_state(base), ()
        held = (found, *_parts_of(found))
        compute = base.compute_dtype
        if not base.compute_type_is_set:
            return "its compute dtype is what bitsandbytes chooses at its first call"
    else:
        if base.state.has_fp16_weights:
            return "its int8 base keeps its weight in fp16"
        copied = (int8_operands(base)[1],)
        held, compute = (state.get("CB"), state.get("SCB"), base.state.CB, base.state.SCB), None
    key = (weight, (data.data_ptr(), *map(_version, copied)), *held)
    entry = _known.get(base)
    if entry is None or not _same(entry[0], key):
        plain = type(weight) in _PLAIN and not getattr(held[0], "packing_format_for_cpu", False)
        checked = plain and entry is not None and _same(entry[0], (*entry[0][:2], *held))
        try:
            entry = _known[base] = (key, _taken(base, weight, checked))
        except ValueError as error:
            return f"its base weight cannot be taken: {error}"
    return entry[1], compute


def forget(base: Any) -> None:
    """Let go of what was taken of a base layer, which somebody may shard before its next call."""
    _known.pop(base, None)


def _taken(base: Any, weight: Any, checked: bool) -> FrozenWeight:
    """The weight, of tensors that backward can save: whoever asks first may be evaluating, and the next one trains.

    Where only its place is new, as after each of FSDP's gathers, it is ``checked``.
    """
    found: FrozenWeight
    with torch.inference_mode(False):
        if "qweight" in base._buffers:
            found = gptqmodel.from_gptqmodel(base)
        elif "weight_scale_inv" in base._parameters:
            found = from_fp8_linear(base)
        elif "qdata" in weight.__dict__:
            found = torchao.from_torchao(weight)
        else:
            found = read_bitsandbytes(base) if checked else from_bitsandbytes(base)
        return found.mapped(_alias) if any(tensor.is_inference() for tensor in found.tensors) else found


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory, which is none of inference mode's."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _parts_of(state: Any) -> tuple[Any, ...]:
    """What else of a quant_state may be replaced."""
    if state is None:
        return ()
    nested = state.state2
    return (state.absmax, state.code, state.offset, *(() if nested is None else (nested.absmax, nested.code)))


def _version(copied: Tensor | None) -> tuple[int, int]:
    """The place of what may be copied, such as scales, and how often it was written to, where that is known."""
    return (0, 0) if copied is None else (copied.data_ptr(), 0 if copied.is_inference() else copied._version)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two keys hold the same objects, the same address, and the same version of what is copied."""
    if len(one) != len(other) or one[1] != other[1]:
        return False
    return one[0] is other[0] and all(a is b for a, b in zip(one[2:], other[2:], strict=True))


def dtype_of_products(x: Tensor, compute: torch.dtype | None) -> torch.dtype:
    """What x is rounded to: the base's compute dtype; without one autocast's, or x's own.

    The products with the adapter have it too. PEFT takes these from x in the adapter's dtype, or autocast's.
    """
    if compute is not None:
        return compute
    device = x.device.type
    return torch.get_autocast_dtype(device) if dispatch.autocasting(device) else x.dtype


def follows_autocast(base: Any) -> bool:
    """Whether y has autocast's dtype where that is on, and not x's: where bitsandbytes trains with F.linear."""
    return base.training and "state" in base.__dict__ and base._parameters["weight"].device.type in ("cpu", "xpu")


def why_not_dtype(x: Tensor, dtype: torch.dtype) -> str | None:
    """bitsandbytes and torchao round x to ``dtype`` and y back to x's."""
    if x.dtype == dtype or x.dtype in _ROUNDED:
        return None
    return f"x is {x.dtype}, and the quantised base computes in {dtype}"


def run_rows(
    x: Tensor, weight: FrozenWeight, bias: Tensor | None, compute: torch.dtype | None, updates: Sequence[Update],
    rows: Rows, follows: bool = False,
) -> Tensor:  # fmt: skip
    """``multi_lora.run_rows`` over a base that rounds x to a dtype of its own; y is in x's, or (``follows``) in it."""
    dtype = dtype_of_products(x, compute)
    with torch.autocast(x.device.type, enabled=False):  # x is in the dtype that autocast asks for
        y = multi_lora.run_rows(x.to(dtype), weight, None, updates, rows)
    y = y if follows else y.to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)
