"""From operands to launches: strides, plugs, grids. The only importer of the kernel bodies.

A builder returns a ``Launch`` with the arguments exactly as Triton gets them; ``run`` starts it, ``inspect_kernels``
compiles the same object for chips that are not here, and ``peftkern.testing.traffic`` counts what it moves.
"""

from peftkern.backends.triton.launch.decode import decode
from peftkern.backends.triton.launch.gradients import Gradient, Parted, bank_grad, grad, reduce
from peftkern.backends.triton.launch.kept import kept
from peftkern.backends.triton.launch.operands import Direction, Launch, VendorProduct, gathered, loads, near, tf32
from peftkern.backends.triton.launch.prepared import forget, keep, key, known, prepare
from peftkern.backends.triton.launch.produce import bank, fused, shrink
from peftkern.backends.triton.launch.quantise import Codes, quantise
