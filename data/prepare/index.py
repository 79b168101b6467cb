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

With --store-tokens the token ids of all texts go to DIR/train-000000.tar.tokens, and training does
not tokenise again. They are always stored for .jsonl.gz and .jsonl.zst.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from errno import EISDIR
from functools import partial
from pathlib import Path
from typing import BinaryIO

from data import atomic, folder, ids
from data.container import is_compressed
from data.corpus import find_shards
from data.folder import Rows
from data.index import ShardIndex, load
from data.indexing import index_shard
from data.prepare.flags import add_layout, read_layout
from data.prepare.summary import Failed, Indexed, Summary, quarantined
from data.store import LOCAL, TOTALS, Store, name_of
from data.tokenizer import Tokenizer
from data.workers import context, forking
from nmm.config import Kind, Layout
from nmm.errors import UserError

MOST_SHARDS_AT_ONCE = 32  # that a process takes; a million shards are fewer things to keep in order


def index_shards(
    shards: Sequence[Path | str],
    *,
    layout: Layout,
    tokenizer: Path | str,
    store: Store = LOCAL,
    workers: int = 1,
    force: bool = False,
    store_tokens: bool = False,
    quarantine: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Index every shard that has no fresh index; raises UserError at the end if some failed.

    What is left out is listed in the file `quarantine`, a line of JSON each.
    """
    names = [str(shard) for shard in shards]
    model = Tokenizer(tokenizer)
    work = partial(
        _index_one,
        layout=layout,
        tokenizer=model,
        store=store,
        force=force,
        store_tokens=store_tokens,
    )
    summary = Summary()
    with ExitStack() as stack:
        listed = stack.enter_context(_writing(quarantine)) if quarantine else None
        results = map(work, names)
        if workers > 1:
            stack.enter_context(forking())
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context()))
            chunk = max(1, min(MOST_SHARDS_AT_ONCE, len(names) // (8 * workers)))
            results = pool.map(work, names, chunksize=chunk)
        rows: dict[Path, Rows] = {}
        for done, result in enumerate(results, start=1):
            summary.add(result)
            if isinstance(result, Indexed):
                _add_row(rows, result, store=store)
            if listed is not None:
                listed.write(b"".join(quarantined(result)))
            progress(done, len(names))
    for path, rows_of_folder in rows.items():
        with suppress(OSError):  # without it a corpus opens as well, only slower
            folder.write(path, rows_of_folder, layout=layout, tokenizer=model)
    summary.refuse_failed()
    return summary


@contextmanager
def _writing(quarantine: Path) -> Iterator[BinaryIO]:
    try:
        if quarantine.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        with atomic.writing(quarantine) as file:
            yield file
    except OSError as error:
        raise UserError(
            f"--quarantine is {quarantine}, which cannot be written ({error.strerror}); choose "
            f"another file."
        ) from None


def _index_one(
    shard: str,
    *,
    layout: Layout,
    tokenizer: Tokenizer,
    store: Store,
    force: bool,
    store_tokens: bool,
) -> Indexed | Failed:
    store_tokens = (store_tokens and layout.kind is not Kind.units) or is_compressed(shard)
    try:
        found = None
        if not force:
            found = _fresh(
                shard, layout=layout, tokenizer=tokenizer, store=store, store_tokens=store_tokens
            )
        if found is None:
            with store.local(shard) as file, ExitStack() as stack:
                place = store.index_path(shard).with_suffix(".tokens")
                tokens = stack.enter_context(atomic.writing(place)) if store_tokens else None
                found = index_shard(file, layout=layout, tokenizer=tokenizer, tokens=tokens)
            found.save(shard, store=store)  # last: nothing believes token ids without it
    except UserError as error:
        return Failed(shard, error)
    except OSError as error:
        said = f"{shard} cannot be indexed: {error}; make it readable, and its folder writable."
        return Failed(shard, UserError(said))
    index_bytes = store.index_path(shard).stat().st_size
    return Indexed(shard, found.shard_bytes, index_bytes, found.totals, found.dropped)


def _fresh(
    shard: str, *, layout: Layout, tokenizer: Tokenizer, store: Store, store_tokens: bool
) -> ShardIndex | None:
    """The index of a shard if it is whole and belongs to it, with its stored ids if it has some."""
    size = store.size(shard)
    try:
        found = load(shard, layout=layout, tokenizer=tokenizer, store=store, shard_bytes=size)
        ids.find([shard], [found.totals.token_bytes], store=store, remedy=str)
    except UserError:  # missing or stale: that is what we are here for
        return None
    has_tokens = found.totals.token_bytes or not found.text_tokens
    return found if has_tokens or not store_tokens else None


def _add_row(rows: dict[Path, Rows], indexed: Indexed, *, store: Store) -> None:
    """To the totals of the shard's folder."""
    path = store.index_path(indexed.shard).with_name(TOTALS)
    rows.setdefault(path, Rows()).add(
        name_of(indexed.shard),
        indexed.totals,
        shard_bytes=indexed.shard_bytes,
        index_bytes=indexed.index_bytes,
    )


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
    parser.add_argument(
        "--store-tokens",
        action="store_true",
        help="write the token ids of all texts to SHARD.tokens, so that training need not tokenise",
    )
    parser.add_argument(
        "--quarantine",
        type=Path,
        metavar="FILE",
        help="write every sample that is left out to FILE: a line of JSON with shard, key, reason",
    )
    parser.add_argument("--force", action="store_true", help="index again what has a fresh index")
    options = parser.parse_args(argv)
    try:
        layout = read_layout(options)
        store = Store(index_dir=options.index_dir)
        shards = find_shards(options.shards, key="--shards", store=store)
        summary = index_shards(
            shards,
            layout=layout,
            tokenizer=options.tokenizer,
            store=store,
            workers=min(options.workers, len(shards)),
            force=options.force,
            store_tokens=options.store_tokens,
            quarantine=options.quarantine,
            progress=_show,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit(
            "error: a worker was killed while it read a shard, by the system for its memory or by "
            "a decoder; lower --workers and run the same command again, which skips what is done."
        )
    print(summary.table())


if __name__ == "__main__":
    main()
