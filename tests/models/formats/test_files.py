"""Others' checkpoint files: unwrapped, freed of what is no weight, never executed."""

import argparse
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ArtifactError
from pipeline.models.formats import files
from pipeline.models.formats.files import read_checkpoint


def pth(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("wrapped", [{"model": "x"}, {"state_dict": "x"}, {"module": "x"}, {"model": {"module": "x"}}])
def test_state_dicts_are_unwrapped(tmp_path: Path, wrapped: dict[str, Any]) -> None:
    def put(value: Any) -> Any:
        return {key: put(inner) for key, inner in value.items()} if isinstance(value, dict) else {"a": torch.ones(2)}

    assert torch.equal(read_checkpoint(pth(tmp_path / "x.pth", put(wrapped)))["a"], torch.ones(2))


def test_a_prefix_of_every_name_is_cut_off(tmp_path: Path) -> None:
    state = {"module.a.weight": torch.ones(2), "module.b": torch.ones(1)}
    assert read_checkpoint(pth(tmp_path / "x.pth", state)).keys() == {"a.weight", "b"}
    assert read_checkpoint(pth(tmp_path / "y.pth", state | {"c": torch.ones(1)})).keys() == {*state, "c"}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32_and_counters_stay(tmp_path: Path, kind: torch.dtype) -> None:
    state = read_checkpoint(pth(tmp_path / "x.pth", {"a": torch.ones(2, dtype=kind), "n": torch.tensor(3)}))
    assert state["a"].dtype == torch.float32 and state["n"].dtype == torch.int64


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_what_real_files_carry_beside_the_weights_is_never_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, core: str
) -> None:
    """As mmengine's message hub and mmpose's meta: HistoryBuffers and arrays of numpy, of both its module names."""
    made = []

    class HistoryBuffer:
        def __init__(self) -> None:
            self.max_length, self._log_history = 10, np.array([0.1, 0.2])

        def __setstate__(self, state: Any) -> None:
            made.append(state)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, module)
    content = {
        "meta": {"dataset_meta": {"sigmas": np.ones(3, np.float32)}, "args": argparse.Namespace(lr=1.0)},
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"best": np.float64(0.5)}},
        "state_dict": {"a": torch.ones(2)},
    }
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if not zipped:  # a pickle is plain text enough to change a module's name in it
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", f"{core}.multiarray".encode()))
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(2)) and not made
    monkeypatch.setattr(files, "_HARMLESS", ())
    with pytest.raises(ArtifactError, match="refused"):
        read_checkpoint(path)


def test_a_class_of_another_name_is_refused(tmp_path: Path) -> None:
    content = {"state_dict": {"a": torch.ones(1)}, "meta": Path("x")}
    with pytest.raises(ArtifactError, match=r"x\.pth: refused"):
        read_checkpoint(pth(tmp_path / "x.pth", content))


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.fault(24)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    content = {"model": {"a": torch.ones(1)}, "args": Evil(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match=r"evil\.pth: refused"):
        read_checkpoint(path)
    assert not canary.exists()


@pytest.mark.fault(24)
def test_a_plain_pickle_with_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Evil(canary), protocol=2))
    with pytest.raises(ArtifactError, match="refused"):
        read_checkpoint(path)
    assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists(), "the file was not dangerous at all"


@pytest.mark.fault(24)
@pytest.mark.parametrize("content", [b"", b"hello world\n", b"\x80\x02", b"PK\x03\x04", b"\x80\x02l.", b"\x00" * 64])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_garbage_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: ") as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.fault(24)
def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = pth(tmp_path / "x.pth", {"model": {"a": torch.ones(4)}})
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, torch.ones(2), {"a": torch.ones(1), "b": "text"}])
def test_anything_but_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ArtifactError, match="holds no state dict"):
        read_checkpoint(pth(tmp_path / "x.pth", content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        read_checkpoint(tmp_path / "none.pth")
