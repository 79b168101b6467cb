"""The model against a reference written by hand, and its promises at the edges."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nmm.batch import NO_LABEL, PackedBatch
from nmm.config import AttentionBackend, ModelConfig
from nmm.model import Model, build, group, initialise
from nmm.model.image import PIXEL_MEAN, PIXEL_STD
from nmm.model.init import std_of
from tests.batches import IMAGE, pack, small

MIXED = [[(2, IMAGE, 3, IMAGE, 4), (7,)], [(1, IMAGE, 6), (5,)]]
TEXT = [[(20,), (7,)], [(30,)]]
NO_LABELS = [[(1,), (1,)], [(1,)]]
ROW_TOKENS = 40


def sees(batch: PackedBatch, b: int, q: int, k: int) -> bool:
    if batch.document[b, q] != batch.document[b, k]:
        return False
    return k <= q or bool(batch.image[b, q] == batch.image[b, k] > 0)


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary positions as a product of complex numbers, channel i paired with i + E/2."""
    half = len(x) // 2
    angles = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    turned = torch.complex(x[:half], x[half:]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag])


def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + eps).sqrt() * gain


def reference_attention(
    x: Tensor, p: dict[str, Tensor], name: str, batch: PackedBatch, b: int, config: ModelConfig
) -> Tensor:
    """One row, one position, one head, one key at a time."""
    width, size = config.width, config.head_dim
    qkv = x @ p[f"{name}.qkv.weight"].T
    queries, keys = [], []
    for at, row in enumerate(qkv):
        q = normed(row[:width], p[f"{name}.q_norm.weight"], config.norm_eps)
        k = normed(row[width : 2 * width], p[f"{name}.k_norm.weight"], config.norm_eps)
        position = int(batch.position[b, at])
        queries.append([turn(h, position, config.rope_theta) for h in q.split(size)])
        keys.append([turn(h, position, config.rope_theta) for h in k.split(size)])
    out = []
    for q in range(len(x)):
        seen = [k for k in range(len(x)) if sees(batch, b, q, k)]
        heads = []
        for h in range(config.heads):
            scores = torch.stack([queries[q][h] @ keys[k][h] / math.sqrt(size) for k in seen])
            begin = 2 * width + h * size
            heads.append(scores.softmax(0) @ qkv[seen, begin : begin + size])
        out.append(torch.cat(heads))
    return torch.stack(out) @ p[f"{name}.out.weight"].T


def reference_patches(pixels: Tensor, config: ModelConfig) -> Tensor:
    """[T, values] of one image, in reading order."""
    size, across = config.image.patch_pixels, config.image.side_pixels // config.image.patch_pixels
    patches = []
    for y in range(across):
        for x in range(across):
            block = pixels[y * size : (y + 1) * size, x * size : (x + 1) * size].double() / 255
            mean, std = torch.tensor(PIXEL_MEAN).double(), torch.tensor(PIXEL_STD).double()
            patches.append(((block - mean) / std).flatten())
    return torch.stack(patches)


def reference_logits(p: dict[str, Tensor], batch: PackedBatch, config: ModelConfig) -> Tensor:
    rows = []
    for b in range(len(batch.tokens)):
        length = int((batch.document[b] > 0).sum())
        x = p["embedding.weight"][batch.tokens[b, :length]].clone()
        for image in batch.image[b].unique().tolist()[1:]:
            patches = reference_patches(batch.pixels[image - 1], config) @ p["patch.weight"].T
            x[(batch.image[b, :length] == image).nonzero().flatten()] = patches
        for layer in range(config.depth):
            name = f"blocks.{layer}"
            y = [normed(row, p[f"{name}.attention_norm.weight"], config.norm_eps) for row in x]
            x = x + reference_attention(torch.stack(y), p, f"{name}.attention", batch, b, config)
            y = [normed(row, p[f"{name}.ffn_norm.weight"], config.norm_eps) for row in x]
            gate, up = (torch.stack(y) @ p[f"{name}.ffn.gate_up.weight"].T).chunk(2, dim=-1)
            x = x + (gate / (1 + torch.exp(-gate)) * up) @ p[f"{name}.ffn.down.weight"].T
        x = torch.stack([normed(row, p["norm.weight"], config.norm_eps) for row in x])
        rows.append(x @ p["head.weight"].T)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("backend", [AttentionBackend.mask, AttentionBackend.documents])
def test_equals_the_reference(backend: AttentionBackend) -> None:
    """float32 against float64 loops: logits, losses and the gradient of every parameter to 1e-5."""
    config = small(backend)
    model = build(config, seed=0)
    perturb_gains(model)
    batch = pack(MIXED, config=config, row_tokens=ROW_TOKENS)
    p = {n: v.detach().double().requires_grad_() for n, v in model.named_parameters()}
    expected = reference_logits(p, batch, config)
    used = batch.document[:, : expected.shape[1]] > 0
    found = model.logits(batch)[:, : expected.shape[1]]
    torch.testing.assert_close(found[used].double(), expected[used], rtol=0, atol=1e-5)

    labels = batch.labels[:, : expected.shape[1]]
    chances = expected.log_softmax(-1)
    terms = [-chances[b, at, labels[b, at]] for b, at in (labels != NO_LABEL).nonzero().tolist()]
    loss = torch.stack(terms).mean()
    loss.backward()
    out = model(batch)
    (out.loss_sum / len(terms)).backward()
    assert out.loss_sum.item() / len(terms) == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), p[name].grad, rtol=0, atol=1e-5)
        assert parameter.grad.any(), name


