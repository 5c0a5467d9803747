"""Results in the form that an evaluation server takes."""

import json
import os
import re
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

SERVER_SETS = ("val2017", "test-dev2017")
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)


def write_server_files(results: Sequence[dict[str, Any]], folder: Path, dataset: str, algorithm: str) -> Path:
    """Writes what COCO's keypoint server takes, as one step, and returns its path.

    That is `person_keypoints_<dataset>_<algorithm>_results.zip` with the results list (see `coco_results`) as the only
    file, a json of the same stem (https://cocodataset.org/#upload). Equal results give equal bytes. Raises ConfigError
    for a set that the server does not have, and for an algorithm name that is not a plain word.
    """
    if dataset not in SERVER_SETS:
        raise ConfigError(f"dataset: COCO's server takes {' or '.join(SERVER_SETS)}, found {dataset!r}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", algorithm):
        raise ConfigError(f"algorithm: expected letters, digits, '.' and '-', found {algorithm!r}")
    stem = f"person_keypoints_{dataset}_{algorithm}_results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.zip"
    temporary = folder / f".{stem}.{uuid.uuid4().hex[:8]}"
    content = json.dumps(list(results), separators=(",", ":"), allow_nan=False)
    entry = zipfile.ZipInfo(f"{stem}.json", date_time=_FIRST_DAY)
    entry.external_attr = 0o644 << 16
    try:
        with temporary.open("wb") as stream:
            with zipfile.ZipFile(stream, "w") as archive:
                archive.writestr(entry, content, compress_type=zipfile.ZIP_DEFLATED)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
