"""Folders on a remote store that are whole or absent, as far as a reader can tell.

```
<url>/<place>/
    upload.part.json    what is being uploaded; only until it is whole
    ...                 the files
    upload.json         sha256 and size of each file; written last. Without it the folder does not exist
```
Nothing of a remote folder is used before every byte of it was verified, and no file is written outside the folder that
it is downloaded to.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import ValidationError

from pipeline.artifacts import FileRecord
from pipeline.errors import StorageError
from pipeline.files import sha256, staging
from pipeline.remote import asked, open_filesystem, reason
from pipeline.strict import Strict

logger = logging.getLogger(__name__)

T = TypeVar("T")
SCHEMA_VERSION = 1
MANIFEST = "upload.json"
_UNFINISHED = "upload.part.json"
_LARGEST_MANIFEST = 1 << 28
_CONNECTIONS = 8


class DamagedError(StorageError):
    """What lies in the storage is not what its manifest says."""


class UploadManifest(Strict):
    """The content of `upload.json`."""

    schema_version: int = SCHEMA_VERSION
    files: dict[str, FileRecord]


class Store:
    """Folders below one fsspec URL. Every method raises StorageError where the backend can't be reached."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a backend that can't be had; asks nobody."""
        self.url = url.rstrip("/")
        self._filesystem, self._root = open_filesystem(self.url)

    def upload(self, folder: Path, place: str, known: Mapping[str, FileRecord]) -> None:
        """Copies a finished folder. Does nothing if it is there already; goes on where an earlier call was cut off.

        known: records that need not be computed anew.
        """
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        manifest = UploadManifest(files={name: known.get(name) or record(folder / name) for name in names})
        if self._is(manifest, f"{place}/{MANIFEST}"):
            return
        there: dict[str, int] = {}
        if self._is(manifest, f"{place}/{_UNFINISHED}"):
            prefix = self._path(place) + "/"
            there = {path.removeprefix(prefix): size for path, size in self._find(place).items()}
        else:
            self.remove(place)  # files of another upload may have the same names and sizes
            self._write(f"{place}/{_UNFINISHED}", manifest.model_dump_json())
        missing = [name for name in names if there.get(name) != manifest.files[name].size]
        _together(lambda name: self._put(folder / name, f"{place}/{name}", manifest.files[name].size), missing)
        self._write(f"{place}/{MANIFEST}", manifest.model_dump_json())
        self._ask(lambda: self._filesystem.rm_file(self._path(f"{place}/{_UNFINISHED}")), place)

    def download(self, place: str, final: Path) -> bool:
        """Makes a local folder of a whole remote one, in one rename after every byte was verified.

        False where there is none. Raises DamagedError.
        """
        manifest = self.manifest(place)
        if manifest is None:
            return False
        with staging(final) as temporary:
            _together(lambda item: self._get(place, *item, temporary), manifest.files.items())
        return True

    def manifest(self, place: str) -> UploadManifest | None:
        """Of a whole folder; None where there is none. Raises DamagedError."""
        return self._read(f"{place}/{MANIFEST}")

    def folders(self, place: str) -> dict[str, bool]:
        """Names of the folders in a folder, and whether they are whole."""
        try:
            found = self._ask(lambda: self._filesystem.ls(self._path(place), detail=False), place)
        except FileNotFoundError:
            return {}
        names = [PurePosixPath(path.rstrip("/")).name for path in found]
        return {name: self._exists(f"{place}/{name}/{MANIFEST}".lstrip("/")) for name in names}

    def remove(self, place: str) -> None:
        """Deletes a folder, its manifest first, so that half of it is never taken for the whole."""
        for path in (self._path(f"{place}/{MANIFEST}"), self._path(place)):
            try:
                self._ask(lambda path=path: self._filesystem.rm(path, recursive=True), place)
            except FileNotFoundError:
                continue

    def move(self, place: str, to: str) -> None:
        """Renames a folder by copying it within the store; until all is there, the old one stays."""
        old, new = self._path(place), self._path(to)
        copies = [(old + name, new + name) for name in (path.removeprefix(old) for path in self._find(place))]
        _together(lambda pair: self._ask(lambda: self._filesystem.cp_file(*pair), place), copies)
        self.remove(place)

    def write_text(self, place: str, text: str) -> None:
        """Replaces a small file."""
        self._write(place, text)

    def _path(self, place: str) -> str:
        return f"{self._root}/{place}" if place else self._root

    def _ask(self, action: Callable[[], T], place: str) -> T:
        """Raises FileNotFoundError for what is not there, StorageError for anything else."""
        return asked(action, f"{self.url}/{place}".rstrip("/"))

    def _exists(self, place: str) -> bool:
        try:
            self._ask(lambda: self._filesystem.info(self._path(place)), place)
        except FileNotFoundError:
            return False
        return True

    def _find(self, place: str) -> dict[str, int]:
        """Paths and sizes of all files below a folder."""
        try:
            found = self._ask(lambda: self._filesystem.find(self._path(place), detail=True), place)
        except FileNotFoundError:
            return {}
        return {path: info["size"] for path, info in found.items()}

    def _is(self, manifest: UploadManifest, place: str) -> bool:
        """True if this manifest lies there; a damaged one is another."""
        try:
            return self._read(place) == manifest
        except DamagedError:
            return False

    def _read(self, place: str) -> UploadManifest | None:
        path, where = self._path(place), f"{self.url}/{place}"
        try:
            if self._ask(lambda: self._filesystem.size(path), place) > _LARGEST_MANIFEST:
                raise DamagedError(f"{where}: too large for a manifest")
            raw = self._ask(lambda: self._filesystem.cat_file(path), place)
            manifest = UploadManifest.model_validate_json(raw)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise DamagedError(f"{where}: not a manifest: {' '.join(str(error).split())[:200]}") from None
        if manifest.schema_version > SCHEMA_VERSION:
            raise StorageError(f"{where}: written by a newer version of this program; update it")
        for name in manifest.files:
            if not _stays_inside(name):
                raise DamagedError(f"{where}: names a file outside its folder: {name!r}")
        return manifest

    def _write(self, place: str, text: str) -> None:
        try:
            self._ask(lambda: self._filesystem.pipe_file(self._path(place), text.encode()), place)
        except FileNotFoundError as error:
            raise StorageError(f"{self.url}: can't be written: {reason(error)}") from None

    def _put(self, path: Path, place: str, size: int) -> None:
        def action() -> None:
            self._filesystem.put_file(str(path), self._path(place))
            found = self._filesystem.size(self._path(place))
            if found != size:
                raise OSError(f"{found} bytes arrived of {size}")

        self._ask(action, place)

    def _get(self, place: str, name: str, expected: FileRecord, folder: Path) -> None:
        local, remote = folder / name, f"{place}/{name}"
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._ask(lambda: self._filesystem.get_file(self._path(remote), str(local)), remote)
        except FileNotFoundError:
            raise DamagedError(f"{self.url}/{remote}: missing although the manifest names it") from None
        if record(local) != expected:
            raise DamagedError(f"{self.url}/{remote}: does not match its digest")


def record(path: Path) -> FileRecord:
    """Digest and size of a local file."""
    return FileRecord(sha256=sha256(path), size=path.stat().st_size)


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    normal = str(path) == name and not path.is_absolute() and ".." not in path.parts
    return normal and name != "." and "\\" not in name and "\0" not in name


def _together(action: Callable[[T], None], items: Iterable[T]) -> None:
    """Calls for all items, a few at a time; the first error is raised and those not begun are left out."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for _ in pool.map(action, items):
            pass
