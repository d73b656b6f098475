"""``LoRALinear``: an nn.Linear with a frozen weight and a trainable low-rank update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftkern import dropout
from peftkern.call import Pair
from peftkern.functional import looked_through, lora_linear, run_pair
from peftkern.nn import initialization
from peftkern.nn.frozen import FrozenBuffers
from peftkern.ops import check, dispatch
from peftkern.weights import DenseWeight, FrozenWeight, split_format

_PARAMETERS = ("weight", "bias", "lora_A", "lora_B", "lora_bias")


def why_not_linear(module: nn.Module) -> str | None:
    """The reason why an adapter cannot take the module's place, or None: for a plain nn.Linear or Conv1D."""
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    conv1d = kind == "Conv1D"
    if not (isinstance(module, nn.Linear) or conv1d):
        return f"a {kind} is no nn.Linear or Conv1D"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and does not call it, so an adapter would have no effect"
    if not conv1d and type(module).forward is not nn.Linear.forward:
        return f"{kind} has a forward of its own"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is no plain floating Parameter but a {type(weight).__name__}"
    if not conv1d and weight.shape != (module.out_features, module.in_features):
        return f"its weight is not [N, K] but {tuple(weight.shape)}"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if "forward" in module.__dict__ or any(getattr(module, name) for name in hooks):
        return f"the {kind} has hooks or a forward of its own, which would be lost"
    return None


