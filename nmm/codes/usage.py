"""How much of a codebook images use."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Usage:
    """`counts` int64[codes]: how often every code occurs."""

    counts: np.ndarray

    @property
    def fraction(self) -> float:
        """The part of the codebook that occurs at all."""
        return float((self.counts > 0).mean())

    @property
    def perplexity(self) -> float:
        """The number of equally frequent codes that would be as hard to guess; 0 of no codes."""
        shares = self.counts[self.counts > 0] / max(1, self.counts.sum())
        return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0

    def said(self) -> str:
        return (
            f"{self.fraction:.3f} of {len(self.counts):,} codes are used, perplexity "
            f"{self.perplexity:,.0f}"
        )
