"""Masked autoencoder (He et al., CVPR 2022), on rectangles, with the arithmetic of the public facebookresearch/mae.

Differences that don't change the numbers: patches are gathered before they are embedded, and the decoder works on the
shuffled order (visible patches first), since a transformer without its position embeddings knows no order. So nothing
is unshuffled, predictions of the masked patches are a slice, and no gather or scatter has a backward pass.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.errors import ArtifactError
from pipeline.models.blocks import layer_norm, make_blocks, run_blocks
from pipeline.models.config import MAEConfig
from pipeline.models.vit import PatchEmbed, check_images, count, sincos_positions


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) to patches (B, N, p * p * C), row by row, channel last inside a patch."""
    b, c, h, w = images.shape
    cut = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, N, p * p * C) to (B, C, H, W) for a grid of (rows, columns)."""
    b, rows, columns = patches.shape[0], *grid
    cut = patches.reshape(b, rows, columns, patch, patch, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * patch, columns * patch)


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, n) of each sample of (B, N, D), as (B, n, D); N rows shared by all samples may come as (1, N, D)."""
    batch, per_sample, depth = tensor.shape
    flat = rows.flatten() if batch == 1 else _flat_rows(rows, per_sample)
    return tensor.reshape(-1, depth).index_select(0, flat).reshape(*rows.shape, depth)


def _flat_rows(rows: Tensor, per_sample: int) -> Tensor:
    """Rows (B, n) of each sample as rows (B * n,) of all samples laid end to end."""
    starts = torch.arange(len(rows), device=rows.device) * per_sample
    return (rows + starts.unsqueeze(1)).flatten()


