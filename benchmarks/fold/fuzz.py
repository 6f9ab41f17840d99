"""Fold random networks, and compare each with itself on inputs that the folding has not seen.

    python -m benchmarks.fold.fuzz [--graphs 10000] [--seed 0]

Prints how many norms were folded, and every network that computes something else afterwards; exits with 1 if one does.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch
from benchmarks.fold.random_models import random_model

from batchnorm import fold

__all__ = ["check"]

_WRONG = 1e-8


def check(seed: int) -> tuple[int, int, float]:
    """Fold the network of a seed.

    Returns:
        Norms folded, norms left, and the largest difference of an output, relative to the largest output, on other
        inputs in a batch of another size.
    """
    model, shape = random_model(seed)
    generator = torch.Generator().manual_seed(seed)
    example = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    result = fold(model, example, borders=seed % 2 == 1, fuse=seed % 4 > 1)
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    one, other = x.clone(), x.clone()
    with torch.no_grad():
        before, after = model(one), result.model(other)
    if not torch.equal(one, other):
        raise ValueError("the folded model does something else to its input")
    error = max(float((a - b).abs().max()) / max(float(a.abs().max()), 1.0) for a, b in zip(before, after, strict=True))
    return len(result.folded), len(result.left), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=10_000, help="how many networks")
    parser.add_argument("--seed", type=int, default=0, help="that of the first one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folded = left = 0
    wrong: list[int] = []
    failed: Counter[str] = Counter()
    worst = 0.0
    for seed in range(options.seed, options.seed + options.graphs):
        try:
            gone, stay, error = check(seed)
        except Exception as problem:  # a failure is a result, and the next network is another
            failed[f"{type(problem).__name__}: {str(problem)[:160]}"] += 1
            print(f"seed {seed}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
            continue
        folded, left, worst = folded + gone, left + stay, max(worst, error)
        if not error <= _WRONG:
            wrong.append(seed)
            print(f"seed {seed}: off by {error:.3g}\n{random_model(seed)[0].describe()}", flush=True)
    print(
        f"{options.graphs} networks from seed {options.seed}: {folded} norms folded, {left} left; {len(wrong)} wrong, "
        f"{failed.total()} failed; largest relative difference {worst:.2g}"
    )
    sys.exit(bool(wrong or failed))


if __name__ == "__main__":
    main()
