"""``LoRALinear``: an nn.Linear with a frozen weight and a trainable low-rank update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.functional import lora_linear
from peftkern.nn.frozen import FrozenBuffers
from peftkern.weights import FrozenWeight


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
        device, dtype: of the base layer. The adapter is float32 where dtype is a 16-bit float, else of dtype.

    A weight in another format than "dense" (``from_linear``) is held as buffers, and ``weight`` is None; ``state_dict``
    has it under the names of ``FrozenWeight.state_dict``. FSDP2 shards parameters, so every rank holds such a weight
    whole: its blocks do not end where rows do, and a shard of rows could not be decoded.

    Shapes: x [..., K] -> y [..., N]; weight [N, K], bias [N], lora_A [r, K], lora_B [N, r], lora_bias [N].
    A starts Kaiming-uniform and B zero, as in PEFT, so the layer starts as its base.

    Raises: ValueError for r < 1 or a dropout that is no probability; those of ``lora_linear`` at the call.
    Deterministic: as ``lora_linear``.
    Source: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    lora_bias: nn.Parameter | None
    merged_weight: Tensor | None
    merged_bias: Tensor | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device, dtype)
        self._adopt(base.weight, base.bias, r, lora_alpha, lora_dropout, lora_bias, use_rslora)

    def _adopt(self, weight, bias, r, lora_alpha, lora_dropout, lora_bias, use_rslora) -> None:
        """Freeze a base and put a fresh adapter beside it."""
        if r < 1:
            raise ValueError(f"r is at least 1, got {r}")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"lora_dropout={lora_dropout} is not a probability")
        self.out_features, self.in_features = weight.shape
        frozen = isinstance(weight, FrozenWeight)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.register_parameter("weight", None if frozen else weight.requires_grad_(False))
        self.hold(weight if frozen else None)
        self.register_parameter("bias", None if bias is None else bias.requires_grad_(False))
        wide = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **wide))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **wide))
        trained_bias = nn.Parameter(torch.empty(self.out_features, **wide)) if lora_bias else None
        self.register_parameter("lora_bias", trained_bias)
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A Kaiming-uniform, B and lora_bias zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

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
        weight_format: str = "dense",
        **options: Any,
    ) -> LoRALinear:
        """Put an adapter on an existing layer, sharing its storage unless its weight is quantised.

        Args:
            linear: an nn.Linear, whose parameters are taken as they are (ties survive; they are frozen), or GPT-2's
                ``Conv1D``, whose [K, N] weight is shared through a transposed view.
            r, lora_alpha, lora_dropout, lora_bias, use_rslora: as in the constructor.
            weight_format, options: what the frozen weight is converted to, as in ``FrozenWeight.quantize``.
        Raises: TypeError for any other module; ValueError as the constructor and ``FrozenWeight.quantize``.
        """
        if isinstance(linear, nn.Linear) and type(linear.weight) is nn.Parameter and linear.weight.is_floating_point():
            weight = linear.weight
            if weight.shape != (linear.out_features, linear.in_features):
                raise TypeError(f"the weight of {type(linear).__name__} is not [N, K] but {tuple(weight.shape)}")
        elif type(linear).__name__ == "Conv1D" and isinstance(getattr(linear, "weight", None), nn.Parameter):
            weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)
        else:
            kind = type(linear).__name__
            raise TypeError(f"from_linear takes an nn.Linear or a Conv1D with a plain floating weight, got {kind}")
        if weight_format != "dense" or options:
            weight = FrozenWeight.quantize(weight, weight_format, **options)  # type: ignore[assignment]
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(weight, linear.bias, r, lora_alpha, lora_dropout, lora_bias, use_rslora)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] for x [..., K]; the merged weight alone while merged."""
        if self.merged_weight is not None:
            return nn.functional.linear(x, self.merged_weight, self.merged_bias)
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
            f"lora_bias={self.lora_bias is not None}, use_rslora={self.use_rslora}"
            + ("" if self.held is None else f", weight_format={self.held.format}")
        )
