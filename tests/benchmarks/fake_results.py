"""Made-up results for tests of the miniature."""

from benchmarks.mini.results import Result
from benchmarks.mini.tables import RESAMPLES, Job


def result(ap: float, *, run: str = "base", seed: int = 0, spread: float = 0.0, **fields: object) -> Result:
    """A result whose resampled AP alternates `spread` below and above its AP."""
    values = {
        "metrics": {"AP": ap},
        "resampled": [ap + (spread if index % 2 else -spread) for index in range(RESAMPLES)],
        "people": 600,
        "images": 300,
        "evaluated": f"people of seed {seed}",
        "steps": 10,
        "samples": 320,
        "run": run,
        "seed": seed,
        "words": [],
        "fingerprint": "f",
        "seconds": 80.0,
        "cpu_seconds": 120.0,
        "conditions": {"load": "0.5"},
        "machine": "a processor (2 cores, 2 threads), torch 2.0",
    }
    return Result.model_validate({**values, **fields})


def result_of(job: Job, ap: float = 40.0) -> Result:
    """What a fake run of a job gives."""
    return result(ap, run=job.run, seed=job.seed, words=job.words, fingerprint=job.fingerprint)
