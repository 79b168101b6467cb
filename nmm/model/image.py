"""Images as tokens: one linear layer on raw patches, placed at the image positions of the rows.

Legend of shape suffixes: B rows, L tokens of a row, M images, T tokens of an image, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmm.batch import first_column
from nmm.config import ImageConfig

# Mean and standard deviation of ImageNet's RGB channels, the convention of vision models.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


class PatchEmbedding(nn.Module):
    """uint8 pixels [M, side, side, 3] -> [M, T, D], patches in reading order, without a bias."""

    def __init__(self, config: ImageConfig, *, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, config.patch_values))
        self.side_pixels = config.side_pixels
        self.patch_pixels = config.patch_pixels

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (self.side_pixels, self.side_pixels, 3), pixels.shape
        mean = torch.tensor(PIXEL_MEAN, device=pixels.device)
        std = torch.tensor(PIXEL_STD, device=pixels.device)
        normalised = ((pixels.float() / 255 - mean) / std).to(self.weight.dtype)
        return F.linear(cut(normalised, patch_pixels=self.patch_pixels), self.weight)


def cut(pixels: Tensor, *, patch_pixels: int) -> Tensor:
    """[M, side, side, 3] -> [M, T, patch_pixels * patch_pixels * 3], patches in reading order."""
    images, side = pixels.shape[:2]
    across = side // patch_pixels
    grid = pixels.view(images, across, patch_pixels, across, patch_pixels, 3)
    return grid.transpose(2, 3).reshape(images, across**2, 3 * patch_pixels**2)


def place(patches_MTD: Tensor, *, into_BLD: Tensor, image_BL: Tensor) -> Tensor:
    """`into` with the k-th position of image m replaced by its k-th patch.

    An image's positions are contiguous in its row. With no images the patches stay in the graph
    with gradients of zero, so that processes with and without images run the same collectives.

        image  0 1 1 1 1 0 2 2 2 2      reads patch  . 0 1 2 3 . 4 5 6 7
    """
    column = torch.arange(image_BL.shape[1], device=image_BL.device)
    patch_BL = (image_BL - 1) * patches_MTD.shape[1] + column - first_column(image_BL)
    # Row 0 of the table stands for "no patch"; it is never seen.
    table = torch.cat([patches_MTD.new_zeros(1, patches_MTD.shape[2]), patches_MTD.flatten(0, 1)])
    is_image = image_BL > 0
    rows = table.index_select(0, torch.where(is_image, patch_BL + 1, 0).flatten())
    return torch.where(is_image[..., None], rows.view(into_BLD.shape), into_BLD)
