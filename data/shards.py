"""Writing shards: how a document of each kind lies in a tar (docs/data-format.md)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from webdataset.writer import TarWriter

from data.units import UNITS_EXTENSION, Units, npy

CAPTION_FIELD = "caption"  # of KEY.json, where an image has several captions
IMAGE_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}


def image_extension(image: bytes) -> str:
    """File extension by the leading bytes; "bin" where they are unknown."""
    return next((ext for head, ext in IMAGE_SIGNATURES.items() if image.startswith(head)), "bin")


class ShardWriter:
    """Writes DIR/NAME-000000.tar, DIR/NAME-000001.tar, ... of `documents_per_shard` documents.

    A shard is written as `.tar.part` and gets its name only when it is complete. The bytes
    depend on the documents alone: no time, user or host is stored.
    """

    def __init__(self, directory: Path, *, name: str, documents_per_shard: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.name, self.documents_per_shard = directory, name, documents_per_shard
        self.shards: list[Path] = []
        self._tar: TarWriter | None = None
        self._in_shard = 0

    def caption(self, key: str, *, image: bytes, text: str, scene: dict | None = None) -> None:
        """One image and its text; `scene`, what the picture shows, is kept as KEY.json."""
        sample: dict = {image_extension(image): image, "txt": text.encode()}
        if scene is not None:
            sample["json"] = json.dumps(scene).encode()
        self._write(key, sample)

    def captions(self, key: str, *, image: bytes, texts: list[str]) -> None:
        """One image and its texts, each of which makes a document, as a list in KEY.json."""
        layout = json.dumps({CAPTION_FIELD: texts})
        self._write(key, {image_extension(image): image, "json": layout.encode()})

    def interleaved(self, key: str, parts: Sequence[str | bytes | Units]) -> None:
        """Texts and images in reading order, as parallel lists in KEY.json beside KEY.N.jpg.

        Units are in the place of an image as KEY.N.units.npy.
        """
        sample: dict = {}
        texts: list[str | None] = []
        images: list[str | None] = []
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
                images.append(None)
            else:
                is_image = isinstance(part, bytes)
                extension = image_extension(part) if is_image else UNITS_EXTENSION
                member = f"{len(sample)}.{extension}"
                sample[member] = part if is_image else npy(part.values)
                texts.append(None)
                images.append(member)
        sample["json"] = json.dumps({"texts": texts, "images": images}).encode()
        self._write(key, sample)

    def units(self, key: str, units: Sequence[int], *, text: str | None = None) -> None:
        """A run of units; with a `text`, a caption whose units stand in the place of an image."""
        sample: dict = {UNITS_EXTENSION: npy(units)}
        if text is not None:
            sample["txt"] = text.encode()
        self._write(key, sample)

    def text(self, key: str, text: str) -> None:
        """One document of text."""
        self._write(key, {"txt": text.encode()})

    def members(self, key: str, members: Mapping[str, bytes]) -> None:
        """A document of any kind from its members by extension."""
        self._write(key, dict(members))

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            part = self._path.with_suffix(".tar.part")
            part.rename(self._path)
            self.shards.append(self._path)
            self._tar, self._in_shard = None, 0

    @property
    def _path(self) -> Path:
        return self.directory / f"{self.name}-{len(self.shards):06d}.tar"

    def _write(self, key: str, sample: dict) -> None:
        if self._tar is None:
            part = str(self._path.with_suffix(".tar.part"))
            self._tar = TarWriter(part, user="", group="", mtime=0, encoder=False)
        self._tar.write({"__key__": key, **sample})
        self._in_shard += 1
        if self._in_shard == self.documents_per_shard:
            self.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._path.with_suffix(".tar.part").unlink()
