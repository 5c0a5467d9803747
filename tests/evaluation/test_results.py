import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.results import write_server_files
from tests.evaluation.people import result

RESULTS = [result(785, np.arange(51.0), 0.75), result(40083, np.arange(51.0) / 7, 0.5)]


@pytest.mark.parametrize("dataset", ["val2017", "test-dev2017"])
def test_the_zip_holds_one_json_of_its_own_stem_with_the_results(tmp_path: Path, dataset: str) -> None:
    path = write_server_files(RESULTS, tmp_path / "new", dataset, "vitruvian-b")
    stem = f"person_keypoints_{dataset}_vitruvian-b_results"
    assert path == tmp_path / "new" / f"{stem}.zip"
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [f"{stem}.json"]
        assert archive.testzip() is None
        assert json.loads(archive.read(f"{stem}.json")) == RESULTS


def test_equal_results_give_equal_bytes_and_leave_nothing_else(tmp_path: Path) -> None:
    first = write_server_files(RESULTS, tmp_path, "val2017", "a").read_bytes()
    second = write_server_files(RESULTS, tmp_path, "val2017", "a")
    assert second.read_bytes() == first
    assert list(tmp_path.iterdir()) == [second]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = write_server_files(RESULTS, tmp_path, "val2017", "a")
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_server_files([result(1, np.full(51, np.nan), 0.5)], tmp_path, "val2017", "a")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_unknown_sets_and_names_that_are_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="val2017 or test-dev2017, found 'train2017'"):
        write_server_files(RESULTS, tmp_path, "train2017", "a")
    for name in ("../a", "a_b", "", "a b"):
        with pytest.raises(ConfigError, match="algorithm"):
            write_server_files(RESULTS, tmp_path, "val2017", name)
