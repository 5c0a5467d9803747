"""`vitruvian`: the whole chain, and what comes out of it, from the command line."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from launchers import chain, model_commands, slurm
from launchers.console import AsJson, setup_logging, table
from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.config_file import did_you_mean, load_pipeline
from pipeline.errors import ConfigError, VitruvianError
from pipeline.files import read_json
from pipeline.graph import StagePlan
from pipeline.status import read_status
from pipeline.tracking.tracker import sync_all
from stages import KINDS

logger = logging.getLogger("vitruvian")

app = typer.Typer(
    help="From raw pose data to a small, fast pose model: staged jobs chained through checkpoint artifacts.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at raw datasets before training on them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

PipelineArgument = Annotated[str, typer.Argument(help="A pipeline YAML, or the name of a shipped preset such as demo.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Dotted config keys, such as seed=1.")
]


@app.command()
def run(
    pipeline: PipelineArgument,
    overrides: Overrides = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Begin at this stage; those before it must be done.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="End after this stage and what it needs.")] = None,
    only: Annotated[str | None, typer.Option(help="Just this stage.")] = None,
    fresh: Annotated[bool, typer.Option(help="Run the chosen stages again; old runs are kept aside.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print sizes and steps, start nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline on this machine. Finished stages are skipped, unfinished ones resume."""
    config = load_pipeline(pipeline, overrides or [], KINDS)
    chosen = chain.choose(config, start, until, only)
    if dry_run:
        from launchers.dry_run import print_dry_run

        _refuse_json(as_json)
        print_dry_run(config, chosen, fresh=fresh)
        return
    chain.run_stages(config, chosen, [pipeline, *(overrides or [])], fresh)
    _show_results(config, chosen, as_json)


