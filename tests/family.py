"""Small members of the model family, which together use every option of nmm/config/block.py."""

from dataclasses import replace

from nmm.batch import PackedBatch
from nmm.config import (
    FFN,
    ImageConfig,
    ImageKind,
    ModelConfig,
    Norm,
    NormPosition,
    Positions,
    QKNorm,
    VisionConfig,
)
from tests.batches import IMAGE, pack, small

EARLY = small()
TEXT = replace(EARLY, image=ImageConfig(ImageKind.none))
LATE = replace(
    EARLY,
    image=replace(EARLY.image, kind=ImageKind.encoder),
    vision=VisionConfig(width=16, depth=2, heads=2),
)
FAMILY: dict[str, ModelConfig] = {
    "early": EARLY,
    "late": LATE,
    "text": TEXT,
    "chameleon": replace(TEXT, norm=Norm.rms, qk_norm=QKNorm.head, dropout=0.1),
    "swin": replace(
        TEXT, norm=Norm.rms, norm_position=NormPosition.swin, qk_norm=QKNorm.head, ffn_hidden=48
    ),
    "llama": replace(TEXT, norm=Norm.rms, qk_norm=QKNorm.none),
    "metaseq": replace(
        TEXT,
        tied_head=True,
        positions=Positions.learned,
        max_positions=64,
        qk_norm=QKNorm.none,
        ffn=FFN.relu,
        biases=True,
    ),
    "shared keys": replace(
        LATE,
        kv_heads=2,
        biases=True,
        vision=VisionConfig(width=16, depth=1, heads=2, kv_heads=1),
    ),
    "early with biases": replace(EARLY, biases=True, ffn=FFN.gelu),
    "late with biases": replace(
        LATE,
        biases=True,
        vision=VisionConfig(
            width=16, depth=1, heads=1, qk_norm=QKNorm.none, ffn=FFN.gelu, biases=True, dropout=0.1
        ),
    ),
    "late swin": replace(
        LATE,
        norm_position=NormPosition.swin,
        vision=VisionConfig(width=16, depth=1, norm=Norm.rms, norm_position=NormPosition.swin),
    ),
}
# Heads of queries that share keys and values, as in Chameleon 34B.
FAMILY |= {
    f"{name} with shared keys": replace(FAMILY[name], kv_heads=heads)
    for name, heads in (("llama", 2), ("swin", 1))
}


def batch_for(config: ModelConfig, *, row_tokens: int) -> PackedBatch:
    """Two rows of 40 tokens at most, with three images where the model reads images."""
    if config.image.kind is ImageKind.none:
        return pack([[(12,), (7,)], [(20,)]], config=config, row_tokens=row_tokens)
    rows = [[(2, IMAGE, 3, IMAGE, 4), (7,)], [(1, IMAGE, 6), (5,)]]
    return pack(rows, config=config, row_tokens=row_tokens)
