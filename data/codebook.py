"""Which VQ model the image codes of a folder are of: a small file beside the shards says it.

Codes of another model have other meanings, and nothing else in a shard would tell.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from data import atomic
from data.corpus import Corpus
from data.store import CODEBOOK, Store
from nmm.config import DataConfig, UnitModality
from nmm.errors import UserError


def write(folder: Path, *, sha256: str, codes: int) -> None:
    """Say that all codes in the shards of the folder are of the model with that checksum."""
    with atomic.writing(folder / CODEBOOK) as file:
        file.write(json.dumps({"sha256": sha256, "codes": codes}).encode())


def check(corpora: Iterable[Corpus], config: DataConfig, *, sha256: str | None) -> None:
    """Refuse codes of another model than data.codebook, and of several; raises UserError.

    `sha256` is that of data.codebook, if it is given. Folders that do not say what their codes are
    of are not refused.
    """
    found = _named(corpora, store=Store.of(config))
    for folder, said in found.items():
        if sha256 is not None and said != sha256:
            raise UserError(
                f"data.codebook is {config.codebook} (sha256 {sha256[:12]}), but the codes in "
                f"{folder} are of another VQ model (sha256 {said[:12]}, says its {CODEBOOK}); give "
                f"that one, or make the codes again with `python -m data.prepare.image_codes "
                f"write`."
            )
    if len({*found.values()}) > 1:
        first, other = _two_that_differ(found)
        raise UserError(
            f"data.sources has image codes of two VQ models, in {first} and {other} (says their "
            f"{CODEBOOK}), whose numbers mean different things; make both with one codebook."
        )


def _named(corpora: Iterable[Corpus], *, store: Store) -> dict[str, str]:
    """The checksum that every folder with image codes says, if it says one."""
    first = {
        path.rpartition("/")[0]: path
        for corpus in corpora
        for source in corpus.sources
        if source.layout.modality is UnitModality.image
        for path in source.paths
    }
    found = {}
    for folder, shard in first.items():
        path = store.find_codebook(shard)
        try:
            found[folder] = str(json.loads(path.read_text())["sha256"])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(
                f"{path} cannot be read; restore it, or delete it: then nobody checks which VQ "
                f"model the codes beside it are of."
            ) from None
    return found


def _two_that_differ(found: dict[str, str]) -> tuple[str, str]:
    (first, said), *others = found.items()
    return first, next(folder for folder, other in others if other != said)
