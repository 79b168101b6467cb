"""Documents of texts and images to the inputs of an NmmForCausalLM, and ids back to text."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils.hub import cached_file

Document = Sequence[str | Image.Image]


class NmmTokenizer(SentencePieceBackend):
    """The sentencepiece model that the decoder was trained with; begin of document goes first."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        begin = self.convert_tokens_to_ids(str(self.bos_token))
        assert isinstance(begin, int)
        return [begin, *token_ids_0, *(token_ids_1 or [])]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode(tokens)


class NmmProcessor:
    """processor([["A:", image, "B:"], ["text"]]) -> input_ids, attention_mask, pixel_values.

    Every text is encoded by itself and every image takes its positions, in their order, behind the
    begin of a document; shorter documents are padded on their left, as `generate` wants them.
    """

    def __init__(self, tokenizer: NmmTokenizer, facts: dict) -> None:
        self.tokenizer, self.facts = tokenizer, facts

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs) -> "NmmProcessor":
        kwargs.pop("trust_remote_code", None)
        path = str(cached_file(folder, "processor_config.json", **kwargs))
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
        return cls(NmmTokenizer.from_pretrained(folder, **kwargs), facts)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """transformers calls this on what it loads from a folder."""

    def __call__(self, documents: Sequence[Document]) -> BatchFeature:
        rows = [self._ids(document) for document in documents]
        longest = max(map(len, rows))
        pad = self.facts["pad_token_id"]
        inputs = {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor(
                [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
            ),
        }
        images = [part for document in documents for part in document if not isinstance(part, str)]
        if images:
            inputs["pixel_values"] = torch.from_numpy(np.stack([self._pixels(i) for i in images]))
        return BatchFeature(inputs)

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _ids(self, document: Document) -> list[int]:
        ids = [self.facts["bos_token_id"]]
        for part in document:
            if isinstance(part, str):
                ids += self.tokenizer.sp_model.encode(part)
            else:
                ids += [self.facts["image_token_id"]] * self.facts["image_tokens"]
        return ids

    def _pixels(self, image: Image.Image) -> np.ndarray:
        """uint8[side, side, 3]: upright, transparency on white, the central square, resized.

        A JPEG that was opened and not touched is decoded at reduced size, as in training.
        """
        image.draft("RGB", (self.facts["side_pixels"],) * 2)
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        rgb = np.array(image.convert("RGB"))
        height, width, _ = rgb.shape
        least, side = min(height, width), self.facts["side_pixels"]
        top, left = (height - least) // 2, (width - least) // 2
        square = torch.from_numpy(rgb[top : top + least, left : left + least])
        if least == side:
            return square.numpy()
        resized = torch.nn.functional.interpolate(
            square[None].permute(0, 3, 1, 2), size=(side, side), mode="bicubic", antialias=True
        )
        return resized[0].permute(1, 2, 0).numpy()
