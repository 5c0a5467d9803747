"""Stage kinds: one file each, with its `Config` (what it reads and how) and its `run` (what it writes).

A stage file imports torch only inside `run`, so that planning and skipping stay quick. A stage never imports another.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType

from pipeline.config import StageConfig

_MODULES = {
    "synthetic": "stages.synthetic",
    "shards": "stages.shards",
    "import": "stages.importing",
    "mae": "stages.mae",
    "finetune": "stages.finetune",
    "token": "stages.token",
    "distill": "stages.distill",
    "evaluate": "stages.evaluate",
}


def module_of(kind: str) -> ModuleType:
    """The file of a stage kind."""
    return import_module(_MODULES[kind])


class _Kinds(Mapping[str, type[StageConfig]]):
    """Config classes by kind; a file is imported when it is first asked for."""

    def __getitem__(self, kind: str) -> type[StageConfig]:
        return module_of(kind).Config

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)

    def __contains__(self, kind: object) -> bool:
        return kind in _MODULES


KINDS: Mapping[str, type[StageConfig]] = _Kinds()
"""The config class of every stage kind."""
