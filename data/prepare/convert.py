"""Turn data made by others into our shards.

    python -m data.prepare.convert captions-jsonl --input book/captions.jsonl \\
        --fallback-field alt --out corpora/book/caption
    python -m data.prepare.convert interleaved-jsonl --input book/interleaved.jsonl \\
        --image-field file384 --image-root book/images_384 --out corpora/book/interleaved
    python -m data.prepare.convert text --input 'novels/*.txt' --document-characters 4000 \\
        --out corpora/book/text

Each writes train-000000.tar, ... and, with a twentieth of the documents, held_out-000000.tar, ...
The same input gives the same bytes. What cannot be used is left out, counted and listed.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from glob import glob
from pathlib import Path

from tqdm import tqdm

from data.prepare import foreign
from data.prepare.foreign import LeftOut, Parts
from data.shards import ShardWriter
from nmm.config import Kind
from nmm.errors import UserError

HELD_OUT = "held_out"
KINDS = {
    "captions-jsonl": Kind.caption,
    "interleaved-jsonl": Kind.interleaved,
    "text": Kind.text,
}


def convert(
    documents: Iterable[Parts],
    *,
    kind: Kind,
    out: Path,
    name: str,
    documents_per_shard: int,
    held_out_fraction: float,
) -> dict[str, int]:
    """Write OUT/NAME-*.tar and OUT/held_out-*.tar; the number of documents in each.

    Raises UserError where shards of these names exist, and when there was no document at all.
    """
    fractions = {name: 1 - held_out_fraction, HELD_OUT: held_out_fraction}
    names = [split for split, fraction in fractions.items() if fraction > 0]
    existing = sorted(shard.name for split in names for shard in out.glob(f"{split}-*.tar"))
    if existing:
        raise UserError(
            f"--out is {out}, where {existing[0]} exists; choose another --out or --name, or "
            f"delete the shards."
        )
    counts = dict.fromkeys(names, 0)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(out, name=split, documents_per_shard=documents_per_shard)
            )
            for split in names
        }
        for index, parts in enumerate(documents):
            split = HELD_OUT if is_held_out(parts, fraction=held_out_fraction) else name
            _write(writers[split], f"{index:08d}", kind=kind, parts=parts)
            counts[split] += 1
    if not any(counts.values()):
        raise UserError("--input holds no document that can be used; see what was left out.")
    return counts


def is_held_out(parts: Parts, *, fraction: float) -> bool:
    """Decided by a hash of the text, white space aside: equal texts are on the same side."""
    words = " ".join(" ".join(part for part in parts if isinstance(part, str)).split())
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _write(writer: ShardWriter, key: str, *, kind: Kind, parts: Parts) -> None:
    match kind, parts:
        case Kind.caption, [bytes(image), str(text)]:
            writer.caption(key, image=image, text=text)
        case Kind.interleaved, _:
            writer.interleaved(key, parts)
        case Kind.text, [str(text)]:
            writer.text(key, text)
        case _:
            raise AssertionError((kind, [type(part) for part in parts]))


def _documents(options: argparse.Namespace, *, left_out: LeftOut) -> Iterator[Parts]:
    paths = _paths(options.input)
    if options.form == "captions-jsonl":
        return foreign.captions(
            paths,
            image_root=options.image_root,
            image_field=options.image_field,
            text_field=options.text_field,
            fallback_field=options.fallback_field,
            left_out=left_out,
        )
    if options.form == "interleaved-jsonl":
        return foreign.interleaved(
            paths,
            image_root=options.image_root,
            image_field=options.image_field,
            left_out=left_out,
        )
    return foreign.texts(paths, document_characters=options.document_characters, left_out=left_out)


def _paths(patterns: list[str]) -> list[Path]:
    """Files in the order given; those of a glob are sorted."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        names = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            raise UserError(
                f"--input is {pattern}, which names no file; give files, or a quoted glob such as "
                f"'DIR/**/*.txt'."
            )
        found |= dict.fromkeys(files)
    return list(found)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files or globs")
    shared.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    shared.add_argument("--name", default="train", help="shards are NAME-000000.tar (%(default)s)")
    shared.add_argument("--documents-per-shard", type=int, default=1000, help="(%(default)s)")
    shared.add_argument(
        "--held-out-fraction",
        type=float,
        default=0.05,
        help="share of documents that goes to held_out-*.tar, by a hash of the text (%(default)s)",
    )
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument(
        "--image-root", type=Path, help="folder of the image paths (default: that of the input)"
    )
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    form = forms.add_parser(
        "captions-jsonl",
        parents=[shared, images],
        help="JSON lines with the path of an image and its caption",
        description='A line: {"image": "images/cat.jpg", "caption": "A cat.", "alt": "cat"}',
    )
    form.add_argument("--image-field", default="image", help="field of the path (%(default)s)")
    form.add_argument("--text-field", default="caption", help="field of the text (%(default)s)")
    form.add_argument("--fallback-field", help="field to use where the text is missing or blank")
    form = forms.add_parser(
        "interleaved-jsonl",
        parents=[shared, images],
        help="JSON lines with texts and images in reading order",
        description='A line: {"sequence": [{"type": "text", "text": "A cat:"}, '
        '{"type": "image", "file": "cat.jpg"}]}. Texts that follow each other are joined by a '
        "blank line; an image that cannot be used is left out of its document.",
    )
    form.add_argument("--image-field", default="file", help="field of the path (%(default)s)")
    form = forms.add_parser(
        "text",
        parents=[shared],
        help="text files",
        description="One document per file, or per about so many characters.",
    )
    form.add_argument(
        "--document-characters",
        type=int,
        metavar="N",
        help="end a document at the first blank line after N characters, or line end after 2 N",
    )
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    if options.documents_per_shard < 1:
        raise UserError(f"--documents-per-shard is {options.documents_per_shard}; set 1 or more.")
    if not 0 <= options.held_out_fraction <= 1:
        raise UserError(
            f"--held-out-fraction is {options.held_out_fraction}; set it between 0 and 1."
        )
    if options.name == HELD_OUT and options.held_out_fraction > 0:
        raise UserError(
            f"--name is {HELD_OUT}, the name of the other split; set --held-out-fraction 0."
        )
    if options.form == "text" and (options.document_characters or 1) < 1:
        raise UserError(f"--document-characters is {options.document_characters}; set 1 or more.")


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    left_out = LeftOut()
    try:
        _check(options)
        documents = _documents(options, left_out=left_out)
        counts = convert(
            tqdm(documents, unit=" documents", disable=None, leave=False),
            kind=KINDS[options.form],
            out=options.out,
            name=options.name,
            documents_per_shard=options.documents_per_shard,
            held_out_fraction=options.held_out_fraction,
        )
    except (UserError, OSError) as error:
        print(left_out.report(), end="", file=sys.stderr)
        sys.exit(f"error: {error}")
    print(left_out.report(), end="")
    for split, count in counts.items():
        print(f"{count:8}  documents in {options.out}/{split}-*.tar")
        if not count:
            print(f"  no document fell into {split}; change --held-out-fraction if you need it.")


if __name__ == "__main__":
    main()
