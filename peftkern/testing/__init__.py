"""The common ground of tests and benchmarks: named problems, the error rule, and the dropout mask."""

from peftkern.dropout import keep_mask as dropout_mask

__all__ = ["dropout_mask"]
