"""One stage, run on this rank: held, watched, tracked, and its end recorded whatever it is."""

import logging
import os
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.console import setup_logging
from launchers.storage import take_over
from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.context import Context
from pipeline.errors import EXIT_DONE, EXIT_FAILURE, StopNow, Stopped, VitruvianError
from pipeline.files import require_writable
from pipeline.graph import StagePlan
from pipeline.heartbeat import STOP_FILE, Heartbeat
from pipeline.run_storage import RunStorage
from pipeline.status import Status, held, held_part
from pipeline.tracking.tracker import Tracker
from stages import module_of

if TYPE_CHECKING:
    from pipeline.distributed import World
    from pipeline.stopping import StopRequest

logger = logging.getLogger("vitruvian")


@dataclass(frozen=True)
class _Records:
    """Where the end of a stage is written down."""

    status: Status
    tracker: Tracker
    storage: RunStorage | None


def execute(pipeline: PipelineConfig, stage: StagePlan, tags: dict[str, str], *, fresh: bool = False) -> int:
    """Runs a stage on this rank and gives the exit code; rank 0 holds the run directory. Raises the user's errors.

    fresh: an existing run directory is set aside first.
    """
    from pipeline.distributed import broadcast_object, leave_process_group, world_from_environment

    assert stage.run_dir is not None
    distributed = type(stage.config).distributed
    world = world_from_environment(pipeline.runtime)
    if fresh:
        _start_over(pipeline, stage, world)
    require_writable(stage.run_dir)
    setup_logging(world.rank, stage.run_dir)
    with held(stage.run_dir) if world.is_main else nullcontext():
        if world.is_main:
            (stage.run_dir / STOP_FILE).unlink(missing_ok=True)  # of an earlier run
        stop, heartbeat = _signs(pipeline, stage.run_dir, world.rank, distributed)
        storage = RunStorage.of(pipeline, stage) if world.is_main else None
        if world.is_main:
            graph.record_identity(stage)
        if storage is not None:
            stage = take_over(pipeline, stage, storage)
        where = stage.run_dir if world.is_main else None
        tracker = Tracker(pipeline, where, stage.name, tags, stage.parameters, stage.datasets)
        records = _Records(Status(stage.run_dir, world.is_main), tracker, storage)
        try:
            if distributed and not fresh:
                from pipeline.process_group import start_process_group

                start_process_group(world, heartbeat.limit)
            if pipeline.storage.url is not None and broadcast_object(stage.state) == "done":
                logger.info("%s: skipped, %s (%s)", stage.name, stage.reason, stage.run_dir)
                leave_process_group()
                records.status.ended("done", EXIT_DONE)
                return EXIT_DONE
            verb = "resumes" if stage.state == "resume" else "starts"
            logger.info("%s: %s, %s (%s)", stage.name, verb, stage.reason, stage.run_dir)
            if not distributed:
                tracker.start(0)
            context = Context(pipeline, stage, world, tracker, records.status, stop, heartbeat, storage=storage)
            module_of(stage.config.kind).run(context, stage.config)
        except BaseException as error:
            heartbeat.stop()  # no request interrupts what records the end
            return _ended_badly(stage, records, error)
        finally:
            heartbeat.stop()
        leave_process_group()  # the others need not wait for rank 0's uploads
        records.status.ended("done", EXIT_DONE)
        tracker.finish("FINISHED", stage.run_dir / "artifact")
        if storage is not None:
            storage.upload_artifact()
        logger.info("%s: done (%s)", stage.name, stage.run_dir / "artifact")
    return EXIT_DONE


def execute_part(pipeline: PipelineConfig, stage: StagePlan, part: tuple[int, int]) -> int:
    """Makes part I of N of a stage's work, beside the processes that make the others; nothing is published."""
    from pipeline.distributed import world_from_environment

    assert stage.run_dir is not None
    with held_part(stage.run_dir, part):
        logger.info("%s: part %d/%d (%s)", stage.name, *part, stage.run_dir)
        stop, heartbeat = _signs(pipeline, stage.run_dir, part[0], distributed=False)
        tracker, status = Tracker(pipeline, None, stage.name, {}, {}, []), Status(stage.run_dir, writes=False)
        world = world_from_environment(pipeline.runtime)
        context = Context(pipeline, stage, world, tracker, status, stop, heartbeat, part=part)
        try:
            module_of(stage.config.kind).run(context, stage.config)
        finally:
            heartbeat.stop()
    return EXIT_DONE


