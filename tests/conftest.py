"""One thread for torch, random numbers that are the same in every run, and a browser for the reports."""

from __future__ import annotations

import random
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tensors in tests are small, and tests may run side by side


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start every test from random numbers of its own, whatever ran before it; not those of a seed that tests use."""
    seed = zlib.crc32(item.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the sweeps all but each n-th case of a test that says so by ``pytest.mark.every(n)``.

    Cases are counted by the sum of the places of their values, each among those of its parameter: along the diagonals.
    """
    places: dict[tuple[Any, Any], dict[tuple[int, ...], int]] = defaultdict(dict)
    for item in items:
        every = item.get_closest_marker("every")
        if every is None:
            continue
        case: Any = item
        total = 0
        for mark in item.iter_markers("parametrize"):
            names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else mark.args[0]
            place = places[case.function, tuple(names)]
            total += place.setdefault(tuple(id(case.callspec.params[name]) for name in names), len(place))
        if total % every.args[0]:
            item.add_marker(pytest.mark.sweep)


@dataclass(frozen=True)
class Opened:
    """A page in a browser: what the console said, what was requested, and how it is laid out, in pixels."""

    said: list[str]
    requested: list[str]
    overflow: float
    plot_heights: list[float]
    table_overflows: list[float]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium for all pages of a module, since it keeps an event loop; skipped where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Callable[..., Opened]:
    """Return a function that opens a file in the browser, as if nothing had been opened before."""

    def opened(path: Path, *, width: int, scheme: str = "light") -> Opened:
        said: list[str] = []
        requested: list[str] = []
        page = browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme=scheme
        )  # in a context of its own
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(path.as_uri())
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        plots = "[...document.querySelectorAll('.plot svg')]"
        heights = page.evaluate(f"{plots}.map(s => s.getBoundingClientRect().height)")
        tables = "[...document.querySelectorAll('.scroll')]"
        overflows = page.evaluate(f"{tables}.map(s => s.scrollWidth - s.clientWidth)")
        page.close()
        return Opened(said, [url for url in requested if not url.startswith("data:")], overflow, heights, overflows)

    return opened


@pytest.fixture
def deferring(monkeypatch):
    """Defer marked layers on small inputs too, and without native kernels, where nothing is gained by it."""
    monkeypatch.setattr("batchnorm.nn.pending._pays", lambda layer, input: True)
