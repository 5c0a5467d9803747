"""Runs one stage of a pipeline, under deepspeed, torchrun, srun (with MASTER_ADDR set) or plain python.

deepspeed [--num_gpus N] launchers/run_stage.py --stage NAME [--config FILE] [key=value ...]
"""

import argparse
import logging
import os
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launchers.console import setup_logging
from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.config_file import did_you_mean, load_pipeline
from pipeline.context import Context
from pipeline.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER, ArtifactError, ConfigError, Stopped, VitruvianError
from pipeline.graph import StagePlan
from pipeline.status import Status, held
from pipeline.tracking import Tracker, sync, tracking_uri
from pipeline.tracking_download import download
from stages import KINDS, module_of

logger = logging.getLogger("vitruvian")

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
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
    _take_slurm_ranks()
    setup_logging(rank())
    try:
        pipeline = load_pipeline(options.config, options.overrides, KINDS)
        if options.stage not in pipeline.stages:
            hint = did_you_mean(options.stage, list(pipeline.stages))
            raise ConfigError(f"--stage: pipeline {pipeline.name!r} has no stage {options.stage!r}{hint}")
        if options.dry_run:
            if rank() == 0:
                from launchers.dry_run import print_dry_run

                print_dry_run(pipeline, [options.stage])
            return EXIT_DONE
        return run(pipeline, options.stage, options.config, options.overrides, fresh=options.fresh)
    except VitruvianError as error:
        # A mistake in config or data is every rank's: one line is enough.
        if rank() == 0 or error.exit_code != EXIT_USER:
            logger.error("%s: %s", "stopped" if isinstance(error, Stopped) else "error", error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_FAILURE


def run(pipeline: PipelineConfig, name: str, config: str, overrides: list[str], *, fresh: bool = False) -> int:
    """Skips, resumes or starts one stage, after making the data that it lacks."""
    stage = _ready(pipeline, name, config, overrides, fresh)
    if fresh:
        _set_aside(stage)
    assert stage.run_dir is not None and stage.fingerprint is not None
    tags = {"fingerprint": stage.fingerprint, "stage": name, "kind": stage.config.kind, "pipeline": pipeline.name}
    tags |= {f"parent.{label}": source.digest or "" for label, source in stage.inputs.items()}
    if stage.state == "done":
        logger.info("%s: skipped, %s (%s)", name, stage.reason, stage.run_dir)
        if rank() == 0:
            sync(pipeline, stage.run_dir, name, tags, stage.parameters, stage.datasets)
        return EXIT_DONE
    distributed = type(stage.config).distributed
    if rank() > 0 and not distributed:
        return EXIT_DONE
    return _execute(pipeline, stage, tags, distributed)


def _execute(pipeline: PipelineConfig, stage: StagePlan, tags: dict[str, str], distributed: bool) -> int:
    """Runs a stage on this rank; rank 0 holds the run directory."""
    from pipeline.distributed import leave_process_group, world_from_environment

    assert stage.run_dir is not None
    world = world_from_environment(pipeline.runtime)
    setup_logging(world.rank, stage.run_dir)
    with held(stage.run_dir) if world.is_main else nullcontext():
        if world.is_main:
            graph.record_identity(stage)
            (stage.run_dir / "STOP").unlink(missing_ok=True)
        if distributed:
            from pipeline.engine import start_process_group

            start_process_group(world)
        verb = "resumes" if stage.state == "resume" else "starts"
        logger.info("%s: %s, %s (%s)", stage.name, verb, stage.reason, stage.run_dir)
        status = Status(stage.run_dir, world.is_main)
        where = stage.run_dir if world.is_main else None
        tracker = Tracker(pipeline, where, stage.name, tags, stage.parameters, stage.datasets)
        try:
            if not distributed:
                tracker.start(0)
            module_of(stage.config.kind).run(Context(pipeline, stage, world, tracker, status), stage.config)
        except BaseException as error:
            return _ended_badly(stage, status, tracker, error)
        leave_process_group()  # the others need not wait for rank 0's upload
        status.ended("done", EXIT_DONE)
        tracker.finish("FINISHED", stage.run_dir / "artifact")
        logger.info("%s: done (%s)", stage.name, stage.run_dir / "artifact")
    return EXIT_DONE


def _ended_badly(stage: StagePlan, status: Status, tracker: Tracker, error: BaseException) -> int:
    """Records how a stage ended. Raises the user's errors again, logs the others with their traceback."""
    if isinstance(error, KeyboardInterrupt):
        error = Stopped("interrupted; the same command goes on from the last resume point")
    stopped = isinstance(error, Stopped)
    code = error.exit_code if isinstance(error, VitruvianError) else EXIT_FAILURE
    status.ended("stopped" if stopped else "failed", code, str(error))
    tracker.finish("KILLED" if stopped else "FAILED")
    if isinstance(error, VitruvianError):
        raise error
    logger.error("%s failed", stage.name, exc_info=error)
    return code


def _ready(pipeline: PipelineConfig, name: str, config: str, overrides: list[str], fresh: bool) -> StagePlan:
    """The plan of a stage whose inputs exist. Rank 0 makes missing data, fetches missing models; the others wait.

    Raises ArtifactError with the command to type where a trained input is missing, DataError where raw data is.
    """
    while True:
        plans = graph.plan(pipeline, [name], fresh=fresh)
        if plans[name].state != "waiting":
            return plans[name]
        if _fetch_named(pipeline, plans):
            continue
        graph.require_raw_data(plans[name])
        missing = next(stage for stage in plans.values() if stage.state != "done" and stage.name != name)
        prepares = type(missing.config).prepares
        if rank() > 0:
            if not prepares and missing.state != "waiting":
                time.sleep(5.0)  # rank 0 may be fetching it; where it gives up, the launcher ends this process
            time.sleep(2.0)
        elif prepares:
            logger.info("%s needs %s: making it first (%s)", name, missing.name, missing.reason)
            _run_alone(missing.name, config, overrides)
        elif not _fetch(pipeline, missing):
            words = shlex.join([*overrides])
            raise ArtifactError(
                f"stage {name!r} needs the artifact of {missing.name!r}, which has not finished "
                f"({missing.reason.split(';')[0]}); make it with: vitruvian run {config} --until {missing.name} {words}".rstrip()
            )


def _run_alone(name: str, config: str, overrides: list[str]) -> None:
    """One stage in a process of its own, outside the launcher's world."""
    hidden = ("SLURM_STEP_ID", *_LAUNCHER_VARIABLES)
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    command = [sys.executable, "-m", "launchers.run_stage", "--stage", name, "--config", config, *overrides]
    code = subprocess.run(command, env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}).returncode
    if code:
        error = VitruvianError(f"stage {name!r} ended with exit code {code}; its message is above")
        error.exit_code = code if code > 0 else EXIT_FAILURE
        raise error


