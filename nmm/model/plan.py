"""What all layers share to attend within a batch's documents, by one of three backends."""

import torch
from torch import Tensor

from nmm.batch import PackedBatch, two_way
from nmm.config import AttentionBackend, ImageAttention
from nmm.model.documents import DocumentPlan, document_plan
from nmm.model.flex import FlexPlan, flex_plan
from nmm.model.mask import MaskPlan, mask_plan

Plan = FlexPlan | MaskPlan | DocumentPlan


def backend_on(
    device: torch.device, *, asked: AttentionBackend, lengths_change: bool = False
) -> AttentionBackend:
    """What `auto` means on this device; any other backend is what was asked.

    Where `lengths_change` from call to call, `mask` takes the place of `flex`, whose kernel would
    be compiled anew for each.
    """
    if asked is AttentionBackend.auto:
        asked = AttentionBackend.flex if device.type == "cuda" else AttentionBackend.documents
    if asked is AttentionBackend.flex and lengths_change:
        return AttentionBackend.mask
    return asked


def plan(
    batch: PackedBatch,
    *,
    backend: AttentionBackend,
    image_attention: ImageAttention,
    dtype: torch.dtype,
    lengths_change: bool = False,
) -> Plan:
    """The plan of a batch; `dtype` is the queries'."""
    document = batch.document
    image = two_way(document, batch.image, attention=image_attention)
    chosen = backend_on(document.device, asked=backend, lengths_change=lengths_change)
    return plan_of(document, image, backend=chosen, dtype=dtype)


def plan_of(
    document: Tensor, image: Tensor, *, backend: AttentionBackend, dtype: torch.dtype
) -> Plan:
    """The plan of rows with these documents and two-way images, all int[B, L]."""
    match backend:
        case AttentionBackend.flex:
            return flex_plan(document, two_way_image_BL=image)
        case AttentionBackend.mask:
            return mask_plan(document, two_way_image_BL=image, dtype=dtype)
        case _:
            return document_plan(document, two_way_image_BL=image, dtype=dtype)
