"""Parallel styles of ``LoRALinear`` for ``torch.distributed.tensor.parallel.parallelize_module``."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from peftkern.nn.lora_linear import LoRALinear


class _LoRAParallel(ParallelStyle):
    """The common part of the two styles: x comes in as ``input_layouts``, y leaves as ``output_layouts``."""

    shards: dict[str, Placement]  # of parameters; the others are whole on every rank
    default_layouts: tuple[Placement, Placement]  # of x and y

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        x, y = self.default_layouts
        self.input_layouts, self.output_layouts = input_layouts or x, output_layouts or y
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoRALinear):
            raise TypeError(f"{type(self).__name__} is for LoRALinear, not {type(module).__name__}")
        return distribute_module(module, device_mesh, self._partition, self._input, self._output)

    def _partition(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            shard = distribute_tensor(
                parameter, mesh, [self.shards.get(key, Replicate())], src_data_rank=self.src_data_rank
            )
            module.register_parameter(key, nn.Parameter(shard, requires_grad=parameter.requires_grad))

    def _input(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        x = inputs[0]
        return (x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [self.input_layouts], run_check=False),)

    def _output(self, module: nn.Module, y: Any, mesh: DeviceMesh) -> Any:
        y = y.redistribute(placements=[self.output_layouts])
        return y.to_local() if self.use_local_output else y


class ColwiseLoRALinear(_LoRAParallel):
    """Each rank has some of the out_features: weight, lora_B and the biases are sharded on N, lora_A is whole.

    Args:
        input_layouts: of x where it comes as a plain tensor; default Replicate().
        output_layouts: of y; default Shard(-1).
        use_local_output: whether y leaves as a plain tensor, this rank's part.
    Numerics: dropout as without sharding, by the first rank's generator.
    """

    shards = {"weight": Shard(0), "lora_B": Shard(0), "bias": Shard(0), "lora_bias": Shard(0)}
    default_layouts = Replicate(), Shard(-1)


class RowwiseLoRALinear(_LoRAParallel):
    """Each rank has some of the in_features: weight and lora_A are sharded on K, the rest is whole.

    Args:
        input_layouts: of x where it comes as a plain tensor; default Shard(-1).
        output_layouts: of y; default Replicate().
        use_local_output: whether y leaves as a plain tensor.
    Numerics: with dropout each rank draws for its own columns, so the mask is another one than without sharding.
    """

    shards = {"weight": Shard(1), "lora_A": Shard(1)}
    default_layouts = Shard(-1), Replicate()
