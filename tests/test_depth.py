"""Mixture of depths: what a block that takes some tokens computes, learns, costs and looks at."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nmm.batch import Modality, PackedBatch, allowed, two_way
from nmm.config import AttentionBackend, MoDConfig, ModelConfig, NormPosition
from nmm.model import Model, build
from nmm.model.depth import DepthRouter, Picked
from nmm.routing import KEPT_COLUMNS
from tests.family import EARLY, FAMILY, LATE, batch_for

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
