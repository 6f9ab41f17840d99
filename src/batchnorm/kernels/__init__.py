"""Kernels: what a backend offers, how exact it must be, and the reference that defines correct.

::

    contract ── reference: every phase, by torch's operators in float64 ── accuracy: how far others may be from it
             ├── native/: every phase, and whole calls
             └── torch_backend: whole calls ── running_statistics: only finite steps are taken
"""

from batchnorm.kernels.accuracy import ACCURACY, Accuracy
from batchnorm.kernels.activation import ACTIVATIONS, Activation
from batchnorm.kernels.contract import Backend, Gradients, Reduced, Request, Transform
from batchnorm.kernels.reference import REFERENCE, Reference

__all__ = [
    "ACCURACY",
    "ACTIVATIONS",
    "REFERENCE",
    "Accuracy",
    "Activation",
    "Backend",
    "Gradients",
    "Reduced",
    "Reference",
    "Request",
    "Transform",
]
