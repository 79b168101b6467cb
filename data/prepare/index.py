"""Count the tokens of every document once, so that training can plan its rows from the counts.

    python -m data.prepare.index --kind caption --shards 'DIR/train-*.tar' --tokenizer PATH

Writes DIR/train-000000.tar.index beside DIR/train-000000.tar, and so on, and prints what was found
and what was dropped, by reason. Shards whose index is fresh are skipped. Index again after changing
the tokenizer.

Shards may be URLs (s3://, gs://, https://), named by a brace range or, in object stores, by a glob:

    python -m data.prepare.index --kind caption --shards 's3://bucket/train-{000000..000999}.tar' \\
        --tokenizer PATH --index-dir corpora/indexes

Every shard is copied to TMPDIR while it is read. The index of s3://bucket/a/X.tar is
INDEX_DIR/bucket/a/X.tar.index; training finds it there with data.index_dir, or beside the shard.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from data.corpus import find_shards
from data.index import ShardIndex, load
from data.indexing import index_shard
from data.prepare.flags import add_layout, read_layout
from data.store import LOCAL, Store
from data.tokenizer import Tokenizer
from data.workers import context, forking
from nmm.config import Layout
from nmm.errors import UserError


def index_shards(
    shards: Sequence[Path | str],
    *,
    layout: Layout,
    tokenizer: Path | str,
    store: Store = LOCAL,
    workers: int = 1,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ShardIndex]:
    """Index every shard that has no fresh index; raises UserError at the end if some failed."""
    names = [str(shard) for shard in shards]
    work = partial(
        _index_one, layout=layout, tokenizer=Tokenizer(tokenizer), force=force, store=store
    )
    if workers <= 1:
        return _collect(map(work, names), total=len(names), progress=progress)
    with forking(), ProcessPoolExecutor(workers, mp_context=context()) as pool:
        return _collect(pool.map(work, names), total=len(names), progress=progress)


def table(indexes: list[ShardIndex]) -> str:
    """What the shards hold, and what was dropped by reason, with one example each."""
    examples: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    for index in indexes:
        for reason, key in index.dropped:
            dropped[reason] += 1
            examples.setdefault(reason, key)
    rows = [
        ("shards", len(indexes), ""),
        ("documents", sum(len(index) for index in indexes), ""),
        ("text tokens", sum(index.text_tokens for index in indexes), ""),
        ("unit tokens", sum(index.totals.unit_tokens for index in indexes), ""),
        ("images", sum(index.images for index in indexes), ""),
        ("skipped images", sum(index.totals.skipped_images for index in indexes), ""),
        ("dropped", dropped.total(), ""),
        *(
            (f"  {reason}", count, f"first: {examples[reason]}")
            for reason, count in dropped.most_common()
        ),
    ]
    return "\n".join(f"{name:<22}{count:>16,}  {note}".rstrip() for name, count, note in rows)


def _index_one(
    shard: str, *, layout: Layout, tokenizer: Tokenizer, force: bool, store: Store
) -> ShardIndex | UserError:
    try:
        size = store.size(shard)
        if not force:
            with suppress(UserError):  # missing or stale: that is what we are here for
                return load(
                    shard, layout=layout, tokenizer=tokenizer, store=store, shard_bytes=size
                )
        with store.local(shard) as file:
            index = index_shard(file, layout=layout, tokenizer=tokenizer)
        index.save(shard, store=store)
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"{shard} cannot be indexed: {error}; make the folder writable.")
    return index


def _collect(
    results: Iterable[ShardIndex | UserError], *, total: int, progress: Callable[[int, int], None]
) -> list[ShardIndex]:
    indexes: list[ShardIndex] = []
    errors: list[UserError] = []
    for done, result in enumerate(results, start=1):
        if isinstance(result, UserError):
            errors.append(result)
        else:
            indexes.append(result)
        progress(done, total)
    if errors:
        others = (
            f" ({len(errors)} of {total} shards cannot be indexed; this is the first.)"
            if total > 1
            else ""
        )
        raise UserError(f"{errors[0]}{others}")
    return indexes


def _show(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rindexed {done} of {total} shards", end=end, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare.index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_layout(parser)
    parser.add_argument(
        "--shards",
        required=True,
        help="glob or brace range of the .tar files; quote it: 'DIR/train-*.tar'",
    )
    parser.add_argument(
        "--tokenizer", required=True, help="the sentencepiece model that training will use"
    )
    parser.add_argument("--index-dir", help="where the indexes of shards that are URLs go")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--force", action="store_true", help="index again what has a fresh index")
    options = parser.parse_args(argv)
    try:
        layout = read_layout(options)
        store = Store(index_dir=options.index_dir)
        shards = find_shards(options.shards, key="--shards", store=store)
        indexes = index_shards(
            shards,
            layout=layout,
            tokenizer=options.tokenizer,
            store=store,
            workers=min(options.workers, len(shards)),
            force=options.force,
            progress=_show,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    print(table(indexes))


if __name__ == "__main__":
    main()
