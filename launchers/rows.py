"""The rows of the paper's tables, as a table for the terminal and as docs/rows.md (`python -m launchers.rows`)."""

from collections.abc import Iterator

from pipeline.rows import Row, Rows, Table, load_rows, without_aic

_HEAD = """# Rows of the paper

Every row of ViTPose's tables that has a configuration, and what became of it here. Values are the paper's (NeurIPS 2022,
arXiv 2204.12484) or, where the note says so, those of the README of ViTAE-Transformer/ViTPose: AP and AR in percent on
COCO val with detector boxes (AP_H_56) unless the table's title says otherwise. **Not run** means that nobody has trained
the row with this code; that its configuration resolves is tested, by each command's `--dry-run`.

`vitruvian reproduce ROW --weights FILE` first evaluates published weights on your COCO, those that "checked by" names, and
stops if they are not within 0.1 AP of what was published; then it trains the row as `vitruvian run` does and writes a file
such as `workspace/reproduced/table5-window_shift.json`: the paper's and the measured values, the interval, configuration,
versions, hardware. With `--skip-check` nothing is evaluated first. Tables 11 to 13 have no check:
{ungated}.

| published weights | where, in the README of ViTAE-Transformer/ViTPose | AP | AR |
| --- | --- | --- | --- |
{weights}
"""


def listing(rows: Rows) -> list[list[str]]:
    """Row, its name in the paper, published values, preset, status."""
    return [[name, row.name, shown(row), row.preset, row.status] for name, _, row in _each(rows)]


def shown(row: Row) -> str:
    """Published values in a few words."""
    return ", ".join(f"{value} {metric}" for metric, value in row.paper.items()) or "-"


def page(rows: Rows) -> str:
    """docs/rows.md."""
    weights = "\n".join(
        f"| `{name}` | {one.published} | {one.paper['AP']} | {one.paper['AR']} |" for name, one in rows.weights.items()
    )
    ungated = next(table.ungated for table in rows.tables.values() if table.ungated)
    return _HEAD.format(weights=weights, ungated=ungated) + "".join(map(_section, rows.tables, rows.tables.values()))


def _section(first: str, table: Table) -> str:
    lines = [
        f"\n## {table.title}\n",
        "| row of the paper | published | preset | without AI Challenger | checked by | command | status |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for second, row in table.rows.items():
        name = f"{row.name} ({row.note})" if row.note else row.name
        twin = row.without_aic or without_aic(row.preset)
        command = f"`vitruvian reproduce {first}/{second}`"
        measured = ", ".join(f"{value} {metric}" for metric, value in row.measured.items())
        status = f"{row.status}: {measured}" if measured else row.status
        check = row.check or table.check
        cells = [name, shown(row), f"`{row.preset}`", _code(twin), _code(check), command, status]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _code(name: str | None) -> str:
    return f"`{name}`" if name else ""


def _each(rows: Rows) -> Iterator[tuple[str, Table, Row]]:
    for name in rows.names():
        yield name, *rows.find(name)


if __name__ == "__main__":
    print(page(load_rows()), end="")
