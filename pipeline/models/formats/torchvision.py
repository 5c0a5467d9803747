"""A ResNet-50, -101 or -152 of torchvision as an encoder to start from; timm names its tensors alike."""

from pathlib import Path

import torch

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import EncoderConfig
from pipeline.models.formats.files import read_checkpoint
from pipeline.models.formats.keys import Intake, KeyMap
from pipeline.models.formats.pose import Imported, Wanted
from pipeline.models.formats.shapes import described
from pipeline.models.loading import EncoderSpec
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_config import BOTTLENECKS

_STAGES = ("layer1", "layer2", "layer3", "layer4")
KEYS = KeyMap(tuple((name, name) for name in ("conv1", "bn1", *_STAGES)))
DROPS = (("fc", "the classifier"),)
_COUNTER = "num_batches_tracked"


def read(path: Path, wanted: Wanted) -> Imported:
    """The ResNet in a state dict, without its classifier.

    Files from before torch 0.4.1 do not count batches; the counters become zero, which changes nothing. Raises
    ArtifactError and ConfigError for another network than a ResNet of bottlenecks, or than the one that is wanted.
    """
    intake = Intake.of(path.name, read_checkpoint(path), KEYS, DROPS)
    intake.take("conv1.weight")
    if wanted.heads is not None:
        raise ConfigError(f"{intake.where}: a ResNet has no attention heads; leave out --heads")
    if wanted.model is None:
        size = {} if wanted.input_size is None else {"image_size": wanted.input_size}
        backbone = {"kind": "resnet", "layers": _layers(intake), **size}
        config = described(EncoderConfig, {"backbone": backbone}, intake.where)
    elif isinstance(wanted.model, EncoderConfig):
        config = wanted.model
    else:
        raise ConfigError(f"{intake.where}: holds a ResNet; describe it: model.backbone with kind resnet, nothing else")
    with torch.device("meta"):
        expected = ResNet(config.backbone)
    _add_counters(intake, expected)
    intake.require(expected)
    return Imported(EncoderSpec(config=config), intake.tensors, intake.dropped, tuple(intake.changes))


def _layers(intake: Intake) -> int:
    found = tuple(len(intake.numbers(stage)) for stage in _STAGES)
    for layers, bottlenecks in BOTTLENECKS.items():
        if found == bottlenecks:
            return layers
    known = ", ".join(map(str, BOTTLENECKS))
    raise ArtifactError(f"{intake.where}: stages of {', '.join(map(str, found))} blocks; of ResNets there are {known}")


def _add_counters(intake: Intake, expected: ResNet) -> None:
    counters = [name for name in expected.state_dict() if name.endswith(_COUNTER)]
    if not any(name in intake.tensors for name in counters):
        intake.tensors |= {name: torch.zeros((), dtype=torch.int64) for name in counters}
        intake.changes.append(f"{_COUNTER}: the file has none; zeros stand in their place")
