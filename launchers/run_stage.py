"""Runs one stage of a pipeline, under deepspeed, torchrun, srun (with MASTER_ADDR set) or plain python.

deepspeed [--num_gpus N] launchers/run_stage.py --stage NAME [--config FILE] [key=value ...]
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launchers.console import setup_logging
from launchers.execution import execute, execute_part
from launchers.inputs import rank, ready
from launchers.slurm_script import take_ranks
from pipeline.config import PipelineConfig
from pipeline.config_file import did_you_mean, load_pipeline
from pipeline.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_STOPPED,
    EXIT_USER,
    ConfigError,
    StopNow,
    Stopped,
    VitruvianError,
)
from pipeline.run_storage import RunStorage
from pipeline.tracking.tracker import sync
from stages import KINDS

logger = logging.getLogger("vitruvian")

_DESCRIPTION = "Run one stage of a pipeline. The same command skips a finished stage and resumes an unfinished one."
_EPILOG = """examples:
  deepspeed launchers/run_stage.py --stage mae                        the demo's pretraining, on what there is
  deepspeed --num_gpus 2 launchers/run_stage.py --stage mae           on two processes
  torchrun --nproc_per_node 8 launchers/run_stage.py --stage finetune --config vitpose_b engine.zero_stage=2
  python launchers/run_stage.py --stage finetune --dry-run stages.finetune.steps=100

exit codes: 0 done, 2 a mistake in config or data, 75 stopped on request (run it again to go on), 1 anything else
"""


def parser() -> argparse.ArgumentParser:
    """The command line. Launchers put their own `--local_rank` first."""
    found = argparse.ArgumentParser(
        prog="run_stage.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--stage", required=True, help="name of a stage of the pipeline, such as mae")
    found.add_argument(
        "--config", default="demo", help="pipeline YAML, or the name of a shipped preset (default: demo)"
    )
    found.add_argument("--fresh", action="store_true", help="run again from the start; the old run is kept aside")
    found.add_argument("--part", metavar="I/N", help="make only part I of N (from 0) of the shards; publish nothing")
    found.add_argument("--dry-run", action="store_true", help="check everything, print sizes and steps, start nothing")
    found.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    found.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted config keys, such as stages.mae.steps=100"
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the stage and returns the exit code; a mistake of the user is one line on stderr."""
    options = parser().parse_intermixed_args(arguments)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    # Compilers of extensions are looked up on PATH; a virtual environment need not be activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    take_ranks()
    setup_logging(rank())
    try:
        pipeline = load_pipeline(options.config, options.overrides, KINDS)
        if options.stage not in pipeline.stages:
            hint = did_you_mean(options.stage, list(pipeline.stages))
            raise ConfigError(f"--stage: pipeline {pipeline.name!r} has no stage {options.stage!r}{hint}")
        if options.dry_run:
            if rank() == 0:
                from launchers.dry_run import print_dry_run

                print_dry_run(pipeline, [options.stage], fresh=options.fresh)
            return EXIT_DONE
        if options.part is not None:
            return run_part(pipeline, options.stage, options.config, options.overrides, options.part)
        return run(pipeline, options.stage, options.config, options.overrides, fresh=options.fresh)
    except VitruvianError as error:
        # A mistake in config or data is every rank's: one line is enough.
        if rank() == 0 or error.exit_code != EXIT_USER:
            logger.error("%s: %s", "stopped" if isinstance(error, Stopped) else "error", error)
        return error.exit_code
    except StopNow as request:
        logger.error("stopped: %s", request)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return EXIT_FAILURE
    except Exception:  # told here, as an interpreter that ends by itself would wait for data workers for ever
        logger.exception("%s failed", options.stage)
        return EXIT_FAILURE


def run(pipeline: PipelineConfig, name: str, config: str, overrides: list[str], *, fresh: bool = False) -> int:
    """Skips, resumes or starts one stage, after making the data that it lacks."""
    stage = ready(pipeline, name, config, overrides, fresh)
    assert stage.run_dir is not None and stage.fingerprint is not None
    tags = {"fingerprint": stage.fingerprint, "stage": name, "kind": stage.config.kind, "pipeline": pipeline.name}
    tags |= {f"parent.{label}": source.digest or "" for label, source in stage.inputs.items()}
    if stage.state == "done":
        logger.info("%s: skipped, %s (%s)", name, stage.reason, stage.run_dir)
        if rank() == 0:
            sync(pipeline, stage.run_dir, name, tags, stage.parameters, stage.datasets)
            if storage := RunStorage.of(pipeline, stage):
                storage.upload_artifact()
        return EXIT_DONE
    if rank() > 0 and not type(stage.config).distributed:
        return EXIT_DONE
    return execute(pipeline, stage, tags, fresh=fresh)


def run_part(pipeline: PipelineConfig, name: str, config: str, overrides: list[str], part: str) -> int:
    """Makes part `I/N` of a stage's work; a whole run publishes it later."""
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--part: expected I/N with I from 0 to N - 1, such as 0/4, found {part!r}")
    if not type(pipeline.stages[name]).divisible:
        raise ConfigError(f"--part: stage {name!r} of kind {pipeline.stages[name].kind!r} can't be made in parts")
    stage = ready(pipeline, name, config, overrides, fresh=False)
    if stage.state == "done":
        logger.info("%s: skipped, %s (%s)", name, stage.reason, stage.run_dir)
        return EXIT_DONE
    return execute_part(pipeline, stage, (int(number), int(count)))


def leave(code: int) -> NoReturn:
    """Ends the process for good. A clean interpreter exit aborts now and then in the communication libraries' threads."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
