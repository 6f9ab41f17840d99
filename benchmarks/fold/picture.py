"""Draw the manual's picture of a report: one norm that is cut in two, before and after.

``python -m benchmarks.fold.picture``
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.report.diagrams import to_svg

PATH = Path(__file__).resolve().parents[2] / "docs" / "images" / "fold_report.svg"


class Unit(nn.Module):
    """A residual sum, a norm, a ReLU, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return conv2(relu(bn(conv1(x) + x)))."""
        return self.conv2(torch.relu(self.bn(self.conv1(x) + x)))


def main() -> None:
    torch.manual_seed(0)
    unit = Unit().eval()
    unit.bn.running_mean.normal_()
    (diagram,) = batchnorm.fold(unit, torch.randn(1, 8, 8, 8)).pictures.folded.diagrams
    svg = to_svg(diagram)
    begin = svg.index(">") + 1  # a ground of its own: the page that shows it may be dark
    PATH.write_text(f'{svg[:begin]}<rect width="100%" height="100%" style="fill: #ffffff"/>{svg[begin:]}\n')
    print(f"wrote {PATH}; {diagram.caption}")


if __name__ == "__main__":
    main()
