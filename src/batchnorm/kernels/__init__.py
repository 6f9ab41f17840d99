"""Kernels: what a backend offers, how exact it must be, and the reference that defines correct."""

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
