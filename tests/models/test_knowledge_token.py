"""The fixed bridge that carries a knowledge token to another width, and the random token of the controls."""

import pytest
import torch

from pipeline.models.knowledge_token import INITIAL, bridge, control_token


def matrix(channels: int, width: int, seed: int = 0) -> torch.Tensor:
    """The bridge as a matrix (channels, width): it is linear, so unit vectors show it."""
    return bridge(torch.eye(channels, dtype=torch.float64).unsqueeze(0), width, seed)[0]


def test_the_bridge_is_fixed_by_its_seed() -> None:
    token = torch.randn(1, 2, 24)
    torch.manual_seed(1)
    first = bridge(token, 16, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, bridge(token, 16, seed=5))
    assert not torch.allclose(first, bridge(token, 16, seed=6))


def test_the_bridge_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    bridge(torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)), 4, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_a_narrower_student_gets_a_projection_on_orthonormal_directions() -> None:
    projection = matrix(24, 16)
    assert projection.shape == (24, 16)
    torch.testing.assert_close(projection.T @ projection, torch.eye(16, dtype=torch.float64))


def test_a_wider_student_gets_an_orthogonal_embedding_scaled_to_its_width() -> None:
    embedding = matrix(16, 24)
    torch.testing.assert_close(embedding @ embedding.T, torch.eye(16, dtype=torch.float64) * 24 / 16)


@pytest.mark.parametrize("channels", [16, 48])
def test_equal_widths_keep_the_token_as_a_copy(channels: int) -> None:
    token = torch.randn(1, 3, channels)
    carried = bridge(token, channels, seed=0)
    assert torch.equal(carried, token) and carried.data_ptr() != token.data_ptr()


@pytest.mark.parametrize(("channels", "width", "tolerance"), [(64, 256, 1e-4), (1024, 768, 0.02), (256, 64, 0.04)])
def test_a_random_token_keeps_its_root_mean_square(channels: int, width: int, tolerance: float) -> None:
    token = 0.3 * torch.randn(1, 64, channels, generator=torch.Generator().manual_seed(0))
    carried = bridge(token, width, seed=0)
    assert carried.shape == (1, 64, width) and carried.dtype == token.dtype
    assert carried.square().mean().sqrt().item() == pytest.approx(token.square().mean().sqrt().item(), rel=tolerance)


def test_truncation_keeps_the_first_channels_and_the_size() -> None:
    token = torch.randn(1, 2, 24)
    assert torch.equal(bridge(token, 16, seed=0, kind="truncate"), token[..., :16])
    wider = bridge(token, 36, seed=0, kind="truncate")
    torch.testing.assert_close(wider[..., :24], token * 1.5**0.5)
    assert not wider[..., 24:].any()
    torch.testing.assert_close(wider.square().mean(), token.square().mean())


def test_a_control_has_the_number_and_the_size_of_the_fitted_token_and_nothing_else_of_it() -> None:
    fitted = 3.7 * torch.randn(1, 2, 24)
    token = control_token(fitted, 64, seed=5)
    assert token.shape == (1, 2, 64) and token.dtype == fitted.dtype
    torch.testing.assert_close(token.square().mean(), fitted.square().mean())
    rolled = fitted.roll(1, -1)  # the same values elsewhere: the same control
    torch.testing.assert_close(control_token(rolled, 64, seed=5), token)
    assert not torch.allclose(token, control_token(fitted, 64, seed=6))


def test_a_control_without_a_fitted_token_is_one_of_the_initial_size() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    token = control_token(None, 64, seed=0)
    assert token.shape == (1, 1, 64) and token.square().mean().sqrt().item() == pytest.approx(INITIAL)
    assert torch.equal(torch.rand(1), expected), "the global generator is left alone"