def _fetch(pipeline: PipelineConfig, stage: StagePlan) -> bool:
    """Takes a finished stage's artifact from MLflow, found by its fingerprint, where this machine lacks it."""
    uri = tracking_uri(pipeline)
    if uri is None or stage.run_dir is None or stage.fingerprint is None or pipeline.tracking.uri == "auto":
        return False
    try:
        found = download(uri, stage.run_dir, fingerprint=stage.fingerprint)
    except ArtifactError:
        raise
    except Exception as error:  # MLflow may raise anything; the user learns why it did not help
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("MLflow at %s has no help: %s", uri, reason[:160])
        return False
    if found:
        logger.info("%s: fetched from MLflow at %s", stage.name, uri)
    return found


def _fetch_named(pipeline: PipelineConfig, plans: dict[str, StagePlan]) -> bool:
    """True if inputs name MLflow runs that this machine lacked. Rank 0 downloads them, the others wait.

    Raises ArtifactError where one can't be had.
    """
    sources = [source for stage in plans.values() for source in stage.inputs.values() if source.digest is None]
    runs = {run_id for source in sources if (run_id := graph.mlflow_run(source.reference))}
    if rank() > 0:
        time.sleep(bool(runs))
        return bool(runs)
    for run_id in sorted(runs):
        uri = tracking_uri(pipeline)
        if uri is None:
            raise ArtifactError(f"mlflow:{run_id} is an input, but tracking.uri is null: say where MLflow is")
        try:
            download(uri, graph.fetched(pipeline, run_id), run_id=run_id)
        except Exception as error:  # MLflow may raise anything
            raise ArtifactError(f"mlflow:{run_id}: not to be had from {uri}: {str(error)[:160]}") from None
        logger.info("mlflow:%s: fetched from %s", run_id, uri)
    return bool(runs)


def _set_aside(stage: StagePlan) -> None:
    """Renames an existing run directory, so that the stage starts over and nothing is lost."""
    assert stage.run_dir is not None
    if rank() == 0 and stage.run_dir.exists():
        count = len(list(stage.run_dir.parent.glob(f"{stage.run_dir.name}.old-*")))
        stage.run_dir.rename(stage.run_dir.with_name(f"{stage.run_dir.name}.old-{count + 1}"))
        logger.info("%s: the old run was moved to %s.old-%d", stage.name, stage.run_dir, count + 1)


def _take_slurm_ranks() -> None:
    """Under srun, which starts one task a process: its numbers are the ranks. MASTER_ADDR is the caller's to set."""
    if (
        "SLURM_STEP_ID" in os.environ
        and "RANK" not in os.environ
        and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    ):
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
        os.environ |= {name: os.environ[slurm] for name, slurm in names.items()}
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]


def rank() -> int:
    """Of this process, by the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def leave(code: int) -> NoReturn:
    """Ends the process for good. A clean interpreter exit aborts now and then in the communication libraries' threads."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
