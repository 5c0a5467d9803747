"""A pipeline file read: one YAML file (with at most one base), dotted overrides, one line per mistake.

The order is: the base, the file, the overrides, then validation. Nothing is guessed: an unknown key is an error that
names the closest known one.
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline import plain_yaml
from pipeline.config import PipelineConfig, StageConfig
from pipeline.errors import ConfigError


def load_pipeline(
    source: str | Path, overrides: Sequence[str], kinds: Mapping[str, type[StageConfig]]
) -> PipelineConfig:
    """Reads a pipeline: a YAML file's path or the name of a shipped preset, with `key=value` overrides.

    Raises ConfigError with one line per mistake: where, what was found, what was expected.
    """
    raw = _with_base(source)
    for override in overrides:
        _apply_override(raw, override)
    stages = raw.get("stages")
    mistakes: list[str] = []
    if isinstance(stages, dict):
        stages = {name: section for name, section in stages.items() if section is not None}
        known = [str(name) for name, section in stages.items() if isinstance(section, dict) and "kind" in section]
        validated = {name: _stage(str(name), section, kinds, known, mistakes) for name, section in stages.items()}
        raw = {**raw, "stages": validated}
    try:
        pipeline = PipelineConfig.model_validate(raw)
    except ValidationError as error:
        mistakes = explain(error, PipelineConfig, "") + mistakes
    if mistakes:
        raise ConfigError(f"{source}: " + "\n  ".join(mistakes))
    _check_references(str(source), pipeline)
    for name, stage in pipeline.stages.items():
        try:
            stage.check(pipeline)
        except ConfigError as error:
            raise ConfigError(f"{source}: stages.{name}: {error}") from None
    return pipeline


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError for anything else, and for what `plain_yaml` does not take."""
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        if path.stat().st_size > plain_yaml.MAX_BYTES:
            raise OSError(f"{path.stat().st_size} bytes, the limit is {plain_yaml.MAX_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    try:
        content = plain_yaml.parse(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(content).__name__}")
    return content


def shipped_presets() -> list[str]:
    """Names of the pipelines that the package ships."""
    return sorted(_preset_files())


def _preset_files() -> dict[str, Path]:
    """The shipped files by preset name: a file's name is the preset's, whatever folder it lies in."""
    folder = Path(str(resources.files("configs") / "pipelines"))
    return {path.stem: path for path in folder.rglob("*.yaml")}


def explain(error: ValidationError, model: type[BaseModel], prefix: str) -> list[str]:
    """One line per mistake in a pydantic error: where, what is wrong, the value, the closest known key."""
    lines = []
    mistakes = error.errors()
    for item in mistakes[:_MOST_LINES]:
        keys = [_named(part) for part in _walk(model, item["loc"])[0]]
        where = ".".join([prefix] * bool(prefix) + keys) or "(top)"
        if item["type"] == "extra_forbidden":
            known = sorted(_fields_at(model, item["loc"][:-1]))
            lines.append(f"{where}: unknown key{did_you_mean(str(item['loc'][-1]), known)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            found = "" if isinstance(item["input"], (dict, list)) else f", found {shown(item['input'])}"
            lines.append(f"{where}: {message[0].lower() + message[1:]}{found}")
    if len(mistakes) > _MOST_LINES:
        lines.append(f"and {len(mistakes) - _MOST_LINES} more mistakes in {prefix or 'the file'}")
    return lines


_MOST_LINES = 20


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not too long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _named(part: Any) -> str:
    """A key as a message shows it."""
    text = str(part)
    return text if len(text) <= 60 and text.isprintable() else shown(text)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or the known words where none is close."""
    close = difflib.get_close_matches(word[:100], known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def _with_base(source: str | Path) -> dict[str, Any]:
    path = _pipeline_path(str(source))
    raw = read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    base_path = _pipeline_path(str(base), beside=path.parent)
    base_raw = read_yaml(base_path)
    if "base" in base_raw:
        raise ConfigError(f"{path}: its base {base_path} has a base itself; one level is the limit")
    return _merge(base_raw, raw)


def _pipeline_path(name: str, beside: Path | None = None) -> Path:
    for candidate in ([beside / name] if beside else []) + [Path(name)]:
        if _is_there(candidate) and candidate.is_file():
            return candidate
    presets = _preset_files()
    if name in presets:
        return presets[name]
    raise ConfigError(
        f"no pipeline {shown(name)}: neither a file nor a shipped preset{did_you_mean(name, sorted(presets))}"
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long for a file
        return False


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise ConfigError(
            f"override {shown(override)}: expected key=value with a dotted key, such as stages.mae.steps=100"
        )
    try:
        value = _value(text)
    except ValueError as error:
        raise ConfigError(f"override {shown(override)}: the value is not YAML: {error}") from None
    *parents, last = key.split(".")
    section = raw
    for part in parents:
        inner = section.get(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {shown(override)}: {part!r} is not a section")
        # A copy: sections that share one YAML anchor are one object, and only this one is meant.
        section[part] = dict(inner)
        section = section[part]
    if value is not None:
        section.pop(_EXCLUSIVE.get(last), None)
    section[last] = value


_EXCLUSIVE = {"steps": "epochs", "epochs": "steps", "lr": "base_lr", "base_lr": "lr"}
"""Keys of which a section has one: an override drops the other that the file gives."""


def _value(text: str) -> Any:
    """A value as YAML reads it, but 1e-4 is a number: YAML 1.1 wants 1.0e-4."""
    if "e" in text.lower():
        try:
            return float(text)
        except ValueError:
            pass
    return plain_yaml.parse(text)


def _stage(
    name: str, section: Any, kinds: Mapping[str, type[StageConfig]], others: list[str], mistakes: list[str]
) -> Any:
    where = f"stages.{_named(name)}"
    if not isinstance(section, dict):
        mistakes.append(f"{where}: expected a section, found {shown(section)}")
        return None
    kind = section.get("kind")
    if kind is None:
        mistakes.append(f"{where}: no such stage, or its kind is missing{did_you_mean(name, others)}")
        return None
    if not isinstance(kind, str) or kind not in kinds:
        mistakes.append(
            f"{where}.kind: unknown stage kind {shown(kind)}{did_you_mean(kind if isinstance(kind, str) else '', sorted(kinds))}"
        )
        return None
    try:
        return kinds[kind].model_validate(section)
    except ValidationError as error:
        mistakes.extend(explain(error, kinds[kind], where))
        return None


def _check_references(source: str, pipeline: PipelineConfig) -> None:
    for name, stage in pipeline.stages.items():
        for label, reference in stage.references().items():
            looks_external = "/" in reference or ":" in reference or _is_there(Path(reference))
            if reference not in pipeline.stages and not looks_external:
                hint = did_you_mean(reference, sorted(pipeline.stages))
                raise ConfigError(
                    f"{source}: stages.{name}.inputs.{label}: no stage and no path {shown(reference)}{hint}"
                )


def _fields_at(model: Any, loc: Sequence[Any]) -> set[str]:
    """Field names of the section that `loc` leads to, through nested models, optionals, lists and mappings."""
    return {name for candidate in _walk(model, loc)[1] for name in candidate.model_fields}


def _walk(model: Any, loc: Sequence[Any]) -> tuple[list[Any], list[type[BaseModel]]]:
    """The keys on the way to `loc`, and the sections that may be there.

    pydantic puts in the `kind` by which it told the sections of a union apart; that is no key.
    """
    keys: list[Any] = []
    candidates = _models_in(model)
    for part in loc:
        of_kind = [one for one in candidates if _kinds(one) == (part,)]
        if len(candidates) > 1 and of_kind:
            candidates = of_kind
            continue
        keys.append(part)
        fields = [candidate.model_fields.get(str(part)) for candidate in candidates]
        candidates = [inner for field in fields if field for inner in _models_in(field.annotation)] or candidates
    return keys, candidates


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation) if field else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
