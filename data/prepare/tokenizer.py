"""Train a sentencepiece model on text sampled from shards, in equal parts from every source.

    python -m data.prepare.tokenizer --out corpora/book/tokenizer.model --vocab-size 2000 \\
        --source caption='corpora/book/caption/train-*.tar' \\
        --source interleaved='corpora/book/interleaved/train-*.tar' \\
        --source text='corpora/book/text/train-*.tar'

The name before = is the kind of the shards (docs/data-format.md); text:FIELD and caption:FIELD take
the text from that field of the .json, and caption::image has image codes in the place of images.
The model is byte-pair encoding with byte fallback, so every text has ids, and no normalisation:
decoding the ids of a text gives the text back, character by character (but U+2581, sentencepiece's
own sign of a space, becomes a space). Pad is 0, unknown 1, begin 2, end 3. The same shards and
options give the same bytes.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from random import Random

import sentencepiece

from data import container
from data.documents import parse, variants
from data.prepare.flags import read_sources
from data.samples import BadSample
from data.store import LOCAL
from nmm.config import Kind, Layout
from nmm.errors import UserError

LEAST_PER_SHARD = 50_000
LONGEST_LINE_BYTES = 1 << 24
KINDS = [kind for kind in Kind if kind is not Kind.units]

Sources = Sequence[tuple[Layout, Sequence[Path | str]]]


def make(
    sources: Sources,
    *,
    vocab_size: int,
    characters: int,
    seed: int,
    out: Path,
    weights: Sequence[float] | None = None,
) -> None:
    """Sample, train and save; `sources` holds the layout and the shards of each.

    `weights` are the shares of their characters, None: equal ones. Raises UserError.
    """
    weights = [1.0] * len(sources) if weights is None else weights
    if len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f"--weight is given as {', '.join(map(str, weights))} for {len(sources)} sources; give "
            f"every --source one above 0, in the same order, or none."
        )
    texts = _collect(sources, characters=characters, seed=seed, weights=weights)
    if not any(text.strip() for text in texts):
        raise UserError(
            f"--source {sources[0][0].kind.value} holds no text; check its KIND and its glob."
        )
    _save(train(texts, vocab_size=vocab_size), out)
    print(f"wrote {out} with {vocab_size} pieces", flush=True)


def train(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """The bytes of a model; raises UserError for a vocabulary that the text cannot fill or need."""
    lines = [line for text in texts for line in text.split("\n") if line]
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=LONGEST_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise UserError(
            f"--vocab-size is {vocab_size}, which does not suit the {sum(map(len, lines)):,} "
            f"characters of text ({reason}); change --vocab-size, or give other text."
        ) from None
    return model.getvalue()


def sample(
    layout: Layout, shards: Sequence[Path | str], *, characters: int, rng: Random
) -> Iterator[str]:
    """Texts of about `characters` in all, spread over the shards and over the documents of each.

    A small sample of a large corpus opens only as many shards as give it 50,000 characters each.
    """
    shards = rng.sample(shards, len(shards))
    for position, shard in enumerate(shards):
        shards_left = len(shards) - position
        quota = min(characters, max(LEAST_PER_SHARD, -(-characters // shards_left)))
        texts = list(_texts(layout, shard))
        rng.shuffle(texts)
        for text in texts:
            if quota > 0:
                taken = text[:quota]
                quota, characters = quota - len(taken), characters - len(taken)
                yield taken
        if characters <= 0:
            return


def _texts(layout: Layout, shard: Path | str) -> Iterator[str]:
    """The text of each of a shard's documents; one that cannot be read has none."""
    container.check(str(shard), layout)
    with LOCAL.local(str(shard)) as path:
        for place, raw in container.read(path)[1]:
            if place.fault:
                continue
            members = container.members_of(path.name, raw)
            for variant in range(variants(layout, members)):
                try:
                    parts = parse(layout, members, key=place.key, variant=variant).parts
                except BadSample:
                    continue
                yield "\n".join(part for part in parts if isinstance(part, str))


def _collect(
    sources: Sources, *, characters: int, seed: int, weights: Sequence[float]
) -> list[str]:
    """Texts of all sources, `characters` in the shares of the weights; prints what each gave."""
    texts: list[str] = []
    for index, (layout, shards) in enumerate(sources):
        rng = Random(f"{seed} {index}")
        share = int(characters * weights[index] / sum(weights))
        found = list(sample(layout, shards, characters=share, rng=rng))
        print(
            f"{layout.kind.name}: {sum(map(len, found)):,} characters of {len(found):,} documents"
        )
        texts += found
    return texts


def _save(model: bytes, path: Path) -> None:
    """Write the model; another one in its place is refused, because an index may belong to it."""
    if path.exists() and path.read_bytes() != model:
        raise UserError(
            f"--out is {path}, which holds another model; choose another --out, or delete it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(model)
    part.replace(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare.tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="KIND[:FIELD[:MODALITY]]=GLOB",
        help="shards; repeat it",
    )
    parser.add_argument(
        "--weight",
        action="append",
        type=float,
        help="share of the characters that a source gives: one for every --source (default: equal)",
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="number of pieces")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="model to write")
    parser.add_argument(
        "--characters", type=int, default=2_000_000, help="of text to train on (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the sample (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.characters < 1:
            raise UserError(f"--characters is {options.characters}; set it above 0.")
        make(
            read_sources(options.source, kinds=KINDS),
            vocab_size=options.vocab_size,
            characters=options.characters,
            seed=options.seed,
            out=options.out,
            weights=options.weight,
        )
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
