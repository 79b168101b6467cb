"""Sparse feed-forward layers: which experts there are, and which tokens they take."""

import math
from dataclasses import asdict, dataclass, field, fields
from enum import Enum

from nmm.config.check import at_least, positive
from nmm.errors import UserError


class Routing(Enum):
    """Who takes a token.

    none             nobody: every block has one feed-forward layer for all tokens
    token_choice     the `top_k` of all experts that its router scores highest; no token is dropped
    modality_hard    the one expert of its modality; there is no router
    modality_groups  token choice among the experts of its modality
    expert_choice    any number of experts: each takes the tokens that score highest, of its
                     modality where there are groups; it looks at later tokens to choose
    """

    none = "none"
    token_choice = "token_choice"
    modality_hard = "modality_hard"
    modality_groups = "modality_groups"
    expert_choice = "expert_choice"


@dataclass
class ExpertGroups:
    """How many experts serve one modality only; the names are those of nmm.batch.Modality."""

    text: int = 0
    image: int = 0
    speech: int = 0
    code: int = 0
    molecule: int = 0

    def __post_init__(self) -> None:
        at_least(0, **{f"model__moe__groups__{name}": count for name, count in vars(self).items()})

    @property
    def sizes(self) -> dict[str, int]:
        """Those that have experts, in this order."""
        return {name: count for name, count in asdict(self).items() if count}


@dataclass
class MoEConfig:
    """The experts of every block, SwiGLU layers of the inner size `hidden` (null: the model's).

    `experts` serve all modalities alike; `groups` are experts by modality in their place, for
    example {text: 4, image: 4}. Of expert choice, the experts of a group take `capacity` times its
    tokens together, in equal parts; with `gumbel_noise` training adds Gumbel noise to its scores.
    With `auxiliary_routers` each layer has small networks that guess from a token alone which
    experts choose it. They are what is trained then, all else is frozen and without noise, and
    evaluation and generation follow the guesses.

    Numbers over several tokens (top tokens of an expert, balance) are taken over `group_rows` rows
    of the batch at a time, so that they do not depend on how a step is split. Token choice adds two
    losses to the one that is minimised: `balance_weight` times the balance of the experts, which is
    1 at best, and `router_z_weight` times the squared log-partition of the router's scores.
    """

    routing: Routing = Routing.none
    experts: int = 8
    groups: ExpertGroups = field(default_factory=ExpertGroups)
    top_k: int = 1
    capacity: float = 1.0
    hidden: int | None = None
    balance_weight: float = 0.01
    router_z_weight: float = 0.0
    gumbel_noise: bool = False
    auxiliary_routers: bool = False
    group_rows: int = 1

    def __post_init__(self) -> None:
        positive(model__moe__experts=self.experts, model__moe__top_k=self.top_k)
        positive(model__moe__capacity=self.capacity, model__moe__hidden=self.hidden)
        positive(model__moe__group_rows=self.group_rows)
        at_least(0, model__moe__balance_weight=self.balance_weight)
        at_least(0, model__moe__router_z_weight=self.router_z_weight)
        self._check_groups()
        self._check_what_nobody_reads()
        self._check_amounts()

    @property
    def sizes(self) -> dict[str, int]:
        """Experts by group, in the order of their numbers; `all` is the group of all modalities."""
        return self.groups.sizes or {"all": self.experts}

    @property
    def total_experts(self) -> int:
        """Experts of a block."""
        return sum(self.sizes.values())

    @property
    def divisors(self) -> list[int]:
        """Over how many processes experts can be divided: each has as many of every group."""
        return [
            n for n in range(1, self.total_experts + 1) if math.gcd(*self.sizes.values()) % n == 0
        ]

    @property
    def active_fraction(self) -> float:
        """Experts that a token passes through, as a fraction of a block's, on average."""
        active = self.capacity if self.chooses_tokens else self.top_k
        return active / self.total_experts

    @property
    def has_router(self) -> bool:
        """Is anything learned about who takes what?"""
        return self.routing not in (Routing.none, Routing.modality_hard)

    @property
    def chooses_tokens(self) -> bool:
        """Do experts choose, so that a token's output depends on later tokens?

        Not where auxiliary routers are asked in their place.
        """
        return self.routing is Routing.expert_choice

    def _check_groups(self) -> None:
        groups, routing = self.groups.sizes, self.routing
        if groups and routing is Routing.token_choice:
            raise UserError(
                f"model.moe.groups is {groups} and model.moe.routing is token_choice, whose "
                f"experts serve all modalities; set model.moe.routing=modality_groups."
            )
        if not groups and routing in (Routing.modality_hard, Routing.modality_groups):
            raise UserError(
                f"model.moe.routing is {routing.name} and model.moe.groups is empty; say how many "
                f"experts every modality has, for example model.moe.groups.text=1."
            )
        if routing is Routing.modality_hard and max(groups.values()) > 1:
            raise UserError(
                f"model.moe.groups is {groups} and model.moe.routing is modality_hard, which "
                f"has one expert for each; set them to 1, or model.moe.routing=modality_groups."
            )
        if groups and self.experts != MoEConfig.experts:
            raise UserError(
                f"model.moe.experts is {self.experts} and model.moe.groups is {groups}, which "
                f"counts the experts; leave one of them out."
            )

    def _check_what_nobody_reads(self) -> None:
        """Refuse values that belong to another way of routing."""
        tokens_choose = (Routing.token_choice, Routing.modality_groups)
        readers = {
            "experts": (Routing.token_choice, Routing.expert_choice),
            "top_k": tokens_choose,
            "balance_weight": tokens_choose,
            "router_z_weight": tokens_choose,
            "capacity": (Routing.expert_choice,),
            "gumbel_noise": (Routing.expert_choice,),
            "auxiliary_routers": (Routing.expert_choice,),
            **dict.fromkeys(("groups", "hidden", "group_rows"), tuple(Routing)[1:]),
        }
        default = {f.name: f.default for f in fields(self)} | {"groups": ExpertGroups()}
        for key, routings in readers.items():
            if self.routing not in routings and getattr(self, key) != default[key]:
                raise UserError(
                    f"model.moe.{key} is {getattr(self, key)} and model.moe.routing is "
                    f"{self.routing.name}, which does not use it; leave it out, or choose "
                    f"{' or '.join(routing.name for routing in routings)}."
                )

    def _check_amounts(self) -> None:
        """No expert takes a token twice."""
        fewest = min(self.sizes.values())
        for key, value in (("top_k", self.top_k), ("capacity", self.capacity)):
            if value > fewest:
                raise UserError(
                    f"model.moe.{key} is {value} and there are {fewest} experts to take a token "
                    f"(of the smallest group); lower model.moe.{key}, or add experts."
                )
