"""The configuration: strict, frozen, one line per mistake, and a fingerprint of what changes the result."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import PipelineConfig
from pipeline.config_file import did_you_mean, load_pipeline, read_yaml, shipped_presets
from pipeline.errors import ConfigError
from pipeline.strict import fingerprint_view
from stages import KINDS

MAE: dict[str, Any] = {
    "kind": "mae",
    "inputs": {"shards": "./shards"},
    "model": {"backbone": {"size": "micro", "image_size": [32, 32], "patch_size": 8}, "decoder_width": 32},
    "steps": 10,
    "global_batch_size": 8,
    "optimizer": {"lr": 0.001},
}


def pipeline_file(folder: Path, content: dict[str, Any], name: str = "pipeline.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return pipeline_file(tmp_path, {"name": "trial", "stages": {"mae": MAE, "more": MAE}})


def mistake(source: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(source, overrides, KINDS)
    return str(caught.value)


def load(source: Path, *overrides: str) -> PipelineConfig:
    return load_pipeline(source, overrides, KINDS)


def test_a_file_is_validated_into_typed_sections(file: Path) -> None:
    pipeline = load(file)
    assert pipeline.stages["mae"].optimizer.lr == 0.001
    assert pipeline.stages["mae"].model.backbone.image_size == (32, 32)
    assert pipeline.engine.zero_stage == 1 and pipeline.seed == 0


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("override", "where", "hint"),
    [
        ("sed=1", "sed", "did you mean 'seed'?"),
        ("engine.precison=bf16", "engine.precison", "did you mean 'precision'?"),
        ("stages.mae.global_batch=4", "stages.mae.global_batch", "did you mean 'global_batch_size'?"),
        ("stages.mae.optimizer.weight_decy=0", "stages.mae.optimizer.weight_decy", "did you mean 'weight_decay'?"),
        ("stages.mae.model.backbone.widht=8", "stages.mae.model.backbone.widht", "did you mean 'width'?"),
        ("stages.mea.steps=3", "stages.mea", "did you mean 'mae'?"),
        ("stages.mae.kind=mea", "stages.mae.kind", "did you mean 'mae'?"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_closest_known_one(
    file: Path, override: str, where: str, hint: str
) -> None:
    message = mistake(file, override)
    assert message.startswith(f"{file}: {where}: ") and message.endswith(hint)
    assert "\n" not in message


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("override", "where", "found"),
    [
        ("stages.mae.steps=many", "stages.mae.steps", "'many'"),
        ("stages.mae.steps=0", "stages.mae.steps", "0"),
        ("engine.zero_stage=4", "engine.zero_stage", "4"),
        ("stages.mae.optimizer.lr=.inf", "stages.mae.optimizer.lr", "inf"),
        ("name=Not a name", "name", "'Not a name'"),
        ("stages.mae.kind=[mae]", "stages.mae.kind", "['mae']"),
        ("stages.mae=5", "stages.mae", "5"),
    ],
)
def test_a_wrong_value_is_one_line_with_place_and_value(file: Path, override: str, where: str, found: str) -> None:
    message = mistake(file, override)
    assert message.startswith(f"{file}: {where}: ") and found in message
    assert "\n" not in message


def test_each_of_several_mistakes_gets_its_own_line(file: Path) -> None:
    lines = mistake(file, "sed=1", "stages.mae.steps=x", "stages.more.stepz=1").splitlines()
    assert len(lines) == 3
    assert "sed" in lines[0] and "stages.mae.steps" in lines[1] and "stages.more.stepz" in lines[2]


def test_sections_are_frozen(file: Path) -> None:
    pipeline = load(file)
    with pytest.raises(ValueError, match="frozen"):
        pipeline.seed = 1
    with pytest.raises(ValueError, match="frozen"):
        pipeline.stages["mae"].optimizer.lr = 1.0


def test_overrides_read_numbers_lists_and_null(file: Path) -> None:
    pipeline = load(
        file,
        "stages.mae.optimizer.lr=1e-4",
        "stages.mae.optimizer.betas=[0.9, 0.95]",
        "stages.mae.steps=1e3",
        "stages.more=null",
        "description=a=b",
    )
    assert pipeline.stages["mae"].optimizer.lr == 1e-4
    assert pipeline.stages["mae"].optimizer.betas == (0.9, 0.95)
    assert pipeline.stages["mae"].steps == 1000
    assert list(pipeline.stages) == ["mae"]
    assert pipeline.description == "a=b"


@pytest.mark.parametrize("override", ["seed", "=1", "stages..steps=1", "seed=[1", "seed=2020-99-99", ".=1"])
def test_an_override_that_is_not_key_and_value_is_refused(file: Path, override: str) -> None:
    assert repr(override) in mistake(file, override)


def test_an_override_through_a_plain_value_is_refused(file: Path) -> None:
    assert "'name' is not a section" in mistake(file, "name.x=1")


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(tmp_path: Path) -> None:
    path = pipeline_file(tmp_path, {"name": "trial", "stages": {"mae": MAE, "more": MAE}})
    assert "&id" in path.read_text()
    pipeline = load(path, "stages.mae.optimizer.lr=5", "stages.mae.model.decoder_depth=3")
    assert pipeline.stages["mae"].optimizer.lr == 5 and pipeline.stages["more"].optimizer.lr == 0.001
    assert pipeline.stages["mae"].model.decoder_depth == 3 and pipeline.stages["more"].model.decoder_depth == 8


def test_a_base_is_merged_under_the_file_and_null_removes(tmp_path: Path) -> None:
    pipeline_file(tmp_path, {"name": "base", "seed": 3, "stages": {"mae": MAE, "more": MAE}}, "base.yaml")
    over = {"base": "base.yaml", "name": "over", "stages": {"mae": {"optimizer": {"weight_decay": 0.5}}, "more": None}}
    pipeline = load(pipeline_file(tmp_path, over))
    assert pipeline.name == "over" and pipeline.seed == 3 and list(pipeline.stages) == ["mae"]
    assert pipeline.stages["mae"].optimizer.lr == 0.001 and pipeline.stages["mae"].optimizer.weight_decay == 0.5


def test_a_list_of_the_file_replaces_that_of_its_base(tmp_path: Path) -> None:
    stage = {**MAE, "crop_scale": [0.5, 1.0]}
    pipeline_file(tmp_path, {"name": "base", "stages": {"mae": stage}}, "base.yaml")
    over = {"base": "base.yaml", "stages": {"mae": {"crop_scale": [0.3, 0.6]}}}
    assert load(pipeline_file(tmp_path, over)).stages["mae"].crop_scale == (0.3, 0.6)


def test_a_base_may_be_a_shipped_preset(tmp_path: Path) -> None:
    pipeline = load(pipeline_file(tmp_path, {"base": "demo", "name": "mine", "seed": 7}))
    assert pipeline.name == "mine" and pipeline.seed == 7 and "distill" in pipeline.stages


def test_a_base_of_a_base_is_refused(tmp_path: Path) -> None:
    pipeline_file(tmp_path, {"base": "demo"}, "middle.yaml")
    assert "has a base itself" in mistake(pipeline_file(tmp_path, {"base": "middle.yaml"}, "top.yaml"))


def test_an_unknown_preset_names_the_closest(tmp_path: Path) -> None:
    assert "demo" in shipped_presets()
    assert mistake("demoo").endswith("did you mean 'demo'?")


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2", "not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
        ("a: 2020-99-99", "not YAML"),
        ("- a\n- b\n", "expected a mapping at the top, found list"),
        ("", "found NoneType"),
        ("a: \x00", "not YAML"),
    ],
)
def test_a_file_that_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="can't be read"):
        read_yaml(path)


@pytest.mark.fault(25)
def test_a_yaml_object_tag_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "evil.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {canary}']\n")
    with pytest.raises(ConfigError):
        read_yaml(path)
    assert not canary.exists()


def test_a_reference_to_no_stage_and_no_path_is_refused(file: Path) -> None:
    message = mistake(file, "stages.more.inputs.shards=maee")
    assert "stages.more.inputs.shards: no stage and no path 'maee'" in message and "did you mean 'mae'?" in message


@pytest.mark.parametrize("name", ["a/b", "../up", "Upper", ""])
def test_a_stage_name_is_a_plain_folder_name(tmp_path: Path, name: str) -> None:
    path = pipeline_file(tmp_path, {"name": "trial", "stages": {name: MAE}})
    assert "stages" in mistake(path)


def test_a_pipeline_without_stages_is_refused(tmp_path: Path) -> None:
    assert "at least one stage" in mistake(pipeline_file(tmp_path, {"name": "trial", "stages": {}}))
    assert "stages: missing" in mistake(pipeline_file(tmp_path, {"name": "trial"}))


def test_the_workspace_may_lie_below_the_home_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    assert load(file, "workspace=~/runs").workspace == Path("/somebody/runs")


def test_marked_fields_inputs_and_words_stay_out_of_the_fingerprint(file: Path) -> None:
    def view(*overrides: str) -> dict[str, Any]:
        return fingerprint_view(load(file, *overrides).stages["mae"])

    same = ("save_every=3", "pictures=1", "max_bad_fraction=0.5", "description=words", "inputs.shards=./other")
    for override in same:
        assert view(f"stages.mae.{override}") == view(), override
    different = ("steps=11", "global_batch_size=4", "optimizer.lr=1", "model.backbone.depth=1", "flip=0")
    for override in different:
        assert view(f"stages.mae.{override}") != view(), override


def test_marked_engine_fields_stay_out_of_the_fingerprint(file: Path) -> None:
    assert fingerprint_view(load(file, "engine.zero_stage=3").engine) == fingerprint_view(load(file).engine)
    assert fingerprint_view(load(file, "engine.precision=bf16").engine) == {"precision": "bf16"}


def test_references_flatten_mappings_and_leave_out_unset_inputs() -> None:
    evaluate = KINDS["evaluate"].model_validate(
        {"kind": "evaluate", "inputs": {"data": "d", "models": {"a": "x", "b": "y"}}, "datasets": ["coco"]}
    )
    assert evaluate.references() == {"data": "d", "models.a": "x", "models.b": "y"}
    assert KINDS["mae"].model_validate(MAE).references() == {"shards": "./shards"}


def test_a_hint_lists_what_is_known_where_nothing_is_close() -> None:
    assert did_you_mean("zzz", ["alpha", "beta"]) == "; known: alpha, beta"
    assert did_you_mean("zzz", []) == ""


def test_a_word_takes_the_place_of_the_one_it_excludes_and_null_of_neither(tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, {"name": "p", "stages": {"mae": {**MAE, "steps": 10}}})
    for words in (["stages.mae.epochs=3"], ["stages.mae.epochs=3", "stages.mae.steps=null"]):
        stage = load_pipeline(file, words, KINDS).stages["mae"]
        assert (stage.steps, stage.epochs) == (None, 3)
    stage = load_pipeline(file, ["stages.mae.steps=7", "stages.mae.epochs=null"], KINDS).stages["mae"]
    assert (stage.steps, stage.epochs) == (7, None)
