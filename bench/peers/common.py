"""What every pipeline of bench/data.py shares: its job, the clock, and the peers' plain image code.

A pipeline is a module of this package with `open_stream(job, state)`; bench/peers/run.py runs it.
"""

import gc
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image

RESUME_AT = 0.8


@dataclass(frozen=True)
class Job:
    """`shards` is the pipeline's own directory, prepared for it; one epoch is `documents`."""

    name: str
    shards: str
    tokenizer: str
    documents: int
    batch: int
    side_pixels: int
    workers: int


@dataclass(frozen=True)
class Batch:
    """pixels uint8[N, side, side, 3] and the number of text tokens of N documents.

    `fill` is the share of positions that hold a token: packed rows only.
    """

    pixels: torch.Tensor
    text_tokens: int
    fill: float | None = None


# The batches of an epoch, and what gives the state after the batch that was taken last.
Stream = tuple[Iterator[Batch], Callable[[], object]]
Opener = Callable[[Job, object], Stream]


class CaptionCode:
    """The plain way: Pillow decodes and resizes, sentencepiece tokenises, torch pads."""

    def __init__(self, job: Job) -> None:
        self.side = job.side_pixels
        self.model = sentencepiece.SentencePieceProcessor(model_file=job.tokenizer)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8[side, side, 3]: the centre square."""
        image = image.convert("RGB")
        width, height = image.size
        square = min(width, height)
        left, top = (width - square) // 2, (height - square) // 2
        image = image.crop((left, top, left + square, top + square))
        return np.asarray(image.resize((self.side, self.side), Image.Resampling.BICUBIC))

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self.model.encode(text))

    def pair(self, sample: tuple[Image.Image, str]) -> tuple[np.ndarray, torch.Tensor]:
        return self.pixels(sample[0]), self.ids(sample[1])


def collate(samples: list[tuple[np.ndarray, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels uint8[N, side, side, 3], ids int64[N, longest], padded with -1)."""
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in samples]))
    ids = [ids for _, ids in samples]
    return pixels, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)


def batches(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[Batch]:
    for pixels, ids in pairs:
        yield Batch(pixels, int((ids >= 0).sum()))


def measure_epoch(open_stream: Opener, job: Job, state_file: Path) -> dict:
    """One epoch; the rate is that of all batches but the first, whose time is the start-up."""
    start, cpu = time.perf_counter(), _cpu_seconds()
    stream, state = open_stream(job, None)
    first = next(stream)
    began = time.perf_counter()
    documents, text_tokens, following = len(first.pixels), first.text_tokens, None
    sums, fills, saved = [_pixel_sum(first)], [first.fill], None
    for batch in stream:
        if saved is not None and following is None:
            following = _digest(batch)
        documents += len(batch.pixels)
        text_tokens += batch.text_tokens
        sums.append(_pixel_sum(batch))
        fills.append(batch.fill)
        if saved is None and documents >= RESUME_AT * job.documents:
            saved = state()
    seconds = time.perf_counter() - began
    torch.save(saved, state_file)
    del stream, state, batch
    gc.collect()  # ends the worker processes, whose time counts only then
    return {
        "start_seconds": began - start,
        "documents_per_second": (documents - len(first.pixels)) / seconds,
        "cpu_seconds": _cpu_seconds() - cpu,
        "documents": documents,
        "text_tokens": text_tokens,
        "following": following,
        "pixel_sum": sum(sums),
        "fill": None if first.fill is None else sum(filter(None, fills)) / len(fills),
    }


def measure_resume(open_stream: Opener, job: Job, state_file: Path) -> dict:
    """The time to the first batch after the state, which is read within it."""
    start = time.perf_counter()
    stream, _ = open_stream(job, torch.load(state_file, weights_only=False))
    first = next(stream)
    return {"resume_seconds": time.perf_counter() - start, "following": _digest(first)}


def _cpu_seconds() -> float:
    """Of this process and of those below it that have ended."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent)


def _pixel_sum(batch: Batch) -> int:
    """Of one channel in a coarse grid: cheap, and enough to see that all decode the same photos."""
    return int(batch.pixels[:, ::16, ::16, 1].sum())


def _digest(batch: Batch) -> int:
    return zlib.crc32(batch.pixels.contiguous().numpy().tobytes())
