"""Counted activations are those that autograd keeps."""

from dataclasses import replace

import pytest
import torch

from nmm.activations import activation_bytes
from nmm.config import (
    FFN,
    AttentionBackend,
    ExpertGroups,
    ImageKind,
    MoDConfig,
    ModelConfig,
    MoEConfig,
    NormPosition,
    Positions,
    QKNorm,
    Routing,
    VisionConfig,
)
from nmm.model import build
from tests.batches import IMAGE, pack, small

TOKENS = 256
EARLY = replace(small(AttentionBackend.mask), width=256, ffn_hidden=1024)
DECODERS = {
    "early": EARLY,
    "narrower inside": replace(EARLY, ffn_hidden=512),
    "wider": replace(EARLY, width=512, ffn_hidden=1408),
    "queries and keys as they are, rotated": replace(EARLY, qk_norm=QKNorm.none),
    "norms of heads, behind": replace(EARLY, qk_norm=QKNorm.head, norm_position=NormPosition.swin),
    "gelu, biases": replace(EARLY, ffn=FFN.gelu, biases=True),
    "metaseq": replace(
        EARLY,
        ffn=FFN.relu,
        biases=True,
        qk_norm=QKNorm.none,
        positions=Positions.learned,
        max_positions=TOKENS,
    ),
    "experts": replace(EARLY, moe=MoEConfig(Routing.token_choice)),
    "two of eight": replace(EARLY, moe=MoEConfig(Routing.token_choice, top_k=2, hidden=512)),
    "experts that choose, norms behind": replace(
        EARLY, norm_position=NormPosition.swin, moe=MoEConfig(Routing.expert_choice)
    ),
    "an expert for each": replace(
        EARLY, moe=MoEConfig(Routing.modality_hard, groups=ExpertGroups(text=1, image=1))
    ),
    "some tokens": replace(EARLY, mod=MoDConfig(every=1)),
    "half of two rows at a time": replace(
        EARLY,
        positions=Positions.learned,
        max_positions=TOKENS,
        mod=MoDConfig(every=1, capacity=0.5, group_rows=2),
    ),
    "some tokens to experts": replace(
        EARLY,
        norm_position=NormPosition.swin,
        mod=MoDConfig(every=1),
        moe=MoEConfig(Routing.expert_choice),
    ),
}


def kept_bytes(config: ModelConfig, rows: list) -> int:
    """What autograd holds after a forward pass in bf16, parameters excluded."""
    module = build(config, seed=0).to(torch.bfloat16)
    batch = pack(rows, config=config, row_tokens=TOKENS)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(batch)
    assert output.loss_sum > 0
    storages = {key: tensor.untyped_storage() for key, tensor in kept.items()}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


@pytest.mark.parametrize("name", DECODERS)
def test_a_block_keeps_what_is_counted(name: str) -> None:
    """Of one block more, so that what is kept once does not count."""
    one, two = (replace(DECODERS[name], depth=depth) for depth in (1, 2))
    rows = [[(TOKENS,)]] * one.mod.group_rows
    counted = len(rows) * activation_bytes(one, tokens=TOKENS, recomputes=False)
    found = kept_bytes(two, rows) - kept_bytes(one, rows)
    assert found == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_so_does_a_block_with_shared_keys(kv_heads: int) -> None:
    """Here with keys and values once for every head of queries, as the mask wants them."""
    shared = replace(EARLY, kv_heads=kv_heads)
    one, two = (replace(shared, depth=depth) for depth in (1, 2))
    counted = activation_bytes(one, tokens=TOKENS, recomputes=False)
    copies = TOKENS * 2 * (2 * shared.width - shared.key_width)
    found = kept_bytes(two, [[(TOKENS,)]]) - kept_bytes(one, [[(TOKENS,)]])
    assert found == pytest.approx(counted + copies, rel=0.01)


def test_so_does_a_block_of_the_encoder() -> None:
    image = replace(EARLY.image, kind=ImageKind.encoder)
    vision = VisionConfig(width=128, heads=4, depth=1, qk_norm=QKNorm.none, ffn=FFN.gelu)
    one, two = (
        replace(EARLY, image=image, vision=replace(vision, depth=depth)) for depth in (1, 2)
    )
    rows = [[(1, *[IMAGE, 1] * 20)]]
    counted = activation_bytes(vision, tokens=20 * image.tokens, recomputes=False)
    found = kept_bytes(two, rows) - kept_bytes(one, rows)
    assert found == pytest.approx(counted, rel=0.01)


def test_recomputing_keeps_inputs_and_one_block() -> None:
    deep = replace(EARLY, depth=9)
    one = activation_bytes(replace(EARLY, depth=1), tokens=TOKENS, recomputes=False)
    kept = activation_bytes(deep, tokens=TOKENS, recomputes=True)
    assert kept == one + 9 * TOKENS * 2 * EARLY.width


def test_every_other_block_is_counted_as_what_it_is() -> None:
    """Of nine blocks five take some tokens; with recomputing the largest is there alone."""
    tokens = {"tokens": TOKENS}
    plain, some = EARLY, DECODERS["some tokens"]
    mixed = replace(EARLY, depth=9, mod=MoDConfig(every=2))
    for recomputes, expected in (
        (False, lambda all_, few: 4 * all_ + 5 * few),
        (True, lambda all_, few: all_ + 9 * TOKENS * 2 * EARLY.width),
    ):
        one = [
            activation_bytes(replace(each, depth=1), **tokens, recomputes=False)
            for each in (plain, some)
        ]
        assert activation_bytes(mixed, **tokens, recomputes=recomputes) == expected(*one)
