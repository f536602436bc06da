"""``gfs``: the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="How close a training run is to instability.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def _root() -> None:
    """Keep `demo` a subcommand although it is the only one so far."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the log, the history and the page.")] = Path("gfs-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke test of a few seconds; too short to show much.")
    ] = False,
) -> None:
    """Train a small real classifier into the edge of stability, and draw what happens.

    A network learns handwritten digits by full-batch gradient descent, with one callback added. Leaves a
    TensorBoard log, `history.jsonl` and a page, `index.html`.
    """
    try:
        from gfs_report import demo as program
    except ModuleNotFoundError as error:
        typer.echo(f"gfs demo needs {error.name}: pip install 'gfs-sharpness[demo]'", err=True)
        raise typer.Exit(2) from None
    try:
        program.run(out, quick=quick)
    except OSError as error:
        typer.echo(f"cannot write to {out}: {error}; choose another folder with --out", err=True)
        raise typer.Exit(2) from None
