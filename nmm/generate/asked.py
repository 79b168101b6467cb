"""The command line of `python -m nmm.generate`: its flags, and what of them means nothing."""

import argparse
from pathlib import Path

from nmm.errors import UserError
from nmm.generate.prompts import Hole
from nmm.generate.rules import Writing
from nmm.generate.sampling import Sampling
from nmm.trained import add_arguments

DESCRIPTION = """\
Let a trained model continue documents of images and text, or caption its held-out images. One whose
images are codes also draws images, alone or inside of text."""

EXAMPLES = """\
examples:
  python -m nmm.generate --run runs/demo --image cat.jpg
  python -m nmm.generate --run runs/demo --prompt "A:" --image a.jpg --prompt "B:"   in this order
  python -m nmm.generate --run runs/demo --prompt "Once" --temperature 0.8 --top-p 0.95 --samples 4
  python -m nmm.generate --run runs/cm3 --prompt "A small" --hole --prompt "sleeps."
  python -m nmm.generate --export demo --prompts prompts.jsonl --out written
  python -m nmm.generate --run runs/demo --held-out 64
  python -m nmm.generate --run runs/codes --write image --prompt "A star." --temperature 1 --out X
  python -m nmm.generate --run runs/codes --write both --prompt "Once" --temperature 1 --out X

a line of prompts.jsonl: {"texts": ["A:", null, "B:"], "images": [null, "a.jpg", null]}
and of what is behind a hole: "after_texts" and "after_images", likewise"""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m nmm.generate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(found)
    what = found.add_argument_group("what to continue")
    text = "text of the prompt; texts and images keep their order"
    what.add_argument("--prompt", action="append", dest="parts", default=[], help=text)
    image = "image of the prompt; repeatable, as --prompt is"
    what.add_argument("--image", action="append", dest="parts", type=Path, help=image)
    hole = "a hole among these, which is filled in; needs a model trained with data.masking"
    what.add_argument("--hole", action="append_const", dest="parts", const=Hole.here, help=hole)
    file = "or a file with one prompt a line, as below"
    what.add_argument("--prompts", type=Path, metavar="FILE", help=file)
    captions = (
        "or caption N held-out images of the run; with --write image: draw N held-out captions"
    )
    what.add_argument("--held-out", type=int, metavar="N", help=captions)
    how = found.add_argument_group("how")
    said = "text (the default), one image, or both in any order; images need image codes"
    choices = [writing.value for writing in Writing]
    how.add_argument("--write", choices=choices, default=Writing.text.value, help=said)
    most = "most tokens to write (48; with --write both: as many as the model knows)"
    how.add_argument("--max-tokens", type=int, help=most)
    how.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most probable id (%(default)s)"
    )
    how.add_argument(
        "--top-p", type=float, default=1.0, help="draw from this part of the probability (all)"
    )
    how.add_argument("--seed", type=int, default=0, help="for temperatures above 0 (%(default)s)")
    how.add_argument("--samples", type=int, default=1, help="of every prompt (%(default)s)")
    how.add_argument("--batch", type=int, default=64, help="prompts at a time (%(default)s)")
    out = "write .jsonl, .png and .html there (--held-out: into the run, if not given)"
    found.add_argument("--out", type=Path, metavar="DIR", help=out)
    return found


def checked(given: argparse.Namespace) -> Sampling:
    """Refuse numbers and combinations that mean nothing; raises UserError."""
    for name in ("max_tokens", "samples", "batch"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give 1 or more.")
    ways = [bool(given.parts), given.prompts is not None, given.held_out is not None]
    if not any(ways):
        raise UserError("nothing to continue; give --image and --prompt, --prompts or --held-out.")
    if sum(ways) > 1:
        raise UserError(
            "--image and --prompt, --prompts and --held-out are three ways to say what to "
            "continue; give one."
        )
    if given.held_out is not None and given.held_out < 1:
        raise UserError(f"--held-out is {given.held_out}; give 1 or more.")
    if given.held_out and given.export and not given.out:
        raise UserError("--held-out of an --export needs a place to write to; give --out.")
    _check_writing(given)
    sampling = Sampling(given.temperature, given.top_p, given.seed)
    if given.samples > 1 and sampling.temperature == 0:
        raise UserError(
            f"--samples is {given.samples} but --temperature is 0, which writes the same again; "
            f"set --temperature above 0."
        )
    return sampling


def _check_writing(given: argparse.Namespace) -> None:
    writing = Writing(given.write)
    if writing is Writing.image and given.max_tokens is not None:
        raise UserError(
            f"--max-tokens is {given.max_tokens} but --write is image, and all images have the "
            f"same length; leave it out."
        )
    if writing is Writing.both and given.held_out:
        raise UserError(
            "--write is both but --held-out compares texts or images; give --write text or image."
        )
    if writing is not Writing.text and not given.out and not given.held_out:
        raise UserError(f"--write is {writing.value}, and images are files; give --out.")
