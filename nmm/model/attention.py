"""Attention inside packed documents: rotary positions, and two ways to compute nmm.batch's mask.

Legend of shape suffixes: B rows, L tokens of a row, D width, H heads, E channels of a head,
P documents of a bucket, R rounded document length, S slots of all buckets together.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from nmm.batch import PackedBatch, allowed
from nmm.config import AttentionBackend, BlockConfig, ModelConfig
from nmm.model.layers import qk_norm

# Document lengths are rounded up to a multiple of this, so that few SDPA calls serve all documents.
BUCKET_TOKENS = 16


class Rotary(NamedTuple):
    """cos and sin of every position's angles, float32[B, L, 1, E/2]."""

    cos: Tensor
    sin: Tensor


def rotary(position_BL: Tensor, *, config: ModelConfig) -> Rotary:
    """Tables for `rotate`; computed in every forward pass, because engines cast stored buffers."""
    half = torch.arange(config.head_dim // 2, dtype=torch.float32, device=position_BL.device)
    frequency = config.rope_theta ** (-2 * half / config.head_dim)
    angle = (position_BL.float()[..., None] * frequency)[:, :, None, :]
    return Rotary(angle.cos(), angle.sin())


def rotate(x_BLHE: Tensor, *, rotary: Rotary) -> Tensor:
    """Turn channel pairs (i, i + E/2) by the position's angles, in float32; keeps the dtype."""
    first, second = x_BLHE.float().chunk(2, dim=-1)
    turned = (
        first * rotary.cos - second * rotary.sin,
        second * rotary.cos + first * rotary.sin,
    )
    return torch.cat(turned, dim=-1).to(x_BLHE.dtype)


@dataclass(frozen=True)
class MaskPlan:
    """One SDPA call over whole rows. `bias` [B, 1, L, L] is 0 where allowed, else -inf."""

    bias: Tensor

    def attend(self, q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor) -> Tensor:
        channels = q_BLHE.shape[-1]
        # GPU kernels that take a mask want multiples of 8 channels; zeros change no product.
        q, k, v = (F.pad(x.transpose(1, 2), (0, -channels % 8)) for x in (q_BLHE, k_BLHE, v_BLHE))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=channels**-0.5)
        return out[..., :channels].transpose(1, 2)


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

    def attend(self, q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor) -> Tensor:
        sizes = [documents * length for documents, length in (b.shape for b in self.buckets)]
        parts = [self._gather(x).split(sizes) for x in (q_BLHE, k_BLHE, v_BLHE)]
        outputs = []
        for bucket, *qkv in zip(self.buckets, *parts, strict=True):
            q, k, v = (x.unflatten(0, bucket.shape).transpose(1, 2) for x in qkv)
            # Fillers come last, so that plain causality keeps them out of a document's sight.
            causal = bucket.bias is None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.bias, is_causal=causal)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return _FromSlots.apply(torch.cat(outputs), self.index, self.slot).view(q_BLHE.shape)

    def _gather(self, x_BLHE: Tensor) -> Tensor:
        return _ToSlots.apply(x_BLHE.flatten(0, 1), self.index, self.slot)


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


Plan = MaskPlan | DocumentPlan


def plan(batch: PackedBatch, *, backend: AttentionBackend, dtype: torch.dtype) -> Plan:
    """What all layers share to attend within this batch's documents; `dtype` is the queries'."""
    if backend is AttentionBackend.auto:
        on_cpu = batch.document.device.type == "cpu"
        backend = AttentionBackend.documents if on_cpu else AttentionBackend.mask
    if backend is AttentionBackend.mask:
        return MaskPlan(_bias(batch.document, batch.image, dtype=dtype))
    return document_plan(batch.document, image_BL=batch.image, dtype=dtype)


def document_plan(document_BL: Tensor, *, image_BL: Tensor, dtype: torch.dtype) -> DocumentPlan:
    """Sort the documents into buckets of equal rounded length, text apart from images."""
    start, length = _runs(document_BL)
    image = image_BL.flatten()
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
        bias = _bias(inside_PR, image[index_PR] * inside_PR, dtype=dtype) if key % 2 else None
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


def _bias(document_BL: Tensor, image_BL: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L], 0 or -inf. Padding counts as a document, so that no row is without a key."""
    forbidden = ~allowed(document_BL, image_BL)
    bias = torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device)
    return bias.masked_fill_(forbidden, float("-inf"))[:, None]


class Attends(Protocol):
    """What a layer wants of a plan."""

    def attend(self, q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor) -> Tensor: ...


class Attention(nn.Module):
    """Multi-head attention; q and k are normed, then rotated unless `rotary` is None."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.biases)
        self.q_norm, self.k_norm = qk_norm(config), qk_norm(config)
        self.out = nn.Linear(config.width, config.width, bias=config.biases)

    def forward(self, x_BLD: Tensor, *, rotary: Rotary | None, plan: Attends) -> Tensor:
        q_BLD, k_BLD, v_BLD = self.qkv(x_BLD).chunk(3, dim=-1)
        q_BLHE = self._split(self.q_norm(q_BLD))
        k_BLHE = self._split(self.k_norm(k_BLD))
        if rotary is not None:
            q_BLHE, k_BLHE = (rotate(x, rotary=rotary) for x in (q_BLHE, k_BLHE))
        return self.out(plan.attend(q_BLHE, k_BLHE, self._split(v_BLD)).flatten(2))

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.heads, -1))
