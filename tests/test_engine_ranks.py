"""Two real processes over gloo."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.chain.running import ROOT, environment


def _run(zero_stage: int, program: str = "tests.engine_program") -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", program, str(zero_stage)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_ranks_with_disjoint_datasets_train_alike_under_every_zero_stage() -> None:
    found = {zero_stage: _run(zero_stage) for zero_stage in (1, 2, 3)}
    for zero_stage, result in found.items():
        assert result["losses"][-1] < result["losses"][0], zero_stage
        assert result["losses"] == pytest.approx(found[1]["losses"], rel=1e-5)
        # A decoder's statistics come from the rank that saw its dataset, not from half-averages with one that did not.
        assert result["running_means"] == pytest.approx(found[1]["running_means"], rel=1e-4)
        assert min(result["running_means"].values()) > 0
        # An expert learns on the rank that saw its dataset; one that nobody saw takes part and stays as it was.
        assert result["experts"] == pytest.approx(found[1]["experts"], rel=1e-4)
        assert result["experts"]["coco"] > 0 < result["experts"]["mpii"] and result["experts"]["aic"] == 0


@pytest.mark.slow
def test_every_skeleton_and_a_learned_token_train_and_resume_alike_under_every_zero_stage() -> None:
    """One rank sees labelled crops only, the other none: decoders still run alike, and the token is a parameter."""
    found = {zero_stage: _run(zero_stage, "tests.distillation_program") for zero_stage in (1, 2, 3)}
    for zero_stage, result in found.items():
        assert result["losses"][-1] < result["losses"][0], zero_stage
        assert result["losses"] == pytest.approx(found[1]["losses"], rel=1e-5)
        assert result["again"] == pytest.approx(result["losses"][3:], rel=1e-6), zero_stage
        assert result["moved"] > 1e-4 and result["moments"] > 0, zero_stage
        assert 0 < result["taught_coco"] < 1 and 0 < result["taught_mpii"] < 1, zero_stage
