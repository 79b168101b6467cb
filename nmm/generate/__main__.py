"""`python -m nmm.generate`: let a trained model continue prompts, or caption held-out images."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.documents import Parts
from nmm.errors import UserError
from nmm.evaluate import open_held_out
from nmm.generate import page
from nmm.generate.captions import held_out_captions
from nmm.generate.page import Result
from nmm.generate.prompts import Prompt, of_file, of_options
from nmm.generate.sampling import Sampling
from nmm.generate.text import check_prompts, generate
from nmm.trained import Trained, add_arguments, read

DESCRIPTION = """\
Let a trained model continue documents of images and text, or caption its held-out images."""

EXAMPLES = """\
examples:
  python -m nmm.generate --run runs/demo --image cat.jpg
  python -m nmm.generate --run runs/demo --prompt "A:" --image a.jpg --prompt "B:"   in this order
  python -m nmm.generate --run runs/demo --prompt "Once" --temperature 0.8 --top-p 0.95 --samples 4
  python -m nmm.generate --export demo --prompts prompts.jsonl --out written
  python -m nmm.generate --run runs/demo --held-out 64

a line of prompts.jsonl: {"texts": ["A:", null, "B:"], "images": [null, "a.jpg", null]}"""


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    try:
        sampling = _checked(given)
        prompts = of_file(given.prompts) if given.prompts else [of_options(given.parts)]
        trained = read(given)
        if given.held_out:
            _caption(trained, given, sampling=sampling)
        else:
            _continue(trained, prompts, given=given, sampling=sampling)
    except UserError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nmm.generate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    what = parser.add_argument_group("what to continue")
    text = "text of the prompt; texts and images keep their order"
    what.add_argument("--prompt", action="append", dest="parts", default=[], help=text)
    image = "image of the prompt; repeatable, as --prompt is"
    what.add_argument("--image", action="append", dest="parts", type=Path, help=image)
    file = "or a file with one prompt a line, as below"
    what.add_argument("--prompts", type=Path, metavar="FILE", help=file)
    captions = "or caption N held-out images of the run"
    what.add_argument("--held-out", type=int, metavar="N", help=captions)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--max-tokens", type=int, default=48, help="most tokens to write (%(default)s)"
    )
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
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    return parser


def _checked(given: argparse.Namespace) -> Sampling:
    """Refuse numbers and combinations that mean nothing; raises UserError."""
    for name in ("max_tokens", "samples", "batch"):
        if getattr(given, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(given, name)}; give 1 or more."
            )
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
    sampling = Sampling(given.temperature, given.top_p, given.seed)
    if given.samples > 1 and sampling.temperature == 0:
        raise UserError(
            f"--samples is {given.samples} but --temperature is 0, which writes the same again; "
            f"set --temperature above 0."
        )
    return sampling


def _continue(
    trained: Trained, prompts: list[Prompt], *, given: argparse.Namespace, sampling: Sampling
) -> None:
    asked = [(prompt, None) for prompt in prompts]
    results = _results(trained, asked, given=given, sampling=sampling)
    for number, result in enumerate(results):
        if len(results) > 1:
            print(f"{'' if number == 0 else chr(10)}== {result.prompt.name}")
        print(_harmless(result.prompt.said() + result.written.text))
    if given.out:
        _write(results, trained, given.out, name="generated", given=given, sampling=sampling)


def _caption(trained: Trained, given: argparse.Namespace, *, sampling: Sampling) -> None:
    found = held_out_captions(open_held_out(trained), count=given.held_out)
    asked = [(Prompt(key, [image], [key]), caption) for key, image, caption in found]
    results = _results(trained, asked, given=given, sampling=sampling)
    print(f"captioned {len(found)} held-out images")
    directory = given.out or given.run
    _write(results, trained, directory, name="captions", given=given, sampling=sampling)


def _results(
    trained: Trained,
    asked: Sequence[tuple[Prompt, str | None]],
    *,
    given: argparse.Namespace,
    sampling: Sampling,
) -> list[Result]:
    """Of all prompts, each with its reference; `--samples` of every one, beside each other."""
    repeated = [
        (replace(prompt, name=f"{prompt.name}, sample {n}"), reference)
        if given.samples > 1
        else (prompt, reference)
        for prompt, reference in asked
        for n in range(1, given.samples + 1)
    ]
    prompts: list[Parts] = [[*prompt.parts] for prompt, _ in repeated]
    check_prompts(
        prompts,
        tokenizer=trained.tokenizer,
        model=trained.config.model,
        max_tokens=given.max_tokens,
        context_tokens=trained.config.data.context_tokens,
    )
    written = generate(
        trained.model,
        prompts,
        tokenizer=trained.tokenizer,
        max_tokens=given.max_tokens,
        sampling=sampling,
        at_once=given.batch,
    )
    return [Result(*one, text) for one, text in zip(repeated, written, strict=True)]


def _write(
    results: list[Result],
    trained: Trained,
    directory: Path,
    *,
    name: str,
    given: argparse.Namespace,
    sampling: Sampling,
) -> None:
    how = "the most probable id" if sampling.temperature == 0 else _drawn(sampling)
    try:
        paths = page.write(
            results,
            directory,
            name=name,
            title=f"{trained.name}, step {trained.step:,}",
            said=f"After {trained.tokens:,} tokens of training; {how}, at most "
            f"{given.max_tokens:,} tokens each.",
            side=trained.config.model.image.side_pixels,
        )
    except OSError as error:
        raise UserError(
            f"--out is {directory}, where {name}.* cannot be written ({error.strerror}); give "
            f"another folder."
        ) from None
    print(f"wrote {', '.join(map(str, paths))}")


def _drawn(sampling: Sampling) -> str:
    part = "" if sampling.top_p == 1 else f", from the top {sampling.top_p:g} of the probability"
    return f"drawn with temperature {sampling.temperature:g}{part}, seed {sampling.seed}"


def _harmless(text: str) -> str:
    """Control characters, which a model may write, would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{MIDDLE DOT}" for c in text)


if __name__ == "__main__":
    main()
