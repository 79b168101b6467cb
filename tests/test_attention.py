"""Who sees whom: no leak between documents, none from the future, and backends that agree."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nmm.batch import PackedBatch
from nmm.config import AttentionBackend, ModelConfig
from nmm.model import Model, build
from nmm.model.attention import document_plan, plan
from tests.batches import IMAGE, pack, random_rows, small

BACKENDS = [AttentionBackend.mask, AttentionBackend.documents]
# Row 0: a document with two images at 2..10 and 14..22, then a text, then padding; row 1: two more.
ROWS = [[(2, IMAGE, 3, IMAGE, 4), (20,)], [(1, IMAGE, 6), (5,)]]
ROW_TOKENS = 50


def logits(model: Model, batch: PackedBatch) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(batch)


def gradients(model: Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def other_token(batch: PackedBatch, row: int, column: int) -> None:
    batch.tokens[row, column] = 63 - batch.tokens[row, column]


def other_patch(batch: PackedBatch, image: int, patch: int) -> None:
    """Invert one of the 3 x 3 patches of 4 x 4 pixels of an image, both counted from 0."""
    top, left = patch // 3 * 4, patch % 3 * 4
    block = batch.pixels[image, top : top + 4, left : left + 4]
    batch.pixels[image, top : top + 4, left : left + 4] = 255 - block


def other_document(batch: PackedBatch) -> None:
    """Every token and pixel of row 0's first document."""
    batch.tokens[0, :27] = torch.where(batch.image[0, :27] == 0, 63 - batch.tokens[0, :27], 4)
    batch.pixels[:2] = 255 - batch.pixels[:2]


# For each change: positions of row 0 that must not move by a bit, and some that must.
CHANGES: dict[str, tuple[Callable[[PackedBatch], None], range, list[int]]] = {
    "another document": (other_document, range(27, 47), [0, 5, 26]),
    "a later token": (lambda batch: other_token(batch, 0, 12), range(12), [12, 13, 14, 22, 26]),
    "the last token": (lambda batch: other_token(batch, 0, 46), range(46), [46]),
    "another row": (lambda batch: other_token(batch, 1, 0), range(47), []),
    "an image's last patch": (lambda batch: other_patch(batch, 0, 8), range(2), [2, 5, 10, 11, 26]),
    "the second image": (lambda batch: other_patch(batch, 1, 0), range(14), [14, 22, 23]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_may_be_seen_moves_logits(backend: AttentionBackend, change: str) -> None:
    config = small(backend)
    model = build(config, seed=0)
    batch = pack(ROWS, config=config, row_tokens=ROW_TOKENS)
    before = logits(model, batch)[0]
    edit, still, moves = CHANGES[change]
    edit(batch)
    after = logits(model, batch)[0]
    assert torch.equal(after[still], before[still])
    assert all(not torch.equal(after[at], before[at]) for at in moves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_alone(backend: AttentionBackend) -> None:
    """Each document in a row of its own: the same logits, and the same gradients in sum."""
    config = small(backend)
    model = build(config, seed=0)
    rows = random_rows(3, config=config, row_tokens=90)
    packed = pack(rows, config=config, row_tokens=90)
    place = [
        (b, at.nonzero().flatten())
        for b, row in enumerate(rows)
        for at in (packed.document[b] == d for d in range(1, len(row) + 1))
    ]
    alone = alone_in_rows(packed, place)
    expected, found = logits(model, packed), logits(model, alone)
    for row, (b, columns) in enumerate(place):
        torch.testing.assert_close(
            found[row, : len(columns)], expected[b, columns], rtol=0, atol=1e-5
        )
    count = (packed.labels >= 0).sum()
    packed_gradients = gradients(model, model(packed).loss_sum / count)
    alone_gradients = gradients(model, model(alone).loss_sum / count)
    torch.testing.assert_close(alone_gradients, packed_gradients, rtol=0, atol=1e-5)


def alone_in_rows(batch: PackedBatch, place: list[tuple[int, torch.Tensor]]) -> PackedBatch:
    """The same documents, one in each row."""
    longest = max(len(columns) for _, columns in place)

    def spread(field: torch.Tensor, fill: int) -> torch.Tensor:
        out = field.new_full((len(place), longest), fill)
        for row, (b, columns) in enumerate(place):
            out[row, : len(columns)] = field[b, columns]
        return out

    fields = ("tokens", "modality", "source", "document", "image", "position")
    moved = {name: spread(getattr(batch, name), 0) for name in fields}
    return replace(batch, labels=spread(batch.labels, -100), **moved)


def test_backends_agree() -> None:
    """Random rows with interleaved images and padding: forward and every gradient, queries' too."""
    config = small()
    batch = pack(random_rows(4, config=config, row_tokens=120), config=config, row_tokens=120)
    model = build(config, seed=0)
    seen = {}
    for backend in BACKENDS:
        model.config = replace(config, attention=backend)
        found = model.logits(batch)
        loss = (found * batch.document.bool()[..., None]).square().mean()
        seen[backend] = found[batch.document > 0], gradients(model, loss)
    torch.testing.assert_close(*seen.values(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [8, 10])
def test_backends_agree_on_random_queries(channels: int) -> None:
    """The attention alone, where scores are far from uniform; 10 channels are filled up to 16."""
    config = small()
    batch = pack(random_rows(4, config=config, row_tokens=120), config=config, row_tokens=120)
    draw = torch.Generator().manual_seed(0)
    real = batch.document > 0
    weight = torch.randn(4, 120, 4, channels, generator=draw) * real[..., None, None]
    results = []
    for backend in BACKENDS:
        draw.manual_seed(1)
        shape = (4, 120, 4, channels)
        qkv = [torch.randn(shape, generator=draw).mul(2).requires_grad_() for _ in range(3)]
        out = plan(batch, backend=backend, dtype=torch.float32).attend(*qkv)
        (out * weight).sum().backward()
        assert out.isfinite().all()
        results.append((out[real], [x.grad for x in qkv]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_document_plan_loses_no_position() -> None:
    config = small()
    batch = pack(random_rows(4, config=config, row_tokens=120), config=config, row_tokens=120)
    found = document_plan(batch.document, image_BL=batch.image, dtype=torch.float32)
    positions = torch.arange(batch.document.numel())
    assert torch.equal(found.index[found.slot], positions)
    assert sum(documents * length for documents, length in (b.shape for b in found.buckets)) == len(
        found.index
    )


def test_same_bits_twice() -> None:
    config = ModelConfig(depth=2)
    batch = pack(random_rows(2, config=config, row_tokens=400), config=config, row_tokens=400)
    model = build(config, seed=0)
    first = gradients(model, model(batch).loss_sum)
    second = gradients(model, model(batch).loss_sum)
    assert all(torch.equal(first[name], second[name]) for name in first)
