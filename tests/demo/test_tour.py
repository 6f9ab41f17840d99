"""The whole tour, on fewer steps than the real one."""

from __future__ import annotations

import json
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from batchnorm.demo import run_demo
from batchnorm.demo.datasets import load_digits
from batchnorm.errors import InputError

pytest.importorskip("sklearn", reason="scikit-learn holds the digits")


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory):
    return run_demo(tmp_path_factory.mktemp("tour"), steps=600, progress=False)


def test_norms_learn_sooner_than_the_plain_network_at_its_own_favourite_rate(tour):
    plain = next(run for run in tour.runs if not run.norm and run.learning_rate == tour.best_rate)
    assert tour.winner.norm
    assert tour.winner.loss < plain.loss
    assert tour.winner.probes[-1].accuracy > 0.9


def test_every_run_looked_the_same_number_of_times(tour):
    assert len(tour.runs) == 4
    assert len({tuple(probe.step for probe in run.probes) for run in tour.runs}) == 1
    assert tour.runs[0].probes[-1].step == 600


def test_all_norms_fold_within_the_bound(tour):
    assert len(tour.folded.folded) == 3
    assert not tour.folded.left
    assert tour.folded.error <= tour.folded.bound


def test_the_freeze_holds(tour):
    assert tour.frozen.kept


def test_only_the_corrupted_pictures_are_flagged(tour):
    assert {row.name: row.result.drifted for row in tour.watched} == {
        "test pictures": False,
        "noise (σ = 0.3)": True,
        "inversion": True,
        "rotation (90°)": True,
    }


def test_place_puts_norms_where_the_paper_has_them(tour):
    assert len(tour.placed.placed) == 3


def test_the_report_is_one_file_with_its_plots(tour):
    class Links(HTMLParser):
        def __init__(self):
            super().__init__()
            self.found = []

        def handle_starttag(self, tag, attrs):
            self.found += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]

    page = tour.report.read_text(encoding="utf-8")
    parser = Links()
    parser.feed(page)
    assert parser.found == []
    assert page.count('<figure class="plot">') == 5
    assert page.count('<figure class="diagram">') == 1  # three norms that fold alike


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_opens_in_a_browser_without_a_word_or_a_request(tour, open_page, width: int):
    opened = open_page(tour.report, width=width)
    assert opened.said == []
    assert opened.requested == [tour.report.absolute().as_uri()]
    assert opened.overflow <= 0
    assert len(opened.plot_heights) == 5
    assert min(opened.plot_heights) > 150


def test_the_figures_are_json(tour):
    figures = json.loads(json.dumps(tour.to_dict(), allow_nan=False))
    assert figures["steps"] == 600
    assert figures["freeze"]["statistics_kept_after_train"] is True


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def test_the_tour_runs_on_mnist_files(tmp_path: Path):
    digits = load_digits()
    for split, stem in (("train", "train"), ("test", "t10k")):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte", getattr(digits, f"{split}_images").squeeze(1) * 255)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", getattr(digits, f"{split}_labels"))
    tour = run_demo(tmp_path / "report", dataset="mnist", root=tmp_path, steps=20, progress=False)
    assert tour.pictures == (len(digits.train_images), len(digits.test_images))
    assert tour.report.read_text(encoding="utf-8").count("mnist")
    assert not tour.folded.left


def test_unknown_dataset_and_no_steps(tmp_path: Path):
    with pytest.raises(InputError, match="expected 'digits' or 'mnist'"):
        run_demo(tmp_path, dataset="cifar")
    with pytest.raises(InputError, match="at least 1 step"):
        run_demo(tmp_path, steps=0)
    assert not list(tmp_path.iterdir())
