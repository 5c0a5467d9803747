"""Frozen parameters on two ranks: no gradient, no optimizer state, and in every resume point."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chain.running import ROOT, environment


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_frozen_parameters_survive_a_resume_point(zero_stage: int, precision: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "tests.freeze_program", str(zero_stage), precision, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    # 2 blocks x (qkv, proj, norm1: weight and bias; the table of relative positions) and the fixed positions.
    assert found.pop("names") and found.pop("frozen") == 15
    assert found == {key: [] for key in ("moved", "still", "lost", "differing", "moments", "gradients")}
