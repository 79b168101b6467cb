"""Images as whole numbers of a codebook, by a VQ model that turns them into pixels again."""

from nmm.codes.model import ImageCodes
from nmm.codes.usage import Usage

__all__ = ["ImageCodes", "Usage"]
