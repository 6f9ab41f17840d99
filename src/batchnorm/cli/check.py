"""``batchnorm check``: placement and misuse of norms, rule by rule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from batchnorm.cli.errors import CommandError
from batchnorm.cli.options import (
    BatchSize,
    Data,
    Debug,
    Html,
    Inputs,
    Json,
    Model,
    Output,
    Seed,
    Verbose,
    Weights,
    examples,
)

if TYPE_CHECKING:
    from batchnorm.checks import CheckResult, FixResult

__all__ = ["EPILOG", "check"]

EPILOG = examples(
    "batchnorm check -m net:build -i 8,3,32,32",
    "batchnorm check -m net:build -i 8,3,32,32 --format sarif > check.sarif",
    "batchnorm check -m net:build -w net.pt -i 8,3,32,32 --fix -o fixed.pt",
    "batchnorm check --rules",
)
_RULES = "The rules"


def _print_rules(wanted: bool) -> None:
    if wanted:
        from batchnorm.checks.rules import RULES

        for rule in RULES:
            off = "" if rule.by_default else " Off unless selected."
            typer.echo(f"{rule.code}  {rule.name:28}  {rule.summary()}{off}")
        raise typer.Exit


def check(
    model: Model,
    weights: Weights = None,
    evaluate: Annotated[
        bool,
        typer.Option("--eval", metavar="", help="Put the model in eval mode first, to check it as it is deployed."),
    ] = False,
    seed: Seed = 0,
    inputs: Inputs = None,
    data: Data = None,
    batch_size: BatchSize = 64,
    select: Annotated[
        list[str] | None,
        typer.Option("--select", metavar="CODES", rich_help_panel=_RULES, help="Only these rules: BN001,BN004."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="CODES", rich_help_panel=_RULES, help="All but these rules.")
    ] = None,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix", metavar="", rich_help_panel=_RULES, help="Mend what can be mended safely; needs --output."
        ),
    ] = False,
    unsafe_fixes: Annotated[
        bool,
        typer.Option(
            "--unsafe-fixes",
            metavar="",
            rich_help_panel=_RULES,
            help="With --fix, also mend what changes the outputs of the model, which then has to be trained again.",
        ),
    ] = False,
    rules: Annotated[
        bool,
        typer.Option(
            "--rules",
            metavar="",
            rich_help_panel=_RULES,
            is_eager=True,
            callback=_print_rules,
            help="List the rules and exit.",
        ),
    ] = False,
    output: Output = None,
    html: Html = None,
    format_: Annotated[
        Literal["text", "json", "sarif"],
        typer.Option("--format", rich_help_panel="Output", help="How the findings are printed on stdout."),
    ] = "text",
    json_: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """Find misplaced and misused norms, rule by rule, and mend them.

    The model is run once on the example input, in the modes that it comes in.
    Exits with 1 when there are findings, after --fix when any are left.
    """
    from batchnorm.cli.output import check_apart, check_destinations, only_result_on_stdout, writing

    if fix != (output is not None):
        raise CommandError("--fix and --output go together: the mended model has to be written somewhere.")
    if unsafe_fixes and not fix:
        raise CommandError("--unsafe-fixes: give --fix too.")
    check_destinations(output, html)
    check_apart({"--output": output, "--html": html})
    with only_result_on_stdout():
        from batchnorm.checks import check as run
        from batchnorm.cli.load import load_example, load_model
        from batchnorm.cli.save import save_model

        network = load_model(model, weights, seed=seed)
        if evaluate:
            network.eval()
        example = load_example(network, inputs, data, batch_size=batch_size, seed=seed)
        found = run(network, example, select=_split(select), ignore=_split(ignore))
        fixed = None
        if output is not None:
            fixed = found.fix(unsafe=unsafe_fixes)
            found = run(fixed.model, example, select=_split(select), ignore=_split(ignore))
        with writing(weights) as files:
            files.write("--html", html, (fixed or found).to_html)
            if fixed is not None:
                save_model(fixed.model, output, files=files)
    _publish(found, fixed, "json" if json_ else format_, verbose, html, output, _source(model))
    return 1 if found.findings else 0


def _publish(
    left: CheckResult,
    fixed: FixResult | None,
    format_: str,
    verbose: bool,
    html: Path | None,
    output: Path | None,
    source: str | None,
) -> None:
    """Show what was found or, after fixing, what was fixed and what is left."""
    from batchnorm.cli.output import print_json, publish

    if format_ == "sarif":
        print_json(left.to_sarif(source=source))
    elif fixed is None:
        publish(left, json_=format_ == "json", verbose=verbose, html=html)
    else:
        findings = {} if format_ == "text" else left.to_dict()
        publish(fixed, json_=format_ == "json", verbose=verbose, html=html, output=output, **findings)
        _note_consequences(fixed, model_of=source)


def _note_consequences(fixed: FixResult, model_of: str | None) -> None:
    """Tell what is left to do by hand."""
    from batchnorm.cli.output import note

    if fixed.dropped:
        keys = ", ".join(fixed.dropped[:3]) + (", …" if len(fixed.dropped) > 3 else "")
        note(f"the state dict written no longer holds {keys}: change {model_of or 'the code'} likewise (bias=False).")
    if any(entry.finding.fix is not None and not entry.finding.fix.safe for entry in fixed.left):
        note("--unsafe-fixes mends more, and changes what the model computes.")


def _source(model: str) -> str | None:
    """Return the file of the module that ``--model`` names, relative to the current directory where it is in it."""
    file = getattr(sys.modules.get(model.partition(":")[0]), "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def _split(codes: list[str] | None) -> list[str] | None:
    """Return the codes of ``--select BN001,BN002 --select BN003`` one by one; None if there are none."""
    return [code.strip() for several in codes or () for code in several.split(",") if code.strip()] or None
