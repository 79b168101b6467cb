"""Cross-entropy of a linear layer's logits, without ever holding the logits of a micro-batch.

Legend of shape suffixes: N labelled positions, C positions of a chunk, D width, V ids.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from nmm.config import LossBackend

CHUNK_POSITIONS = 1024  # whose logits exist at a time: 206 MB in float32 for 50,432 ids


class Losses(NamedTuple):
    """What labelled positions cost, in nats; only `loss_sum` carries gradients.

    loss_sum       float32 scalar: sum of the cross-entropies, and of z_loss * log_partition^2
    token_losses   float32[N], the cross-entropies alone
    log_partition  float32[N], log of the sum of exp(logits)
    """

    loss_sum: Tensor
    token_losses: Tensor
    log_partition: Tensor


def losses(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, backend: LossBackend, z_loss: float
) -> Losses:
    """The losses at N positions; the backends agree to 1e-4."""
    if uses_liger(hidden_ND.device, asked=backend):
        return liger(hidden_ND, weight_VD, labels_N, z_loss=z_loss)
    return chunked(hidden_ND, weight_VD, labels_N, z_loss=z_loss)


def uses_liger(device: torch.device, *, asked: LossBackend) -> bool:
    """On GPUs, where liger-kernel is installed, unless `chunked` is asked.

    So a run that was trained with it can be evaluated anywhere; training asks for it first
    (nmm/needs.py).
    """
    able = device.type == "cuda" and find_spec("liger_kernel") is not None
    return able and asked is not LossBackend.chunked


def chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    z_loss: float,
    chunk_positions: int = CHUNK_POSITIONS,
) -> Losses:
    """Chunk by chunk in plain torch, with the gradients computed on the way forward."""
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return Losses(*_Chunked.apply(hidden_ND, weight_VD, labels_N, z_loss, chunk_positions))
    chunks = zip(hidden_ND.split(chunk_positions), labels_N.split(chunk_positions), strict=True)
    parts = [_chunk(hidden_CD, weight_VD, labels_C)[:2] for hidden_CD, labels_C in chunks]
    token_losses_N, log_partition_N = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return Losses(
        _sum(token_losses_N, log_partition_N, z_loss=z_loss), token_losses_N, log_partition_N
    )


def _chunk(hidden_CD: Tensor, weight_VD: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies [C], log-partitions [C] and log-probabilities [C, V], all float32."""
    logits_CV = hidden_CD @ weight_VD.T
    labels_C1 = labels_C[:, None]
    log_chances_CV = F.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    token_losses_C = -log_chances_CV.gather(1, labels_C1)[:, 0]
    label_logits_C = logits_CV.gather(1, labels_C1)[:, 0].float()
    return token_losses_C, label_logits_C + token_losses_C, log_chances_CV


def _sum(token_losses_N: Tensor, log_partition_N: Tensor, *, z_loss: float) -> Tensor:
    return token_losses_N.sum() + z_loss * log_partition_N.square().sum()


class _Chunked(torch.autograd.Function):
    """The gradients of `loss_sum` are known once a chunk's logits are, so no logits are kept.

    Computing the logits a second time on the way back costs a third more (LOG.md).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        z_loss: float,
        chunk_positions: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        token_losses_N, log_partition_N = (
            torch.empty(labels_N.shape, device=hidden_ND.device) for _ in range(2)
        )
        grad_hidden_ND = torch.empty_like(hidden_ND)
        # In float32, because it is the sum of many chunks.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(labels_N), chunk_positions):
            chunk = slice(start, start + chunk_positions)
            labels_C = labels_N[chunk]
            token_losses_N[chunk], log_partition_N[chunk], log_chances_CV = _chunk(
                hidden_ND[chunk], weight_VD, labels_C
            )
            grad_CV = log_chances_CV.exp_()
            if z_loss:
                grad_CV *= 1 + 2 * z_loss * log_partition_N[chunk, None]
            grad_CV.scatter_add_(1, labels_C[:, None], grad_CV.new_full((len(labels_C), 1), -1))
            grad_CV = grad_CV.to(hidden_ND.dtype)
            grad_hidden_ND[chunk] = grad_CV @ weight_VD
            _add_product(grad_weight_VD, grad_CV.T, hidden_ND[chunk])
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(token_losses_N, log_partition_N)
        loss_sum = _sum(token_losses_N, log_partition_N, z_loss=z_loss)
        return loss_sum, token_losses_N, log_partition_N

    @staticmethod
    def backward(
        ctx: BackwardCFunction, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden_ND, grad_weight_VD = tuple(ctx.saved_tensors)
        scale = grad_outputs[0]
        return grad_hidden_ND * scale, grad_weight_VD * scale, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in one kernel where the types allow it."""
    if left.dtype is total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def liger(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, z_loss: float) -> Losses:
    """By the fused kernels of liger-kernel (Triton): the softmax overwrites the logits in place."""
    # Here, because the package is optional and its import takes seconds.
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    if not len(labels_N):  # its kernels refuse to start on nothing
        return chunked(hidden_ND, weight_VD, labels_N, z_loss=z_loss)
    compute = LigerFusedLinearCrossEntropyLoss(
        reduction="none", lse_square_scale=z_loss, accum_dtype=torch.float32
    )
    summands_N = compute(weight_VD, hidden_ND, labels_N)
    with torch.no_grad():
        # The kernel returns p - y + z p^2 with the log-partition p and the label's logit y.
        y_N = (hidden_ND.float() * weight_VD[labels_N].float()).sum(dim=-1)
        known_N = summands_N + y_N
        log_partition_N = 2 * known_N / (1 + (1 + 4 * z_loss * known_N).sqrt())
    return Losses(summands_N.sum(), log_partition_N - y_N, log_partition_N)
