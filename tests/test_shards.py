"""Our shards are plain WebDataset: what others read in them is what we read, byte by byte."""

from pathlib import Path

import pytest
from webdataset import WebDataset

from data import container
from nmm.config import Kind
from tests import corpora


# webdataset leaves the last file for the collector to close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", corpora.KINDS)
def test_webdataset_reads_our_shards_unchanged(kind: Kind) -> None:
    shards = sorted(corpora.corpus_directory().glob(f"{kind.value}/train-*.tar"))
    assert len(shards) == 5
    theirs = [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in WebDataset([str(shard) for shard in shards], shardshuffle=False)
    ]
    ours = [
        (sample.key, container.members_of(shard.name, raw))
        for shard in shards
        for sample, raw in container.read(Path(shard))[1]
    ]
    assert theirs == ours
    assert len(ours) == 120
