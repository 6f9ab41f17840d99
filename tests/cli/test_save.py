from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from batchnorm.cli.errors import CommandError
from batchnorm.cli.load.weights import fit_weights, read_weights
from batchnorm.cli.save import save_model


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 4)).eval()


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.safetensors"])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, name: str) -> None:
    save_model(model(), tmp_path / name)
    fresh = model()
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    fit_weights(fresh, read_weights(tmp_path / name), tmp_path / name)
    for a, b in zip(fresh.state_dict().values(), model().state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_tied_and_strided_tensors_are_saved_whole(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    tied.register_buffer("view", torch.arange(6.0).view(2, 3).t())
    save_model(tied, tmp_path / "net.safetensors")
    read = load_file(tmp_path / "net.safetensors")
    assert set(read) == set(tied.state_dict())
    assert all(torch.equal(read[name], value) for name, value in tied.state_dict().items())


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.pt2"])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(CommandError, match=r"--output .*net\.\w+: cannot be written"):
        save_model(model(), tmp_path / "gone" / name, (torch.randn(2, 2, 6),))


def test_extra_state_fits_a_pt_file_only(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"tensors only; write a \.pt file"):
        save_model(Extra(), tmp_path / "net.safetensors")
    save_model(Extra(), tmp_path / "net.pt")
    fit_weights(Extra(), read_weights(tmp_path / "net.pt"), tmp_path / "net.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


def test_a_program_runs_any_batch_size_when_the_example_has_several(tmp_path: Path) -> None:
    save_model(model(), tmp_path / "net.pt2", (torch.randn(2, 2, 6),))
    program = torch.export.load(tmp_path / "net.pt2").module()
    for size in (1, 2, 5):
        x = torch.randn(size, 2, 6)
        torch.testing.assert_close(program(x), model()(x))


def test_a_program_of_one_sample_says_that_it_takes_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model(), tmp_path / "net.pt2", (torch.randn(1, 2, 6),))
    assert "exactly the example's shape" in capsys.readouterr().err
    x = torch.randn(1, 2, 6)
    torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), model()(x))


class Fixed(nn.Module):
    """Takes its batch size for a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(len(x), 1)


def test_a_program_whose_model_fixes_the_batch_size_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(Fixed(), tmp_path / "net.pt2", (torch.randn(3, 2),))
    assert "the model's code fixes the batch size" in capsys.readouterr().err
    save_model(model(), tmp_path / "net.pt2", (torch.randn(3, 2, 6),))
    assert capsys.readouterr().err == ""


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(2)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"y": self.bn(x) * scale}


def test_keyword_inputs_and_dict_outputs_are_exported(tmp_path: Path) -> None:
    example = {"x": torch.randn(3, 2), "scale": torch.tensor(2.0)}
    save_model(Named().eval(), tmp_path / "net.pt2", example)
    program = torch.export.load(tmp_path / "net.pt2").module()
    inputs = {"x": torch.randn(5, 2), "scale": torch.tensor(3.0)}
    torch.testing.assert_close(program(**inputs), Named().eval()(**inputs))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_a_model_that_cannot_be_exported_is_told_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CommandError, match=r"torch\.export cannot export Branching"):
        save_model(Branching(), tmp_path / "net.pt2", (torch.randn(2, 3),))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


class Random(nn.Module):
    """Gives another output each time: no program can be shown to agree with it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


def test_a_program_that_differs_from_the_model_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="differs from the model"):
        save_model(Random(), tmp_path / "net.pt2", (torch.randn(20, 30),))
    assert list(tmp_path.iterdir()) == []
