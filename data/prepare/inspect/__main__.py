"""Look at the rows that a configuration plans: one HTML page without scripts or network.

    python -m data.prepare.inspect data=demo
    python -m data.prepare.inspect data=demo data.row_tokens=2048 --rows 16 --out demo.html

The page shows the mixture asked and planned, the first rows with their documents, texts and
images as the model receives them, the attention mask of one row, lengths, supply, and what the
index left out. Overrides are those of train.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.corpus import Corpus
from data.prepare.inspect import page
from data.prepare.inspect.facts import look
from nmm import config
from nmm.config import Config
from nmm.errors import UserError


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> Config:
    """The checked config of these overrides; a length of training need not be given."""
    search = [f"hydra.searchpath=['file://{config_dir.resolve()}']"] if config_dir else []
    found = config.compose([*search, *overrides])
    if found.schedule.total_tokens is None and found.schedule.total_steps is None:
        found.schedule.total_steps = 1
    return config.load(found)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides, as for train.py"
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="look for groups here too")
    parser.add_argument("--rows", type=int, default=8, help="rows to draw (%(default)s)")
    parser.add_argument(
        "--planned-rows",
        type=int,
        default=1000,
        help="plan so many rows, and to the end of their window, for the shares and the fill; they "
        "are not read (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("inspect.html"), metavar="FILE", help="(%(default)s)"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    try:
        if options.rows < 1:
            raise UserError(f"--rows is {options.rows}; set 1 or more.")
        settings = compose(options.overrides, config_dir=options.config_dir)
        corpus = Corpus.open(
            settings.data,
            image=settings.model.image,
            vocab_size=settings.model.vocab_size,
            split="train",
        )
        facts = look(
            corpus,
            settings.data,
            rows=options.rows,
            planned_rows=options.planned_rows,
            image_attention=settings.model.image_attention,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page.render(facts), encoding="utf-8")
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --out is {options.out}, which cannot be written ({error.strerror}).")
    size = options.out.stat().st_size
    print(f"wrote {options.out} ({size / 1e3:,.0f} kB): {len(facts.rows)} rows are drawn")


if __name__ == "__main__":
    main()
