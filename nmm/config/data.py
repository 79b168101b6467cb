"""Where the tokens come from, in which shares, and how they are packed into rows."""

import math
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from nmm.config.check import at_least, fraction, positive
from nmm.errors import UserError

MAX_SOURCES = 255  # PackedBatch.source is a byte


class Kind(Enum):
    """The layout of a shard's samples (docs/data-format.md)."""

    caption = "caption"
    interleaved = "interleaved"
    text = "text"
    units = "units"


class UnitModality(Enum):
    """What units are; the names are those of nmm.batch.Modality."""

    image = "image"
    speech = "speech"
    code = "code"
    molecule = "molecule"


@dataclass(frozen=True)
class Layout:
    """All that must be known of a source to make documents of its samples.

    `text_field` names the field of KEY.json that holds the text; None: KEY.txt is the text. With a
    `modality`, units of it (KEY.units.npy) stand where images would.
    """

    kind: Kind
    text_field: str | None = None
    modality: UnitModality | None = None

    def check(self, key: str, *, modality_key: str) -> None:
        """Refuse what would never be read; the keys are where the user names field and modality."""
        self._check_modality(modality_key)
        if self.text_field == "":
            raise UserError(f"{key} is empty; name a field of the .json, or leave it out.")
        if self.text_field is not None and self.kind is Kind.interleaved:
            raise UserError(
                f"{key} is {self.text_field}, but the kind is interleaved, whose .json says by "
                f"itself where its texts are; leave it out."
            )
        if self.text_field is not None and self.kind is Kind.units:
            raise UserError(f"{key} is {self.text_field}, but the kind is units; leave it out.")

    def _check_modality(self, key: str) -> None:
        if self.modality is None and self.kind is Kind.units:
            known = ", ".join(modality.value for modality in UnitModality)
            raise UserError(f"{key} is null, but the kind is units; say what they are: {known}.")
        if self.modality is not None and self.kind is Kind.text:
            raise UserError(f"{key} is {self.modality.value}, but the kind is text; leave it out.")


@dataclass
class SourceConfig:
    """One corpus: `train` and `held_out` are globs of .tar shards, `weight` its share of tokens.

    A source whose `held_out` is null is trained on and not evaluated. Its documents are read at
    most `max_epochs` times; null: once, or with data.repeat without end. With a `text_field` the
    text of a document is that field of its .json, else its .txt. Of a caption source, every epoch
    lays out this `text_first_fraction` of the documents as text and image, the others as image and
    text; held-out documents are always image first. With a `modality` its documents hold units of
    that where others hold images.
    """

    kind: Kind = MISSING
    train: str = MISSING
    held_out: str | None = MISSING
    weight: float = MISSING
    max_epochs: float | None = None
    text_field: str | None = None
    modality: UnitModality | None = None
    text_first_fraction: float = 0.0

    @property
    def layout(self) -> Layout:
        return Layout(self.kind, self.text_field, self.modality)

    @property
    def has_pixels(self) -> bool:
        """May its documents hold images that are decoded?"""
        return self.kind in (Kind.caption, Kind.interleaved) and self.modality is None


@dataclass
class WeightChange:
    """After `step` steps the sources in `weights` get these weights; the others keep theirs."""

    step: int = MISSING
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive(data__weight_changes__step=self.step)
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise UserError(
                    f"data.weight_changes gives {name} the weight {weight} after step "
                    f"{self.step}; set it above 0."
                )


@dataclass
class AugmentConfig:
    """How the images of training vary from epoch to epoch; those of the held-out split never do.

    Each shows a random part of at least `crop_area_fraction` of its area, at an aspect ratio of
    3/4 to 4/3; null: the centre square. With `flip` one half of them is mirrored. The paper on
    native multimodal models has 0.4 and true.
    """

    crop_area_fraction: float | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        fraction(data__augment__crop_area_fraction=self.crop_area_fraction)
        positive(data__augment__crop_area_fraction=self.crop_area_fraction)


@dataclass
class MaskingConfig:
    """The causal masked objective (CM3): spans of a document move to its end, to be filled in.

    Their number is Poisson-distributed around `mean_spans`; 0: no masking. Ids are kept for so many
    `sentinels`, which is the most spans of a document. metaseq has 1 and 512.
    """

    mean_spans: float = 0.0
    sentinels: int = 512

    def __post_init__(self) -> None:
        at_least(0, data__masking__mean_spans=self.mean_spans)
        positive(data__masking__sentinels=self.sentinels)

    @property
    def ids(self) -> int:
        """Sentinels that the id table has."""
        return self.sentinels if self.mean_spans else 0


# With the corpus, its weights and the tokenizer, these determine every row.
DATA_KEYS = (
    "context_tokens",
    "row_tokens",
    "global_rows",
    "window_documents",
    "seed",
    "repeat",
    "weight_changes",
    "max_row_images",
    "augment",
)


