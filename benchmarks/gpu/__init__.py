"""One command that spends a scarce GPU well: ``python -m benchmarks.gpu --minutes N --out DIR``.

    environment   what the card is, and its measured ceilings
    correctness   every schedule, dtype, rank and tile against fp64; what fails is excluded from all that follows
    compile       every kernel of the timed parts into Triton's cache, by as many processes as there are cores
    tuning        the shapes of ``peftkern.testing.problems`` in order of value
    products      one linear against the bare frozen products and every alternative, decode, schedules side by side
    models        one PEFT layer, a small Llama's training step, and both as CUDA graphs
    tests         the repository's own GPU tests; only where it is asked for

Every part is a list of tasks in order of value. Tasks run in worker processes, so that a hang or a crash costs one
task; each result is on disk when the next task begins, and a second run skips what the first one finished. A part ends
soon after its share of the minutes, whatever it is doing. ``--only`` and ``--without`` take tasks and variants away.
"""
