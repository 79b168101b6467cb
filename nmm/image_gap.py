"""Do images matter? The loss of captions with their own images, and with those of others."""

from dataclasses import replace

import torch

from data.corpus import Corpus
from data.tokenizer import IdTable
from nmm.batch import NO_LABEL, Modality, PackedBatch
from nmm.config import Kind
from nmm.errors import UserError
from nmm.held_out import HeldOut
from nmm.trained import Trained


def image_gap(trained: Trained, corpus: Corpus, *, rows_per_source: int) -> tuple[float, float]:
    """Held-out nats per token of captions: with their own images, and with those of others.

    Tokens are those of text, also where images are predicted too.
    """
    device = next(trained.model.parameters()).device
    own, other = (
        HeldOut.zeros(trained.config.model, num_sources=len(corpus.sources), device=device)
        for _ in range(2)
    )
    held_out = trained.held_out_batches(corpus, rows_per_source=rows_per_source)
    for source, (_, batches) in zip(corpus.sources, held_out, strict=True):
        if source.kind is Kind.caption:
            for batch in (with_text_labels(b, trained.tokenizer.ids) for b in batches):
                swapped = with_images_of_others(batch)
                if swapped is not None:
                    own.add(trained.model, batch)
                    other.add(trained.model, swapped)
    losses = own.tally.loss(), other.tally.loss()
    if losses[0] is None or losses[1] is None:
        raise UserError(
            "--image-gap found no two held-out documents of kind caption in data.sources; leave it "
            "out."
        )
    return losses[0], losses[1]


def with_images_of_others(batch: PackedBatch) -> PackedBatch | None:
    """The same batch, every image replaced by one of another document of the batch.

    None where the batch has too few images of other documents. Labels stay as they are.
    """
    codes = _code_positions(batch)
    owners = _image_owners(batch) if codes is None else _documents(batch).flatten()[codes[:, 0]]
    most = int(torch.bincount(owners).max()) if len(owners) else 0
    if len(owners) < 2 * most or most == 0:
        return None
    if codes is None:
        return replace(batch, pixels=batch.pixels.roll(most, dims=0))
    tokens = batch.tokens.flatten().clone()
    tokens[codes] = tokens[codes].roll(most, dims=0)
    return replace(batch, tokens=tokens.view_as(batch.tokens))


def _code_positions(batch: PackedBatch) -> torch.Tensor | None:
    """int64[M, n]: where in B*L the n codes of every image are; None without images of codes."""
    inside = ((batch.modality == Modality.image) & (batch.image == 0)).flatten()
    places = inside.nonzero()[:, 0]
    if len(places) == 0:
        return None
    # Codes stand between a begin and an end, so no two images touch.
    images = int((places.diff() > 1).sum()) + 1
    assert len(places) % images == 0, (len(places), images)
    return places.view(images, -1)


def with_text_labels(batch: PackedBatch, ids: IdTable) -> PackedBatch:
    """The same batch, in which only text and the ends of documents are labels, and no units."""
    units = min((unit.begin for unit in ids.units.values()), default=ids.size)
    is_text = batch.labels < units
    return replace(
        batch,
        labels=torch.where(is_text, batch.labels, NO_LABEL),
        label_modality=torch.where(is_text, batch.label_modality, 0),
    )


def _documents(batch: PackedBatch) -> torch.Tensor:
    """int64[B, L]: a number for every document of the batch."""
    row = torch.arange(batch.tokens.shape[0])[:, None].expand_as(batch.document)
    return row * (int(batch.document.max()) + 1) + batch.document


def _image_owners(batch: PackedBatch) -> torch.Tensor:
    """int64[M]: a number for the document that each image belongs to."""
    shown = batch.image > 0
    owners = torch.zeros(len(batch.pixels), dtype=torch.int64)
    owners[batch.image[shown].long() - 1] = _documents(batch)[shown]
    return owners
