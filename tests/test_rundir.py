"""The run directory: what docs and README promise of its files, on the run that nobody stopped."""

import hashlib
import json
import re
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytest

from data.corpus import Corpus
from nmm import schedule
from nmm.config import Config, compose, load, read_yaml
from nmm.log import read_rows
from nmm.model import build
from nmm.rundir import PACKAGES
from tests import corpora, runs

ROOT = Path(__file__).resolve().parent.parent
EVENTS = {"dropped/REASON"}  # keys that only an event brings into a row
# Signals of layers with experts, or of those that take some tokens.
BY_LAYER = tuple(
    f"signals/{name}/"
    for name in (
        "router_grad_norm",
        "depth_router_grad_norm",
        "load",
        "dropped_fraction",
        "entropy",
        "kept_fraction",
    )
)
NAMES = {
    "source": {kind.value for kind in corpora.KINDS},
    "kind": {kind.value for kind in corpora.KINDS},
    "modality": {"text", "image"},
}


@pytest.fixture(scope="module")
def run() -> Path:
    return runs.undisturbed()


@pytest.fixture(scope="module")
def settings() -> Config:
    """What was asked on the command line."""
    return load(compose(runs.overrides(runs.corpus(), runs.undisturbed().parent, *runs.WHOLE)))


def documented_keys(log: str) -> set[str]:
    """The first column of the table of docs/scaling.md that explains the keys of a log."""
    lines = iter((ROOT / "docs" / "scaling.md").read_text().splitlines())
    next(line for line in lines if line.startswith(f"| key of `{log}` |"))
    keys: set[str] = set()
    for line in lines:
        if not line.startswith("|"):
            break
        keys.update(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return keys


def general(key: str) -> str:
    """`tokens/source/caption` as it is documented: `tokens/source/NAME`."""
    first, *rest = key.split("/")
    if first == "dropped" and rest:
        return "dropped/REASON"
    if first == "signals":
        if rest[0] in ("logit_z", "grad_norm"):
            return f"signals/{rest[0]}/{'PART' if rest[0] == 'grad_norm' else rest[1]}"
        return f"signals/{rest[0]}/" + "/".join(("LAYER", "NAME")[: len(rest) - 1])
    if len(rest) == 2 and rest[1] in NAMES[rest[0]]:
        return f"{first}/{rest[0]}/NAME"
    return key


def is_sparse(key: str) -> bool:
    """Is it of other runs only? See tests/test_sparse_runs.py and tests/test_masking.py."""
    return key in ("causal", "objective") or key.startswith(("moe/", "mod/", "ahead/", *BY_LAYER))


@pytest.mark.parametrize("log", ["losses.jsonl", "evals.jsonl"])
def test_every_key_is_documented_and_every_documented_key_is_written(
    run: Path, settings: Config, log: str
) -> None:
    documented = {key for key in documented_keys(log) if not is_sparse(key)}
    signals = {key for key in documented if key.startswith("signals/")}
    assert len(documented) > 5
    events: set[str] = set()
    for row in read_rows(run / log):
        written = {general(key) for key in row}
        due = row["step"] % settings.log.signals_every_steps == 0
        expected = documented if due else documented - signals
        assert written - EVENTS == expected - EVENTS, row["step"]
        events |= written & EVENTS
    assert events == documented & EVENTS  # the corpus of this run has a bad document


def test_rates_and_phases_are_those_of_the_schedule(run: Path, settings: Config) -> None:
    """As a table: 300 steps are a warmup of 30, 225 at the peak, 45 of cooldown to exactly 0."""
    phases = schedule.Phases(warmup_steps=30, constant_steps=225, cooldown_steps=45)
    peak = settings.optim.learning_rate
    rows = read_rows(run / "losses.jsonl")
    for row in rows:
        step = row["step"]
        rate = schedule.learning_rate(settings.schedule, phases=phases, peak=peak, step=step)
        assert (row["lr"], row["phase"]) == (rate, schedule.phase_name(phases, step=step)), step
    rates = [row["lr"] for row in rows]
    assert rates[:30] == pytest.approx([peak * step / 30 for step in range(1, 31)])
    assert rates[30:255] == [peak] * 225
    assert rates[255:] == sorted(rates[255:], reverse=True)
    assert (rates[254] > rates[255], rates[-1]) == (True, 0)


def test_the_files_hold_what_was_asked(run: Path, settings: Config) -> None:
    assert read_yaml(run / "config.yaml") == settings
    asked = runs.overrides(runs.corpus(), run.parent, *runs.WHOLE)
    assert (run / "overrides.txt").read_text().splitlines() == asked


def test_the_manifest_holds_sizes_fingerprints_and_every_start(run: Path, settings: Config) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    starts = manifest.pop("starts")
    data, model = settings.data, settings.model
    corpus = Corpus.open(data, image=model.image, vocab_size=model.vocab_size, split="train")
    sizes = {name: p.numel() for name, p in build(model, seed=0).named_parameters()}
    # The paper's N: embeddings in, patch projection and norms out.
    outside = [name for name in sizes if name.startswith("patch.") or "norm" in name]
    expected = sum(sizes.values()) - sum(sizes[name] for name in outside)
    assert manifest == {
        "N": expected,
        "N_active": expected,
        "N_vision": 0,
        "parameters_total": sum(sizes.values()),
        "vocab_size": 512,
        "tokenizer_sha256": hashlib.sha256(Path(data.tokenizer).read_bytes()).hexdigest(),
        "codebook_sha256": None,
        "corpus_fingerprint": corpus.fingerprint,
        "source_tokens": {source.name: source.tokens for source in corpus.sources},
        "total_steps": runs.STEPS,
        "parent": None,
    }
    assert (starts[0]["step"], starts[0]["processes"]) == (0, 1)
    decoders = {"pillow", "simplejpeg", "numpy", "sentencepiece", "torch", "webdataset"}
    for start in starts:
        assert start["versions"].keys() >= decoders
        assert start["versions"] == {name: version(name) for name in PACKAGES}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", start["time"])
        if (ROOT / ".git").exists():
            assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", start["git_commit"])


def test_only_the_newest_checkpoints_remain(run: Path, settings: Config) -> None:
    every, keep = settings.checkpoint.every_steps, settings.checkpoint.keep_last
    kept = [runs.STEPS - every * back for back in reversed(range(keep))]
    found = sorted((run / "checkpoints").glob("step_*"))
    assert [path.name for path in found] == [f"step_{step:08d}" for step in kept]
    assert all((path / "COMPLETE").exists() for path in found)


def test_the_console_has_a_line_for_every_logged_step_and_evaluation(run: Path) -> None:
    said = (run / "console.log").read_text()
    for log, pattern in (("losses", r"^step (\d+)/300 "), ("evals", r"^held-out .* step (\d+):")):
        steps = map(int, re.findall(pattern, said, flags=re.MULTILINE))
        logged = [row["step"] for row in read_rows(run / f"{log}.jsonl")]
        assert list(dict.fromkeys(steps)) == logged  # a step after a resumption is said again


def test_the_parts_of_the_time_add_up(run: Path, settings: Config) -> None:
    """Phases of a row hold its step; checkpoints and evaluations are in the row that follows."""
    rows = read_rows(run / "losses.jsonl")
    work = ("data", "forward", "backward", "optimizer")
    for row in rows:
        parts = sum(row[f"seconds/{phase}"] for phase in work)
        assert 0 < parts <= row["seconds"]
        after_save = (row["step"] - 1) % settings.checkpoint.every_steps == 0 < row["step"] - 1
        assert (row["seconds/checkpoint"] > 0) == after_save, row["step"]
        assert (row["seconds/evaluation"] > 0) == (row["step"] in (1, 101, 201)), row["step"]
        assert (row["seconds/start"] > 0) == (row["step"] == 1)
    first, last = (datetime.fromisoformat(rows[at]["wall_time"]).timestamp() for at in (0, -1))
    spent = sum(v for row in rows[1:] for key, v in row.items() if key.startswith("seconds/"))
    assert spent == pytest.approx(last - first, abs=1.1)  # wall times are whole seconds
    peaks = [row["peak_memory_bytes"] for row in rows]
    assert 50e6 < peaks[0] <= peaks[-1] == max(peaks)
