"""Text to ids and back with a sentencepiece model, and the table of ids around it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from nmm.errors import UserError


@dataclass(frozen=True)
class IdTable:
    """What ids mean: the model's pieces are 0 .. text_end-1, the sentinels follow, `size` in all.

    A model without a pad, begin or end piece gets a sentinel for it after the image id.
    """

    pad: int
    unk: int
    bos: int
    eos: int
    text_end: int
    image: int
    size: int


class Tokenizer:
    """A sentencepiece model; `hash` is the sha256 of its bytes, `ids` the table of its ids."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"data.tokenizer is {path}, which cannot be read ({error.strerror}); "
                f"train one with `python -m data.prepare.tokenizer`, or correct the path."
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
        self.ids = _id_table(self._model)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; pad, begin, end, sentinels and unused ids are left out."""
        text = [i for i in ids if 0 <= i < self.ids.text_end and not self._model.is_control(i)]
        return self._model.decode(text)

    def check_capacity(self, vocab_size: int) -> None:
        """Refuse a model whose embedding table is smaller than the id table."""
        if vocab_size < self.ids.size:
            raise UserError(
                f"model.vocab_size is {vocab_size} but the tokenizer {self.path} needs "
                f"{self.ids.size} ids; set model.vocab_size to {self.ids.size} or more."
            )


def _id_table(model: sentencepiece.SentencePieceProcessor) -> IdTable:
    image = model.vocab_size()
    size = image + 1
    special: dict[str, int] = {}
    for name, piece in (("pad", model.pad_id()), ("bos", model.bos_id()), ("eos", model.eos_id())):
        special[name] = piece if piece >= 0 else size
        size += piece < 0
    return IdTable(unk=model.unk_id(), text_end=image, image=image, size=size, **special)
