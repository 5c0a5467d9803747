"""ViTAE's branch against a hand-made forward, and with what changes a batch norm's statistics."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.backbones import count_parameters
from pipeline.models.parallel_convolution import ParallelBlock
from pipeline.models.vit import ViT
from pipeline.models.vit_config import ViTConfig

SMALL = {"size": "micro", "image_size": (64, 48)}


def build(**values: object) -> ViT:
    torch.manual_seed(0)
    model = ViT(ViTConfig.model_validate({**SMALL, "parallel_convolution": True, **values}))
    model.init_weights()
    for block in model.blocks:
        nn.init.normal_(block.convolution.reduce.weight, std=0.1)
    return model


def test_a_block_adds_the_branch_on_its_input_to_the_attention() -> None:
    block = build().eval().blocks[1]
    assert isinstance(block, ParallelBlock)
    nn.init.normal_(block.convolution.norm.running_mean)
    tokens = torch.randn(2, 12 + 1, 32)
    picture = tokens[:, :12].transpose(1, 2).reshape(2, 32, 4, 3)
    branch, norm = block.convolution, block.convolution.norm
    hidden = F.conv2d(picture, branch.expand.weight, branch.expand.bias, padding=1, groups=8)
    scaled = (hidden - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + norm.eps).sqrt()
    found = F.conv2d(F.silu(scaled), branch.reduce.weight, branch.reduce.bias, padding=1, groups=8)
    beside = torch.cat([found.flatten(2).transpose(1, 2), torch.zeros(2, 1, 32)], dim=1)
    y = tokens + block.attn(block.norm1(tokens)) + beside
    torch.testing.assert_close(block(tokens), y + block.mlp(block.norm2(y)))


def test_a_fresh_branch_leaves_a_plain_backbone_as_it_is() -> None:
    torch.manual_seed(0)
    plain = ViT(ViTConfig.model_validate(SMALL))
    plain.init_weights()
    model = ViT(ViTConfig.model_validate({**SMALL, "parallel_convolution": True}))
    model.init_weights()
    found = model.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= model.state_dict().keys() - plain.state_dict().keys()
    images = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(model(images), plain(images))


def test_gradient_checkpointing_moves_the_statistics_once() -> None:
    results = []
    for checkpointing in (False, True):
        model = build(drop_path=0.5, depth=3, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(3)
        out = model(torch.randn(4, 3, 64, 48, generator=torch.Generator().manual_seed(1)))
        out.square().sum().backward()
        results.append([out.detach(), *(each.grad for each in model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert {int(block.convolution.samples_seen) for block in model.blocks} == {4}
    assert {int(block.convolution.norm.num_batches_tracked) for block in model.blocks} == {1}


def test_the_published_644_million_of_h_come_from_this_form() -> None:
    """Without the 1.3M of an ImageNet classifier, which that figure and the 632M of a plain H include."""
    found = {value: count_parameters(ViTConfig(size="H", parallel_convolution=value)) for value in (False, True)}
    # Weights of 9 x 4 x 4 and 9 x 16, two biases of 4 and 1, a norm of 2 x 4: times the width.
    assert found[True] - found[False] == 32 * 301 * 1280
    assert round((found[True] + 1280 * 1000 + 1000) / 1e6, 1) == pytest.approx(644, abs=0.6)
    assert count_parameters(ViTConfig(size="1B", parallel_convolution=True)) == pytest.approx(1.0283e9, rel=1e-4)
