"""Text to ids and back with a sentencepiece model, and the table of ids around it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import sentencepiece

from nmm.batch import Modality
from nmm.config import UnitModality
from nmm.errors import UserError


@dataclass(frozen=True)
class UnitIds:
    """The ids of one modality: those around a run of units, and behind them `count` units."""

    begin: int
    end: int
    count: int

    @property
    def first(self) -> int:
        """The id of unit 0."""
        return self.end + 1


@dataclass(frozen=True)
class MaskIds:
    """The ids of the causal masked objective: a span's end, and behind it the sentinels."""

    end: int
    count: int

    @property
    def first(self) -> int:
        """The id of sentinel 0."""
        return self.end + 1


@dataclass(frozen=True)
class IdTable:
    """What ids mean: the model's pieces are 0 .. text_end-1, the sentinels follow, `size` in all.

    A model without a pad, begin or end piece gets a sentinel for it after the image id. Behind all
    these come the `units` of every modality that data.units names, and the `masks` that
    data.masking asks for.
    """

    pad: int
    unk: int
    bos: int
    eos: int
    text_end: int
    image: int
    size: int
    units: dict[Modality, UnitIds] = field(default_factory=dict)
    masks: MaskIds | None = None

    def with_units(self, counts: Mapping[UnitModality, int]) -> "IdTable":
        """The table with ids for so many units of every modality, in the order given."""
        units, size = dict(self.units), self.size
        for name, count in counts.items():
            units[Modality[name.value]] = UnitIds(begin=size, end=size + 1, count=count)
            size += 2 + count
        return replace(self, units=units, size=size)

    def with_masks(self, sentinels: int) -> "IdTable":
        """The table with ids for so many sentinels and the end of a span; 0: none of these."""
        if not sentinels:
            return self
        masks = MaskIds(end=self.size, count=sentinels)
        return replace(self, masks=masks, size=masks.first + sentinels)


class Tokenizer:
    """A sentencepiece model; `hash` is the sha256 of its bytes, `ids` the table of its ids."""

    def __init__(
        self,
        path: str | Path,
        *,
        units: Mapping[UnitModality, int] | None = None,
        sentinels: int = 0,
    ) -> None:
        self.path = str(path)
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"data.tokenizer is {path}, which cannot be read ({error.strerror}); "
                f"`python -m data.prepare.demo` makes the demo's, "
                f"`python -m data.prepare.tokenizer` trains another one; or correct the path."
            ) from None
        self.hash = hashlib.sha256(model).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(model)
        except RuntimeError:
            raise UserError(
                f"data.tokenizer is {path}, which is not a sentencepiece model; train one with "
                f"`python -m data.prepare.tokenizer`, or correct the path."
            ) from None
        self.ids = _id_table(self._model).with_units(units or {}).with_masks(sentinels)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int], *, after: Sequence[int] = ()) -> str:
        """Text of the ids; pad, begin, end, sentinels and unused ids are left out.

        `after` are the ids before them: a space is part of the text only where there is some.
        """
        before, both = (self._model.decode(self._pieces(x)) for x in (after, [*after, *ids]))
        return both[len(before) :] if both.startswith(before) else self.decode(ids)

    def piece(self, number: int) -> str:
        """The piece of an id as the model spells it, `<s>` or "\u2581the"."""
        return self._model.id_to_piece(number)

    def _pieces(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if 0 <= i < self.ids.text_end and not self._model.is_control(i)]

    def check_capacity(self, vocab_size: int) -> None:
        """Refuse a model whose embedding table is smaller than the id table."""
        if vocab_size < self.ids.size:
            more = {"data.units": self.ids.units, "data.masking": self.ids.masks}
            named = " and ".join(key for key, there in more.items() if there)
            raise UserError(
                f"model.vocab_size is {vocab_size} but the tokenizer {self.path} needs "
                f"{self.ids.size} ids{f' with {named}' if named else ''}; set "
                f"model.vocab_size to {self.ids.size} or more."
            )


def _id_table(model: sentencepiece.SentencePieceProcessor) -> IdTable:
    image = model.vocab_size()
    size = image + 1
    special: dict[str, int] = {}
    for name, piece in (("pad", model.pad_id()), ("bos", model.bos_id()), ("eos", model.eos_id())):
        special[name] = piece if piece >= 0 else size
        size += piece < 0
    pad, bos, eos = special["pad"], special["bos"], special["eos"]
    return IdTable(
        pad=pad, unk=model.unk_id(), bos=bos, eos=eos, text_end=image, image=image, size=size
    )
