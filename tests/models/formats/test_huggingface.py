"""Against the transformers library: the same numbers from the same weights, in both directions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
)

from pipeline.errors import ArtifactError, ConfigError
from pipeline.files import read_json, write_json
from pipeline.models.config import MAEConfig, PoseConfig
from pipeline.models.formats import huggingface
from pipeline.models.formats.experts import join_expert
from pipeline.models.formats.files import read_checkpoint
from pipeline.models.formats.keys import Intake
from pipeline.models.formats.pose import Wanted, choose_heads, finish, fold_positions
from pipeline.models.loading import MAESpec
from pipeline.models.mae import MAE
from tests.models.formats.models import (
    CLASSIC,
    SIMPLE,
    built,
    heatmap_error,
    images,
    keypoint_error,
    outgoing_of,
    randomise,
    same,
    spec_of,
)


def theirs(simple: bool, experts: int = 1, **changes: Any) -> VitPoseForPoseEstimation:
    """Their model with random tensors, batch norm and the class token's slot included."""
    backbone = VitPoseBackboneConfig(
        image_size=[64, 48],
        patch_size=[16, 16],
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=experts,
        part_features=12,
        **{"layer_norm_eps": 1e-6, "out_indices": [3], **changes},
    )
    config = VitPoseConfig(backbone_config=backbone, use_simple_decoder=simple, num_labels=17)
    return randomise(VitPoseForPoseEstimation(config))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def heatmaps(model: VitPoseForPoseEstimation, pictures: Tensor, index: int = 0) -> Tensor:
    return model(pictures, dataset_index=torch.full((len(pictures),), index)).heatmaps


@pytest.mark.parametrize("simple", [False, True])
def test_a_plain_model_gives_their_heatmaps(tmp_path: Path, simple: bool) -> None:
    model = theirs(simple)
    found = huggingface.read(saved(model, tmp_path / "hf"), Wanted())
    expected = heatmaps(model, images())
    ours = built(found)(images())["coco"]
    assert found.spec.config.backbone.heads == 4 and not found.dropped
    assert heatmap_error(ours, expected) < 1e-5
    assert keypoint_error(ours, expected, found.spec.codec) < 0.01


@pytest.mark.parametrize("simple", [False, True])
def test_each_expert_becomes_a_plain_model_with_their_heatmaps(tmp_path: Path, simple: bool) -> None:
    """Their files hold COCO's decoder only, which every expert is seen through here."""
    model = theirs(simple, experts=6)
    folder = saved(model, tmp_path / "hf")
    different = []
    for index in range(6):
        intake = Intake.of("hf", read_checkpoint(folder / "model.safetensors"), huggingface.VITPOSE)
        fold_positions(intake)
        huggingface._fuse(intake, "backbone.blocks")
        join_expert(intake, index)
        found = finish(intake, choose_heads(intake, ()), Wanted(heads=4))
        expected, ours = heatmaps(model, images(), index), built(found)(images())["coco"]
        assert heatmap_error(ours, expected) < 1e-5
        assert keypoint_error(ours, expected, found.spec.codec) < 0.01
        different.append(ours)
    assert heatmap_error(different[0], different[5]) > 0.01, "the experts make a difference"


def test_a_file_with_experts_is_split_for_the_one_dataset_that_is_named(tmp_path: Path) -> None:
    model = theirs(simple=False, experts=6)
    folder = saved(model, tmp_path / "hf")
    with pytest.raises(
        ConfigError, match="has experts, a backbone a dataset; name one \(--dataset\) of coco, aic, mpii"
    ):
        huggingface.read(folder, Wanted())
    found = huggingface.read(folder, Wanted(datasets=("coco",)))
    assert heatmap_error(built(found)(images())["coco"], heatmaps(model, images())) < 1e-5
    left = {name for name in found.dropped if "experts" in name}
    assert len(left) == 3 * 5 * 2 and not any(".experts.0." in name for name in left)
    with pytest.raises(ConfigError, match="its only decoder is coco's, and 'aic' was asked for"):
        huggingface.read(folder, Wanted(datasets=("aic",)))


def mae(**changes: Any) -> ViTMAEForPreTraining:
    config = ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
        **{"image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6, "norm_pix_loss": True, **changes},
    )
    return randomise(ViTMAEForPreTraining(config))


