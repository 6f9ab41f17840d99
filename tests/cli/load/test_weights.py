from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from batchnorm.cli.errors import CommandError
from batchnorm.cli.load.weights import fit_weights, read_weights


class Small(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, width, 1)
        self.bn = nn.BatchNorm1d(width)


def filled(model: nn.Module, value: float = 2.0) -> OrderedDict[str, Tensor]:
    state = model.state_dict()
    for tensor in state.values():
        tensor.fill_(value)
    return state


def load(path: Path, model: nn.Module) -> nn.Module:
    fit_weights(model, read_weights(path), path)
    return model


def assert_filled(model: nn.Module, value: float = 2.0) -> None:
    assert all((tensor == value).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".safetensors"])
def test_every_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(dict(filled(Small())), path)
    assert_filled(load(path, Small()))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_checkpoint_is_unwrapped_with_a_note(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"epoch": 3, key: filled(Small())}, tmp_path / "net.ckpt")
    assert_filled(load(tmp_path / "net.ckpt", Small()))
    out, err = capsys.readouterr()
    assert out == ""
    assert f"taking its entry {key!r}" in err


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))],
    ids=["DataParallel", "compile", "both"],
)
def test_the_prefix_of_a_wrapped_model_is_left_out_with_a_note(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(filled(wrap(Small())), tmp_path / "net.pt")
    assert_filled(load(tmp_path / "net.pt", Small()))
    assert "read without it" in capsys.readouterr().err


def test_a_prefix_that_the_model_has_too_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = nn.DataParallel(Small())
    torch.save(filled(wrapped), tmp_path / "net.pt")
    fresh = nn.DataParallel(Small())
    assert_filled(load(tmp_path / "net.pt", fresh))
    assert capsys.readouterr().err == ""


class Versioned(nn.Module):
    """Reads its old format, marked by version 1, by doubling the values."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(1))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") == 1:
            state[f"{prefix}value"] = state[f"{prefix}value"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_format_version_of_each_module_reaches_it(tmp_path: Path, wrapped: bool) -> None:
    old = nn.Sequential(Versioned())
    old[0]._version = 1
    torch.save(filled(nn.DataParallel(old) if wrapped else old), tmp_path / "net.pt")
    assert_filled(load(tmp_path / "net.pt", nn.Sequential(Versioned())), 4.0)


def test_a_tied_tensor_stored_once_fills_both(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        return model

    save_file({"0.weight": torch.full((3, 3), 2.0)}, tmp_path / "net.safetensors")
    assert_filled(load(tmp_path / "net.safetensors", tied()))


def test_a_lazy_model_takes_the_shapes_of_the_file(tmp_path: Path) -> None:
    torch.save(filled(nn.Sequential(nn.Linear(3, 4))), tmp_path / "net.pt")
    assert_filled(load(tmp_path / "net.pt", nn.Sequential(nn.LazyLinear(4))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("bn.weight"), "1 entry of the model not in the file, first 'bn.weight'"),
        (lambda s: s.update({"bm.weight": s["bn.weight"]}), "1 entry of the file not in the model, first 'bm.weight'"),
        (
            lambda s: s.update({"bn1.weight": s.pop("bn.weight"), "bn1.bias": s.pop("bn.bias")}),
            "2 entries of the model not in the file, first 'bn.weight'; 2 entries of the file not in the model, first "
            "'bn1.weight', perhaps for 'bn.weight'",
        ),
        (lambda s: s.update({"conv.weight": torch.ones(3, 4, 1)}), "conv.weight has shape 3×4×1 in the file and 3×2×1"),
    ],
)
def test_a_file_that_does_not_fit_names_the_first_entry(tmp_path: Path, change: Callable[..., Any], said: str) -> None:
    state = filled(Small())
    change(state)
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CommandError) as raised:
        load(tmp_path / "net.pt", Small())
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "plain pickle"])
def test_code_in_a_file_is_never_run(tmp_path: Path, form: str) -> None:
    path = tmp_path / "net.pt"
    trap = {"weight": Trap(tmp_path / "sprung")}
    torch.save(trap, path) if form == "torch" else path.write_bytes(pickle.dumps(trap, protocol=2))
    with pytest.raises(CommandError, match="it holds Python objects, which only unpickling would read"):
        read_weights(path)
    assert not (tmp_path / "sprung").exists()


def test_a_pickled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt")
    with pytest.raises(CommandError, match=r"save model\.state_dict\(\) instead"):
        read_weights(tmp_path / "net.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "net.pt")
    with pytest.raises(CommandError, match="TorchScript"):
        read_weights(tmp_path / "net.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_told(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"net{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(dict(filled(Small())), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CommandError, match="it may be cut short"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"hello, this is no tensor", bytes(1000), b"PK\x03\x04" + bytes(300)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_another_kind_of_file_is_told(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(CommandError, match="not a complete"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], "expected a state dict, tensors by name; got an object of type list"),
        (torch.ones(2), "got an object of type Tensor"),
        ({}, "got nothing"),
        ({"lr": 0.1}, "its entry 'lr' is of type float"),
    ],
)
def test_a_file_without_a_state_dict_is_told(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(CommandError) as raised:
        read_weights(tmp_path / "net.pt")
    assert said in str(raised.value)


def test_no_file_a_directory_and_another_suffix_are_told(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no such file"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(CommandError, match=r"ends in \.safetensors, .*; got \.onnx"):
        read_weights(tmp_path / "net.onnx")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CommandError, match="this is a directory"):
        read_weights(tmp_path / "folder.pt")


def test_other_state_dicts_in_a_checkpoint_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.pth"
    state = dict(filled(Small()))
    torch.save({"model": state, "ema": state, "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    read_weights(path)
    said = " ".join(capsys.readouterr().err.split())
    assert "taking its entry 'model'. 'ema': another state dict in it; to take one: " in said
    assert "torch.save(torch.load('two.pth')['ema'], 'ema.pth')" in said
    torch.save({"model": state, "epoch": 3}, path)
    read_weights(path)
    assert "another" not in capsys.readouterr().err


def test_suffixes_are_listed_and_a_program_is_sent_to_model() -> None:
    with pytest.raises(
        CommandError, match=r"\.safetensors, \.pt, \.pth, .* or \.bin; got \.pt2\. A \.pt2 is .* --model"
    ):
        read_weights(Path("net.pt2"))
    with pytest.raises(CommandError, match=r"or \.bin; got \.txt\.$"):
        read_weights(Path("net.txt"))
