"""Make the demo corpus: shards of all three kinds, from a renderer and the installed packages."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from random import Random

from data.prepare import index, programs, prose, scenes, tokenizer
from data.prepare.stories import story
from data.shards import ShardWriter
from nmm.config import Kind, Layout, UnitModality
from nmm.errors import UserError

CAPTIONS, STORIES, TEXT_CHARACTERS = 10_000, 3_000, 1_000_000  # of the train split at size 1
HELD_OUT_CAPTIONS, HELD_OUT_STORIES, HELD_OUT_TEXTS = 256, 128, 128  # from size 1 on
CODE_BYTES, HELD_OUT_FUNCTIONS = 1_000_000, 128
FEWEST = 8
PAIR_FRACTION = 0.5
MOST_DOCUMENTS_PER_SHARD = 4_096
KINDS = (Kind.caption, Kind.interleaved, Kind.text)
SPLITS = ("train", "held_out")
VOCAB_SIZE = 2000  # with the image id and some room it fits the 2,048 of conf/model/tiny.yaml


def render(out: Path, *, size: float, seed: int) -> None:
    """Write OUT/{caption,interleaved,text}/{train,held_out}-NNNNNN.tar; leave a finished one alone.

    The bytes depend on size, seed and the installed packages. OUT/COMPLETE comes last and holds the
    parameters; what an interrupted run left is made anew. Raises UserError where a finished corpus
    has other parameters, and for a folder that holds something else.
    """
    if not 0 < size < inf:
        raise UserError(f"--size is {size}; set it above 0 (1.0 is what the demo trains on).")
    asked = json.dumps({"size": size, "seed": seed})
    if _finished(out, asked=asked):
        print(f"{out} is finished ({asked}): left alone.")
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "UNFINISHED").write_text(asked)
    for stale in out.glob("*/*.tar*"):
        stale.unlink()
    start = time.perf_counter()
    for split in SPLITS:
        _captions(out / "caption", split=split, size=size, seed=seed)
        _stories(out / "interleaved", split=split, size=size, seed=seed)
    _texts(out / "text", size=size, seed=seed)
    (out / "UNFINISHED").rename(out / "COMPLETE")
    print(f"{out}: complete after {time.perf_counter() - start:.0f} s.")


def _finished(out: Path, *, asked: str) -> bool:
    """Is this very corpus there? False where it must be made; refuses other content."""
    complete = out / "COMPLETE"
    if complete.exists():
        found = complete.read_text()
        if found != asked:
            raise UserError(
                f"--out is {out}, a corpus made with {found}, and {asked} is asked for; "
                f"choose another --out, or delete that folder."
            )
        return True
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {out}, which is a file; choose a folder.")
    if out.exists() and any(out.iterdir()) and not (out / "UNFINISHED").exists():
        raise UserError(
            f"--out is {out}, which holds other files; choose a new or an empty folder."
        )
    return False


def _captions(folder: Path, *, split: str, size: float, seed: int) -> None:
    """Pictures of scenes, each with a sentence and the scene itself."""
    documents = _documents(CAPTIONS, held_out=HELD_OUT_CAPTIONS, split=split, size=size)
    rng = Random(f"{seed} caption {split}")
    with _writer(folder, split=split, documents=documents) as writer:
        for index in range(documents):
            pair = rng.random() < PAIR_FRACTION
            scene = scenes.random_scene(rng, held_out=split == "held_out", pair=pair)
            image, described = scenes.render(rng, scene)
            text = scenes.caption(rng, scene)
            writer.caption(f"{index:08d}", image=image, text=text, scene=described)
    print(f"caption      {split:8}  {documents} pictures with a caption", flush=True)


def _stories(folder: Path, *, split: str, size: float, seed: int) -> None:
    """Documents of two to four pictures and the sentences that refer to them."""
    documents = _documents(STORIES, held_out=HELD_OUT_STORIES, split=split, size=size)
    rng = Random(f"{seed} interleaved {split}")
    with _writer(folder, split=split, documents=documents) as writer:
        for index in range(documents):
            parts, _ = story(rng, held_out=split == "held_out")
            writer.interleaved(f"{index:08d}", parts)
    print(f"interleaved  {split:8}  {documents} stories in pictures", flush=True)


def _texts(folder: Path, *, size: float, seed: int) -> None:
    """Documentation strings of the installed packages, until both splits are full."""
    few = _at_least_few(HELD_OUT_TEXTS * min(size, 1))
    splits = _filled(prose.texts(seed=seed), len, train=round(TEXT_CHARACTERS * size), few=few)
    for split, texts in splits.items():
        Random(f"{seed} text {split}").shuffle(texts)
        with _writer(folder, split=split, documents=len(texts)) as writer:
            for index, text in enumerate(texts):
                writer.text(f"{index:08d}", text)
        total = sum(map(len, texts))
        print(
            f"text         {split:8}  {len(texts)} documentation strings, {total} characters",
            flush=True,
        )


def render_code(corpus: Path, *, size: float, seed: int) -> None:
    """Write CORPUS/code/{train,held_out}-NNNNNN.tar, functions as units that are their bytes.

    CORPUS/code/COMPLETE comes last; a finished folder is left alone.
    """
    folder = corpus / "code"
    if (folder / "COMPLETE").exists():
        print(f"{folder} is finished: left alone.")
        return
    for stale in folder.glob("*.tar*"):
        stale.unlink()
    few = _at_least_few(HELD_OUT_FUNCTIONS * min(size, 1))
    found = _filled(programs.texts(seed=seed), _bytes, train=round(CODE_BYTES * size), few=few)
    for split, texts in found.items():
        codes = [text.encode() for text in texts]
        Random(f"{seed} code {split}").shuffle(codes)
        with _writer(folder, split=split, documents=len(codes)) as writer:
            for number, code in enumerate(codes):
                writer.units(f"{number:08d}", list(code))
        total = sum(map(len, codes))
        print(f"code         {split:8}  {len(codes)} functions, {total} bytes", flush=True)
    layout = Layout(Kind.units, modality=UnitModality.code)
    shards = sorted(folder.glob("*.tar"))
    index.index_shards(shards, layout=layout, tokenizer=corpus / "tokenizer.model")
    (folder / "COMPLETE").touch()


def _filled(
    found: Iterator[str], length: Callable[[str], int], *, train: int, few: int
) -> dict[str, list[str]]:
    """Both splits, until the lengths of `train` add up and the held-out one has a `few` texts."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    total = 0
    for text in found:
        if prose.held_out(text):
            splits["held_out"].append(text)
        elif total < train:
            splits["train"].append(text)
            total += length(text)
        if total >= train and len(splits["held_out"]) >= few:
            break
    else:
        print(f"took all there is: {total:,} of the {train:,} that --size asks for")
    splits["held_out"] = splits["held_out"][:few]
    return splits


