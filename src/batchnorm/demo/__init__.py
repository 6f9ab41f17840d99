"""The tour: the paper's first experiment on real pictures, and then the whole life of the network that won it.

::

    datasets ── training: with norms and without ── tour: verb after verb, one station each ── story: the report
"""

from batchnorm.demo.result import DemoResult
from batchnorm.demo.tour import run_demo

__all__ = ["DemoResult", "run_demo"]
