"""`make mini`: carries out the runs that have no result yet, and writes the report.

python -m benchmarks.mini.run [--table 8] [--seed 0] [--minutes 30] [--again] [--report] [--workspace DIR]
"""

import argparse
import logging
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.mini.execution import execute
from benchmarks.mini.report import REPORT, report
from benchmarks.mini.standing import Standing, carry_out, standing
from benchmarks.mini.tables import RESULTS, Miniature, in_order, load_miniature
from launchers.console import setup_logging
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER, ConfigError, VitruvianError
from pipeline.files import write_text

logger = logging.getLogger("vitruvian")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.mini.run",
        description="ViTPose's tables 3, 5, 6, 7 and 8 in miniature. Runs that have a result are not run again.",
    )
    found.add_argument("--table", type=int, action="append", help="only this table of the paper; may be repeated")
    found.add_argument("--seed", type=int, action="append", help="only this seed; may be repeated")
    found.add_argument("--minutes", type=float, help="start no run later than this")
    found.add_argument("--again", action="store_true", help="also run again what has a stale result")
    found.add_argument("--report", action="store_true", help=f"run nothing, write docs/{REPORT.name} from the results")
    found.add_argument("--workspace", type=Path, default=Path("workspace"), help="where runs live (workspace)")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Gives the exit code: 0, 2 for mistakes and runs that can't be carried out, else that of the process that failed."""
    options = parser().parse_args(arguments)
    setup_logging(0)
    try:
        miniature = load_miniature()
        found = standing(miniature, RESULTS, in_order(miniature, *_chosen(miniature, options)))
        _tell(found, again=options.again)
        try:
            if not options.report:
                _carry_out(found, options)
        finally:
            _write_report(miniature)
        return EXIT_USER if any(one.state == "refused" for one in found) else EXIT_DONE
    except VitruvianError as error:
        logger.error("error: %s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("interrupted; the same command goes on")
        return EXIT_STOPPED


def _carry_out(found: list[Standing], options: argparse.Namespace) -> None:
    do = partial(execute, workspace=options.workspace.absolute())
    carry_out(found, do, RESULTS, again=options.again, minutes=options.minutes, say=logger.info, clock=time.monotonic)


def _chosen(miniature: Miniature, options: argparse.Namespace) -> tuple[list[int], list[int]]:
    for number in options.table or ():
        if number not in miniature.tables:
            raise ConfigError(f"--table: no table {number} among {', '.join(map(str, miniature.tables))}")
    for seed in options.seed or ():
        if seed not in miniature.seeds:
            raise ConfigError(f"--seed: no seed {seed} among {', '.join(map(str, miniature.seeds))}")
    return options.table or list(miniature.tables), options.seed or miniature.seeds


def _tell(found: list[Standing], again: bool) -> None:
    """What there is, and what can't be run."""
    counts = {state: sum(one.state == state for one in found) for state in ("done", "missing", "stale", "refused")}
    logger.info("%s", ", ".join(f"{count} {state}" for state, count in counts.items() if count))
    stale = [f"{one.run} (seed {one.seed})" for one in found if one.state == "stale"]
    if stale and not again:
        logger.info("stale, as the settings changed since: %s; --again runs them again", ", ".join(stale))
    for run, refusal in {one.run: one.refusal for one in found if one.state == "refused"}.items():
        logger.error("%s can't be run: %s", run, refusal)


def _write_report(miniature: Miniature) -> None:
    """From all results that there are, whatever was chosen."""
    everything = in_order(miniature, list(miniature.tables), miniature.seeds)
    write_text(REPORT, report(miniature, standing(miniature, RESULTS, everything)))
    logger.info("report: %s", REPORT)


if __name__ == "__main__":
    sys.exit(main())
