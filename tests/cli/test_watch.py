from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import batchnorm.monitor
from batchnorm.cli.load import load_model
from batchnorm.statistics.recalibrate import recalibrate

MODEL = ("-m", "net:build", "-w", "net.pt")


@pytest.fixture(autouse=True)
def trained(here: Path) -> None:
    """Weights with the statistics of pictures drawn like those in images.npz, which it has not seen."""
    model = load_model("net:build", seed=3)
    pictures = torch.randn(400, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 + 1
    recalibrate(model, [pictures])
    torch.save(model.state_dict(), here / "net.pt")


def shifted(here: Path, name: str = "shifted.npz") -> str:
    np.savez(here / name, x=np.load(here / "images.npz")["x"] + 1.0)
    return name


def test_the_data_it_was_trained_on_exits_with_0(command: Callable[..., Any]) -> None:
    done = command("watch", *MODEL, "-d", "images.npz", "-b", 20)
    assert done.code == 0, done.out
    assert "No drift" in done.out
    assert "bn2" in done.out


def test_other_data_exits_with_1_and_names_the_norms(command: Callable[..., Any], here: Path) -> None:
    done = command("watch", *MODEL, "-d", shifted(here), "-b", 20, "--json")
    assert done.code == 1
    assert json.loads(done.out)["drifted"]
    assert '"bn"' in done.out


def test_nan_in_the_data_is_told_and_exits_with_1(command: Callable[..., Any]) -> None:
    done = command("watch", *MODEL, "-d", "net:poisoned")
    assert done.code == 1
    assert "non-finite" in done.out.lower()


def test_statistics_that_were_never_measured_are_an_error(command: Callable[..., Any]) -> None:
    assert "never been updated" in command("watch", "-m", "net:build", "-d", "images.npz").sentence


def test_a_part_of_the_batches_and_the_last_samples_can_be_asked_for(command: Callable[..., Any], here: Path) -> None:
    images = np.load(here / "images.npz")["x"]
    np.savez(here / "turning.npz", x=np.concatenate([images + 1.0, images[:32], images[:32]]))
    turning = ("watch", *MODEL, "-d", "turning.npz", "-b", 16)
    assert command(*turning).code == 1
    last = command(*turning, "--window", 64, "--json")
    assert last.code == 0, last.out
    assert json.loads(last.out)["window"] == 64
    some = json.loads(command(*turning, "--every", 2, "--json").out)
    total = len(images) + 64
    assert (some["every"], some["samples"]) == (2, sum(min(16, total - at) for at in range(0, total, 32)))
    assert "window=5" in command(*turning, "--window", 5).sentence


def test_what_counts_as_drift_can_be_set(command: Callable[..., Any], here: Path) -> None:
    assert command("watch", *MODEL, "-d", shifted(here), "-b", 20, "--tolerance", 10).code == 0
    found = json.loads(command("watch", *MODEL, "-d", "images.npz", "--names", "bn2", "--json").out)
    assert '"bn"' not in json.dumps(found)
    assert '"bn2"' in json.dumps(found)


def test_the_report_is_written_too(command: Callable[..., Any], here: Path) -> None:
    assert command("watch", *MODEL, "-d", shifted(here), "--html", "drift.html").code == 1
    assert "<html" in (here / "drift.html").read_text()


@pytest.mark.parametrize("loader", ["net:labelled", "net:mapped"])
def test_batches_may_be_tuples_or_dicts(command: Callable[..., Any], loader: str) -> None:
    assert command("watch", *MODEL, "-d", loader).code in (0, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-d", "none.npz"], "no such file"),
        (["-d", "cut.npz"], "it may be cut short"),
        (["-d", "net:empty"], "at least one batch"),
        (["-d", "net:failing"], "disk on fire"),
        (["-d", "net:strings"], "str"),
        (["-d", "wrong.npz"], "the model failed on batch 0"),
        (["-d", "images.npz", "--tolerance", "-1"], "tolerance=-1"),
        (["-d", "images.npz", "--names", "bm2"], "did you mean"),
        (["-d", "images.npz", "--html", "none/page.html"], "no directory none"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    command: Callable[..., Any], here: Path, arguments: list[str], said: str
) -> None:
    (here / "cut.npz").write_bytes((here / "images.npz").read_bytes()[:5000])
    np.savez(here / "wrong.npz", x=np.zeros((10, 2, 32, 32)))
    before = {path.name for path in here.iterdir()}
    assert said in command("watch", *MODEL, "--json", *arguments).sentence
    assert {path.name for path in here.iterdir()} == before


def test_too_little_data_for_an_answer_is_no_all_clear(command: Callable[..., Any], here: Path) -> None:
    np.savez(here / "few.npz", x=np.load(here / "images.npz")["x"][:3])
    done = command("watch", *MODEL, "-d", "few.npz")
    assert done.code == 2
    assert "3 samples seen, at least 16 needed" in done.err


def test_verbose_shows_every_norm(command: Callable[..., Any]) -> None:
    done = command("watch", *MODEL, "-d", "images.npz", "--verbose")
    assert done.code == 0
    assert "detectable" in done.out


def test_what_was_measured_on_a_model_with_frozen_norms_is_a_reference(command: Callable[..., Any], here: Path) -> None:
    model = load_model("net:build", here / "net.pt", seed=3).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics of other data, on which it was fine-tuned
            assert module.running_mean is not None
            module.running_mean += 2
    torch.save(model.state_dict(), here / "tuned.pt")
    pictures = torch.randn(400, 3, 32, 32, generator=torch.Generator().manual_seed(6)) * 2 + 1
    batchnorm.monitor.measure(model, pictures.split(20)).save(here / "met.safetensors")
    tuned = ("watch", "-m", "net:build", "-w", "tuned.pt", "-b", 20)
    assert command(*tuned, "-d", "images.npz").code == 1
    assert command(*tuned, "-d", "images.npz", "--reference", "met.safetensors").code == 0
    assert command(*tuned, "-d", shifted(here), "--reference", "met.safetensors").code == 1
    assert "no such file" in command(*tuned, "-d", "images.npz", "--reference", "nowhere.safetensors").sentence.lower()


@pytest.mark.parametrize("verb", ["watch", "recalibrate", "diagnose", "check", "fold"])
def test_data_that_do_not_go_with_the_model_are_told_with_what_to_save(
    command: Callable[..., Any], here: Path, verb: str
) -> None:
    pictures = np.zeros((8, 12, 12, 3), np.uint8)
    np.savez(here / "bytes.npz", x=pictures.transpose(0, 3, 1, 2))
    np.savez(here / "last.npz", x=pictures.astype(np.float32))
    for name, said in (("bytes.npz", "are uint8"), ("last.npz", "Channels last? ")):
        done = command(verb, *MODEL, "-d", name)
        assert done.code == 2
        assert said in done.err
        assert "x.astype('float32') / 255" in done.err or "x.transpose(0, 3, 1, 2)" in done.err
