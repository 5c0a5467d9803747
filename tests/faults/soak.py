"""Kills a stage again and again and reports what that costs: `make soak`.

A campaign: schedules of kills at random steps, places and ranks, each over the same short run, which must end with the
weights, moments, buffers and losses of the run that nothing happened to. Then a long run that is killed many times in a
row: how much of the time was productive, how many steps a kill loses, how long until the next new step.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chain.running import TINY, only_run, succeeded, vitruvian
from tests.faults.injection import PLACES
from tests.faults.ranks import Ranks
from tests.faults.running import Stage

STEPS, SAVE_EVERY, EVALUATE_EVERY = 40, 5, 10
_OVERRIDES = (
    "runtime.micro_batch_size=4",
    "runtime.workers=0",
    f"stages.finetune.save_every={SAVE_EVERY}",
    f"stages.finetune.evaluation.every={EVALUATE_EVERY}",
)


@dataclass
class Endurance:
    """What many kills in a row cost."""

    kills: int = 0
    seconds: float = 0.0
    productive: float = 0.0
    lost: list[int] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)


def main() -> int:
    """Runs both, prints the report and returns 1 where a schedule ended differently."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--schedules", type=int, default=50, help="schedules of kills (default: 50)")
    found.add_argument("--kills", type=int, default=200, help="kills in a row (default: 200)")
    found.add_argument("--seed", type=int, default=0, help="of the schedules")
    options = found.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, Ranks(Path(folder)) as ranks:
        workspace = Path(folder) / "workspace"
        succeeded(vitruvian("run", str(TINY), "--until", "mae", f"workspace={workspace}", "tracking.uri=null"))
        different = _campaign(Stage("finetune", workspace, ranks, (*_OVERRIDES, _steps(STEPS))), options)
        if options.kills:
            _report(_endure(Stage("finetune", workspace, ranks, _OVERRIDES), options))
    return int(different > 0)


def _steps(count: int) -> str:
    return f"stages.finetune.steps={count}"


def _campaign(stage: Stage, options: argparse.Namespace) -> int:
    """Returns how many schedules ended with something else than the clean run."""
    clean = stage.finish()
    different, kills = 0, 0
    for number in range(options.schedules):
        stage.forget()
        schedule = _schedule(random.Random(f"{options.seed}/{number}"))
        done = [stage.run(2, fault=fault) for fault in schedule]
        hit = sum(-9 in outcome.codes for outcome in done)
        equal = stage.finish() == clean
        kills, different = kills + hit, different + (not equal)
        where = ", ".join(f"{fault['at']} {fault['step']} rank {fault['rank']}" for fault in schedule)
        print(f"schedule {number + 1:3d}: {hit} kills ({where}): {'equal' if equal else 'DIFFERENT'}", flush=True)
    stage.forget()
    print(f"{options.schedules} schedules, {kills} kills: {different} ended differently from the clean run", flush=True)
    return different


def _schedule(rng: random.Random) -> list[dict[str, Any]]:
    """One to four kills; those of saves and evaluations at steps where there is one."""
    faults = []
    for _ in range(rng.randint(1, 4)):
        place = rng.choice([*PLACES, "step", "accumulation"])
        every = EVALUATE_EVERY if place == "evaluation" else SAVE_EVERY if place.startswith("save") else 1
        step = rng.randint(0, STEPS // every - 1) * every or every
        # What rank 0 alone does can only kill rank 0.
        alone = place in ("save-manifest", "save-rename", "save-prune")
        faults.append({"do": "kill", "at": place, "step": step, "rank": 0 if alone else rng.randint(0, 1)})
    return faults


def _endure(stage: Stage, options: argparse.Namespace) -> Endurance:
    """Kills one run after 1 to 12 new steps, over and over."""
    rng = random.Random(options.seed)
    found = Endurance()
    length = _steps(13 * options.kills)
    began = time.time()
    saved = 0
    for _ in range(options.kills):
        at = saved + rng.randint(1, 12)
        launched = time.time()
        outcome = stage.run(2, length, fault={"do": "kill", "at": "step", "step": at, "rank": rng.randint(0, 1)})
        assert -9 in outcome.codes, outcome.log[-3000:]
        lines = [json.loads(line) for line in (stage.run_dir / "metrics.jsonl").read_text().splitlines()]
        times = {line["step"]: line["time"] / 1000 for line in lines if line["event"] == "train"}
        found.recovery.append(times[saved + 1] - launched)
        now = json.loads((stage.run_dir / "status.json").read_text()).get("saved_step", 0)
        # The first step of a launch counts to recovery.
        found.productive += sum(times[step] - times[step - 1] for step in range(saved + 2, now + 1))
        found.lost.append(at - now)
        saved = now
    found.kills, found.seconds = options.kills, time.time() - began
    shutil.rmtree(only_run(stage.workspace, stage.name))
    return found


def _report(found: Endurance) -> None:
    print(f"{found.kills} kills in a row in {found.seconds:.0f} s, one every {found.seconds / found.kills:.1f} s")
    print(f"  productive                  {found.productive / found.seconds:.1%} of the time")
    print(
        f"  lost steps a kill           {statistics.mean(found.lost):.1f} (at most {max(found.lost)}, saved every {SAVE_EVERY})"
    )
    print(
        f"  seconds to the next new step {statistics.median(found.recovery):.1f} "
        f"(median; {min(found.recovery):.1f} to {max(found.recovery):.1f})"
    )


if __name__ == "__main__":
    sys.exit(main())
