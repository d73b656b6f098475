"""One command that spends a scarce GPU well: ``python -m benchmarks.gpu --minutes N --out DIR``.

    environment   what the card is, and its measured ceilings
    correctness   every schedule, dtype, rank and tile against fp64; what fails is excluded from all that follows
    tuning        the shapes of ``peftkern.testing.problems`` in order of value
    products      one linear against the bare frozen products and every alternative, decode, schedules side by side
    models        one PEFT layer, a small Llama's training step, and both as CUDA graphs

Every part is a list of tasks in order of value. Tasks run in worker processes, so that a hang or a crash costs one
task; each result is on disk when the next task begins, and a second run skips what the first one finished.
"""
