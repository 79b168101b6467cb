"""Read every shard wholly, decode every image, parse every document; say all that is wrong.

Of the index and the stored token ids beside a shard, if it has some, the checksums are compared.

    python -m data.prepare.validate --kind caption --shards 'corpora/book/caption/*.tar'

Exits with 1 if there is a defect and with 0 if there is none. Notes are no defects: training reads
such shards as it should. Nothing is written or changed.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data.corpus import find_shards
from data.prepare import defects
from data.prepare.defects import ShardReport
from data.prepare.findings import DEFECTS, NOTES, Finding
from data.prepare.flags import add_layout, read_layout
from data.store import LOCAL
from data.workers import context, forking
from nmm.config import Kind, Layout
from nmm.errors import UserError

LISTED = 5
SUMS = ("bytes", "samples", "documents", "with_image", "with_text", "with_both")
IMAGES = ("image_files", "decoded", "texts")


@dataclass(frozen=True)
class Report:
    """All shards together: their sums (see ShardReport) and every finding, shard by shard."""

    kind: Kind
    shards: int
    sums: dict[str, int]
    findings: list[Finding]

    @property
    def defects(self) -> Counter[str]:
        return Counter(finding.reason for finding in self.findings if finding.is_defect)

    @property
    def notes(self) -> Counter[str]:
        return Counter(finding.reason for finding in self.findings if not finding.is_defect)


def validate(
    shards: Sequence[Path | str],
    *,
    layout: Layout,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Examine all shards; the report is the same for any number of workers.

    Raises UserError when a decoder kills a worker.
    """
    work = partial(defects.examine, layout=layout)
    if workers <= 1:
        return _collect(map(work, shards), shards=shards, kind=layout.kind, progress=progress)
    try:
        with forking(), ProcessPoolExecutor(workers, mp_context=context()) as pool:
            return _collect(
                pool.map(work, shards), shards=shards, kind=layout.kind, progress=progress
            )
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed while it read a shard, by the system for its memory or by a "
            "decoder; narrow --shards down to find the shard, or lower --workers."
        ) from None


def _collect(
    results: Iterable[ShardReport],
    *,
    shards: Sequence[Path | str],
    kind: Kind,
    progress: Callable[[int, int], None],
) -> Report:
    reports = []
    for report in results:
        reports.append(report)
        progress(len(reports), len(shards))
    findings = [finding for report in reports for finding in report.findings]
    findings += [*defects.repeated(reports), *defects.gaps(shards)]
    sums = {name: sum(vars(report)[name] for report in reports) for name in (*SUMS, *IMAGES)}
    return Report(kind, len(shards), sums, findings)


def text(report: Report, *, everything: bool) -> str:
    """For people: what there is, a table of reasons, and `LISTED` of each, or `everything`."""
    lines = [*_contents(report), ""]
    for name, counts, meanings in (
        ("defect", report.defects, DEFECTS),
        ("note", report.notes, NOTES),
    ):
        if counts:
            lines += _table(name, counts, meanings=meanings)
            lines += _list(report, counts, limit=None if everything else LISTED)
    total = report.defects.total()
    lines.append(f"{total:,} defects" if total != 1 else "1 defect")
    return "\n".join(lines)


def _contents(report: Report) -> list[str]:
    sums = report.sums
    lines = [
        f"{report.shards:,} shards of kind {report.kind.value}, {sums['bytes'] / 1e6:,.1f} MB",
        f"{sums['samples']:>12,}  samples",
        f"{sums['documents']:>12,}  documents without a defect, with {sums['texts']:,} texts",
        f"{sums['decoded']:>12,}  images decoded, {sums['image_files']:,} image files",
    ]
    if report.kind is not Kind.text:
        only_image, only_text = (
            sums[side] - sums["with_both"] for side in ("with_image", "with_text")
        )
        lines.append(f"{only_image:>12,}  samples with an image file but no text member")
        lines.append(f"{only_text:>12,}  samples with a text member but no image file")
    return lines


def _table(name: str, counts: Counter[str], *, meanings: dict[str, str]) -> list[str]:
    return [
        f"{name:<18}{'count':>9}  meaning",
        *(
            f"{reason:<18}{count:>9,}  {meanings.get(reason, '')}".rstrip()
            for reason, count in counts.most_common()
        ),
        "",
    ]


def _list(report: Report, counts: Counter[str], *, limit: int | None) -> list[str]:
    lines = []
    for reason, count in counts.most_common():
        found = [finding for finding in report.findings if finding.reason == reason][:limit]
        lines += [f"{reason}:", *(f"  {_line(finding)}" for finding in found)]
        if count > len(found):
            lines.append(f"  ... and {count - len(found):,} more; --all lists them")
    return [*lines, ""]


def _line(finding: Finding) -> str:
    """Names are escaped where they hold what would break a line or a terminal."""
    key = f"  {printable(finding.key)}" if finding.key else ""
    detail = f"  ({printable(finding.detail)})" if finding.detail else ""
    return f"{printable(finding.shard)}{key}{detail}"


def printable(name: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def to_json(report: Report) -> str:
    """For programs: every finding, and the counts."""
    return json.dumps(
        {
            "kind": report.kind.value,
            "shards": report.shards,
            **report.sums,
            "defects": report.defects,
            "notes": report.notes,
            "findings": [
                {**asdict(finding), "is_defect": finding.is_defect} for finding in report.findings
            ],
        },
        indent=1,
    )


def _show(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rread {done} of {total} shards", end=end, file=sys.stderr, flush=True)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_layout(parser)
    parser.add_argument(
        "--shards", required=True, help="glob or range of .tar files; quote it: 'DIR/train-*.tar'"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with all of it")
    parser.add_argument(
        "--all", action="store_true", help=f"list every finding, not {LISTED} of each reason"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    try:
        layout = read_layout(options)
        shards = find_shards(options.shards, key="--shards", store=LOCAL)
        report = validate(
            shards,
            layout=layout,
            workers=min(options.workers, len(shards)),
            progress=_show,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    print(to_json(report) if options.json else text(report, everything=options.all))
    if report.defects:
        sys.exit(1)


if __name__ == "__main__":
    main()
