"""The miniature: its statistics by hand, its tables against the paper's figures, going on where it stopped, its page."""

import shutil
from pathlib import Path

import pytest

from benchmarks.mini import tables
from benchmarks.mini.execution import execute
from benchmarks.mini.report import REPORT, report
from benchmarks.mini.results import Result, read_result, write_result
from benchmarks.mini.standing import Standing, carry_out, standing
from benchmarks.mini.statistics import compare
from benchmarks.mini.tables import Job, Miniature, fingerprint, in_order, load_miniature
from pipeline import graph
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import TrainingConfig
from tests.benchmarks.fake_results import result, result_of

SMALL = """
seeds: [0, 1]
runs:
  base: {}
  none: {set: [stages.model.inputs.init=null]}
  longer: {like: none, set: [stages.model.steps=7]}
tables:
  3:
    title: pretraining
    paper: MAE
    rows:
      base: {name: MAE, paper: 75.8}
      none: {name: none, paper: null, against: base, claim: below}
  6:
    title: length
    paper: epochs
    rows:
      base: {name: short, paper: 75.0}
      longer: {name: longer, paper: 75.5, against: base}
"""


@pytest.fixture
def small(tmp_path: Path) -> Miniature:
    path = tmp_path / "rows.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return load_miniature(path)


@pytest.fixture(scope="module")
def whole() -> Miniature:
    return load_miniature()


def gaps(*values: float, spread: float = 0.0) -> tuple[list[Result | None], list[Result | None]]:
    """Results whose differences are these, seed by seed."""
    row = [result(40.0 + value, seed=seed, spread=spread) for seed, value in enumerate(values)]
    return [*row], [result(40.0, seed=seed) for seed in range(len(values))]


# Gaps of 1, 2, 3 have the standard deviation 1; Student's 97.5 % quantile with 2 degrees of freedom is 4.302653.
def test_the_interval_is_students_over_the_seeds() -> None:
    found = compare(*gaps(1, 2, 3), "above")
    assert found.gap == pytest.approx(2.0) and found.reach == pytest.approx(4.302653 / 3**0.5, abs=1e-5)
    assert found.interval == pytest.approx((-0.48414, 4.48414), abs=1e-4)
    assert found.verdict == "inconclusive"


