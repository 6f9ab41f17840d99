"""``batchnorm info``: what is installed and what it runs on."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchnorm.cli.options import Debug, Json, examples
from batchnorm.report import Document, Facts, Paragraph, Result, Section, Table

__all__ = ["EPILOG", "Info", "gather", "info"]

EPILOG = examples("batchnorm info", "batchnorm info --json")

_PACKAGES = ("torch", "numpy", "safetensors", "typer", "rich", "jinja2", "matplotlib", "scikit-learn")


@dataclass(frozen=True, repr=False)
class Info(Result):
    """Versions and surroundings, as in a bug report.

    ``native`` says which instruction set the native kernels run, or why there are none; ``backends`` are in order of
    preference; ``active`` says for each device which one serves a float32 call in training, in eval and with a mask.
    """

    batchnorm: str
    location: str
    python: str
    platform: str
    packages: dict[str, str | None]
    cpu: str
    threads: int
    cuda: str | None
    devices: list[str]
    native: str
    backends: list[str]
    active: dict[str, dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self)

    def document(self) -> Document:
        """Return all of it as a report."""
        where = Facts(
            [
                ("location", self.location),
                ("python", self.python),
                ("platform", self.platform),
                *((name, version or "not installed") for name, version in self.packages.items()),
            ]
        )
        machine = Facts(
            [
                ("cpu instructions torch uses", self.cpu),
                ("native kernels", self.native),
                ("threads", self.threads),
                ("CUDA torch was built for", self.cuda or "none"),
                ("devices", ", ".join(self.devices)),
            ]
        )
        served = Table(
            ("device", "training", "eval", "with a mask"),
            [(device, row["training"], row["eval"], row["masked"]) for device, row in self.active.items()],
        )
        known = Paragraph(f"Backends, the preferred one first: {', '.join(self.backends)}.")
        sections = [
            Section("Installed", [where]),
            Section("Machine", [machine]),
            Section("Who serves a large call, norm + ReLU", [served, known]),
        ]
        return Document(
            f"batchnorm {self.batchnorm}",
            f"With torch {self.packages['torch']} on {', '.join(self.devices)}.",
            sections,
        )


def info(json_: Json = False, debug: Debug = False) -> int:
    """Show versions, threads, devices, and which backend runs the norms.

    What a bug report needs.
    """
    from batchnorm.cli.output import print_json, print_result

    found = gather()
    if json_:
        print_json(found.to_dict())
    else:
        print_result(found)
    return 0


def gather() -> Info:
    """Return what is installed and what it runs on."""
    import torch

    import batchnorm
    from batchnorm.functional import backends

    devices = _devices()
    return Info(
        batchnorm=batchnorm.__version__,
        location=str(Path(batchnorm.__file__).parent),
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages={name: _version(name) for name in _PACKAGES},
        cpu=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        cuda=torch.version.cuda,
        devices=list(devices.values()),
        native=_native(),
        backends=list(backends()),
        active={device: _active(device) for device in devices},
    )


def _native() -> str:
    from batchnorm.kernels import native

    if native.missing is not None:
        return f"none: {native.missing}"
    others = [isa for isa in native.available_isas() if isa != native.isa()]
    return f"{native.isa()} (BATCHNORM_ISA chooses; also here: {', '.join(others) or 'no other'})"


def _devices() -> dict[str, str]:
    import torch

    names = {"cpu": f"cpu ({platform.machine()})"}
    for index in range(torch.cuda.device_count()):
        names[f"cuda:{index}"] = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
    if torch.backends.mps.is_available():
        names["mps"] = "mps"
    return names


def _active(device: str) -> dict[str, str]:
    import torch

    from batchnorm.functional import active_backend

    # large enough for the native kernels, and with what they save a trip through memory for in evaluation as well
    x = torch.ones(64, 64, 256, device=device)
    return {
        "training": active_backend(x, training=True, activation="relu"),
        "eval": active_backend(x, activation="relu"),
        "masked": active_backend(x, training=True, mask=torch.ones(64, 256, dtype=torch.bool, device=device)),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
