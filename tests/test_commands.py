"""Every command of README and docs is executed: to its end where that is short, else as HOW says.

A block of code without a language is a script. Bash runs it, with a note in the place of each
program: what a user would start, word by word as bash hands it over.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from enum import Enum, auto
from pathlib import Path

import numpy as np
import pytest

from launch.study.__main__ import names
from launch.study.costs import Rates
from launch.study.table import plan_text
from nmm import begin
from nmm.config import compose, load
from nmm.errors import UserError
from nmm.parallel import World
from tests.scaling_cases import SIZES
from tests.test_documentation import DOCUMENTS, ROOT
from tests.test_scaling_runs import write_curve, write_run
from tests.test_study import planned

Words = tuple[str, ...]

NOTE = """\
#!/bin/bash
printf '%s\\0' {name} "$@" >>"$NOTES"
printf '\\n' >>"$NOTES"
"""
PROGRAMS = ("python", "make", "torchrun", "deepspeed", "aws", "bench/install.sh")
MENTIONED = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|make|torchrun(?! failed)|deepspeed) .*")
STANDS_FOR = {
    "study=NAME": "study=mini",
    "runs/NAME": "runs/X",
    "NAME": "chinchilla",
    "FORM": "text",
    "DIR": "fits/all",
}
MORE = "..."  # what a user gives besides


class How(Enum):
    """How far a command is executed here.

    to_its_end     all of it, with runs and tables that are made for it
    dry            with its own --dry-run or dry_run=true
    to_its_corpus  what train.py composes and checks, until it looks for shards that are not there
    to_its_input   until it says in a sentence which file or run of the user is not there
    explained      nothing: it takes minutes or machines. tests/test_documentation.py prints its
                   --help and compares the flags
    of_others      nothing: others wrote it, or it installs what they wrote
    """

    to_its_end = auto()
    dry = auto()
    to_its_corpus = auto()
    to_its_input = auto()
    explained = auto()
    of_others = auto()


HOW = {
    **dict.fromkeys(("train.py", "torchrun", "deepspeed"), How.to_its_corpus),
    **dict.fromkeys(("launch.study", "launch.torchrun", "launch.slurm", "make"), How.dry),
    **dict.fromkeys(("launch.kubernetes", "nmm.model", "nmm.plot", "nmm.scaling"), How.to_its_end),
    **dict.fromkeys(("nmm.evaluate", "nmm.export", "nmm.generate"), How.to_its_input),
    **{
        f"data.prepare.{name}": How.to_its_input
        for name in ("convert", "image_codes", "index", "inspect", "tokenizer", "validate")
    },
    "data.prepare.demo": How.explained,
    **dict.fromkeys(("launch.sizing", "nmm.copies"), How.explained),
    **{
        f"bench.{name}": How.explained
        for name in ("attention", "checkpoint", "data", "fit", "moe", "plan", "worker")
    },
    **dict.fromkeys(("aws", "bench/install.sh", "http.server"), How.of_others),
}


def script(document: Path) -> str:
    """The blocks without a language, and the inline commands, a line each."""
    text = document.read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", lines)
    shell = [block for language, block in blocks if not language]
    return "\n".join([*shell, *(span for span in spans if MENTIONED.fullmatch(span))])


def commands(folder: Path, *, documents: Sequence[Path] = DOCUMENTS) -> list[Words]:
    """The words of every command, each once; what is no program here ends bash, and this fails."""
    for name in PROGRAMS:
        program = folder / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(NOTE.format(name=name))
        program.chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}", "NOTES": f"{folder / 'notes'}"}
    for document in documents:
        done = subprocess.run(
            ["/bin/bash", "-euc", script(document)],
            cwd=folder / "bin",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), (document.name, done.stderr)
    lines = (folder / "notes").read_text().removesuffix("\0\n").split("\0\n")
    return [
        tuple(STANDS_FOR.get(word, word) for word in line.split("\0"))
        for line in dict.fromkeys(lines)
    ]


def program_of(words: Words) -> str:
    """ "python -m nmm.plot --run X" -> "nmm.plot"; "make demo" -> "make"."""
    return words[0] if words[0] != "python" else words[1 + (words[1] == "-m")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Words]]:
    """Every program, each time with what is behind it."""
    return [
        (program, words[words.index(program) + 1 :])
        for words in commands(tmp_path_factory.mktemp("notes"))
        for program in [program_of(words)]
    ]


def those(found: list[tuple[str, Words]], how: How) -> list[tuple[str, Words]]:
    return [(program, words) for program, words in found if HOW[program] is how]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with nothing but the config that the page on data tells to write."""
    page = (ROOT / "docs" / "data-format.md").read_text()
    (mine,) = re.findall(r"`conf/data/mine.yaml`:\n\n```yaml\n(.*?)```", page, re.DOTALL)
    config = tmp_path / "conf" / "data" / "mine.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(mine)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return tmp_path


def call(program: str, words: Words) -> int | str | None:
    """The exit code of its main, or what it says in the end."""
    package = (ROOT / program.replace(".", "/") / "__main__.py").exists()
    main = importlib.import_module(f"{program}.__main__" if package else program).main
    sys.argv = [program, *words]
    try:
        main()
    except SystemExit as leaving:
        return leaving.code
    return None


def really(program: str, words: Words) -> None:
    said = call(program, words)
    assert said in (0, None), (program, words, said)


