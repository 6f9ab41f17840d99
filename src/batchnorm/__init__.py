"""The whole life of a batch-normalized PyTorch model."""

__version__ = "0.1.0"
