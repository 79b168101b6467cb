"""Who sees whom: no leak between documents, none from the future, and backends that agree."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from nmm.batch import PackedBatch, allowed, two_way
from nmm.config import AttentionBackend, ImageAttention, ModelConfig
from nmm.model import Model, build
from nmm.model.documents import document_plan
from nmm.model.flex import flex_plan
from nmm.model.plan import Plan, plan
from tests.batches import IMAGE, pack, random_rows, small

# torch's own compiler uses what torch has deprecated, and looks at gradients that there are not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
FLEX, MASK, DOCUMENTS = AttentionBackend.flex, AttentionBackend.mask, AttentionBackend.documents
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
# Row 0: a document with two images at 1..9 and 14..22, then a text, then padding; row 1: two more.
ROWS = [[(1, IMAGE, 4, IMAGE, 4), (20,)], [(1, IMAGE, 6), (5,)]]
ROW_TOKENS = 50


@pytest.fixture
def flex_backward_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses FlexAttention's backward on CPUs for want of a kernel, and has its formula.

    Without the refusal the formula is computed with our mask, and our code around it is the same.
    """
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


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


Change = tuple[Callable[[PackedBatch], None], range, list[int]]
# For each change: positions of row 0 that must not move by a bit, and some that must.
CHANGES: dict[str, Change] = {
    "another document": (other_document, range(27, 47), [0, 5, 26]),
    "a later token": (lambda batch: other_token(batch, 0, 12), range(12), [12, 13, 14, 22, 26]),
    "the last token": (lambda batch: other_token(batch, 0, 46), range(46), [46]),
    "another row": (lambda batch: other_token(batch, 1, 0), range(47), []),
    "the second image": (lambda batch: other_patch(batch, 1, 0), range(14), [14, 22, 23]),
}


def first_image(still: int) -> Change:
    """Its last patch: only positions before `still` do not see it."""
    moves = [at for at in (1, 5, 9, 10, 26) if at >= still]
    return lambda batch: other_patch(batch, 0, 8), range(still), moves


def second_image(still: int) -> Change:
    moves = [at for at in (14, 18, 22, 23, 26) if at >= still]
    return lambda batch: other_patch(batch, 1, 8), range(still), moves


# The last patch of an image is at 9 and 22; whether the earlier ones see it depends on the config.
IMAGE_CHANGES = {
    ImageAttention.block: (first_image(1), second_image(14)),
    ImageAttention.prefix: (first_image(1), second_image(22)),
    ImageAttention.causal: (first_image(9), second_image(22)),
}
CASES = [(ImageAttention.block, name, change) for name, change in CHANGES.items()]
CASES += [
    (attention, f"the last patch of {which} image", change)
    for attention, changes in IMAGE_CHANGES.items()
    for which, change in zip(("the first", "the second"), changes, strict=True)
]


@pytest.mark.parametrize(
    ("image_attention", "change"),
    [pytest.param(how, change, id=f"{how.value}, {name}") for how, name, change in CASES],
)
@pytest.mark.parametrize("backend", [FLEX, MASK, DOCUMENTS])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_only_what_may_be_seen_moves_logits(
    device: str, backend: AttentionBackend, image_attention: ImageAttention, change: Change
) -> None:
    config = small(backend, image_attention=image_attention)
    model = build(config, seed=0).to(device)
    batch = pack(ROWS, config=config, row_tokens=ROW_TOKENS)
    before = logits(model, batch.to(torch.device(device)))[0]
    edit, still, moves = change
    edit(batch)
    after = logits(model, batch.to(torch.device(device)))[0]
    assert torch.equal(after[still], before[still])
    assert all(not torch.equal(after[at], before[at]) for at in moves)


@pytest.mark.usefixtures("flex_backward_on_cpus")
@pytest.mark.parametrize("backend", [FLEX, MASK, DOCUMENTS])
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


EVERY_RULE = pytest.mark.parametrize("image_attention", ImageAttention)


def check_same(found: list) -> None:
    """Every backend against the first one."""
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


@EVERY_RULE
@pytest.mark.usefixtures("flex_backward_on_cpus")
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_backends_agree(device: str, kv_heads: int | None, image_attention: ImageAttention) -> None:
    """Random rows with interleaved images and padding: forward and every gradient, queries' too."""
    config = replace(small(image_attention=image_attention), kv_heads=kv_heads)
    batch = pack(random_rows(4, config=config, row_tokens=120), config=config, row_tokens=120)
    batch = batch.to(torch.device(device))
    model, real = build(config, seed=0).to(device), batch.document > 0
    forward, backward = [], []
    for backend in (MASK, DOCUMENTS, FLEX):
        model.config = replace(config, attention=backend)
        forward.append(logits(model, batch)[real])
        loss = (model.logits(batch) * real[..., None]).square().mean()
        backward.append(gradients(model, loss))
    check_same(forward)
    check_same(backward)


