"""Ids after prompts, one at a time, with a cache of keys and values.

Legend of shapes: B prompts, L positions of the longest, T ids written so far, V ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmm.batch import PackedBatch
from nmm.generate.sampling import Sampling, choose, uniforms
from nmm.model import Cache, Model

# bool[B, V] or [V] of the ids that may come next, from those written so far, int64[B, T]; at least
# one for every prompt, even where it has ended, though what is chosen there is not kept.
Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prompts:
    """One prompt a row, each from column 0 on; lengths int64[B], the rest of a row is padding.

    `modality_of` uint8[ids + 1] is the modality of every id, and at its end that of unused ones.
    """

    batch: PackedBatch
    lengths: Tensor
    modality_of: Tensor

    def to(self, device: torch.device) -> "Prompts":
        others = (self.lengths.to(device), self.modality_of.to(device))
        return Prompts(self.batch.to(device), *others)


@torch.no_grad()
def continue_prompts(
    model: Model,
    prompts: Prompts,
    *,
    rule: Rule,
    end: int,
    max_tokens: int,
    sampling: Sampling,
    streams: Sequence[int],
) -> list[list[int]]:
    """Up to `max_tokens` ids after every prompt, the last one `end` where the model ended there.

    `streams` number the prompts: what is drawn for one depends on (seed, its number) alone.
    """
    device = next(model.parameters()).device
    prompts = prompts.to(device)
    at = prompts.lengths - 1
    cache = Cache(depth=model.config.depth, columns=prompts.batch.tokens.shape[1] + max_tokens - 1)
    written = at.new_empty(len(at), max_tokens)
    ended = torch.zeros_like(at, dtype=torch.bool)
    logits = model.first_logits(prompts.batch, at=at, cache=cache)
    for step in range(max_tokens):
        drawn = uniforms(sampling.seed, streams=list(streams), step=step)
        chosen = choose(
            logits,
            allowed=rule(written[:, :step]),
            sampling=sampling,
            uniform=torch.tensor(drawn, dtype=torch.float64, device=device),
        )
        written[:, step] = chosen
        ended |= chosen == end
        if step == max_tokens - 1 or ended.all():
            break
        at = at + 1
        modality = prompts.modality_of[chosen.clamp(max=len(prompts.modality_of) - 1)]
        logits = model.next_logits(chosen, at=at, cache=cache, modality=modality)
    return [_through_first(end, ids) for ids in written[:, : step + 1].tolist()]


def _through_first(end: int, ids: list[int]) -> list[int]:
    """The ids up to the first `end`, which is kept; all of them where there is none."""
    return ids[: ids.index(end) + 1] if end in ids else ids
