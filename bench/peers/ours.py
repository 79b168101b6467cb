"""Ours: documents packed into rows of 4,096 positions, as training gets them."""

from collections.abc import Iterator
from itertools import islice

from bench.peers.common import Batch, Job, Stream
from data.corpus import Corpus
from data.loader import Loader
from data.plan import plan_places
from nmm.batch import Modality
from nmm.config import DataConfig, ImageConfig, Kind, SourceConfig

PATCH_PIXELS = 14
ROWS, ROW_TOKENS, CONTEXT_TOKENS = 4, 4096, 1024


def open_stream(job: Job, state: object) -> Stream:
    shards = f"{job.shards}/*.tar"
    config = DataConfig(
        sources={"caption": SourceConfig(Kind.caption, train=shards, held_out=shards, weight=1)},
        tokenizer=job.tokenizer,
        context_tokens=CONTEXT_TOKENS,
        row_tokens=ROW_TOKENS,
        global_rows=ROWS,
        repeat=False,
    )
    image = ImageConfig(side_pixels=job.side_pixels, patch_pixels=PATCH_PIXELS)
    corpus = Corpus.open(config, image=image, vocab_size=2**20, split="train")
    assert state is None or isinstance(state, dict)
    loader = Loader(
        corpus, config, rank=0, world=1, micro_batch=ROWS, workers=job.workers, state=state
    )
    # The last rows, fewer than a step has, are left out, as in training.
    steps = sum(1 for _ in plan_places(corpus, config, loader.state)) // ROWS
    last: dict = {}

    def epoch() -> Iterator[Batch]:
        for (batch,), after in islice(loader, steps):
            last.update(after)
            text = int((batch.modality == Modality.text).sum())
            fill = float((batch.document > 0).float().mean())
            yield Batch(batch.pixels, text - 2 * len(batch.pixels), fill)

    return epoch(), lambda: dict(last)
