"""Config classes of the stage kinds: what they require, and what contradicts itself."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import stages
from pipeline.config import StageConfig
from pipeline.strict import fingerprint_view
from stages import KINDS, module_of

BACKBONE = {"size": "micro", "image_size": [64, 48], "patch_size": 8, "patch_padding": 0}
TRAINING: dict[str, Any] = {"steps": 10, "global_batch_size": 8, "optimizer": {"lr": 0.001}}
POSE = {**TRAINING, "model": {"backbone": BACKBONE}}
VALID: dict[str, dict[str, Any]] = {
    "synthetic": {},
    "shards": {"inputs": {"data": "data"}, "datasets": ["coco"]},
    "import": {"source": "mae.pth", "model": {"backbone": BACKBONE}, "licence": "CC BY-NC 4.0"},
    "mae": {**TRAINING, "inputs": {"shards": "shards"}, "model": {"backbone": BACKBONE}},
    "finetune": {**POSE, "inputs": {"shards": "shards"}},
    "token": {**TRAINING, "inputs": {"shards": "shards", "teacher": "finetune"}},
    "distill": {**POSE, "inputs": {"shards": "shards"}, "distillation": {}},
    "evaluate": {"inputs": {"data": "data", "models": {"teacher": "finetune"}}, "datasets": ["coco"]},
}


def config(kind: str, changes: dict[str, Any] | None = None) -> StageConfig:
    """A valid section, with dotted keys changed."""
    section = copy.deepcopy({"kind": kind, **VALID[kind]})
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        place = section
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return KINDS[kind].model_validate(section)


def refused(kind: str, changes: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        config(kind, changes)
    return str(caught.value)


def test_what_was_never_trained_is_not_frozen() -> None:
    assert "freeze: attention would freeze random weights" in refused("finetune", {"freeze": "attention"})
    assert "freeze" in refused("finetune", {"freeze": "heads", "inputs.init": "mae"})
    assert config("finetune", {"freeze": "ffn", "inputs.init": "mae"}).freeze == "ffn"
    resnet = {"kind": "resnet", "image_size": [64, 64]}
    found = refused("finetune", {"freeze": "ffn", "inputs.init": "mae", "model.backbone": resnet})
    assert "leave it out for a resnet" in found


def test_every_kind_has_a_file_with_config_and_run() -> None:
    assert set(KINDS) == set(VALID) and len(KINDS) == len(VALID)
    for kind in KINDS:
        assert issubclass(KINDS[kind], StageConfig) and callable(module_of(kind).run)
        assert KINDS[kind].__doc__
    files = {path.stem for path in Path(stages.__file__).parent.glob("*.py")} - {"__init__"}
    assert {module_of(kind).__name__.removeprefix("stages.") for kind in KINDS} == files


def test_no_stage_imports_another_or_torch_before_it_runs() -> None:
    for kind in KINDS:
        source = Path(module_of(kind).__file__ or "").read_text()
        assert "from stages" not in source and "import stages" not in source, kind
        assert not any(line.startswith(("import torch", "from torch")) for line in source.splitlines()), kind
    code = "import sys; from stages import KINDS; [KINDS[kind] for kind in KINDS]; print('torch' in sys.modules)"
    root = Path(stages.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "False", found.stderr


@pytest.mark.parametrize("kind", sorted(VALID))
def test_the_smallest_section_of_each_kind_is_valid_and_strict(kind: str) -> None:
    assert config(kind).kind == kind
    assert "nonsense" in refused(kind, {"nonsense": 1})
    with pytest.raises(ValidationError, match="frozen"):
        config(kind).kind = "other"


@pytest.mark.parametrize("kind", sorted(VALID))
def test_every_field_of_every_kind_is_explained(kind: str) -> None:
    for name, field in KINDS[kind].model_fields.items():
        assert field.description or name in ("kind", "description"), f"{kind}.{name}"


def test_only_kinds_that_train_are_distributed_and_only_data_prepares() -> None:
    assert {kind for kind in KINDS if KINDS[kind].distributed} == {"mae", "finetune", "token", "distill"}
    assert {kind for kind in KINDS if KINDS[kind].prepares} == {"synthetic", "shards"}


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("mae", {"epochs": 3}, "either steps or epochs"),
        ("mae", {"optimizer.base_lr": 1e-4}, "either lr or base_lr"),
        ("mae", {"crop_scale": [0.5, 0.2]}, "not a range"),
        ("mae", {"crop_scale": [0.0, 1.0]}, "not a range"),
        ("mae", {"flip": 1.5}, "flip"),
        ("mae", {"model.backbone.patch_padding": 2}, "patch_padding 0"),
        ("mae", {"inputs.teacher": "x"}, "inputs.teacher"),
        ("finetune", {"global_batch_size": 0}, "global_batch_size"),
        ("finetune", {"average_decay": 1.0}, "average_decay"),
        ("finetune", {"keep": "best"}, "keep: best needs an evaluation"),
        ("finetune", {"evaluation": {"every": 5, "source": "coco"}}, "evaluation needs inputs.data"),
        ("finetune", {"schedule.milestones": [0.5]}, "go together"),
        ("token", {"tokens": 0}, "tokens"),
        ("distill", {"distillation.output": True}, "distillation needs inputs.teacher"),
        ("distill", {"distillation.token": True, "inputs.token": "t"}, "distillation needs inputs.teacher"),
        ("distill", {"distillation.token": True, "inputs.teacher": "t"}, "go together"),
        ("distill", {"inputs.token": "t", "inputs.teacher": "t"}, "go together"),
        ("distill", {"distillation.every_skeleton": {}}, "distillation needs inputs.teacher"),
        ("distill", {"distillation": {"output": True, "every_skeleton": {}}, "inputs.teacher": "t"}, "choose one"),
        ("distill", {"distillation": {"labelled_only": True, "every_skeleton": {}}}, "labelled_only is of output"),
        ("distill", {"distillation.every_skeleton": {"agreement": 0}}, "agreement"),
        ("distill", {"distillation.every_skeleton": {"floor": 1.5}}, "floor"),
        ("distill", {"distillation.output_decay": "linear"}, "output_decay needs output or every_skeleton"),
        ("distill", {"distillation.token_source": "random"}, "token_source 'random' needs token: true"),
        ("distill", {"distillation": {"token": True, "token_source": "random"}}, "distillation needs inputs.teacher"),
        ("distill", {"distillation": {"token": True, "token_source": "pretrained"}}, "token_source"),
        ("distill", {"distillation": {"token": True, "token_source": "learned", "bridge": "truncate"}}, "bridge is of"),
        ("distill", {"model.knowledge_tokens": 1}, "knowledge_tokens is set by the token"),
        ("shards", {"datasets": []}, "datasets"),
        ("shards", {"max_bad_fraction": 2}, "max_bad_fraction"),
        ("import", {"source": "https://host/mae.pth"}, "a URL needs the sha256"),
        ("import", {"sha256": "abc"}, "sha256"),
        ("import", {"format": "pickle"}, "format"),
        ("evaluate", {"inputs.models": {}}, "inputs.models"),
        ("evaluate", {"compare": [["teacher", "studnet"]]}, "no model 'studnet' among teacher"),
        ("evaluate", {"boxes": ["oracle"]}, "boxes"),
        ("evaluate", {"ensembles": {"all": ["teacher", "student"]}}, "ensembles.all: no model 'student' among teacher"),
        ("evaluate", {"ensembles": {"all": ["all", "teacher"]}}, "ensembles.all: no model 'all' among teacher"),
        ("evaluate", {"averages": {"mean": ["teacher", "mean"]}}, "averages.mean: no model 'mean' among teacher"),
        ("evaluate", {"averages": {"teacher": ["a", "b"]}}, "there is a model 'teacher' already"),
        ("evaluate", {"averages": {"mean": ["teacher", "teacher"]}}, "averages.mean: names a model twice"),
        ("evaluate", {"averages": {"mean": ["teacher"]}}, "averages.mean"),
        ("mae", {"model.backbone": {"kind": "resnet"}}, "Input should be 'vit'"),
        ("finetune", {"model.backbone": {"kind": "resnet"}, "optimizer.layer_decay": 0.75}, "layer_decay is of ViTs"),
        (
            "distill",
            {
                "model.backbone": {"kind": "resnet"},
                "distillation.token": True,
                "inputs.teacher": "t",
                "inputs.token": "k",
            },
            "distillation.token: a resnet takes no token",
        ),
    ],
)
def test_a_contradiction_is_refused(kind: str, changes: dict[str, Any], said: str) -> None:
    assert said in refused(kind, changes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mae", {"steps": None, "epochs": 800}),
        ("finetune", {"keep": "best", "evaluation": {"every": 5, "source": "coco"}, "inputs.data": "raw"}),
        ("finetune", {"schedule": {"shape": "step", "milestones": [0.8, 0.95], "warmup_start": 0.001}}),
        ("distill", {"distillation": {"output": True, "token": True}, "inputs.teacher": "t", "inputs.token": "k"}),
        ("distill", {"distillation.output": True, "inputs.teacher": "t"}),
        ("distill", {"distillation": {"token": True, "token_source": "learned"}}),
        ("distill", {"distillation": {"token": True, "token_source": "random"}, "inputs.teacher": "t"}),
        ("distill", {"distillation": {"every_skeleton": {}, "output_decay": "linear"}, "inputs.teacher": "t"}),
        ("import", {"source": "https://host/mae.pth", "sha256": "a" * 64}),
        ("evaluate", {"inputs.models": {"a": "x", "b": "y"}, "compare": [["a", "b"]]}),
        (
            "evaluate",
            {
                "inputs.models": {"a": "x", "b": "y"},
                "averages": {"mean": ["a", "b"]},
                "ensembles": {"all": ["a", "b", "mean"]},
                "compare": [["all", "mean"]],
            },
        ),
        ("finetune", {"model.backbone": {"kind": "resnet", "layers": 101}}),
        ("distill", {"model.backbone": {"kind": "resnet"}, "distillation.output": True, "inputs.teacher": "t"}),
    ],
)
def test_what_belongs_together_is_taken(kind: str, changes: dict[str, Any]) -> None:
    assert config(kind, changes).kind == kind


def test_keys_that_came_later_change_no_fingerprint_until_they_are_used() -> None:
    later = {"averages", "ensembles", "border"}
    assert not later & fingerprint_view(config("evaluate")).keys()
    models = {"inputs.models": {"a": "x", "b": "y"}}
    used = config("evaluate", {**models, "border": "exact", "ensembles": {"all": ["a", "b"]}})
    assert later & fingerprint_view(used).keys() == {"ensembles", "border"}


def test_raw_data_that_a_kind_reads_is_listed() -> None:
    shards = config("shards", {"exclude": [{"name": "coco", "split": "val"}]})
    assert [(source.name, source.split) for source in shards.sources()] == [("coco", "train"), ("coco", "val")]
    assert [source.name for source in config("evaluate").sources()] == ["coco"]
    assert config("finetune").sources() == []
    tuned = config("finetune", {"evaluation": {"every": 5, "source": "aic"}, "inputs.data": "raw"})
    assert [source.name for source in tuned.sources()] == ["aic"]
