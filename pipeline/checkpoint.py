"""Resume points: atomic, verified, and independent of the ZeRO stage and the number of ranks.

```
<run directory>/resume/
    step-00000120/
        weights-00000.safetensors    float32 weights, both moments: whole tensors, spread over the ranks that wrote them
        buffers-00000.safetensors    each rank's own buffers (batch-norm statistics differ by rank)
        state.json                   step (which fixes the position in the data), what the hooks remember, world size
        manifest.json                sha256 and size of each file, written after all ranks finished
```
A folder counts only if its manifest verifies. The newest that does is taken; falling back is said loudly, and where
points were saved but none verifies the stage stops instead of starting from scratch.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.distributed import World, barrier, broadcast_object, gather_objects
from pipeline.errors import CheckpointError, StorageError
from pipeline.files import fsync_directory, fsync_tree, read_json, sha256, write_json
from pipeline.graph import resume_points, step_of
from pipeline.run_storage import RunStorage
from pipeline.status import read_status

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


class ResumePoints:
    """The resume points of one run directory."""

    def __init__(self, run_dir: Path, world: World, storage: RunStorage | None = None, keep: int = 2) -> None:
        """`storage` of rank 0: published points are copied there, and a damaged one is fetched from there."""
        assert keep >= 2, "the last one may be damaged"
        self.folder = run_dir / "resume"
        self.world = world
        self.storage = storage
        self.keep = keep

    def save(
        self, step: int, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Collective. Writes this rank's share, then rank 0 publishes the whole in one rename and prunes old ones.

        tensors: whole float32 tensors that this rank is responsible for; buffers: this rank's.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}"
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
        barrier()
        rank = f"{self.world.rank:05d}"
        own = {f"weights-{rank}.safetensors": tensors, f"buffers-{rank}.safetensors": buffers}
        for name, content in own.items():
            save_file({key: value.contiguous() for key, value in content.items()}, temporary / name)
        if self.world.is_main:
            write_json(temporary / "state.json", {"schema_version": SCHEMA_VERSION, "step": step, **state})
            own["state.json"] = {}
        records = {name: _record(temporary / name) for name in own}
        gathered = gather_objects(records)
        if self.world.is_main:
            files = {name: record for share in gathered for name, record in share.items()}
            write_json(temporary / "manifest.json", {"schema_version": SCHEMA_VERSION, "files": files})
            fsync_tree(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            fsync_directory(self.folder)
            points = resume_points(self.folder.parent)
            # Later ones were damaged, or this run would have gone on from them.
            later = [point for point in points if step_of(point) > step]
            for old in [*later, *[point for point in points if point not in later][: -self.keep]]:
                shutil.rmtree(old)
            if self.storage is not None:
                self.storage.send(final)
        barrier()

    def newest(self) -> Path | None:
        """Collective. The newest point that verifies; None where the stage never saved one.

        Raises CheckpointError if points exist and none verifies, or if a rank does not see the one that does.
        """
        found = broadcast_object(_attempt(self._newest) if self.world.is_main else None)
        if isinstance(found, CheckpointError):
            raise found
        blind = [rank for rank, sees in enumerate(gather_objects(found is None or _appears(found))) if not sees]
        if blind:
            raise CheckpointError(
                f"{found}: not seen by rank {blind[0]}; the workspace must lie on a file system that all machines share"
            )
        return found

    def _newest(self) -> Path | None:
        points = resume_points(self.folder.parent)
        damaged = []
        for older, point in reversed([*pairwise([None, *points])]):
            if _is_newer(point):  # going on from an older one would end in removing this one
                raise CheckpointError(f"{point}: written by a newer version of this program; update it, or use --fresh")
            fault = verify(point)
            if fault is None:
                if damaged:
                    logger.error("FALLING BACK to the resume point of step %d: %s", step_of(point), "; ".join(damaged))
                return point
            damaged.append(fault)
            restored = self._restored(older, point)
            if restored is not None:
                logger.error("%s; taken from the storage: step %d", "; ".join(damaged), step_of(restored))
                return restored
        saved = self._once_saved()
        if damaged or saved:
            what = "; ".join(damaged) or f"step {saved} was saved, but its folder is gone"
            raise CheckpointError(
                f"{self.folder}: no resume point can be read ({what}); restore one, or start over on purpose with --fresh"
            )
        return None

    def _restored(self, older: Path | None, damaged: Path) -> Path | None:
        """What the storage has in place of a damaged point, newer than the next older one here."""
        if self.storage is None:
            return None
        try:
            return self.storage.restore(step_of(older) if older else -1, step_of(damaged))
        except StorageError as error:
            logger.warning("storage: %s", error)
            return None

    def _once_saved(self) -> int:
        """The last step that the status file says was saved; 0 where none was."""
        saved = read_status(self.folder.parent).get("saved_step", 0)
        return saved if isinstance(saved, int) else 0


def _appears(point: Path, seconds: float = 60.0) -> bool:
    """True once a folder that rank 0 sees is there: a network file system may show it a little later."""
    deadline = time.monotonic() + seconds
    while not point.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def verify(point: Path) -> str | None:
    """What is wrong with a resume point, or None. Reads every byte."""
    try:
        manifest = read_json(point / "manifest.json")
        if manifest["schema_version"] > SCHEMA_VERSION:
            return f"{point.name}: written by a newer version of this program"
        if manifest["schema_version"] != SCHEMA_VERSION:
            return f"{point.name}: schema version {manifest['schema_version']!r}, expected {SCHEMA_VERSION}"
        present = {path.name for kind in ("weights", "buffers") for path in point.glob(f"{kind}-*.safetensors")}
        if unlisted := sorted({"state.json", *present} - manifest["files"].keys()):
            return f"{point.name}: {unlisted[0]} is not in its manifest"
        for name, record in manifest["files"].items():
            path = point / name
            if path.name != name:
                return f"{point.name}: its manifest names a file elsewhere: {name!r}"
            if not path.is_file():
                return f"{point.name}: {name} is missing"
            if _record(path) != record:
                return f"{point.name}: {name} does not match its digest"
        state = read_json(point / "state.json")
        found = state["schema_version"], state["step"]
        if found != (SCHEMA_VERSION, step_of(point)) or not isinstance(state.get("hooks", {}), dict):
            return f"{point.name}: state.json is of schema version and step {found}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{point.name}: its manifest can't be read ({type(error).__name__})"
    return None


def _is_newer(point: Path) -> bool:
    for name in ("manifest.json", "state.json"):
        try:
            if read_json(point / name)["schema_version"] > SCHEMA_VERSION:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def load_state(point: Path) -> dict[str, Any]:
    """The plain data of a verified resume point."""
    return read_json(point / "state.json")


def load_tensors(point: Path) -> dict[str, Tensor]:
    """All whole tensors of a verified resume point, whoever wrote them, on the CPU."""
    return _load_all(sorted(point.glob("weights-*.safetensors")))


def load_buffers(point: Path, rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """A rank's own buffers where the world has the size it had; else those of all ranks, to be averaged."""
    files = sorted(point.glob("buffers-*.safetensors"))
    if len(files) == world_size:
        files = [files[rank]]
    return [_load_all([file]) for file in files]


def _load_all(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_tensor_file(file)
    return tensors


def load_tensor_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError for anything else."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {error}") from None


def _record(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "size": path.stat().st_size}


def _attempt(action: Callable[[], Path | None]) -> Path | CheckpointError | None:
    """The result, or the error as a value, so that rank 0 can tell the others instead of leaving them waiting."""
    try:
        return action()
    except CheckpointError as error:
        return error
