"""Hostile and broken configuration: refused in one line, before anything is started."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import plain_yaml
from pipeline.config_file import load_pipeline, read_yaml
from pipeline.data.definitions import load_definition
from pipeline.errors import ConfigError
from stages import KINDS

pytestmark = pytest.mark.fault(25)

ROOT = Path(__file__).resolve().parents[2]
BOMB = "\n".join(
    ["lol0: &lol0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"lol{n}: &lol{n} [{', '.join([f'*lol{n - 1}'] * 10)}]" for n in range(1, 10)]
)
"""A billion values in ten lines."""
MERGE_BOMB = "\n".join(
    ["m0: &m0 {a: 1}"] + [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 10)]
)
MAE: dict[str, Any] = {
    "kind": "mae",
    "inputs": {"shards": "./shards"},
    "model": {"backbone": {"size": "micro", "image_size": [32, 32], "patch_size": 8}, "decoder_width": 32},
    "steps": 10,
    "global_batch_size": 8,
    "optimizer": {"lr": 0.001},
}

TEXTS = [
    ("name: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
    ("name: !!python/object/new:os.system ['touch canary']", "could not determine a constructor"),
    ("name: !!python/name:os.system", "could not determine a constructor"),
    ("!!python/module:os\n", "could not determine a constructor"),
    (BOMB, "aliases are written out"),
    (f"name: x\nstages:\n  a: {{kind: mae}}\n{BOMB}", "aliases are written out"),
    (MERGE_BOMB, "aliases are written out"),
    ("a: &a [*a]", "an alias of what it is part of"),
    ("a: &a {b: *a}", "an alias of what it is part of"),
    ("name: one\nname: two\n", "the key 'name' a second time"),
    ("name: one\n'name': two\n", "the key 'name' a second time"),
    ("name: x\nstages:\n  a:\n    kind: mae\n    optimizer: {lr: 1, lr: 2}\n", "the key 'lr' a second time"),
    ("[" * 5000, "nested deeper than 50"),
    ("{a: " * 5000, "nested deeper than 50"),
    ("- " * 5000, "nested deeper than 50"),
    ("a: [" + "1, " * 30000 + "1]", "more than 20000 values"),
    ("a: " + "x" * 20000, "longer than 10000 characters"),
    ("a: 1" + ":1" * 9000, "longer than 10000 characters"),
    ("#" * 300_000, "300000 bytes, the limit is 262144"),
    ("a:\n\t- b\n", "not YAML"),
    ('a: "\\0"', "a character that no name can have"),
    ('a: "\\ud800"', "a character that no name can have"),
    ("a: " + "1" * 5000, "not YAML"),
    ("? [a, b]\n: 1\n", "not YAML"),
    ("? {a: b}\n: 1\n", "not YAML"),
    ("a: &x 1\nb: *y\n", "undefined alias"),
    ("---\na: 1\n---\nb: 1\n", "not YAML"),
    ("%YAML 9.9\n---\na: 1\n", "not YAML"),
    ("a: 1970-13-45\n", "not YAML"),
    ("", "expected a mapping"),
    ("5", "expected a mapping"),
]


@pytest.mark.parametrize(("text", "said"), TEXTS, ids=[f"{n}-{said}" for n, (_, said) in enumerate(TEXTS)])
def test_a_hostile_file_is_one_line_within_seconds_wherever_yaml_is_read(tmp_path: Path, text: str, said: str) -> None:
    """A pipeline, its base and a dataset definition: one line that names the file, in under 5 s, and nothing runs."""
    (tmp_path / "x.yaml").write_text(text)
    (tmp_path / "over.yaml").write_text("base: x.yaml\n")
    started = time.process_time()
    for read in (
        lambda: load_pipeline(tmp_path / "x.yaml", [], KINDS),
        lambda: load_pipeline(tmp_path / "over.yaml", [], KINDS),
        lambda: load_definition(str(tmp_path / "x.yaml")),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            read()
        message = str(caught.value)
        assert "\n" not in message and "x.yaml" in message and len(message) < 1000
    assert time.process_time() - started < 5
    assert not (tmp_path / "canary").exists() and not Path("canary").exists()


def test_a_file_that_is_as_large_as_allowed_is_read_within_seconds(tmp_path: Path) -> None:
    """The limits are what bounds the time: the most values that pass take less than 5 s."""
    (tmp_path / "x.yaml").write_text("a: [" + "1, " * (plain_yaml.MAX_NODES - 10) + "1]")
    started = time.process_time()
    assert len(read_yaml(tmp_path / "x.yaml")["a"]) == plain_yaml.MAX_NODES - 9
    assert time.process_time() - started < 5


def test_anchors_and_merges_of_honest_files_still_work(tmp_path: Path) -> None:
    """Two sections may share an anchor, and a merged key may be overridden: that is no key twice."""
    (tmp_path / "x.yaml").write_text("b: &b {x: 1, y: 1}\na: &a {<<: *b, x: 2}\nc: {<<: *a, y: 3}\nd: [*a, *a]\n")
    found = read_yaml(tmp_path / "x.yaml")
    assert found["a"] == {"x": 2, "y": 1} and found["c"] == {"x": 2, "y": 3} and found["d"] == [found["a"]] * 2


def pipeline_file(folder: Path) -> Path:
    path = folder / "p.yaml"
    path.write_text(yaml.safe_dump({"name": "trial", "stages": {"mae": MAE}}))
    return path


HUGE = "0x" + "f" * 6000
OVERRIDES = [
    ("stages.mae.optimizer.lr=nan", "stages.mae.optimizer.lr"),
    ("stages.mae.optimizer.lr=.nan", "stages.mae.optimizer.lr"),
    ("stages.mae.optimizer.lr=-.inf", "stages.mae.optimizer.lr"),
    ("stages.mae.optimizer.lr=1e999", "stages.mae.optimizer.lr"),
    ("stages.mae.optimizer.lr=-1e-4", "stages.mae.optimizer.lr"),
    ("stages.mae.optimizer.betas=[0.9, .nan]", "stages.mae.optimizer.betas"),
    ("stages.mae.optimizer={lr: 1, lr: 2}", "the key 'lr' a second time"),
    ("stages.mae.crop_scale=[.nan, 1]", "stages.mae.crop_scale"),
    ("stages.mae.global_batch_size=-8", "stages.mae.global_batch_size"),
    ("stages.mae.global_batch_size=1e30", "stages.mae.global_batch_size"),
    ("stages.mae.steps=1e30", "stages.mae.steps"),
    ("stages.mae.steps=99999999999999999999", "stages.mae.steps"),
    (f"stages.mae.steps={HUGE}", "stages.mae.steps"),
    (f"seed={HUGE}", "seed"),
    (f"stages.mae.kind={HUGE}", "stages.mae.kind"),
    (f"stages.mae={HUGE}", "stages.mae"),
    ("stages.mae.epochs=1e300", "stages.mae.epochs"),
    ("stages.mae.model.backbone.width=4e12", "stages.mae.model.backbone.width"),
    ("stages.mae.model.backbone.depth=1e9", "stages.mae.model.backbone.depth"),
    ("stages.mae.model.backbone.image_size=[8e9, 8e9]", "stages.mae.model.backbone"),
    ("stages.mae.model.decoder_depth=1e9", "stages.mae.model.decoder_depth"),
    ("runtime.processes=1e9", "runtime.processes"),
    ("runtime.workers=1e9", "runtime.workers"),
    ("seed=!!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
    ("seed=" + "[" * 5000, "nested deeper than 50"),
    ("seed=[&a [*a]]", "an alias of what it is part of"),
    ("seed=" + "1" * 5000, "not YAML"),
    ("name=" + "n" * 300, "name"),
    ("name=a/b", "name"),
    ("unknown." + "x" * 5000 + "=1", "unknown"),
    ("stages." + "x" * 300 + ".kind=mae", "stages"),
    ("stages.mae.inputs.shards=" + "x" * 5000, "no stage and no path"),
    ("stages.mae.inputs.shards=[a]", "stages.mae.inputs.shards"),
    ("stages.mae.inputs.shards={a: b}", "stages.mae.inputs.shards"),
    ("stages.mae.kind={mae: 1}", "stages.mae.kind"),
    ("stages=[mae]", "stages"),
    ("stages=mae", "stages"),
    ("engine=null", "engine"),
    ("workspace=[1]", "workspace"),
    ("tracking.log_every=0", "tracking.log_every"),
]


@pytest.mark.parametrize(("override", "said"), OVERRIDES, ids=[override[:50] for override, _ in OVERRIDES])
def test_a_hostile_override_is_a_line_or_a_few(tmp_path: Path, override: str, said: str) -> None:
    """Values that are no numbers, impossible ones and huge ones: a line a mistake, with the place, at once."""
    path = pipeline_file(tmp_path)
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, [override], KINDS)
    message = str(caught.value)
    assert said in message and len(message.splitlines()) <= 8
    assert all(len(line) < 400 for line in message.splitlines())
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "content",
    [
        {"stages": {"mae": {**MAE, **{f"wrong{n}": n for n in range(5000)}}}},
        {"stages": {5: MAE}},
        {"stages": {None: MAE}},
        {"stages": {"a": None}},
        {7: 8, "stages": {"mae": MAE}},
        {"stages": {"mae": MAE}, "base": "x" * 5000},
        {"stages": {"mae": MAE}, "base": ["demo"]},
        {"stages": {"mae": {**MAE, "inputs": {"shards": "mae"}}}, "seed": {"a": 1}},
    ],
)
def test_keys_and_bases_that_make_no_sense_are_few_lines(tmp_path: Path, content: dict[Any, Any]) -> None:
    """Thousands of mistakes do not make thousands of lines, and no key of a wrong type is a traceback."""
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"name": "trial", **content}))
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, [], KINDS)
    assert len(str(caught.value).splitlines()) <= 22


@pytest.mark.parametrize("special", ["fifo", "folder", "link to itself"])
def test_what_is_no_ordinary_file_is_refused_and_not_waited_for(tmp_path: Path, special: str) -> None:
    """A pipe in a definition's place would be waited for for ever."""
    path = tmp_path / "x.yaml"
    {"fifo": os.mkfifo, "folder": os.mkdir, "link to itself": lambda p: os.symlink(p, p)}[special](path)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_definition(str(path))
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_pipeline(path, [], KINDS)


