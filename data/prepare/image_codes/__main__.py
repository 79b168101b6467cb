"""Turn the images of shards into codes of a VQ model, or train a small one on them.

python -m data.prepare.image_codes train|write --help
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data.corpus import find_shards
from data.prepare.convert import left_out
from data.prepare.flags import read_sources
from data.prepare.image_codes import documents, train, write
from data.prepare.image_codes.look import look
from data.prepare.image_codes.sample import sample
from data.prepare.image_codes.train import Shape
from data.store import LOCAL
from nmm.codes import ImageCodes
from nmm.codes.model import read
from nmm.codes.train import Recipe
from nmm.config import Kind, Layout
from nmm.errors import UserError

DESCRIPTION = """Turn the images of shards into whole numbers, the codes of a VQ model, so that a
model of tokens can read and write them (docs/data-format.md). `write` takes a JanusVQVAE of Hugging
Face transformers from a local folder, alone or inside a whole Janus; `train` makes a small one."""
TRAIN = """Train a small VQ model on images of caption and interleaved shards, on the GPU if there
is one. It shows the losses, and at the end writes OUT/reconstructions.png: images that it did not
train on, above what came back of them. The same command continues one that was killed, and leaves a
finished one alone. With 64 pixels it takes about 2 minutes on 2 CPU cores; for photographs give it
more --channels, --blocks and --steps, and a GPU, or use published weights."""
WRITE = """Write shards of the same names with codes in the place of images: captions as
KEY.units.npy, interleaved documents as KEY.N.units.npy. What training could not read is left out
and counted. The same command continues one that was killed and does only what is missing. Crops and
flips are no more possible: the codes are those of the centre square."""
EXAMPLE = "example: python -m data.prepare.image_codes"


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "train":
            _train(options)
        else:
            _write(options)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare.image_codes", description=DESCRIPTION
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|write")
    _add_train(
        commands.add_parser(
            "train",
            help="make a VQ model",
            description=TRAIN,
            epilog=f"{EXAMPLE} train --source caption='book/caption/train-*.tar' --side-pixels 64 "
            "--out book/codes",
        )
    )
    _add_write(
        commands.add_parser(
            "write",
            help="write shards with codes",
            description=WRITE,
            epilog=f"{EXAMPLE} write --codebook book/codes --kind caption "
            "--shards 'book/caption/*.tar' --out book/coded/caption",
        )
    )
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    said = "shards, as for data.prepare.tokenizer: caption, caption:FIELD or interleaved; repeat it"
    add("--source", action="append", required=True, metavar="KIND=GLOB", help=said)
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--side-pixels", type=int, default=64, metavar="S", help="of an image (%(default)s)")
    said = "a code stands for a square of so many pixels (%(default)s)"
    add("--patch-pixels", type=int, default=8, metavar="P", help=said)
    add("--codes", type=int, default=512, metavar="K", help="different ones (%(default)s)")
    add("--channels", type=int, default=64, metavar="N", help="width of the model (%(default)s)")
    said = "residual blocks on every level (%(default)s)"
    add("--blocks", type=int, default=0, metavar="N", help=said)
    add("--steps", type=int, default=800, metavar="N", help="(%(default)s)")
    add("--batch-images", type=int, default=8, metavar="N", help="of a step (%(default)s)")
    add("--learning-rate", type=float, default=2e-3, metavar="R", help="(%(default)s)")
    said = "to draw from the shards and hold in memory (%(default)s)"
    add("--images", type=int, default=10_000, metavar="N", help=said)
    add("--seed", type=int, default=0, help="draws images and weights (%(default)s)")


def _add_write(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    said = "the VQ model: what train wrote, or config.json and .safetensors of a (Janus)VQVAE"
    add("--codebook", type=Path, required=True, metavar="DIR", help=said)
    kinds = [kind.value for kind in documents.KINDS]
    add("--kind", required=True, choices=kinds, help="of the shards (docs/data-format.md)")
    add("--text-field", metavar="FIELD", help="as for data.prepare.index")
    add("--shards", required=True, help="glob or brace range; quote it: 'DIR/train-*.tar'")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, metavar="N", help="processes (default: all cores)")


def _train(options: argparse.Namespace) -> None:
    for name in ("steps", "batch_images", "images"):
        if getattr(options, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is {getattr(options, name)}; give 1 or more.")
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed is {options.seed}; give 0 or more, below 2**31.")
    if not options.learning_rate > 0:
        raise UserError(f"--learning-rate is {options.learning_rate}; give one above 0.")
    sources = read_sources(options.source, kinds=documents.KINDS)
    for layout, _ in sources:
        documents.check(layout, key="--source")
    train.train(
        sources,
        shape=Shape(
            options.side_pixels,
            options.patch_pixels,
            options.codes,
            options.channels,
            options.blocks,
        ),
        recipe=Recipe(options.steps, options.batch_images, options.learning_rate, options.seed),
        images=options.images,
        out=options.out,
    )


def _write(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; give 1 or more.")
    layout = Layout(Kind(options.kind), options.text_field)
    layout.check("--text-field", modality_key="--kind")
    shards = find_shards(options.shards, key="--shards", store=LOCAL)
    torch.set_num_threads(1)  # before the processes are forked
    codes = read(options.codebook, key="--codebook")
    with tqdm(unit=" documents", disable=None, leave=False) as bar:
        written = write.write(
            shards,
            layout=layout,
            codes=codes,
            out=options.out,
            workers=min(options.workers, len(shards)),
            tell=bar.update,
        )
    print(left_out.report(written.left_out), end="")
    _tell(written, codes, layout=layout, shards=shards, out=options.out)


def _tell(
    written: write.Written, codes: ImageCodes, *, layout: Layout, shards: list[str], out: Path
) -> None:
    """What there is now, how good it is, and what the next commands must be told."""
    if not written.images:
        raise UserError(
            "--shards hold no image that can be used; check --kind, or ask "
            "`python -m data.prepare.validate` what they hold."
        )
    images = sample([(layout, shards[:1])], images=128, side_pixels=codes.side_pixels, seed=0)
    found = look(codes, images)
    print(
        f"{written.documents:8}  documents in {out}/*.tar\n"
        f"{written.images:8}  images of {codes.tokens} codes each; {written.usage.said()}\n"
        f"{found.said()}\nwrote {found.picture(out)}\n"
        f"Index them with --kind {layout.kind.value} --modality image, and train with "
        f"model.image.kind=codes and data.units.image={codes.codes}."
    )


if __name__ == "__main__":
    main()
