"""Flags that several tools share."""

import argparse
from collections.abc import Sequence

from data.corpus import find_shards
from data.store import LOCAL
from nmm.config import Kind, Layout, UnitModality
from nmm.errors import UserError


def add_layout(parser: argparse.ArgumentParser) -> None:
    """--kind, --text-field and --modality, which `read_layout` reads."""
    parser.add_argument(
        "--kind",
        required=True,
        choices=[kind.value for kind in Kind],
        help="layout of the samples: caption = one image and its text, interleaved = images and "
        "texts in reading order, text = text only, units = units only (docs/data-format.md)",
    )
    parser.add_argument(
        "--text-field",
        metavar="FIELD",
        help="the text is this field of the .json, a string or a list of captions, not the .txt",
    )
    parser.add_argument(
        "--modality",
        choices=[modality.value for modality in UnitModality],
        help="there are units of this modality (KEY.units.npy) where others have images",
    )


def read_layout(options: argparse.Namespace) -> Layout:
    """The layout that the flags ask for; raises UserError."""
    modality = UnitModality(options.modality) if options.modality else None
    layout = Layout(Kind(options.kind), options.text_field, modality)
    layout.check("--text-field", modality_key="--modality")
    return layout


def read_sources(
    arguments: Sequence[str], *, kinds: Sequence[Kind]
) -> list[tuple[Layout, list[str]]]:
    """Layout and shards of every --source KIND=GLOB, KIND:FIELD=GLOB or KIND:FIELD:MODALITY=GLOB.

    Raises UserError.
    """
    known = [kind.name for kind in kinds]
    found: list[tuple[Layout, list[str]]] = []
    for argument in arguments:
        name, _, pattern = argument.partition("=")
        kind, field, modality, *more = (*name.split(":"), "", "")
        wrong = modality and modality not in UnitModality.__members__
        if kind not in known or wrong or any(more) or not pattern:
            raise UserError(
                f"--source is {argument}; write KIND='GLOB', KIND:FIELD='GLOB' or "
                f"KIND:FIELD:MODALITY='GLOB' with a KIND of {', '.join(known)}."
            )
        named = field if field or name.endswith(f"{kind}:") else None
        layout = Layout(Kind[kind], named, UnitModality[modality] if modality else None)
        layout.check(f"FIELD of --source {name}", modality_key=f"--source {name}")
        found.append((layout, find_shards(pattern, key=f"--source {name}", store=LOCAL)))
    return found
