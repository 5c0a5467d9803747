"""What a user installs: a wheel that works outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.chain.running import ROOT, environment


def test_a_wheel_runs_the_demo_dry_outside_the_checkout(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("vitruvian-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "configs/pipelines/demo.yaml" in names and "configs/datasets/coco.yaml" in names
        assert "configs/pipelines/paper/table5_window.yaml" in names and "configs/rows.yaml" in names
        assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(site), str(wheel)]
    assert subprocess.run(install, capture_output=True, timeout=240, cwd=tmp_path).returncode == 0
    program = (
        f"import pipeline; assert pipeline.__file__.startswith({str(site)!r}); "
        "import sys; sys.argv = ['vitruvian', 'run', 'demo', '--dry-run']; from launchers.cli import main; main()"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=elsewhere,
        env=environment() | {"PYTHONPATH": str(site) + os.pathsep},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if " finetune " in line]
    assert any("3,600" in row for row in rows), "the steps of the preset, in the table of models"
