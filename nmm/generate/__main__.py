"""`python -m nmm.generate`: let a trained model continue prompts, caption images or draw them."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.documents import Parts
from data.units import Units
from nmm.codes import ImageCodes
from nmm.config import ImageKind
from nmm.errors import UserError
from nmm.generate import asked, page
from nmm.generate.captions import held_out_captions
from nmm.generate.page import Result
from nmm.generate.prompts import AFTER, Prompt, of_file, of_options
from nmm.generate.rules import BORDERS, Writing
from nmm.generate.sampling import Sampling
from nmm.generate.seen import Seen
from nmm.generate.text import check_prompts, generate, prompt_tokens
from nmm.trained import Trained, read

TEXT_TOKENS = 48  # at most, where nobody says how many


def main(arguments: Sequence[str] | None = None) -> None:
    given = asked.parser().parse_args(arguments)
    try:
        sampling = asked.checked(given)
        prompts = of_file(given.prompts) if given.prompts else [of_options(given.parts)]
        trained = read(given)
        if given.held_out:
            _held_out(trained, given, sampling=sampling)
        else:
            _continue(trained, prompts, given=given, sampling=sampling)
    except UserError as error:
        sys.exit(f"error: {error}")


def _codes(trained: Trained, given: argparse.Namespace, *, shown: bool) -> ImageCodes | None:
    """What reads and draws the images of a model whose images are codes; raises UserError.

    `shown`: are there images in the prompts?
    """
    kind, writes = trained.config.model.image.kind, Writing(given.write) is not Writing.text
    if kind is not ImageKind.codes:
        if writes:
            raise UserError(
                f"--write is {given.write} but model.image.kind is {kind.name}, so the model "
                f"writes text only; give a run with model.image.kind=codes."
            )
        return None
    codes = trained.codes()
    if codes is None and (writes or shown):
        raise UserError(
            f"data.codebook is null in the config.yaml of {trained.name}, so its image codes "
            f"cannot be read or drawn; name the folder of the VQ model there that made them."
        )
    return codes


def _max_tokens(
    trained: Trained,
    prompts: Sequence[Parts],
    given: argparse.Namespace,
    *,
    seen: Seen,
    after: Sequence[Parts] | None,
) -> int:
    """As asked; else a default for text, an image's length, or what the context has room for."""
    if given.max_tokens is not None:
        return given.max_tokens
    match Writing(given.write):
        case Writing.text:
            return TEXT_TOKENS
        case Writing.image:
            assert seen.codes is not None
            return seen.codes.tokens + BORDERS
        case Writing.both:
            lengths = [
                prompt_tokens(parts, tokenizer=trained.tokenizer, image=seen.image, after=behind)
                for parts, behind in zip(prompts, after or [None] * len(prompts), strict=True)
            ]
            return max(1, trained.config.data.context_tokens - max(lengths))


def _continue(
    trained: Trained, prompts: list[Prompt], *, given: argparse.Namespace, sampling: Sampling
) -> None:
    shown = any(prompt.images for prompt in prompts)
    seen = Seen(trained.config.model.image, _codes(trained, given, shown=shown))
    pairs = [(prompt, None) for prompt in prompts]
    results = _results(trained, pairs, seen=seen, given=given, sampling=sampling)
    for number, result in enumerate(results):
        if len(results) > 1:
            print(f"{'' if number == 0 else chr(10)}== {result.prompt.name}")
        print(_harmless(result.said()))
    if given.out:
        name = "generated"
        _write(results, trained, given.out, name=name, seen=seen, given=given, sampling=sampling)


def _held_out(trained: Trained, given: argparse.Namespace, *, sampling: Sampling) -> None:
    """Captions of held-out images, or with --write image: images of held-out captions."""
    seen = Seen(trained.config.model.image, _codes(trained, given, shown=True))
    coded = seen.codes is not None
    found = held_out_captions(trained.open_held_out(), count=given.held_out, coded=coded)
    draws = Writing(given.write) is Writing.image
    pairs = [
        (Prompt(key, [text], []), image) if draws else (Prompt(key, [image], [key]), text)
        for key, image, text in found
    ]
    results = _results(trained, pairs, seen=seen, given=given, sampling=sampling)
    print(f"{'drew' if draws else 'captioned'} {len(found)} held-out images")
    _write(
        results,
        trained,
        given.out or given.run,
        name="drawings" if draws else "captions",
        seen=seen,
        given=given,
        sampling=sampling,
    )


def _results(
    trained: Trained,
    pairs: Sequence[tuple[Prompt, str | bytes | Units | None]],
    *,
    seen: Seen,
    given: argparse.Namespace,
    sampling: Sampling,
) -> list[Result]:
    """Of all prompts, each with its reference; `--samples` of every one, beside each other."""
    repeated = [
        (replace(prompt, name=f"{prompt.name}, sample {n}"), reference)
        if given.samples > 1
        else (prompt, reference)
        for prompt, reference in pairs
        for n in range(1, given.samples + 1)
    ]
    prompts = [seen.parts(prompt.parts) for prompt, _ in repeated]
    after = _after(trained, [prompt for prompt, _ in repeated], seen=seen)
    max_tokens = _max_tokens(trained, prompts, given, seen=seen, after=after)
    check_prompts(
        prompts,
        tokenizer=trained.tokenizer,
        model=trained.config.model,
        max_tokens=max_tokens,
        context_tokens=trained.config.data.context_tokens,
        after=after,
    )
    written = generate(
        trained.model,
        prompts,
        tokenizer=trained.tokenizer,
        max_tokens=max_tokens,
        sampling=sampling,
        at_once=given.batch,
        writing=Writing(given.write),
        codes=seen.codes,
        after=after,
    )
    return [Result(*one, text) for one, text in zip(repeated, written, strict=True)]


def _after(trained: Trained, prompts: Sequence[Prompt], *, seen: Seen) -> list[Parts] | None:
    """What is behind the holes of all prompts; None where none has one. Raises UserError."""
    after = [seen.parts(prompt.after) for prompt in prompts if prompt.after is not None]
    if not after:
        return None
    if len(after) < len(prompts):
        raise UserError(
            f"--prompts has lines with a hole ({AFTER}texts) and lines without; give these in a "
            f"file of their own."
        )
    if trained.tokenizer.ids.masks is None:
        raise UserError(
            "a hole is filled in by models that learned it, but data.masking.mean_spans was 0 in "
            "the training; leave --hole out, or give a run with data.masking."
        )
    return after


def _write(
    results: list[Result],
    trained: Trained,
    directory: Path,
    *,
    name: str,
    seen: Seen,
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
            said=f"After {trained.tokens:,} tokens of training; {how}.{_order(given)}",
            seen=seen,
        )
    except OSError as error:
        raise UserError(
            f"--out is {directory}, where {name}.* cannot be written ({error.strerror}); give "
            f"another folder."
        ) from None
    print(f"wrote {', '.join(map(str, paths))}")


def _order(given: argparse.Namespace) -> str:
    """What the reader must know to tell images apart."""
    draws = given.held_out and Writing(given.write) is Writing.image
    return " First what the model drew, then the image that the text belongs to." if draws else ""


def _drawn(sampling: Sampling) -> str:
    part = "" if sampling.top_p == 1 else f", from the top {sampling.top_p:g} of the probability"
    return f"drawn with temperature {sampling.temperature:g}{part}, seed {sampling.seed}"


def _harmless(text: str) -> str:
    """Control characters, which a model may write, would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{MIDDLE DOT}" for c in text)


if __name__ == "__main__":
    main()
