"""A pose model on its way into somebody else's format."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from torch import Tensor

from pipeline.data.definitions import DatasetDefinition
from pipeline.errors import ConfigError
from pipeline.models.formats.keys import KeyMap
from pipeline.models.formats.pose import PADDING
from pipeline.models.loading import PoseSpec
from pipeline.models.vit_config import ViTConfig

_PLAIN: Mapping[str, frozenset[str]] = {
    "model": frozenset({"backbone", "decoder", "knowledge_tokens"}),
    "model.backbone": frozenset(
        {"size", "image_size", "patch_size", "width", "depth", "heads", "mlp_width", "patch_padding"}
    )
    | {"drop_path", "gradient_checkpointing", "positions"},  # of training only
    "model.decoder": frozenset({"kind", "deconv_layers", "filters"}),
}
"""The settings that every format knows, or that make no difference to a finished model."""


@dataclass(frozen=True)
class Outgoing:
    """What is exported."""

    spec: PoseSpec
    tensors: Mapping[str, Tensor]
    """By the names of a `PoseModel`."""
    where: str
    """The artifact, for messages."""
    dataset: str | None = None
    """Whose decoder is wanted."""

    def one_dataset(self, format: str) -> tuple[str, DatasetDefinition]:
        """The dataset of the one decoder that the format takes. Raises ConfigError where it is not clear which."""
        names = list(self.spec.datasets)
        chosen = self.dataset or (names[0] if len(names) == 1 else None)
        if chosen is None:
            raise ConfigError(f"{self.where}: {format} takes one decoder; name one (--dataset) of {', '.join(names)}")
        if chosen not in names:
            raise ConfigError(f"{self.where}: no decoder for dataset {chosen!r}; it has {', '.join(names)}")
        return chosen, self.spec.datasets[chosen]

    def require_no_experts(self, format: str) -> None:
        """Raises ConfigError for ViTPose+'s experts, which must know each image's dataset."""
        if self.spec.config.backbone.expert_width:
            raise ConfigError(
                f"{self.where}: has an expert a dataset, and {format} takes plain models; take one out with "
                "`vitruvian split` and export that"
            )

    def require_plain(self, format: str, tokens: int) -> None:
        """Raises ConfigError that names the first setting that a format of plain ViTs can't express.

        Settings are known by name: one that came later counts as impossible unless it has its default.
        """
        config = self.spec.config
        if not isinstance(config.backbone, ViTConfig):
            raise ConfigError(f"{self.where}: model.backbone is no vision transformer; {format} has nothing else")
        self.require_no_experts(format)
        sections: dict[str, BaseModel] = {
            "model": config,
            "model.backbone": config.backbone,
            "model.decoder": config.decoder,
        }
        for section, content in sections.items():
            for name, field in type(content).model_fields.items():
                value = getattr(content, name)
                if name not in _PLAIN[section] and value != field.get_default(call_default_factory=True):
                    raise ConfigError(f"{self.where}: {section}.{name} is {value!r}; {format} has no such setting")
        if config.backbone.patch_padding != PADDING:
            raise ConfigError(
                f"{self.where}: model.backbone.patch_padding is {config.backbone.patch_padding}; {format} has {PADDING}"
            )
        if config.knowledge_tokens > tokens:
            raise ConfigError(
                f"{self.where}: model.knowledge_tokens is {config.knowledge_tokens}; {format} has room for {tokens or 'none'}"
            )

    def rename(self, keys: KeyMap, dataset: str) -> dict[str, Tensor]:
        """The tensors of the backbone and of one decoder by their names. Raises ConfigError for one without a place."""
        state: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if name.startswith("decoders."):
                _, owner, rest = name.split(".", 2)
                if owner != dataset:
                    continue
                theirs = keys.to_theirs(f"heads.0.{rest}")
            else:
                theirs = keys.to_theirs(name)
            if theirs is None:
                raise ConfigError(f"{self.where}: the format has no place for {name}")
            state[theirs] = tensor.detach().cpu().contiguous()
        return state
