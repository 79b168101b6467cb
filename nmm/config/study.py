"""A study: which runs it is made of, and what it may use; `python -m launch.study` runs it."""

import re
from dataclasses import dataclass, field
from enum import Enum

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nmm.config.check import at_least, fraction, no_credentials, positive
from nmm.config.question import QuestionConfig
from nmm.config.root import CONF, sentence
from nmm.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")


class Design(Enum):
    """How a run of every budget comes about.

    trunk  a trunk at a constant rate for every size and length of warmup, and for every budget a
           branch of it that cools down
    whole  every run from its beginning: for schedules without a constant phase
    """

    trunk = "trunk"
    whole = "whole"


class Submit(Enum):
    """Who starts the runs: this machine, or Slurm."""

    local = "local"
    slurm = "slurm"


@dataclass
class SizeConfig:
    """One model of a family; `overrides` are those of train.py that make it.

    `token_budgets` and `image_fraction` stand in place of the family's and the mixture's. Locally a
    run takes `slots` of study.parallel, under Slurm `nodes` machines (null: those of study.slurm).
    """

    overrides: list[str] = field(default_factory=list)
    token_budgets: list[int] | None = None
    image_fraction: float | None = None
    slots: int = 1
    nodes: int | None = None

    def __post_init__(self) -> None:
        positive(study__families__sizes__slots=self.slots, study__families__sizes__nodes=self.nodes)
        fraction(study__families__sizes__image_fraction=self.image_fraction)


@dataclass
class UpcycleConfig:
    """Experts are made of another `family`: of its longest run of the same size, mixture and seed,
    after so many `tokens`, which count as tokens of the new run.
    """

    family: str = MISSING
    tokens: int = MISSING

    def __post_init__(self) -> None:
        positive(study__families__upcycle__tokens=self.tokens)


@dataclass
class FamilyConfig:
    """Models of one architecture; `token_budgets` stand in place of the study's.

    They are trained on those of the study's `mixtures` that are named (null: on all), and begin as
    `upcycle` says (null: from nothing).
    """

    sizes: dict[str, SizeConfig] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    token_budgets: list[int] | None = None
    mixtures: list[str] | None = None
    upcycle: UpcycleConfig | None = None


@dataclass
class MixtureConfig:
    """What is trained on; of the tokens, `image_fraction` are expected to be images.

    With `weights` only those of data.sources are kept that it names, with these weights.
    """

    overrides: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    image_fraction: float = 0.0

    def __post_init__(self) -> None:
        fraction(study__mixtures__image_fraction=self.image_fraction)


