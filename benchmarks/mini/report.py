"""docs/mini.md: the tables beside the paper's, from the result files alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.mini.explanation import explanation
from benchmarks.mini.results import Result
from benchmarks.mini.standing import Standing
from benchmarks.mini.statistics import Comparison, compare
from benchmarks.mini.tables import MODEL, Miniature, Table
from pipeline.errors import ConfigError

REPORT = Path(__file__).resolve().parents[2] / "docs" / "mini.md"
LONGEST = 90.0
"""Seconds that a run may take on 2 idle cores."""

Results = Mapping[str, list[Result | None]]

_HEAD = """# The paper in miniature

Small versions of tables 3, 5, 6, 7 and 8 of [ViTPose](https://arxiv.org/abs/2204.12484), on synthetic people and a CPU.
They show what the method's parts do at this size, under these budgets; they are no reproduction of the paper's figures, and
a row that comes out reversed here says nothing against the paper at its own size. This page is written by `make mini`.
"""


def report(miniature: Miniature, found: Sequence[Standing]) -> str:
    """The whole page. found: of every run and seed."""
    results: Results = {
        run: [next(one.result for one in found if (one.run, one.seed) == (run, seed)) for seed in miniature.seeds]
        for run in dict.fromkeys(one.run for one in found)
    }
    parts = [_HEAD, _progress(miniature, found)]
    parts += [_table(number, miniature, results) for number in miniature.tables]
    parts += [explanation(miniature), _conditions([one.result for one in found if one.result is not None])]
    return "\n".join(parts)


def _progress(miniature: Miniature, found: Sequence[Standing]) -> str:
    seeds = [
        f"seed {seed}: {sum(one.seed == seed and one.state == 'done' for one in found)} of {len(miniature.runs)}"
        for seed in miniature.seeds
    ]
    done = sum(one.state == "done" for one in found)
    lines = ["## How far it is", "", f"{done} of {len(found)} runs ({', '.join(seeds)})."]
    if stale := [f"`{one.run}` (seed {one.seed})" for one in found if one.state == "stale"]:
        lines += ["", f"Stale, as settings changed since, and left out: {', '.join(stale)}."]
    if refused := list(dict.fromkeys(f"`{one.run}`" for one in found if one.state == "refused")):
        lines += ["", f"Can't be run by this version: {', '.join(refused)}."]
    return "\n".join(lines) + "\n"


def _table(number: int, miniature: Miniature, results: Results) -> str:
    table = miniature.tables[number]
    lines = [f"## Table {number}: {table.title}", "", f"The paper's: {table.paper}. {_budget(miniature, table)}", ""]
    if table.note:
        lines += [table.note.strip(), ""]
    columns = [
        "row",
        "paper",
        "AP here, by seed",
        "minus",
        "paper's gap",
        "gap",
        "95 % interval",
        "smallest gap",
        "verdict",
    ]
    lines += [_row(columns), _row(["---"] * len(columns))]
    lines += [_row(_cells(run, table, results)) for run in table.rows]
    return "\n".join(lines) + "\n"


def _budget(miniature: Miniature, table: Table) -> str:
    """What each run of a table may use, which is the same for all."""
    try:
        model = miniature.pipeline(next(iter(table.rows)), miniature.seeds[0]).stages[MODEL]
    except ConfigError:
        return ""
    people = model.steps * model.global_batch_size
    return (
        f"Here: {model.steps:,} steps of {model.global_batch_size} people, {people:,} in all, the same for every row."
    )


def _cells(run: str, table: Table, results: Results) -> list[str]:
    row = table.rows[run]
    values = ", ".join("-" if result is None else f"{result.ap:.1f}" for result in results[run])
    cells = [row.name, "-" if row.paper is None else f"{row.paper:.1f}", values]
    side = table.side(run)
    if row.against is None or side is None:
        return [*cells, "", "", "", "", "", ""]
    gap = table.paper_gap(run)
    found = compare(results[run], results[row.against], side)
    return [*cells, table.rows[row.against].name, side if gap is None else f"{gap:+.1f}", *_found(found)]


def _found(found: Comparison) -> list[str]:
    gap = "-" if found.gap is None else f"{found.gap:+.1f}"
    interval = "-" if found.interval is None else "{:+.1f} to {:+.1f}".format(*found.interval)
    reach = "-" if found.reach is None else f"{found.reach:.1f}"
    verdict = f"not finished, seeds: {found.seeds}" if found.verdict == "not finished" else f"**{found.verdict}**"
    return [gap, interval, reach, verdict]


def _conditions(results: Sequence[Result]) -> str:
    lines = ["## Under which conditions", ""]
    if not results:
        return "\n".join([*lines, "Nothing was run yet.", ""])
    seconds, cpu = ([getattr(result, name) for result in results] for name in ("seconds", "cpu_seconds"))
    lines += [f"A run took {median(seconds):.0f} s in the median, {max(seconds):.0f} s at most; of CPU time "]
    lines[-1] += f"{median(cpu):.0f} and {max(cpu):.0f} s. On:"
    lines += ["", *(f"- {machine}: {count} runs" for machine, count in Counter(one.machine for one in results).items())]
    if slow := [float(result.conditions["load"]) for result in results if result.seconds > LONGEST]:
        lines += ["", f"{len(slow)} runs took more than {LONGEST:.0f} s; the load of their machine was "]
        lines[-1] += f"{min(slow):.1f} to {max(slow):.1f} as they began, where one run makes about 2."
    lines += ["", "| made once a seed | seconds, by seed |", "| --- | --- |"]
    for stage in dict.fromkeys(stage for result in results for stage in result.shared):
        times = [f"{result.shared[stage]:.0f} (seed {result.seed})" for result in results if stage in result.shared]
        lines.append(_row([f"`{stage}`", ", ".join(times)]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
