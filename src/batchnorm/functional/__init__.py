"""Batch normalization as a function, with activation, residual and mask, and the choice of who computes it.

::

    batch_norm ── dispatch: which backend ── its serve(): a whole call
                                          └── operator ── autograd ── its phases, where a whole call is not possible
"""

from batchnorm.functional.batch_norm import batch_norm
from batchnorm.functional.dispatch import active_backend, backends, register, unregister, use_backend
from batchnorm.functional.measure import moments

__all__ = ["active_backend", "backends", "batch_norm", "moments", "register", "unregister", "use_backend"]