def _bytes(text: str) -> int:
    return len(text.encode())


def _documents(train: int, *, held_out: int, split: str, size: float) -> int:
    """How many documents a split holds at a size; the held-out split does not grow above size 1."""
    return _at_least_few(train * size if split == "train" else held_out * min(size, 1))


def _at_least_few(documents: float) -> int:
    return max(FEWEST, round(documents))


def _writer(folder: Path, *, split: str, documents: int) -> ShardWriter:
    """A train split has two shards or more, so that every path through several shards is used."""
    shards = max(2 if split == "train" else 1, -(-documents // MOST_DOCUMENTS_PER_SHARD))
    return ShardWriter(folder, name=split, documents_per_shard=max(1, -(-documents // shards)))


def tokenize_and_index(corpus: Path) -> None:
    """OUT/tokenizer.model, and an index beside every shard; what is there and fits stays."""
    model = corpus / "tokenizer.model"
    shards = {kind: sorted((corpus / kind.value).glob("*.tar")) for kind in KINDS}
    if not model.exists():
        train = [
            (Layout(kind), [s for s in shards[kind] if s.name.startswith("train")])
            for kind in KINDS
        ]
        tokenizer.make(train, vocab_size=VOCAB_SIZE, characters=2_000_000, seed=0, out=model)
    for kind in KINDS:
        index.index_shards(shards[kind], layout=Layout(kind), tokenizer=model)
    print(f"{corpus}: every shard is indexed with {model.name}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line of `python -m data.prepare.demo`."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare.demo",
        description="Make the demo corpus: WebDataset shards of pictures with captions, of stories "
        "in pictures, and of text from the documentation of the installed packages, with a "
        "tokenizer and an index: ready to train on. Downloads nothing. A finished corpus is left "
        "alone; an interrupted one is made anew.",
        epilog="The shards lie in OUT/{caption,interleaved,text}/{train,held_out}-000000.tar. "
        "Look into one with: tar tf data/corpora/demo/caption/held_out-000000.tar",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data/corpora/demo"),
        help="folder to write (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=float,
        default=1.0,
        help="how much, as a multiple of the demo's 10,000 captions, 3,000 stories and 1 million "
        "characters of text (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="another seed makes another corpus (default: %(default)s)",
    )
    parser.add_argument(
        "--code",
        action="store_true",
        help="also OUT/code: functions of those packages, as units of modality code, their bytes",
    )
    options = parser.parse_args(arguments)
    try:
        render(options.out, size=options.size, seed=options.seed)
        tokenize_and_index(options.out)
        if options.code:
            render_code(options.out, size=options.size, seed=options.seed)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
