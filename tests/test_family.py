"""Every member of the family: its parameters, its groups, what moves and what is frozen."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from nmm.batch import PackedBatch
from nmm.config import OptimConfig
from nmm.engine import build_optimizer, parameter_groups
from nmm.model import Group, Model, build, group
from tests.batches import pack
from tests.family import EARLY, FAMILY, LATE, batch_for

RATE, DECAY = 1e-2, 1e-3


def step(model: Model, batch: PackedBatch, optim: OptimConfig) -> list[dict]:
    """One update by AdamW; returns the optimizer's groups."""
    optimizer = build_optimizer(parameter_groups(model, optim), optim)
    model(batch).loss_sum.backward()
    optimizer.step()
    return optimizer.param_groups


@pytest.mark.parametrize("name", FAMILY)
def test_every_parameter_is_in_one_group_and_moves(name: str) -> None:
    config = FAMILY[name]
    model = build(config, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim = OptimConfig(learning_rate=RATE, weight_decay=0.0, vision_rate_multiplier=0.5)
    groups = step(model, batch_for(config, row_tokens=40), optim)
    held = Counter(id(p) for options in groups for p in options["params"])
    assert held == Counter(id(p) for p in model.parameters())
    assert [o["name"] for o in groups] == sorted(
        (o["name"] for o in groups), key=lambda name: list(Group).index(Group[name])
    )
    for parameter_name, p in model.named_parameters():
        assert not torch.equal(p, before[parameter_name]), parameter_name
        # Adam's first step moves no number by more than the rate of its group.
        rate = RATE * (0.5 if parameter_name.startswith("vision.") else 1.0)
        moved = (p - before[parameter_name]).abs().max().item()
        assert moved == pytest.approx(rate, rel=0.01), parameter_name


@pytest.mark.parametrize("name", FAMILY)
def test_gains_begin_at_one_biases_at_zero_and_neither_decays(name: str) -> None:
    for parameter_name, p in build(FAMILY[name], seed=0).named_parameters():
        found = group(parameter_name)
        assert found.is_vision == parameter_name.startswith("vision.")
        is_table = "position" in parameter_name
        assert found.decays == (p.ndim == 2 and not is_table), parameter_name
        if p.ndim == 1:
            start = 0.0 if parameter_name.endswith("bias") else 1.0
            assert torch.equal(p, torch.full_like(p, start)), parameter_name
        else:
            assert 0.3 < p.std() * p.shape[1] ** 0.5 < 1.1, parameter_name


def test_decay_is_that_of_the_groups_own_rate() -> None:
    """A step at the peak shrinks every matrix by weight_decay, whatever its learning rate."""
    model = build(LATE, seed=0)
    optim = OptimConfig(learning_rate=RATE, weight_decay=DECAY, vision_rate_multiplier=0.01)
    for options in parameter_groups(model, optim):
        decays = Group[options["name"]].decays
        assert options["lr"] * options["weight_decay"] == pytest.approx(DECAY if decays else 0.0)


def test_a_frozen_encoder_does_not_move_and_has_no_state() -> None:
    model = build(LATE, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = step(model, batch_for(LATE, row_tokens=40), OptimConfig(vision_rate_multiplier=0.0))
    assert [options["name"] for options in groups] == ["decay", "no_decay"]
    held = {id(p) for options in groups for p in options["params"]}
    for name, p in model.named_parameters():
        frozen = name.startswith("vision.")
        assert torch.equal(p, before[name]) == frozen, name
        assert (id(p) in held) == p.requires_grad == (p.grad is not None) == (not frozen), name


def test_without_images_the_encoder_gets_zeros() -> None:
    """A batch of text runs every module, so that all processes make the same collectives."""
    model, batch = build(LATE, seed=0), pack([[(20,)]], config=LATE, row_tokens=30)
    assert len(batch.pixels) == 0
    assert model.vision is not None
    assert model.vision(batch.pixels).shape == (1, 9, 16)
    model(batch).loss_sum.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any() != name.startswith(("vision.", "connector.")), name


def test_compiled_blocks_of_the_encoder_serve_any_number_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traced for one image and for several, and not again; the outputs are as without."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # DeepSpeed's ZeRO-3 leaves another in its place, for all that comes later in a process.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    torch.compiler.reset()
    plain, compiled = (build(LATE, seed=0).vision for _ in range(2))
    assert plain is not None
    assert compiled is not None
    compiled.blocks.compile_blocks()
    draw, frames = torch.Generator().manual_seed(0), counters["frames"]
    before = frames["ok"]
    for images in (1, 2, 3, 5, 7, 8, 9, 11, 12, 13):
        pixels = torch.randint(0, 256, (images, 12, 12, 3), generator=draw).byte()
        with torch.no_grad():
            found, expected = compiled(pixels), plain(pixels)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert frames["ok"] - before == 2
    torch.compiler.reset()


def test_text_costs_the_same_with_and_without_an_encoder() -> None:
    """The decoder of late fusion begins with the weights of early fusion's, by name."""
    batch = pack([[(20,), (9,)]], config=EARLY, row_tokens=30)
    early, late = build(EARLY, seed=0), build(LATE, seed=0)
    assert torch.equal(early(batch).token_losses, late(batch).token_losses)


def test_images_are_encoded_alone_and_whole() -> None:
    """Any patch moves all tokens of its image and none of another image."""
    model, draw = build(LATE, seed=0), torch.Generator().manual_seed(0)
    assert model.vision is not None
    pixels = torch.randint(0, 256, (2, 12, 12, 3), generator=draw).byte()
    other = pixels.clone()
    other[0, 8:, 8:] = 255 - other[0, 8:, 8:]  # the last patch
    with torch.no_grad():
        before, after = model.vision(pixels), model.vision(other)
    assert before.shape == (2, 9, 16)
    assert torch.equal(before[1], after[1])
    assert (before[0] != after[0]).any(dim=-1).all()


@pytest.mark.parametrize("name", ["chameleon", "late with biases"])
def test_dropout_drops_in_training_only(name: str) -> None:
    model, batch = build(FAMILY[name], seed=0), batch_for(FAMILY[name], row_tokens=40)

    def losses(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(batch).token_losses

    assert torch.equal(losses(0), losses(0))
    assert not torch.equal(losses(0), losses(1))
    model.eval()
    assert torch.equal(losses(0), losses(1))
    kept = replace(FAMILY[name], dropout=0.0)
    kept = replace(kept, vision=replace(kept.vision, dropout=0.0))
    assert torch.equal(losses(0), build(kept, seed=0)(batch).token_losses)


def test_a_tied_head_is_the_embedding() -> None:
    config = FAMILY["metaseq"]
    model = build(config, seed=0)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    other = build(config, seed=1)
    other.load_state_dict(model.state_dict())
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)


def test_learned_positions_begin_anew_with_every_document() -> None:
    config = FAMILY["metaseq"]
    model = build(config, seed=0)
    packed = pack([[(12,), (9,)]], config=config, row_tokens=21)
    with torch.no_grad():
        first = model.logits(packed)[0, 12:]
        model.position.weight[9:] = 7.0
        assert torch.equal(model.logits(packed)[0, 12:], first)
        model.position.weight[8] = 7.0
        assert not torch.equal(model.logits(packed)[0, 12:], first)