def perturb_gains(model: Model) -> None:
    """Away from 1, where a forgotten gain would not show."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=draw) - 0.5)


def test_output_lists_the_terms_of_the_sum() -> None:
    config = small()
    model, batch = build(config, seed=0), pack(MIXED, config=config, row_tokens=ROW_TOKENS)
    out = model(batch)
    labelled = (batch.labels != NO_LABEL).flatten()
    assert torch.equal(out.positions, labelled.nonzero().flatten())
    torch.testing.assert_close(out.token_losses.sum(), out.loss_sum.detach())
    assert not out.token_losses.requires_grad
    losses = torch.nn.functional.cross_entropy(
        model.logits(batch).flatten(0, 1)[labelled],
        batch.labels.flatten()[labelled],
        reduction="none",
    )
    torch.testing.assert_close(out.token_losses, losses.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [MIXED, TEXT, NO_LABELS])
def test_logits_are_computed_at_labelled_positions_only(rows: list) -> None:
    config = small()
    model, batch = build(config, seed=0), pack(rows, config=config, row_tokens=ROW_TOKENS)
    seen: list[torch.Size] = []
    model.head.register_forward_hook(lambda head, given, out: seen.append(given[0].shape))
    model(batch)
    labels = int((batch.labels != NO_LABEL).sum())
    assert seen == [(labels, config.width)]
    assert labels < (batch.document > 0).sum()  # so that the head of every position would show


def test_without_images_the_patch_embedding_gets_zeros() -> None:
    config = small()
    model, batch = build(config, seed=0), pack(TEXT, config=config, row_tokens=ROW_TOKENS)
    assert batch.pixels.shape[0] == 0
    model(batch).loss_sum.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads["patch.weight"] is not None
    assert {name for name, grad in grads.items() if not grad.any()} == {"patch.weight"}


def test_without_labels_every_gradient_is_zero() -> None:
    config = small()
    model, batch = build(config, seed=0), pack(NO_LABELS, config=config, row_tokens=ROW_TOKENS)
    out = model(batch)
    assert out.loss_sum.item() == 0
    assert len(out.token_losses) == len(out.positions) == 0
    out.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_images_are_found_by_number() -> None:
    """Renumbering the images with their pixels changes nothing, to the bit."""
    config = small()
    model, batch = build(config, seed=0), pack(MIXED, config=config, row_tokens=ROW_TOKENS)
    number = torch.tensor([0, 3, 1, 2], dtype=torch.int32)  # old number -> new
    pixels = torch.empty_like(batch.pixels)
    pixels[number[1:].long() - 1] = batch.pixels
    renumbered = replace(batch, image=number[batch.image.long()], pixels=pixels)
    assert torch.equal(model(renumbered).token_losses, model(batch).token_losses)


def test_bf16_weights_train() -> None:
    """All runs in the weights' dtype, with float32 losses near those of float32 weights."""
    config = small()
    model, batch = build(config, seed=0), pack(MIXED, config=config, row_tokens=ROW_TOKENS)
    expected = model(batch).token_losses.mean().item()
    model.bfloat16()
    out = model(batch)
    out.loss_sum.backward()
    assert out.loss_sum.dtype == torch.float32
    assert out.token_losses.mean().item() == pytest.approx(expected, rel=0.01)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_initialise_depends_on_seed_and_names_only() -> None:
    config = small()
    torch.manual_seed(1)
    first = build(config, seed=0)
    state = torch.get_rng_state()
    second, other = build(config, seed=0), build(config, seed=1)
    deeper = dict(build(small(depth=3), seed=0).named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, deeper[name])
        assert torch.equal(a, c) == (a.ndim == 1)


def test_initial_scales() -> None:
    """1/sqrt(fan_in), over sqrt(2 (layer + 1)) where a block writes; the cut keeps 0.987 of it."""
    model = build(ModelConfig(), seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        std = std_of(name, fan_in=parameter.shape[1])
        assert parameter.std().item() == pytest.approx(0.9866 * std, rel=0.03), name
        assert parameter.abs().max().item() <= 3 * std
    assert std_of("blocks.2.ffn.down.weight", fan_in=600) == pytest.approx(1 / 60)
    assert std_of("blocks.2.ffn.gate_up.weight", fan_in=100) == pytest.approx(1 / 10)


def test_weight_decay_shrinks_matrices_only() -> None:
    for name, parameter in build(small(), seed=0).named_parameters():
        assert group(name).decays == (parameter.ndim > 1), name


def test_a_parameter_without_a_rule_is_refused() -> None:
    model = torch.nn.ModuleDict({"novel": torch.nn.Linear(2, 2)})
    with pytest.raises(AssertionError, match=r"novel.weight has 0 rules"):
        initialise(model, seed=0)


def test_recomputing_keeps_less_and_changes_no_bit() -> None:
    """Each block runs twice, and only the blocks' inputs are kept for the way back."""
    config = small(depth=4)
    model, batch = build(config, seed=0), pack(MIXED, config=config, row_tokens=ROW_TOKENS)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    runs: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda block, given, number=number: runs.append(number))

    def step() -> tuple[dict[str, Tensor], int]:
        kept: dict[int, int] = {}  # bytes by storage, those of the weights aside
        model.zero_grad()
        runs.clear()

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(batch).loss_sum
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        return gradients, sum(kept.values())

    expected, whole = step()
    assert runs == [0, 1, 2, 3]
    model.blocks.recomputes = True
    found, part = step()
    assert runs == [0, 1, 2, 3, 3, 2, 1, 0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert 0 < part < whole / 3
