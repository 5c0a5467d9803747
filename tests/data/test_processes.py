"""What a stage started ends with it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.chain.running import ROOT
from tests.faults.fixtures import raw_coco

SHARDS = """
import sys
from pathlib import Path
from pipeline.data.augmentation import PoseAugmentation
from pipeline.data.crops import CropConfig
from pipeline.data.definitions import DatasetSource
from pipeline.data.sharding import make_shards

make_shards(
    Path(sys.argv[2]), sys.argv[1], [DatasetSource(name="coco")], [], CropConfig(input_size=(64, 48)), seed=1,
    samples_per_shard=100, max_bad_fraction=0, measured_people=0, augmentation=PoseAugmentation(), output=None, workers=2
)
"""
SYNTHETIC = """
import sys
from pathlib import Path
from pipeline.data.synthetic import SyntheticConfig, generate

generate(Path(sys.argv[2]), SyntheticConfig(coco_train=100_000), seed=1, workers=2)
"""


@pytest.mark.fault(33)
@pytest.mark.parametrize(("stage", "sign"), [(SHARDS, "report-*"), (SYNTHETIC, "coco/train2017/*.jpg")])
def test_a_stage_that_is_killed_leaves_no_process_behind(tmp_path: Path, stage: str, sign: str) -> None:
    root = raw_coco(tmp_path / "raw")
    file = root / "coco" / "annotations" / "person_keypoints_train2017.json"
    content = json.loads(file.read_text())
    people = content["annotations"]
    content["annotations"] = [people[number % len(people)] | {"id": number + 1} for number in range(20_000)]
    file.write_text(json.dumps(content))
    work = tmp_path / "work"
    process = subprocess.Popen([sys.executable, "-c", stage, str(root), str(work)], cwd=ROOT)
    children: list[psutil.Process] = []
    try:
        while not list(work.glob(sign)):
            assert process.poll() is None
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(children, timeout=10)
        assert not left
    finally:
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()
