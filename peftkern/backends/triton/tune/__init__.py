"""``python -m peftkern tune``: which schedule and tile is fastest, measured on the user's own GPU, written to a table.

    command.py   the options, the summary            search.py     the order, the budget, successive halving
    device.py    operands, timing, the check         progress.py   the bar

Nothing here is imported by a call.
"""
