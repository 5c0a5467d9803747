"""A pose model: one shared backbone and a decoder for each dataset (ViTPose, section 3.3)."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.backbones import make_backbone
from pipeline.models.config import PoseConfig
from pipeline.models.decoders import make_decoder
from pipeline.models.vit import count

_TAKEN = frozenset(dir(nn.ModuleDict()))
Heatmaps = dict[str, tuple[Tensor, Tensor]]
"""By dataset: rows (b,) int64 of a batch, and their heatmaps (b, K, h, w)."""


class PoseModel(nn.Module):
    """Images to heatmaps by dataset.

    `keypoints` gives K for each dataset, and its order is the order in which decoders run. `knowledge_token` is a
    buffer (1, T, C) that the state dict keeps, zero until somebody copies a fitted token in, or None; `learn_token`
    makes it a parameter. Weights are torch's defaults until `init_weights` or `load_state_dict`. With `expert_width` the
    backbone has an expert for each dataset, too (ViTPose+), and features depend on whose they are. Raises ConfigError for
    a dataset name that can't be a module's name, for K < 1 and for no dataset at all.
    """

    knowledge_token: Tensor | None

    def __init__(self, config: PoseConfig, keypoints: Mapping[str, int]) -> None:
        super().__init__()
        _check_datasets(keypoints)
        self.config = config
        width = config.backbone.width
        self.backbone = make_backbone(config.backbone, list(keypoints))
        upsampling = config.backbone.upsampling
        self.decoders = nn.ModuleDict(
            {name: make_decoder(width, k, config.decoder, upsampling) for name, k in keypoints.items()}
        )
        token = torch.zeros(1, config.knowledge_tokens, width) if config.knowledge_tokens else None
        self.register_buffer("knowledge_token", token)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter and buffer in place, from torch's global generator."""
        self.backbone.init_weights()
        for decoder in self.decoders.values():
            decoder.init_weights()
        if self.knowledge_token is not None:
            self.knowledge_token.zero_()

    def learn_token(self) -> None:
        """Makes the knowledge token, with the value that it has, a parameter; the state dict's names stay the same."""
        token = self.knowledge_token
        assert token is not None, "the model has no knowledge token"
        del self.knowledge_token
        self.knowledge_token = nn.Parameter(token.detach().clone())

    def features(self, images: Tensor, tokens: Tensor | None = None, owners: Tensor | str | None = None) -> Tensor:
        """Features (B, C, Hp, Wp); `tokens` (1 or B, T, C) are appended after the model's own knowledge token.

        owners: whose the images are, for a model with experts; others ignore it. A dataset's name, or (B,) int64
        numbers of decoders, on the CPU.
        """
        own = self.knowledge_token
        if own is not None and tokens is not None:
            tokens = torch.cat([own.to(tokens).expand(tokens.shape[0], -1, -1), tokens], dim=1)
        if not self.backbone.experts:
            owners = None
        elif isinstance(owners, str):
            owners = torch.full((len(images),), self.backbone.experts.index(owners))
        return self.backbone(images, own if tokens is None else tokens, owners)

    def forward(
        self, images: Tensor, datasets: Sequence[str] | None = None, tokens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) to heatmaps (B, K, h, w) of each of `datasets`, or of all decoders.

        Every decoder that runs sees the whole batch, in the order of the decoders. A model with experts runs its
        backbone once for each of the datasets. Raises ConfigError for a dataset without a decoder, DataError for another
        image size.
        """
        self._require(datasets or ())
        wanted = {name: each for name, each in self.decoders.items() if datasets is None or name in datasets}
        if self.backbone.experts:
            return {name: decoder(self.features(images, tokens, name)) for name, decoder in wanted.items()}
        features = self.features(images, tokens)
        return {name: decoder(features) for name, decoder in wanted.items()}

    def forward_rows(self, images: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each dataset's decoder on its own rows (b,) int64 of the images, for a teacher: (b, K, h, w) by dataset.

        Nothing keeps ranks in step here, so not for a model that is being trained. Raises ConfigError for a dataset
        without a decoder.
        """
        self._require(list(rows))
        if self.backbone.experts:
            return {name: self(images.index_select(0, own), [name])[name] for name, own in rows.items()}
        features = self.features(images)
        return {name: self.decoders[name](features.index_select(0, own)) for name, own in rows.items()}

    def forward_mixed(
        self, images: Tensor, dataset_index: Tensor, names: Sequence[str | None], tokens: Tensor | None = None
    ) -> tuple[Heatmaps, Tensor]:
        """Each decoder on the samples of its own dataset only, so that batch norm never mixes datasets.

        Sample b, of images (B, 3, H, W), belongs to dataset `names[dataset_index[b]]`, or where that is None to no
        decoder: people without keypoints. Returns the heatmaps of each dataset in this batch; and a scalar `zero`, which
        the caller adds to the loss. A decoder without samples runs on one feature in eval mode and feeds only `zero`: all
        decoders run on all ranks in the same order, since ZeRO's collectives follow the parameters, and a missing one
        hangs or aborts them. Its batch norm buffers don't move and its gradients are exactly zero.

        Keep `dataset_index` on the CPU: finding the rows there does not wait for the GPU. Raises ConfigError for a
        name without a decoder.
        """
        own = self._own_samples(dataset_index, names)
        owners = torch.stack(list(own.values())).int().argmax(dim=0) if self.backbone.experts else None
        return self._decode(self.features(images, tokens, owners), own)

    def forward_everywhere(
        self, images: Tensor, dataset_index: Tensor, names: Sequence[str | None], everywhere: Collection[str]
    ) -> tuple[Heatmaps, Heatmaps, Tensor]:
        """`forward_mixed`, and the decoders of `everywhere` on all other samples as well; not for a model with experts.

        Returns heatmaps of each decoder's own samples, then of the others, then `zero`. On samples of other datasets a
        decoder runs in eval mode, which gradients pass: they are normalised by the running statistics of its own
        dataset, as they would be at test time, and do not move them. Each decoder so runs twice on every rank.
        """
        self._require(everywhere)
        own = self._own_samples(dataset_index, names)
        features = self.features(images)
        found, zero = self._decode(features, own)
        others = {name: ~mask for name, mask in own.items() if name in everywhere}
        elsewhere, more = self._decode(features, others, evaluate=True)
        return found, elsewhere, zero + more

    def _own_samples(self, dataset_index: Tensor, names: Sequence[str | None]) -> dict[str, Tensor]:
        """For each decoder, in their order, which samples (B,) bool are of its dataset."""
        self._require([name for name in names if name is not None])
        assert ((dataset_index >= 0) & (dataset_index < len(names))).all(), "a sample belongs to no dataset"
        index = {name: position for position, name in enumerate(names)}
        return {name: dataset_index == index.get(name, -1) for name in self.decoders}

    def _decode(
        self, features: Tensor, chosen: Mapping[str, Tensor], evaluate: bool = False
    ) -> tuple[Heatmaps, Tensor]:
        """Each decoder on the samples (B,) bool chosen for it, without any on one feature; see `forward_mixed`."""
        found: Heatmaps = {}
        zero = torch.zeros((), device=features.device)
        for name, mask in chosen.items():
            decoder = self.decoders[name]
            rows = torch.nonzero(mask).flatten().to(features.device)
            with _evaluating(decoder) if evaluate or not len(rows) else nullcontext():
                if len(rows):
                    # Rows are unique: the backward adds once to each, in an order that does not matter.
                    found[name] = rows, decoder(features.index_select(0, rows))
                else:
                    zero = zero + decoder(features[:1]).sum(dtype=torch.float32) * 0.0
        return found, zero

    def _require(self, datasets: Collection[str]) -> None:
        for name in datasets:
            if name not in self.decoders:
                raise ConfigError(f"dataset {name!r} has no decoder in this model; it has {', '.join(self.decoders)}")


def describe(config: PoseConfig, keypoints: Mapping[str, int]) -> dict[str, int]:
    """Numbers of parameters: `backbone`, `decoders.<dataset>` each, and `total`, without allocating the model."""
    with torch.device("meta"):
        model = PoseModel(config, keypoints)
    decoders = {f"decoders.{name}": count(decoder) for name, decoder in model.decoders.items()}
    return {"backbone": count(model.backbone), **decoders, "total": count(model)}


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; each submodule's own mode again afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def _check_datasets(keypoints: Mapping[str, int]) -> None:
    if not keypoints:
        raise ConfigError("a pose model needs at least one dataset; name one under `datasets`")
    for name, k in keypoints.items():
        if not name or "." in name or name in _TAKEN:
            raise ConfigError(
                f"dataset name {name!r} can't name a decoder: it is empty, has a dot or is reserved; rename it"
            )
        if k < 1:
            raise ConfigError(f"dataset {name!r} has {k} keypoints; a decoder needs at least 1")
