"""megatron-energon with the same Pillow code, from shards that `energon prepare` has indexed."""

from collections.abc import Iterator

import torch
from megatron.energon import (
    CaptioningSample,
    DefaultTaskEncoder,
    SampleDecoder,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
)

from bench.peers.common import CaptionCode, Job, Stream, batches, collate

SHUFFLED_DOCUMENTS = 100


class Encoder(DefaultTaskEncoder):
    decoder = SampleDecoder(image_decode="pilrgb")

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.code = CaptionCode(job)

    def encode_sample(self, sample: CaptioningSample) -> tuple:
        return self.code.pair((sample.image, sample.caption))

    def batch(self, samples: list) -> tuple[torch.Tensor, torch.Tensor]:
        return collate(samples)

    def encode_batch(self, batch: tuple) -> tuple:
        return batch


def open_stream(job: Job, state: object) -> Stream:
    dataset = get_train_dataset(
        job.shards,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=job.workers),
        batch_size=job.batch,
        shuffle_buffer_size=SHUFFLED_DOCUMENTS,
        max_samples_per_sequence=SHUFFLED_DOCUMENTS,
        task_encoder=Encoder(job),
        repeat=False,
    )
    loader = get_savable_loader(dataset)
    if state is not None:
        loader.restore_state_rank(state)

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from loader

    return batches(pairs()), loader.save_state_rank
