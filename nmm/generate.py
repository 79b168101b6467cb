"""Text that a trained model writes after images and text.

From the shell: `python -m nmm.generate --run runs/X --image cat.jpg`.
Legend of shapes: B prompts, L positions, V ids.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.corpus import Corpus
from data.documents import Parts, parse
from data.images import decode
from data.layout import read_document
from data.samples import BadSample
from data.sequences import encode, sequence
from data.tokenizer import Tokenizer
from nmm.batch import NO_LABEL, Modality, PackedBatch
from nmm.checkpoint import Trained, read_run
from nmm.config import ImageConfig, ImageKind, Kind
from nmm.errors import UserError
from nmm.evaluate import open_held_out
from nmm.model import Model
from nmm.plot import caption_figure

PROMPTS_AT_ONCE = 64
SHOWN = 24


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Parts],
    *,
    tokenizer: Tokenizer,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Continue every prompt by at most `max_tokens` tokens, or to the end of the document.

    Temperature 0 takes the most probable id. Only text ids and the end are ever taken, never
    padding ids or sentinels.
    """
    device = next(model.parameters()).device
    batch, lengths = _prompt_batch(
        prompts, tokenizer=tokenizer, image=model.config.image, room=max_tokens
    )
    _refuse_beyond_positions(batch.tokens.shape[1], limit=model.config.max_positions)
    batch, at = batch.to(device), lengths.to(device) - 1
    rows = torch.arange(len(prompts), device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    written: list[Tensor] = []
    for _ in range(max_tokens):
        logits = model.next_logits(_first_columns(batch, int(at.max()) + 1), at=at).float()
        chosen = _choose(
            _only_text(logits, tokenizer), temperature=temperature, generator=generator
        )
        chosen = torch.where(finished, tokenizer.ids.eos, chosen)
        finished |= chosen == tokenizer.ids.eos
        written.append(chosen)
        if finished.all():
            break
        at = at + 1
        batch.tokens[rows, at] = chosen
        batch.modality[rows, at] = Modality.text
        batch.document[rows, at] = 1
    ids = torch.stack(written, dim=1).tolist()
    return [tokenizer.decode(row) for row in ids]


def _prompt_batch(
    prompts: Sequence[Parts], *, tokenizer: Tokenizer, image: ImageConfig, room: int
) -> tuple[PackedBatch, Tensor]:
    """One prompt a row, `room` free positions after the longest; and int64[B], their lengths."""
    sequences = [
        sequence(encode(parts, tokenizer), tokenizer.ids, image_tokens=image.tokens)
        for parts in prompts
    ]
    lengths = torch.tensor([len(s.tokens) - 1 for s in sequences])  # without the end
    shape = (len(prompts), int(lengths.max()) + room)
    tokens = torch.full(shape, tokenizer.ids.pad)
    images, document = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    pixels: list[np.ndarray] = []
    for row, (parts, s) in enumerate(zip(prompts, sequences, strict=True)):
        length = int(lengths[row])
        tokens[row, :length] = torch.from_numpy(s.tokens[:length])
        index = torch.from_numpy(s.image[:length])
        images[row, :length] = torch.where(index > 0, index + len(pixels), 0)
        document[row, :length] = 1
        pixels += [decode(part, image.side_pixels) for part in parts if isinstance(part, bytes)]
    modality = torch.where(images > 0, Modality.image, Modality.text) * (document > 0)
    side = image.side_pixels
    batch = PackedBatch(
        tokens=tokens,
        modality=modality.to(torch.uint8),
        source=torch.zeros(shape, dtype=torch.uint8),
        document=document,
        image=images,
        position=torch.arange(shape[1], dtype=torch.int32).expand(shape).contiguous(),
        labels=torch.full(shape, NO_LABEL),
        label_modality=torch.zeros(shape, dtype=torch.uint8),
        pixels=torch.from_numpy(np.stack(pixels))
        if pixels
        else torch.zeros((0, side, side, 3), dtype=torch.uint8),
    )
    return batch, lengths


def _refuse_beyond_positions(length: int, *, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise UserError(
            f"the prompt and --max-tokens take {length} positions and model.max_positions is "
            f"{limit}; shorten the prompt or lower --max-tokens."
        )


def _first_columns(batch: PackedBatch, length: int) -> PackedBatch:
    """The batch without the free positions that are still to be written."""
    return PackedBatch(
        tokens=batch.tokens[:, :length],
        modality=batch.modality[:, :length],
        source=batch.source[:, :length],
        document=batch.document[:, :length],
        image=batch.image[:, :length],
        position=batch.position[:, :length],
        labels=batch.labels[:, :length],
        label_modality=batch.label_modality[:, :length],
        pixels=batch.pixels,
    )


def _only_text(logits: Tensor, tokenizer: Tokenizer) -> Tensor:
    """[B, V] with minus infinity at every id that is neither a text piece nor the end."""
    ids = tokenizer.ids
    banned = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    banned[: ids.text_end] = False
    banned[[i for i in (ids.pad, ids.unk, ids.bos) if i >= 0]] = True
    banned[ids.eos] = False
    return logits.masked_fill(banned, -torch.inf)


def _choose(logits: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
    """int64[B]: the next ids."""
    if temperature == 0:
        return logits.argmax(-1)
    # Subtracted first, so that the smallest temperature divides nothing above zero.
    below = logits - logits.amax(dim=-1, keepdim=True)
    shares = torch.softmax(below / temperature, dim=-1)
    return torch.multinomial(shares, 1, generator=generator).squeeze(1)


@dataclass(frozen=True)
class Captioned:
    """A held-out caption document: its image file, what the model wrote, and its own caption."""

    key: str
    image: bytes
    written: str
    reference: str


def caption_held_out(trained: Trained, *, count: int, max_tokens: int) -> list[Captioned]:
    """Greedy captions of the first `count` held-out documents of the caption sources."""
    corpus = open_held_out(trained)
    documents = list(islice(_caption_documents(corpus), count))
    if not documents:
        raise UserError(
            "--held-out found no held-out document of kind caption in data.sources; give --image."
        )
    captioned: list[Captioned] = []
    for start in range(0, len(documents), PROMPTS_AT_ONCE):
        some = documents[start : start + PROMPTS_AT_ONCE]
        written = generate(
            trained.model,
            [[image] for _, image, _ in some],
            tokenizer=corpus.tokenizer,
            max_tokens=max_tokens,
        )
        captioned += [
            Captioned(key, image, text, reference)
            for (key, image, reference), text in zip(some, written, strict=True)
        ]
    return captioned


def _caption_documents(corpus: Corpus) -> Iterator[tuple[str, bytes, str]]:
    """Key, image and text of every readable caption document, in the order of the shards."""
    for source in corpus.sources:
        if source.kind is not Kind.caption:
            continue
        for shard in source.shards:
            for number in range(len(shard.index)):
                try:
                    variant = int(shard.index.variant[number])
                    members = read_document(shard, number)
                    image, text = parse(source.layout, members, variant=variant).parts
                    assert isinstance(image, bytes)
                    assert isinstance(text, str)
                    decode(image, corpus.image.side_pixels)
                except BadSample:
                    continue
                yield f"{shard.name}/{shard.index.key(number)}", image, text


def write_captions(captioned: Sequence[Captioned], directory: Path, *, side_pixels: int) -> None:
    """captions.jsonl with all captions beside their references, captions.png with the first."""
    rows = [{"key": c.key, "written": c.written, "reference": c.reference} for c in captioned]
    (directory / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = captioned[:SHOWN]
    caption_figure(
        [decode(c.image, side_pixels) for c in shown],
        written=[c.written for c in shown],
        references=[c.reference for c in shown],
        path=directory / "captions.png",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nmm.generate",
        description="Let a trained model continue images and text, or caption its held-out images.",
        epilog="Examples: python -m nmm.generate --run runs/demo --image cat.jpg "
        '--prompt "The picture"; python -m nmm.generate --run runs/demo --held-out 64',
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="directory of the run, e.g. runs/demo"
    )
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="image before the text; repeatable"
    )
    parser.add_argument(
        "--prompt", default="", help="text to continue; may be empty after an image"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        metavar="N",
        help="instead: caption N held-out images, into captions.jsonl and captions.png of the run",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=48, help="most tokens to write (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most probable id (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="for a temperature above 0 (%(default)s)"
    )
    arguments = parser.parse_args()
    try:
        _run(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


def _run(arguments: argparse.Namespace) -> None:
    if arguments.max_tokens < 1 or not 0 <= arguments.temperature < math.inf:
        raise UserError(
            f"--max-tokens is {arguments.max_tokens} and --temperature is {arguments.temperature}; "
            f"give at least 1 token and a temperature of 0 or more."
        )
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}; set it between 0 and 2**63.")
    if not _is_text(arguments.prompt):
        raise UserError("--prompt is not valid UTF-8; give text.")
    images = [_readable(path) for path in arguments.image]
    if arguments.held_out is None and not (images or arguments.prompt):
        raise UserError("nothing to continue; give --image, --prompt or --held-out.")
    if arguments.held_out is not None and (arguments.held_out < 1 or images or arguments.prompt):
        raise UserError(
            f"--held-out is {arguments.held_out}; give 1 or more, without --image and --prompt."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = read_run(arguments.run, device=device)
    if trained.config.model.image.kind is ImageKind.none and (images or arguments.held_out):
        raise UserError(
            f"{arguments.run} has model.image.kind none, so it reads no images; give --prompt only."
        )
    if arguments.held_out:
        captioned = caption_held_out(
            trained, count=arguments.held_out, max_tokens=arguments.max_tokens
        )
        side = trained.config.model.image.side_pixels
        write_captions(captioned, arguments.run, side_pixels=side)
        print(f"captioned {len(captioned)} held-out images: {arguments.run / 'captions.png'}")
        return
    parts: Parts = [*images, *([arguments.prompt] if arguments.prompt else [])]
    written = generate(
        trained.model,
        [parts],
        tokenizer=Tokenizer(trained.config.data.tokenizer),
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    print(arguments.prompt + written[0])


def _is_text(prompt: str) -> bool:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def _readable(path: Path) -> bytes:
    """The bytes of an image file that can be decoded; raises UserError."""
    try:
        image = path.read_bytes()
        decode(image, 1)
    except OSError as error:
        raise UserError(
            f"--image {path} cannot be read ({error.strerror}); give the path of an image file."
        ) from None
    except BadSample as bad:
        raise UserError(
            f"--image {path} cannot be decoded ({bad.reason}); give a JPEG, PNG, WebP or GIF."
        ) from None
    return image


if __name__ == "__main__":
    main()