@app.command()
def reproduce(
    row: Annotated[
        str | None,
        typer.Argument(metavar="[ROW]", help="A row of the paper, such as table5/window_shift; --list has all."),
    ] = None,
    overrides: Overrides = None,
    weights: Annotated[
        Path | None, typer.Option(help="Published weights (docs/rows.md says which), evaluated before anything else.")
    ] = None,
    weights_format: Annotated[
        str, typer.Option("--format", help="Of the weights: vitpose, mmpose or huggingface.")
    ] = "vitpose",
    skip_check: Annotated[bool, typer.Option(help="Train without evaluating published weights first.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print sizes and steps, start nothing.")] = False,
    list_rows: Annotated[bool, typer.Option("--list", help="Print the table of rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """Reproduce a row of the paper: published weights must reach their AP on your COCO, then the row is trained."""
    from launchers import reproduce as reproducing
    from launchers.rows import listing
    from pipeline.rows import load_rows

    if list_rows:
        columns, rows = ["row", "in the paper", "published", "preset", "status"], listing(load_rows())
        if as_json:
            typer.echo(json.dumps([dict(zip(columns, one, strict=True)) for one in rows], indent=2))
        else:
            table("rows of ViTPose", columns, rows)
        return
    if row is None:
        raise ConfigError("name a row, such as table5/window_shift; vitruvian reproduce --list has them all")
    reproduction = reproducing.resolve(row, overrides or [], weights, weights_format)
    if dry_run:
        _refuse_json(as_json)
        reproducing.print_dry_run(reproduction)
        return
    path = reproducing.reproduce(reproduction, chain.run_stages, weights=weights, skip_check=skip_check)
    found = read_json(path)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    said = [[name, str(found["paper"].get(name, "-")), f"{value:.2f}"] for name, value in found["measured"].items()]
    table(f"{row}: {found['name']}", ["metric", "paper", "measured"], said)
    typer.echo(f"result: {path}")


@app.command()
def status(pipeline: PipelineArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show every stage of a pipeline: what it would do next, how far it is, its Slurm job, where it lies."""
    config = load_pipeline(pipeline, overrides or [], KINDS)
    rows = [_status_row(stage) for stage in graph.plan(config).values()]
    columns = ["stage", "kind", "state", "step", "run directory"]
    if jobs := slurm.refreshed(config):
        columns.insert(4, "job")
        for row in rows:
            row["job"] = slurm.describe(jobs[row["stage"]]) if row["stage"] in jobs else "-"
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table(f"{config.name} in {config.workspace}", columns, [[row[column] for column in columns] for row in rows])


@app.command()
def submit(
    pipeline: PipelineArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="End after this stage and what it needs.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the sbatch files, submit nothing.")] = False,
) -> None:
    """Run a pipeline on Slurm: a job a stage, each after those it reads from. Finished stages get no job."""
    config = load_pipeline(pipeline, overrides or [], KINDS)
    slurm.submit(config, chain.choose(config, None, until, None), pipeline, overrides or [], dry_run=dry_run)


@app.command()
def cancel(
    pipeline: PipelineArgument,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Just this stage, and the jobs that wait for it.")] = None,
) -> None:
    """Cancel a pipeline's Slurm jobs. What is finished or saved stays, and `submit` goes on from there."""
    config = load_pipeline(pipeline, overrides or [], KINDS)
    if stage is not None and stage not in config.stages:
        raise ConfigError(f"--stage: no stage {stage!r}{did_you_mean(stage, list(config.stages))}")
    cancelled = slurm.cancel(config, stage)
    typer.echo(f"cancelled: {', '.join(cancelled)}" if cancelled else "no job waits or runs")


@app.command()
def sync(pipeline: PipelineArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Send MLflow what it lacks of every stage's metrics and artifacts, finished or not."""
    config = load_pipeline(pipeline, overrides or [], KINDS)
    rows = list(sync_all(config))
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        columns = ["stage", "lines", "state", "run directory"]
        shown = [[str(row[column]) for column in columns] for row in rows]
        table(f"{config.name} in {config.workspace}", columns, shown)
    if any(row["failed"] for row in rows):
        raise VitruvianError("not everything could be sent; nothing is lost, and the same command sends the rest")


@data_app.command("check")
def data_check(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset definition (coco, aic, mpii, ...) or a YAML.")],
    root: Annotated[str, typer.Option(help="Folder that holds the datasets.")] = "data",
    split: Annotated[str, typer.Option(help="Split of the definition.")] = "train",
    annotations: Annotated[str | None, typer.Option(help="Another annotation file.")] = None,
    images: Annotated[str | None, typer.Option(help="Another image folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read a dataset and print counts and every suspicious record; of images the headers, not the pixels."""
    from launchers.data_check import print_report
    from pipeline.data.check import check
    from pipeline.data.definitions import DatasetSource

    source = DatasetSource(name=dataset, split=split, annotations=annotations, images=images)
    print_report(check(source, root), as_json)


def _refuse_json(as_json: bool) -> None:
    if as_json:
        raise ConfigError("--json: --dry-run prints tables alone; leave one of them out (vitruvian status has --json)")


def _status_row(stage: StagePlan) -> dict[str, Any]:
    content = read_status(stage.run_dir) if stage.run_dir else {}
    step = f"{content['step']}/{content['steps']}" if "steps" in content else "-"
    state = stage.state
    if stage.state == "resume":
        state = f"resume ({content.get('state', 'killed')})"
    directory = str(stage.run_dir) if stage.run_dir else stage.reason
    return {"stage": stage.name, "kind": stage.config.kind, "state": state, "step": step, "run directory": directory}


def _show_results(config: PipelineConfig, chosen: list[str], as_json: bool) -> None:
    """The tables of the evaluations among the stages that ran, and where to look further."""
    plans = graph.plan(config, chosen)
    results = {}
    for name in chosen:
        path = plans[name].artifact.path / "table.json"
        if path.is_file():
            results[name] = read_json(path)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    for name, result in results.items():
        table(f"{config.name} / {name}", result["columns"], result["rows"])
        for note in result["notes"]:
            typer.echo(note)
        typer.echo(f"pictures and numbers: {plans[name].artifact.path}")
    if config.tracking.uri == "auto":
        store = config.workspace.absolute() / "mlflow.db"
        typer.echo(f"browse the runs:      mlflow ui --backend-store-uri sqlite:///{store}")


for command in (model_commands.predict, model_commands.split, model_commands.convert, model_commands.export):
    app.command()(command)


def main() -> None:
    """Entry point: a mistake of the user is one line."""
    setup_logging(0)
    _call(app)


def _call(command: Callable[[], None]) -> None:
    try:
        command()
    except VitruvianError as error:
        logger.error("error: %s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
