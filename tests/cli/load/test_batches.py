from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.cli.errors import CommandError
from batchnorm.cli.load import load_batches
from batchnorm.cli.load.batches import doubt

MODEL = nn.Linear(3, 3)


def saved(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 64])
def test_a_file_is_cut_into_batches_that_hold_every_sample_once(tmp_path: Path, batch_size: int) -> None:
    x = np.arange(30.0).reshape(10, 3)
    batches = load_batches(saved(tmp_path / "a.npz", x=x), MODEL, batch_size=batch_size)
    sizes = [len(batch) for batch in batches]
    assert len(batches) == len(sizes) == -(-10 // batch_size)  # type: ignore[arg-type]
    assert max(sizes) <= batch_size
    for _ in range(2):  # it can be gone through again
        assert torch.equal(torch.cat(list(batches)), torch.from_numpy(x).float())


def test_floats_take_the_dtype_of_the_model_and_integers_keep_theirs(tmp_path: Path) -> None:
    for dtype, expected in ((np.float64, torch.float16), (">f4", torch.float16), (np.uint8, torch.uint8)):
        path = saved(tmp_path / "a.npz", x=np.ones((2, 3), dtype=dtype))
        (batch,) = load_batches(path, nn.Linear(3, 3).half())
        assert batch.dtype == expected
        assert (batch == 1).all()


@pytest.mark.parametrize(
    ("names", "taken"), [(("y", "x"), "x"), (("labels", "inputs"), "inputs"), (("first", "second"), "first")]
)
def test_which_array_is_taken_is_noted(
    tmp_path: Path, names: tuple[str, ...], taken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {name: np.full((2, 3), float(name == taken)) for name in names}
    (batch,) = load_batches(saved(tmp_path / "a.npz", **arrays), MODEL)
    assert (batch == 1).all()
    assert f"taking its array {taken!r}" in capsys.readouterr().err


def test_a_factory_and_an_iterable_give_their_batches(here: Path) -> None:
    assert len(list(load_batches("net:batches", MODEL))) == 3
    (here / "loaders.py").write_text("import torch\nloader = [torch.ones(2)]\n")
    assert [batch.tolist() for batch in load_batches("loaders:loader", MODEL)] == [[1.0, 1.0]]


def test_an_array_without_samples_is_told(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="its array 'x' has no sample"):
        load_batches(saved(tmp_path / "a.npz", x=np.empty((0, 3))), MODEL)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("none.npz", "no such file"),
        ("net.py", "expected a file that ends in .npz, or MODULE:NAME"),
        ("net:number", "expected an iterable of batches; got an object of type int"),
        ("net:text", "expected an iterable of batches; got an object of type str"),
        ("net:tensor", "got one tensor of shape (3,)"),
        ("net:broken", "raised ValueError: no such checkpoint"),
        ("net:wants", "it needs arguments"),
        ("net:bathces", "did you mean 'batches'?"),
    ],
)
def test_what_is_no_source_of_batches_is_told(here: Path, spec: str, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        load_batches(spec, MODEL)
    assert str(raised.value).startswith("--data ")
    assert said in str(raised.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_cut_short_is_told(tmp_path: Path, share: float, save: Any) -> None:
    path = tmp_path / "a.npz"
    save(path, x=np.random.default_rng(0).normal(size=(100, 3)))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CommandError, match="it may be cut short"):
        load_batches(str(path), MODEL)


def test_a_file_of_something_else_is_not_said_to_hold_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("label,width\n1,2\n" * 50)
    with pytest.raises(CommandError, match="not a complete"):
        load_batches(str(path), MODEL)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_damaged_inside_is_told(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.npz"
    save(path, x=np.random.default_rng(0).normal(size=(1000, 3)))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(content))
    with pytest.raises(CommandError, match="not a complete"):
        load_batches(str(path), MODEL)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([{"a": 1}, None], dtype=object), "it holds Python objects"),
        (np.array(3.0), "expected an array of numbers"),
        (np.array(["a", "b"]), "is of dtype <U1"),
        (np.array([1j, 2j]), "is of dtype complex128"),
    ],
)
def test_an_array_of_something_else_is_told(tmp_path: Path, array: Any, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        load_batches(saved(tmp_path / "a.npz", x=array), MODEL)
    assert said in str(raised.value)


def test_a_file_without_arrays_and_a_directory_are_told(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="it holds no array"):
        load_batches(saved(tmp_path / "a.npz"), MODEL)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(CommandError, match=r"folder\.npz: Is a directory"):
        load_batches(str(tmp_path / "folder.npz"), MODEL)


@pytest.mark.parametrize(
    ("kind", "shape", "said"),
    [
        (
            "uint8",
            (4, 3, 8, 9),
            "The data in {} are uint8; .* x.astype\\('float32'\\) / 255, or scaled as in training",
        ),
        ("int16", (4, 3, 8, 9), "are int16; .* save x.astype\\('float32'\\)\\.$"),
        (
            "float32",
            (4, 8, 9, 3),
            "Channels last\\? .*takes 3 channels, .* x.transpose\\(0, 3, 1, 2\\)",
        ),
        ("uint8", (4, 8, 9, 3), "are uint8; .*Channels last"),
        ("float32", (4, 3, 8, 9), "^$"),
        ("float32", (4, 5, 8, 9), "^$"),
        ("float32", (4, 3), "^$"),
    ],
)
def test_what_does_not_go_with_the_first_layer_is_kept_for_an_error(
    tmp_path: Path, kind: str, shape: tuple[int, ...], said: str
) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.ones(shape, kind))
    load_batches(str(path), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert re.search(said.format(re.escape(str(path))), doubt())
    load_batches(str(path), nn.Sequential(nn.Embedding(4, 4)))  # which takes numbers
    assert doubt() == ""