@pytest.mark.parametrize("norm_pixels", [True, False])
@torch.no_grad()
def test_an_autoencoder_has_their_loss_with_the_same_mask(tmp_path: Path, norm_pixels: bool) -> None:
    model = mae(norm_pix_loss=norm_pixels)
    found = huggingface.read(saved(model, tmp_path / "hf"), Wanted())
    assert isinstance(found.spec, MAESpec) and not found.spec.encoder_only and not found.dropped
    ours = MAE(found.spec.config)
    ours.load_state_dict(found.tensors)
    pictures, noise = images(size=(64, 64)), torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    loss, said = ours.eval()(pictures, noise)
    expected = model(pictures, noise=noise)
    kept = expected.mask.bool()
    assert torch.equal(kept.nonzero()[:, 1].view(3, -1), said["masked"].sort(dim=1).values)
    error = abs(float(loss / expected.loss) - 1)
    print(f"loss error {error:.1e}")
    assert error < 1e-5
    rows = said["masked"].sort(dim=1).indices.unsqueeze(-1).expand_as(said["predictions"])
    assert heatmap_error(said["predictions"].gather(1, rows).flatten(0, 1), expected.logits[kept]) < 1e-5


def test_the_published_spelling_of_an_autoencoders_decoder_is_read(tmp_path: Path) -> None:
    """transformers 5 writes `decoder_encoder.layer`; what lies on the hub says `decoder_layers`."""
    folder = saved(mae(), tmp_path / "hf")
    first = huggingface.read(folder, Wanted())
    state = load_file(folder / "model.safetensors")
    assert any("decoder_encoder.layer." in name for name in state)
    renamed = {name.replace("decoder_encoder.layer.", "decoder_layers."): value for name, value in state.items()}
    save_file(renamed, folder / "model.safetensors")
    assert same(huggingface.read(folder, Wanted()).tensors, first.tensors)


def test_patches_of_14_are_padded_and_lose_their_decoder(tmp_path: Path) -> None:
    folder = saved(mae(patch_size=14, image_size=56), tmp_path / "hf")
    found = huggingface.read(folder, Wanted())
    assert found.spec.encoder_only and found.spec.config.backbone.image_size == (64, 64)
    assert found.tensors["patch_embed.proj.weight"].shape == (48, 3, 16, 16)
    assert found.dropped and all(name.startswith("decoder.") for name in found.dropped)


EXPORTED = [(CLASSIC, ("coco",)), (SIMPLE, ("coco",)), (CLASSIC, ("coco", "mpii"))]


@pytest.mark.parametrize(("decoder", "datasets"), EXPORTED)
@torch.no_grad()
def test_an_exported_model_is_theirs_and_comes_back_bit_for_bit(
    tmp_path: Path, decoder: dict[str, Any], datasets: tuple[str, ...]
) -> None:
    outgoing, model = outgoing_of(spec_of(decoder, datasets), dataset=datasets[-1])
    huggingface.write(outgoing, tmp_path)
    loaded, said = VitPoseForPoseEstimation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.backbone_config.layer_norm_eps == 1e-6
    assert loaded.config.id2label[0] == outgoing.spec.datasets[datasets[-1]].keypoints[0]
    ours = model(images())[datasets[-1]]
    assert heatmap_error(ours, loaded.eval()(images()).heatmaps) < 1e-5
    back = huggingface.read(tmp_path, Wanted(datasets=datasets[-1:]))
    kept = {
        name: value for name, value in model.state_dict().items() if not name.startswith(f"decoders.{datasets[0]}.")
    }
    assert same(back.tensors, kept if len(datasets) > 1 else model.state_dict())
    assert back.spec.config.backbone == outgoing.spec.config.backbone.model_copy(update={"size": None})


def test_their_processor_reads_the_preprocessing(tmp_path: Path) -> None:
    huggingface.write(outgoing_of(spec_of(CLASSIC))[0], tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    picture = torch.randint(0, 255, (3, 100, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = processor(picture, boxes=[[[10.0, 10.0, 40.0, 60.0]]], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 48)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"decoder": CLASSIC, "tokens": 1}, r"model\.knowledge_tokens is 1; huggingface has room for none"),
    ({"decoder": CLASSIC, "patch_padding": 0}, r"model\.backbone\.patch_padding is 0; huggingface has 2"),
    ({"decoder": {"filters": 64}}, r"model\.decoder has 2 deconv_layers of 64 filters; huggingface has 2 of 256"),
    ({"decoder": {"deconv_layers": 1}}, r"model\.decoder has 1 deconv_layers of 256 filters"),
    ({"decoder": CLASSIC, "mlp_width": 100}, r"model\.backbone\.mlp_width 100 is no multiple of width 48"),
    ({"decoder": CLASSIC, "datasets": ("coco", "aic")}, "takes one decoder; name one \(--dataset\) of coco, aic"),
]


