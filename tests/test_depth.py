"""Mixture of depths: what a block that takes some tokens computes, learns, costs and looks at."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nmm.batch import Modality, PackedBatch, allowed, two_way
from nmm.config import (
    AttentionBackend,
    MoDConfig,
    ModelConfig,
    NormPosition,
    OptimConfig,
    compose,
    load,
)
from nmm.engine import parameter_groups
from nmm.errors import UserError
from nmm.flops import num_parameters
from nmm.model import Model, build
from nmm.model.depth import DepthRouter, Picked, flip
from nmm.routing import KEPT, KEPT_COLUMNS, SEEN, Kept
from tests.batches import pack, random_rows
from tests.family import EARLY, FAMILY, LATE, batch_for
from tests.sparse import DEEP

MOD = MoDConfig(every=2)
DENSE = {
    "pre": EARLY,
    "swin": replace(EARLY, norm_position=NormPosition.swin),
    "late": LATE,
    "metaseq": FAMILY["metaseq"],
}
BY_NAME = pytest.mark.parametrize("name", DENSE)
BACKENDS = (AttentionBackend.mask, AttentionBackend.documents)


class EveryToken(nn.Module):
    """In place of a router: all are taken, with a gate of 1."""

    def forward(self, x: Tensor, modality: Tensor, causal: bool = False) -> Picked:
        kept = modality != Modality.pad
        table = x.new_zeros(len(Modality), KEPT_COLUMNS)
        return Picked(kept, torch.ones(kept.shape), kept.shape[1], x.new_zeros(()), table)


@BY_NAME
@pytest.mark.parametrize("group_rows", [1, 2, 3])
def test_a_block_that_takes_all_with_a_gate_of_1_is_plain(name: str, group_rows: int) -> None:
    """Outputs and every gradient; with 3 rows together, of 2, the group is filled up."""
    for backend in BACKENDS:
        plain = replace(DENSE[name], attention=backend)
        mod = replace(MOD, capacity=1.0, group_rows=group_rows)
        models = build(plain, seed=0), build(replace(plain, mod=mod), seed=0)
        for block in models[1].blocks:
            if block.depth_router is not None:
                block.depth_router = EveryToken()
        batch = batch_for(plain, row_tokens=40)
        for model in models:
            output = model(batch)
            (output.loss_sum / len(output.positions)).backward()
        losses = [model(batch).token_losses for model in models]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
        pairs = zip(models[0].named_parameters(), models[1].named_parameters(), strict=True)
        for (parameter, first), (other, second) in pairs:
            assert parameter == other
            torch.testing.assert_close(second.grad, first.grad, rtol=1e-5, atol=1e-6)


def opinionated(config: ModelConfig) -> Model:
    """A model whose routers tell tokens apart."""
    model = build(config, seed=0).eval()
    for name, weight in model.named_parameters():
        if "router." in name:
            weight.data.mul_(30 if name.endswith("router.weight") else 4)
    return model


class Masked(NamedTuple):
    """Attention written out, to those that bool[L, L] lets see."""

    see: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * q.shape[-1] ** -0.5
        chance = scores.masked_fill(~self.see, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhqk,bkhe->bqhe", chance, v)


def by_hand(model: Model, batch: PackedBatch, x: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
    """The output of a dense block for each group's kept tokens, token by token; and who is kept."""
    block, mod = model.blocks[layer], model.config.mod
    router = block.depth_router
    assert isinstance(router, DepthRouter)
    out, kept = x.clone(), torch.zeros_like(batch.document, dtype=torch.bool)
    score = (x @ router.weight[0]).masked_fill(batch.document == 0, float("-inf"))
    for begin in range(0, len(x), mod.group_rows):
        rows = slice(begin, begin + mod.group_rows)
        limit = int((batch.document[rows] > 0).sum() * mod.capacity)
        best = score[rows].flatten().topk(limit).indices
        kept[rows] = (
            torch.zeros(score[rows].numel(), dtype=torch.bool)
            .index_fill(0, best, True)
            .view_as(score[rows])
        )
    image = two_way(batch.document, batch.image, attention=model.config.image_attention)
    see = allowed(batch.document, image) & kept[:, None]
    for b in range(len(x)):
        at = kept[b].nonzero().flatten()
        if len(at) == 0:
            continue

        rotary = model._rotary(batch.position[b : b + 1, at])
        plain = build(replace(model.config, mod=MoDConfig()), seed=0).blocks[layer]
        plain.load_state_dict(block.state_dict(), strict=False)
        given = x[b : b + 1, at]
        added = plain(given, rotary=rotary, plan=Masked(see[b][at][:, at])).output - given
        out[b, at] = x[b, at] + (added * score[b, at].sigmoid()[:, None])[0]
    return out, kept


