"""Files in the exact layout of the original ViTPose: one dataset, several, and ViTPose+ with its experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.data.definitions import load_definition
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import PoseConfig
from pipeline.models.formats import shapes, vitpose
from pipeline.models.formats.keys import Intake
from pipeline.models.formats.pose import Imported, Wanted, choose_heads
from pipeline.models.pose import PoseModel
from pipeline.models.vit_config import SIZES
from tests.models.formats.models import CLASSIC, SIMPLE, randomise, same, spec_of

KEYPOINTS = {"coco": 17, "aic": 14, "mpii": 16, "ap10k": 17, "apt36k": 17, "wholebody": 133}
"""Of ViTPose+'s heads, in their order."""
PART = 12


def model_of(datasets: int = 1, decoder: dict[str, Any] = CLASSIC) -> PoseModel:
    names = dict(list(KEYPOINTS.items())[:datasets])
    return randomise(PoseModel(config(decoder), names))


def config(decoder: dict[str, Any]) -> PoseConfig:
    return spec_of(decoder).config


def original(model: PoseModel, experts: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The state dict that the public code would save, and its whole positions (1, 1 + N, C)."""
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}
    heads = list(model.decoders)
    for name, value in model.state_dict().items():
        if name.startswith("decoders."):
            _, dataset, rest = name.split(".", 2)
            index = heads.index(dataset)
            state[f"keypoint_head.{rest}" if not index else f"associate_keypoint_heads.{index - 1}.{rest}"] = value
        else:
            state[name] = value
    positions = torch.randn(1, 13, 48, generator=generator)
    state["backbone.pos_embed"] = positions
    for block in range(2 if experts else 0):
        for part, shape in (("weight", (PART, 192)), ("bias", (PART,))):
            state[f"backbone.blocks.{block}.mlp.fc2.{part}"] = state[f"backbone.blocks.{block}.mlp.fc2.{part}"][:-PART]
            for expert in range(experts):
                value = torch.randn(shape, generator=generator)
                state[f"backbone.blocks.{block}.mlp.experts.{expert}.{part}"] = value
    return state, positions


def read(path: Path, state: dict[str, Any], *datasets: str, **wanted: Any) -> Imported:
    torch.save({"meta": {"epoch": 210, "config": "text"}, "state_dict": state}, path / "vitpose.pth")
    return vitpose.read(path / "vitpose.pth", Wanted(datasets=datasets, **{"heads": 4, **wanted}))


@pytest.mark.parametrize("decoder", [CLASSIC, SIMPLE, {"deconv_layers": 1, "filters": 8}, {"deconv_layers": 3}])
def test_every_tensor_arrives_and_the_class_tokens_position_is_folded(tmp_path: Path, decoder: dict[str, Any]) -> None:
    model = model_of(1, decoder)
    state, positions = original(model)
    found = read(tmp_path, state)
    expected = {**model.state_dict(), "backbone.pos_embed": positions[:, 1:] + positions[:, :1]}
    assert same(found.tensors, expected) and not found.dropped
    assert found.changes == ("backbone.pos_embed: the class token's position was added to all others",)
    assert found.spec.config.decoder == config(decoder).decoder
    assert list(found.spec.datasets) == ["coco"] and found.spec.codec.heatmap_size == config(decoder).heatmap_size


def test_several_decoders_keep_their_datasets(tmp_path: Path) -> None:
    model = model_of(3)
    state, _ = original(model)
    state["backbone.cls_token"] = torch.zeros(1, 1, 48)
    found = read(tmp_path, state)
    assert list(found.spec.keypoints.items()) == [("coco", 17), ("aic", 14), ("mpii", 16)]
    decoders = {name: value for name, value in model.state_dict().items() if name.startswith("decoders.")}
    assert same({name: value for name, value in found.tensors.items() if name in decoders}, decoders)
    assert found.dropped == {"backbone.cls_token": "ViTPose has no use for a class token"}


def test_of_several_decoders_those_that_are_named_are_taken(tmp_path: Path) -> None:
    model = model_of(6)
    found = read(tmp_path, original(model)[0], "mpii", "coco")
    assert list(found.spec.datasets) == ["coco", "mpii"]
    left = {name for name in found.dropped if name.startswith("associate_keypoint_heads.")}
    assert {name.split(".")[1] for name in left} == {"0", "2", "3", "4"} and len(left) == 4 * 14
    assert found.dropped["associate_keypoint_heads.4.final_layer.bias"] == "the decoder of wholebody, not asked for"
    assert "left out associate_keypoint_heads.0" in " ".join(found.report())
    with pytest.raises(ConfigError, match="no decoder for dataset 'crowdpose'; the file has coco, aic, mpii, ap10k"):
        read(tmp_path, original(model)[0], "coco", "crowdpose")


def test_a_tensor_of_a_later_decoder_is_named_as_in_the_file(tmp_path: Path) -> None:
    state, _ = original(model_of(3))
    del state["associate_keypoint_heads.1.deconv_layers.3.weight"]
    with pytest.raises(ArtifactError, match=r"missing associate_keypoint_heads\.1\.deconv_layers\.3\.weight"):
        read(tmp_path, state)


def test_a_single_decoder_is_of_the_dataset_that_is_named(tmp_path: Path) -> None:
    """The public tool that splits a file makes every decoder the first."""
    model = randomise(PoseModel(config(CLASSIC), {"aic": 14}))
    state, _ = original(model)
    assert list(read(tmp_path, state, "aic").spec.datasets) == ["aic"]
    with pytest.raises(
        ArtifactError, match=r"keypoint_head\.final_layer\.weight is of 14 keypoints, dataset 'coco' has 17"
    ):
        read(tmp_path, state)
    with pytest.raises(ConfigError, match="no decoder for dataset 'mpii'; the file has a single decoder"):
        read(tmp_path, state, "aic", "mpii")


def test_a_decoder_without_a_definition_asks_which_to_take() -> None:
    state = {f"keypoint_head.{index}.final_layer.weight": torch.ones(17, 8, 1, 1) for index in range(2)}
    keys = vitpose.KeyMap((("heads.*", "keypoint_head.*"),))
    with pytest.raises(ConfigError, match=r"x\.pth: no dataset definition 'nowhere'.*choose the decoders to take"):
        choose_heads(Intake.of("x.pth", state, keys), (), order=("coco", "nowhere"))
    with pytest.raises(ConfigError, match="decoder 1 is of an unknown dataset"):
        choose_heads(Intake.of("x.pth", state, keys), (), order=("coco",))
    assert choose_heads(Intake.of("x.pth", state, keys), ("coco",), ("coco", "nowhere")) == [load_definition("coco")]


@pytest.mark.parametrize(("dataset", "index"), [("coco", 0), ("aic", 1), ("mpii", 2)])
def test_a_file_with_experts_is_split_for_a_dataset(tmp_path: Path, dataset: str, index: int) -> None:
    state, _ = original(model_of(6), experts=6)
    found = read(tmp_path, state, dataset)
    assert list(found.spec.datasets) == [dataset]
    for block in range(2):
        for part in ("weight", "bias"):
            name = f"backbone.blocks.{block}.mlp.fc2.{part}"
            own = state[f"backbone.blocks.{block}.mlp.experts.{index}.{part}"]
            assert torch.equal(found.tensors[name], torch.cat([state[name], own]))
    head = "keypoint_head" if not index else f"associate_keypoint_heads.{index - 1}"
    assert torch.equal(found.tensors[f"decoders.{dataset}.final_layer.weight"], state[f"{head}.final_layer.weight"])
    experts = [name for name in found.dropped if ".experts." in name]
    assert len(experts) == 5 * 2 * 2 and not any(f".experts.{index}." in name for name in experts)


def test_experts_need_one_dataset_of_theirs(tmp_path: Path) -> None:
    state, _ = original(model_of(6), experts=6)
    for datasets in ((), ("coco", "aic")):
        with pytest.raises(ConfigError, match="name one \(--dataset\) of coco, aic, mpii, ap10k, apt36k, wholebody"):
            read(tmp_path, state, *datasets)
    with pytest.raises(ConfigError, match="no expert for dataset 'crowdpose'"):
        read(tmp_path, state, "crowdpose")


def test_experts_that_splitting_left_behind_are_recognised(tmp_path: Path) -> None:
    """The public tool joins expert and MLP, but removes neither the experts nor, for COCO, the other decoders."""
    state, _ = original(model_of(6), experts=6)
    joined = dict(state)
    for name in [name for name in state if ".mlp.fc2." in name]:
        joined[name] = torch.cat([state[name], state[name.replace("fc2.", "experts.1.")]])
    for datasets in ((), ("aic",)):
        found = read(tmp_path, joined, *datasets)
        assert list(found.spec.datasets) == ["aic"] and len([name for name in found.dropped if "experts" in name]) == 24
        assert same(found.tensors, read(tmp_path, state, "aic").tensors)
    with pytest.raises(ConfigError, match="split for dataset 'aic' already, not for 'mpii'"):
        read(tmp_path, joined, "mpii")
    joined["backbone.blocks.0.mlp.fc2.weight"] = torch.zeros(48, 192)
    with pytest.raises(ArtifactError, match="ends in none of the experts"):
        read(tmp_path, joined, "aic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.blocks.1.norm2.bias": None}, r"missing backbone\.blocks\.1\.norm2\.bias"),
        ({"keypoint_head.deconv_layers.4.running_var": None}, r"missing keypoint_head\.deconv_layers\.4\.running_var"),
        ({"keypoint_head.final_layer.weight": None}, r"missing keypoint_head\.final_layer\.weight"),
        ({"backbone.pos_embed": None}, r"missing backbone\.pos_embed"),
        ({"backbone.layers.0.ln1.weight": torch.ones(48)}, r"surplus backbone\.layers\.0\.ln1\.weight"),
        ({"neck.weight": torch.ones(1)}, r"surplus neck\.weight"),
        ({"backbone.blocks.0.attn.qkv.weight": torch.ones(144, 47)}, r"\(144, 47\) instead of \(144, 48\)"),
        ({"backbone.pos_embed": torch.ones(1, 12, 48)}, "pos_embed holds the positions of 11 patches"),
        ({"backbone.pos_embed": torch.ones(13)}, r"pos_embed has shape \(13,\), expected \(1, N, C\)"),
        ({"backbone.patch_embed.proj.weight": torch.ones(48)}, r"proj\.weight has shape \(48,\), expected"),
        ({"keypoint_head.deconv_layers.0.weight": torch.ones(48, 256, 3, 3)}, r"\(48, 256, 3, 3\) instead of"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state, _ = original(model_of())
    changed = {name: value for name, value in {**state, **change}.items() if value is not None}
    with pytest.raises(ArtifactError, match=r"^vitpose\.pth: .*" + message) as caught:
        read(tmp_path, changed)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_another_architecture_is_named_by_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"missing backbone\.pos_embed; it has conv1\.weight"):
        read(tmp_path, {"conv1.weight": torch.ones(64, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(64, 64, 1, 1)})


def test_the_input_size_has_to_fit_the_positions(tmp_path: Path) -> None:
    state, _ = original(model_of())
    assert read(tmp_path, state, input_size=(32, 96)).spec.config.backbone.grid == (2, 6)
    with pytest.raises(ArtifactError, match=r"12 patches; an input of 256x192 with patches of 16 has 16 x 12"):
        read(tmp_path, state, input_size=(256, 192))
    with pytest.raises(ArtifactError, match=r"an input of 60x48 with patches of 16 has 3\.75 x 3"):
        read(tmp_path, state, input_size=(60, 48))


def test_sizes_and_grids_of_the_published_files_are_told_by_their_shapes() -> None:
    assert SIZES["S"]["heads"] == 12
    for size in SIZES.values():
        assert shapes._heads(size["width"], size["depth"], size["mlp_width"], "x") == size["heads"]
    for count, grid in ((192, (16, 12)), (432, (24, 18)), (972, (36, 27)), (196, (14, 14)), (256, (16, 16))):
        assert shapes._grid(count, 16, None, "x") == grid
    assert shapes._grid(192, 16, (192, 256), "x") == (12, 16)


def test_a_model_that_is_described_is_compared(tmp_path: Path) -> None:
    model = model_of()
    state, _ = original(model)
    described = config(CLASSIC).model_copy(
        update={"backbone": model.config.backbone.model_copy(update={"drop_path": 0.3})}
    )
    assert read(tmp_path, state, heads=None, model=described).spec.config == described
    for key, value, message in (
        ("depth", 3, r"missing backbone\.blocks\.2\.attn"),
        ("patch_padding", 0, "has model.backbone.patch_padding 2, found 0"),
        ("image_size", (64, 64), r"backbone\.pos_embed \(1, 12, 48\) instead of \(1, 16, 48\)"),
    ):
        other = config(CLASSIC).model_copy(update={"backbone": model.config.backbone.model_copy(update={key: value})})
        with pytest.raises((ArtifactError, ConfigError), match=message):
            read(tmp_path, state, heads=None, model=other)
    with pytest.raises(ConfigError, match="has 0 knowledge tokens, found model.knowledge_tokens 1"):
        read(tmp_path, state, heads=None, model=config(CLASSIC).model_copy(update={"knowledge_tokens": 1}))