def _start_over(pipeline: PipelineConfig, stage: StagePlan, world: "World") -> None:
    """Sets the old run aside before any rank touches its directory. Collective, and starts the process group, where
    ranks train together: nothing else tells the others reliably that rank 0 has moved it.

    Raises on every rank what keeps rank 0 from it: ConfigError that says who holds the directory, or StorageError.
    """
    from pipeline.distributed import broadcast_object, leave_process_group

    if type(stage.config).distributed:
        from pipeline.process_group import start_process_group

        start_process_group(world, _patience(pipeline))
    problem = None
    if world.is_main:
        try:
            _set_aside(pipeline, stage)
        except VitruvianError as error:
            problem = error
    problem = broadcast_object(problem)
    if problem is not None:
        leave_process_group()
        raise problem


def _set_aside(pipeline: PipelineConfig, stage: StagePlan) -> None:
    """Renames an existing run directory, here and in the storage, so that the stage starts over and nothing is lost."""
    run_dir = stage.run_dir
    assert run_dir is not None
    existed = run_dir.exists()
    require_writable(run_dir)
    with held(run_dir):
        if storage := RunStorage.of(pipeline, stage):
            storage.set_aside()
        if existed:
            count = len(list(run_dir.parent.glob(f"{run_dir.name}.old-*")))
            run_dir.rename(run_dir.with_name(f"{run_dir.name}.old-{count + 1}"))
            logger.info("%s: the old run was moved to %s.old-%d", stage.name, run_dir, count + 1)


def _patience(pipeline: PipelineConfig) -> float | None:
    """Seconds that a rank of a training stage may be silent; None for ever."""
    minutes = pipeline.runtime.hang_minutes
    return minutes and minutes * 60


def _signs(
    pipeline: PipelineConfig, run_dir: Path, rank: int, distributed: bool
) -> "tuple[StopRequest | None, Heartbeat]":
    """How a stage is told to stop, and how it tells that it lives: ranks stop together, a process alone at once."""
    from pipeline.stopping import StopRequest, stop_at_once

    if distributed:
        stop = StopRequest(run_dir)
        heartbeat = Heartbeat(run_dir, rank, _patience(pipeline), leave=stop.ask)
    else:
        stop_at_once()
        stop = None
        heartbeat = Heartbeat(run_dir, rank, None, leave=lambda: os.kill(os.getpid(), signal.SIGTERM), looks=True)
    heartbeat.start("started")
    return stop, heartbeat


def _ended_badly(stage: StagePlan, records: _Records, error: BaseException) -> int:
    """Records how a stage ended, collectively where all were asked to stop; raises the user's errors again."""
    from pipeline.distributed import leave_process_group

    interrupted = isinstance(error, KeyboardInterrupt)
    if interrupted:
        error = Stopped("interrupted; the same command goes on from the last resume point")
    elif isinstance(error, StopNow):
        error = Stopped(str(error))
    stopped = isinstance(error, Stopped)
    code = error.exit_code if isinstance(error, VitruvianError) else EXIT_FAILURE
    try:
        records.status.ended("stopped" if stopped else "failed", code, str(error))
        records.tracker.finish("KILLED" if stopped else "FAILED")
        if records.storage is not None:
            records.storage.stop()
    except OSError as problem:  # a disk that is full or gone, which may be why the stage ends
        logger.error("%s: can't record in %s how it ended: %s", stage.name, stage.run_dir, problem)
    if stopped and not interrupted:
        leave_process_group()  # together: a launcher takes the first to leave for a failure, and kills the others
    if isinstance(error, VitruvianError):
        raise error
    logger.error("%s failed", stage.name, exc_info=error)
    return code
