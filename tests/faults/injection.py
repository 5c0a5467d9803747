"""Faults, put into a rank of a real stage by the tests. The product knows nothing of them.

A fault is a dict: `do` (what happens), `rank`, and where: `step` (after so many steps of the stage) and `at`, one of the
places below.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES = (
    "step",  # before a step
    "accumulation",  # between the micro-batches of a step
    "evaluation",  # in the middle of an evaluation
    "save",  # before anything of a resume point is written
    "save-files",  # half of this rank's files are written
    "save-manifest",  # all files are written, the manifest is not
    "save-rename",  # the manifest is written, the folder is not in place
    "save-prune",  # the folder is in place, the old ones are not removed
)


def install(fault: dict[str, Any] | None, rank: int) -> None:
    """Arms a fault in this process. Call it before the stage starts."""
    if not fault or fault.get("rank", 0) not in (rank, "all"):
        return
    if fault["do"] == "clock":
        _set_clock(fault["seconds"])
    elif fault["do"] == "nan":
        _poison(fault["step"], fault.get("steps", 1))
    elif fault["do"] == "infinite gradient":
        _poison_gradient(fault["step"], fault.get("steps", 1))
    elif fault["do"] == "leave after loading":
        _leave_after_loading(Path(fault["folder"]))
    elif fault["do"] == "late":
        _set_aside_late(fault["seconds"])
    else:
        _hook(fault["at"], fault["step"], lambda: _ACTIONS[fault["do"]](fault))


def _kill(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _signal(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), getattr(signal, fault["signal"]))


def _raise(fault: dict[str, Any]) -> None:
    raise OSError(28, "No space left on device")


def _kill_worker(fault: dict[str, Any]) -> None:
    """As the system does when memory runs out: a data loading process goes."""
    import psutil

    below = psutil.Process().children(recursive=True)
    # Processes of the fork server that are not the fork server.
    workers = [process for process in below if process.ppid() != os.getpid()]
    workers[0].kill()


def _sleep(fault: dict[str, Any]) -> None:
    time.sleep(3600)


_ACTIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "kill": _kill,
    "signal": _signal,
    "disk full": _raise,
    "kill worker": _kill_worker,
    "hang": _sleep,
}


def _hook(place: str, step: int, act: Callable[[], None]) -> None:
    """Lets `act` happen once, at a place, when the trainer has done `step` steps."""
    from pipeline import checkpoint, context, engine, trainer

    now: dict[str, Any] = {"step": -1, "done": False}

    def once() -> None:
        if now["step"] == step and not now["done"]:
            now["done"] = True
            act()

    def before(owner: Any, name: str, condition: Callable[..., bool] = lambda *a, **k: True) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if condition(*arguments, **options):
                once()
            return original(*arguments, **options)

        setattr(owner, name, wrapped)

    def remember(self: Any, *arguments: Any) -> bool:
        now["step"] = self.step
        return place == "step"

    def remember_save(self: Any, *arguments: Any) -> bool:
        now["step"] = self.step
        return place == "save"

    before(trainer.Trainer, "_one_step", remember)
    before(trainer.Trainer, "save", remember_save)
    if place == "accumulation":
        micro = {"count": 0}

        def second(*arguments: Any) -> bool:
            micro["count"] += 1
            return micro["count"] % 2 == 0

        before(engine, "to_device", second)
    elif place == "evaluation":
        from pipeline import hooks

        original = hooks.Evaluate._run

        def evaluating(self: Any, trainer: Any) -> None:
            now["step"] = trainer.step
            original(self, trainer)

        hooks.Evaluate._run = evaluating
        before(context.Context, "tick")
    elif place == "save-files":
        before(checkpoint, "save_file", lambda tensors, path: "buffers" in str(path))
    elif place == "save-manifest":
        before(checkpoint, "write_json", lambda path, value: path.name == "manifest.json")
    elif place == "save-rename":
        before(checkpoint, "fsync_tree")
    elif place == "save-prune":
        before(checkpoint, "fsync_directory")


def _set_clock(seconds: float) -> None:
    """The machine's clock and name are others than before."""
    import socket

    now = time.time
    time.time = lambda: now() + seconds
    socket.gethostname = lambda: "elsewhere"


def _set_aside_late(seconds: float) -> None:
    """With --fresh this rank moves the old run after the others had time to touch it."""
    from launchers import execution

    set_aside = execution._set_aside

    def late(*arguments: Any) -> None:
        time.sleep(seconds)
        set_aside(*arguments)

    execution._set_aside = late


def _steps_done() -> dict[str, int]:
    """`step`: how many steps the trainer has done when the one that runs began."""
    from pipeline import trainer

    now = {"step": -1}
    original = trainer.Trainer._one_step

    def one_step(self: Any, batches: Any) -> Any:
        now["step"] = self.step
        return original(self, batches)

    trainer.Trainer._one_step = one_step
    return now


def _poison(first: int, steps: int) -> None:
    """Makes this rank's loss nan for some steps."""
    from pipeline import engine

    now, original_agree = _steps_done(), engine.Engine._agree

    def agree(self: Any, losses: Any, limit: float) -> Any:
        if first <= now["step"] < first + steps:
            losses.mul_(float("nan"))
        return original_agree(self, losses, limit)

    engine.Engine._agree = agree


def _poison_gradient(first: int, steps: int) -> None:
    """Makes one parameter's gradient infinite on this rank for some steps; the loss stays what it is."""
    from pipeline import engine

    now, original_init = _steps_done(), engine.Engine.__init__

    def init(self: Any, module: Any, *arguments: Any, **options: Any) -> None:
        parameter = next(one for one in module.parameters() if one.requires_grad)
        parameter.register_hook(
            lambda gradient: gradient * float("inf") if first <= now["step"] < first + steps else gradient
        )
        original_init(self, module, *arguments, **options)

    engine.Engine.__init__ = init


def _leave_after_loading(folder: Path) -> None:
    """Writes what the engine holds once the resume point is loaded, and ends the rank before its first step."""
    from safetensors.torch import save_file

    from pipeline import trainer

    original = trainer.Trainer._resume

    def resume(self: Any) -> Any:
        original(self)
        tensors = self.engine.state()
        save_file(tensors, folder / f"{self.world.rank}.safetensors")
        os._exit(3)

    trainer.Trainer._resume = resume
