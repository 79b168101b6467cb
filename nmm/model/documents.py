"""Attention within documents, document by document: no work on pairs from different documents.

Legend of shape suffixes: B rows, L tokens of a row, H heads, K heads of keys and values, E
channels of a head, P documents of a bucket, R rounded document length, S slots of all buckets.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from nmm.model.mask import for_heads, mask_bias

# Document lengths are rounded up to a multiple of this, so that few SDPA calls serve all documents.
BUCKET_TOKENS = 16


@dataclass(frozen=True)
class Bucket:
    """Documents of one rounded length.

    shape  (P, R)
    bias   [P, 1, R, R] as in MaskPlan, or None when every document is plain causal text
    """

    shape: tuple[int, int]
    bias: Tensor | None


@dataclass(frozen=True)
class DocumentPlan:
    """One SDPA call per bucket of documents; no work is spent on pairs from different documents.

    index  int64[S]       the position of every slot in the flattened batch
    slot   int64[B * L]   the slot of every position

    Two rows of 4, lengths rounded to 2, documents aab_ and cccc (padding is handled as a document);
    ~ fills a document up, repeats its start and is never read:

        slots  a a | b ~ | _ ~ | c c c c      index  0 1 2 2 3 3 4 5 6 7      slot  0 1 2 4  6 7 8 9
    """

    buckets: tuple[Bucket, ...]
    index: Tensor
    slot: Tensor

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        return _attend(self, q_BLHE, k_BLKE, v_BLKE)  # pyright: ignore[reportCallIssue]


@torch.compiler.disable  # the lengths of documents differ from batch to batch
def _attend(plan: DocumentPlan, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
    sizes = [documents * length for documents, length in (b.shape for b in plan.buckets)]
    parts = [
        _ToSlots.apply(x.flatten(0, 1), plan.index, plan.slot).split(sizes)
        for x in (q_BLHE, k_BLKE, v_BLKE)
    ]
    outputs = []
    for bucket, *qkv in zip(plan.buckets, *parts, strict=True):
        q, k, v = (x.unflatten(0, bucket.shape).transpose(1, 2) for x in qkv)
        # Fillers come last, so that plain causality keeps them out of a document's sight.
        causal = bucket.bias is None
        if not causal:  # kernels that take a mask want as many heads of all
            k, v = (for_heads(x, heads=q.shape[1]) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, bucket.bias, is_causal=causal, enable_gqa=k.shape[1] < q.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _FromSlots.apply(torch.cat(outputs), plan.index, plan.slot).view(q_BLHE.shape)


class _ToSlots(torch.autograd.Function):
    """x[index]. Fillers get no gradient, so the way back is a gather too: faster than adding."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, slot), None, None


class _FromSlots(torch.autograd.Function):
    """x[slot], the way back; fillers get a gradient of zero."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(index, slot)
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        index, slot = tuple(ctx.saved_tensors)
        (grad,) = grad_outputs
        slots = grad.new_zeros(len(index), *grad.shape[1:])
        return slots.index_copy_(0, slot, grad), None, None


def document_plan(
    document_BL: Tensor, *, two_way_image_BL: Tensor, dtype: torch.dtype
) -> DocumentPlan:
    """Sort the documents into buckets of equal rounded length, text apart from images."""
    start, length = _runs(document_BL)
    image = two_way_image_BL.flatten()
    seen = torch.cat([image.new_zeros(1), (image > 0).cumsum(0)])
    has_image = seen[start + length] > seen[start]
    rounded = -(-length // BUCKET_TOKENS) * BUCKET_TOKENS
    group = 2 * rounded + has_image
    indices, buckets = [], []
    slot, slots = torch.empty_like(image, dtype=torch.int64), 0
    for key in group.unique().tolist():
        chosen = group == key
        offset = torch.arange(key // 2, device=image.device)
        inside_PR = offset < length[chosen, None]
        index_PR = start[chosen, None] + offset * inside_PR
        slot[index_PR[inside_PR]] = slots + inside_PR.flatten().nonzero().flatten()
        slots += index_PR.numel()
        bias = mask_bias(inside_PR, image[index_PR] * inside_PR, dtype=dtype) if key % 2 else None
        indices.append(index_PR.flatten())
        buckets.append(Bucket((index_PR.shape[0], index_PR.shape[1]), bias))
    return DocumentPlan(tuple(buckets), torch.cat(indices), slot)


def _runs(document_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Start and length of every document in the flattened batch; padding is cut into pieces."""
    column = torch.arange(document_BL.shape[1], device=document_BL.device)
    begins = torch.ones_like(document_BL, dtype=torch.bool)
    begins[:, 1:] = document_BL[:, 1:] != document_BL[:, :-1]
    begins |= (document_BL == 0) & (column % BUCKET_TOKENS == 0)
    start = begins.flatten().nonzero().flatten()
    return start, torch.diff(start, append=start.new_tensor([document_BL.numel()]))
