"""Held-out images of a run with their captions: each is a prompt, and what it is compared with."""

from collections.abc import Iterator
from itertools import islice

from data.corpus import Corpus
from data.documents import parse
from data.images import decode
from data.layout import read_document
from data.samples import BadSample
from data.units import Units
from nmm.config import Kind, UnitModality
from nmm.errors import UserError


def held_out_captions(
    corpus: Corpus, *, count: int, coded: bool
) -> list[tuple[str, bytes | Units, str]]:
    """SHARD/KEY, image and caption of the first `count` held-out documents of kind caption.

    Images are codes where they are `coded`, else files. Raises UserError where there is none.
    """
    found = list(islice(_captions(corpus, modality=UnitModality.image if coded else None), count))
    if not found:
        raise UserError(
            "--held-out found no held-out document of kind caption in data.sources; give --image "
            "or --prompt."
        )
    return found


def _captions(
    corpus: Corpus, *, modality: UnitModality | None
) -> Iterator[tuple[str, bytes | Units, str]]:
    """Every readable one, in the order of the shards; of an image with several, the first."""
    for source in corpus.sources:
        if source.kind is not Kind.caption or source.layout.modality is not modality:
            continue  # captions of speech are not those of images
        for shard in source.shards:
            for number in range(len(shard.index)):
                if shard.index.variant[number]:
                    continue
                try:
                    image, text = parse(source.layout, read_document(shard, number)).parts
                    assert isinstance(image, bytes | Units)
                    assert isinstance(text, str)
                    if isinstance(image, bytes):
                        decode(image, corpus.image.side_pixels)
                except BadSample:
                    continue
                yield f"{shard.name}/{shard.index.key(number)}", image, text
