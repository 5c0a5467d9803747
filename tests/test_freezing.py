"""Frozen parameters on two ranks: no gradient, no optimizer state, and in every resume point."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chain.running import ROOT, environment

# Tensors that are frozen in 2 blocks. attention: weight and bias of qkv, proj and norm1, the table of relative positions;
# and the fixed positions. ffn: weight and bias of fc1, fc2 and norm2; of the patch embedding; and the learned positions.
FROZEN = {"attention": 2 * 7 + 1, "ffn": 2 * 6 + 2 + 1}
CASES = [
    *(("attention", stage, precision) for stage in (0, 1, 2, 3) for precision in ("float32", "bf16")),
    # Nothing that starts the graph is trained here.
    ("ffn", 2, "bf16"),
    ("ffn", 3, "float32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "zero_stage", "precision"), CASES)
def test_frozen_parameters_survive_a_resume_point(part: str, zero_stage: int, precision: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "tests.freeze_program", part, str(zero_stage), precision, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found.pop("names") and found.pop("frozen") == FROZEN[part]
    assert found == {key: [] for key in ("moved", "still", "lost", "differing", "moments", "gradients")}
