"""A feed-forward layer of experts: decide (router), move (dispatch), compute (experts), move back.

Legend of shape suffixes: B rows, L tokens of a row, G groups of rows, N tokens of a group, T = G N
tokens, S slots, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmm.config import ModelConfig
from nmm.model.dispatch import collect, distribute
from nmm.model.experts import Experts
from nmm.model.layers import Fed
from nmm.model.router import router


class MoE(nn.Module):
    """(x [B, L, D], modality [B, L]) -> the outputs of the experts that take each token.

    Where experts are on several processes, `elsewhere` is what brings slots to theirs and back:
    (experts, x [S, D], ends [E]) -> [S, D], like the experts' own forward if all were here.

    With `causal`, experts that choose do what their auxiliary routers guess. A row of the input
    stands for `rows_in_one` rows of the batch.
    """

    def __init__(self, config: ModelConfig, *, rows_in_one: int = 1) -> None:
        super().__init__()
        self.group_rows = config.moe.group_rows // rows_in_one
        self.router = router(config)
        self.experts = Experts(config)
        self.elsewhere: nn.Module | None = None

    @torch.compiler.disable  # the loads of experts differ from batch to batch
    def forward(self, x_BLD: Tensor, modality_BL: Tensor, causal: bool = False) -> Fed:
        rows = len(x_BLD)
        if more := -rows % self.group_rows:  # a prompt, or the last rows of an evaluation
            x_BLD, modality_BL = (
                F.pad(x_BLD, (0, 0, 0, 0, 0, more)),
                F.pad(modality_BL, (0, 0, 0, more)),
            )
        modality_GN = modality_BL.reshape(-1, self.group_rows * modality_BL.shape[1])
        x_TD = x_BLD.flatten(0, 1)
        slots, weight_S, auxiliary, table = self.router(x_TD, modality_GN, causal)
        out_SD = self._compute(distribute(x_TD, slots), slots.ends)
        out_TD = collect(out_SD, weight_S, slots)
        return Fed(out_TD.view_as(x_BLD)[:rows], auxiliary, table)

    def _compute(self, x_SD: Tensor, ends_E: Tensor) -> Tensor:
        if self.elsewhere is None:
            return self.experts(x_SD, ends_E)
        return self.elsewhere(self.experts, x_SD, ends_E)
