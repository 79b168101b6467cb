"""webdataset + Pillow + torch's DataLoader, as its documentation shows; it has no saved position.

To resume it reads and drops what was served, before the decoder.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import torch
import webdataset
from PIL import Image

from bench.peers.common import CaptionCode, Job, Stream, batches, collate

SHUFFLED_DOCUMENTS = 100


def open_stream(job: Job, state: object) -> Stream:
    return stream(job, state, pair=partial(_pair, code=CaptionCode(job)))


def stream(job: Job, state: object, *, pair: object) -> Stream:
    """`pair` makes (pixels, ids) from a sample's (image bytes, text bytes)."""
    assert state is None or isinstance(state, int)
    served = [state or 0]
    shards = sorted(map(str, Path(job.shards).glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
        .shuffle(SHUFFLED_DOCUMENTS, seed=0)
        .compose(partial(_skip, batches=served[0], size=job.batch))
        .to_tuple("jpg;jpeg;png;webp", "txt")
        .map(pair)
        .batched(job.batch, collation_fn=collate)
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=job.workers)

    def counted() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in loader:
            served[0] += 1
            yield batch

    return batches(counted()), lambda: served[0]


def _skip(samples: Iterable, *, batches: int, size: int) -> Iterator:
    """Without this worker's share of what was served; batches come from the workers in turn."""
    worker = torch.utils.data.get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return islice(samples, size * -((number - batches) // workers), None)


def _pair(sample: tuple[bytes, bytes], *, code: CaptionCode) -> tuple:
    return code.pair((Image.open(BytesIO(sample[0])), sample[1].decode()))
