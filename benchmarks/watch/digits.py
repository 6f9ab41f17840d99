"""How often watch flags pictures that are as in training, and pictures that are not.

    .venv/bin/python benchmarks/watch/digits.py

Trains the network of the tour on scikit-learn's digits, recalibrates it, and shows it random subsets of the held-out
pictures, as they are and corrupted as in the tour. Prints, for every size of subset, the share of subsets flagged and
the median distance.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table

from batchnorm import recalibrate, watch
from batchnorm.demo.corruptions import CORRUPTIONS
from batchnorm.demo.datasets import load_digits
from batchnorm.demo.training import BATCH, train

SIZES = (16, 32, 64, 128, 450)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subsets", type=int, default=300, help="random subsets of each size")
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_digits(options.seed)
    network = train(data, norm=True, learning_rate=3.0, steps=options.steps, seed=options.seed, probes=1).network
    recalibrate(network, data.train_images.split(BATCH), progress=False)
    network.eval()

    kinds = {"as in training": lambda images: images, **CORRUPTIONS}
    table = Table("pictures", *(f"{size}" for size in SIZES), title="share of subsets flagged (median distance)")
    for name, corrupt in kinds.items():
        images = corrupt(data.test_images)
        generator = torch.Generator().manual_seed(options.seed)
        cells = []
        for size in SIZES:
            count = options.subsets if size < len(images) else 1
            subsets = [torch.randperm(len(images), generator=generator)[:size] for _ in range(count)]
            seen = [_show(network, images[subset]) for subset in subsets]
            flagged = sum(drifted for drifted, _ in seen) / count
            cells.append(f"{flagged:.1%} ({statistics.median(distance for _, distance in seen):.2f})")
        table.add_row(name, *cells)
    Console(width=120).print(table)


@torch.no_grad()
def _show(network: torch.nn.Module, images: torch.Tensor) -> tuple[bool, float]:
    with watch(network) as watching:
        network(images)
    result = watching.result()
    return result.drifted, max(layer.distance or 0.0 for layer in result.layers)


if __name__ == "__main__":
    main()
