"""Memory for what the blocks keep for the way back, as a pure function; no torch."""

from nmm.config import FFN, BlockConfig, ModelConfig, Positions, QKNorm

# Tensors of the inner width: inputs and outputs of what is not linear, once where they are equal.
INNER = {FFN.swiglu: 4, FFN.gelu: 2, FFN.relu: 1}


def activation_bytes(blocks: BlockConfig, *, tokens: int, recomputes: bool) -> int:
    """Of a stack of blocks in bf16, by `engine.activation_checkpointing`.

    A block keeps ten tensors of its width: its input, that with attention added, both normed,
    queries, keys and values, queries and keys as they were normed or rotated, and what was attended
    to. Dropout keeps a byte for each number, attention the logarithm of every head's sum in fp32.
    """
    as_they_were = blocks.qk_norm is QKNorm.none and not _rotates(blocks)
    width_bytes = 2 * (8 if as_they_were else 10) + (2 if blocks.dropout else 0)
    block = width_bytes * blocks.width + 2 * INNER[blocks.ffn] * blocks.hidden + 4 * blocks.heads
    if recomputes:  # the inputs of all blocks, and one block at a time
        return tokens * (2 * blocks.width * blocks.depth + block)
    return tokens * block * blocks.depth


def _rotates(blocks: BlockConfig) -> bool:
    return isinstance(blocks, ModelConfig) and blocks.positions is Positions.rope