class LoRALinear(FrozenBuffers):
    """A linear layer whose weight is frozen and whose low-rank update is trained, fused.

    Formula:
        y = x W^T + bias + c (D(x) A^T) B^T + c lora_bias, with c = lora_alpha / r (rsLoRA: lora_alpha / sqrt(r)).

    Args:
        in_features, out_features: K and N.
        r: rank, at least 1.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an element of x before A, in training mode.
        bias: whether the base layer has a bias (frozen, as PEFT's bias="none"; set requires_grad to train it).
        lora_bias: whether the update has a bias; trained, multiplied by the scaling.
        use_rslora: rank-stabilised scaling.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal, B zero), or "pissa", "olora",
            "pissa_niter_<n>", which take the start c B A out of the weight. The weight is then another one, and what it
            lost is kept in the buffers removed_A [r, K] and removed_B [N, r]: it was weight + removed_B removed_A.
        device, dtype: of the base layer. The adapter is float32 where dtype is a 16-bit float, else of dtype.

    A weight in another format than "dense" (``from_linear``) is held as buffers, and ``weight`` is None; ``state_dict``
    has it under the names of ``FrozenWeight.state_dict``. FSDP2 shards parameters, so every rank holds such a weight
    whole, unless ``peftkern.shardable`` has made a parameter of bytes of it, which is sharded and gathered as such.

    Shapes: x [..., K] -> y [..., N]; weight [N, K], bias [N], lora_A [r, K], lora_B [N, r], lora_bias [N].
    With every initialisation the layer starts as its base (PiSSA, OLoRA: to the rounding of the new weight).

    Raises: ValueError for r < 1, a dropout that is no probability or an unknown initialisation; at the call those of
        ``lora_linear``.
    Deterministic: as ``lora_linear``.
    Source: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA); ``peftkern.nn.initialization``.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    lora_bias: nn.Parameter | None
    merged_weight: Tensor | None
    merged_bias: Tensor | None
    removed_A: Tensor | None
    removed_B: Tensor | None
    conv1d: type[nn.Module] | None  # the class whose place the layer took, where its weight is [K, N]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        *,
        lora_dropout: float = 0.0,
        bias: bool = True,
        lora_bias: bool = False,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device, dtype)
        self._adopt(base.weight, base.bias, r, lora_alpha, lora_dropout, lora_bias, use_rslora, init_lora_weights)

    def _adopt(self, weight, bias, r, lora_alpha, lora_dropout, lora_bias, use_rslora, init_lora_weights) -> None:
        """Freeze a base and put a fresh adapter beside it."""
        if r < 1:
            raise ValueError(f"r is at least 1, got {r}")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"lora_dropout={lora_dropout} is not a probability")
        initialization.check_weight(weight, r, init_lora_weights)
        self.out_features, self.in_features = weight.shape
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.init_lora_weights, self.conv1d = init_lora_weights, None
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.weight = weight.requires_grad_(False)
        self.held = None
        self.register_parameter("bias", None if bias is None else bias.requires_grad_(False))
        wide = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **wide))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **wide))
        trained_bias = nn.Parameter(torch.empty(self.out_features, **wide)) if lora_bias else None
        self.register_parameter("lora_bias", trained_bias)
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)
        self.register_buffer("removed_A", None)
        self.register_buffer("removed_B", None)
        if initialization.changes_the_base(init_lora_weights):
            self._take_out_of_weight()
        self.reset_lora_parameters()

    @torch.no_grad()
    def _take_out_of_weight(self) -> None:
        """PiSSA, OLoRA: a weight of the layer's own, without what the adapter starts as."""
        assert self.weight is not None  # quantised later, if at all
        A, B, residual = initialization.split_weight(self.weight, self.r, self.scaling, self.init_lora_weights)
        self.weight = nn.Parameter(residual, requires_grad=False)
        self.removed_A, self.removed_B = A, self.scaling * B

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """The adapter as it started (a Kaiming or Gaussian A is drawn anew), lora_bias zero."""
        if self.removed_A is not None and self.removed_B is not None:
            self.lora_A.copy_(self.removed_A)
            self.lora_B.copy_(self.removed_B / self.scaling)
        else:
            initialization.init_factors(self.lora_A, self.lora_B, self.init_lora_weights)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Base and adapter as a new layer's, where ``to_empty`` has left memory of no value.

        Raises: NotImplementedError for a quantised base, which is loaded instead.
        """
        if self.held is not None:
            raise NotImplementedError(f"a {self.held.format} base has no initial values: load its state_dict")
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]
        if self.removed_A is not None:
            self._take_out_of_weight()
        self.reset_lora_parameters()

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """The weight [N, K] that the layer was given: ``weight``, and with PiSSA and OLoRA what they took out of it."""
        base = self.frozen_weight()
        weight = base if isinstance(base, Tensor) else base.materialize(base.dtype)
        if self.removed_A is None or self.removed_B is None:
            return weight
        wide = self.removed_A.dtype
        with torch.autocast(weight.device.type, enabled=False):
            return (weight.to(wide) + self.removed_B @ self.removed_A).to(weight.dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | Any,
        r: int,
        lora_alpha: float,
        *,
        lora_dropout: float = 0.0,
        lora_bias: bool = False,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        weight_format: str = "dense",
        base_compute: str | None = None,
        **options: Any,
    ) -> LoRALinear:
        """Put an adapter on an existing layer, sharing its storage unless its weight is quantised.

        Args:
            linear: an nn.Linear, whose parameters are taken as they are (ties survive; they are frozen), or GPT-2's
                ``Conv1D``, whose [K, N] weight is shared through a transposed view. PiSSA and OLoRA leave it untouched
                and give the layer a weight of its own.
            r, lora_alpha, lora_dropout, lora_bias, use_rslora, init_lora_weights: as in the constructor.
            weight_format, options: what the frozen weight is converted to, as in ``FrozenWeight.quantize``.
            base_compute: "fp8", of an fp8 weight: y and dx multiply it with x and dy rounded to e4m3, on FP8 tensor
                cores where they are (``FP8ComputedWeight`` has the formula and its errors). Not saved with the weight.
        Raises: TypeError for any other module, with the reason; ValueError as the constructor and
            ``FrozenWeight.quantize``.
        """
        reason = why_not_linear(linear)
        if reason is not None:
            raise TypeError(f"from_linear takes an nn.Linear or a Conv1D with a plain floating weight: {reason}")
        conv1d = None if isinstance(linear, nn.Linear) else type(linear)
        weight = linear.weight if conv1d is None else nn.Parameter(linear.weight.detach().t(), requires_grad=False)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(weight, linear.bias, r, lora_alpha, lora_dropout, lora_bias, use_rslora, init_lora_weights)
        layer.conv1d = conv1d
        if weight_format != "dense" or base_compute is not None or options:
            dense: Any = layer.weight
            layer.hold(FrozenWeight.quantize(dense, weight_format, base_compute=base_compute, **options))
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] for x [..., K]; the merged weight alone while merged."""
        if self.merged_weight is not None:
            return nn.functional.linear(x, self.merged_weight, self.merged_bias)
        pair = self._plain_pair(x)
        if pair is not None:
            return run_pair(x, pair)
        return lora_linear(
            x,
            self.frozen_weight(),
            self.lora_A,
            self.lora_B,
            self.scaling,
            bias=self.bias,
            lora_bias=self.lora_bias,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def _plain_pair(self, x: Tensor) -> Pair | None:
        """The layer's own tensors as ``run_pair`` takes them, where all is plain: a dense base, x in its dtype."""
        found = [self._parameters.get(name) for name in _PARAMETERS]
        if (
            torch.compiler.is_compiling()
            or self.held is not None
            or x.__class__ is not Tensor
            or any(parameter is not None and type(parameter) is not nn.Parameter for parameter in found)
            or x.is_nested
            or dispatch.autocasting(x.device.type)
            or looked_through()
            or not isinstance(self.scaling, (int, float))
        ):
            return None
        weight, bias, A, B, lora_bias = found
        if weight is None or A is None or B is None or weight.requires_grad or not math.isfinite(self.scaling):
            return None
        pair = Pair(DenseWeight(weight), A, B, bias, lora_bias, float(self.scaling), None, 0.0, None, "base")
        if not check.fits(pair, x):
            return None
        p = self.lora_dropout if self.training else 0.0
        if dropout.threshold(p):
            pair = pair._replace(dropout_p=p, rng_state=dropout.draw_rng_state(x.device))
        return pair

    @torch.no_grad()
    def merge(self) -> None:
        """Run on W + c B A (computed in fp32, rounded once) from now on; the base and state_dict stay as they are.

        A second merge is a RuntimeError, one into a quantised base a NotImplementedError. Changes of the
        adapter are not seen until unmerge and merge.
        """
        if self.merged_weight is not None:
            raise RuntimeError("already merged: call unmerge() first")
        if self.held is not None:
            raise NotImplementedError(
                f"a {self.held.format} weight is not merged into: to quantise the sum would round the update away. "
                "to_linear() returns the sum in full"
            )
        self.merged_weight, self.merged_bias = self._sum()

    def _sum(self) -> tuple[Tensor, Tensor | None]:
        """W + c B A and bias + c lora_bias, in the base's dtype."""
        base = self.frozen_weight()
        wide = torch.promote_types(base.dtype, torch.float32)
        with torch.autocast(self.lora_A.device.type, enabled=False):
            delta = self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))
            whole = base.to(wide) if isinstance(base, Tensor) else base.materialize(wide)
        bias = None if self.bias is None else self.bias.detach()
        if self.lora_bias is not None:
            own = 0.0 if self.bias is None else self.bias.to(wide)
            bias = (own + self.scaling * self.lora_bias.to(wide)).to(base.dtype)
        return (whole + delta).to(base.dtype), bias

    def unmerge(self) -> None:
        """Drop the merged weight; the base is bit-identical to what it was. Raises: RuntimeError where not merged."""
        if self.merged_weight is None:
            raise RuntimeError("not merged")
        self.merged_weight = self.merged_bias = None

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear with its own copy of the merged weight; this layer stays as it is."""
        weight, bias = self.merged_weight, self.merged_bias
        if weight is None:
            weight, bias = self._sum()
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, "meta", weight.dtype)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.merged_weight is not None:  # never stale
            self.unmerge()
            self.merge()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, bias={self.bias is not None}, "
            f"lora_bias={self.lora_bias is not None}, use_rslora={self.use_rslora}, "
            f"init_lora_weights={self.init_lora_weights!r}" + self._format_repr()
        )

    def _format_repr(self) -> str:
        if self.held is None:
            return ""
        stored, base_compute = split_format(self.held.format)
        return f", weight_format={stored}" + ("" if base_compute is None else f", base_compute={base_compute}")
