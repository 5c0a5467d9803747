"""What README.md and docs/ say can be done: links lead somewhere, commands parse, examples are valid."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from launchers.cli import app
from launchers.run_stage import parser
from pipeline import graph
from pipeline.config_file import load_pipeline, shipped_presets
from pipeline.data.definitions import load_definition
from pipeline.rows import load_rows
from stages import KINDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()]
SCRIPT = "run_stage.py"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of the languages; "" is none."""
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Every command of ours that a page quotes, as words from `vitruvian` or the script's name on."""
    lines = [line for body in blocks(page, "", "sh", "bash", "console") for line in joined(body).splitlines()]
    lines += CODE_SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    found = []
    for line in lines:
        for part in re.split(r"\s(?:&&|\|\||[|;])\s", line.strip().removeprefix("$ ")):
            words = without_redirection(split(part))
            for place, word in enumerate(words):
                if place == 0 and Path(word).name == "vitruvian" and len(words) > 1:
                    found.append(["vitruvian", *words[1:]])
                elif Path(word).name == SCRIPT and place and len(words) > place + 1:
                    found.append([SCRIPT, *words[place + 1 :]])
    return [words for words in found if not any(is_synopsis(word) for word in words)]


def joined(body: str) -> str:
    return body.replace("\\\n", " ")


def split(text: str) -> list[str]:
    """Shell words without a comment; none for what is no shell line, such as a tree of files."""
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return []


def without_redirection(words: list[str]) -> list[str]:
    cut = next((place for place, word in enumerate(words) if re.fullmatch(r"[12&]?>{1,2}.*|&", word)), len(words))
    return words[:cut]


def is_synopsis(word: str) -> bool:
    """Part of a description of a command rather than of one to type: `[--from S]`, `[key=value ...]`, `...`."""
    return word.startswith("[") or word.endswith("]") or word in ("...", "…")


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command of the tree that the first words name, and the words after them."""
    command, rest = typer.main.get_command(app), words
    while getattr(command, "commands", None) and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command {rest[0]!r} among {', '.join(command.commands)}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def parse_vitruvian(words: list[str]) -> None:
    """Parses a command without running it. Where it names a preset, its overrides and stages are checked, too.

    A command's bare name, as in a sentence, need only exist.
    """
    command, rest = command_of(words)
    if not rest or "--help" in rest:
        return
    given = command.make_context(command.name, list(rest)).params
    if given.get("row") and not given["row"].isupper():
        load_rows().find(given["row"])
    if "pipeline" in given and is_preset(given["pipeline"]):
        pipeline = load_pipeline(given["pipeline"], given.get("overrides") or [], KINDS)
        for option in ("start", "until", "only"):
            assert given.get(option) in (None, *pipeline.stages), f"no stage {given[option]!r}"
        graph.plan(pipeline)


def is_preset(name: str) -> bool:
    """True for a preset, False for a reader's own file or a placeholder such as PIPELINE."""
    own = name.isupper() or "/" in name or name.endswith(".yaml")
    assert own or name in shipped_presets(), f"there is no preset {name!r}"
    return not own


def parse_run_stage(words: list[str]) -> None:
    """The same for run_stage.py."""
    if "--help" in words:
        return
    options = parser().parse_intermixed_args(words)
    if is_preset(options.config) and not options.stage.isupper():
        pipeline = load_pipeline(options.config, options.overrides, KINDS)
        assert options.stage in pipeline.stages
        graph.plan(pipeline, [options.stage])


QUOTED = list({f"{page.name} {words}": (page.name, words) for page in PAGES for words in commands(page)}.values())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory: no data, no workspace."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "words"), QUOTED, ids=[f"{page}: {' '.join(words)}" for page, words in QUOTED])
def test_a_quoted_command_parses(page: str, words: list[str]) -> None:
    parse_vitruvian(words[1:]) if words[0] == "vitruvian" else parse_run_stage(words[1:])


def test_commands_are_found_in_the_pages() -> None:
    assert sum(words[0] == "vitruvian" for _, words in QUOTED) >= 10
    assert sum(words[0] == SCRIPT for _, words in QUOTED) >= 2


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(AssertionError):
        parse_vitruvian(["rum", "demo"])
    with pytest.raises(Exception, match="No such option"):
        parse_vitruvian(["run", "demo", "--untill", "mae"])
    with pytest.raises(Exception, match="did you mean"):
        parse_vitruvian(["run", "demo", "stages.finetune.stepps=1"])
    with pytest.raises(AssertionError):
        parse_run_stage(["--stage", "mea"])
    with pytest.raises(AssertionError):
        parse_vitruvian(["status", "vitpose_x"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{page.name} links to {target}"
        assert not heading or heading in headings(file), f"{page.name} links to {target}"


def headings(page: Path) -> set[str]:
    """Anchors, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_in_python_compile_and_import_what_exists(page: Path) -> None:
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_in_yaml_are_valid(page: Path, elsewhere: Path) -> None:
    for number, body in enumerate(blocks(page, "yaml")):
        file = elsewhere / f"example-{number}.yaml"
        file.write_text(body, encoding="utf-8")
        content = yaml.safe_load(body)
        if "keypoints" in content:
            assert load_definition(str(file)).name == content["name"]
        elif "stages" in content:
            assert load_pipeline(file, [], KINDS).name == content["name"]


def test_every_preset_is_in_a_table_of_the_configuration_page_or_of_the_rows_of_the_paper() -> None:
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("configuration.md", "rows.md"))
    named = {name for row in text.splitlines() if row.startswith("| ") for name in CODE_SPAN.findall(row)}
    assert set(shipped_presets()) <= named


def test_the_datasets_page_names_where_each_definition_looks() -> None:
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    for name in ("coco", "aic", "mpii", "crowdpose", "ochuman"):
        row = next(row for row in page.splitlines() if f"(`{name}`)" in row)
        quoted = [path.rstrip("/") for text in CODE_SPAN.findall(row) for path in expanded(text)]
        places = [
            path for split in load_definition(name).splits.values() for path in (*split.annotations, *split.images)
        ]
        assert all(path in (*places, *optional_places(name)) for path in quoted if path != name), name


def expanded(text: str) -> list[str]:
    """`{a,b}` as the shell expands it."""
    match = re.search(r"\{([^}]*)\}", text)
    if not match:
        return [text]
    return [text[: match.start()] + word + text[match.end() :] for word in match.group(1).split(",")]


def optional_places(name: str) -> list[str]:
    return [path for split in load_definition(name).splits.values() for path in (*split.detections, *split.truth)]


def marked_tests() -> dict[int, set[str]]:
    """Names of the tests that carry the marker of a fault, by its number."""
    found: dict[int, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        everywhere = [node for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.dump(node)]
        for test in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            for node in (part for place in (*everywhere, *test.decorator_list) for part in ast.walk(place)):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "fault":
                    assert isinstance(node.args[0], ast.Constant)
                    found.setdefault(int(node.args[0].value), set()).add(test.name)
    return found


def test_every_fault_of_the_table_has_the_tests_that_it_names() -> None:
    marked = marked_tests()
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \| [^|]+ \|$", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    for number, tests in rows:
        named = set(CODE_SPAN.findall(tests))
        assert named and named <= marked.get(int(number), set()), (number, named - marked.get(int(number), set()))