@dataclass
class DataConfig:
    """Rows of `row_tokens` tokens hold documents of at most `context_tokens`.

    A step consumes `global_rows` rows, whatever the number of processes; `window_documents`
    documents are packed at a time, in an order drawn from `seed`; no row holds more than
    `max_row_images` images (null: as many as its tokens). `tokenizer` is the path of a
    sentencepiece model. `repeat` allows more than one epoch. `workers` processes read and decode
    for each training process. A run stops when more than `max_bad_fraction` of the documents of a
    window turn out to be unreadable. `weight_changes` are in the order of their
    steps. `units` says how many ids every modality of units has; in this order they follow the ids
    of text. `codebook` is the folder of the VQ model that made the image codes: what is trained
    then draws images with it. With `masking` training also learns to fill in.

    Shards may be URLs. Their indexes are below `index_dir`. With a `cache_dir` they are copied
    there whole, at most `cache_gigabytes` (10^9 bytes) at a time, else read by document. A read is
    tried `read_tries` times; a server that is silent for `read_timeout_seconds` has failed.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str = MISSING
    context_tokens: int = 1024
    row_tokens: int = 4096
    global_rows: int = 512
    window_documents: int = 4096
    seed: int = 0
    repeat: bool = False
    workers: int = 2
    max_bad_fraction: float = 0.01
    max_row_images: int | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    weight_changes: list[WeightChange] = field(default_factory=list)
    units: dict[UnitModality, int] = field(default_factory=dict)
    codebook: str | None = None
    index_dir: str | None = None
    cache_dir: str | None = None
    cache_gigabytes: float = 100.0
    read_tries: int = 10
    read_timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        positive(data__context_tokens=self.context_tokens, data__row_tokens=self.row_tokens)
        positive(data__global_rows=self.global_rows, data__window_documents=self.window_documents)
        at_least(0, data__workers=self.workers, data__seed=self.seed)
        fraction(data__max_bad_fraction=self.max_bad_fraction)
        positive(data__max_row_images=self.max_row_images)
        positive(data__cache_gigabytes=self.cache_gigabytes, data__read_tries=self.read_tries)
        positive(data__read_timeout_seconds=self.read_timeout_seconds)
        positive(**{f"data__units__{name.value}": count for name, count in self.units.items()})
        for name, source in self.sources.items():
            positive(**{f"data__sources__{name}__weight": source.weight})
            positive(**{f"data__sources__{name}__max_epochs": source.max_epochs})
            place = f"data.sources.{name}"
            source.layout.check(f"{place}.text_field", modality_key=f"{place}.modality")
            if source.modality is not None and source.modality not in self.units:
                raise UserError(
                    f"{place}.modality is {source.modality.value}, but data.units does not say how "
                    f"many ids it has; add it, for example "
                    f"data.units.{source.modality.value}=1000."
                )
            fraction(**{f"data__sources__{name}__text_first_fraction": source.text_first_fraction})
            if source.text_first_fraction and source.kind is not Kind.caption:
                raise UserError(
                    f"data.sources.{name}.text_first_fraction is {source.text_first_fraction}, but "
                    f"the source is of kind {source.kind.value}; leave it out: only the parts of a "
                    f"caption may change places."
                )
        if self.sources and all(source.held_out is None for source in self.sources.values()):
            raise UserError(
                "data.sources has held_out: null in every entry, so nothing can be evaluated; give "
                "one of them held-out shards."
            )
        if len(self.sources) > MAX_SOURCES:
            raise UserError(
                f"data.sources has {len(self.sources)} entries; join some, to have {MAX_SOURCES} "
                f"at most."
            )
        if self.seed >= 2**63:
            raise UserError(f"data.seed is {self.seed}; set it below 2**63.")
        if self.row_tokens % self.context_tokens:
            raise UserError(
                f"data.row_tokens is {self.row_tokens} and data.context_tokens is "
                f"{self.context_tokens}; make the row a multiple of the context."
            )
        self._check_weight_changes()

    @property
    def ids_behind_text(self) -> dict[str, int]:
        """How many units and masks have, with begins and ends, in their order (data-format.md)."""
        masks = {"masks": 1 + self.masking.ids} if self.masking.ids else {}
        return {**{unit.value: 2 + count for unit, count in self.units.items()}, **masks}

    def _check_weight_changes(self) -> None:
        step = 0
        for change in self.weight_changes:
            if change.step <= step:
                raise UserError(
                    f"data.weight_changes has step {change.step} behind step {step}; "
                    "let every step be larger than the one before."
                )
            unknown = sorted(change.weights.keys() - self.sources.keys())
            if unknown or not change.weights:
                raise UserError(
                    f"data.weight_changes gives weights to {', '.join(unknown) or 'no source'} "
                    f"after step {change.step}; name some of {', '.join(self.sources)}."
                )
            step = change.step
