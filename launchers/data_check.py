"""How `vitruvian data check` shows its report."""

import dataclasses
import json

import typer

from launchers.console import table
from pipeline.data.check import CheckReport


def print_report(report: CheckReport, as_json: bool) -> None:
    """Counts, how often each keypoint is labelled, then every suspicious record by kind."""
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2, default=str))
        return
    counts = {
        "images": report.images,
        "annotations": report.annotations,
        "people used": report.people,
        "detector boxes": "no file" if report.detections is None else report.detections,
        "ground-truth file": report.files.truth or "-",
        "missing images": report.missing_images,
        "unreadable images": report.unreadable_images,
        "images of another size": report.size_mismatches,
    }
    table(
        f"{report.dataset} {report.split}: {report.files.annotations}",
        ["what", "count"],
        list(map(list, counts.items())),
    )
    if report.keypoints:
        table("labelled keypoints", ["keypoint", "people"], list(map(list, report.keypoints.items())))
    for kind, group in report.problems.items():
        typer.echo(f"{kind}: {group.count}, of which {group.dropped} are left out")
        for problem in group.records:
            typer.echo(f"  {problem.where}: {problem.what}{' (left out)' if problem.dropped else ''}")
    if report.sound:
        typer.echo("nothing suspicious")