class MAE(nn.Module):
    """Encoder and decoder. Parameter names are those of the public MAE, so its checkpoints load by name.

    The fixed positions are buffers that the state dict keeps, under the names that the public code uses.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        vit, width = config.backbone, config.decoder_width
        self.patch_embed = PatchEmbed(vit)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, vit.width))
        self.register_buffer("pos_embed", torch.zeros(1, 1 + vit.patches, vit.width))
        self.blocks = make_blocks(vit.width, vit.depth, vit.heads, vit.mlp_width)
        self.norm = layer_norm(vit.width)
        self.decoder_embed = nn.Linear(vit.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", torch.zeros(1, 1 + vit.patches, width))
        self.decoder_blocks = make_blocks(width, config.decoder_depth, config.decoder_heads, 4 * width)
        self.decoder_norm = layer_norm(width)
        self.decoder_pred = nn.Linear(width, vit.patch_size**2 * 3)
        self._fill_positions()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise parameters and buffers in place as the public MAE: Xavier uniform for linear maps and, seen as
        one, the patch convolution; normal(0.02) for class and mask token."""
        self._fill_positions()
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.patch_embed.proj.reset_parameters()
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))

    def forward(self, images: Tensor, noise: Tensor, weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mask, encode, decode, compare.

        Normalised images (B, 3, H, W); noise (B, N): the patches with the smallest values stay visible. Returns the
        scalar loss, sum(weight * sample's mean over its masked patches) / B, with weight (B,) of ones if None; and
        what the decoder said: `predictions` (B, M, p * p * 3) of the masked patches and `masked` (B, M), which patches
        these are. Raises DataError for another image size.
        """
        check_images(images, self.config.backbone.image_size)
        assert noise.shape == (len(images), self.config.backbone.patches), f"noise has shape {tuple(noise.shape)}"
        patches = patchify(images, self.config.backbone.patch_size)
        order = torch.argsort(noise, dim=1, stable=True)
        visible, masked = order[:, : self.config.visible], order[:, self.config.visible :]
        predictions = self._decode(self._encode(take_rows(patches, visible), visible), order)
        target, _, _ = self._normalise(take_rows(patches, masked))
        per_sample = (predictions.float() - target.float()).square().mean(dim=(1, 2))
        loss = (per_sample if weight is None else per_sample * weight).sum() / len(images)
        return loss, {"predictions": predictions, "masked": masked}

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> Tensor:
        """The picture (B, 3, H, W), in the units of `images`: visible patches as they are, masked ones as predicted,
        with the patch's own mean and deviation put back. Call it on all ranks under ZeRO-3."""
        _, said = self(images, noise)
        patches = patchify(images, self.config.backbone.patch_size)
        _, mean, deviation = self._normalise(take_rows(patches, said["masked"]))
        painted = said["predictions"].to(patches) * deviation + mean
        rows = _flat_rows(said["masked"], patches.shape[1])
        whole = patches.flatten(0, 1).index_copy(0, rows, painted.flatten(0, 1)).reshape(patches.shape)
        return unpatchify(whole, self.config.backbone.patch_size, self.config.backbone.grid)

    def masked(self, images: Tensor, noise: Tensor) -> Tensor:
        """What the encoder sees (B, 3, H, W): masked patches are zero, the mean colour."""
        keep = noise.argsort(dim=1).argsort(dim=1) < self.config.visible
        patches = patchify(images, self.config.backbone.patch_size) * keep.unsqueeze(-1)
        return unpatchify(patches, self.config.backbone.patch_size, self.config.backbone.grid)

    def _encode(self, patches: Tensor, rows: Tensor) -> Tensor:
        """Visible patches (B, n, p * p * 3), with their places (B, n), to tokens (B, 1 + n, C), class token first."""
        tokens = self.patch_embed.proj(patches) + take_rows(self.pos_embed[:, 1:], rows)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        return self.norm(run_blocks(self.blocks, tokens, self.config.backbone.gradient_checkpointing))

    def _decode(self, encoded: Tensor, order: Tensor) -> Tensor:
        """Encoded tokens (B, 1 + n, C) and the shuffled places (B, N) to predictions (B, N - n, p * p * 3)."""
        tokens = self.decoder_embed(encoded)
        hidden = self.mask_token.expand(len(tokens), self.config.backbone.patches + 1 - tokens.shape[1], -1)
        places = take_rows(self.decoder_pos_embed[:, 1:], order)
        first = self.decoder_pos_embed[:, :1].expand(len(tokens), -1, -1)
        tokens = torch.cat([tokens, hidden], dim=1) + torch.cat([first, places], dim=1)
        tokens = run_blocks(self.decoder_blocks, tokens, self.config.backbone.gradient_checkpointing)
        return self.decoder_pred(self.decoder_norm(tokens[:, 1 + self.config.visible :]))

    def _normalise(self, patches: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Targets (B, M, D), and what undoes them: mean and deviation (B, M, 1); 0 and 1 for raw pixels."""
        if not self.config.norm_pixels:
            return patches, 0.0, 1.0
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        deviation = (variance + 1e-6).sqrt()
        return (patches - mean) / deviation, mean, deviation

    def _fill_positions(self) -> None:
        vit = self.config.backbone
        for buffer in (self.pos_embed, self.decoder_pos_embed):
            if not buffer.is_meta:
                buffer.copy_(sincos_positions(buffer.shape[-1], vit.grid))


def backbone_state(state: Mapping[str, Tensor], keep_norm: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """An MAE's state dict (ours or the public one, with or without its decoder) as that of a `ViT`.

    Returns the ViT's tensors and the names that were left behind on purpose, sorted: the class token, the decoder, and
    `norm.*` unless `keep_norm`, which becomes `last_norm.*` (ViTPose's public loader drops it, so its last norm starts
    fresh; without it the result has no `last_norm.*`). The class token's position is folded into the others as
    ViTPose adds it; MAE's fixed one is zero. Another grid: `interpolate_positions`. Raises ArtifactError for a name
    that no MAE has, or without positions.
    """
    taken: dict[str, Tensor] = {}
    dropped: list[str] = []
    for name, tensor in state.items():
        if name == "pos_embed":
            taken[name] = tensor[:, 1:] + tensor[:, :1]
        elif name.startswith(("patch_embed.proj.", "blocks.")):
            taken[name] = tensor
        elif name.startswith("norm.") and keep_norm:
            taken[f"last_{name}"] = tensor
        elif name.startswith(("decoder_", "norm.")) or name in ("cls_token", "mask_token"):
            dropped.append(name)
        else:
            raise ArtifactError(f"{name!r} is no tensor of an MAE; give the state dict of a masked autoencoder")
    if "pos_embed" not in taken:
        raise ArtifactError("this state dict has no pos_embed; give the state dict of a masked autoencoder")
    return taken, sorted(dropped)


def describe(config: MAEConfig) -> dict[str, int]:
    """Numbers of parameters: `encoder`, `decoder` and `total`, without allocating the model."""
    with torch.device("meta"):
        model = MAE(config)
    decoder = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("decoder_", "mask_token")))
    return {"encoder": count(model) - decoder, "decoder": decoder, "total": count(model)}
