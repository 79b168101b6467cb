"""A small run of train.py that nobody disturbs, once per session, and how to start others."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from data.prepare.index import index_shards
from data.shards import ShardWriter
from nmm.config import Layout
from tests import corpora

MACHINE_KEYS = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "wall_time")
STEPS = 300


@cache
def corpus() -> Path:
    """Three sources with images.

    A caption's JPEG is cut short, which only decoding can find; an image of a story is missing.
    """
    directory = corpora.scratch() / "run-corpus"
    for kind in corpora.KINDS:
        for split, documents in (("train", 90), ("held_out", 20)):
            corpora.write_shards(
                directory / kind.value,
                kind=kind,
                name=split,
                documents=documents,
                per_shard=30,
                seed=split == "train",
            )
    rng = np.random.default_rng(0)
    with ShardWriter(directory / "caption", name="train-bad", documents_per_shard=1) as writer:
        picture = corpora.jpeg(rng, width=256, height=256)
        writer.caption("cut", image=picture[: len(picture) - 300], text=corpora.sentence(rng, 5))
    story = {"texts": [corpora.sentence(rng, 5), None], "images": [None, "0.jpg"]}
    holes = [("hole.json", json.dumps(story).encode())]
    corpora.write_tar(directory / "interleaved" / "train-holes.tar", holes)
    for kind in corpora.KINDS:
        shards = sorted((directory / kind.value).glob("*.tar"))
        index_shards(shards, layout=Layout(kind), tokenizer=corpora.tokenizer_path())
    return directory


# Images as codes have none: the defaults again, instead of what `overrides` says.
DEFAULT_PIXELS = {"model.image.side_pixels": "64", "model.image.patch_pixels": "8"}


def overrides(corpus: Path, runs: Path, *more: str) -> list[str]:
    """A run with checkpoints every 5 steps; the smallest source repeats several times."""
    sources = [
        f"data.sources.{kind.value}.{key}={corpus}/{kind.value}/{key}*.tar"
        for kind in corpora.KINDS
        for key in ("train", "held_out")
    ]
    return [
        *sources,
        f"data.tokenizer={corpora.tokenizer_path()}",
        f"run.dir={runs}",
        "model.width=32",
        "model.depth=2",
        "model.heads=2",
        "model.vocab_size=512",
        "model.image.side_pixels=16",
        "model.image.patch_pixels=4",
        "data.context_tokens=64",
        "data.row_tokens=128",
        "data.global_rows=8",
        "data.window_documents=64",
        "data.max_bad_fraction=0.2",
        "data.repeat=true",
        "engine.precision=fp32",
        "engine.micro_batch=4",
        f"schedule.total_steps={STEPS}",
        "checkpoint.every_steps=5",
        "evaluation.every_steps=100",
        "evaluation.at_start=true",
        "evaluation.rows_per_source=4",
        *more,
    ]


def command(corpus: Path, runs: Path, *more: str) -> list[str]:
    return [sys.executable, "train.py", *overrides(corpus, runs, *more)]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=200)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


WHOLE = ("run.name=whole", "log.wandb=off", "data.workers=0")


@cache
def undisturbed() -> Path:
    """The directory of a run that nobody stopped, made with the overrides WHOLE.

    Tests leave it as it is.
    """
    runs = corpora.scratch() / "runs"
    done = run(command(corpus(), runs, *WHOLE))
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "whole"


# Of a run with two processes, over an epoch border, an image that is cut short and a weight change;
# every launcher, and every disturbance, must give the same (tests/train_cases.py has the run).
TWO_STEPS = 60
TWO = (
    f"schedule.total_steps={TWO_STEPS}",
    "schedule.warmup_steps=30",
    f"evaluation.every_steps={TWO_STEPS // 2}",
    # With a space: the launcher of deepspeed quotes no other word, and a shell reads braces.
    f"data.weight_changes=[{{step: {TWO_STEPS // 2}, weights: {{text: 0.5}}}}]",
    "engine.micro_batch=2",
    "log.wandb=off",
    "data.workers=1",
)


# One process imports everything and is copied for each run, because engines leave traces behind.
ONE_AFTER_THE_OTHER = """
import os, sys, train
from nmm.config import compose, load
for line in sys.stdin.readlines():
    if os.fork() == 0:
        train.run(load(compose(line.split())), overrides=line.split())
        sys.stdout.flush()
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"failed: {line}")
    for path in sys.argv[1:]:
        os.path.exists(path) and os.remove(path)
"""


def one_after_the_other(
    these: Sequence[Sequence[str]], *, remove: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """Train with the overrides of each run, up to one that fails.

    The files to `remove` are gone after the first one.
    """
    return subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, *map(str, remove)],
        input="\n".join(" ".join(words) for words in these),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
    )


def short_runs(directory: Path, *, widths: Sequence[int], steps: Sequence[int]) -> None:
    """Train every combination, one after the other, into `directory`/wWIDTH_sSTEPS."""
    these = []
    for width, count in product(widths, steps):
        more = (f"run.name=w{width}_s{count}", "log.wandb=off", "data.workers=0")
        given = dict(word.partition("=")[::2] for word in overrides(corpus(), directory, *more))
        given |= {"model.width": str(width), "schedule.total_steps": str(count)}
        given |= {"checkpoint.every_steps": "1000", "evaluation.every_steps": "1000"}
        given |= {"evaluation.at_start": "false", "evaluation.rows_per_source": "1"}
        these.append([f"{key}={value}" for key, value in given.items()])
    done = one_after_the_other(these)
    assert done.returncode == 0, done.stdout + done.stderr


def rows(path: Path) -> list[dict]:
    """The rows of a log without the keys that say how fast the machine was; refuses half lines."""
    parsed = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.split("/")[0] not in MACHINE_KEYS} for row in parsed]