@BY_NAME
@pytest.mark.parametrize("mod", [MOD, MoDConfig(every=1, capacity=0.4, group_rows=2)])
def test_kept_tokens_meet_in_their_documents_and_others_pass_by(name: str, mod: MoDConfig) -> None:
    for backend in BACKENDS:
        config = replace(DENSE[name], attention=backend, mod=mod)
        model = opinionated(config)
        batch = batch_for(config, row_tokens=40)
        seen: list[Tensor] = []
        model.blocks[0].register_forward_hook(
            lambda _, given, out, s=seen: s.extend((given[0], out.output))
        )
        with torch.no_grad():
            model(batch)
            expected, kept = by_hand(model, batch, seen[0], layer=0)
        assert kept.sum() == sum(int(n) for n in tokens_kept(batch, mod))
        torch.testing.assert_close(seen[1], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(seen[1][~kept], seen[0][~kept])
        assert (seen[1][kept] != seen[0][kept]).any(dim=-1).all()


def tokens_kept(batch: PackedBatch, mod: MoDConfig) -> list[float]:
    """The limit of every group of rows."""
    return [int((rows > 0).sum() * mod.capacity) for rows in batch.document.split(mod.group_rows)]


# The auxiliary router: nothing looks ahead where it decides.
BOTH = {
    "mod": replace(DEEP["mod"], mod=replace(DEEP["mod"].mod, auxiliary_router=True)),
    "mod of moma": replace(
        DEEP["mod of moma"],
        moe=replace(DEEP["mod of moma"].moe, auxiliary_routers=True),
        mod=replace(DEEP["mod of moma"].mod, auxiliary_router=True),
    ),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("backend", [AttentionBackend.auto, AttentionBackend.mask])
def test_later_tokens_move_who_is_taken_and_no_bit_of_what_is_guessed(
    name: str, backend: AttentionBackend
) -> None:
    config = replace(BOTH[name], attention=backend)
    plain, ours = opinionated(replace(DEEP[name], attention=backend)), opinionated(config)
    draw, leaks = torch.Generator().manual_seed(1), []
    for start in (20, 40, 90, 128):
        batch = pack([[(150,)], [(20, "image", 90)]], config=config, row_tokens=150)
        with torch.no_grad():
            before = plain.logits(batch), ours.logits(batch, causal=True)
            for _ in range(2):
                later = torch.randint(5, 64, batch.tokens[:, start:].shape, generator=draw)
                is_text = batch.modality[:, start:] == Modality.text
                batch.tokens[:, start:] = torch.where(is_text, later, batch.tokens[:, start:])
                leaks.append((plain.logits(batch) - before[0])[0, :start].abs().max())
                moved = (ours.logits(batch, causal=True) - before[1]).abs()
                assert (moved[0, :start] == 0).all()
                if start >= 40:  # where the image of the second row is over
                    assert (moved[1, :start] == 0).all()
                assert moved[0, start:].max() > 1e-3
    assert sum(leak > 1e-4 for leak in leaks) > len(leaks) / 3


def test_a_guess_is_learned_alone_and_costs_its_cross_entropy() -> None:
    """Equation 4; labels are the router's own choices among all tokens of a row."""
    config = BOTH["mod"]
    model = opinionated(config)
    router = model.blocks[0].depth_router
    assert isinstance(router, DepthRouter)
    batch = batch_for(config, row_tokens=40)
    x = torch.randn(2 * 40, config.width, requires_grad=True)
    picked = router(x, batch.modality)
    first, second = (p for n, p in router.named_parameters() if ".auxiliary." in f".{n}")
    guess = (torch.nn.functional.silu(x @ first.T) @ second.T)[:, 0]
    wanted, real = picked.kept.flatten(), (batch.document > 0).flatten()
    assert picked.kept.sum(dim=1).tolist() == [int(n) for n in (batch.document > 0).sum(1) * 0.25]
    surprise = torch.nn.functional.binary_cross_entropy_with_logits(
        guess[real], wanted[real].float(), reduction="sum"
    )
    torch.testing.assert_close(picked.auxiliary, surprise, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(picked.auxiliary, [x, *router.parameters()], allow_unused=True)
    assert [g is not None for g in gradients] == [False, False, True, True]
    guessed = router(x, batch.modality, causal=True)
    assert torch.equal(guessed.kept.flatten(), (guess > 0) & real)
    assert torch.equal(guessed.gate, picked.gate)
    keys = Kept(picked.statistics[None].double()).keys(config.mod)
    surprise = surprise.detach()
    assert keys["mod/auxiliary/loss"] == pytest.approx(float(surprise / real.sum()), rel=1e-5)
    right = float((wanted & (guess > 0) & real).sum())
    assert keys["mod/auxiliary/recall"] == pytest.approx(right / float(wanted.sum()))
    guesses = int(((guess > 0) & real).sum())
    assert keys["mod/auxiliary/load"] == guesses / int(wanted.sum())


def test_they_learn_who_is_taken() -> None:
    """From a fixed model on random documents; random guesses would be right for a quarter."""
    model = opinionated(replace(BOTH["mod"], width=64)).train()
    parameter_groups(model, OptimConfig())
    documents = random_rows(8, config=model.config, row_tokens=200)
    batch = pack(documents, config=model.config, row_tokens=200)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    keys = []
    for _ in range(60):
        output = model(batch)
        keys.append(Kept(output.kept.double()).keys(model.config.mod))
        optimizer.zero_grad()
        (output.auxiliary / (batch.document > 0).sum()).backward()
        optimizer.step()
    assert keys[-1]["mod/auxiliary/loss"] < 0.6 * keys[0]["mod/auxiliary/loss"]
    assert keys[-1]["mod/auxiliary/precision"] > 0.6
    assert keys[-1]["mod/auxiliary/recall"] > 0.6


def test_everything_else_is_frozen_beside_auxiliary_routers() -> None:
    model = build(BOTH["mod of moma"], seed=0)
    parameter_groups(model, OptimConfig())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".auxiliary." in n}
    assert any("depth_router" in n for n in trained)
    assert num_parameters(model.config).auxiliary_router == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_equal_tokens_tie_whatever_batch_they_are_in() -> None:
    """The first of them are taken, of rows alone and of rows together."""
    config = replace(DEEP["mod"], width=104)
    router = opinionated(config).blocks[0].depth_router
    assert isinstance(router, DepthRouter)
    for length in (7, 33, 150):
        x = torch.randn(1, 104).expand(5 * length, -1).contiguous()
        modality = torch.full((5, length), Modality.text, dtype=torch.uint8)
        kept = router(x, modality).kept
        assert kept[:, : length // 4].all()
        assert not kept[:, length // 4 :].any()


@pytest.mark.parametrize("name", ["mod", "mod in swin", "mod of moma"])
def test_errors_flip_their_part_of_the_decisions(name: str) -> None:
    """None at 0, where tokens in their places give the same as side by side; all at 1."""
    config = DEEP[name]
    model, batch = opinionated(config), batch_for(config, row_tokens=40)
    with torch.no_grad():
        plain = model(batch)
        found = {}
        for fraction, seed in ((0.0, 0), (0.3, 0), (0.3, 0), (0.3, 1), (1.0, 0)):
            flip(model, fraction=fraction, seed=seed)
            found.setdefault((fraction, seed), []).append(model(batch))
    torch.testing.assert_close(found[0.0, 0][0].token_losses, plain.token_losses)
    first, again = found[0.3, 0]
    assert torch.equal(first.token_losses, again.token_losses)
    assert not torch.equal(first.token_losses, found[0.3, 1][0].token_losses)
    seen, kept = (plain.kept[0].sum(dim=0)[column] for column in (SEEN, KEPT))
    assert found[1.0, 0][0].kept[0].sum(dim=0)[KEPT] == seen - kept


def test_the_kept_are_counted_by_modality() -> None:
    model = build(DEEP["mod of moma"], seed=0)
    batch = batch_for(model.config, row_tokens=40)
    found = Kept(model(batch).kept.double())
    keys, signals = found.keys(model.config.mod), found.signals(model.config.mod)
    assert keys.keys() == {f"mod/kept_fraction/modality/{name}" for name in ("text", "image")}
    # Of two blocks only the first takes some.
    assert [*signals] == [f"signals/kept_fraction/0/{name}" for name in ("text", "image")]
    assert [*signals.values()] == [*keys.values()]
    counts = {name: int((batch.modality == Modality[name]).sum()) for name in ("text", "image")}
    kept = sum(keys[f"mod/kept_fraction/modality/{name}"] * n for name, n in counts.items())
    assert kept == pytest.approx(sum(tokens_kept(batch, model.config.mod)))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["engine.compile=true"], "model.mod.every is 2 and engine.compile is true"),
        (["model.mod.auxiliary_router=true"], "model.mod.auxiliary_router is true, parent.run is"),
        (
            ["model=tiny_moma", "model.moe.auxiliary_routers=true"],
            "would still look ahead; set model.mod.auxiliary_router=true too",
        ),
        (
            ["model=tiny_moma", "model.mod.auxiliary_router=true"],
            "would still look ahead; set model.moe.auxiliary_routers=true too",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(asked: list[str], said: str) -> None:
    words = ["data=demo", "schedule.total_steps=9", "model.mod.every=2", *asked]
    with pytest.raises(UserError, match=said) as refusal:
        load(compose(words))
    assert "\n" not in str(refusal.value)
