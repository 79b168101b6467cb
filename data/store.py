"""Files by path or URL: names from patterns, sizes, exact byte ranges, copies on this machine.

A read returns the bytes that were asked for, or it is tried again and at last stops the run with a
UserError; it never returns fewer bytes or others. How URLs are spoken to is in data/remote.py.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from braceexpand import braceexpand

from data import atomic, remote
from data.cache import Cache
from data.remote import is_url
from data.retry import NotThereError, cause_of, retry
from nmm.config import DataConfig
from nmm.config.check import no_credentials
from nmm.errors import UserError

T = TypeVar("T")
DOWNLOAD_BYTES = 1 << 25
LISTED_FROM = 64
TOTALS = "index.totals"
CODEBOOK = "codebook.json"
THREADS = 32


@dataclass(frozen=True)
class Store:
    """How files are reached; a small value that travels to worker processes.

    `index_dir` holds the indexes of shards that are URLs. A read is tried `tries` times; a server
    that sends nothing for `timeout_seconds` has failed.
    """

    cache: Cache | None = None
    index_dir: str | None = None
    tries: int = 10
    timeout_seconds: float = 60.0

    @staticmethod
    def of(config: DataConfig) -> "Store":
        """The store that data.cache_dir and its neighbours describe."""
        cache = None
        if config.cache_dir is not None:
            cache = Cache(config.cache_dir, int(config.cache_gigabytes * 1e9))
        return Store(cache, config.index_dir, config.read_tries, config.read_timeout_seconds)

    def expand(self, pattern: str, *, key: str) -> list[str]:
        """Paths or URLs of a pattern, sorted; raises UserError, which names the `key`.

        `{000000..000099}` and `{a,b}` are expanded as in a shell; `*`, `?` and `[]` are matched.
        """
        no_credentials(pattern, key=key)
        try:
            names = list(braceexpand(pattern)) if "{" in pattern else [pattern]
        except ValueError:
            raise UserError(
                f"{key} is {pattern}, whose braces do not match; write a range as {{000..099}}."
            ) from None
        named = len(names) > 1  # then each must be there, and a missing one is an error later
        return sorted({f for name in names for f in self._matches(name, key=key, named=named)})

    def size(self, path: str) -> int:
        """Bytes of a file; raises UserError."""
        try:
            if not is_url(path):
                return os.stat(path).st_size
            return self._retry(path, partial(remote.size, path, timeout=self.timeout_seconds))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({cause_of(error)}); correct its name, or bring it back."
            ) from None

    def sizes(self, paths: list[str]) -> list[int]:
        """Bytes of every file. Object stores list a folder of many faster than they answer each."""
        folders: dict[str, int] = {}
        for path in paths:
            if is_url(path) and not remote.is_http(path):
                folder = path.rpartition("/")[0]
                folders[folder] = folders.get(folder, 0) + 1
        known: dict[str, int] = {}
        for folder, count in folders.items():
            if count >= LISTED_FROM:
                listing = partial(remote.list_sizes, folder, timeout=self.timeout_seconds)
                known |= self._retry(folder, listing)
        unknown = [path for path in paths if path not in known]
        known |= zip(unknown, _parallel(self.size, unknown), strict=True)
        return [known[path] for path in paths]

    def read(self, path: str, *, start: int, stop: int, fresh: bool = False) -> bytes:
        """Bytes [start, stop); raises UserError, and EOFError where a file on this machine ends.

        `fresh` forgets the copy in the cache and asks the URL itself.
        """
        if not is_url(path):
            return self._retry(path, partial(_read_local, path, start=start, stop=stop))
        if fresh and self.cache:
            self.cache.drop(path)
        if fresh or not self.cache:
            return self._fetch(path, start=start, stop=stop)
        with self.open_local(path) as file:
            return _exactly(file, start=start, stop=stop)

    def open_local(self, path: str) -> BinaryIO:
        """The copy of a URL in the cache, made now if it is not there; raises UserError."""
        assert self.cache is not None
        return self.cache.open(
            path, size=partial(self.size, path), fill=partial(self.download, path)
        )

    def download(self, path: str, file: BinaryIO, *, begin: int = 0) -> None:
        """Write the bytes of a URL from `begin` on; what fails is asked for again, not all."""
        size = self.size(path)
        for start in range(begin, size, DOWNLOAD_BYTES):
            file.write(self._fetch(path, start=start, stop=min(size, start + DOWNLOAD_BYTES)))

    @contextmanager
    def local(self, path: str) -> Iterator[Path]:
        """The file itself, or a temporary copy of a URL, for tools that read a shard once."""
        if not is_url(path):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="nmm-") as folder:
            copy = Path(folder, name_of(path))
            try:
                with copy.open("wb") as file:
                    self.download(path, file)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be copied to {folder} ({cause_of(error)}); set TMPDIR to a "
                    "folder with room for one shard per worker."
                ) from None
            try:
                yield copy
            except UserError as error:
                raise UserError(str(error).replace(str(copy), path)) from None

    def index_path(self, shard: str) -> Path:
        """Where the index of a shard is: X.tar.index beside X.tar, for a URL below `index_dir`.

        Of s3://bucket/a/X.tar it is INDEX_DIR/bucket/a/X.tar.index. Raises UserError for a URL that
        would lead out of there, as a bucket of others may list one.
        """
        if not is_url(shard):
            return Path(shard + ".index")
        if self.index_dir is None:
            raise UserError(
                f"{shard} is a URL and data.index_dir is null; set it, or --index-dir of "
                "`python -m data.prepare.index`, to a folder for the indexes of URLs."
            )
        parts = urlsplit(shard)
        below = Path(parts.netloc, parts.path.lstrip("/") + ".index")
        if ".." in below.parts:
            raise UserError(
                f"{shard} has .. in it, so that its index would lie outside of data.index_dir; "
                f"name the shard without it."
            )
        return Path(self.index_dir, below)

    def find_index(self, shard: str) -> Path:
        """`index_path`; the index of a URL is copied there when one is published beside the URL."""
        path = self.index_path(shard)
        if is_url(shard):
            self._fetch_file(_beside(shard, name_of(shard) + ".index"), path)
        return path

    def find_totals(self, shard: str) -> Path:
        """Where the totals of a shard's folder are, beside its indexes; copied as an index is."""
        return self._find_beside(shard, TOTALS)

    def find_codebook(self, shard: str) -> Path:
        """Where it says which VQ model a folder's image codes are of; copied as an index is."""
        return self._find_beside(shard, CODEBOOK)

    def _find_beside(self, shard: str, name: str) -> Path:
        path = self.index_path(shard).with_name(name)
        if is_url(shard):
            self._fetch_file(_beside(shard, name), path)
        return path

    def _fetch_file(self, url: str, path: Path) -> None:
        """Copy a file of `index_dir` that is not there yet, if there is one at the URL."""
        if path.exists():
            return
        try:
            with atomic.writing(path) as file:
                self.download(url, file)
        except NotThereError:
            pass  # nobody has published it; whoever wants it says what to do
        except OSError as error:
            raise UserError(
                f"data.index_dir is {self.index_dir}, which cannot be written "
                f"({cause_of(error)}); choose another folder."
            ) from None

    def tokens_path(self, shard: str) -> str:
        """Where the stored token ids of a shard are: X.tar.tokens beside X.tar.

        Those of a URL are below `index_dir` if they were made here, else beside the URL.
        """
        if not is_url(shard):
            return shard + ".tokens"
        path = self.index_path(shard).with_suffix(".tokens")
        return str(path) if path.exists() else _beside(shard, path.name)

    def find_indexes(self, shards: list[str]) -> list[Path]:
        """`find_index` of all shards."""
        return _parallel(self.find_index, shards)

    def _matches(self, name: str, *, key: str, named: bool) -> list[str]:
        if not is_url(name):
            return [name] if named and not has_magic(name) else glob(name)
        if remote.is_http(name):
            if "*" in name or "[" in urlsplit(name).path:
                raise UserError(
                    f"{key} is {name}, but web servers do not list files; "
                    "use a brace range, as in train-{000000..000099}.tar."
                )
            return [name]
        if not has_magic(name):
            return [name]
        return self._retry(name, partial(remote.glob, name, timeout=self.timeout_seconds))

    def _fetch(self, path: str, *, start: int, stop: int) -> bytes:
        action = partial(remote.read, path, start=start, stop=stop, timeout=self.timeout_seconds)
        return self._retry(path, action)

    def _retry(self, path: str, action: Callable[[], T]) -> T:
        return retry(action, path=path, tries=self.tries)


LOCAL = Store()


def _parallel(action: Callable[[str], T], paths: list[str]) -> list[T]:
    """What `action` gives for every path, in their order; servers are asked THREADS at a time."""
    if not any(map(is_url, paths)):
        return [action(path) for path in paths]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(action, paths))


def name_of(path: str) -> str:
    """The last part of a path or URL, without a query."""
    return (urlsplit(path).path if is_url(path) else path).rpartition("/")[2]


def _beside(url: str, name: str) -> str:
    """The URL of another file of the same folder."""
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}").geturl()


def _read_local(path: str, *, start: int, stop: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return _exactly(file, start=start, stop=stop)


def _exactly(file: BinaryIO, *, start: int, stop: int) -> bytes:
    found = os.pread(file.fileno(), stop - start, start)
    if len(found) != stop - start:
        raise EOFError(f"{len(found)} of {stop - start} bytes")
    return found
