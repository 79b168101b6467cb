"""A batch between processes: one block, every tensor as it was."""

import os
from dataclasses import fields

import pytest
import torch

from data.block import MARK_BYTES, Blocks, Part, pack, unpack
from data.loader import Loader
from data.workers import forking
from nmm.batch import Dropped, PackedBatch
from tests import corpora

NO_TENSORS = ("keys", "dropped", "counts")


def batch(*, rows: int, row_tokens: int, images: int, blocks: Blocks | None = None) -> PackedBatch:
    shape = (rows, row_tokens)
    types = {
        "tokens": torch.int64,
        "labels": torch.int64,
        "document": torch.int32,
        "image": torch.int32,
        "position": torch.int32,
        "modality": torch.uint8,
        "source": torch.uint8,
        "label_modality": torch.uint8,
    }
    parts = [Part(name, dtype, shape) for name, dtype in types.items()]
    made = (blocks or Blocks()).tensors([*parts, Part("pixels", torch.uint8, (images, 3, 5, 3))])
    generator = torch.Generator().manual_seed(rows)
    for tensor in made.values():
        tensor.random_(0, 100, generator=generator)
    return PackedBatch(
        **made,
        keys=[["a/0"]],
        dropped=[Dropped("s", "a", "1", "bad", 0, 8)],
        counts={"skipped_images": rows},
    )


@pytest.mark.parametrize(("rows", "row_tokens", "images"), [(2, 8, 3), (3, 7, 1), (1, 5, 0)])
def test_a_batch_survives_the_passage(rows: int, row_tokens: int, images: int) -> None:
    sent = batch(rows=rows, row_tokens=row_tokens, images=images)
    found = unpack(pack(sent))
    for field in fields(PackedBatch):
        before, after = getattr(sent, field.name), getattr(found, field.name)
        if isinstance(before, torch.Tensor):
            assert (after.dtype, after.shape) == (before.dtype, before.shape)
            assert after.is_contiguous()
            assert torch.equal(after, before)
        else:
            assert after == before


def test_a_batch_is_one_block() -> None:
    sent = batch(rows=2, row_tokens=8, images=3)
    tensor_fields = [getattr(sent, f.name) for f in fields(sent) if f.name not in NO_TENSORS]
    assert {tensor.untyped_storage().data_ptr() for tensor in tensor_fields} == {
        sent.tokens.untyped_storage().data_ptr()
    }
    assert pack(sent).block.numel() == MARK_BYTES + sum(tensor.nbytes for tensor in tensor_fields)


def test_tensors_of_several_blocks_are_no_parcel() -> None:
    sent = batch(rows=1, row_tokens=8, images=1)
    sent.pixels = sent.pixels.clone()
    with pytest.raises(AssertionError, match="several blocks"):
        pack(sent)


def test_a_block_is_used_again_when_the_last_tensor_of_its_batch_is_gone() -> None:
    blocks = Blocks()

    def passed(*, rows: int) -> PackedBatch:
        return unpack(pack(batch(rows=rows, row_tokens=8, images=1, blocks=blocks)))

    first = passed(rows=2)
    place, tokens, kept = first.tokens.data_ptr(), first.tokens.clone(), first.tokens[1]
    del first
    second = passed(rows=2)
    assert second.tokens.data_ptr() != place  # a view of the first one is still there
    assert torch.equal(kept, tokens[1])
    del kept
    third = passed(rows=1)  # a smaller one fits
    assert third.tokens.data_ptr() == place
    del second
    fourth = passed(rows=3)  # a larger one does not: the free block makes room for another
    assert fourth.tokens.data_ptr() != place
    assert torch.equal(third.tokens, batch(rows=1, row_tokens=8, images=1).tokens)


def test_a_forked_process_gives_back_no_block_of_its_parent() -> None:
    config = corpora.config()
    loader = Loader(corpora.open_corpus(config), config, rank=0, world=1, micro_batch=2, workers=1)
    steps = iter(loader)
    kept = [next(steps)[0][0]]
    expected = kept[0].tokens.clone()
    with forking():
        child = os.fork()
    if child == 0:
        kept.clear()
        os._exit(0)
    os.waitpid(child, 0)
    for _ in range(6):
        next(steps)
    steps.close()
    assert torch.equal(kept[0].tokens, expected)


def test_blocks_outlive_the_mode_that_they_were_made_in() -> None:
    blocks = Blocks()
    with torch.inference_mode():
        first = unpack(pack(batch(rows=2, row_tokens=8, images=1, blocks=blocks)))
    place = first.tokens.data_ptr()
    del first
    parts = [Part("tokens", torch.int64, (2, 8)), Part("pixels", torch.uint8, (1, 3, 5, 3))]
    again = blocks.tensors(parts)["tokens"]
    assert again.untyped_storage().data_ptr() == place - MARK_BYTES
