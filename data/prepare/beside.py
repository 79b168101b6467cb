"""What lies beside a shard, its index and its stored token ids, read against their checksums."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import columns, index
from data.prepare.findings import Finding
from data.store import LOCAL, is_url
from data.totals import Totals

ID_BYTES = (2, 4)


def examine(shard: str) -> Iterator[Finding]:
    """What is wrong with the index of a shard on this machine and with its token ids, if any."""
    if is_url(shard) or not (path := LOCAL.index_path(shard)).exists():
        return
    try:
        head, arrays = columns.read(path, names=(*index.ARRAYS, "dropped"))
        totals = Totals.from_head(head)
        index.check_totals(totals, arrays)
        if totals.token_bytes and totals.token_bytes not in (
            n * totals.text_tokens for n in ID_BYTES
        ):
            raise ValueError("no whole ids")
    except (OSError, LookupError, TypeError, ValueError) as error:
        yield Finding(shard, "", "bad_index", str(error))
        return
    if totals.token_bytes:
        yield from _tokens(shard, totals=totals, arrays=arrays)


def _tokens(shard: str, *, totals: Totals, arrays: dict[str, np.ndarray]) -> Iterator[Finding]:
    """The documents whose part of the stored ids is not what the index says, and a wrong size."""
    path = Path(LOCAL.tokens_path(shard))
    id_bytes, keys = totals.token_bytes // totals.text_tokens, arrays["key_bytes"].tobytes()
    try:
        with path.open("rb") as file:
            for number, (ids, crc) in enumerate(
                zip(arrays["text_counts"].tolist(), arrays["token_crc"].tolist(), strict=True)
            ):
                if zlib.crc32(file.read(ids * id_bytes)) != crc:
                    start, stop = arrays["key_border"][number : number + 2].tolist()
                    yield Finding(shard, keys[start:stop].decode(), "bad_tokens")
        if (size := path.stat().st_size) != totals.token_bytes:
            yield Finding(shard, "", "bad_tokens", f"{size:,} bytes of {totals.token_bytes:,}")
    except OSError as error:
        yield Finding(shard, "", "bad_tokens", error.strerror or str(error))
