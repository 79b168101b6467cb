"""Memory for what the blocks keep for the way back, as a pure function; no torch."""

from nmm.config import FFN, BlockConfig, ModelConfig, Positions, QKNorm

# Tensors of the inner width: inputs and outputs of what is not linear, once where they are equal.
INNER = {FFN.swiglu: 4, FFN.gelu: 2, FFN.relu: 1}


def activation_bytes(blocks: BlockConfig, *, tokens: int, recomputes: bool) -> int:
    """Of a stack of blocks in bf16 at the tokens of a row, by `engine.activation_checkpointing`.

    Several rows keep several times as much.
    """
    each = [tokens * _token_bytes(blocks)] * blocks.depth
    if isinstance(blocks, ModelConfig) and blocks.mod.every is not None:
        some = _depth_bytes(blocks, tokens=tokens)
        each = [some if blocks.mod.picks(n) else of_all for n, of_all in enumerate(each)]
    if recomputes:  # the inputs of all blocks, and one block at a time
        return tokens * 2 * blocks.width * blocks.depth + max(each)
    return sum(each)


def _token_bytes(blocks: BlockConfig) -> int:
    """Per token, what a block keeps that takes all.

    These are seven tensors of its width: its input, that with attention added, both normed,
    queries, these as they were normed or rotated, and what was attended to; and three of the width
    of keys: keys, values, and keys as they were (a kernel with a mask wants copies of the first two
    for every head of queries, which are not counted). Dropout keeps a byte for each number,
    attention the logarithm of every head's sum in fp32. Of experts see `_expert_bytes`.
    """
    as_they_were = blocks.qk_norm is QKNorm.none and not _rotates(blocks)
    width_bytes = 2 * (6 if as_they_were else 7) + (2 if blocks.dropout else 0)
    key_bytes = 2 * (2 if as_they_were else 3) * blocks.key_width
    inner_bytes = 2 * INNER[blocks.ffn] * blocks.hidden
    if isinstance(blocks, ModelConfig) and blocks.sparse:
        inner_bytes = _expert_bytes(blocks)
    return width_bytes * blocks.width + key_bytes + inner_bytes + 4 * blocks.heads


def _depth_bytes(model: ModelConfig, *, tokens: int) -> int:
    """Of a row, what a block keeps that takes some tokens.

    Of each token the router's input in fp32, its gate, and its place among those that are taken.
    Of one that is taken what a plain block keeps, what it is about to add, its gate and place, its
    angles, and a row of the mask, which all blocks have of their own.
    """
    taken = int(tokens * model.mod.capacity)
    of_taken = _token_bytes(model) + 2 * model.width + 12 + 2 * taken * model.mod.group_rows
    of_taken += 4 * model.head_dim if _rotates(model) else 0
    return tokens * (4 * model.width + 12) + taken * of_taken


def _expert_bytes(model: ModelConfig) -> int:
    """Per token, what experts keep in place of a dense layer.

    The rows that go to them and come back, and what they keep inside; numbers of slots and experts.
    The router keeps the normed input as dense layers do; without a router nobody keeps it.
    """
    moe = model.moe
    slots = moe.active_fraction * moe.total_experts
    of_slots = slots * (2 * 2 * model.width + 2 * INNER[model.ffn] * model.expert_hidden + 44)
    of_router = 12 * moe.total_experts if moe.has_router else -2 * model.width
    return round(of_slots + of_router)


def _rotates(blocks: BlockConfig) -> bool:
    return isinstance(blocks, ModelConfig) and blocks.positions is Positions.rope
