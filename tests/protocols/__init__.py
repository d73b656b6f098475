"""Triton kernels whose programs work together, run in any order on a weak memory, without a GPU."""
