"""What is read is what was written, or a sentence says that it is not."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.json_places import paths_in, put

from batchnorm.errors import InputError
from batchnorm.files.tensor_file import read_tensors, write_tensors

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(3),
    "half": torch.ones(2).half(),
    "none": torch.ones(0),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    write_tensors(path, "kind", TENSORS, "about")
    return path


def test_all_comes_back(path: Path) -> None:
    tensors, about = read_tensors(path, "kind", "something")
    assert about == "about"
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], TENSORS[key]) and tensors[key].dtype == TENSORS[key].dtype for key in TENSORS)


def test_tensors_may_share_memory_and_be_views(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "f", "kind", {"whole": whole, "same": whole, "turned": whole.t()})
    tensors, _ = read_tensors(tmp_path / "f", "kind", "something")
    assert torch.equal(tensors["turned"], whole.t())


def test_one_changed_bit_is_noticed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="changed since"):
        read_tensors(path, "kind", "something")


def test_another_name_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"half"', b'"calf"'))
    with pytest.raises(InputError, match="changed since"):
        read_tensors(path, "kind", "something")


@pytest.mark.parametrize("change", ["short", "weights", "another kind", "no file of this format"])
def test_other_files_are_refused(path: Path, change: str) -> None:
    if change == "short":
        path.write_bytes(path.read_bytes()[:-3])
    elif change == "weights":
        save_file({"weight": torch.ones(3)}, path)
    elif change == "another kind":
        write_tensors(path, "other", TENSORS)
    else:
        path.write_text("nothing of the kind")
    with pytest.raises(InputError, match="expected something that somebody wrote"):
        read_tensors(path, "kind", "something that somebody wrote")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_written_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="device"):
        write_tensors(Path("/dev/full"), "kind", TENSORS)
    with pytest.raises(OSError):  # noqa: PT011 - any
        write_tensors(tmp_path / "nowhere" / "f", "kind", TENSORS)
    assert list(tmp_path.iterdir()) == []


OTHERS = ["null", "true", "-1", "1e999", "NaN", str(2**70), '""', r'"\ud800"', '"F4"', '"F8_E8M0"', '"C64"', "[]", "{}"]


def test_a_header_in_which_any_part_is_something_else_is_one_sentence(path: Path) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    own = json.loads(header["__metadata__"]["batchnorm"])
    texts = [put(header, way, other) for way in paths_in(header)[1:] for other in OTHERS]
    texts += [put(header, ("__metadata__", "batchnorm"), json.dumps(put(own, way, other)))
              for way in paths_in(own)[1:] for other in OTHERS]  # fmt: skip
    texts += [put(header, ("__metadata__", "batchnorm"), json.dumps(text)) for text in (*OTHERS, "[" * 10**5)]
    refused = 0
    for text in texts:
        encoded = text.encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
        try:
            read_tensors(path, "kind", "something")
        except InputError:
            refused += 1
    assert refused > 0.95 * len(texts)  # an axis of no size may be written in two ways
