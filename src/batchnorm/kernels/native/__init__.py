"""Native CPU kernels: how they are found and loaded, how tensors become addresses, and the backend made of them.

::

    backend ── whole_call: one autograd node ────┐
            └── operators: one for each phase ── calls ── layout: addresses and strides ── library: compiled C++
"""

from batchnorm.kernels.native.backend import NATIVE, Native
from batchnorm.kernels.native.library import available_isas, isa, missing, use_isa

__all__ = ["NATIVE", "Native", "available_isas", "isa", "missing", "use_isa"]
