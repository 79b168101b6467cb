"""The worked example of docs/data-format.md: what it writes is what its commands find."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.corpus import Corpus
from data.loader import held_out_batches
from data.prepare import index, validate
from nmm.config import DataConfig, Kind, SourceConfig
from tests import corpora

PAGE = (Path(__file__).parent.parent / "docs" / "data-format.md").read_text()
SECTION = PAGE[PAGE.index("## The formats of others") :].partition("\n## ")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the two examples of the page have been run, one after the other."""
    path = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        picture = corpora.jpeg(np.random.default_rng(0), width=64, height=48)
        Path("cat.jpg").write_bytes(picture)
        Path("tokenizer.model").write_bytes(corpora.tokenizer_path().read_bytes())
        by_hand, of_others = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
        subprocess.run([sys.executable, "-c", by_hand + of_others], check=True)
        yield path


def commands() -> list[list[str]]:
    found = re.findall(r"^python -m data\.prepare\.(\w+) (.*)$", SECTION, re.MULTILINE)
    return [[name, *shlex.split(rest)] for name, rest in found]


def test_every_command_finds_what_the_page_says(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    tables = []
    for name, *flags in commands():
        {"index": index, "validate": validate}[name].main([*flags, "--workers", "1"])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        tables.append({" ".join(words[:-1]): words[-1] for words in lines if words})
    counts = [
        [table[name] for name in ("documents", "images", "skipped images", "dropped")]
        for table in tables[:-1]
    ]
    texts = ["3", "0", "0", "0"]
    assert counts == [
        ["2", "2", "0", "0"],
        ["1", "2", "1", "0"],
        ["1", "1", "2", "0"],
        *[texts] * 3,
    ]
    assert tables[-1]["0"] == "defects"
    assert sorted(path.name for path in folder.glob("*.tokens")) == [
        "prose-000000.jsonl.gz.tokens",
        "prose-000000.jsonl.zst.tokens",
    ]
    (listed,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    sources = {
        name: SourceConfig(**{**source, "kind": Kind(source["kind"])})
        for name, source in yaml.safe_load(listed)["sources"].items()
    }
    config = corpora.config(sources=sources, tokenizer="tokenizer.model")
    for split, documents in (("train", [2, 1, 3]), ("held_out", [3])):
        corpus = corpora.open_corpus(config, split=split)
        assert [source.documents for source in corpus.sources] == documents
        assert texts_of(corpus, config)


def texts_of(corpus: Corpus, config: DataConfig) -> bool:
    """Is every word of the example in a row?"""
    words = {"captions": "on a sofa", "stories": "He ate before", "prose": "Page 2 of a book"}
    return all(
        any(
            words[name] in corpus.tokenizer.decode(batch.tokens.flatten().tolist())
            for batch in batches
        )
        for name, batches in held_out_batches(corpus, config, rows_per_source=2, micro_batch=2)
    )
