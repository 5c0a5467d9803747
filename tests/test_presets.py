"""Every pipeline that ships: it loads, plans without data, and holds the numbers of the papers it names."""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launchers import dry_run as dry_running
from launchers import run_stage
from launchers.cli import app
from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.config_file import load_pipeline, shipped_presets
from pipeline.data.definitions import DatasetSource, load_definition
from pipeline.errors import DataError
from pipeline.models.config import PoseConfig
from pipeline.models.parameter_groups import layer_decay_groups
from pipeline.models.pose import PoseModel
from pipeline.rows import load_rows, without_aic
from stages import KINDS
from tests.remembering import remember


@cache
def load(name: str) -> PipelineConfig:
    return load_pipeline(name, [], KINDS)


REAL = [name for name in shipped_presets() if name != "demo"]
CHAINS = [name for name in REAL if "token" in load(name).stages]
WITH_AIC = [name for name in REAL if any(part.name == "aic" for part in load(name).stages["evaluate"].datasets)]
SIZES = ("s", "b", "l", "h", "1b")
ROOT = Path(__file__).resolve().parents[1]
BACKBONES = {
    "vitpose_s": "21.7M",
    "vitpose_b": "85.8M",
    "vitpose_l": "303.3M",
    "vitpose_h": "630.9M",
    "vitpose_1b": "1,011.4M",
}
RELEASED = {  # layer decay, drop path, heads: ViTPose's public configurations; 1b: the paper's G
    "vitpose_s": (0.80, 0.10, 12),
    "vitpose_b": (0.75, 0.30, 12),
    "vitpose_l": (0.80, 0.50, 16),
    "vitpose_h": (0.85, 0.55, 16),
    "vitpose_1b": (0.85, 0.55, 16),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory: no data, no workspace."""
    monkeypatch.chdir(tmp_path)
    remember(monkeypatch, dry_running)
    return tmp_path


def dry_run(name: str, *overrides: str) -> str:
    result = CliRunner().invoke(app, ["run", name, "--dry-run", *overrides])
    assert result.exit_code == 0, result.output
    return result.output


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the last table that mentions a stage, by stage."""
    cells = [[cell.strip() for cell in re.split("[│|]", line)[1:-1]] for line in output.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in cells if row}


def test_there_is_a_preset_for_every_size_and_data_from_imagenet_and_from_our_own_pretraining() -> None:
    shipped = set(shipped_presets())
    for size in SIZES:
        for data in ("", "_coco_aic_mpii", "_coco_mpii"):
            assert {f"vitpose_{size}{data}", f"vitpose_{size}{data}_imagenet"} <= shipped
    assert {f"vitpose_plus_{size}" for size in SIZES[:-1]} <= shipped
    assert {"demo", "vitpose_l_to_b", "every_skeleton", "official_weights", "whole_image"} <= shipped


def test_every_preset_for_a_row_of_the_paper_lies_in_its_folder_and_has_a_name_of_its_own() -> None:
    files = [path for path in (ROOT / "configs" / "pipelines").rglob("*.yaml")]
    assert len({path.stem for path in files}) == len(files)
    assert all((path.parent.name == "paper") == path.stem.startswith("table") for path in files)


@pytest.mark.parametrize("name", shipped_presets())
def test_a_preset_is_named_as_its_file(name: str) -> None:
    assert load(name).name == name


@pytest.mark.parametrize("name", REAL)
def test_a_preset_says_what_the_paper_reports_and_that_it_was_not_run(name: str) -> None:
    description = load(name).description
    assert "Not run here" in description
    assert re.search(r"\d\d\.\d|The paper has no such row", description)


@pytest.mark.parametrize("name", shipped_presets())
def test_a_dry_run_works_where_there_is_no_data(name: str, elsewhere: Path) -> None:
    output = dry_run(name)
    for stage in load(name).stages:
        assert stage in output
    if name != "demo":
        assert "for raw data at data/ (see docs/datasets.md)" in output
    assert not list(elsewhere.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize(("name", "millions"), BACKBONES.items())
def test_a_dry_run_prints_the_published_number_of_parameters(name: str, millions: str) -> None:
    found = rows(dry_run(name))
    assert found["finetune"][0] == found["mae"][0] == millions


def test_running_without_data_names_the_folder_and_what_belongs_there(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_stage, "setup_logging", lambda rank: None)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the launcher changes it
    assert run_stage.main(["--stage", "shards", "--config", "vitpose_b"]) == 2
    (message,) = caplog.messages
    assert len(message.splitlines()) == 1
    assert str(elsewhere / "data") in message and "coco (train), coco (val)" in message
    assert not (elsewhere / "workspace").exists()


def test_an_incomplete_data_folder_waits_and_names_the_dataset_when_it_runs(elsewhere: Path) -> None:
    (elsewhere / "data" / "coco").mkdir(parents=True)
    assert "for raw data at data/ (see docs/datasets.md)" in dry_run("coco_mpii")
    plan = graph.plan(load("coco_mpii"), ["shards"])["shards"]
    assert plan.state == "waiting"
    with pytest.raises(DataError, match=r"stages\.shards\.inputs\.data: dataset coco, split train: annotations"):
        graph.require_raw_data(plan)


def shards_that_differ() -> list[str]:
    """A preset for each way in which shards are made of datasets of which there are samples."""
    found: dict[str, str] = {}
    for name in REAL:
        stage = load(name).stages.get("shards")
        sources = stage.sources() if stage else []
        if sources and {one.name for one in sources} <= {"coco", "aic", "mpii", "ochuman"}:
            found.setdefault(json.dumps([one.model_dump() for one in sources]), name)
    return list(found.values())


@pytest.mark.parametrize("name", shards_that_differ())
def test_with_real_data_in_place_the_shards_can_start(name: str, samples: Path) -> None:
    plans = graph.plan(load_pipeline(name, [f"stages.shards.inputs.data={samples}"], KINDS), ["shards"])
    assert plans["shards"].state == "start", plans["shards"].inputs


def test_vitpose_b_resolves_to_the_released_settings() -> None:
    stage = load("vitpose_b").stages["finetune"]
    backbone = stage.model.backbone
    assert (backbone.image_size, backbone.patch_size, backbone.patch_padding) == ((256, 192), 16, 2)
    assert (backbone.width, backbone.depth, backbone.heads, backbone.mlp_width) == (768, 12, 12, 3072)
    assert stage.model.decoder.model_dump() == {"kind": "classic", "deconv_layers": 2, "filters": 256}
    assert stage.model.heatmap_size == (64, 48)
    assert stage.optimizer.model_dump() == {
        "lr": 5e-4,
        "base_lr": None,
        "betas": (0.9, 0.999),
        "weight_decay": 0.1,
        "layer_decay": 0.75,
        "gradient_clipping": 1.0,
    }
    assert (stage.global_batch_size, stage.epochs, stage.steps) == (512, 210, None)
    augmentation = stage.augmentation
    assert (augmentation.center_jitter_probability, augmentation.center_jitter) == (0.3, 0.4)
    assert (augmentation.flip, augmentation.half_body, augmentation.half_body_padding) == (0.5, 0.3, 1.5)
    assert (augmentation.scale, augmentation.rotation, augmentation.rotation_probability) == (0.5, 40, 0.6)
    assert stage.keep == "best" and stage.evaluation.source == DatasetSource(name="coco", split="val")


def test_vitpose_b_pretrains_with_the_defaults_of_mae() -> None:
    stage = load("vitpose_b").stages["mae"]
    assert (stage.epochs, stage.global_batch_size) == (1600, 4096)
    assert stage.optimizer.peak(4096) == pytest.approx(2.4e-3)
    assert (stage.optimizer.betas, stage.optimizer.weight_decay) == ((0.9, 0.95), 0.05)
    assert stage.optimizer.gradient_clipping is None
    assert (stage.schedule.shape, stage.schedule.warmup_epochs, stage.schedule.warmup_start) == ("cosine", 40, 0)
    assert (stage.model.backbone.image_size, stage.model.visible) == ((256, 192), 48)
    assert (stage.model.decoder_width, stage.model.decoder_depth, stage.model.decoder_heads) == (512, 8, 16)
    assert (stage.model.norm_pixels, stage.crop_scale, stage.flip) == (True, (0.2, 1.0), 0.5)


@pytest.mark.parametrize("name", [*RELEASED, *CHAINS])
def test_the_rate_warms_up_for_500_steps_and_falls_at_epochs_170_and_200(name: str) -> None:
    stage = load(name).stages["finetune"]
    total, epoch, peak = stage.total_steps(100 * stage.global_batch_size), 100, stage.optimizer.lr
    rate = stage.learning_rate(total, 100 * stage.global_batch_size)
    assert total == 210 * epoch
    assert rate(0, {}) == pytest.approx(0.001 * peak)
    assert rate(250, {}) == pytest.approx(0.5005 * peak)
    assert rate(500, {}) == rate(170 * epoch - 1, {}) == peak
    assert rate(170 * epoch, {}) == rate(200 * epoch - 1, {}) == pytest.approx(0.1 * peak)
    assert rate(200 * epoch, {}) == rate(total - 1, {}) == pytest.approx(0.01 * peak)


@pytest.mark.parametrize(("name", "values"), RELEASED.items())
def test_sizes_differ_as_in_the_released_configurations(name: str, values: tuple[float, float, int]) -> None:
    stage, base = load(name).stages["finetune"], load("vitpose_b").stages["finetune"]
    assert (stage.optimizer.layer_decay, stage.model.backbone.drop_path, stage.model.backbone.heads) == values
    same = {"augmentation", "schedule", "epochs", "global_batch_size", "evaluation", "keep"}
    assert {key: getattr(stage, key) for key in same} == {key: getattr(base, key) for key in same}
    recomputed = [one.model.backbone.gradient_checkpointing for one in (load(name).stages["mae"], stage)]
    assert recomputed == [name == "vitpose_1b"] * 2


@pytest.mark.parametrize(
    ("name", "patches"),
    [
        ("vitpose_s", 2.75e-5),
        ("vitpose_b", 1.19e-5),
        ("vitpose_l", 1.89e-6),
        ("vitpose_h", 2.34e-6),
        ("vitpose_1b", 6.4e-7),
    ],
)
def test_layer_decay_gives_the_published_learning_rates(name: str, patches: float) -> None:
    stage = load(name).stages["finetune"]
    rates = learning_rates(stage.model, stage.optimizer)
    decay, depth = stage.optimizer.layer_decay, stage.model.backbone.depth
    assert rates["backbone.patch_embed.proj.weight"] == rates["backbone.pos_embed"] == pytest.approx(patches, rel=5e-3)
    assert rates["backbone.blocks.0.mlp.fc1.weight"] == pytest.approx(5e-4 * decay**depth)
    assert rates[f"backbone.blocks.{depth - 1}.mlp.fc1.weight"] == pytest.approx(5e-4 * decay)
    assert {rate for key, rate in rates.items() if key.startswith("decoders.")} == {5e-4}


def learning_rates(model: PoseConfig, optimizer: Any) -> dict[str, float]:
    with torch.device("meta"):
        pose = PoseModel(model, {"coco": 17})
    groups = layer_decay_groups(pose, optimizer.lr, optimizer.weight_decay, optimizer.layer_decay)
    return {name: group["lr"] for group in groups for name in group["names"]}


def test_the_main_row_starts_from_imagenet_and_is_otherwise_vitpose_b() -> None:
    main, own = load("vitpose_b_imagenet"), load("vitpose_b")
    assert main.stages["finetune"].inputs.init == "imagenet" and "mae" not in main.stages
    imported = main.stages["imagenet"]
    assert (imported.kind, imported.source) == ("import", "weights/mae_pretrain_vit_base.pth")
    assert imported.model.backbone.image_size == (224, 224)
    exclude = {"inputs"}
    assert main.stages["finetune"].model_dump(exclude=exclude) == own.stages["finetune"].model_dump(exclude=exclude)


@pytest.mark.parametrize("name", CHAINS)
def test_the_two_students_differ_in_what_teaches_them_alone(name: str) -> None:
    stages = load(name).stages
    alone, distilled = stages["student_alone"], stages["distill"]
    same = {"inputs", "distillation", "description"}
    assert alone.model_dump(exclude=same) == distilled.model_dump(exclude=same)
    assert (alone.inputs.shards, alone.inputs.init) == (distilled.inputs.shards, distilled.inputs.init)
    assert (alone.distillation.output, alone.distillation.token) == (False, False)
    assert (distilled.distillation.output, distilled.distillation.token) == (True, True)
    assert stages["token"].inputs.teacher == distilled.inputs.teacher == "finetune"
    assert stages["finetune"].model.backbone.width == 1024 and distilled.model.backbone.width == 768


@pytest.mark.parametrize("name", [name for name in CHAINS if name != "vitpose_l_to_b"])
def test_chains_on_several_datasets_use_the_papers_batch_and_rate(name: str) -> None:
    stages = load(name).stages
    for stage in (stages["finetune"], stages["student_alone"], stages["distill"]):
        assert (stage.global_batch_size, stage.optimizer.lr) == (1024, 1e-3)


@pytest.mark.parametrize("name", REAL)
def test_every_split_that_is_evaluated_is_kept_out_of_training(name: str) -> None:
    stages = load(name).stages
    evaluated = stages["evaluate"].datasets
    for stage in stages.values():
        if stage.kind == "shards":
            trained = {(source.name, source.split) for source in stage.datasets}
            assert stage.exclude == evaluated
            assert not trained & {(source.name, source.split) for source in evaluated}


@pytest.mark.parametrize("name", REAL)
def test_sources_are_splits_that_their_definitions_have(name: str) -> None:
    for stage in load(name).stages.values():
        for source in getattr(stage, "sources", list)():
            assert source.split in load_definition(source.name).splits


NAMED_TWINS = {
    "table7_coco_aic": "vitpose_b_imagenet",
    "whole_image": "whole_image_coco_mpii",
    "every_skeleton": "every_skeleton_coco_mpii",
}


@pytest.mark.parametrize("name", WITH_AIC)
def test_every_preset_with_ai_challenger_has_a_twin_without(name: str) -> None:
    twin = NAMED_TWINS.get(name) or without_aic(name)
    assert twin is not None and twin not in WITH_AIC
    one, other = load(name).stages, load(twin).stages
    assert one.keys() == other.keys()
    for key, stage in one.items():
        for field in ("datasets", "exclude"):
            if isinstance(found := getattr(stage, field, None), list) and stage.kind != "import":
                assert getattr(other[key], field) == [source for source in found if source.name != "aic"]
        assert stage.references() == other[key].references()
        if hasattr(stage, "model"):
            assert stage.model == other[key].model


def test_rows_name_the_twins_that_names_do_not_tell() -> None:
    rows = [row for table in load_rows().tables.values() for row in table.rows.values()]
    with_aic = {row.preset: row.without_aic or without_aic(row.preset) for row in rows if row.preset in WITH_AIC}
    assert all(with_aic.values()), with_aic
    assert with_aic["table7_coco_aic"] == NAMED_TWINS["table7_coco_aic"]


@pytest.mark.parametrize("size", SIZES)
def test_presets_of_a_size_differ_in_data_and_in_where_they_start_alone(size: str) -> None:
    own = load(f"vitpose_{size}").stages["finetune"]
    for data in ("", "_coco_aic_mpii", "_coco_mpii"):
        for start in ("mae", "imagenet"):
            stages = load(f"vitpose_{size}{data}{'_imagenet' if start == 'imagenet' else ''}").stages
            stage = stages["finetune"]
            assert stage.inputs.init == start
            assert (stage.model, stage.schedule, stage.augmentation) == (own.model, own.schedule, own.augmentation)
            assert (stage.global_batch_size, stage.optimizer.lr) == ((1024, 1e-3) if data else (512, 5e-4))
            assert stage.optimizer.model_dump(exclude={"lr"}) == own.optimizer.model_dump(exclude={"lr"})
            assert stages[start].model.backbone.width == stage.model.backbone.width
            assert stage.weights is None, "datasets are mixed in natural proportion"


ABLATIONS = {  # keys of the main row that an ablation changes
    "table2_vitpose_b_simple": {"model.decoder.kind"},
    "table4_384x288": {"model.backbone.image_size"},
    "table5_full": {"model.backbone.feature_ratio", "model.backbone.patch_padding", "model.decoder.deconv_layers"},
    "table6_frozen_attention": {"freeze"},
    "table6_frozen_ffn": {"freeze"},
}
WINDOWS = {
    "table5_window": ((8, 8), False, False, 0),
    "table5_window_shift": ((8, 8), True, False, 0),
    "table5_window_pool": ((8, 8), False, True, 0),
    "table5_window_shift_pool": ((8, 8), True, True, 0),
    "table5_full_window": ((8, 8), False, False, 4),
    "table5_window_shift_pool_16x12": ((16, 12), True, True, 0),
}


@pytest.mark.parametrize(("name", "keys"), ABLATIONS.items())
def test_an_ablation_differs_from_the_main_row_in_what_it_is_about(name: str, keys: set[str]) -> None:
    main, own = (dict(flat(load(one).stages["finetune"].model_dump())) for one in ("vitpose_b_imagenet", name))
    assert {key for key in main.keys() | own.keys() if main.get(key) != own.get(key)} == keys


@pytest.mark.parametrize(("name", "expected"), WINDOWS.items())
def test_table_5_varies_attention_alone_and_keeps_the_heatmap(name: str, expected: tuple[Any, ...]) -> None:
    stage, full = load(name).stages["finetune"], load("table5_full").stages["finetune"]
    attention = stage.model.backbone.attention
    assert (attention.window, attention.shift, attention.pool, attention.global_blocks) == expected
    assert not attention.relative_positions and stage.model.heatmap_size == (64, 48)
    main, own = dict(flat(full.model_dump())), dict(flat(stage.model_dump()))
    assert {key for key in own if main.get(key) != own[key]} <= {
        f"model.backbone.attention.{key}" for key in ("window", "shift", "pool", "global_blocks")
    }


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for key, item in value.items() for pair in flat(item, f"{prefix}.{key}" if prefix else key)]


@pytest.mark.parametrize("size", SIZES[:-1])
def test_experts_are_a_quarter_of_the_width(size: str) -> None:
    stages = load(f"vitpose_plus_{size}").stages
    backbone = stages["finetune"].model.backbone
    assert backbone.expert_width == backbone.width // 4
    assert [one.name for one in stages["shards"].datasets] == ["coco", "aic", "mpii", "ap10k", "apt36k", "wholebody"]
    assert stages["finetune"].optimizer.layer_decay == {"b": 0.75}.get(size, 0.8)


def test_whole_images_are_for_pretraining_only() -> None:
    for name in ("whole_image", "whole_image_coco_mpii"):
        stages = load(name).stages
        assert stages["images"].crop.mode == "image" and stages["shards"].crop.mode == "person"
        readers = {key for key, stage in stages.items() if "images" in stage.references().values()}
        assert readers == {"mae", "mae_student"}
        assert stages["images"].datasets == stages["shards"].datasets
