"""Dry runs of many presets build the same models again and again; tests build each once."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

_COUNTS: dict[str, Any] = {}


def remember(monkeypatch: pytest.MonkeyPatch, dry_run: ModuleType) -> None:
    """Lets `dry_run` count the parameters of a model once, however many presets have it."""
    for name in ("count_parameters", "describe_mae", "describe_pose"):
        monkeypatch.setattr(dry_run, name, _remembered(getattr(dry_run, name)))


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        key = f"{function.__qualname__}{arguments!r}"
        if key not in _COUNTS:
            _COUNTS[key] = function(*arguments)
        return _COUNTS[key]

    return counted
