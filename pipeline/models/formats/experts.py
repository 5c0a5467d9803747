"""ViTPose+: a backbone with a part of each MLP for each dataset, and its way into a plain one."""

from collections.abc import Sequence

import torch

from pipeline.data.definitions import DatasetDefinition, load_definition
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.experts import merge_expert
from pipeline.models.formats.keys import Intake
from pipeline.models.formats.pose import VITPOSE_ORDER, choose_heads

_BACKBONE = "backbone."


def split_experts(intake: Intake, wanted: Sequence[str]) -> list[DatasetDefinition]:
    """The definition of the one dataset that a ViTPose+ file is split for; none for a file without experts.

    In each block `fc2` makes the first C - p channels for all datasets, expert e the last p for dataset e: together they
    are the `fc2` of a plain block, exactly. A file is not read as one model with experts.
    Raises ConfigError unless one dataset of the file is wanted.
    """
    experts = intake.numbers("backbone.blocks.0.mlp.experts")
    if not experts:
        return []
    names = VITPOSE_ORDER[: len(experts)]
    found = _already_split(intake, experts)
    if found is None and len(wanted) != 1:
        raise ConfigError(
            f"{intake.where}: has experts, a backbone a dataset; name one (--dataset) of {', '.join(names)}"
        )
    name = load_definition(wanted[0]).name if wanted else names[found or 0]
    if name not in names:
        raise ConfigError(f"{intake.where}: no expert for dataset {name!r}; the file has {', '.join(names)}")
    if found is None and name != names[0] and len(intake.numbers("heads")) == 1:
        raise ConfigError(f"{intake.where}: its only decoder is {names[0]}'s, and {name!r} was asked for")
    if found is None:
        join_expert(intake, names.index(name))
    elif names[found] != name:
        raise ConfigError(f"{intake.where}: its MLPs were split for dataset {names[found]!r} already, not for {name!r}")
    else:
        _drop_experts(intake, "an expert whose part the MLP holds already, or of another dataset")
    return choose_heads(intake, wanted or [name])


def join_expert(intake: Intake, index: int) -> None:
    """Puts one expert's channels behind the shared ones of each block, and drops the others. Raises ArtifactError."""
    state = {
        name.removeprefix(_BACKBONE): tensor for name, tensor in intake.tensors.items() if name.startswith(_BACKBONE)
    }
    joined = merge_expert(state, str(index), intake.where)
    for name in state:
        if name in joined:
            intake.tensors[_BACKBONE + name] = joined[name]
        elif f".mlp.experts.{index}." in name:
            del intake.tensors[_BACKBONE + name]
    intake.changes.append(f"mlp.fc2 of every block was joined with mlp.experts.{index}")
    _drop_experts(intake, "an expert of another dataset")


def _already_split(intake: Intake, experts: Sequence[int]) -> int | None:
    """The expert that a whole `fc2` ends in: the public tool that splits such files leaves the experts in them."""
    whole = intake.take("backbone.blocks.0.mlp.fc2.weight")
    if whole.shape[0] != intake.take("backbone.blocks.0.mlp.fc1.weight").shape[1]:
        return None
    for index in experts:
        own = intake.take(f"backbone.blocks.0.mlp.experts.{index}.weight")
        if torch.equal(whole[len(whole) - len(own) :], own):
            return index
    raise ArtifactError(f"{intake.where}: backbone.blocks.0.mlp.fc2.weight is whole, but ends in none of the experts")


def _drop_experts(intake: Intake, reason: str) -> None:
    for block in intake.numbers("backbone.blocks"):
        intake.drop(f"backbone.blocks.{block}.mlp.experts", reason)
