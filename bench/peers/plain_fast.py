"""webdataset and torch's DataLoader around our decoder: what of our speed a decoder alone gives."""

from functools import partial

from bench.peers.common import CaptionCode, Job, Stream
from bench.peers.plain import stream
from data import images


def open_stream(job: Job, state: object) -> Stream:
    return stream(job, state, pair=partial(_pair, code=CaptionCode(job)))


def _pair(sample: tuple[bytes, bytes], *, code: CaptionCode) -> tuple:
    return images.decode(sample[0], code.side), code.ids(sample[1].decode())
