"""Read a shard once, wholly, and name everything in it that is not as it should be."""

import hashlib
import os
import re
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from data import container, documents, images, tar
from data.documents import IMAGE_EXTENSIONS
from data.prepare import beside
from data.prepare.findings import Finding
from data.samples import BadSample, Contents, NotAShardError, Sample
from data.store import LOCAL
from data.units import UNITS_EXTENSION
from nmm.config import Kind, Layout

DECODE_SIDE_PIXELS = 64  # every bit is read at any side; small squares are cheap to resize
NOT_UTF8 = re.compile(r"\\udc[89a-f]")
SUFFIX = "|".join(map(re.escape, container.SUFFIXES))
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass
class ShardReport:
    """One shard: how much it holds on both sides, and all findings.

    documents     samples without a defect
    with_image    samples that have an image file, and with_text those with their text member
    image_files   members with the extension of an image
    decoded       images of documents that can be decoded; texts: texts of the documents
    keys, hashes, crcs  of the documents in their order: keys, each with a NUL behind it, their
                        64-bit hashes, and checksums of their bytes
    """

    shard: str
    bytes: int = 0
    samples: int = 0
    documents: int = 0
    with_image: int = 0
    with_text: int = 0
    with_both: int = 0
    image_files: int = 0
    decoded: int = 0
    texts: int = 0
    findings: list[Finding] = field(default_factory=list)
    keys: str = ""
    hashes: array = field(default_factory=lambda: array("Q"))
    crcs: array = field(default_factory=lambda: array("L"))

    def forget_keys(self) -> None:
        """Compare nothing with other shards."""
        self.keys, self.hashes, self.crcs = "", array("Q"), array("L")

    def add(self, reason: str, *, key: str = "", detail: str = "") -> None:
        self.findings.append(Finding(self.shard, key, reason, detail))


def examine(shard: Path | str, *, layout: Layout) -> ShardReport:
    """Everything about one shard; never raises for what lies in it.

    Raises UserError where a URL fails, and for a shard that cannot hold this kind by its name.
    """
    container.check(str(shard), layout)
    with LOCAL.local(str(shard)) as path:
        report = _examine(path, layout=layout, name=str(shard))
    report.findings += beside.examine(str(shard))
    return report


