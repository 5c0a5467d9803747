"""One run in a process of its own: the measured stage, as `vitruvian run` runs it, then its measurement.

python -m benchmarks.mini.one_run OUT.json [key=value ...]
"""

import sys
from pathlib import Path

from benchmarks.mini.tables import BASE, MODEL
from launchers import run_stage
from pipeline import graph
from pipeline.config_file import load_pipeline
from pipeline.errors import EXIT_DONE
from pipeline.files import write_json
from pipeline.recipe import TrainingConfig
from stages import KINDS


def main(out: Path, words: list[str]) -> int:
    """Trains, measures, writes the measurement. Gives the stage's exit code.

    A model that the workspace has already is put aside: the seconds are to be of a whole run.
    """
    code = run_stage.main(["--stage", MODEL, "--config", str(BASE), "--fresh", *words])
    if code != EXIT_DONE:
        return code
    from benchmarks.mini.measure import measure

    plans = graph.plan(load_pipeline(BASE, words, KINDS), [MODEL])
    config = plans[MODEL].config
    assert isinstance(config, TrainingConfig)
    root = str(plans["data"].artifact.path / "raw")
    write_json(out, measure(plans[MODEL].artifact, root, config).model_dump(mode="json"))
    return EXIT_DONE


if __name__ == "__main__":
    run_stage.leave(main(Path(sys.argv[1]), sys.argv[2:]))
