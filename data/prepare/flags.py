"""Flags that several tools share."""

import argparse

from nmm.config import Kind, Layout, UnitModality


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
