"""What README and docs name exists: files, tests, links, config keys, commands, their flags."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nmm.config import Config, ModelConfig, StudyCommand, compose
from nmm.flops import num_parameters
from tests.test_structure import HOMES, RANKS, WITHOUT_TORCH, is_entry_point, our_modules

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FOLDERS = "nmm|data|tests|docs|conf|launch|bench"
EXAMPLES = {"conf/data/mine.yaml", "data/corpora"}  # what a user is told to write
# Flags of torchrun, deepspeed, pip and docker.
OF_OTHERS = {
    *("--nproc_per_node", "--max-restarts", "--num_gpus", "--local_rank", "--index-url"),
    "--shm-size",
}
DERIVED = {"model.image.tokens"}  # a number that follows from the config

Command = tuple[str, ...]


def spans(document: Path) -> list[str]:
    """The inline code of a document; blocks of code are left out."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def table(document: Path, *, first: str) -> list[list[str]]:
    """The rows of the table whose first column has that title."""
    lines = iter(document.read_text().splitlines())
    assert next((line for line in lines if line.startswith(f"| {first} |")), None), first
    rows: list[list[str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[1:]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def check_reference(word: str) -> None:
    """`tests/test_a.py::test_b`, `data/`, `nmm/log`: a file, folder or module, and a test in it."""
    path, _, function = word.partition("::")
    module = (ROOT / path).with_suffix(".py")
    assert (ROOT / path).exists() or module.exists(), word
    if function:
        tree = ast.parse((ROOT / path).read_text())
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, word


def test_every_file_and_link_that_is_named_exists() -> None:
    words = {(document.name, word) for document in DOCUMENTS for word in spans(document)}
    paths = {
        word
        for _, word in words
        if re.fullmatch(rf"(?:{FOLDERS})/[\w./:]*|train\.py", word) and word not in EXAMPLES
    }
    assert len(paths) > 60
    for path in sorted(paths):
        check_reference(path)
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def test_the_table_of_capabilities_names_files_keys_and_tests() -> None:
    for capability, files, settings, tests in table(ROOT / "README.md", first="capability"):
        assert named(files), capability
        assert all(word.startswith("tests/") for word in named(tests)), capability
        assert named(tests) or files.startswith("`bench/"), capability
        for word in (*named(files), *named(tests)):
            check_reference(word)
        for word in named(settings):
            if "/" in word or word == "train.py":
                check_reference(word)
            else:
                assert is_key(word), (capability, word)


@cache
def composed() -> object:
    study = OmegaConf.to_container(OmegaConf.structured(StudyCommand))
    return {**OmegaConf.to_container(compose([])), **study}


def is_key(word: str) -> bool:
    """Is `data.sources.*.weight` a key of the config? A star stands for any one name."""
    node: object = composed()
    for part in word.split("."):
        if not isinstance(node, dict) or part not in {*node, "*"}:
            return False
        node = next(iter(node.values())) if part == "*" else node[part]
    return True


def test_every_key_that_is_named_exists() -> None:
    group = "|".join([*OmegaConf.structured(Config), "study"])
    found = {
        match[1]
        for document in DOCUMENTS
        for word in spans(document)
        if (match := re.fullmatch(rf"((?:{group})\.[a-z0-9_.*]+)(?:=\S+)?", word))
    }
    modules = our_modules()
    keys = {key for key in found if key not in modules} - DERIVED
    assert len(keys) > 25
    assert [key for key in sorted(keys) if not is_key(key)] == []


def command_lines() -> list[tuple[Command, str]]:
    """(program, the rest of its line) of every command in the documents; continued lines joined."""
    text = "\n".join(document.read_text() for document in DOCUMENTS).replace("\\\n", " ")
    found = re.findall(r"python (train\.py|-m [\w.]+)(?= |`|$)([^`\n]*)", text, flags=re.MULTILINE)
    return [(tuple(program.split()), rest) for program, rest in found]


def documented_flags() -> dict[Command, set[str]]:
    """Every program and subcommand of the documents, with the flags that they show for it."""
    flags: dict[Command, set[str]] = {}
    for program, rest in command_lines():
        subcommand = re.match(r" +([a-z]+(?:-[a-z]+)*)(?= |$)", rest)
        command = (*program, *(subcommand.groups() if subcommand else ()))
        flags.setdefault(command, set()).update(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest))
    return flags


def entry_points() -> set[Command]:
    """Every program of ours, documented or not."""
    modules = {name for name, tree in our_modules().items() if is_entry_point(name, tree)}
    assert "train" in modules
    named_so = (name.removesuffix(".__main__") for name in modules - {"train"})
    return {("train.py",), *(("-m", name) for name in named_so)}


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[Command, str]:
    """What `--help` prints, of all commands at the same time."""
    directory = tmp_path_factory.mktemp("helps")
    commands = sorted(entry_points() | documented_flags().keys())
    asked = directory / "commands.json"
    asked.write_text(json.dumps([[*command, "--help"] for command in commands]))
    starter = [sys.executable, "-m", "tests.helps", str(asked), str(directory)]
    subprocess.run(starter, cwd=ROOT, check=True, timeout=100)
    codes = json.loads((directory / "codes.json").read_text())
    for number, (command, code) in enumerate(zip(commands, codes, strict=True)):
        assert (code, (directory / f"{number}.stderr").read_text()) == (0, ""), command
    return {c: (directory / f"{n}.stdout").read_text() for n, c in enumerate(commands)}


def test_every_command_explains_itself_and_its_documented_flags(helps: dict[Command, str]) -> None:
    assert len(helps) > 12
    for command, said in helps.items():
        assert "usage:" in said.lower(), command
        explained = {"--help", *re.findall(r"--[a-z][\w-]*", said)}
        assert documented_flags().get(command, set()) <= explained, command
    words = {word.split()[0] for document in DOCUMENTS for word in spans(document) if word}
    flags = {word for word in words if word.startswith("--")} - OF_OTHERS
    explained = set(re.findall(r"--[a-z][\w-]*", " ".join(helps.values())))
    assert flags <= explained


def test_every_study_is_explained_and_those_that_are_named_exist() -> None:
    there = {path.stem for path in (ROOT / "conf" / "study").glob("*.yaml")}
    rows = table(ROOT / "docs" / "scaling.md", first="study")
    assert {name for first, *_ in rows for name in named(first)} == there
    studies = [rest for program, rest in command_lines() if program[-1] == "launch.study"]
    shown = {match[1] for rest in studies if (match := re.search(r"\bstudy=(\w+)", rest))}
    assert len(studies) > 8
    assert {"mini", "nmm_early"} <= shown <= {*there, "NAME"}


def test_the_architecture_tells_ranks_and_homes_as_they_are_tested() -> None:
    told = {
        word.rstrip("/").removesuffix(".py").replace("/", "."): int(level)
        for level, modules in table(ARCHITECTURE, first="level")
        for word in named(modules)
    }
    assert {"nmm": 0, **told} == RANKS  # nmm itself is an empty package
    text = ARCHITECTURE.read_text()
    (sentence,) = re.findall(r"^Homes of libraries: (.*?entry points)\.", text, re.DOTALL | re.M)
    homes = {
        library: tuple(h.rstrip("/").removesuffix(".py").replace("/", ".") for h in named(home))
        for libraries, home in re.findall(
            r"((?:`\w+`(?: and )?)+) in\s+((?:`[\w./]+`(?: and )?)+)", sentence
        )
        for library in named(libraries)
    }
    assert homes == HOMES
    (sentence,) = re.findall(r"\.\s([^.]*) import no torch\.", text)
    told_modules = {word.replace("/", ".").rstrip(".") for word in named(sentence)}
    assert told_modules == {*WITHOUT_TORCH, "launch"}


def test_the_table_of_presets_tells_what_they_are() -> None:
    rows = table(ROOT / "docs" / "scaling.md", first="preset")
    presets = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    assert {named(name)[0] for name, *_ in rows} == {p for p in presets if "tiny" not in p}
    for name, width, depth, size, active, vision, rate in rows:
        composed = compose([f"model={named(name)[0]}"])
        model = OmegaConf.to_object(composed.model)
        assert isinstance(model, ModelConfig)
        count, encoder = num_parameters(model), model.encoder
        widths = f"{encoder.width} + {model.width}" if encoder else str(model.width)
        assert (width, depth) == (widths, str(model.depth)), name
        assert size == f"{count.N:,}", name
        assert active == (f"{count.N_active:,}" if model.is_sparse else "all"), name
        assert vision == (f"{count.N_vision:,}" if encoder else "-"), name
        assert float(rate) == composed.optim.learning_rate, name


def test_every_equality_names_the_tests_that_prove_it() -> None:
    rows = table(ARCHITECTURE, first="case")
    assert len(rows) > 6
    for case, _, tests in rows:
        assert named(tests), case
        for word in named(tests):
            assert "::test_" in word, (case, word)
            check_reference(word)
