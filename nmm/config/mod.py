"""Mixture of depths: which blocks take a part of the tokens only."""

from dataclasses import dataclass

from nmm.config.check import fraction, positive
from nmm.errors import UserError


@dataclass
class MoDConfig:
    """Experimental. Blocks that take some tokens, while the others pass them by unchanged.

    These are every `every`-th block of the decoder from the first one on (null: none). Of the
    tokens of `group_rows` rows such a block takes the part `capacity` that its router scores
    highest, whatever their modality; it looks at later tokens to choose. With `auxiliary_router` it
    has a small network that guesses this from a token alone; as with model.moe.auxiliary_routers
    that is what is trained then, and what evaluation follows.
    """

    every: int | None = None
    capacity: float = 0.25
    group_rows: int = 1
    auxiliary_router: bool = False

    def __post_init__(self) -> None:
        positive(model__mod__every=self.every, model__mod__group_rows=self.group_rows)
        positive(model__mod__capacity=self.capacity)
        fraction(model__mod__capacity=self.capacity)
        others = (self.capacity, self.group_rows, self.auxiliary_router)
        if self.every is None and others != (MoDConfig.capacity, MoDConfig.group_rows, False):
            raise UserError(
                "model.mod is set up and model.mod.every is null, so that every block takes all "
                "tokens; set model.mod.every, for example to 2, or leave model.mod out."
            )

    def picks(self, layer: int) -> bool:
        """Does the block of this number, from 0, take a part of the tokens only?"""
        return self.every is not None and layer % self.every == 0

    def layers(self, depth: int) -> int:
        """How many of `depth` blocks do."""
        return sum(self.picks(layer) for layer in range(depth))
