"""A LoRA training step on a causal language model, in the variants that are compared, and the check of its gradients.

The variants are separate module trees that share every parameter: the bare model, the same model under PEFT, and PEFT's
model patched by peftkern. In all of them the embeddings' output requires grad, so that each computes dx through every
layer, the first one included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import peftkern
from peftkern import dropout
from peftkern.integrations.bitsandbytes import from_bitsandbytes

Batch = (
    Tensor | Mapping[str, Tensor]
)  # ids [rows, length], of which each asks for the next one; or the model's arguments


def shared_copy(model: nn.Module) -> Any:
    """A second module tree over the same parameters and buffers."""
    own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=own)


def variants(model: Any, config: Any, seed: int = 0) -> dict[str, Any]:
    """{"frozen", "peft", "peftkern"}: the bare model, and one seeded adapter on it run by PEFT and by peftkern.

    The adapter's B is small but not zero, as it is after some training: with PEFT's B = 0 the gradient of A vanishes
    and a check of it would say nothing.
    """
    frozen = shared_copy(model)
    torch.manual_seed(seed)
    plain = get_peft_model(model, config)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    patched = shared_copy(plain)
    peftkern.patch(patched)
    result = {"frozen": frozen, "peft": plain, "peftkern": patched}
    for variant in result.values():
        embeddings = variant.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return result


def loss(model: Any, batch: Batch) -> Tensor:
    """The loss of a batch."""
    arguments = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch
    return model(**arguments).loss


def step(model: Any, batch: Batch) -> float:
    """Forward and backward; the loss. Gradients accumulate."""
    value = loss(model, batch)
    value.backward()
    return value.item()


def adapter_gradients(model: nn.Module, batch: Batch, seed: int) -> tuple[float, Tensor]:
    """Loss and all adapter gradients of one step as one fp64 vector; leaves no gradient behind."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    value = step(model, batch)
    parts = [
        p.grad.double().flatten() for _, p in sorted(model.named_parameters()) if p.requires_grad and p.grad is not None
    ]
    model.zero_grad(set_to_none=True)
    return value, torch.cat(parts)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Frobenius norm, in fp64."""
    truth = truth.double()
    return ((value.double() - truth).norm() / truth.norm()).item()


class PublishedDropout(nn.Module):
    """Dropout by peftkern's published mask, drawn from torch's generator as a patched layer draws it.

    PEFT with this in place of nn.Dropout drops the very elements that peftkern drops after the same seed.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """D(x), shaped like x."""
        if not self.training or not dropout.threshold(self.p):
            return x
        flat = x.reshape(-1, x.shape[-1])
        keep = dropout.keep_mask(*flat.shape, self.p, dropout.draw_rng_state(x.device))
        return torch.where(keep, flat * dropout.scale(self.p), flat.new_zeros(())).view(x.shape)


def with_published_dropout(model: Any, layers: Iterable[str] = ("",)) -> Any:
    """A copy of a PEFT model, over the same parameters, whose ``layers`` drop what peftkern drops; by default all."""
    twin = shared_copy(model)
    for layer in layers:
        for module in list(twin.get_submodule(layer).modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Dropout and child.p > 0:
                    setattr(module, name, PublishedDropout(child.p).train(child.training))
    return twin


def check_gradients(plain: Any, patched: Any, batch: Batch, seed: int = 7) -> dict[str, float]:
    """Loss and adapter-gradient errors of one step of PEFT and of peftkern against the same step one precision up.

    All three drop the same elements. The truth is PEFT's own forward with weights and activations in fp32 for a 16-bit
    base (fp64 for fp32), and a base of 4 bits dequantised: the roundings of the base dtype are what separates it from
    the other two, so PEFT's error is the size that such roundings have in this model, and peftkern may have at most
    twice it (2 err(torch) + 1e-6).

    Returns: losses and relative gradient errors; key "ok" is 1.0 where peftkern keeps within the rule.
    """
    twin = with_published_dropout(plain)
    base = next(p.dtype for p in plain.parameters() if not p.requires_grad)
    wide = torch.float64 if base == torch.float32 else torch.float32
    exact = _dequantised(copy.deepcopy(twin), base).to(wide)
    exact.get_base_model().set_experts_implementation("eager")  # torch's grouped product knows no fp64
    truth_loss, truth = adapter_gradients(exact, batch, seed)
    peft_loss, peft = adapter_gradients(twin, batch, seed)
    report = peftkern.patch(patched)
    own_loss, own = adapter_gradients(with_published_dropout(patched, report.skipped), batch, seed)
    errors = {"peft_gradient_error": relative_error(peft, truth), "peftkern_gradient_error": relative_error(own, truth)}
    losses = {"truth_loss": truth_loss, "peft_loss": peft_loss, "peftkern_loss": own_loss}
    loss_bound = 2 * abs(peft_loss - truth_loss) + _loss_rounding(base) * abs(truth_loss)
    good = errors["peftkern_gradient_error"] <= 2 * errors["peft_gradient_error"] + 1e-6
    return losses | errors | {"loss_bound": loss_bound, "ok": float(good and abs(own_loss - truth_loss) <= loss_bound)}


def _dequantised(model: nn.Module, dtype: torch.dtype) -> Any:
    """A PEFT model, changed in place: a dense layer of the same values where bitsandbytes has one of 4 bits."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if hasattr(getattr(base, "weight", None), "quant_state"):
            weight = from_bitsandbytes(base).materialize(dtype)
            dense = nn.Linear(*weight.T.shape, bias=False, device="meta")
            dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), base.bias
            module.base_layer = dense
    return model


def _loss_rounding(base: torch.dtype) -> float:
    """What a loss may move beside PEFT's own difference, which one scalar can have small by luck.

    One rounding of the base's, and one of the fp32 that every model here keeps its loss in.
    """
    return (torch.finfo(base).eps + torch.finfo(torch.float32).eps) / 2