def whole(words: Words, *, scene: Path) -> Words:
    """An override for what a user gives besides, and the folder of the user's configs."""
    mine = [f"hydra.searchpath=[{scene / 'conf'}]"] if "data=mine" in words else []
    more = ["schedule.total_steps=9" if word == MORE else word for word in words]
    return (*more, *mine)


def only_named(words: Words) -> bool:
    """A command that is shortened, or named without what it needs: --help will do."""
    return MORE in words or (len(words) == 1 and re.fullmatch(r"[a-z-]+", words[0]) is not None)


def test_every_command_is_known(found: list[tuple[str, Words]]) -> None:
    assert len(found) > 100
    assert {program for program, _ in found} == HOW.keys()


def test_a_program_that_is_not_known_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("```\npython train.py\nour-new-tool --fast\n```\n")
    with pytest.raises(AssertionError, match="our-new-tool: command not found"):
        commands(tmp_path, documents=[document])


def test_what_may_be_printed_is(found: list[tuple[str, Words]], scene: Path) -> None:
    """In place of being started."""
    for program, words in those(found, How.dry):
        os.chdir(scene)
        if program == "make":
            make = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
            assert (make.returncode, make.stderr) == (0, ""), words
        elif program == "launch.study":
            of_a_study(words)
        else:
            really(program, ("--dry-run", *whole(words, scene=scene)))


def of_a_study(words: Words) -> None:
    """Planned, or asked how it stands; what it would train has no time to begin."""
    match words:
        case ():
            return
        case ("retry", *_):
            assert call("launch.study", (*words, "study.max_minutes=1e-9")) == 75
        case ("status", *_):
            really("launch.study", words)
        case ("report", *_):
            assert call("launch.study", words) == 1  # runs are missing
        case (_, "submit=slurm", "dry_run=true"):
            really("launch.study", words)
        case _:
            planned(*(word for word in words if word not in ("submit=slurm", "dry_run=true")))


@pytest.mark.parametrize("name", names())
def test_every_study_can_be_planned(name: str) -> None:
    study, runs = planned(f"study={name}")
    plan = plan_text(study, runs, rates=Rates({}, flops_per_second=1e15))
    assert all(run.name in plan for run in runs)
    assert all(line in plan for line in study.about)
    assert study.questions


def test_runs_are_composed_and_look_for_their_corpus(
    found: list[tuple[str, Words]], scene: Path, world: World
) -> None:
    checked = 0
    for _, words in those(found, How.to_its_corpus):
        if "-m" in words or "--help" in words:  # of bench, or explained
            continue
        given = [word for word in whole(words, scene=scene) if "=" in word]
        with pytest.raises(UserError, match=r"does not exist|cannot be read"):
            begin.make_plan(load(compose(given)), world=world)
        checked += 1
    assert checked > 25


def test_what_needs_the_user_s_data_says_what_is_not_there(
    found: list[tuple[str, Words]], scene: Path
) -> None:
    missing = r"does not exist|cannot be read|matches no|names no|no folder|has no rows"
    for program, words in those(found, How.to_its_input):
        if only_named(words) or "--help" in words:
            really(program, ("--help",))
            continue
        said = str(call(program, whole(words, scene=scene)))
        assert re.fullmatch(f"error: .*({missing}).*", said), (program, words, said)


def test_what_is_short_is_done(found: list[tuple[str, Words]], scene: Path) -> None:
    write_laws(scene)
    for program, words in those(found, How.to_its_end):
        named = program == "nmm.scaling" and only_named(words)
        really(program, (words[0], "--help") if named else whole(words, scene=scene))
    for path in ("docs/figures/schedules.svg", "runs/X/loss.png", "fits/report/report.html"):
        assert (scene / path).stat().st_size > 0, path


def write_laws(scene: Path) -> None:
    """Runs and points of one law, of two modalities alone and together, and an earlier fit."""
    (scene / "tests").symlink_to(ROOT / "tests")
    keys = ("loss", *(f"loss/{key}" for key in ("kind/caption", "kind/text")))
    keys += ("loss/modality/text", "loss/modality/image")
    points = [("params", "tokens", "loss")]
    for place, share in enumerate((0.0, 0.5, 1.0)):
        shares = {"modality/text": 1 - share, "modality/image": share}
        shares |= {"source/caption": 0.2 + 0.6 * share, "source/text": 0.8 - 0.6 * share}
        for size in SIZES[::2].tolist():
            for tokens in (np.geomspace(2.5e9, 6e11, 4) * (1 + place / 10)).tolist():
                loss = 2 + 30 / size**0.2 + 900 / tokens**0.3 + share / 10
                of_run = {"losses": dict.fromkeys(keys, loss), "shares": shares}
                name = "X" if len(points) == 1 else f"run{len(points)}"
                write_run(scene / "runs" / name, size=size, tokens=tokens, **of_run)
                points.append((size, tokens, loss))
    (scene / "points.csv").write_text("".join(f"{a},{b},{c}\n" for a, b, c in points))
    for name in ("A", "B", "dense", "1t1i"):
        curve = 5 - np.arange(1, 101) / 50
        write_curve(scene / "runs" / name, losses=curve, flops=1e15, seconds=0.1)
    really("nmm.scaling", ("fit", "--runs", "runs", "--loss", "loss", "--out", "fits/early"))
    shutil.copytree(scene / "fits" / "early", scene / "fits" / "late")
