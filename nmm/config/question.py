"""What a study asks of its runs, and what its paper answers."""

import math
import re
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from nmm.errors import UserError


class Measure(Enum):
    """The number that answers a question about the family `of`, and one that it stands `against`.

    loss_gap              nats by which its held-out loss is below that of the other, in runs of
                          the same size, tokens, mixture and seed
    frontier_gap_low      the same at equal FLOPs by both laws, each at its best split: at the least
                          FLOPs that both families have
    frontier_gap_high     at the most FLOPs that both have
    size_exponent         a of N_opt ~ C^a
    tokens_exponent       b of D_opt ~ C^b
    prediction_error      percent by which the law misses the largest sizes without having seen them
    specialisation_first  by how much experts specialise more in the first layer than between first
                          and last (nmm/specialisation.py; runs with the most tokens)
    specialisation_last   in the last layer
    synergy               C of the interaction of the `pair`: nats gained in the limit
    interaction           nats by which the joint loss of the pair is below the mean of two models
                          alone: the mean over the joint runs of every size
    synergy_flops         FLOPs from which on the pair gains: the cheapest point of the barrier
    perplexity_ratio      perplexity of one of the pair under a model of the other, divided by that
                          of the other; the lower of both ways (runs with the most tokens)
    best_batch            tokens a step with the lowest loss, of runs of the pair that differ in
                          that alone
    eta                   how many times fewer FLOPs it needs for the other's last held-out loss
    """

    loss_gap = "loss_gap"
    frontier_gap_low = "frontier_gap_low"
    frontier_gap_high = "frontier_gap_high"
    size_exponent = "size_exponent"
    tokens_exponent = "tokens_exponent"
    prediction_error = "prediction_error"
    specialisation_first = "specialisation_first"
    specialisation_last = "specialisation_last"
    synergy = "synergy"
    interaction = "interaction"
    synergy_flops = "synergy_flops"
    perplexity_ratio = "perplexity_ratio"
    best_batch = "best_batch"
    eta = "eta"


OF_ETA = re.compile(r"loss(/modality/\w+)?")
AGAINST = (Measure.loss_gap, Measure.frontier_gap_low, Measure.frontier_gap_high, Measure.eta)
OF_PAIRS = (
    *(Measure.synergy, Measure.interaction, Measure.synergy_flops),
    *(Measure.perplexity_ratio, Measure.best_batch),
)


@dataclass
class QuestionConfig:
    """`measure` of the family `of`; of one mixture (null: the only one), or of a `pair`.

    The `paper` says it in words, and that the number lies in the range `claim` ([low, high], null
    for no end). The study reproduces this if the whole interval of its number is in the range, and
    does not if all of it is outside; else it cannot tell. Without a claim the number is reported.
    """

    measure: Measure = MISSING
    of: str = MISSING
    against: str | None = None
    mixture: str | None = None
    pair: str | None = None
    loss: str = "loss"
    claim: list[float | None] = field(default_factory=list)
    paper: str = ""

    @property
    def range(self) -> tuple[float, float] | None:
        """`claim` with infinities where it has no end."""
        if len(self.claim) != 2:
            return None
        low, high = self.claim
        return (-math.inf if low is None else low, math.inf if high is None else high)

    def check(
        self, name: str, *, families: list[str], mixtures: list[str], pairs: list[str]
    ) -> None:
        """Refuse what cannot be answered; raises UserError."""
        key = f"study.questions.{name}"
        for field_name, value, known in (
            ("of", self.of, families),
            ("against", self.against, families if self.measure in AGAINST else [None]),
            ("mixture", self.mixture, [None, *mixtures]),
            ("pair", self.pair, pairs if self.measure in OF_PAIRS else [None]),
        ):
            if value not in known:
                those = ", ".join("null" if one is None else one for one in known)
                raise UserError(
                    f"{key}.{field_name} is {value} and {key}.measure is {self.measure.value}; "
                    f"choose of: {those or 'nothing, because the study has none'}."
                )
        if self.measure is Measure.eta and not OF_ETA.fullmatch(self.loss):
            raise UserError(
                f"{key}.loss is {self.loss}, and eta knows losses of all tokens and of modalities; "
                f"set loss, or loss/modality/NAME."
            )
        low, high = self.range or (0, 1)
        if len(self.claim) not in (0, 2) or not low < high:
            raise UserError(f"{key}.claim is {self.claim}; give [low, high], null for no end.")