@pytest.mark.parametrize(("described", "message"), REFUSED)
def test_what_their_class_can_not_hold_is_refused_by_name(
    tmp_path: Path, described: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        huggingface.write(outgoing_of(spec_of(**described))[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_setting_that_came_later_is_refused_unless_it_is_off(tmp_path: Path) -> None:
    class Later(PoseConfig):
        window: int = 0

    outgoing, _ = outgoing_of(spec_of(CLASSIC))
    for window in (0, 8):
        config = Later.model_validate({**outgoing.spec.config.model_dump(), "window": window})
        object.__setattr__(outgoing, "spec", outgoing.spec.model_copy(update={"config": config}))
        if window:
            with pytest.raises(ConfigError, match=r"model\.window is 8; huggingface has no such setting"):
                huggingface.write(outgoing, tmp_path)
        else:
            huggingface.write(outgoing, tmp_path)
    other = outgoing.spec.config.model_copy(update={"backbone": outgoing.spec.config.decoder})
    object.__setattr__(outgoing, "spec", outgoing.spec.model_copy(update={"config": other}))
    with pytest.raises(ConfigError, match=r"model\.backbone is no vision transformer; huggingface has nothing else"):
        huggingface.write(outgoing, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder."""
    target = tmp_path_factory.mktemp("hf")
    huggingface.write(outgoing_of(spec_of(CLASSIC))[0], target)
    return target


def copied(folder: Path, target: Path, changes: dict[str, Any] | None = None, **backbone: Any) -> Path:
    """The folder with keys of its config changed."""
    target.mkdir()
    config = {**read_json(folder / "config.json"), **(changes or {})}
    config["backbone_config"] = {**config["backbone_config"], **backbone}
    write_json(target / "config.json", config)
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


CONFIGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"model_type": "vit"}, {}, "model_type is 'vit', expected vitpose or vit_mae"),
    ({"scale_factor": 2}, {}, "scale_factor is 2"),
    ({}, {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, models here have 1e-06"),
    ({}, {"hidden_act": "relu"}, "hidden_act is 'relu', models here have 'gelu'"),
    (
        {},
        {"image_size": [64, 64]},
        r"position_embeddings holds the positions of 12 patches; an input of 64x64",
    ),
    ({}, {"num_attention_heads": 5}, "width 48 is not divisible by heads 5"),
    ({}, {"image_size": "large"}, "image_size is 'large', expected two whole numbers"),
    ({}, {"num_attention_heads": [4]}, "num_attention_heads is .4., expected a whole number"),
]


@pytest.mark.parametrize(("changes", "backbone", "message"), CONFIGS)
def test_a_config_that_does_not_fit_is_named(
    tmp_path: Path, folder: Path, changes: dict[str, Any], backbone: dict[str, Any], message: str
) -> None:
    with pytest.raises((ArtifactError, ConfigError), match=message) as caught:
        huggingface.read(copied(folder, tmp_path / "hf", changes, **backbone), Wanted())
    assert "\n" not in str(caught.value)


def test_the_default_epsilon_of_the_published_folders_is_taken_for_the_trained_one(
    tmp_path: Path, folder: Path
) -> None:
    found = huggingface.read(copied(folder, tmp_path / "hf", layer_norm_eps=1e-12), Wanted())
    assert any("1e-12 is written, 1e-06 taken" in line for line in found.changes)


def test_a_model_that_is_described_otherwise_is_refused(folder: Path) -> None:
    """Heads and the shape of the picture are in no tensor: the file's own config is compared."""
    described = spec_of(CLASSIC).config.model_dump()
    for key, value, message in (
        ("heads", 6, "says 4 where model.backbone.heads is 6"),
        ("image_size", (48, 64), "says"),
    ):
        model = PoseConfig.model_validate({**described, "backbone": {**described["backbone"], key: value}})
        with pytest.raises(ConfigError, match=message):
            huggingface.read(folder, Wanted(model=model))
    with pytest.raises(ConfigError, match="holds a pose model with a ViT; describe it"):
        huggingface.read(folder, Wanted(model=MAEConfig.model_validate({"backbone": {"size": "micro"}})))


def test_files_that_are_none_are_refused(tmp_path: Path, folder: Path) -> None:
    for name, content, message in (
        ("config.json", b"{", "config.json: refused"),
        ("config.json", b"[]", "no mapping"),
        ("model.safetensors", b"no", "model.safetensors: refused"),
    ):
        broken = copied(folder, tmp_path / str(len(list(tmp_path.iterdir()))))
        (broken / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            huggingface.read(broken, Wanted())
    (broken / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        huggingface.read(broken, Wanted())


def test_pickled_weights_are_read_like_the_others(tmp_path: Path, folder: Path) -> None:
    old = copied(folder, tmp_path / "hf")
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    assert same(huggingface.read(old, Wanted()).tensors, huggingface.read(folder, Wanted()).tensors)
