"""Where every run stands: done, stale, missing, or one that this version can't run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.mini.results import Result, read_result, write_result
from benchmarks.mini.tables import BASE, Job, Miniature, fingerprint
from pipeline.errors import ConfigError

State = Literal["done", "stale", "missing", "refused"]


@dataclass(frozen=True)
class Standing:
    """One run of one seed."""

    run: str
    seed: int
    state: State
    job: Job | None = None
    """None for a run that can't be carried out."""
    result: Result | None = None
    """Of a run that is done."""
    refusal: str = ""
    """Why it can't be carried out."""


def standing(miniature: Miniature, results: Path, runs: Sequence[tuple[str, int]]) -> list[Standing]:
    """Where runs stand, by the files among the results. Raises DataError for a file that is none."""
    return [_stand(miniature, results, run, seed) for run, seed in runs]


def _stand(miniature: Miniature, results: Path, run: str, seed: int) -> Standing:
    try:
        pipeline = miniature.pipeline(run, seed)
    except ConfigError as error:
        return Standing(run, seed, "refused", refusal=str(error).removeprefix(f"{BASE}: ").splitlines()[0])
    job = Job(run, seed, miniature.words(run, seed), fingerprint(pipeline))
    result = read_result(results, run, seed)
    if result is None:
        return Standing(run, seed, "missing", job)
    if result.fingerprint != job.fingerprint:
        return Standing(run, seed, "stale", job)
    return Standing(run, seed, "done", job, result)


def carry_out(
    found: Sequence[Standing],
    execute: Callable[[Job], Result],
    results: Path,
    *,
    again: bool,
    minutes: float | None,
    say: Callable[[str], None],
    clock: Callable[[], float],
) -> int:
    """Carries out what has no result, and with `again` what has a stale one, and writes a file after each.

    minutes: no run starts later than that. Gives the number of runs that are left.
    """
    wanted = [one.job for one in found if one.job and (one.state == "missing" or again and one.state == "stale")]
    begun = clock()
    for number, job in enumerate(wanted):
        if minutes is not None and clock() - begun > minutes * 60:
            say(f"{minutes:g} minutes are over: {len(wanted) - number} runs are left, and the same command goes on")
            return len(wanted) - number
        say(f"[{number + 1}/{len(wanted)}] {job.run}, seed {job.seed}: {' '.join(job.words)}")
        result = execute(job)
        path = write_result(results, result)
        shared = f", after {sum(result.shared.values()):.0f} s of shared stages" if result.shared else ""
        say(f"[{number + 1}/{len(wanted)}] AP {result.ap:.1f} in {result.seconds:.0f} s{shared} ({path})")
    return 0
