"""The root of the configuration, and the one line where YAML becomes typed objects."""

from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nmm.config.check import at_least, no_credentials, positive, texts_of
from nmm.config.data import DataConfig, UnitModality
from nmm.config.engine import EngineConfig
from nmm.config.log import CheckpointConfig, EvaluationConfig, LogConfig
from nmm.config.model import GivenWeights, ImageAttention, ImageKind, ModelConfig
from nmm.config.optim import OptimConfig
from nmm.config.parent import ParentConfig, ParentMode
from nmm.config.schedule import ScheduleConfig
from nmm.credentials import masked
from nmm.errors import UserError

# A piece of text and what every tokenizer has: unknown, padding, begin, end, an image's place.
FEWEST_TEXT_IDS = 6
CONF = Path(__file__).resolve().parents[2] / "conf"


class Resume(Enum):
    """How a start treats the checkpoints that the run already has.

    auto   continue when there is one
    must   refuse to start without one
    never  refuse when there is one
    """

    auto = "auto"
    must = "must"
    never = "never"


@dataclass
class RunConfig:
    """A run lives in `dir`/`name`; the same command again continues it.

    `seed` draws the initial weights. After `max_minutes` (null: never) the run stops with a
    checkpoint; a collective that waits for another process longer than `timeout_minutes` ends it.
    Until all have met, at the start, they wait for 10 minutes at least.
    """

    name: str = "run"
    dir: str = "runs"
    resume: Resume = Resume.auto
    seed: int = 0
    max_minutes: float | None = None
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        at_least(0, run__seed=self.seed)
        positive(run__max_minutes=self.max_minutes, run__timeout_minutes=self.timeout_minutes)
        if not self.name or self.name == ".." or Path(self.name).name != self.name:
            raise UserError(
                f"run.name is {self.name!r}; give one folder name, and its parent as run.dir."
            )


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    parent: ParentConfig = field(default_factory=ParentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: GivenWeights = field(default_factory=GivenWeights)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        """Cross-checks between groups."""
        if not self.data.sources:
            raise UserError("data.sources is empty; choose a corpus, for example data=demo.")
        if self.schedule.total_tokens is None and self.schedule.total_steps is None:
            raise UserError(
                "schedule.total_tokens and schedule.total_steps are null; give one of them, "
                "for example schedule.total_steps=500."
            )
        self._check_parent()
        check_vocabulary(self.model, self.data)
        self._check_context()
        self._check_images()
        self._check_effect()
        self._check_experts()
        self._check_expert_parallel()
        self._check_depth()

    def _check_parent(self) -> None:
        mode, given = self.parent.mode, self.weights.decoder or self.weights.vision
        self._check_auxiliary_routers()
        if self.parent.run is None:
            return
        if mode is not ParentMode.branch and given is not None:
            raise UserError(
                f"parent.mode is {mode.name} and weights.* names {given}, so that there are two "
                f"sources of weights; leave one of them out."
            )
        if mode is ParentMode.upcycle and self.model.sparse is None:
            raise UserError(
                "parent.mode is upcycle and model.moe.routing is none, so that there are no "
                "experts to make; choose a sparse model, for example model=tiny_moma."
            )

    def _check_auxiliary_routers(self) -> None:
        """They learn of a trained model, and nothing else learns beside them."""
        mode, run = self.parent.mode, self.parent.run
        has_them = self.model.auxiliary_routers
        if mode is ParentMode.auxiliary_routers and run is not None and not has_them:
            raise UserError(
                "parent.mode is auxiliary_routers and model.moe.auxiliary_routers is false, so "
                "that there is nothing to train; set model.moe.auxiliary_routers=true (for a "
                "mixture of depths model.mod.auxiliary_router=true) with the model of the parent."
            )
        key = "model.moe.auxiliary_routers"
        key = key if self.model.moe.auxiliary_routers else "model.mod.auxiliary_router"
        if has_them and (run is None or mode is ParentMode.upcycle):
            raise UserError(
                f"{key} is true, parent.run is {run} and parent.mode is "
                f"{mode.name}; auxiliary routers learn of a trained model: give its run as "
                f"parent.run and set parent.mode=auxiliary_routers."
            )

    def _check_context(self) -> None:
        context, limit = self.data.context_tokens, self.model.max_positions
        if limit is not None and context > limit:
            raise UserError(
                f"data.context_tokens is {context} and model.max_positions is {limit}, so the end "
                f"of a document has no position; raise model.max_positions."
            )
        if not self.model.image.reads_pixels:
            return
        needed = self.model.image.tokens + 2
        if context < needed:
            raise UserError(
                f"data.context_tokens is {context} but an image with its "
                f"document borders takes {needed} tokens; raise data.context_tokens "
                "or model.image.patch_pixels."
            )
        possible = context // self.model.image.tokens
        if self.data.max_row_images is not None and self.data.max_row_images < possible:
            raise UserError(
                f"data.max_row_images is {self.data.max_row_images} but {possible} images of "
                f"{self.model.image.tokens} tokens fit into the {self.data.context_tokens} tokens "
                f"of data.context_tokens, so one piece alone may hold more; set it to {possible} "
                "or more, or to null."
            )

    def _check_experts(self) -> None:
        """Every modality of the stream needs experts, and experts without tokens learn nothing."""
        groups = self.model.moe.groups.sizes
        if not groups:
            return
        pixels = any(source.has_pixels for source in self.data.sources.values())
        present = {"text", *(["image"] if pixels else []), *(u.value for u in self.data.units)}
        if missing := sorted(present - groups.keys()):
            raise UserError(
                f"model.moe.groups is {groups} but the corpus also holds {missing[0]}; set "
                f"model.moe.groups.{missing[0]} to 1 or more."
            )
        if unused := sorted(groups.keys() - present):
            raise UserError(
                f"model.moe.groups is {groups} but no source of data.sources holds {unused[0]}; "
                f"set model.moe.groups.{unused[0]}=0."
            )

    def _check_expert_parallel(self) -> None:
        """Every process gets the same number of experts of every group."""
        parts, moe = self.engine.expert_parallel, self.model.sparse
        if parts == 1:
            return
        if moe is None:
            raise UserError(
                f"engine.expert_parallel is {parts} and model.moe.routing is none, so that there "
                f"are no experts to divide; set engine.expert_parallel=1."
            )
        if self.model.auxiliary_routers:
            key = "moe.auxiliary_routers" if moe.auxiliary_routers else "mod.auxiliary_router"
            raise UserError(
                f"engine.expert_parallel is {parts} and model.{key} is true, so "
                f"that no expert is trained; set engine.expert_parallel=1."
            )
        if parts not in moe.divisors:
            choice = " or ".join(map(str, moe.divisors))
            why = ", because one expert cannot be divided" if moe.divisors == [1] else ""
            raise UserError(
                f"engine.expert_parallel is {parts} and the groups of experts of model.moe are "
                f"{moe.sizes}, of each of which every process must have the same number; set "
                f"engine.expert_parallel={choice}{why}."
            )

    def _check_depth(self) -> None:
        if self.model.mod.every is not None and self.engine.compile:
            raise UserError(
                f"model.mod.every is {self.model.mod.every} and engine.compile is true; a block "
                f"that takes some tokens is not compiled: set engine.compile=false."
            )

    def _check_images(self) -> None:
        kind = self.model.image.kind
        for name, source in self.data.sources.items():
            if source.has_pixels and not self.model.image.reads_pixels:
                raise UserError(
                    f"model.image.kind is {kind.name} and data.sources.{name}.kind is "
                    f"{source.kind.name}, whose images are pixels; set model.image.kind=patches, "
                    f"make codes of them with `python -m data.prepare.image_codes`, or train on "
                    f"text or units."
                )
        has_codes = UnitModality.image in self.data.units
        if has_codes and kind is not ImageKind.codes:
            raise UserError(
                f"model.image.kind is {kind.name} and data.units has image, so that images would "
                f"be {kind.name} and codes; set model.image.kind=codes, or leave data.units.image "
                f"out."
            )
        if kind is ImageKind.codes and not has_codes:
            raise UserError(
                "model.image.kind is codes and data.units does not say how many there are; set "
                "data.units.image to the size of the codebook, or another model.image.kind."
            )
        if self.data.codebook is not None and kind is not ImageKind.codes:
            raise UserError(
                f"data.codebook is {self.data.codebook} and model.image.kind is {kind.name}, so "
                f"that nothing is made of codes; set model.image.kind=codes, or leave it out."
            )
        if self.weights.vision is not None and self.model.encoder is None:
            raise UserError(
                f"weights.vision is {self.weights.vision} and model.image.kind is "
                f"{self.model.image.kind.name}; set model.image.kind=encoder, or "
                f"weights.vision=null."
            )

    def _check_effect(self) -> None:
        """Refuse what no image, and no encoder, would ever meet."""
        kind, rate = self.model.image.kind, self.optim.vision_rate_multiplier
        has_images = any(source.has_pixels for source in self.data.sources.values())
        if kind is ImageKind.encoder and not has_images:
            raise UserError(
                "model.image.kind is encoder and no source of data.sources has images for it; set "
                "model.image.kind=none, or add a source of kind caption or interleaved."
            )
        if self.model.image_attention is ImageAttention.prefix and not has_images:
            raise UserError(
                "model.image_attention is prefix and no source of data.sources has images that "
                "could see all of themselves; leave it out, or add a source of kind caption."
            )
        if kind is not ImageKind.encoder and rate != OptimConfig.vision_rate_multiplier:
            raise UserError(
                f"optim.vision_rate_multiplier is {rate} and model.image.kind is {kind.name}, "
                f"without an encoder; set model.image.kind=encoder, or leave the multiplier out."
            )


def check_vocabulary(model: ModelConfig, data: DataConfig) -> None:
    """Refuse too few ids for what is known without the tokenizer, whose ids a run adds."""
    behind_text = data.ids_behind_text
    needed = FEWEST_TEXT_IDS + sum(behind_text.values())
    if model.vocab_size < needed:
        named = "".join(f", {count} for {name}" for name, count in behind_text.items())
        raise UserError(
            f"model.vocab_size is {model.vocab_size}, but there are at least {needed} ids "
            f"({FEWEST_TEXT_IDS} for text{named}); set model.vocab_size to {needed} and the pieces "
            f"of the tokenizer or more."
        )


def run_directory(run: RunConfig) -> Path:
    """Where the run lives."""
    return Path(run.dir) / run.name


def compose(overrides: list[str]) -> DictConfig:
    """Compose conf/ with Hydra overrides, outside a Hydra program; raises UserError."""
    register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(sentence(error)) from error


def sentence(error: Exception) -> str:
    """What a library says and why, in one line, without its lists of internals, or passwords."""
    said = [str(e).partition("Config search path")[0] for e in (error, error.__cause__) if e]
    lines = (text.partition("full_key:")[0].partition("To append")[0] for text in said)
    return masked(" ".join(" ".join(lines).split()))


@cache
def register() -> None:
    """Make the schema known to Hydra under the name `schema`, before any YAML is read."""
    ConfigStore.instance().store(name="schema", node=Config)


def load(composed: DictConfig) -> Config:
    """Turn the composed YAML into typed, checked objects; raises UserError."""
    try:
        # Merged anew into the schema, because Hydra lets `+key=value` add what the schema lacks.
        plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
        no_credentials(plain)
        checked = OmegaConf.merge(OmegaConf.structured(Config), plain)
        missing = sorted(OmegaConf.missing_keys(checked))
        if missing:
            raise UserError(f"{missing[0]} has no value; set it on the command line or in conf/.")
        config = OmegaConf.to_object(checked)
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(sentence(error)) from None
    assert isinstance(config, Config)
    return config


def with_absolute_paths(config: Config) -> Config:
    """The same config for another working directory; URLs stay as they are."""
    absolute = deepcopy(config)
    absolute.data.tokenizer = _absolute(config.data.tokenizer)
    codebook = config.data.codebook
    absolute.data.codebook = None if codebook is None else _absolute(codebook)
    for source in absolute.data.sources.values():
        source.train = _absolute(source.train)
        source.held_out = None if source.held_out is None else _absolute(source.held_out)
    given = config.weights
    absolute.weights.decoder = _absolute(given.decoder) if given.decoder else None
    absolute.weights.vision = _absolute(given.vision) if given.vision else None
    absolute.parent.run = _absolute(config.parent.run) if config.parent.run else None
    return absolute


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values; enums become their names."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `read_yaml` turns it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_yaml(path: Path) -> Config:
    """The configuration of an existing run, from its config.yaml."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give the directory of a run that was started.")
    try:
        stored = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path} cannot be read ({sentence(error)}); restore it.") from None
    if not isinstance(stored, DictConfig) or not stored:
        raise UserError(f"{path} is no configuration; restore it.")
    plain = OmegaConf.to_container(stored)
    if references := [key for key, text in texts_of(plain) if "${" in text]:
        # The run of somebody else could take what our environment hides, and put it into a URL.
        raise UserError(
            f"{path} has a reference (${{...}}) in {references[0]}, where a run has its values; "
            f"write the value there."
        )
    try:
        return load(stored)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
