import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from pipeline.models.config import DecoderConfig, heatmap_size
from pipeline.models.decoders import ClassicDecoder, SimpleDecoder, make_decoder
from pipeline.models.vit import count


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, (64, 48)), ({"deconv_layers": 3, "filters": 8}, (128, 96)), ({"kind": "simple"}, (64, 48))],
)
def test_heatmaps_have_the_announced_size(values: dict, expected: tuple[int, int]) -> None:
    config = DecoderConfig.model_validate(values)
    decoder = make_decoder(16, 5, config)
    assert decoder(torch.randn(2, 16, 16, 12)).shape == (2, 5, *expected)
    assert heatmap_size((16, 12), config) == expected


@pytest.mark.parametrize(
    ("kind", "channels", "millions"),
    [("classic", 384, 2.63), ("classic", 768, 4.20), ("classic", 1280, 6.30), ("simple", 768, 0.118)],
)
def test_decoders_have_the_published_number_of_parameters(kind: str, channels: int, millions: float) -> None:
    with torch.device("meta"):
        decoder = make_decoder(channels, 17, DecoderConfig(kind=kind))
    assert count(decoder) / 1e6 == pytest.approx(millions, abs=0.006)


def test_the_classic_decoder_has_the_names_of_public_checkpoints() -> None:
    names = set(ClassicDecoder(8, 3, DecoderConfig(filters=4)).state_dict())
    norms = {f"deconv_layers.{i}.{n}" for i in (1, 4) for n in ("weight", "bias", "running_mean", "running_var")}
    tracked = {f"deconv_layers.{i}.num_batches_tracked" for i in (1, 4)}
    convolutions = {"deconv_layers.0.weight", "deconv_layers.3.weight", "final_layer.weight", "final_layer.bias"}
    assert names == norms | tracked | convolutions


def test_the_simple_decoder_clips_before_it_upsamples() -> None:
    decoder = SimpleDecoder(3, 2, DecoderConfig(kind="simple"))
    decoder.init_weights()
    features = torch.randn(2, 3, 4, 3)
    clipped = F.interpolate(features.clamp(min=0), size=(16, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(features), F.conv2d(clipped, *decoder.final_layer.parameters(), padding=1))


def test_decoders_start_small_with_fresh_batch_norm() -> None:
    decoder = ClassicDecoder(64, 17, DecoderConfig())
    decoder(torch.randn(2, 64, 4, 3))
    decoder.init_weights()
    assert decoder.deconv_layers[0].weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert decoder.final_layer.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not decoder.final_layer.bias.any() and not decoder.samples_seen.any()
    norm = decoder.deconv_layers[1]
    assert not norm.running_mean.any() and (norm.running_var == 1).all() and norm.num_batches_tracked == 0


def test_only_training_samples_are_counted_and_the_count_is_not_saved() -> None:
    decoder = ClassicDecoder(4, 2, DecoderConfig(filters=4))
    decoder(torch.randn(3, 4, 2, 2))
    decoder(torch.randn(2, 4, 2, 2))
    decoder.eval()(torch.randn(7, 4, 2, 2))
    assert decoder.samples_seen.item() == 5 and decoder.samples_seen.dtype == torch.int64
    assert "samples_seen" not in decoder.state_dict()


def test_the_simple_decoder_refuses_what_only_the_classic_one_has() -> None:
    with pytest.raises(ValidationError, match="belong to kind 'classic'"):
        DecoderConfig(kind="simple", filters=128)
    assert DecoderConfig.model_validate(DecoderConfig(kind="simple").model_dump()).kind == "simple"
