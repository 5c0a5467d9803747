"""Every training stage under the deepspeed launcher with two ranks: ZeRO 1, 2, 3 in float32 and bf16."""

from pathlib import Path

import pytest

from tests.chain.running import TINY, metrics, only_run, run_stage, succeeded, vitruvian

# A step sees all people, the same every time, so that losses of different steps can be compared.
ALL_PEOPLE = (
    "stages.data.people={coco_train: 8, coco_val: 4, aic_train: 4, aic_val: 2, mpii_train: 4, mpii_val: 2}",
    *(f"stages.{stage}.augmentation={{enabled: false}}" for stage in ("finetune", "token", "student_alone", "distill")),
    "stages.finetune.evaluation=null",
    "stages.finetune.average_decay=null",
    "stages.mae.crop_scale=[0.8, 1.0]",
)
INPUTS = {
    "mae": {"shards": "shards"},
    "finetune": {"shards": "shards", "init": "mae"},
    "token": {"shards": "shards", "teacher": "finetune"},
    "distill": {"shards": "shards", "teacher": "finetune", "token": "token"},
}
MATRIX = [(zero, precision) for precision in ("float32", "bf16") for zero in (1, 2, 3)]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with what the stages read."""
    workspace = tmp_path_factory.mktemp("parents")
    succeeded(vitruvian("run", str(TINY), "--until", "token", f"workspace={workspace}", *ALL_PEOPLE))
    return workspace


@pytest.fixture(scope="module")
def float32_losses() -> dict[str, list[float]]:
    """The first five losses of each stage, by whichever ZeRO stage came first."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("zero, precision", MATRIX)
@pytest.mark.parametrize("stage", INPUTS)
def test_twenty_steps_learn_and_zero_stages_agree(
    parents: Path, float32_losses: dict[str, list[float]], stage: str, zero: int, precision: str, tmp_path: Path
) -> None:
    paths = [
        f"stages.{stage}.inputs.{label}={only_run(parents, parent) / 'artifact'}"
        for label, parent in INPUTS[stage].items()
    ]
    engine = [f"engine.zero_stage={zero}", f"engine.precision={precision}"]
    command = ["--stage", stage, "--config", str(TINY), f"workspace={tmp_path}", *ALL_PEOPLE, *paths, *engine]
    succeeded(run_stage(2, *command))
    losses = [line["loss"] for line in metrics(only_run(tmp_path, stage))]
    assert len(losses) == 20
    assert sum(losses[-3:]) < sum(losses[:3])
    if precision == "float32":
        assert losses[:5] == pytest.approx(float32_losses.setdefault(stage, losses[:5]), rel=1e-5)


def test_a_stage_runs_under_torchrun_and_plain_python(without, tmp_path: Path) -> None:  # noqa: ANN001
    import subprocess
    import sys

    from tests.chain.running import ROOT, environment

    workspace = without("mae")
    arguments = ["launchers/run_stage.py", "--stage", "mae", "--config", str(TINY), f"workspace={workspace}"]
    launchers = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "python": [sys.executable],
    }
    losses = {}
    for name, launcher in launchers.items():
        done = subprocess.run(
            [*launcher, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=240
        )
        succeeded(done)
        run_dir = only_run(workspace, "mae")
        losses[name] = [line["loss"] for line in metrics(run_dir)]
        run_dir.rename(tmp_path / name)
    assert losses["torchrun"] == pytest.approx(losses["python"], rel=1e-4)
