"""Is the memory of a loader worker flat, however many documents it reads?

    python -m bench.worker [--documents 1000000]

Reads that many small captions, with their JPEGs, through one worker process, and prints the
resident memory of the worker and of the training process at every tenth of the way.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from data.corpus import Corpus
from data.loader import Loader
from data.prepare.index import index_shards
from nmm.config import DataConfig, ImageConfig, Kind, Layout, SourceConfig
from tests.corpora import VOCAB_SIZE, tokenizer_path, write_shards

STORED_DOCUMENTS = 20_000
IMAGE = ImageConfig(side_pixels=16, patch_pixels=4)


def loader(directory: Path) -> Iterator:
    """The steps of a corpus that is read over and over, one epoch after the other."""
    write_shards(
        directory,
        kind=Kind.caption,
        name="train",
        documents=STORED_DOCUMENTS,
        per_shard=1000,
        seed=0,
    )
    shards = sorted(directory.glob("*.tar"))
    index_shards(shards, layout=Layout(Kind.caption), tokenizer=tokenizer_path(), workers=2)
    pattern = f"{directory}/*.tar"
    config = DataConfig(
        sources={"caption": SourceConfig(Kind.caption, pattern, pattern, 1.0)},
        tokenizer=str(tokenizer_path()),
        global_rows=4,
        repeat=True,
    )
    corpus = Corpus.open(config, image=IMAGE, vocab_size=VOCAB_SIZE, split="train")
    return iter(Loader(corpus, config, rank=0, world=1, micro_batch=4, workers=1))


def resident_mib(process: int) -> float:
    """Memory of a process without files and shared memory, so that only its own growth shows."""
    _, resident, shared, *_ = Path(f"/proc/{process}/statm").read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize() / 2**20


def worker() -> int:
    """The number of the only process below this one that loads data."""
    pid = os.getpid()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max(map(int, children), key=resident_mib)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--documents", type=int, default=1_000_000, help="to read (%(default)s)")
    documents = parser.parse_args().documents
    with tempfile.TemporaryDirectory(prefix="nmm-worker-") as directory:
        steps = loader(Path(directory))
        started, read, due = time.perf_counter(), 0, 1
        print(f"{'documents':>12}{'worker MiB':>12}{'training MiB':>14}{'documents/s':>13}")
        while due <= 10:
            (batch,), _ = next(steps)
            read += sum(map(len, batch.keys))
            if read >= due * documents / 10:
                rate = read / (time.perf_counter() - started)
                own, ours = resident_mib(worker()), resident_mib(os.getpid())
                print(f"{read:>12,}{own:>12.1f}{ours:>14.1f}{rate:>13,.0f}", flush=True)
                due += 1


if __name__ == "__main__":
    main()
