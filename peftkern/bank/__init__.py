"""Many adapters over one frozen model: by name, by row of a batch, served, and trained side by side."""

from peftkern.bank.adapter import Adapter
from peftkern.bank.bank import AdapterBank, route
from peftkern.bank.jobs import JobBatch, join_batches, losses_by_job, pack_jobs
from peftkern.bank.linear import MultiLoRALinear
from peftkern.bank.routes import Route
from peftkern.bank.serving import serve, unserve

__all__ = [
    "Adapter",
    "AdapterBank",
    "JobBatch",
    "MultiLoRALinear",
    "Route",
    "join_batches",
    "losses_by_job",
    "pack_jobs",
    "route",
    "serve",
    "unserve",
]
