"""The first norm's statistics against the float64 moments of the whole stream, for every kind of cut and of values."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.recalibrate.methods import METHODS
from torch import nn

from batchnorm.moments import Moments

CHANNELS, SIDE, SAMPLES = 8, 12, 512
VALUES = {"0 ± 1": (0.0, 1.0), "10⁴ ± 0.1": (1e4, 0.1), "−3·10⁵ ± 2": (-3e5, 2.0), "10¹⁵ ± 10¹⁵": (1e15, 1e15)}
CUTS = {"one batch": [SAMPLES], "batches of 7, the last of 1": [7] * 73 + [1], "single samples": [1] * SAMPLES}
SHOWN = ("update_bn", "parallel", "sequential")


def measure() -> list[dict[str, Any]]:
    """Return a row a distribution, cut and method: the largest errors of mean (relative to σ + |mean|) and variance."""
    rows = []
    for values, (mean, deviation) in VALUES.items():
        x = torch.randn(SAMPLES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * deviation + mean
        exact = Moments.of(x)
        variance = exact.variance(correction=1)
        for cut, sizes in CUTS.items():
            for method in SHOWN:
                norm = nn.BatchNorm2d(CHANNELS)
                METHODS[method](norm, x.split(sizes))
                # the buffers are float32: a mean is rounded relative to itself
                mean_error = (norm.running_mean.double() - exact.mean).abs() / (variance.sqrt() + exact.mean.abs())
                errors = [float(mean_error.max()), float((norm.running_var.double() / variance - 1).abs().max())]
                rows.append({"question": "streams", "values": values, "cut": cut, "method": method, "errors": errors})
                print(
                    f"{values}, {cut}: {method}: mean off by {errors[0]:.1e}, variance by {errors[1]:.1e}", flush=True
                )
    return rows
