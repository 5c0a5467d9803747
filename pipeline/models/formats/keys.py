"""Names of tensors in others' files and ours, as data, and the account of where each tensor went."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from pipeline.errors import ArtifactError

_MOST_FAULTS = 5


@dataclass(frozen=True)
class KeyMap:
    """Pairs of (our name, their name). A name stands for itself and all below it; a `*` for a number, the same in both.

    The first pair that fits is taken, so that a name that comes later can be an older spelling.
    """

    pairs: tuple[tuple[str, str], ...]

    def to_ours(self, name: str) -> str | None:
        """Our name of a tensor of theirs, or None."""
        return _translate(name, [(theirs, ours) for ours, theirs in self.pairs])

    def to_theirs(self, name: str) -> str | None:
        """Their name of a tensor of ours, or None."""
        return _translate(name, self.pairs)


def _translate(name: str, pairs: Sequence[tuple[str, str]]) -> str | None:
    for source, target in pairs:
        pattern = re.escape(source).replace(r"\*", r"(\d+)") + r"(\..+)?"
        if match := re.fullmatch(pattern, name):
            *numbers, rest = match.groups()
            for number in numbers:
                target = target.replace("*", number, 1)
            return target + (rest or "")
    return None


@dataclass
class Intake:
    """A file's tensors on their way into a model: each is renamed, dropped for a reason that is told, or an error."""

    where: str
    """The file, for messages."""
    keys: KeyMap
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By our names."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Their names of what stays behind, with the reason."""
    changes: list[str] = field(default_factory=list)
    """What was done to values, for people."""
    surplus: list[str] = field(default_factory=list)
    """Their names of what nobody knows."""
    origin: dict[str, str] = field(default_factory=dict)
    """Their names of what came in, by our first ones; a file may have older spellings."""
    moved: dict[str, str] = field(default_factory=dict)
    """Prefixes of ours that were renamed, the new one first."""

    @classmethod
    def of(
        cls, where: str, state: Mapping[str, Tensor], keys: KeyMap, drops: Sequence[tuple[str, str]] = ()
    ) -> "Intake":
        """Renames what `keys` knows. `drops` are pairs of a name, which may have a `*`, and a reason; they come first."""
        intake = cls(where, keys)
        for name, tensor in state.items():
            reason = next((reason for dropped, reason in drops if _translate(name, [(dropped, "")]) is not None), None)
            ours = keys.to_ours(name)
            if reason is not None:
                intake.dropped[name] = reason
            elif ours is None:
                intake.surplus.append(name)
            elif ours in intake.tensors:
                raise ArtifactError(f"{where}: {name} is there twice, once under an older name")
            else:
                intake.tensors[ours] = tensor
                intake.origin[ours] = name
        return intake

    def theirs(self, ours: str) -> str:
        """How the file calls a tensor."""
        for final, prefix in reversed(self.moved.items()):
            if ours.startswith(f"{final}."):
                ours = prefix + ours.removeprefix(final)
        return self.origin.get(ours) or self.keys.to_theirs(ours) or ours

    def take(self, ours: str) -> Tensor:
        """A tensor that has to be there. Raises ArtifactError."""
        if ours not in self.tensors:
            raise ArtifactError(f"{self.where}: missing {self.theirs(ours)}{self._unknown()}")
        return self.tensors[ours]

    def drop(self, prefix: str, reason: str) -> None:
        """Leaves behind a tensor of ours, or all below it."""
        for name in [name for name in self.tensors if name == prefix or name.startswith(f"{prefix}.")]:
            del self.tensors[name]
            self.dropped[self.theirs(name)] = reason

    def move(self, prefix: str, final: str) -> None:
        """Renames all that lies below a prefix of ours; messages go on calling it as the file does."""
        self.moved[final] = prefix
        for name in [name for name in self.tensors if name.startswith(f"{prefix}.")]:
            self.tensors[final + name.removeprefix(prefix)] = self.tensors.pop(name)

    def numbers(self, prefix: str) -> list[int]:
        """The numbers that follow a prefix in our names: blocks, layers, heads."""
        found = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in self.tensors)
        return sorted({int(match.group(1)) for match in found if match})

    def require(self, module: nn.Module, ignored: tuple[str, ...] = ()) -> None:
        """Checks that names and shapes are those of a module, which may lie on the meta device.

        `ignored` are beginnings of names of the module that the file need not have. Raises ArtifactError that names the
        first tensors that are missing, surplus or of another shape, as the file calls them.
        """
        expected = {
            name: tuple(value.shape) for name, value in module.state_dict().items() if not name.startswith(ignored)
        }
        faults = [f"missing {self.theirs(name)}" for name in expected.keys() - self.tensors.keys()]
        faults += [f"surplus {self.theirs(name)}" for name in self.tensors.keys() - expected.keys()]
        faults += [f"surplus {name}" for name in self.surplus]
        faults += [
            f"{self.theirs(name)} {tuple(value.shape)} instead of {expected[name]}"
            for name, value in self.tensors.items()
            if name in expected and tuple(value.shape) != expected[name]
        ]
        if faults:
            listed = "; ".join(sorted(faults)[:_MOST_FAULTS])
            raise ArtifactError(f"{self.where}: not the described model: {listed} ({len(faults)} in all)")

    def _unknown(self) -> str:
        """The first names that nobody knows: the file is probably of another architecture."""
        return f"; it has {', '.join(sorted(self.surplus)[:2])}" if self.surplus else ""
