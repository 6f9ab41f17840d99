"""``batchnorm unfold``: the norms of a folded model given back, from the file that was kept beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.options import Debug, Html, Json, Model, Output, Seed, Verbose, examples
from batchnorm.report import Document, Result, Section, Table
from batchnorm.report.provenance import Provenance
from batchnorm.report.result import record

if TYPE_CHECKING:
    from torch.nn import Module

    from batchnorm.folding.writing.record import FoldRecord

__all__ = ["EPILOG", "Unfolded", "unfold"]

EPILOG = examples(
    "batchnorm fold -m net:build -i 8,3,32,32 -o f.pt --pairs p.safetensors",
    "batchnorm unfold -m net:build -w f.pt --pairs p.safetensors -o again.pt",
)


@dataclass(frozen=True, repr=False)
class Unfolded(Result):
    """What is there again.

    Attributes:
        model: the class of the model.
        norms: their names, and their classes.
        parameters: names of those that are what they were.
        removed: names of the biases that folding had added.
    """

    model: str
    norms: Sequence[tuple[str, str]]
    parameters: Sequence[str]
    removed: Sequence[str]

    def document(self) -> Document:
        """Return the report as data."""
        count = len(self.norms)
        summary = (
            f"{count} {'norm is' if count == 1 else 'norms are'} back, with the statistics and weights from before."
        )
        rows = [(name, "as it was") for name in self.parameters] + [(name, "removed") for name in self.removed]
        sections = [
            Section("Norms", [Table(("norm", "class"), list(self.norms))]),
            Section("What had absorbed them", [Table(("parameter", "now"), rows)]),
        ]
        return Document(f"Unfold {self.model}", summary, sections, "good")

    def to_dict(self) -> dict[str, Any]:
        """Return the result as strings and lists."""
        norms = [{"name": name, "class": kind} for name, kind in self.norms]
        return {"verb": "unfold", **asdict(self), "norms": norms}


def unfold(
    model: Model,
    weights: Annotated[
        Path,
        typer.Option(
            "--weights",
            "-w",
            metavar="FILE",
            help="The folded state dict, which batchnorm fold wrote: .safetensors, .pt, .pth. No code in the file is "
            "ever run.",
        ),
    ],
    pairs: Annotated[
        Path,
        typer.Option(
            "--pairs", metavar="FILE", help="What batchnorm fold --pairs, or result.save_pairs, wrote beside it."
        ),
    ],
    seed: Seed = 0,
    output: Output = None,
    html: Html = None,
    json_: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """Give a folded model its norms, statistics and weights back, bit for bit.

    The model is built as it was before folding, given the shape of the folded
    one, and the folded weights; weights that were trained since are refused.
    """
    from batchnorm.cli.output import check_apart, check_destinations, only_result_on_stdout, publish, writing

    check_destinations(output, html)
    check_apart({"--output": output, "--html": html}, {"--weights": weights, "--pairs": pairs})
    with only_result_on_stdout():
        from batchnorm.cli.load import load_model
        from batchnorm.cli.load.weights import fit_weights, read_weights
        from batchnorm.cli.save import save_model
        from batchnorm.folding.unfold import unfold as run
        from batchnorm.nn.provenance import describe

        network = load_model(model, seed=seed)
        known = _read_pairs(pairs, network)
        _refold(network, known, model, pairs)
        fit_weights(network, read_weights(weights), weights)
        run(network, known, inplace=True)
        result = _result(network, known)
        about, device = describe(network)
        record(result, Provenance("batchnorm.unfold", about, device=device))
        with writing(weights, pairs) as files:
            files.write("--html", html, result.to_html)
            save_model(network, output, files=files)
    publish(result, json_=json_, verbose=verbose, html=html, output=output)
    return 0


def _read_pairs(path: Path, like: Module) -> FoldRecord:
    from batchnorm.cli.errors import CommandError
    from batchnorm.errors import BatchNormError
    from batchnorm.folding.writing.record import FoldRecord

    if not path.is_file():
        raise CommandError(f"--pairs {path}: no such file.")
    try:
        return FoldRecord.load(path, like)
    except BatchNormError as error:
        raise CommandError(f"--pairs {error}") from error


def _refold(network: Module, pairs: FoldRecord, model: str, path: Path) -> None:
    from batchnorm.cli.errors import CommandError
    from batchnorm.errors import StateError
    from batchnorm.folding.refold import refold

    try:
        refold(network, pairs, inplace=True)
    except StateError as error:
        said = str(error).removeprefix("refold: ")
        raise CommandError(f"--pairs {path} does not fit --model {model}: {said}") from error


def _result(network: Module, pairs: FoldRecord) -> Unfolded:
    norms = [(name, type(norm).__name__) for name, norm in pairs.norms.items()]
    kept = sorted(name for name, tensor in pairs.parameters.items() if tensor is not None)
    return Unfolded(type(network).__name__, norms, kept, list(pairs.added))
