"""How programs of one launch work together: tickets, one flag a row block, and who arrives last.

``counters`` is int32, zero when a launch begins and zero again when it ends: tickets, retired programs, one a block.
A block's stores are complete before its counter is touched (``tl.debug_barrier``: Triton 3.6 to 3.8 let one thread
release what the others have not stored yet), and the counter is released and acquired at GPU scope.

Nobody waits for work that may not have begun. A program takes a tile by a ticket, so tickets are held in order by
programs that run; a tile waits only for the producer of its row block, whose ticket is smaller (``tile_order``) and who
waits for nobody. Who arrives last (``arrived_last``) waits for nothing at all.
"""

import triton
import triton.language as tl

TICKETS = tl.constexpr(0)
RETIRED = tl.constexpr(1)
BLOCKS = tl.constexpr(2)


@triton.jit
def take_ticket(counters):
    """The next ticket: 0, 1, 2, ..."""
    return tl.atomic_add(counters + TICKETS, 1, sem="relaxed")


@triton.jit
def publish(counters, block):
    """What this program stored for ``block`` may be read by those who ``await_block``."""
    tl.debug_barrier()
    tl.atomic_xchg(counters + BLOCKS + block, 1, sem="release")


@triton.jit
def await_block(counters, block, readers):
    """Wait until ``block`` is published; the last of its ``readers`` clears the counter for the next launch."""
    counter = counters + BLOCKS + block
    published = tl.atomic_add(counter, 0, sem="acquire")
    while published == 0:
        published = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="relaxed") == readers:
        tl.atomic_xchg(counter, 0, sem="relaxed")


@triton.jit
def announce(counters, block):
    """One of the producers of ``block`` has stored its part, for those who ``await_all``."""
    tl.debug_barrier()
    tl.atomic_add(counters + BLOCKS + block, 1, sem="release")


@triton.jit
def await_all(counters, block, producers, readers):
    """Wait until all of a block's producers (one or more) have announced; the last of its ``readers`` clears it."""
    counter = counters + BLOCKS + block
    announced = tl.atomic_add(counter, 0, sem="acquire")
    while announced < producers:
        announced = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="relaxed") == producers + readers - 1:
        tl.atomic_xchg(counter, 0, sem="relaxed")


@triton.jit
def retire(counters):
    """To be called once by every program after a ticket beyond the last: the last one clears the tickets."""
    if tl.atomic_add(counters + RETIRED, 1, sem="relaxed") == tl.num_programs(0) - 1:
        tl.atomic_xchg(counters + RETIRED, 0, sem="relaxed")
        tl.atomic_xchg(counters + TICKETS, 0, sem="relaxed")


@triton.jit
def arrived_last(counters, block, count):
    """Whether this program is the last of ``count`` to store its part of ``block``: then it can read the others'."""
    tl.debug_barrier()
    last = tl.atomic_add(counters + BLOCKS + block, 1, sem="acq_rel") == count - 1
    if last:
        tl.atomic_xchg(counters + BLOCKS + block, 0, sem="relaxed")
    tl.debug_barrier()
    return last
