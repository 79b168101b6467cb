"""The program itself: killed and resumed, it logs the losses of an undisturbed run to the bit."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.prepare.index import index_shards
from nmm import begin, rundir
from nmm.checkpoint import complete, read_progress
from nmm.config import Layout, compose, load
from nmm.errors import UserError
from nmm.identity import refuse_contradiction
from nmm.parallel import World
from nmm.trained import read_run
from tests import corpora, runs
from tests.ports import free_port
from tests.runs import STEPS, WHOLE, command, environment, overrides, rows, run


@pytest.fixture(scope="module")
def corpus() -> Path:
    return runs.corpus()


@pytest.fixture(scope="module")
def undisturbed() -> Path:
    return runs.undisturbed()


def kill_in_the_loop(arguments: list[str], *, log: Path, steps: int, seconds: float) -> int:
    """The exit code of a run that is SIGKILLed `seconds` after it has logged `steps` more steps."""
    before = logged(log)
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    while process.poll() is None and not before < logged(log) - steps:
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    return process.wait()


def logged(log: Path) -> int:
    """The last step of a log that may end in half a row."""
    rows = log.read_bytes().rpartition(b"\n")[0].splitlines() if log.exists() else []
    return json.loads(rows[-1])["step"] if rows else 0


def test_killed_three_times_and_resumed_equals_undisturbed(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    whole = undisturbed
    arguments = command(corpus, tmp_path, "run.name=killed", "log.wandb=off", "data.workers=2")
    killed = tmp_path / "killed"
    # At moments spread over steps and saves: wherever they fall, the end is the same.
    moments = [(STEPS * 3 // 10, 0.004), (STEPS // 10, 0.0), (STEPS * 3 // 10, 0.011)]
    codes = [
        kill_in_the_loop(arguments, log=killed / "losses.jsonl", steps=steps, seconds=seconds)
        for steps, seconds in moments
    ]
    assert codes == [-signal.SIGKILL] * 3
    assert any(killed.glob("checkpoints/step_*/COMPLETE"))
    with (killed / "losses.jsonl").open("a") as log:
        log.write('{"step": 9999, "lo')  # what a kill inside a write leaves
    done = run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing" in done.stdout
    for name in ("losses.jsonl", "evals.jsonl", "quarantine.jsonl"):
        assert rows(killed / name) == rows(whole / name), name
    starts = json.loads((killed / "manifest.json").read_text())["starts"]
    assert len(starts) == 4
    assert [start["step"] for start in starts] == sorted({start["step"] for start in starts})


def test_the_log_is_complete_and_conserves_counts(
    undisturbed: Path,
) -> None:
    whole = undisturbed
    losses = rows(whole / "losses.jsonl")
    assert [row["step"] for row in losses] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows(whole / "evals.jsonl")] == [0, 100, 200, 300]
    for row in losses:
        for group in ("modality", "source"):
            parts = [v for key, v in row.items() if key.startswith(f"tokens/{group}/")]
            assert sum(parts) == row["tokens"]
    positions = sum(row["fill_fraction"] for row in losses) * 8 * 128
    assert positions == pytest.approx(losses[-1]["tokens"])
    assert losses[-1]["loss"] < losses[0]["loss"] - 1


def test_a_document_that_cannot_be_decoded_is_counted_and_listed_each_epoch(
    undisturbed: Path,
) -> None:
    whole = undisturbed
    dropped = [row for row in rows(whole / "quarantine.jsonl") if row["split"] == "train"]
    last = rows(whole / "losses.jsonl")[-1]
    assert last["dropped/image_decode"] == len(dropped) > 1  # more than one epoch passed
    assert {(row["source"], row["key"]) for row in dropped} == {("caption", "cut")}


def test_an_image_that_is_missing_is_counted_each_epoch(undisturbed: Path) -> None:
    """Its document is trained on all the same: the text comes again and again."""
    counts = [row["skipped_images"] for row in rows(undisturbed / "losses.jsonl")]
    assert counts == sorted(counts)
    assert set(counts) == set(range(counts[-1] + 1)) > {0, 1}


def test_the_same_command_again_says_finished(corpus: Path, undisturbed: Path) -> None:
    whole = undisturbed
    before = (whole / "losses.jsonl").read_bytes()
    done = run(command(corpus, whole.parent, *WHOLE))
    assert (done.returncode, "is finished" in done.stdout) == (0, True), done.stderr
    assert (whole / "losses.jsonl").read_bytes() == before


def test_a_checkpoint_without_its_marker_is_not_loaded(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(undisturbed, whole)
    (whole / "checkpoints" / f"step_{STEPS:08d}" / "COMPLETE").unlink()
    before = rows(whole / "losses.jsonl")
    done = run(command(corpus, tmp_path, *WHOLE))
    assert f"after step {STEPS - 5} of {STEPS}" in done.stdout, done.stderr
    assert rows(whole / "losses.jsonl") == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.width=64", r"model.width is 64 but .* was made with 32; restore"),
        ("model.vocab_size=1024", r"model.vocab_size is 1024 but .* made with 512"),
        ("data.global_rows=16", r"data.global_rows is 16 but .* made with 8"),
        ("data.sources.text.weight=0.2", r"data.sources.text.weight is 0.2 but .* made with 0.1"),
        (
            "data.weight_changes=[{step:5,weights:{text:1.0}}]",
            r"data.weight_changes is \[.*'step': 5.*\] but .* was made with \[\]; restore",
        ),
        ("optim.beta2=0.9", r"optim.beta2 is 0.9 but .* made with 0.95"),
        ("optim.learning_rate=1e-2", r"optim.learning_rate is 0.01 but .* made with 0.0015"),
        ("schedule.total_steps=299", r"schedule.total_steps is 299 but .* is at step 300"),
        ("schedule.min_fraction=0.1", r"schedule.\* gives the rate 0.00015 at step 300"),
        ("evaluation.rows_per_source=5", r"rows_per_source is 5 but .* made with 4"),
        ("run.resume=never", r"run.resume is never but .* has the checkpoint step_00000300"),
        ("data.sources.text.train=OTHER", r"corpus fingerprint\) is .* but .* was made with"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(
    corpus: Path, undisturbed: Path, world: World, override: str, said: str
) -> None:
    whole = undisturbed
    override = override.replace("OTHER", f"{corpus}/text/train-000000.tar")
    arguments = overrides(corpus, whole.parent, "run.name=whole", override)
    with pytest.raises(UserError, match=said):
        plan_and_begin(arguments, world=world)


def test_a_run_that_was_tested_on_other_rows_is_refused(undisturbed: Path) -> None:
    """Held-out rows were planned in another order before, which its checkpoints do not name."""
    checkpoint = complete(undisturbed)[-1]
    now = read_progress(checkpoint).identity
    before = {key: value for key, value in now.items() if "their order" not in key}
    assert len(before) == len(now) - 1
    with pytest.raises(
        UserError, match=r"\(their order\) is by the source alone but .* with None; .* version"
    ):
        refuse_contradiction(before, now, checkpoint=checkpoint)


def test_another_tokenizer_is_refused_by_name(
    corpus: Path, undisturbed: Path, world: World, tmp_path: Path
) -> None:
    """Also when the shards were indexed with it, so that nothing else stands in the way."""
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy, ignore=shutil.ignore_patterns("*.index"))
    other = corpora.train_tokenizer(tmp_path / "other.model", vocab_size=290)
    for kind in corpora.KINDS:
        shards = sorted((copy / kind.value).glob("*.tar"))
        index_shards(shards, layout=Layout(kind), tokenizer=other)
    given = ("run.name=whole", f"data.tokenizer={other}")
    arguments = overrides(copy, undisturbed.parent, *given)
    with pytest.raises(UserError, match=r"data.tokenizer \(sha256\) is .* but .* made with"):
        plan_and_begin(arguments, world=world)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.tokenizer=no.model", r"data.tokenizer is no.model, which cannot be read"),
        ("data.sources.text.train=no/*.tar", r"directory no does not exist; .*data.prepare.demo"),
        ("data.sources.text.train=conf/*.tar", r"data.sources.text.train is .* no shard"),
        ("data.sources.text.train=EMPTY", r"EMPTY"),
        ("data.sources.text.kind=caption", r"python -m data.prepare.index"),
        ("data.context_tokens=16", r"data.context_tokens is 16 but an image"),
        ("data.row_tokens=100", r"data.row_tokens is 100 .* multiple of the context"),
        ("optim.learning_rate=-0.1", r"optim.learning_rate is -0.1; set it above 0"),
        ("optim.learning_rate=nan", r"optim.learning_rate is nan; set it above 0"),
        ("model.depth=abc", r"Value 'abc' of type 'str' could not be converted to Integer"),
        ("data.sources.text.weight=0", r"data.sources.text.weight is 0.0; set it above 0"),
        ("engine.micro_batch=3", r"data.global_rows is 8, engine.micro_batch is 3"),
        ("data.repeat=false", r"schedule needs 307,200 tokens but the corpus serves [\d,]+"),
        ("data.sources.text.max_epochs=1", r"text is asked for [\d,]+ tokens .*max_epochs is 1;"),
        ("data.weight_changes=[{step:5,weights:{x:1}}]", r"gives weights to x after step 5"),
        ("model.vocab_size=64", r"model.vocab_size is 64 but the tokenizer"),
        ("model.heads=3", r"model.heads is 3 and model.width is 32"),
        ("engine=zero0 engine.precision=bf16", r"zero_stage is 0 and engine.precision is bf16"),
        ("schedule.total_tokens=1000", r"total_tokens is 1000 and schedule.total_steps is 300"),
        ("schedule.warmup_steps=301", r"schedule.warmup_steps is 301"),
        ("data.sources.text.held_out=SHARED", r"train-000000.tar in train and in held_out"),
        ("+model.widht=64", r"Key 'widht' not in 'ModelConfig'"),
        ("run.name=a/b", r"run.name is 'a/b'; give one folder name"),
        ("run.resume=must", r"run.resume is must but .* no complete checkpoint"),
    ],
)
def test_what_a_user_can_get_wrong_is_refused_before_work_starts(
    corpus: Path, tmp_path: Path, world: World, override: str, said: str
) -> None:
    empty = tmp_path / "empty.tar"
    empty.touch()
    override = override.replace("SHARED", f"{corpus}/text/train-000000.tar")
    words = override.replace("EMPTY", str(empty)).split()
    arguments = overrides(corpus, tmp_path, "run.name=new", *words)
    with pytest.raises(UserError, match=said.replace("EMPTY", str(empty))) as refusal:
        plan_and_begin(arguments, world=world)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "new").exists()


def test_errors_on_the_command_line_are_one_sentence(corpus: Path, tmp_path: Path) -> None:
    cases = {
        "model.widht=64": "Key 'widht' not in 'ModelConfig'",
        "model=nope": "Could not find 'model/nope'",
        "optim.learning_rate=-1": "optim.learning_rate is -1.0; set it above 0.",
    }
    processes = {
        override: subprocess.Popen(
            command(corpus, tmp_path, override), stderr=subprocess.PIPE, text=True
        )
        for override in cases
    }
    for override, process in processes.items():
        _, said = process.communicate(timeout=100)
        assert process.returncode == 1
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert cases[override] in said


def test_damage_and_loss_are_said_in_a_sentence(
    corpus: Path, undisturbed: Path, world: World, tmp_path: Path
) -> None:
    """Each on a copy of the finished run, in the order in which a start would meet it."""
    cases: list[tuple[str, Callable[[Path], object], str]] = [
        (
            "state",
            lambda run: write_all(run, "step_*/state.json", "{"),
            r"damaged \(state.json has 1 bytes .*\), and no other checkpoint is intact; restore",
        ),
        (
            "marker",
            lambda run: write_all(run, "step_*/COMPLETE", ""),
            r"damaged \(COMPLETE cannot be read.*\), and no other checkpoint is intact; restore",
        ),
        (
            "format",
            lambda run: write_all(run, "step_*/state.json", '{"format": 5}'),
            r"step_00000300 has format 5 but this version reads 6; continue the run with",
        ),
        (
            "checkpoints",
            lambda run: shutil.rmtree(run / "checkpoints"),
            r"reaches step 300 but there is no checkpoint",
        ),
        (
            "log",
            lambda run: (run / "losses.jsonl").write_text(""),
            r"losses.jsonl ends at step 0 but the checkpoint of step 300",
        ),
        (
            "short log",
            lambda run: keep_lines(run / "losses.jsonl", count=100),
            r"losses.jsonl ends at step 100 but the checkpoint of step 300",
        ),
        (
            "evals",
            lambda run: (run / "evals.jsonl").write_text("[1]\n"),
            r"evals.jsonl has a line that is no row",
        ),
        (
            "line",
            lambda run: (run / "losses.jsonl").write_text("nonsense\n"),
            r"has a line that is no row",
        ),
    ]
    for name, damage, said in cases:
        shutil.copytree(undisturbed, tmp_path / name)
        damage(tmp_path / name)
        arguments = overrides(corpus, tmp_path, f"run.name='{name}'")
        with pytest.raises(UserError, match=said):
            plan_and_begin(arguments, world=world)


def write_all(run: Path, pattern: str, text: str) -> None:
    """Into a file of every checkpoint."""
    for path in (run / "checkpoints").glob(pattern):
        path.write_text(text)


def keep_lines(path: Path, *, count: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


def test_a_run_directory_is_held_by_one_run(tmp_path: Path) -> None:
    """Record locks belong to processes, so another one tries."""
    code = (
        "import sys; from pathlib import Path; from nmm import rundir\n"
        "rundir.lock(Path(sys.argv[1]), is_main=True)"
    )
    with rundir.lock(tmp_path / "run", is_main=True):
        other = run([sys.executable, "-c", code, str(tmp_path / "run")])
        assert other.returncode != 0
        assert "is being trained by another process" in other.stderr
    assert run([sys.executable, "-c", code, str(tmp_path / "run")]).returncode == 0


def test_weights_that_are_cut_are_said_in_a_sentence(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints" / f"step_{STEPS:08d}").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    device = torch.device("cpu")
    with pytest.raises(UserError, match=r"step_00000300 is damaged \(.*; give another --step"):
        read_run(tmp_path / "cut", device=device, step=STEPS)
    assert read_run(tmp_path / "cut", device=device).step == STEPS - 5
    assert "bytes instead of " in (said := capsys.readouterr().err)
    assert "going on from step_00000295" in said


def test_the_deepspeed_launcher_runs_it_with_two_processes(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The same losses with two processes as with one; the launcher's --local_rank does no harm."""
    whole = undisturbed
    given = ("run.name=two", "schedule.total_steps=40", "schedule.warmup_steps=30")
    program = command(corpus, tmp_path, *given)[1:]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    done = run([*launcher, "--master_port", str(free_port()), *program])
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "two" / "wandb").glob("offline-run-*/*.wandb"))
    mine = [row["loss"] for row in rows(tmp_path / "two" / "losses.jsonl")]
    theirs = [row["loss"] for row in rows(whole / "losses.jsonl")]
    assert mine[:30] == pytest.approx(theirs[:30], rel=1e-5)


def plan_and_begin(arguments: list[str], *, world: World) -> None:
    """What train.py does before it builds anything."""
    settings = load(compose(arguments))
    plan = begin.make_plan(settings, world=world)
    begin.begin(plan, settings, world=world)
