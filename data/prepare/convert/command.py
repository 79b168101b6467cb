"""The command line of the converter: a subcommand for each form, with its flags and an example."""

import argparse
import os
from pathlib import Path

from data.prepare.convert.options import Beside, Form, Reading, Writing, check

DESCRIPTION = """Turn data made by others into our shards.

Each form has its own --help with an example. Written are OUT/train-000000.tar, ... and, with a
twentieth of the documents, OUT/held_out-000000.tar, ... The bytes depend on the input and the
options, not on --workers. The same command continues one that was stopped or killed. What cannot
be used is left out, counted by reason and listed; 100 in a row stop it.
"""
WRITTEN_BY = "docs/data-format.md shows every form"
HELP = {
    Form.captions_tar: (
        "WebDataset tars of images and captions, as img2dataset writes them",
        "Samples KEY.jpg (jpeg, png, webp, gif) with KEY.txt or a field of KEY.json, in .tar, "
        ".tar.gz or .tar.zst; members may be gzipped (KEY.txt.gz). Samples whose .json has a "
        "`status` other than success are failed downloads. .parquet and _stats.json are passed "
        "over.",
        "--input 'laion/*.tar' --text-field caption --out corpora/laion",
    ),
    Form.captions_parquet: (
        "parquet files with an image and its caption in a row",
        "The image is bytes, a struct of bytes and path as Hugging Face writes it, base64, or a "
        "path below --image-root; the text is a string or a list of several captions.",
        "--input 'coco/data/train-*.parquet' --text-field captions --out corpora/coco",
    ),
    Form.captions_jsonl: (
        "JSON lines with an image and its caption",
        'A line: {"image": "images/cat.jpg", "caption": "A cat.", "alt": "cat"}. Images and texts '
        "as in captions-parquet; files may be .gz or .zst.",
        "--input book/captions.jsonl --fallback-field alt --out corpora/book/caption",
    ),
    Form.captions_folder: (
        "a folder tree of images with their texts beside them",
        "Texts are in KEY.txt beside KEY.jpg, or are the name of the image's folder, or are rows "
        "of metadata.jsonl or metadata.csv (file_name, text) as in a Hugging Face imagefolder.",
        "--input photos --text folder-name --out corpora/photos",
    ),
    Form.interleaved_jsonl: (
        "JSON lines with texts and images in reading order",
        "Known by their keys: OBELICS (parallel lists `texts` and `images`), MMC4 (`text_list`, "
        '`image_info` with `matched_text_index`), and {"sequence": [{"type": "text", "text": "A '
        'cat:"}, {"type": "image", "file": "cat.jpg"}]}. Images are paths, base64, data URIs or '
        "null; one that cannot be used is left out of its document. Files may be .gz or .zst.",
        "--input book/interleaved.jsonl --image-root book/images --out corpora/book/interleaved",
    ),
    Form.interleaved_parquet: (
        "parquet files with texts and images in reading order",
        "The rows are those of interleaved-jsonl; images may be bytes, or structs of bytes and "
        "path.",
        "--input 'obelics/*.parquet' --out corpora/obelics",
    ),
    Form.markdown: (
        "Markdown files with images",
        "A file is a document: its text without marks of emphasis and without front matter, and "
        "its images (![alt](path), <img>, data URIs) in reading order. Paths are relative to the "
        "file, or to --image-root; those that begin with / are relative to --image-root. What is "
        "on the web is never fetched; SVG is left out.",
        "--input 'site/**/*.md' --image-root site --out corpora/site",
    ),
    Form.html: (
        "HTML files with images",
        "A file is a document, as for markdown; scripts, styles and navigation are removed.",
        "--input 'book/**/*.html' --out corpora/book",
    ),
    Form.text: (
        "text: files, JSON lines, parquet, tars",
        "A document is a file, a row (.jsonl, .json, both also .gz and .zst; .parquet), or a "
        "member .txt or .txt.gz of a tar; other files are plain text, which may be .gz or .zst.",
        "--input 'dclm/*.jsonl.zst' --out corpora/dclm",
    ),
}


def parse(arguments: list[str] | None) -> tuple[Reading, Writing, int]:
    """What to read, what to write, and the number of processes; raises UserError."""
    found = vars(_parser().parse_args(arguments))
    workers = found.pop("workers")
    names = ("out", "name", "documents_per_shard", "documents_per_task", "held_out_fraction")
    writing = Writing(**{name: found.pop(name) for name in names})
    form, inputs = Form(found.pop("form")), tuple(found.pop("input"))
    reading = Reading(form=form, input=inputs, **found)
    check(reading, writing, workers=workers)
    return reading, writing, workers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare.convert",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    for form in Form:
        line, description, example = HELP[form]
        one = forms.add_parser(
            form.value,
            help=line,
            description=description,
            epilog=f"example: python -m data.prepare.convert {form.value} {example}",
        )
        _add_shared(one, form)
        _add_fields(one, form)
    return parser


def _add_shared(parser: argparse.ArgumentParser, form: Form) -> None:
    add = parser.add_argument
    inputs = "folders" if form is Form.captions_folder else "files or quoted globs"
    add("--input", nargs="+", required=True, metavar="PATH", help=inputs)
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--name", default="train", help="shards are NAME-000000.tar (%(default)s)")
    add("--documents-per-shard", type=int, default=1000, metavar="N", help="(%(default)s)")
    add(
        "--documents-per-task",
        type=int,
        default=10_000,
        metavar="N",
        help="the input is cut into tasks of about N documents, which run in parallel and are not "
        "repeated when the command continues (%(default)s)",
    )
    add(
        "--held-out-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of documents that goes to held_out-*.tar, by a hash of the text (%(default)s)",
    )
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, metavar="N", help="processes (default: all cores)")


def _add_fields(parser: argparse.ArgumentParser, form: Form) -> None:
    add = parser.add_argument
    match form:
        case Form.captions_tar:
            add("--text-field", metavar="F", help="field of KEY.json with the text")
            add("--fallback-field", metavar="F", help="field of KEY.json to use where it is blank")
            add("--text-extension", default="txt", metavar="X", help="member with the text (txt)")
        case Form.captions_parquet | Form.captions_jsonl:
            _add_image_root(parser)
            add("--image-field", default="image", metavar="F", help="(%(default)s)")
            add("--text-field", default="caption", metavar="F", help="(%(default)s)")
            add("--fallback-field", metavar="F", help="field to use where the text is blank")
        case Form.captions_folder:
            choices = {"type": Beside, "choices": list(Beside), "metavar": "WHERE"}
            where = "file (KEY.txt, the default), folder-name or metadata"
            add("--text", dest="text_from", default=Beside.file, help=where, **choices)
            add("--text-field", default="text", metavar="F", help="in metadata (%(default)s)")
            parser.set_defaults(image_field="file_name")
        case Form.interleaved_jsonl | Form.interleaved_parquet:
            _add_image_root(parser)
            add("--image-field", default="file", metavar="F", help="in `sequence` (%(default)s)")
        case Form.markdown | Form.html:
            _add_image_root(parser)
        case Form.text:
            add("--text-field", default="text", metavar="F", help="of a row (%(default)s)")
            add("--text-extension", default="txt", metavar="X", help="member of a tar (txt)")
            add(
                "--document-characters",
                type=int,
                metavar="N",
                help="end a document at the first blank line after N characters, or line end "
                "after 2 N",
            )


def _add_image_root(parser: argparse.ArgumentParser) -> None:
    what = "folder of the image paths (default: that of the file which names them)"
    parser.add_argument("--image-root", type=Path, metavar="DIR", help=what)
