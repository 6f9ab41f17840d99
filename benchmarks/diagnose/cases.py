"""One case: a fault is planted, its damage measured, the model diagnosed, and a row written of what was found."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.diagnose.damage import measure
from benchmarks.diagnose.faults import FAULTS, HEALTHY, Fault, Planted

from batchnorm.errors import StateError

__all__ = ["HEALTHY_CAUSE", "NOTHING", "Row", "place", "run"]

Row = dict[str, Any]
Diagnose = Callable[..., Any]
HEALTHY_CAUSE, NOTHING = "healthy", "nothing"
_TOLD = 3  # findings that a row keeps


def place(names: Sequence[str], architecture: str, seed: int, with_training: bool) -> list[Row]:
    """Return the rows of all named faults in one architecture, for one seed: what is trained serves them all."""
    from batchnorm.diagnosis import diagnose

    torch.set_num_threads(1)
    rows = []
    for name in names:
        fault = FAULTS.get(name) or HEALTHY[name]
        if architecture in fault.architectures:
            rows.append(run(fault, architecture, seed, diagnose, with_training))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def run(fault: Fault, architecture: str, seed: int, diagnose: Diagnose, with_training: bool = True) -> Row:
    """Return the row of one case; a diagnose that fails is a row too, with nothing found and the reason in it."""
    start = time.process_time()
    planted = fault(architecture, seed)
    damage = measure(planted)
    middle = time.process_time()
    found, failed = _diagnosed(planted, diagnose, with_training)
    first = found[0] if found else {"cause": None, "layer": None}
    healthy = fault.cause == HEALTHY_CAUSE
    return {
        "architecture": architecture,
        "fault": fault.name,
        "seed": seed,
        "cause": fault.cause,
        "layers": sorted(planted.layers),
        "found": found,
        "failed": failed,
        "right_cause": not found and not failed if healthy else first["cause"] == fault.cause,
        "right_layer": not found and not failed if healthy else first["layer"] in planted.layers,
        "accuracy_before": round(damage.accuracy_before, 4),
        "accuracy_after": round(damage.accuracy_after, 4),
        "output_gap": float(f"{damage.output_gap:.3g}"),
        "decisions": round(damage.decisions, 4),
        "layer_gap": None if damage.layer_gap is None else float(f"{damage.layer_gap:.3g}"),
        "seconds_planting": round(middle - start, 2),
        "seconds": round(time.process_time() - middle, 2),
    }


def _diagnosed(planted: Planted, diagnose: Diagnose, with_training: bool) -> tuple[list[Row], str]:
    """Return the first findings, and why there are none where diagnose did not come to an end.

    A model without a norm is no case for diagnose, and to say so is the right answer.
    """
    extra: dict[str, Any] = {"training_batches": planted.training_batches} if with_training else {}
    if planted.metric is not None:
        extra["loss_or_metric"] = planted.metric
    try:
        result = diagnose(planted.model, planted.batches, progress=False, **extra)
    except StateError as refusal:
        return [], "" if "no batch norm" in str(refusal) and not planted.layers else f"StateError: {refusal}"
    except Exception as error:  # a failure is a result of this benchmark, not its end
        return [], f"{type(error).__name__}: {error}"
    told = result.findings[:_TOLD]
    return [{"cause": finding.cause, "layer": finding.layer, "severity": str(finding.severity)} for finding in told], ""


def _line(row: Row) -> str:
    """Return what is printed of a case while it runs: what was planted, what it did, what was found first."""
    mark = "ok" if row["right_cause"] and row["right_layer"] else "--"
    damage = f"{row['accuracy_before']:.3f} → {row['accuracy_after']:.3f}, outputs {row['output_gap']:.2g}"
    first = f"{row['found'][0]['cause']} at {row['found'][0]['layer']}" if row["found"] else row["failed"] or NOTHING
    where = ", ".join(row["layers"])
    return f"{mark} {row['architecture']} {row['seed']} {row['fault']} at {where or '-'} ({damage}): {first}"
