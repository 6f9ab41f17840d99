"""How the manual's figures are begun and kept, so that the same rows give the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["save", "subplots"]


def subplots(*args: Any, fonttype: str = "none", **kwargs: Any) -> Any:
    """Return a figure and its panels, as ``matplotlib.pyplot.subplots`` does.

    Args:
        args: of that.
        fonttype: how SVG holds text: ``"none"`` as text, ``"path"`` as outlines, for who has other fonts.
        kwargs: of that.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": fonttype, "svg.hashsalt": "batchnorm", "font.size": 10})
    from matplotlib import pyplot as plt

    return plt.subplots(*args, **kwargs)


def save(figure: Any, path: Path) -> None:
    """Write a figure, on white and without a date; the file's suffix says in which format."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