@dataclass
class SlurmConfig:
    """What a job asks for; `sbatch` holds more options of sbatch, like --account=lab.

    `report_time` is the limit of the last job, which fits the laws.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    report_time: str = "1:00:00"
    partition: str | None = None
    most_at_once: int | None = None
    sbatch: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        positive(study__slurm__nodes=self.nodes, study__slurm__most_at_once=self.most_at_once)
        at_least(0, study__slurm__gpus_per_node=self.gpus_per_node)


@dataclass
class DeviceConfig:
    """What hours are planned with where nothing was measured: `gpus` of a kind at `mfu`.

    `flops_per_second` of one run stands in place of the three.
    """

    gpu: str = "H100"
    gpus: int = 8
    mfu: float = 0.4
    flops_per_second: float | None = None

    def __post_init__(self) -> None:
        positive(study__device__gpus=self.gpus, study__device__mfu=self.mfu)
        positive(study__device__flops_per_second=self.flops_per_second)


@dataclass
class StudyConfig:
    """Runs of every family, size, mixture, seed and number of tokens.

    A run is `dir`/`name`-..., and the study keeps its own notes in `dir`/`name`. `about` is printed
    with the plan: what is the paper's, and what is ours. `overrides` hold for all runs; those of
    families, mixtures and sizes come after them, in this order.

    Locally `parallel` runs share the machine, each with `processes` processes. A run that fails is
    started again `retries` times; after `max_minutes` (null: never) all stop with a checkpoint.

    In the end the laws are fitted with `bootstrap` resamples, and `questions` answered. `pairs`
    name mixtures of two modalities, each with the two mixtures that are one of them alone; mixtures
    are named like their sources there. Pauses of modalities are looked for in windows of
    `window_rows` logged rows.
    """

    name: str = MISSING
    about: list[str] = field(default_factory=list)
    dir: str = "runs"
    design: Design = Design.trunk
    families: dict[str, FamilyConfig] = field(default_factory=dict)
    mixtures: dict[str, MixtureConfig] = field(default_factory=dict)
    token_budgets: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: list[str] = field(default_factory=list)
    parallel: int = 1
    processes: int = 1
    retries: int = 1
    max_minutes: float | None = None
    bootstrap: int = 1000
    questions: dict[str, QuestionConfig] = field(default_factory=dict)
    pairs: dict[str, list[str]] = field(default_factory=dict)
    window_rows: int = 50
    device: DeviceConfig = field(default_factory=DeviceConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        positive(study__parallel=self.parallel, study__processes=self.processes)
        positive(study__max_minutes=self.max_minutes)
        at_least(3, study__window_rows=self.window_rows)
        at_least(0, study__retries=self.retries, study__bootstrap=self.bootstrap)

    def check(self) -> None:
        """Refuse a study without runs; raises UserError."""
        self._check_names()
        if not self.families or not all(family.sizes for family in self.families.values()):
            raise UserError(
                "study.families has no sizes; name one, for example "
                "study.families.early.sizes.275m.overrides=[model=early_275m]."
            )
        for name, family in self.families.items():
            self._check_mixtures(family, name=name)
            self._check_upcycled(family, name=name)
            for size_name, size in family.sizes.items():
                self._check_budgets(self.budgets(family, size), of=f"{name}, size {size_name}")
        for name, alone in self.pairs.items():
            if len(alone) != 2 or {name, *alone} - self.mixtures.keys():
                raise UserError(
                    f"study.pairs.{name} is {alone} and study.mixtures are "
                    f"{', '.join(self.mixtures)}; name two of them that {name} is made of."
                )
        for name, question in self.questions.items():
            mixtures = {"mixtures": list(self.mixtures), "pairs": list(self.pairs)}
            question.check(name, families=list(self.families), **mixtures)

    def budgets(self, family: FamilyConfig, size: SizeConfig) -> list[int]:
        """Tokens of the runs of a size."""
        return size.token_budgets or family.token_budgets or self.token_budgets

    def _check_mixtures(self, family: FamilyConfig, *, name: str) -> None:
        if unknown := sorted(set(family.mixtures or ()) - self.mixtures.keys()):
            raise UserError(
                f"study.families.{name}.mixtures has {unknown[0]}, and study.mixtures are "
                f"{', '.join(self.mixtures)}; name one of them."
            )

    def _check_upcycled(self, family: FamilyConfig, *, name: str) -> None:
        if family.upcycle is None:
            return
        seed = self.families.get(family.upcycle.family)
        if self.design is not Design.whole or seed is None or seed.upcycle is not None:
            raise UserError(
                f"study.families.{name}.upcycle.family is {family.upcycle.family} and study.design "
                f"is {self.design.value}; name a family that begins from nothing, and set "
                f"study.design=whole."
            )
        of_seed = seed.mixtures or list(self.mixtures)
        if lacking := sorted(set(family.mixtures or self.mixtures) - set(of_seed)):
            raise UserError(
                f"study.families.{name} is trained on {lacking[0]}, and the family "
                f"{family.upcycle.family} that it is made of is not; give both the same mixtures."
            )
        if missing := sorted(family.sizes.keys() - seed.sizes.keys()):
            raise UserError(
                f"study.families.{name} has the size {missing[0]}, which the family "
                f"{family.upcycle.family} that it is made of does not have; add it there."
            )

    def _check_names(self) -> None:
        """They become names of folders."""
        sizes = [name for family in self.families.values() for name in family.sizes]
        for name in (self.name, *self.families, *self.mixtures, *sizes):
            if not NAME.fullmatch(name):
                raise UserError(
                    f"the study has the name {name!r}, which is to be part of a folder's; use "
                    f"letters, digits, underscores and, but for its begin, dots."
                )

    def _check_budgets(self, budgets: list[int], *, of: str) -> None:
        if not budgets or min(budgets) <= 0 or len(set(budgets)) < len(budgets):
            raise UserError(
                f"study.token_budgets is {budgets} for family {of}; give numbers of tokens, each "
                f"once."
            )


@dataclass
class StudyCommand:
    """`dry_run` prints what would be done and does nothing."""

    study: StudyConfig = field(default_factory=StudyConfig)
    dry_run: bool = False
    submit: Submit = Submit.local

    def __post_init__(self) -> None:
        self.study.check()


def compose_study(overrides: list[str]) -> StudyCommand:
    """The command that the overrides ask for; raises UserError."""
    ConfigStore.instance().store(name="study_schema", node=StudyCommand)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("study", overrides)
            no_credentials(OmegaConf.to_container(composed))
            command = OmegaConf.to_object(composed)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        raise UserError(sentence(error)) from None
    assert isinstance(command, StudyCommand)
    return command
