"""The whole loop in miniature, `make demo`: each step is a command that you can run yourself."""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from data.prepare.scenes import words_named_in, words_true_of
from nmm.log import duration

CORPUS = Path("data/corpora/demo")
RUN = Path("runs/demo")
TRAIN = (
    os.path.relpath(Path(__file__).parents[1] / "train.py"),
    "run.name=demo",
    "engine.precision=fp32",
    "data.global_rows=2",
    "optim.learning_rate=2e-3",
    "checkpoint.every_steps=100",
    "evaluation.every_steps=175",
    "evaluation.rows_per_source=32",
    "evaluation.at_start=true",
)
HELD_OUT_CAPTIONS = 128
CLOSING = """
The demo took {took}. Everything of the run is in {run}/:
  losses.jsonl, evals.jsonl   every number of training and of the held-out evaluation
  loss.png                    the loss curves
  captions.png, .html, .jsonl held-out images with the captions that the model wrote
  checkpoints/                weights, optimizer, place in the data
  config.yaml, manifest.json  what was asked, and with which versions
The shards that it trained on are in {corpus}/. Next: "Your own shards" in README.md."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=700, help="of training (%(default)s)")
    parser.add_argument("--size", type=float, default=1.0, help="of the corpus (%(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    corpus = ("-m", "data.prepare.demo", "--size", str(options.size))
    step("the corpus, its tokenizer and its index", *corpus)
    step("training", *TRAIN, f"schedule.total_steps={options.steps}")
    captions = ("--run", f"{RUN}", "--held-out", f"{HELD_OUT_CAPTIONS}")
    step("captions of held-out images", "-m", "nmm.generate", *captions)
    images = ("-m", "nmm.evaluate", "--run", f"{RUN}", "--image-gap", "--json")
    report(json.loads(step("does it look at the images?", *images, quiet=True)))
    step("the loss curves", "-m", "nmm.plot", "--run", f"{RUN}")
    print(CLOSING.format(took=duration(time.perf_counter() - start), run=RUN, corpus=CORPUS))


def step(title: str, *arguments: str, quiet: bool = False) -> str:
    """Announce a command and run it; its failure ends the demo.

    Its output is shown, or returned when `quiet`.
    """
    print(f"\n== {title}\n$ python {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE if quiet else None, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def report(evaluation: dict) -> None:
    """The two numbers that say whether the model looks at its images."""
    own, other = evaluation["caption/own_images"], evaluation["caption/other_images"]
    print(
        f"captions cost {own:.3f} nats per token with their own images and {other:.3f} with "
        f"those of other documents: {other - own:.2f} nats are known from the picture "
        "(at least 0.5 expected)"
    )
    named = list(named_and_true())
    only_true = sum(bool(words) and words <= true for words, true in named) / len(named)
    exactly = sum(words == true for words, true in named) / len(named)
    print(
        f"{only_true:.0%} of {len(named)} held-out captions name only colours and shapes that "
        f"are in the picture (at least 80% expected); {exactly:.0%} name all of them"
    )


def named_and_true() -> Iterator[tuple[set[str], set[str]]]:
    """For every caption the model wrote: its colour and shape words, and those of the scene."""
    scenes = dict(held_out_scenes())
    for line in (RUN / "captions.jsonl").read_text().splitlines():
        caption = json.loads(line)
        yield words_named_in(caption["written"]), words_true_of(scenes[caption["key"]])


def held_out_scenes() -> Iterator[tuple[str, dict]]:
    """(SHARD/KEY, what the picture shows) of the demo's held-out captions."""
    for shard in sorted((CORPUS / "caption").glob("held_out-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield f"{shard.name}/{member.name.removesuffix('.json')}", json.load(file)


if __name__ == "__main__":
    main()
