"""Atomic files: whole or absent, and named by their digest."""

import hashlib
from pathlib import Path

import pytest

from pipeline.files import digest_of, publish_folder, read_json, sha256, staging, write_json, write_text


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "f").write_bytes(content)
    assert sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_the_digest_of_plain_data_ignores_the_order_of_keys_only() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"b": [1, 2]}) != digest_of({"b": [2, 1]})
    assert digest_of({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    write_json(tmp_path / "f", {"b": 1, "a": [2]})
    assert read_json(tmp_path / "f") == {"a": [2], "b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "f", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "f", object())
    assert read_json(tmp_path / "f") == 1


def test_staging_publishes_when_the_block_ends_well(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").write_text("old")
    with staging(tmp_path / "final") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "new").write_text("new")
        assert (tmp_path / "final" / "old").is_file()
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["sub"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_staging_keeps_what_was_there_when_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    with pytest.raises(RuntimeError), staging(tmp_path / "final") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "final").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_published_folder_moves_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "f").write_text("x")
    publish_folder(tmp_path / "t", tmp_path / "final")
    assert not (tmp_path / "t").exists() and (tmp_path / "final" / "f").read_text() == "x"