@pytest.mark.usefixtures("flex_backward_on_cpus")
@pytest.mark.parametrize(
    ("channels", "kv_heads"), [(8, 4), (10, 4), (50, 4), (8, 2), (10, 1), (50, 2)]
)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_backends_agree_on_random_queries(device: str, channels: int, kv_heads: int) -> None:
    """The attention alone, where scores are far from uniform; kernels fill some channels up."""
    config = small()
    batch = pack(random_rows(4, config=config, row_tokens=120), config=config, row_tokens=120)
    batch = batch.to(torch.device(device))
    draw = torch.Generator().manual_seed(0)
    q, k, v, weight = (
        torch.randn(4, 120, heads, channels, generator=draw).to(device)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    real = batch.document > 0
    forward, backward = [], []
    for backend in (MASK, DOCUMENTS, FLEX):
        leaves = [(2 * x).requires_grad_() for x in (q, k, v)]
        found = attend(batch, backend=backend).attend(*leaves)
        assert found.isfinite().all()
        forward.append(found.detach()[real])
        (found * weight * real[..., None, None]).sum().backward()
        backward.append([leaf.grad for leaf in leaves])
    check_same(forward)
    check_same(backward[:2])
    # These gradients reach 10 to 20, of which float32 leaves an error of 3e-5 (LOG.md).
    check_same([[leaf / leaf.abs().max() for leaf in found] for found in backward])


def attend(batch: PackedBatch, *, backend: AttentionBackend) -> Plan:
    block = ImageAttention.block
    return plan(batch, backend=backend, image_attention=block, dtype=torch.float32)


def sees(batch: PackedBatch, q: int, k: int, *, image_attention: ImageAttention) -> bool:
    """The rule in words, for row 0."""
    document, image = batch.document[0].tolist(), batch.image[0].tolist()
    if document[q] != document[k]:
        return False
    if k <= q:
        return True
    begin = document.index(document[q])
    leads = image[q] in image[begin : begin + 2]
    two_way_image = {"block": True, "prefix": leads, "causal": False}[image_attention.value]
    return two_way_image and image[q] == image[k] > 0


@EVERY_RULE
def test_the_mask_is_the_rule(image_attention: ImageAttention) -> None:
    config = small()
    rows = [[(1, IMAGE, IMAGE, 2), (IMAGE, 2, IMAGE), (2, IMAGE, 1), (3,)]]
    batch = pack(rows, config=config, row_tokens=60)
    image = two_way(batch.document, batch.image, attention=image_attention)
    expected = [
        [sees(batch, q, k, image_attention=image_attention) for k in range(60)] for q in range(60)
    ]
    assert torch.equal(allowed(batch.document, image)[0], torch.tensor(expected))


# The way there reads blocks of keys, the way back those of queries too.
BLOCKS_OF = ("kv_", "full_kv_", "q_", "full_q_")


@pytest.mark.parametrize("length", [128, 640, 1000])
def test_blocks_are_those_of_every_pair(length: int) -> None:
    """The block mask that follows from borders alone equals torch's, which looks at all pairs."""
    draw = torch.Generator().manual_seed(length)
    begin, image = (torch.zeros(6, length, dtype=torch.int32) for _ in range(2))
    for row in range(6):
        at, runs = 0, 0
        while at < length:
            size = int(torch.randint(1, (40, 200, 400, 600, 900, 1000)[row], (), generator=draw))
            is_image = bool(torch.rand((), generator=draw) < 0.6)
            image[row, at : at + size] = runs if is_image else 0
            begin[row, at : at + size] = at
            if is_image:  # the second part of it is text
                image[row, at + size * 3 // 4 : at + size] = 0
            at, runs = at + size, runs + 1
    found = flex_plan(begin, two_way_image_BL=image).blocks
    expected = create_block_mask(found.mask_mod, 6, None, length, length, device="cpu")
    assert expected.full_kv_num_blocks is not None
    assert length == 128 or expected.full_kv_num_blocks.sum() > 10
    for name in (f"{of}{part}" for of in BLOCKS_OF for part in ("num_blocks", "indices")):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [MASK, DOCUMENTS, FLEX])
def test_compiled_blocks_equal_plain_ones(backend: AttentionBackend) -> None:
    """Forward and backward, with two batches, so that nothing of the first is compiled in."""
    config = small(backend)
    model, compiled = (build(config, seed=0).to("cuda") for _ in range(2))
    compiled.blocks.compile_blocks()
    for rows in (ROWS, [ROWS[1], ROWS[0]]):
        batch = pack(rows, config=config, row_tokens=ROW_TOKENS).to(torch.device("cuda"))
        real = batch.document > 0
        expected, found = (
            (logits(m, batch)[real], gradients(m, m(batch).loss_sum / 40))
            for m in (model, compiled)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [FLEX, MASK, DOCUMENTS])
def test_all_layers_share_one_plan(backend: AttentionBackend) -> None:
    """So that blocks, masks and orders are made once for a batch."""
    config = small(backend)
    model, seen = build(config, seed=0), []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(
            lambda _, args, given: seen.append(given["plan"]), with_kwargs=True
        )
    logits(model, pack(ROWS, config=config, row_tokens=ROW_TOKENS))
    assert len(seen) == config.depth > 1
    assert all(one is seen[0] for one in seen)


def test_document_plan_loses_no_position() -> None:
    config = small()
    batch = pack(random_rows(4, config=config, row_tokens=120), config=config, row_tokens=120)
    found = document_plan(batch.document, two_way_image_BL=batch.image, dtype=torch.float32)
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
