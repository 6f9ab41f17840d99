"""Fold random networks, and compare each with itself on inputs, and at sizes, that the folding has not seen.

    python -m benchmarks.fold.fuzz [--graphs 10000] [--seed 0]

Prints how many norms were folded, and every network that computes something else afterwards; exits with 1 if one does.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import NamedTuple

import torch
from benchmarks.fold.random_models import random_model
from torch import Tensor

from batchnorm import fold

__all__ = ["check"]

_WRONG = 1e-8
_SIZES = ((3, 6, 6), (1, 6, 6), (1, 7, 9), (5, 12, 5), (4, 9, 33), (2, 4, 6), (7, 8, 8))
"""Batch, height and width of the inputs that are compared; the folding gets two of 6 × 6."""


class Checked(NamedTuple):
    """What became of a network.

    Attributes:
        folded: number of norms folded.
        left: number of norms left.
        error: the largest difference of an output, relative to the largest output.
        compared: number of inputs that were compared: of those sizes at which the network runs.
    """

    folded: int
    left: int
    error: float
    compared: int


def check(seed: int) -> Checked:
    """Fold the network of a seed, and compare it with itself at sizes that the folding has not seen."""
    model, shape = random_model(seed)
    generator = torch.Generator().manual_seed(seed)
    example = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    result = fold(model, example, borders=seed % 2 == 1, fuse=seed % 4 > 1)
    error, compared = 0.0, 0
    for batch, height, width in _SIZES:
        x = torch.randn(batch, shape[0], height, width, generator=generator, dtype=torch.float64)
        one, other = x.clone(), x.clone()
        with torch.no_grad():
            try:
                before = model(one)
            except Exception:  # it does not run at that size
                continue
            after = result.model(other)
        if not torch.equal(one, other):
            raise ValueError("the folded model does something else to its input")
        compared += 1
        errors = (_error(a, b) for a, b in zip(before, after, strict=True))
        error = max(error, *errors)
    return Checked(len(result.folded), len(result.left), error, compared)


def _error(before: Tensor, after: Tensor) -> float:
    return float((before - after).abs().max()) / max(float(before.abs().max()), 1.0) if before.numel() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=10_000, help="how many networks")
    parser.add_argument("--seed", type=int, default=0, help="that of the first one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folded = left = compared = 0
    wrong: list[int] = []
    failed: Counter[str] = Counter()
    worst = 0.0
    for seed in range(options.seed, options.seed + options.graphs):
        try:
            gone, stay, error, inputs = check(seed)
        except Exception as problem:  # a failure is a result, and the next network is another
            failed[f"{type(problem).__name__}: {str(problem)[:160]}"] += 1
            print(f"seed {seed}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
            continue
        folded, left, compared, worst = folded + gone, left + stay, compared + inputs, max(worst, error)
        if not error <= _WRONG:
            wrong.append(seed)
            print(f"seed {seed}: off by {error:.3g}\n{random_model(seed)[0].describe()}", flush=True)
    print(
        f"{options.graphs} networks from seed {options.seed}: {folded} norms folded, {left} left; {compared} inputs "
        f"compared, {len(wrong)} networks wrong, {failed.total()} failed; largest relative difference {worst:.2g}"
    )
    sys.exit(bool(wrong or failed))


if __name__ == "__main__":
    main()
