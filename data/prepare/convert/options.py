"""What a conversion is asked for, as typed and checked values."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from nmm.config import Kind
from nmm.errors import UserError

HELD_OUT = "held_out"


class Form(Enum):
    """How other people's data lie on the disk."""

    captions_tar = "captions-tar"
    captions_parquet = "captions-parquet"
    captions_jsonl = "captions-jsonl"
    captions_folder = "captions-folder"
    interleaved_jsonl = "interleaved-jsonl"
    interleaved_parquet = "interleaved-parquet"
    markdown = "markdown"
    html = "html"
    text = "text"

    @property
    def kind(self) -> Kind:
        match self:
            case Form.text:
                return Kind.text
            case Form.captions_tar | Form.captions_parquet | Form.captions_jsonl:
                return Kind.caption
            case Form.captions_folder:
                return Kind.caption
            case _:
                return Kind.interleaved


class Beside(Enum):
    """Where the text of an image in a folder is."""

    file = "file"
    folder_name = "folder-name"
    metadata = "metadata"


@dataclass(frozen=True)
class Reading:
    """How documents are read; a form looks at the values that it has a flag for.

    text_field      field of the text in a row or a .json; None: the member `text_extension`
    fallback_field  field that replaces a missing or blank text
    lists           images have lists of captions, of which all are kept
    """

    form: Form
    input: tuple[str, ...]
    image_root: Path | None = None
    image_field: str = "image"
    text_field: str | None = None
    fallback_field: str | None = None
    text_extension: str = "txt"
    text_from: Beside = Beside.file
    document_characters: int | None = None
    lists: bool = False


@dataclass(frozen=True)
class Writing:
    """Where documents go: OUT/NAME-*.tar and OUT/held_out-*.tar."""

    out: Path
    name: str = "train"
    documents_per_shard: int = 1000
    documents_per_task: int = 10_000
    held_out_fraction: float = 0.05

    @property
    def splits(self) -> list[str]:
        """Names of the shards that there will be."""
        fractions = {self.name: 1 - self.held_out_fraction, HELD_OUT: self.held_out_fraction}
        return [split for split, fraction in fractions.items() if fraction > 0]


def check(reading: Reading, writing: Writing, *, workers: int) -> None:
    """Raise UserError for what can never work."""
    for flag, value in (
        ("--documents-per-shard", writing.documents_per_shard),
        ("--documents-per-task", writing.documents_per_task),
        ("--document-characters", reading.document_characters),
        ("--workers", workers),
    ):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; set 1 or more.")
    if not 0 <= writing.held_out_fraction <= 1:
        raise UserError(
            f"--held-out-fraction is {writing.held_out_fraction}; set it between 0 and 1."
        )
    if writing.name == HELD_OUT and writing.held_out_fraction > 0:
        raise UserError(
            f"--name is {HELD_OUT}, the name of the other split; set --held-out-fraction 0."
        )
    if not writing.name or "/" in writing.name:
        raise UserError(
            f"--name is {writing.name!r}; give the begin of a file name, such as train."
        )
    if reading.image_root is not None and not reading.image_root.is_dir():
        raise UserError(f"--image-root is {reading.image_root}, which is no folder.")
