"""Ours: documents packed into rows of 4,096 positions, as training gets them."""

from collections.abc import Iterator

from bench.peers.common import Batch, Job, Stream
from data.corpus import Corpus
from data.loader import Loader
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
        window_documents=min(4096, job.documents),  # so that an epoch is served before another
        repeat=True,  # rows across the end of an epoch, so that the last step is whole too
    )
    image = ImageConfig(side_pixels=job.side_pixels, patch_pixels=PATCH_PIXELS)
    corpus = Corpus.open(config, image=image, vocab_size=2**20, split="train")
    assert state is None or isinstance(state, dict)
    loader = Loader(
        corpus, config, rank=0, world=1, micro_batch=ROWS, workers=job.workers, state=state
    )
    last: dict = {}

    def epoch() -> Iterator[Batch]:
        left = job.documents
        for (batch,), after in loader:
            last.update(after)
            documents = len(batch.pixels)
            text = int((batch.modality == Modality.text).sum())
            fill = float((batch.document > 0).float().mean())
            yield Batch(batch.pixels, text - 2 * documents, fill)
            left -= documents
            if left <= 0:
                return

    return epoch(), lambda: dict(last)
