"""Places that can't be written to are found before training starts; and what a run says about its code is true."""

import subprocess
from pathlib import Path

import pytest

from launchers import execution, run_stage
from pipeline import artifacts
from pipeline.artifacts import git_commit
from pipeline.errors import ConfigError
from pipeline.files import require_writable


@pytest.mark.fault(12)
@pytest.mark.parametrize("place", ["file/workspace", "file", "/proc/workspace"])
def test_a_place_that_can_not_be_written_to_is_one_line(tmp_path: Path, place: str) -> None:
    """A file in the way, or a file system that takes none: a ConfigError with the reason, and nothing is left there."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="can't be written to") as caught:
        require_writable(tmp_path / place)
    assert "\n" not in str(caught.value)
    require_writable(tmp_path / "fine" / "below")
    assert list((tmp_path / "fine" / "below").iterdir()) == []


@pytest.mark.fault(12)
def test_an_unwritable_workspace_is_exit_2_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage that the command asks for never begins; one line on stderr."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(execution, "module_of", lambda kind: pytest.fail("the stage was started"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    code = run_stage.main(["--stage", "data", f"workspace={tmp_path}/file/workspace"])
    [line] = capsys.readouterr().err.splitlines()
    assert code == 2 and "can't be written to (Not a directory)" in line


def test_the_commit_of_a_repository_that_only_surrounds_the_code_is_not_recorded(tmp_path: Path) -> None:
    """An environment below somebody's own repository: its commit says nothing about this program."""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "env" / "pipeline"
    package.mkdir(parents=True)
    file = package / "artifacts.py"
    file.write_bytes(Path(artifacts.__file__).read_bytes())
    assert git_commit(file) is None
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "theirs")
    assert git_commit(file) is None
    git("add", "env")
    git("commit", "--quiet", "-m", "ours")
    commit = git_commit(file)
    assert commit is not None and len(commit) == 40
    file.write_text("changed")
    assert git_commit(file) == f"{commit}-dirty"