@pytest.mark.parametrize(
    ("values", "side", "verdict"),
    [
        ((4, 5, 6), "above", "holds"),
        ((4, 5, 6), "below", "reversed"),
        ((-4, -5, -6), "below", "holds"),
        ((-4, -5, -6), "above", "reversed"),
        ((-1, 0, 2), "below", "inconclusive"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(values: tuple, side: str, verdict: str) -> None:
    assert compare(*gaps(*values), side).verdict == verdict


# Each seed's difference alternates by 0.5 either way over 200 resamples: variance 0.25 * 200 / 199 a seed, a third of
# its root over three seeds, times 1.959964.
def test_the_interval_is_not_narrower_than_the_images_allow() -> None:
    found = compare(*gaps(1, 1, 1, spread=0.5), "above")
    assert found.images == pytest.approx(1.959964 * (3 * 0.25 * 200 / 199) ** 0.5 / 3, abs=1e-5)
    assert found.reach == found.images and found.verdict == "holds"
    assert compare(*gaps(0.5, 0.5, 0.5, spread=0.5), "above").verdict == "inconclusive"


def test_without_all_seeds_there_is_no_verdict() -> None:
    row, other = gaps(4, 5, 6)
    two = compare([row[0], None, row[2]], other, "above")
    assert (two.seeds, two.gap, two.verdict) == (2, 5.0, "not finished") and two.interval is not None
    one = compare([row[0], None, None], other, "above")
    assert (one.seeds, one.gap, one.interval, one.verdict) == (1, 4.0, None, "not finished")
    assert compare([None] * 3, other, "above").gap is None


def test_results_on_other_people_are_not_compared() -> None:
    row, other = gaps(1, 2, 3)
    other[1] = result(40.0, seed=1, evaluated="others")
    with pytest.raises(DataError, match=r"base-seed1\.json.*different people"):
        compare(row, other, "above")


# The figures of ViTPose's tables 3, 5, 6, 7 and 8, typed once more.
PAPER = {
    3: {"mae_coco": 74.5, "base": 75.8, "mae_whole_images": 75.8, "no_pretraining": None},
    5: {
        "full_attention": 77.4,
        "window": 66.4,
        "window_shift": 76.4,
        "window_pool": 76.4,
        "window_shift_pool": 76.8,
        "full_and_window": 76.9,
        "large_window_shift_pool": 77.1,
    },
    6: {"base": 75.8, "frozen_mhsa": 75.1, "frozen_ffn": 72.8},
    7: {"base": 75.8, "coco_aic": 77.0, "coco_aic_mpii": 77.1},
    8: {
        "base": 75.8,
        "token": 76.0,
        "output": 76.3,
        "output_token": 76.6,
        "random_token": None,
        "learned_token": None,
    },
}


def test_the_rows_are_the_papers(whole: Miniature) -> None:
    found = {number: {run: row.paper for run, row in table.rows.items()} for number, table in whole.tables.items()}
    assert found == PAPER
    sides = {run: table.side(run) for table in whole.tables.values() for run in table.rows}
    below = {"no_pretraining", "window", "frozen_mhsa", "frozen_ffn", "random_token", "learned_token"}
    assert {run for run, side in sides.items() if side == "below"} == below
    assert len(whole.seeds) == 3


@pytest.mark.parametrize("run", load_miniature().runs)
def test_every_run_is_a_pipeline(whole: Miniature, run: str, tmp_path: Path) -> None:
    pipeline = whole.pipeline(run, 1, (f"workspace={tmp_path}",))
    model = pipeline.stages[tables.MODEL]
    assert isinstance(model, TrainingConfig) and model.steps and pipeline.seed == 1
    assert graph.plan(pipeline, [tables.MODEL])["data"].state == "start"


@pytest.mark.parametrize("number", PAPER)
def test_the_rows_of_a_table_have_equal_budgets(whole: Miniature, number: int) -> None:
    stages = [whole.pipeline(run, 0).stages[tables.MODEL] for run in whole.tables[number].rows]
    assert len({(one.steps, one.global_batch_size, str(one.optimizer), str(one.schedule)) for one in stages}) == 1
    pretraining = [stage for stage in whole.pipeline("base", 0).stages.values() if stage.kind == "mae"]
    assert len({(one.steps, one.global_batch_size, str(one.optimizer)) for one in pretraining}) == 1


def test_runs_differ_and_seeds_differ(whole: Miniature) -> None:
    prints = {fingerprint(whole.pipeline(run, seed)) for run in whole.runs for seed in whole.seeds}
    assert len(prints) == len(whole.runs) * len(whole.seeds)


def test_the_fingerprint_follows_what_is_upstream_and_nothing_else(small: Miniature) -> None:
    def of(*words: str) -> str:
        return fingerprint(small.pipeline("base", 0, words))

    same = of()
    assert of("stages.mae_coco_aic.steps=9") != same and of("stages.data.people.coco_train=9") != same
    assert of("stages.mae_coco.steps=9") == same  # another run's
    assert of("stages.model.save_every=3", "tracking.log_every=1", "workspace=elsewhere") == same
    assert of("stages.model.optimizer.layer_decay=1") == same  # the default, written out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("against: base, claim", "against: bass, claim", "no other row 'bass'"),
        (", claim: below", "", "do not say above or below"),
        ("like: none", "like: longer", "a run that has no like itself"),
        ("{name: none", "{nam: none", "did you mean 'name'"),
        ("  none: {set", "  nobody: {}\n  none: {set", "is in no table"),
    ],
)
def test_mistakes_in_the_tables_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "rows.yaml"
    assert old in SMALL
    path.write_text(SMALL.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_miniature(path)


class Runs:
    """Stands in for training: counts, takes its time, may fail."""

    def __init__(self, fail_at: int | None = None, minutes: float = 1.0) -> None:
        self.done: list[tuple[str, int]] = []
        self.now, self.minutes, self.fail_at = 0.0, minutes, fail_at

    def __call__(self, job: Job) -> Result:
        if len(self.done) == self.fail_at:
            raise KeyboardInterrupt
        self.done.append((job.run, job.seed))
        self.now += self.minutes * 60
        return result_of(job)

    def carry_out(self, small: Miniature, results: Path, minutes: float | None = None, again: bool = False) -> int:
        found = standing(small, results, in_order(small, [3, 6], small.seeds))
        return carry_out(
            found, self, results, again=again, minutes=minutes, say=lambda line: None, clock=lambda: self.now
        )


ALL = [("base", 0), ("none", 0), ("longer", 0), ("base", 1), ("none", 1), ("longer", 1)]


def test_it_goes_on_where_it_was_interrupted(small: Miniature, tmp_path: Path) -> None:
    first, second, third = Runs(fail_at=2), Runs(), Runs()
    with pytest.raises(KeyboardInterrupt):
        first.carry_out(small, tmp_path)
    assert second.carry_out(small, tmp_path) == 0
    assert third.carry_out(small, tmp_path) == 0
    assert (first.done, second.done, third.done) == (ALL[:2], ALL[2:], [])


def test_no_run_starts_after_the_minutes(small: Miniature, tmp_path: Path) -> None:
    runs = Runs(minutes=3.0)
    assert runs.carry_out(small, tmp_path, minutes=5.0) == 4
    assert runs.done == ALL[:2]


def test_a_stale_result_is_left_alone_until_asked_for(small: Miniature, tmp_path: Path) -> None:
    for run, seed in ALL:
        job = Job(run, seed, small.words(run, seed), fingerprint(small.pipeline(run, seed)))
        write_result(tmp_path, result_of(job))
    old = read_result(tmp_path, "none", 1)
    assert old is not None
    write_result(tmp_path, old.model_copy(update={"fingerprint": "of other settings"}))
    found = {(one.run, one.seed): one for one in standing(small, tmp_path, ALL)}
    assert found["none", 1].state == "stale" and found["none", 1].result is None
    assert "Stale, as settings changed since, and left out: `none` (seed 1)" in report(small, list(found.values()))
    idle, again = Runs(), Runs()
    idle.carry_out(small, tmp_path)
    again.carry_out(small, tmp_path, again=True)
    assert (idle.done, again.done) == ([], [("none", 1)])


def test_a_run_with_an_unknown_key_is_named_and_the_others_go_on(small: Miniature, tmp_path: Path) -> None:
    runs = {**small.runs, "longer": small.runs["longer"].model_copy(update={"set": ["stages.model.stepps=7"]})}
    broken, done = small.model_copy(update={"runs": runs}), Runs()
    refused = [one for one in standing(broken, tmp_path, ALL) if one.state == "refused"]
    assert [(one.run, one.seed) for one in refused] == [("longer", 0), ("longer", 1)]
    assert "did you mean 'steps'" in refused[0].refusal
    assert done.carry_out(broken, tmp_path) == 0 and done.done == [one for one in ALL if one[0] != "longer"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "no result of a run"), ('{"metrics": {}}', "missing"), ("[]", "no result of a run")]
)
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "base-seed0.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_result(tmp_path, "base", 0)


