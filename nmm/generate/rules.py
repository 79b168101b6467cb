"""What may come next: text, an image of codes, or both; pure functions of what was written.

Legend of shapes: B prompts, T ids written so far, V ids.
"""

from enum import Enum

import torch
from torch import Tensor

from data.tokenizer import IdTable, UnitIds
from nmm.batch import Modality
from nmm.generate.loop import Rule
from nmm.model import Model

BORDERS = 2  # an image has a begin and an end


class Writing(Enum):
    """What a model is asked for.

    text   pieces of text and the end of the document, or of the span that fills a hole
    image  one image, and nothing else
    both   text, and images where the model wants some, up to that end
    """

    text = "text"
    image = "image"
    both = "both"


def only_text(ids: IdTable, *, model: Model, end: int) -> Rule:
    """The rule that takes every text piece and the end, and nothing else."""
    allowed = _text(ids, model=model, end=end)

    def rule(written: Tensor) -> Tensor:
        return allowed

    return rule


def with_images(ids: IdTable, *, model: Model, image_codes: int, max_tokens: int, end: int) -> Rule:
    """The rule of text and whole images: begin, exactly `image_codes` codes, end.

    Codes are nowhere else, and no image begins that would not be whole after `max_tokens`.
    """
    image = ids.units[Modality.image]
    text, begin, codes, end_of_image = (
        _text(ids, model=model, end=end),
        *(_only(part, model=model) for part in _parts(image)),
    )

    def rule(written: Tensor) -> Tensor:
        left = image_left(written, image, image_codes=image_codes)[:, None]
        fits = written.shape[1] + image_codes + BORDERS <= max_tokens
        outside = text | begin if fits else text
        return torch.where(left == 0, outside, torch.where(left == 1, end_of_image, codes))

    return rule


def one_image(ids: IdTable, *, model: Model, image_codes: int) -> Rule:
    """The rule of a single image, which ends what is written."""
    image = ids.units[Modality.image]
    begin, codes, end = (_only(part, model=model) for part in _parts(image))

    def rule(written: Tensor) -> Tensor:
        done = written.shape[1]
        return begin if done == 0 else codes if done <= image_codes else end

    return rule


def image_left(written: Tensor, image: UnitIds, *, image_codes: int) -> Tensor:
    """int64[B]: the ids that the image needs in which int64[B, T] `written` ends, 0 outside of one.

    With images of 2 codes: "x" 0, "x <" 3, "x < 7" 2, "x < 7 3" 1, "x < 7 3 >" 0.
    """
    length = written.shape[1]
    places = torch.arange(1, length + 1, device=written.device)
    begun = torch.where(written == image.begin, places, 0)
    last = begun.amax(dim=1) if length else written.new_zeros(len(written))
    left = image_codes + 1 - (length - last)
    return torch.where(last > 0, left.clamp(min=0), 0)


def _parts(image: UnitIds) -> tuple[range, range, range]:
    """The ids that begin an image, are in it, and end it."""
    return (
        range(image.begin, image.begin + 1),
        range(image.first, image.first + image.count),
        range(image.end, image.end + 1),
    )


def _text(ids: IdTable, *, model: Model, end: int) -> Tensor:
    allowed = _only(range(ids.text_end), model=model)
    allowed[[ids.pad, ids.unk, ids.bos, ids.eos]] = False
    allowed[end] = True
    return allowed


def _only(some: range, *, model: Model) -> Tensor:
    """bool[V], true at these ids."""
    device = next(model.parameters()).device
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    allowed[some.start : some.stop] = True
    return allowed
