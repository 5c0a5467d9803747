import pytest
from pydantic import ValidationError

from pipeline.models.backbones import count_parameters
from pipeline.models.vit_config import SIZES, ViTConfig


@pytest.mark.parametrize(("size", "millions"), [("S", 21.7), ("B", 85.8), ("L", 303.3), ("H", 630.9), ("1B", 1011.0)])
def test_published_sizes_have_their_published_number_of_parameters(size: str, millions: float) -> None:
    config = ViTConfig(size=size, image_size=(256, 192))
    assert count_parameters(config) / 1e6 == pytest.approx(millions, rel=0.001, abs=0.06)


def test_the_small_published_model_has_twelve_heads() -> None:
    assert ViTConfig(size="S").heads == 12


@pytest.mark.parametrize("size", SIZES)
def test_every_preset_is_valid_and_survives_a_round_trip(size: str) -> None:
    config = ViTConfig(size=size)
    assert ViTConfig.model_validate(config.model_dump()) == config
    assert ViTConfig.model_validate_json(config.model_dump_json()) == config


def test_overrides_win_over_the_preset() -> None:
    config = ViTConfig.model_validate({"size": "B", "image_size": [256, 192], "drop_path": 0.3, "depth": 5})
    assert (config.width, config.depth, config.heads, config.mlp_width) == (768, 5, 12, 3072)
    assert config.drop_path == 0.3 and config.grid == (16, 12) and config.patches == 192


def test_another_width_takes_four_times_it_for_the_mlp() -> None:
    assert ViTConfig(size="1B", width=64).mlp_width == 256
    assert ViTConfig(size="1B", width=64, mlp_width=100).mlp_width == 100


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": "XXL"}, "unknown size 'XXL'"),
        ({"width": 64, "depth": 2}, "heads"),
        ({"size": "B", "heads": 7}, "not divisible by heads 7"),
        ({"size": "B", "image_size": (256, 190)}, "image width 190"),
        ({"size": "B", "image_size": (0, 192)}, "image height 0"),
        ({"size": "B", "patch_padding": 8}, "below half of patch_size"),
        ({"size": "B", "droppath": 0.1}, "droppath"),
        ({"size": "B", "drop_path": 1.0}, "drop_path"),
    ],
)
def test_a_wrong_backbone_says_what_is_wrong(values: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ViTConfig.model_validate(values)
