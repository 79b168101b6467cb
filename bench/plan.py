"""How fast rows are planned, how soon a run resumes, and that memory does not follow the corpus.

    python -m bench.plan [--shards 200] [--documents 5000] [--mix caption=0.45,...] [--plan 1000000]

Writes an index set of made-up lengths (the shards themselves are empty files of the right size)
into a temporary directory, opens it, plans rows from its start, and resumes in a far epoch.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import sentencepiece

from data.corpus import Corpus
from data.plan import StreamState, plan_places
from data.tokenizer import Tokenizer
from nmm.config import DataConfig, ImageConfig, Kind, SourceConfig
from tests.lengths import write_indexes


def train_tokenizer(path: Path) -> Path:
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a small model of few words"] * 20),
            model_writer=model,
            vocab_size=280,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", type=int, default=200, help="of every source")
    parser.add_argument("--documents", type=int, default=5000, help="of every shard")
    parser.add_argument("--mix", default="caption=0.45,interleaved=0.45,text=0.1")
    parser.add_argument("--plan", type=int, default=1_000_000, help="documents to plan")
    parser.add_argument("--side-pixels", type=int, default=224, help="images of patches of 14")
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--max-row-images", type=int, help="a budget of images (none)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure(options, directory=Path(directory))


def measure(options: argparse.Namespace, *, directory: Path) -> None:
    weights = {
        Kind(name): float(weight)
        for name, weight in (part.split("=") for part in options.mix.split(","))
    }
    model = train_tokenizer(directory / "tokenizer.model")
    for kind in weights:
        write_indexes(
            directory / kind.value,
            kind=kind,
            shards=options.shards,
            documents=options.documents,
            tokenizer=Tokenizer(model),
        )
    sources = {
        kind.value: SourceConfig(kind, f"{directory}/{kind.value}/*.tar", "", weight)
        for kind, weight in weights.items()
    }
    config = DataConfig(
        sources=sources,
        tokenizer=str(model),
        context_tokens=options.context_tokens,
        row_tokens=options.row_tokens,
        max_row_images=options.max_row_images,
        repeat=True,
    )
    image = ImageConfig(side_pixels=options.side_pixels, patch_pixels=14)
    started, memory = time.perf_counter(), resident_mib()
    corpus = Corpus.open(config, image=image, vocab_size=1000, split="train")
    print(
        f"opened {sum(len(source.shards) for source in corpus.sources):,} shards of "
        f"{sum(source.documents for source in corpus.sources):,} documents in "
        f"{time.perf_counter() - started:.3f} s, {resident_mib() - memory:.1f} MiB"
    )
    state = plan(corpus, config, documents=options.plan)
    far = StreamState(
        10**6,
        3,
        10**9,
        0,
        *(
            [10**7 * count for count in places]
            for places in (
                [source.documents for source in corpus.sources],
                [source.tokens for source in corpus.sources],
                [0] * len(corpus.sources),
            )
        ),
    )
    for name, place in (("where planning ended", state), ("10 million epochs later", far)):
        started = time.perf_counter()
        window, row = next(plan_places(corpus, config, place))
        window.row(row)
        print(f"resumed {name} in {time.perf_counter() - started:.3f} s")


def plan(corpus: Corpus, config: DataConfig, *, documents: int) -> StreamState:
    """Plan rows of about so many documents, and say how it went at every fifth of the way."""
    started = time.perf_counter()
    rows, steps, state = 0, iter(range(1, 6)), StreamState.start(len(corpus.sources))
    due = next(steps)
    for window, row in plan_places(corpus, config):
        rows += 1
        if row + 1 < len(window):
            continue
        state = window.state_after(row)
        planned = sum(state.documents)
        if planned < due * documents / 5:
            continue
        seconds = time.perf_counter() - started
        fill = sum(state.tokens) / (rows * config.row_tokens)
        print(
            f"planned {planned:,} documents in {seconds:.2f} s, {planned / seconds:,.0f}/s, "
            f"fill {fill:.4f}, resident {resident_mib():.0f} MiB"
        )
        due = next(steps, 0)
        if not due:
            break
    return state


def resident_mib() -> float:
    """Memory of this process now; files mapped into it count."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