def _examine(path: Path, *, layout: Layout, name: str) -> ShardReport:
    report = ShardReport(name)
    try:
        report.bytes = path.stat().st_size
        contents, samples = container.read(path)
        unread: Counter[str] = Counter()
        with _quiet_libraries():
            for sample, raw in samples:
                report.samples += 1
                if odd := _odd_name(sample.key):
                    report.add("odd_name", key=sample.key, detail=odd)
                members = {} if sample.fault else container.members_of(path.name, raw)
                _examine_sample(report, sample, members, layout=layout, unread=unread)
        _examine_rest(report, contents)
        if container.is_json_lines(path.name):
            report.forget_keys()  # other files have lines of the same numbers
    except NotAShardError as error:
        report.add(error.reason, detail=str(error).removeprefix(f"{path} is "))
        return report
    except OSError as error:
        report.add("unreadable", detail=error.strerror or str(error))
        return report
    for extension, count in unread.most_common():
        report.add("unread_member", detail=f".{extension} of {count} samples")
    if not report.documents:
        report.add("no_document", detail=f"extensions: {contents.told_extensions()}")
    return report


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """libtiff writes a hundred lines past Python on one broken image; the findings say it once."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _examine_rest(report: ShardReport, contents: Contents) -> None:
    """What is no sample, and what is wrong with the file as a whole."""
    for what, name in contents.others:
        key, extension = tar.split_name(name)
        report.add(what, detail=f"{key}.{extension}" if extension else key)
    for reason, detail in contents.defects:
        report.add(reason, detail=detail)


def _odd_name(key: str) -> str:
    if NOT_UTF8.search(key):
        return "not UTF-8"
    if CONTROL.search(key):
        return "control characters"
    return "points outside" if key.startswith("/") or ".." in key.split("/") else ""


def _text_member(layout: Layout) -> str:
    in_json = layout.kind is Kind.interleaved or layout.text_field is not None
    return "json" if in_json else "txt"


def _examine_sample(
    report: ShardReport,
    sample: Sample,
    members: dict[str, bytes],
    *,
    layout: Layout,
    unread: Counter[str],
) -> None:
    pictures = {e for e in sample.extensions if e.rpartition(".")[2] in IMAGE_EXTENSIONS}
    has_text = _text_member(layout) in sample.extensions
    report.image_files += len(pictures)
    report.with_image += bool(pictures)
    report.with_text += has_text
    report.with_both += bool(pictures) and has_text
    if sample.fault:
        report.add(sample.fault, key=sample.key)
        return
    found = _parse(report, sample, members, layout=layout)
    if not found:
        return
    parts, skipped_images = found[0]  # the others have the same images
    if _decode_images(report, sample, parts):
        report.documents += len(found)
        report.texts += sum(isinstance(part, str) for each in found for part in each.parts)
        report.keys += sample.key + "\0"
        report.hashes.append(_hash(sample.key))
        report.crcs.append(_crc(members))
        if skipped_images:
            total = skipped_images + sum(isinstance(part, bytes) for part in parts)
            report.add("skipped_image", key=sample.key, detail=f"{skipped_images} of {total}")
    read = set(map(id, parts))
    unread.update(
        name
        for name, data in members.items()
        if name != _text_member(layout)
        and not (layout.modality and name.endswith(UNITS_EXTENSION))
        and id(data) not in read
    )


def _parse(
    report: ShardReport, sample: Sample, members: dict[str, bytes], *, layout: Layout
) -> list[documents.Parsed]:
    """The documents of a sample, without those that are none."""
    found: list[documents.Parsed] = []
    count = documents.variants(layout, members)
    for variant in range(count):
        try:
            found.append(documents.parse(layout, members, key=sample.key, variant=variant))
        except BadSample as bad:
            which = f"caption {variant + 1} of {count}" if count > 1 else ""
            detail = ", ".join(filter(None, [which, _has(sample, bad.reason)]))
            report.add(bad.reason, key=sample.key, detail=detail)
    return found


def _decode_images(report: ShardReport, sample: Sample, parts: documents.Parts) -> bool:
    """Decode them all, to name every bad one; is none bad?"""
    pictures = [part for part in parts if isinstance(part, bytes)]
    bad_images = 0
    for number, data in enumerate(pictures, start=1):
        try:
            images.check_header(data)
            images.decode(data, DECODE_SIDE_PIXELS)
            report.decoded += 1
        except BadSample as bad:
            bad_images += 1
            which = f"image {number} of {len(pictures)}, " if len(pictures) > 1 else ""
            detail = f"{which}{len(data):,} bytes, starts with {data[:8]!r}"
            report.add(bad.reason, key=sample.key, detail=detail)
    return not bad_images


def _has(sample: Sample, reason: str) -> str:
    if not reason.startswith(("missing", "several")):
        return ""
    return "has " + ", ".join(f".{name}" for name in sorted(sample.extensions))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _crc(members: dict[str, bytes]) -> int:
    """Of names and bytes, not of the headers: a copied document may have another date."""
    crc = 0
    for name in sorted(members):
        crc = zlib.crc32(members[name], zlib.crc32(name.encode(), crc))
    return crc


def repeated(reports: list[ShardReport]) -> list[Finding]:
    """Keys that occur in several shards: the same document again, or another of the same name.

    Other documents of the same name are one finding for each pair of shards.
    """
    hashes, crcs = (
        np.array([value for report in reports for value in column(report)], np.uint64)
        for column in (lambda report: report.hashes, lambda report: report.crcs)
    )
    shard = np.repeat(np.arange(len(reports)), [len(report.hashes) for report in reports])
    first = np.cumsum([0, *(len(report.hashes) for report in reports)])
    keys = lru_cache(maxsize=1)(lambda shard: reports[shard].keys.split("\0"))  # shard by shard
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    pairs = zip(order[again + 1].tolist(), order[again].tolist(), strict=True)
    findings: list[Finding] = []
    others: dict[tuple[int, int], list[str]] = {}
    for here, there in sorted(pairs):
        report = reports[shard[here]]
        key = keys(int(shard[here]))[here - int(first[shard[here]])]
        if crcs[here] == crcs[there]:
            earlier = reports[shard[there]].shard
            findings.append(Finding(report.shard, key, "same_document", f"also in {earlier}"))
        else:
            others.setdefault((int(shard[here]), int(shard[there])), []).append(key)
    for (here, there), keys in others.items():
        detail = f"{len(keys)} keys are also in {reports[there].shard}"
        findings.append(Finding(reports[here].shard, keys[0], "repeated_key", detail))
    return findings


def gaps(paths: Sequence[Path | str]) -> list[Finding]:
    """Runs of numbers that are missing between the shards NAME-000003.tar, NAME-000007.tar, ..."""
    numbers: dict[tuple[str, int, str], list[int]] = {}
    for path in paths:
        if match := re.fullmatch(rf"(.*?)(\d+)({SUFFIX})", str(path)):
            numbers.setdefault((match[1], len(match[2]), match[3]), []).append(int(match[2]))
    return [
        Finding(f"{name}{before + 1:0{digits}}{end}", "", "gap_in_numbering", f"{missing} missing")
        for (name, digits, end), found in numbers.items()
        for before, after in pairwise(sorted(found))
        if (missing := after - before - 1) > 0
    ]
