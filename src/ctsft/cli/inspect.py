"""`ctsft inspect`: the spectra of a model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ctsft.cli.console import MODEL_HELP, err, out_console
from ctsft.errors import CTError
from ctsft.progress import counted, waiting


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    k: Annotated[int, typer.Option(help="Energy is told for the top K.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the spectra: .svg or .png.")] = None,
    universal: Annotated[
        bool, typer.Option("--universal", help="Tell of the universal basis only: one pass, the model is not loaded.")
    ] = False,
) -> None:
    """Show a model's spectra: per matrix its shape, effective rank and energy in the top K, and the universal basis."""
    if k < 1:
        raise CTError(f"--k {k} must be at least 1.")
    if universal and plot:
        raise CTError("--universal takes no spectra of single matrices, so there is nothing to --plot; leave one out.")
    from ctsft.models.load import load_model
    from ctsft.tune.inspect import (
        inspect_model,
        inspect_universal,
        inspection_table,
        plot_spectra,
        universal_table,
    )

    if universal:
        found = inspect_universal(model, k, "universal basis")
        print(json.dumps(found, indent=1)) if as_json else out_console.print(universal_table(found))
        return
    with waiting(err, f"loading {model}"):
        loaded = load_model(model)
    with counted("decomposing") as show:
        result = inspect_model(loaded.model, k, show)
    if plot:
        plot_spectra(result, plot)
        err.print(f"wrote {plot}")
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        out_console.print(inspection_table(result))
