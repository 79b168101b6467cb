"""OUT: shards under the names of the given ones, with codes in the place of images.

OUT/.image_codes/X/coded-000000.tar   a shard in the making
OUT/.image_codes/X.json               what is in OUT/X.tar, and what it was made of
OUT/X.tar                             gets its name when the two above are complete
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data import atomic
from data import codebook as codebook_of
from data.images import decode
from data.prepare.alone import alone
from data.prepare.convert import left_out, pool
from data.prepare.convert.left_out import Found, LeftOut
from data.prepare.convert.pool import Tell
from data.prepare.image_codes import documents
from data.prepare.image_codes.documents import Document
from data.samples import BadSample
from data.shards import ShardWriter
from data.store import LOCAL, is_url, name_of
from nmm.codes import ImageCodes, Usage
from nmm.config import Layout
from nmm.errors import UserError

FOLDER = ".image_codes"
AT_ONCE = 32  # images


@dataclass(frozen=True)
class Source:
    """What a shard is made of; a shard of OUT that was made of something else is not this one's."""

    shard: str
    size: int
    modified: int
    kind: str
    text_field: str | None
    codebook: str


@dataclass(frozen=True)
class Receipt:
    """What is in a shard of OUT; `counts` has [code, how often] of every code that occurs."""

    source: dict
    documents: int
    images: int
    counts: list[list[int]]
    left_out: Found


@dataclass(frozen=True)
class Written:
    """What is in all shards of a command together."""

    documents: int
    images: int
    usage: Usage
    left_out: Found


def write(
    shards: Sequence[str],
    *,
    layout: Layout,
    codes: ImageCodes,
    out: Path,
    workers: int,
    tell: Callable[[int], object],
) -> Written:
    """Write OUT/X.tar for every shard X that has none yet; what is in all of them.

    Raises UserError for names that clash, and where OUT has codes of another model.
    """
    _refuse_equal_names(shards)
    out.mkdir(parents=True, exist_ok=True)
    codebook = codes.sha256()
    with alone(out, doing="writes"):
        sources = [_source(shard, layout=layout, codebook=codebook) for shard in shards]
        done = [_receipt(source, out=out) for source in sources]
        todo = [number for number, receipt in enumerate(done) if receipt is None]
        codebook_of.write(out, sha256=codebook, codes=codes.codes)
        work = partial(_do, sources=sources, layout=layout, codes=codes, out=out)
        pool.run(todo, work=work, processes=workers, tell=tell)
        receipts = [receipt for source in sources if (receipt := _receipt(source, out=out))]
    assert len(receipts) == len(sources)
    return _joined(receipts, codes=codes.codes)


def _joined(receipts: Sequence[Receipt], *, codes: int) -> Written:
    counts = np.zeros(codes, np.int64)
    for receipt in receipts:
        for code, count in receipt.counts:
            counts[code] += count
    return Written(
        documents=sum(receipt.documents for receipt in receipts),
        images=sum(receipt.images for receipt in receipts),
        usage=Usage(counts),
        left_out=left_out.join(receipt.left_out for receipt in receipts),
    )


def _stem(shard: str) -> str:
    """X of .../X.tar, .../X.jsonl."""
    return name_of(shard).rpartition(".")[0]


def _refuse_equal_names(shards: Sequence[str]) -> None:
    by_name: dict[str, str] = {}
    for shard in shards:
        other = by_name.setdefault(_stem(shard), shard)
        if other != shard:
            raise UserError(
                f"--shards names {other} and {shard}, which would have the same name in --out; "
                f"give them in two commands with two folders."
            )


def _source(shard: str, *, layout: Layout, codebook: str) -> Source:
    modified = 0 if is_url(shard) else Path(shard).stat().st_mtime_ns
    size = LOCAL.size(shard)
    return Source(shard, size, modified, layout.kind.value, layout.text_field, codebook)


