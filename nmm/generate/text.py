"""Text and images after prompts of both, many at a time.

Legend of shapes: B prompts, L positions of the longest, V ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data import images, sequences
from data.documents import Parts
from data.masking import masked
from data.tokenizer import IdTable, MaskIds, Tokenizer
from nmm.batch import NO_LABEL, Modality, PackedBatch
from nmm.codes import ImageCodes
from nmm.config import ImageConfig, ModelConfig
from nmm.errors import UserError
from nmm.generate.loop import Prompts, Rule, continue_prompts
from nmm.generate.rules import Writing, one_image, only_text, with_images
from nmm.generate.sampling import Sampling
from nmm.generate.seen import Seen
from nmm.model import Model

HOLE_TOKENS = 3  # more in a prompt with a hole: the document's end and the sentinel, twice


@dataclass(frozen=True)
class Written:
    """What follows a prompt or fills its hole: texts, and images uint8[S, S, 3], in reading order.

    `ended` says whether the model ended there by itself.
    """

    parts: list[str | np.ndarray]
    ended: bool

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[np.ndarray]:
        return [part for part in self.parts if not isinstance(part, str)]


def generate(
    model: Model,
    prompts: Sequence[Parts],
    *,
    tokenizer: Tokenizer,
    max_tokens: int,
    sampling: Sampling | None = None,
    at_once: int = 64,
    writing: Writing = Writing.text,
    codes: ImageCodes | None = None,
    after: Sequence[Parts] | None = None,
) -> list[Written]:
    """Continue every prompt by at most `max_tokens` tokens, or to the end of its document.

    With `after`, what follows the hole behind every prompt, the holes are filled in instead, which
    needs a model that was trained with spans (data.masking). Only what the `writing` asks for is
    ever taken; images need the `codes` that the model was trained with. What is drawn for a prompt
    depends on the seed and its number among the prompts, not on those beside it or on how many are
    worked on `at_once`.
    """
    seen = Seen(model.config.image, codes)
    ids = tokenizer.ids
    end = ids.eos if after is None else _masks(ids).end
    rule, end = _rule(writing, ids, model=model, codes=codes, max_tokens=max_tokens, end=end)
    found: list[Written] = []
    for start in range(0, len(prompts), at_once):
        here = slice(start, start + at_once)
        some = [seen.parts(parts) for parts in prompts[here]]
        behind = None if after is None else [seen.parts(parts) for parts in after[here]]
        rows = continue_prompts(
            model,
            lay_out(some, tokenizer=tokenizer, image=model.config.image, after=behind),
            rule=rule,
            end=end,
            max_tokens=max_tokens,
            sampling=sampling or Sampling(),
            streams=range(start, start + len(some)),
        )
        found += [
            Written(_read(ids, after=parts, tokenizer=tokenizer, seen=seen), ended=ids[-1] == end)
            for parts, ids in zip(some, rows, strict=True)
        ]
    return found


def _masks(ids: IdTable) -> MaskIds:
    assert ids.masks is not None, "a model trained without spans fills no hole"
    return ids.masks


def _rule(
    writing: Writing,
    ids: IdTable,
    *,
    model: Model,
    codes: ImageCodes | None,
    max_tokens: int,
    end: int,
) -> tuple[Rule, int]:
    """What may come next, and the id behind which nothing does: `end`, unless an image is all."""
    if writing is Writing.text:
        return only_text(ids, model=model, end=end), end
    assert codes is not None, writing
    if writing is Writing.image:
        return one_image(ids, model=model, image_codes=codes.tokens), ids.units[Modality.image].end
    rule = with_images(ids, model=model, image_codes=codes.tokens, max_tokens=max_tokens, end=end)
    return rule, end


def _read(
    ids: Sequence[int], *, after: Parts, tokenizer: Tokenizer, seen: Seen
) -> list[str | np.ndarray]:
    """The texts and images that ids stand for, behind the parts of a prompt."""
    image = tokenizer.ids.units.get(Modality.image)
    parts: list[str | np.ndarray] = []
    rest, before = list(ids), _last_text(after, tokenizer)
    while image is not None and image.begin in rest:
        start, stop = rest.index(image.begin), rest.index(image.end)
        codes = np.array(rest[start + 1 : stop]) - image.first
        parts += [tokenizer.decode(rest[:start], after=before), seen.drawn(codes)]
        rest, before = rest[stop + 1 :], []
    parts.append(tokenizer.decode(rest, after=before))
    return [part for part in parts if not isinstance(part, str) or part]


def check_prompts(
    prompts: Sequence[Parts],
    *,
    tokenizer: Tokenizer,
    model: ModelConfig,
    max_tokens: int,
    context_tokens: int,
    after: Sequence[Parts] | None = None,
) -> None:
    """Refuse images for a model of text, and what would go on beyond any document of the training.

    `after` are the parts behind holes, if there are some. Experts and blocks that choose among all
    tokens need auxiliary routers. Raises UserError.
    """
    if model.mod.every is not None and not model.mod.auxiliary_router:
        raise UserError(
            f"model.mod.every is {model.mod.every}, where blocks look at the tokens to come before "
            f"they take one; train auxiliary routers for it (parent.mode=auxiliary_routers), or "
            f"use a model without mixture of depths."
        )
    if model.moe.chooses_tokens and not model.moe.auxiliary_routers:
        raise UserError(
            "model.moe.routing is expert_choice, where experts look at the tokens to come before "
            "they take one; train auxiliary routers for it (parent.mode=auxiliary_routers), or use "
            "a model whose tokens choose (token_choice, modality_groups)."
        )
    behind = after or [None] * len(prompts)
    for number, (parts, more) in enumerate(zip(prompts, behind, strict=True), start=1):
        pixels = any(isinstance(part, bytes) for part in [*parts, *(more or [])])
        if not model.image.reads_pixels and pixels:
            raise UserError(
                f"prompt {number} has an image but model.image.kind is {model.image.kind.name}, so "
                f"the model reads no pixels; leave --image out."
            )
        length = prompt_tokens(parts, tokenizer=tokenizer, image=model.image, after=more)
        if length + max_tokens > context_tokens:
            raise UserError(
                f"prompt {number} has {length} tokens and --max-tokens is {max_tokens}, but the "
                f"model knows documents of at most {context_tokens} (data.context_tokens); shorten "
                f"the prompt, or lower --max-tokens."
            )


def prompt_tokens(
    parts: Parts, *, tokenizer: Tokenizer, image: ImageConfig, after: Parts | None = None
) -> int:
    """Positions that a prompt takes, with the begin of its document, and what is `after` a hole."""
    tokens = len(_tokens([*parts, *(after or [])], tokenizer, image=image).tokens) - 1
    return tokens if after is None else tokens + HOLE_TOKENS


def lay_out(
    prompts: Sequence[Parts],
    *,
    tokenizer: Tokenizer,
    image: ImageConfig,
    after: Sequence[Parts] | None = None,
) -> Prompts:
    """One prompt a row, as training lays out its documents, without their ends.

    With a hole between a prompt and what is `after` it, the document has an empty span there, whose
    end is left out: "b x 0 y e 0".
    """
    holes = [prompt_tokens(parts, tokenizer=tokenizer, image=image) for parts in prompts]
    if after is not None:
        prompts = [[*parts, *more] for parts, more in zip(prompts, after, strict=True)]
    sequences = [_tokens(parts, tokenizer, image=image) for parts in prompts]
    if after is not None:
        masks = _masks(tokenizer.ids)
        sequences = [
            masked(piece, [(hole, hole)], ids=masks)
            for piece, hole in zip(sequences, holes, strict=True)
        ]
    lengths = torch.tensor([len(s.tokens) - 1 for s in sequences])
    shape = (len(prompts), int(lengths.max()))
    tokens = torch.full(shape, tokenizer.ids.pad)
    shown, document = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    modality = torch.zeros(shape, dtype=torch.uint8)
    pixels: list[np.ndarray] = []
    for row, (parts, s) in enumerate(zip(prompts, sequences, strict=True)):
        here = slice(0, int(lengths[row]))
        tokens[row, here] = torch.from_numpy(s.tokens[here])
        number = torch.from_numpy(s.image[here])
        shown[row, here] = torch.where(number > 0, number + len(pixels), 0)
        document[row, here] = 1
        modality[row, here] = torch.from_numpy(s.modality[here])
        pixels += [
            images.decode(part, image.side_pixels) for part in parts if isinstance(part, bytes)
        ]
    side = image.side_pixels
    batch = PackedBatch(
        tokens=tokens,
        modality=modality,
        source=torch.zeros(shape, dtype=torch.uint8),
        document=document,
        image=shown,
        position=torch.arange(shape[1], dtype=torch.int32).expand(shape).contiguous(),
        labels=torch.full(shape, NO_LABEL),
        label_modality=torch.zeros(shape, dtype=torch.uint8),
        pixels=torch.from_numpy(np.array(pixels, np.uint8).reshape(-1, side, side, 3)),
    )
    return Prompts(batch, lengths, _modality_of(tokenizer.ids))


def _modality_of(ids: IdTable) -> torch.Tensor:
    """uint8[ids + 1]: units have theirs, all else is text, the borders of units too."""
    modalities = torch.full((ids.size + 1,), int(Modality.text), dtype=torch.uint8)
    for modality, unit in ids.units.items():
        modalities[unit.first : unit.first + unit.count] = int(modality)
    return modalities


def _tokens(parts: Parts, tokenizer: Tokenizer, *, image: ImageConfig) -> sequences.Sequence:
    texts = sequences.encode(parts, tokenizer)
    return sequences.sequence(
        texts, tokenizer.ids, image_tokens=image.tokens, modality=Modality.image
    )


def _last_text(parts: Parts, tokenizer: Tokenizer) -> list[int]:
    """The ids of the text that the prompt ends with, if it does."""
    return tokenizer.encode(parts[-1]) if parts and isinstance(parts[-1], str) else []
