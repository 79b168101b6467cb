"""Margins of the tally: every token and label counts once, under its source and modality."""

import torch

from nmm.batch import NO_LABEL, Modality, PackedBatch
from nmm.config import UnitModality
from nmm.tally import LABELS, TOKENS, Tally, loss_keys, mean, token_keys


def one_row() -> PackedBatch:
    """The row of PackedBatch's docstring, its second document from source 1: b I I x e  b y _"""
    text, image, pad = Modality.text, Modality.image, Modality.pad
    return PackedBatch(
        tokens=torch.tensor([[2, 9, 9, 5, 3, 2, 6, 0]]),
        modality=torch.tensor(
            [[text, image, image, text, text, text, text, pad]], dtype=torch.uint8
        ),
        source=torch.tensor([[0, 0, 0, 0, 0, 1, 1, 0]], dtype=torch.uint8),
        document=torch.tensor([[1, 1, 1, 1, 1, 2, 2, 0]], dtype=torch.int32),
        image=torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32),
        position=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0]], dtype=torch.int32),
        labels=torch.tensor([[NO_LABEL, NO_LABEL, 5, 3, NO_LABEL, 6, 7, NO_LABEL]]),
        label_modality=torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0]], dtype=torch.uint8),
        pixels=torch.zeros((1, 2, 2, 3), dtype=torch.uint8),
    )


def tallied() -> Tally:
    tally = Tally.zeros(2, device=torch.device("cpu"))
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0])
    tally.add(one_row(), token_losses=losses, positions=torch.tensor([2, 3, 5, 6]))
    return tally


def test_margins_of_the_drawn_row() -> None:
    tally = tallied()
    assert token_keys(tally, sources=["a", "b"], units=[]) == {
        "tokens": 7,
        "tokens/modality/text": 5,
        "tokens/modality/image": 2,
        "tokens/source/a": 5,
        "tokens/source/b": 2,
    }
    assert loss_keys(tally, sources=["a", "b"], units=[]) == {
        "loss": 15 / 4,
        "loss/modality/text": 15 / 4,
        "loss/source/a": 1.5,
        "loss/source/b": 6.0,
    }
    assert tally.count(LABELS) == 4


def test_the_loss_is_that_of_the_modalities_by_their_labels() -> None:
    """ln(all) = w ln(image) + (1 - w) ln(text), w the image's part of the labels ("MoMa", 3)."""
    batch = one_row()
    batch.label_modality[0, 5:7] = Modality.image
    tally = Tally.zeros(2, device=torch.device("cpu"))
    losses, positions = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0]), torch.tensor([2, 3, 5, 6, 6])
    tally.add(batch, token_losses=losses[:4], positions=positions[:4])
    tally.add(batch, token_losses=losses[4:], positions=positions[4:])
    found = loss_keys(tally, sources=["a", "b"], units=[UnitModality.image])
    assert (found["loss/modality/text"], found["loss/modality/image"]) == (1.5, 5.0)
    assert found["loss"] == 3 / 5 * 5.0 + 2 / 5 * 1.5 == float(losses.double().mean())


def test_adding_twice_doubles_counts_and_keeps_means() -> None:
    once, twice = tallied(), tallied()
    twice.tables += once.tables
    assert twice.count(TOKENS) == 2 * once.count(TOKENS)
    assert twice.loss(source=1) == once.loss(source=1) == 6.0


def test_a_margin_without_labels_has_no_loss() -> None:
    empty = Tally.zeros(1, device=torch.device("cpu"))
    assert empty.loss() is None
    assert mean([None, 1.0, 3.0]) == 2.0
    assert mean([None]) is None