def _receipt(source: Source, *, out: Path) -> Receipt | None:
    """That of a shard which is done; one that was cut off before its name is given it now."""
    final, file = _places(source, out=out)
    if not file.exists():
        if final.exists():
            raise UserError(
                f"--out is {out}, where {final.name} exists and is not of this tool; choose "
                f"another --out, or delete the shard."
            )
        return None
    receipt = Receipt(**json.loads(file.read_text()))
    for name in ("codebook", "kind", "text_field"):
        if receipt.source[name] != asdict(source)[name]:
            raise UserError(
                f"--out is {out}, where {final.name} was made with {name} {receipt.source[name]}, "
                f"and now it is {asdict(source)[name]}; choose another --out, or delete that "
                f"folder."
            )
    made = _made(source, out=out)
    if receipt.source != asdict(source) or not (
        final.exists() or made.exists() or not receipt.documents
    ):
        return None
    if made.exists():
        made.replace(final)
        made.parent.rmdir()
    return receipt


def _places(source: Source, *, out: Path) -> tuple[Path, Path]:
    """The shard, and its receipt."""
    stem = _stem(source.shard)
    return out / f"{stem}.tar", out / FOLDER / f"{stem}.json"


def _made(source: Source, *, out: Path) -> Path:
    return out / FOLDER / _stem(source.shard) / "coded-000000.tar"


def _do(
    number: int,
    tell: Tell,
    *,
    sources: Sequence[Source],
    layout: Layout,
    codes: ImageCodes,
    out: Path,
) -> None:
    """Write one shard, its receipt, and give it its name."""
    # One thread in every process, so that what is written does not depend on --workers.
    torch.set_num_threads(1)
    codes = codes.to(_device(number))
    source, losses = sources[number], LeftOut()
    file, folder = _places(source, out=out)[1], _made(source, out=out).parent
    file.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    counts = np.zeros(codes.codes, np.int64)
    total = images = 0
    with (
        LOCAL.local(source.shard) as path,
        ShardWriter(folder, name="coded", documents_per_shard=2**62) as writer,
    ):
        found = documents.read(path, layout, left_out=losses)
        for document, rows in _coded(found, codes=codes, name=path.name, left_out=losses):
            documents.write(writer, document, rows, layout.kind)
            counts += np.bincount(np.concatenate([*rows, []]).astype(int), minlength=codes.codes)
            total, images = total + 1, images + len(rows)
            tell(1)
    used = [[int(code), int(counts[code])] for code in counts.nonzero()[0]]
    receipt = Receipt(asdict(source), total, images, used, losses.found)
    with atomic.writing(file) as stream:
        stream.write(json.dumps(asdict(receipt)).encode())
    _receipt(source, out=out)


def _device(number: int) -> torch.device:
    """Processes share the GPUs of the machine, if it has some."""
    gpus = torch.cuda.device_count()
    return torch.device("cuda", number % gpus) if gpus else torch.device("cpu")


def _coded(
    found: Iterator[Document], *, codes: ImageCodes, name: str, left_out: LeftOut
) -> Iterator[tuple[Document, list[np.ndarray]]]:
    """Every document with the codes of its images, about 32 images at a time.

    An image that cannot be decoded leaves its document out, as in training.
    """
    some: list[tuple[Document, list[np.ndarray]]] = []
    for document in found:
        try:
            some.append((document, [decode(i, codes.side_pixels) for i in document.images]))
        except BadSample as bad:
            left_out.note(bad.reason, where=f"{name}: {document.key}")
        if sum(len(pixels) for _, pixels in some) >= AT_ONCE:
            yield from _encoded(some, codes=codes)
            some = []
    yield from _encoded(some, codes=codes)


def _encoded(
    some: Sequence[tuple[Document, list[np.ndarray]]], *, codes: ImageCodes
) -> Iterator[tuple[Document, list[np.ndarray]]]:
    pixels = [image for _, images in some for image in images]
    kind = np.min_scalar_type(codes.codes - 1)
    rows = iter(codes.encode(np.stack(pixels)).astype(kind) if pixels else [])
    for document, images in some:
        yield document, list(islice(rows, len(images)))