def test_a_result_under_another_name_is_named(tmp_path: Path) -> None:
    shutil.move(write_result(tmp_path, result(40.0)), tmp_path / "base-seed1.json")
    with pytest.raises(DataError, match="holds run 'base' of seed 0"):
        read_result(tmp_path, "base", 1)


def rows_of(page: str) -> dict[str, list[str]]:
    """Cells by the first one's text."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)}


def test_the_page_shows_gaps_beside_the_papers(small: Miniature) -> None:
    three = small.model_copy(update={"seeds": [0, 1, 2]})
    ap = {"base": (40.0, 41.0, 42.0), "none": (36.0, 36.0, 36.0), "longer": (40.5, 40.0, None)}
    found = [
        Standing(run, seed, "missing" if value is None else "done", None, value and result(value, run=run, seed=seed))
        for run, values in ap.items()
        for seed, value in enumerate(values)
    ]
    page = report(three, found)
    rows = rows_of(page)
    assert rows["MAE"] == ["75.8", "40.0, 41.0, 42.0", "", "", "", "", "", ""]
    assert rows["none"] == ["-", "36.0, 36.0, 36.0", "MAE", "below", "-5.0", "-7.5 to -2.5", "2.5", "**holds**"]
    assert rows["longer"][:5] == ["75.5", "40.5, 40.0, -", "short", "+0.5", "-0.2"]
    assert rows["longer"][-1] == "not finished, seeds: 2"
    assert "8 of 9 runs (seed 0: 3 of 3, seed 1: 3 of 3, seed 2: 2 of 3)" in page
    assert "80 s in the median" in page and "more than 90 s" not in page


def test_the_committed_page_is_what_the_committed_results_give(whole: Miniature) -> None:
    everything = in_order(whole, list(whole.tables), whole.seeds)
    assert REPORT.read_text(encoding="utf-8") == report(whole, standing(whole, tables.RESULTS, everything))


@pytest.mark.slow
def test_a_run_is_carried_out_and_found_again(tmp_path: Path) -> None:
    words = [f"stages.{name}.steps=2" for name in ("mae_coco_aic", "model")]
    words += [
        "stages.data.people={coco_train: 40, coco_val: 20, aic_train: 40, aic_val: 0, mpii_train: 0, mpii_val: 0}"
    ]
    first, again = (execute(Job("base", 0, [*words, "seed=0"], "f"), tmp_path) for _ in range(2))
    assert (first.steps, first.samples, first.people) == (2, 64, 20)
    assert list(first.shared) == ["data", "coco", "coco_aic", "mae_coco_aic"] and again.shared == {}
    assert first.seconds > 1 and first.cpu_seconds > 1
    assert first.metrics == again.metrics and first.resampled == again.resampled
    assert read_result(write_result(tmp_path, first).parent, "base", 0) == first
