"""The base of every configuration section, and what of a section enters a fingerprint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A configuration section: unknown keys are errors, values are frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class _NotInFingerprint:
    """Marks a field that does not change the result, so that changing it does not start a new run."""


NotInFingerprint = _NotInFingerprint()


class _AddedLater:
    """Marks a field that is younger than its section: at its default, which means what was before, it stays out of the
    fingerprint, so that finished runs stay finished."""


AddedLater = _AddedLater()


def fingerprint_view(config: BaseModel) -> dict[str, Any]:
    """The part of a section that changes the result, as plain data."""
    view: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        if any(isinstance(mark, _NotInFingerprint) for mark in field.metadata) or name in ("description", "inputs"):
            continue
        value = getattr(config, name)
        later = any(isinstance(mark, _AddedLater) for mark in field.metadata)
        if later and value == field.get_default(call_default_factory=True):
            continue
        view[name] = fingerprint_view(value) if isinstance(value, BaseModel) else _plain(value)
    return view


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return fingerprint_view(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
