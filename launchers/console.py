"""What people see: log lines and tables."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
"""The option that every command with an answer has."""

_FORMAT = "%(asctime)s %(message)s"
_UNBOUNDED = 10_000


def setup_logging(rank: int, run_dir: Path | None = None) -> None:
    """Rank 0 tells its progress on stderr, the others only warnings; all of it goes to `<run directory>/log-<rank>.txt`."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    stream = logging.StreamHandler(sys.stderr)
    stream.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [stream]
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / f"log-{rank}.txt", mode="a", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT if rank == 0 else f"[rank {rank}] {_FORMAT}", "%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for chatty in ("DeepSpeed", "alembic", "mlflow", "urllib3", "torch.distributed", "botocore", "fsspec"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Prints a table on stdout; where there is no terminal, as wide as it is."""
    drawn = Table()
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*[str(cell) for cell in row])
    console = Console()
    console = Console(width=console.width if console.is_terminal else _UNBOUNDED)
    console.print(title, style="bold", highlight=False)
    console.print(drawn)
