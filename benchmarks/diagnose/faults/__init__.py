"""Faults as they happen in real life, one small function a fault, each planted alone into a trained network.

``FAULTS`` and ``HEALTHY`` hold them by name, ``"cause.form"``; ``FAULTS["poisoned.nan"]("resnet", 0)`` plants one.
A fault's docstring says how it comes about. Where it is in every norm, the right layer is the first in execution.
"""

from benchmarks.diagnose.faults import buffers, healthy, inputs, runs, weights
from benchmarks.diagnose.faults.registry import FAULTS, HEALTHY, Fault, Planted

__all__ = ["FAULTS", "HEALTHY", "Fault", "Planted", "buffers", "healthy", "inputs", "runs", "weights"]
