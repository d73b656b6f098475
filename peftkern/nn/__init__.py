"""Modules that stand where an ``nn.Linear`` stands, and how they come into a model, out of it, and to files."""

from peftkern.nn.adapter_bank import Adapter, AdapterBank
from peftkern.nn.adapter_config import LoRAConfig
from peftkern.nn.adapter_files import AdapterFile, LoRATensors, read_adapter, write_adapter
from peftkern.nn.checkpoint import load_adapter, save_adapter
from peftkern.nn.injection import InjectReport, eject, inject
from peftkern.nn.job_packing import JobBatch, join_batches, losses_by_job, pack_jobs
from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.multi_lora_linear import MultiLoRALinear
from peftkern.nn.optimizer_groups import lora_plus_groups
from peftkern.nn.routing import Route, route
from peftkern.nn.serving import serve, unserve

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterFile",
    "InjectReport",
    "JobBatch",
    "LoRAConfig",
    "LoRALinear",
    "LoRATensors",
    "MultiLoRALinear",
    "Route",
    "eject",
    "inject",
    "join_batches",
    "load_adapter",
    "lora_plus_groups",
    "losses_by_job",
    "pack_jobs",
    "read_adapter",
    "route",
    "save_adapter",
    "serve",
    "unserve",
    "write_adapter",
]
