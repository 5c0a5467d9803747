"""ViTPose+'s MLP, of which a part belongs to each dataset, and the way from and to a plain one (ViTPose++, section 3.3).

The last `expert_width` of a block's output channels come from a linear layer of the sample's own dataset, the others
from a shared one. There is no router: the dataset is known. Names in the state dict are those of the public files, with
datasets instead of numbers: `mlp.fc1`, `mlp.fc2` and `mlp.experts.<dataset>`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.errors import ArtifactError, ConfigError

_FC2 = re.compile(r"(?P<mlp>blocks\.\d+\.mlp)\.fc2\.(?P<kind>weight|bias)")
_EXPERT = re.compile(r"(?P<mlp>blocks\.\d+\.mlp)\.experts\.(?P<name>[^.]+)\.(?P<kind>weight|bias)")

Sizes = tuple[int, ...]
"""How many samples of a sorted batch each expert has, in the experts' order; zeros included."""


class ExpertMlp(nn.Module):
    """fc1, GELU, and a second layer in two parts: shared channels, then the dataset's own."""

    def __init__(self, width: int, mlp_width: int, expert_width: int, datasets: Sequence[str]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(mlp_width, width - expert_width)
        self.experts = nn.ModuleDict({name: nn.Linear(mlp_width, expert_width) for name in datasets})

    def forward(self, tokens: Tensor, sizes: Sizes) -> Tensor:
        """Tokens (B, N, C), sorted by expert, to (B, N, C).

        An expert without samples multiplies an empty batch: it costs nothing, its gradient is zero, and it takes part in
        the graph all the same, which ZeRO's collectives need on every rank.
        """
        hidden = self.act(self.fc1(tokens))
        own = [expert(part) for expert, part in zip(self.experts.values(), hidden.split(sizes), strict=True)]
        return torch.cat([self.fc2(hidden), torch.cat(own)], dim=-1)


class ExpertBlock(Block):
    """A block of a vision transformer that hands its MLP the samples' experts."""

    mlp: ExpertMlp

    def forward(self, x: Tensor, sizes: Sizes) -> Tensor:
        """Tokens (B, N, C), sorted by expert, to the same."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), sizes)))


@dataclass(frozen=True)
class Sorting:
    """A batch in the order of its experts, and back. Within an expert the batch's own order stays."""

    sizes: Sizes
    order: Tensor | None
    """(B,) int64: where in the batch each sorted sample lies; None where the batch is sorted as it is."""

    @classmethod
    def of(cls, owners: Tensor, experts: int, device: torch.device) -> "Sorting":
        """owners: (B,) int64, each sample's expert by number; on the CPU, or this waits for the device."""
        sizes = tuple(torch.bincount(owners, minlength=experts).tolist())
        ascending = bool((owners[1:] >= owners[:-1]).all())
        return cls(sizes, None if ascending else owners.argsort(stable=True).to(device))

    def sort(self, batch: Tensor) -> Tensor:
        """(B, ...) by expert."""
        return batch if self.order is None else batch.index_select(0, self.order)

    def unsort(self, batch: Tensor) -> Tensor:
        """(B, ...) as it came."""
        return batch if self.order is None else batch.index_select(0, self.order.argsort())


def grow_experts(state: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A backbone's state dict as that of one with experts; `target` is the state dict it shall fit.

    From a plain one every expert gets the last rows of fc2, weight and bias, and the shared part the first ones, as in
    ViTPose's released loader, so that the new model computes what the old one did. From one with experts, those of the
    target's datasets are taken. Raises ConfigError if it lacks one of these.
    """
    names = list(dict.fromkeys(match["name"] for match in map(_EXPERT.fullmatch, target) if match))
    own = list(dict.fromkeys(match["name"] for match in map(_EXPERT.fullmatch, state) if match))
    if lacking := [name for name in names if own and name not in own]:
        raise ConfigError(
            f"{source}: has no expert for {lacking[0]!r} (it has {', '.join(own)}); take one of them out of it with "
            "`vitruvian split` and start from that"
        )
    if own:
        return {name: value for name, value in state.items() if not _of_another(name, names)}
    grown = dict(state)
    for name, value in state.items():
        match = _FC2.fullmatch(name)
        if match is not None and name in target:
            shared = len(target[name])
            grown[name] = value[:shared]
            grown |= {f"{match['mlp']}.experts.{dataset}.{match['kind']}": value[shared:] for dataset in names}
    return grown


def merge_expert(state: Mapping[str, Tensor], expert: str, source: str) -> dict[str, Tensor]:
    """The state dict of a backbone with experts as the plain one's that this expert makes: fc2's rows, then its own.

    Without experts it comes back as it is. Raises ArtifactError if a block lacks that expert, or has one that does not fit.
    """
    if not any(map(_EXPERT.fullmatch, state)):
        return dict(state)
    plain = {name: value for name, value in state.items() if not _EXPERT.fullmatch(name)}
    for name, shared in plain.items():
        if match := _FC2.fullmatch(name):
            other = f"{match['mlp']}.experts.{expert}.{match['kind']}"
            own = state.get(other)
            if own is None:
                raise ArtifactError(f"{source}: missing {other}; the tensors are not those of one model")
            if own.shape[1:] != shared.shape[1:]:
                raise ArtifactError(
                    f"{source}: {other} {tuple(own.shape)} does not continue {name} {tuple(shared.shape)}"
                )
            plain[name] = torch.cat([shared, own])
    return plain


def _of_another(name: str, datasets: Sequence[str]) -> bool:
    match = _EXPERT.fullmatch(name)
    return match is not None and match["name"] not in datasets
