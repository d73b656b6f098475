"""Benchmarks and the demo; run as ``python -m benchmarks.products``, ``.layer``, ``.model`` and ``.demo``."""

from benchmarks import packages

packages.require("torch")
