"""How `vitruvian data check` shows its report."""

import dataclasses
import json

import typer

from launchers.console import table
from pipeline.data.check import CheckReport

_EXAMPLES = 5


def print_report(report: CheckReport, as_json: bool) -> None:
    """Counts, then every kind of suspicious record with examples (all of them as JSON)."""
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2, default=str))
        return
    rows = [[key, str(value)] for key, value in report.counts.items()]
    table(f"{report.dataset} {report.split}", ["what", "count"], rows)
    table("labelled keypoints", ["keypoint", "people"], [[key, value] for key, value in report.labelled.items()])
    for kind, problems in report.problems.items():
        typer.echo(f"{kind}: {len(problems)}")
        for problem in problems[:_EXAMPLES]:
            typer.echo(f"  {problem.where}: {problem.what}{' (left out)' if problem.dropped else ''}")
        if len(problems) > _EXAMPLES:
            typer.echo(f"  ... and {len(problems) - _EXAMPLES} more; --json lists all")
    if not report.problems:
        typer.echo("nothing suspicious")
