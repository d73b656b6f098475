"""``python -m benchmarks.gpu.sanitized SCHEDULE``: small shapes of one schedule, for compute-sanitizer to watch."""

from __future__ import annotations

import sys

from benchmarks.gpu import correctness
from benchmarks.gpu.plan import BF16, F32, Plan
from benchmarks.gpu.task import OK, REFUSED


def main(schedule: str) -> int:
    """0 where all results are right."""
    plan = Plan(shapes=((17, 65, 33), (130, 576, 192)), repeats=1)
    for dtypes, R in (((BF16, F32), 16), ((BF16, BF16), 64)):
        result = correctness.grid(plan, schedule, dtypes, R, 0.05)
        print(schedule, R, result)
        if result["status"] not in (OK, REFUSED):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
