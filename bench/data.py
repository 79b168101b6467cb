"""Our data pipeline against plain webdataset, megatron-energon and mosaicml-streaming.

    bench/install.sh                              # once: the peers' environments
    python -m bench.data                          # synthetic photos of about 400x600
    python -m bench.data --shards DIR --cores 2   # your caption shards: DIR/*.tar, KEY.jpg, KEY.txt

    python -m bench.data --in-process             # no worker processes: what a document costs

All read the same documents on the same pinned cores, with one worker process per core, and give
uint8 pixels of the same size and token ids; ours packs them into rows of 4,096 as well. It comes
twice: tokenizing like the others, and with the token ids that its index can store. Pipelines take
turns, because other programs may load the machine: only ratios within a turn mean something.
Printed are medians of the turns with their least and greatest value.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import photos
from bench.processes import ROOT, measured, quiet
from data.prepare.index import index_shards
from data.prepare.tokenizer import make
from nmm.config import Kind, Layout

BATCH_DOCUMENTS = 64  # about the documents of our four rows: all hand over equally much at a time
LEAST_DOCUMENTS = 12 * BATCH_DOCUMENTS
SIDE_PIXELS = 224
VOCAB_SIZE = 320
COLUMNS = (
    "pipeline",
    "images/s per core",
    "ours / it",
    "CPU ms per image",
    "it / ours",
    "start-up s",
    "resume at 80 % s",
    "goes on exactly",
    "peak memory MB",
    "fill",
)


@dataclass(frozen=True)
class Pipeline:
    name: str
    module: str
    python: Path
    shards: str


@dataclass
class Turn:
    """What one pipeline did in one turn."""

    figures: dict
    resumed: dict
    peak_bytes: int

    @property
    def exact(self) -> bool:
        return self.figures["following"] == self.resumed["following"]


def pipelines() -> list[Pipeline]:
    """Ours first; those whose environment is not made are left out and named."""
    here = Path(sys.executable)
    energon, streaming = (
        ROOT / f"bench/.venv-{peer}/bin/python" for peer in ("energon", "streaming")
    )
    known = [
        Pipeline("ours", "ours", here, "ours"),
        Pipeline("ours, token ids stored", "ours", here, "stored"),
        Pipeline("webdataset + Pillow", "plain", here, "tars"),
        Pipeline("webdataset + our decoder", "plain_fast", here, "tars"),
        Pipeline("megatron-energon", "energon", energon, "energon"),
        Pipeline("mosaicml-streaming", "streaming", streaming, "mds"),
    ]
    for pipeline in known:
        if not pipeline.python.exists():
            print(f"left out: {pipeline.name}; make its environment with bench/install.sh")
    return [pipeline for pipeline in known if pipeline.python.exists()]


def prepare(shards: Path, work: Path, *, chosen: list[Pipeline]) -> dict:
    """What each pipeline needs once, in WORK and outside of the timing; returns the job."""
    tars = sorted(shards.glob("*.tar"))
    for name in ("ours", "stored", "tars", "energon"):
        (work / name).mkdir()
        for tar in tars:
            (work / name / tar.name).symlink_to(tar.resolve())
    tokenizer = work / "tokenizer.model"
    make(
        [(Layout(Kind.caption), tars)],
        vocab_size=VOCAB_SIZE,
        characters=500_000,
        seed=0,
        out=tokenizer,
    )
    for name, store_tokens in (("ours", False), ("stored", True)):
        indexed = index_shards(
            sorted((work / name).glob("*.tar")),
            layout=Layout(Kind.caption),
            tokenizer=tokenizer,
            store_tokens=store_tokens,
        )
    for pipeline in chosen:
        if pipeline.module == "energon":
            quiet([pipeline.python.with_name("energon"), "prepare", work / "energon", *ENERGON])
        if pipeline.module == "streaming":
            convert = [pipeline.python, "-m", "bench.peers.run", "streaming", "convert"]
            quiet([*convert, work / "tars", work / "mds"])
    return {
        "tokenizer": str(tokenizer),
        "documents": indexed.documents,
        "batch": BATCH_DOCUMENTS,
        "side_pixels": SIDE_PIXELS,
    }


ENERGON = (
    *("--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample"),
    *("--field-map", json.dumps({"image": "jpg", "caption": "txt"})),
)


def take_turn(
    pipeline: Pipeline, *, job: dict, work: Path, cores: list[int], in_process: bool
) -> Turn:
    """One epoch, and a restart at 80 % of it in a new process."""
    path = work / f"{pipeline.module}.json"
    path.write_text(
        json.dumps(
            {
                **job,
                "name": pipeline.name,
                "shards": str(work / pipeline.shards),
                "workers": 0 if in_process else len(cores),
            }
        )
    )
    pinned = ["taskset", "-c", ",".join(map(str, cores)), pipeline.python]
    command = [*map(str, pinned), "-m", "bench.peers.run", pipeline.module]
    figures, peak_bytes = measured([*command, "epoch", str(path)])
    resumed, _ = measured([*command, "resume", str(path)])
    assert 0 <= job["documents"] - figures["documents"] < job["batch"], (pipeline.name, figures)
    return Turn(figures, resumed, peak_bytes)


def check_equal_work(turns: dict[str, list[Turn]]) -> None:
    """All had the same documents: text tokens and mean brightness of each agree within 5 %."""
    ours = turns["ours"][0].figures
    for name, (turn, *_) in turns.items():
        theirs = turn.figures
        for what in ("text_tokens", "pixel_sum"):
            ratio = theirs[what] / theirs["documents"] / (ours[what] / ours["documents"])
            assert abs(ratio - 1) < 0.05, (name, what, theirs, ours)


def table(turns: dict[str, list[Turn]], *, cores: int) -> str:
    """Markdown; one image per document, so documents/s are images/s."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    our_rates, our_cpu = _rates(turns["ours"], cores), _cpu_ms(turns["ours"])
    for name, taken in turns.items():
        rates, cpu = _rates(taken, cores), _cpu_ms(taken)
        faster = [mine / other for mine, other in zip(our_rates, rates, strict=True)]
        cheaper = [other / mine for mine, other in zip(our_cpu, cpu, strict=True)]
        fill = taken[0].figures["fill"]
        cells = [
            f"{name} {taken[0].figures['version']}",
            _spread(rates, digits=0),
            "" if name == "ours" else _spread(faster, digits=2),
            _spread(cpu, digits=2),
            "" if name == "ours" else _spread(cheaper, digits=2),
            _spread([turn.figures["start_seconds"] for turn in taken], digits=2),
            _spread([turn.resumed["resume_seconds"] for turn in taken], digits=2),
            "yes" if all(turn.exact for turn in taken) else "no",
            _spread([turn.peak_bytes / 1e6 for turn in taken], digits=0),
            "" if fill is None else f"{fill:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rates(turns: list[Turn], cores: int) -> list[float]:
    return [turn.figures["documents_per_second"] / cores for turn in turns]


def _cpu_ms(turns: list[Turn]) -> list[float]:
    """Of all processes; it feels other programs on the machine less than the rate does."""
    return [turn.figures["cpu_seconds"] / turn.figures["documents"] * 1e3 for turn in turns]


def _spread(values: list[float], *, digits: int) -> str:
    least, middle, most = (f"{f(values):,.{digits}f}" for f in (min, median, max))
    return f"**{middle}** ({least}-{most})"


def run(shards: Path, *, cores: int, repeats: int, in_process: bool) -> None:
    available = sorted(os.sched_getaffinity(0))
    if cores > len(available):
        sys.exit(f"error: --cores is {cores}, but this process may use {len(available)}.")
    chosen = pipelines()
    with tempfile.TemporaryDirectory(prefix="nmm-bench-") as directory:
        work = Path(directory)
        job = prepare(shards, work, chosen=chosen)
        if job["documents"] < LEAST_DOCUMENTS:
            sys.exit(
                f"error: there are {job['documents']} documents, and behind 80 % of them no batch "
                f"would follow to resume with; give {LEAST_DOCUMENTS} or more."
            )
        turns: dict[str, list[Turn]] = {pipeline.name: [] for pipeline in chosen}
        for repeat in range(repeats):
            for pipeline in chosen:
                turn = take_turn(
                    pipeline,
                    job=job,
                    work=work,
                    cores=available[-cores:],
                    in_process=in_process,
                )
                turns[pipeline.name].append(turn)
                rate = turn.figures["documents_per_second"] / cores
                print(f"turn {repeat + 1}/{repeats}  {pipeline.name:<26}{rate:>8,.0f}", flush=True)
        check_equal_work(turns)
    print(
        f"\n{job['documents']:,} documents, cores: {cores}, turns: {repeats}"
        f"{', no worker processes' if in_process else ''}\n"
    )
    print(table(turns, cores=cores))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", type=Path, metavar="DIR", help="caption shards (synthetic)")
    parser.add_argument("--documents", type=int, default=1024, help="synthetic ones (%(default)s)")
    parser.add_argument("--cores", type=int, default=1, help="to pin to (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--in-process", action="store_true", help="no workers; 1 core")
    options = parser.parse_args()
    if options.in_process and options.cores != 1:
        sys.exit(f"error: --cores is {options.cores}, but --in-process uses one; leave it out.")
    if options.shards is not None:
        run(
            options.shards,
            cores=options.cores,
            repeats=options.repeats,
            in_process=options.in_process,
        )
        return
    with tempfile.TemporaryDirectory(prefix="nmm-photos-") as directory:
        photos.write(Path(directory), documents=options.documents)
        run(
            Path(directory),
            cores=options.cores,
            repeats=options.repeats,
            in_process=options.in_process,
        )


if __name__ == "__main__":
    main()
