"""mosaicml-streaming with the same Pillow code, from shards converted to its own format (MDS)."""

import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # streaming imports torchvision for data sets that we do not use, and a torchvision built for
    # GPUs refuses a torch without, for want of two operators; their names are enough for it.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import (
    MDSWriter,
    StreamingDataLoader,
    StreamingDataset,
)

from bench.peers.common import CaptionCode, Job, Stream, batches, collate


class Captions(StreamingDataset):
    def __init__(self, job: Job) -> None:
        super().__init__(
            local=job.shards, shuffle=True, batch_size=job.batch, num_canonical_nodes=1
        )
        self.code = CaptionCode(job)

    def __getitem__(self, at: Any) -> tuple:
        sample = super().__getitem__(at)
        return self.code.pair((Image.open(BytesIO(sample["image"])), sample["text"]))


def open_stream(job: Job, state: Any) -> Stream:
    loader = StreamingDataLoader(
        Captions(job), batch_size=job.batch, num_workers=job.workers, collate_fn=collate
    )
    if state is not None:
        loader.load_state_dict(state)
    return batches(iter(loader)), loader.state_dict


def convert(source: Path, target: Path) -> None:
    """Write the caption shards of a directory as MDS."""
    with MDSWriter(out=str(target), columns={"image": "bytes", "text": "str"}) as writer:
        for shard in sorted(source.glob("*.tar")):
            samples: dict[str, dict] = {}
            with tarfile.open(shard) as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    key, _, extension = member.name.partition(".")
                    file = tar.extractfile(member)
                    assert file is not None
                    samples.setdefault(key, {})[extension] = file.read()
            for sample in samples.values():
                writer.write({"image": sample["jpg"], "text": sample["txt"].decode()})
