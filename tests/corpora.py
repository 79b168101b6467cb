"""Small real corpora for tests: JPEG shards of all kinds and a tokenizer, once per session."""

import atexit
import shutil
import tarfile
import tempfile
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image

from data.corpus import Corpus
from data.prepare.index import index_shards
from data.shards import ShardWriter
from nmm.config import DataConfig, ImageConfig, Kind, Layout, SourceConfig

IMAGE = ImageConfig(side_pixels=16, patch_pixels=4)
VOCAB_SIZE = 512
WORDS = [
    "the",
    "small",
    "red",
    "circle",
    "stands",
    "above",
    "two",
    "green",
    "squares",
    "while",
    "seven",
    "blue",
    "triangles",
    "wait",
    "beside",
    "an",
    "open",
    "gate",
]
KINDS = (Kind.caption, Kind.interleaved, Kind.text)


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words)) + "."


def jpeg(rng: np.random.Generator, *, width: int = 16, height: int = 16) -> bytes:
    """A JPEG of one random colour."""
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    return encoded(image, "JPEG", quality=95)


def picture(rng: np.random.Generator, *, width: int, height: int, blur: int = 4) -> Image.Image:
    """Smooth colours that differ everywhere."""
    coarse = rng.integers(0, 256, (-(-height // blur), -(-width // blur), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@cache
def scratch() -> Path:
    """A directory of this session."""
    directory = Path(tempfile.mkdtemp(prefix="nmm-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def train_tokenizer(path: Path, **options: object) -> Path:
    """A model trained on the words of this file, with our tool's ids unless `options` differ."""
    rng = np.random.default_rng(0)
    ours = {
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
        "byte_fallback": True,
        "vocab_size": 300,
    }
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence(rng, 12) for _ in range(200)),
            model_writer=model,
            model_type="bpe",
            hard_vocab_limit=False,
            minloglevel=2,
            **{**ours, **options},
        )
    return path


@cache
def tokenizer_path() -> Path:
    """A model of 300 pieces with byte fallback."""
    return train_tokenizer(scratch() / "tokenizer.model")


def write_tar(
    path: Path, members: list[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT
) -> Path:
    """A shard of exactly these members."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return path


def write_shards(
    directory: Path, *, kind: Kind, name: str, documents: int, per_shard: int, seed: int
) -> None:
    """`documents` samples whose lengths differ widely; texts and stories beyond 64 tokens occur."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    with ShardWriter(directory, name=name, documents_per_shard=per_shard) as writer:
        for number in range(documents):
            key = f"{number:06d}"
            if kind is Kind.caption:
                writer.caption(key, image=jpeg(rng), text=sentence(rng, int(rng.integers(2, 12))))
            elif kind is Kind.interleaved:
                story = [
                    (jpeg(rng), sentence(rng, int(rng.integers(1, 20))))
                    for _ in range(rng.integers(1, 5))
                ]
                writer.interleaved(key, [part for pair in story for part in pair])
            else:
                writer.text(key, sentence(rng, int(rng.choice([1, 5, 20, 100]))))


@cache
def corpus_directory() -> Path:
    """DIR/{caption,interleaved,text}/{train,held_out}-*.tar, indexed."""
    directory = scratch() / "corpus"
    for kind in KINDS:
        for split, documents in (("train", 120), ("held_out", 30)):
            write_shards(
                directory / kind.value,
                kind=kind,
                name=split,
                documents=documents,
                per_shard=25,
                seed=split == "train",
            )
        shards = sorted((directory / kind.value).glob("*.tar"))
        index_shards(shards, layout=Layout(kind), tokenizer=tokenizer_path())
    return directory


def config(directory: Path | None = None, **changes: object) -> DataConfig:
    """Three sources in rows of 128 and a context of 64."""
    directory = directory or corpus_directory()
    sources = {
        kind.value: SourceConfig(
            kind=kind,
            train=f"{directory}/{kind.value}/train-*.tar",
            held_out=f"{directory}/{kind.value}/held_out-*.tar",
            weight=weight,
        )
        for kind, weight in zip(KINDS, (0.45, 0.45, 0.1), strict=True)
    }
    values: dict = {
        "sources": sources,
        "tokenizer": str(tokenizer_path()),
        "context_tokens": 64,
        "row_tokens": 128,
        "global_rows": 8,
        "window_documents": 64,
        "seed": 7,
        "repeat": True,
        "workers": 0,
    }
    return DataConfig(**{**values, **changes})


def open_corpus(data: DataConfig, *, split: str = "train") -> Corpus:
    return Corpus.open(data, image=IMAGE, vocab_size=VOCAB_SIZE, split=split)