def test_zero_3_with_averaged_weights_is_found_before_anything_starts() -> None:
    """A combination of two sections is a mistake of the config: `--dry-run` finds it, too."""
    overrides = ["engine.zero_stage=3", "stages.finetune.average_decay=0.9", "stages.finetune.keep=last"]
    with pytest.raises(ConfigError, match=r"stages\.finetune: average_decay keeps whole weights"):
        load_pipeline("demo", overrides, KINDS)
    load_pipeline("demo", overrides[1:], KINDS)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("{coca: 1}", "did you mean 'coco'"),
        ("{coco: -1}", "weights"),
        ("{coco: 0}", "above 0"),
        ("{coco: .inf}", "finite"),
    ],
)
def test_sampling_weights_are_checked_against_the_stage_that_makes_the_shards(weights: str, said: str) -> None:
    """A weight of a dataset that the shards will not hold is found before the shards are made."""
    with pytest.raises(ConfigError, match=said):
        load_pipeline("demo", [f"stages.finetune.weights={weights}"], KINDS)
    load_pipeline("demo", ["stages.finetune.weights={coco: 2, mpii: 1}"], KINDS)


def test_the_command_line_refuses_a_bomb_with_exit_code_2_and_little_memory(tmp_path: Path) -> None:
    """Both entry points, as a user types them: exit code 2, one line, no traceback, no process, no workspace."""
    (tmp_path / "bomb.yaml").write_text(f"name: x\nstages:\n  a: {{kind: mae}}\n{BOMB}")
    program = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
    calls = [
        program + "from launchers.cli import main; sys.argv = ['vitruvian', 'run', 'bomb.yaml']; main()",
        program + "from launchers.run_stage import main; sys.exit(main(['--stage', 'a', '--config', 'bomb.yaml']))",
    ]
    for call in calls:
        done = subprocess.run(
            [sys.executable, "-c", call],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2, done.stderr
        [line] = done.stderr.splitlines()
        assert "bomb.yaml: not YAML: more than 20000 values" in line
        assert [path.name for path in tmp_path.iterdir()] == ["bomb.yaml"]
