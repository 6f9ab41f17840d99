"""From what the command line names to a model, its weights, batches and example inputs.

::

    file.py:name ── objects ── model, batches, example          file.pt ── weights;  file.pt2 ── program
"""

from batchnorm.cli.load.batches import load_batches
from batchnorm.cli.load.example import load_example, load_examples
from batchnorm.cli.load.model import load_model
from batchnorm.cli.load.program import load_program

__all__ = ["load_batches", "load_example", "load_examples", "load_model", "load_program"]
