"""The command line, `gfs`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from gfs_report.report import Report

app = typer.Typer(
    name="gfs",
    help="How close a training run is to instability: see it, report on it, try it on your own model, compare runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Format(str, Enum):
    """What a report is written as."""

    html = "html"
    png = "png"
    svg = "svg"
    md = "md"
    json = "json"


# What `gfs pilot` and `gfs doctor` take of a job.
Arguments = Annotated[
    list[str] | None,
    typer.Argument(help="Arguments of the script or config, after `--`.", metavar="[-- ARGUMENTS]"),
]
Data = Annotated[
    str | None, typer.Option(help="With a LightningModule: package.module:name of a DataModule or of a loader.")
]
Patience = Annotated[
    float, typer.Option(min=1.0, help="Seconds without a step or any output after which the job counts as hung.")
]


def fail(error: object) -> NoReturn:
    """Say what was wrong and leave with status 2."""
    typer.echo(f"gfs: {error}", err=True)
    raise typer.Exit(2)


@contextmanager
def told(*failed: type[Exception], out: Path | None = None) -> Iterator[None]:
    """Tell in a line what went wrong with a user's job, and leave.

    Args:
        failed: errors of the job itself: status 1. A mistake in the call is status 2.
        out: folder that is written to; ``None``: none is.
    """
    from gfs_core import ConfigError

    try:
        yield
    except failed as error:
        typer.echo(f"gfs: {error}", err=True)
        raise typer.Exit(1) from None
    except ConfigError as error:
        fail(error)
    except OSError as error:
        if out is None:
            raise
        fail(f"cannot write to {out}: {error}; choose another folder with --out")


def fail_without(error: ModuleNotFoundError, extra: str) -> NoReturn:
    """Say which package is missing, and how to get it."""
    fail(f"this command needs {error.name}: pip install 'gfs-sharpness[{extra}]'")


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
        fail_without(error, "demo")
    try:
        program.run(out, quick=quick)
    except OSError as error:
        fail(f"cannot write to {out}: {error}; choose another folder with --out")


@app.command()
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run's folder, or one of its logs: history.jsonl, a TensorBoard log, Lightning's metrics.csv, the "
            "Trainer's trainer_state.json."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write; its ending names the format.")
    ] = None,
    format: Annotated[Format | None, typer.Option("--format", "-f", help="Page, picture, text or numbers.")] = None,
    loss: Annotated[str | None, typer.Option(help="Your own key of the training loss, where it is not found.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Which optimizer, where the run has several.")] = None,
    part: Annotated[
        int | None,
        typer.Option(min=1, help="Which training, from 1 on, where the history holds several; else the latest."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write the page again while training goes on; Ctrl-C ends it.")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="Seconds between looks, with --watch.")] = 5,
) -> None:
    """Report on a run: the verdict in a few sentences, then the pictures, the numbers and the settings.

    One file that holds all it needs, opens without a network, and can be sent to others:

        gfs report lightning_logs/version_3
        gfs report outputs/history.jsonl -o report.md
        gfs report lightning_logs/version_3 --watch
    """
    from gfs_core import ConfigError

    try:
        from gfs_report import report as program
        from gfs_report.runs import read_run
    except ModuleNotFoundError as error:
        fail_without(error, "report")
    if out is None:
        out = Path(f"gfs-report.{'html' if format is None else format.value}")
    try:
        kind = program.format_of(out) if format is None else format.value
        if watch:
            if kind != "html":
                fail(f"--watch writes a page, not {kind}; let --out end in .html")
            for ending in (signal.SIGINT, signal.SIGTERM):  # a shell that starts it in the background ignores the first
                signal.signal(ending, signal.default_int_handler)
            typer.echo(f"{out} follows {run}; Ctrl-C ends it.")
            program.watch(run, optimizer, out, every=every, part=part, loss_key=loss, told=_tell_where)
            return
        made = program.make_report(read_run(run, optimizer, part), loss)
        program.write_report(made, out, kind)
    except ModuleNotFoundError as error:
        fail_without(error, "report")
    except ConfigError as error:
        fail(error)
    except OSError as error:
        fail(f"cannot write {out}: {error}; choose another file with --out")
    for sentence in made.verdict.sentences:
        typer.echo(sentence)
    if made.run.parts > 1:
        typer.echo(f"This is part {made.run.part} of {made.run.parts} in its history; --part N shows another one.")
    typer.echo(f"→ {out}")


def _tell_where(made: Report) -> None:
    """A line on a run that still trains: that it is destroyed, or where it stands."""
    verdict = made.verdict
    typer.echo(f"step {made.run.steps[1]}: {verdict.summary if verdict.failed else verdict.where}")


@app.command()
def compare(
    sets: Annotated[
        list[str],
        typer.Argument(
            metavar="BASELINE OTHER",
            help="Sets of runs, the first is the baseline: a folder that holds a folder per seed, a glob in quotes, or "
            "several paths joined by commas.",
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option(help="Key of the value to compare: your own (val_loss) or gfs/…  Without it: the training loss."),
    ] = None,
    higher_is_better: Annotated[
        bool, typer.Option("--higher-is-better", help="For an accuracy; else lower counts as better.")
    ] = False,
    final: Annotated[
        float, typer.Option(help="The last part of the steps, whose mean is compared; 0: the last value.")
    ] = 0.1,
    margin: Annotated[
        float | None,
        typer.Option(help="A difference too small to matter, relative to the baseline: 0.01 is 1 %."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a page with the pictures here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all as JSON, for programs.")] = False,
) -> None:
    """Judge by an A/B test what a change did: two or more sets of runs that differ in their seed only.

    Says what the runs end with, with an interval for the difference, which failed or spiked, and what measuring
    cost. Five seeds of each are the least for a verdict:

        gfs compare runs/plain runs/cap --out compare.html
        gfs compare 'logs/plain-*' 'logs/cap-*' --metric val_acc --higher-is-better
        gfs compare runs/plain runs/cap --margin 0.01

    Exit status: 0 better or no difference shown, 1 worse or more runs failed, 2 wrong usage.
    """
    import json

    from rich.console import Console

    from gfs_core import ConfigError

    try:
        from gfs_report.comparison import page
        from gfs_report.comparison.compare import compare as judge
    except ModuleNotFoundError as error:
        fail_without(error, "report")
    try:
        made = judge(sets, metric=metric, higher_is_better=higher_is_better, final=final, margin=margin)
    except (ConfigError, OSError) as error:
        fail(error)
    try:
        if out is not None:
            page.write_comparison(made, out)
    except OSError as error:
        fail(f"cannot write {out}: {error}; choose another file with --out")
    if as_json:
        typer.echo(json.dumps(page.as_dict(made), indent=2, allow_nan=False))
    else:
        page.tell(made, Console())
        if out is not None:
            typer.echo(f"→ {out}")
    raise typer.Exit(made.status)


@app.command()
def pilot(
    target: Annotated[
        str,
        typer.Argument(
            help="Your training script (train.py), LightningCLI config (config.yaml) or LightningModule "
            "(package.module:Name, a class or a function that returns one)."
        ),
    ],
    arguments: Arguments = None,
    data: Data = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 300,
    rates: Annotated[str, typer.Option(help="Factors on the job's own learning rate.")] = "0.5,1,2",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the page and the runs.")] = Path("gfs-pilot"),
    patience: Patience = 600.0,
) -> None:
    """Try it on your own job: does the stability ratio behave there, what does it cost, what to set.

    Runs the job unchanged for a few hundred steps at a few factors on its learning rate.

    Nothing is saved, logged elsewhere or run after the training. Leaves `index.html` and `pilot.json`:

        gfs pilot train.py -- --lr 0.1
        gfs pilot config.yaml --steps 500
        gfs pilot package.module:Net --data package.module:loader --rates 1,2,4

    Exit status: 0, the signals behave; 1, they do not, or the job failed; 2, nothing that can be run.
    """
    try:
        from rich.console import Console

        from gfs_report import jobs, terminal
        from gfs_report.trial import pilot as program
        from gfs_report.trial.page import write_pilot
    except ModuleNotFoundError as error:
        fail_without(error, "report")
    console = Console()
    try:
        factors = [float(r) for r in rates.split(",")]
    except ValueError:
        fail(f"--rates must be numbers with commas between them, such as 0.5,1,2; got {rates!r}")
    with told(jobs.JobFailed, out=out):
        with terminal.progress(console, steps) as shown:
            found = program.pilot(
                jobs.target(target, arguments or (), data),
                steps=steps,
                rates=factors,
                out=out,
                patience=patience,
                told=lambda factor, step: shown(f"rate ×{factor:g}", step),
            )
        page = write_pilot(found, out)
    terminal.show_pilot(found, console)
    typer.echo(f"→ {page}")
    raise typer.Exit(0 if found.behaves else 1)


@app.command()
def rate(
    target: Annotated[
        str,
        typer.Argument(help="As with `gfs pilot`: your training script, LightningCLI config or LightningModule."),
    ],
    arguments: Arguments = None,
    data: Data = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps of the whole training; without it, those that its trainer takes."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the page and the runs.")] = Path("gfs-rate"),
    patience: Patience = 600.0,
) -> None:
    """Find a learning rate before the training, by trying it out: one rate with its range, and what it rests on.

    A ramp, a run whose rate rises from step to step, shows where the loss is lost. Short runs of your own schedule,
    a tenth of the steps over a tenth of the data, then decide, on validation data where there are some.

    Nothing is saved, logged elsewhere or run after the training. Leaves `index.html` and `rate.json`:

        gfs rate train.py -- --lr 0.1
        gfs rate config.yaml
        gfs rate package.module:Net --data package.module:loader --steps 2000

    Exit status: 0, a rate was found; 1, none was, or the job failed; 2, nothing that can be run.
    """
    from gfs_core import MeasurementError

    try:
        from rich.console import Console

        from gfs_report import jobs, terminal
        from gfs_report.rate import search
        from gfs_report.rate.page import write_rate
    except ModuleNotFoundError as error:
        fail_without(error, "report")
    console = Console()
    with told(jobs.JobFailed, MeasurementError, out=out):
        with terminal.progress(console, 1) as shown:
            job = jobs.target(target, arguments or (), data)
            found = search.find(job, steps=steps, out=out, patience=patience, told=shown)
        page = write_rate(found, out)
    terminal.show_rate(found, console)
    typer.echo(f"→ {page}")


@app.command()
def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            help="As with `gfs pilot`: your training script, LightningCLI config or LightningModule. Without it: what "
            "is installed."
        ),
    ] = None,
    arguments: Arguments = None,
    data: Data = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON and nothing else.")] = False,
    patience: Patience = 600.0,
) -> None:
    """Check a job: can it be measured, exactly or not and why, for what price, in what memory; and what to set.

    Runs the first steps of the job, measures every tier on its own batches, and ends it. Nothing is saved:

        gfs doctor
        gfs doctor train.py -- --lr 0.1
        gfs doctor package.module:Net --data package.module:loader --json

    Exit status: 0, it can be measured; 1, it cannot, or the job failed; 2, nothing that can be run.
    """
    import json

    try:
        from rich.console import Console

        from gfs_report import doctor as program
        from gfs_report import jobs, terminal
    except ModuleNotFoundError as error:
        fail_without(error, "report")
    console = Console(stderr=as_json)
    if target is None:
        packages, accelerators = program.installed(), program.accelerators()
        if as_json:
            typer.echo(json.dumps({"installed": [vars(p) for p in packages], "accelerators": accelerators}, indent=1))
        else:
            terminal.show_installed(packages, accelerators, console)
        return
    with told(jobs.JobFailed), terminal.progress(console, program.STEPS) as shown:
        job = jobs.target(target, arguments or (), data)
        found = program.examine(job, patience=patience, told=lambda step: shown("first steps", step))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    else:
        terminal.show_examination(found, console)
    raise typer.Exit(0 if found.measurable else 1)
