"""Held-out losses: the mean over kinds, the same on any split, and images that change owners."""

import dataclasses

import pytest
import torch

from data.loader import held_out_batches
from nmm.config import ModelConfig
from nmm.evaluate import add_losses, loss_by_kind, with_images_of_others
from nmm.model import build
from nmm.tally import Tally
from tests import corpora

CPU = torch.device("cpu")
MODEL = ModelConfig(width=32, depth=1, heads=2, vocab_size=corpora.VOCAB_SIZE, image=corpora.IMAGE)


def test_the_loss_is_the_same_however_it_is_split_over_processes() -> None:
    data, model = corpora.config(), build(MODEL, seed=0)
    corpus = corpora.open_corpus(data, split="held_out")
    rows = []
    for size, micro_batch in ((1, 6), (2, 2), (3, 1)):
        tally = Tally.zeros(3, device=CPU)
        for rank in range(size):
            for _, batches in held_out_batches(
                corpus, data, rows_per_source=6, micro_batch=micro_batch, rank=rank, world=size
            ):
                add_losses(tally, model, batches, device=CPU)
        rows.append(loss_by_kind(tally, corpus))
    assert rows[1] == pytest.approx(rows[0], rel=1e-6)
    assert rows[2] == pytest.approx(rows[0], rel=1e-6)
    kinds = [rows[0][f"loss/kind/{kind.value}"] for kind in corpora.KINDS]
    assert rows[0]["loss"] == pytest.approx(sum(kinds) / 3)
    assert rows[0]["loss/kind/caption"] == rows[0]["loss/source/caption"]


def test_every_image_gets_the_pixels_of_another_document() -> None:
    """Pixels are replaced by the number of their document, so that owners can be read off them."""
    data = corpora.config()
    corpus = corpora.open_corpus(data, split="held_out")
    compared = 0
    for _, batches in held_out_batches(corpus, data, rows_per_source=6, micro_batch=3):
        for batch in batches:
            owner = torch.zeros(len(batch.pixels), dtype=torch.uint8)
            numbers = torch.arange(3)[:, None] * 40 + batch.document
            shown = batch.image > 0
            owner[batch.image[shown].long() - 1] = numbers[shown].to(torch.uint8)
            marked = dataclasses.replace(
                batch, pixels=owner[:, None, None, None].expand(batch.pixels.shape)
            )
            swapped = with_images_of_others(marked)
            if swapped is None:
                continue
            moved = swapped.pixels[:, 0, 0, 0]
            assert sorted(moved.tolist()) == sorted(owner.tolist())  # none lost
            assert not (moved == owner).any()
            compared += len(owner)
    assert compared > 20


def test_a_batch_with_images_of_one_document_only_is_left_out() -> None:
    data = corpora.config()
    corpus = corpora.open_corpus(data, split="held_out")
    story = corpora.KINDS.index(corpora.Kind.interleaved)
    [(_, _), (_, batches), _] = held_out_batches(corpus, data, rows_per_source=1, micro_batch=1)
    batch = next(batches)
    alone = dataclasses.replace(
        batch,
        document=batch.document.where(batch.document == 1, 0),
        image=batch.image.where(batch.document == 1, 0),
    )
    alone.pixels = batch.pixels[: int(alone.image.max())]
    assert story == 1
    assert with_images_of_others(alone) is None
