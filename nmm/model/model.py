"""The native multimodal decoder: text ids and images in one stream of tokens.

Legend of shape suffixes: B rows, L tokens of a row, D width, V ids, N labelled positions.

NOTE: ZeRO-3 gathers a parameter when the forward of the module that owns it is called, finds the
gradients of a module in its positional inputs, and walks outputs only through tuples, lists and
dicts. Hence no parameter is read from outside its module, and Output is a NamedTuple.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmm.batch import NO_LABEL, Modality, PackedBatch
from nmm.config import ImageKind, ModelConfig, Positions
from nmm.model.attention import Rotary, rotary
from nmm.model.block import Block, Stack, Stacked
from nmm.model.cache import Cache
from nmm.model.depth import DepthRouter, OneEach, rows_of
from nmm.model.heads import Head
from nmm.model.image import PatchEmbedding, place
from nmm.model.init import initialise
from nmm.model.layers import feed_forward, norm
from nmm.model.moe import MoE
from nmm.model.plan import plan
from nmm.model.vision import VisionEncoder


class Output(NamedTuple):
    """What a batch costs, in nats; nothing is normalised.

    loss_sum       float32 scalar, what is minimised: the sum of the losses at all labelled
                   positions, and of model.z_loss times their squared log-partitions
    token_losses   float32[N], detached: the losses alone
    positions      int64[N], their places in the flattened batch, ascending: row * L + column
    log_partition  float32[N], detached: log of the sum of exp(logits) there
    layer_squares  float32[depth], detached: sums of squares of the outputs of every block, padding
                   left out; float32[0] unless it was asked for
    auxiliary      float32 scalar, what routers add to what is minimised: a mean over layers, summed
                   over tokens, labelled or not
    routed         float32[depth, modalities, E + 8], detached: the tables of nmm/routing.py;
                   float32[0] without experts
    kept           float32[layers that take some tokens, modalities, 6], likewise
    """

    loss_sum: Tensor
    token_losses: Tensor
    positions: Tensor
    log_partition: Tensor
    layer_squares: Tensor
    auxiliary: Tensor
    routed: Tensor
    kept: Tensor


class Model(nn.Module):
    """Embeddings, `depth` blocks, a final norm and a head.

    Images come in through `patch` (early fusion), or through `vision` and `connector` (late).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = self.patch = self.vision = self.connector = None
        if config.max_positions is not None:
            self.position = nn.Embedding(config.max_positions, config.width)
        if config.image.kind is ImageKind.patches:
            self.patch = PatchEmbedding(config.image, width=config.width)
        if config.encoder is not None:
            self.vision = VisionEncoder(config.encoder, image=config.image)
            self.connector = nn.Linear(config.encoder.width, config.width, bias=config.biases)
        self.blocks = Stack([_block(config, layer=layer) for layer in range(config.depth)])
        self.norm = norm(config)
        self.head = Head(config)
        self.tie()

    def tie(self) -> None:
        """With `tied_head`, make the head's matrix the embedding's; anew after `to_empty`."""
        if self.config.tied_head:
            assert isinstance(self.embedding.weight, nn.Parameter)
            self.head.weight = self.embedding.weight

    def forward(self, batch: PackedBatch, *, watch: bool = False, causal: bool = False) -> Output:
        """The next-token losses of a batch; with `watch` also what the layers put out.

        With `causal`, experts and blocks that choose do what their auxiliary routers guess.
        """
        labels = batch.labels.flatten()
        positions = (labels != NO_LABEL).nonzero().flatten()
        watched_BL = batch.document > 0 if watch else None
        stacked = self._blocks(batch, watched_BL=watched_BL, causal=causal)
        hidden_ND = self.norm(stacked.output).flatten(0, 1).index_select(0, positions)
        losses = self.head(hidden_ND, labels[positions])
        return Output(
            loss_sum=losses.loss_sum,
            token_losses=losses.token_losses,
            positions=positions,
            log_partition=losses.log_partition,
            layer_squares=stacked.squares,
            auxiliary=stacked.auxiliary / self.config.depth,
            routed=stacked.statistics,
            kept=stacked.kept,
        )

    def _blocks(
        self,
        batch: PackedBatch,
        *,
        causal: bool,
        cache: Cache | None = None,
        watched_BL: Tensor | None = None,
    ) -> Stacked:
        """Everything before the last norm; a cache remembers the batch."""
        x_BLD = self._tokens(batch)
        attends = plan(
            batch,
            backend=self.config.attention,
            image_attention=self.config.image_attention,
            dtype=x_BLD.dtype,
            lengths_change=cache is not None,
        )
        rotary, rows = self._rotary(batch.position), None
        filling = None if cache is None else cache.fill(attends)
        if self.config.mod.every is not None:
            rows = rows_of(
                batch, config=self.config, rotary=rotary, dtype=x_BLD.dtype, filling=filling
            )
        return self.blocks(
            self._at_positions(x_BLD, position_BL=batch.position),
            rotary=rotary,
            plan=filling or attends,
            modality_BL=batch.modality,
            watched_BL=watched_BL,
            causal=causal,
            rows=rows,
        )

    def hidden(
        self, batch: PackedBatch, *, cache: Cache | None = None, causal: bool = False
    ) -> Tensor:
        """[B, L, D], what the head reads; a cache remembers the batch."""
        return self.norm(self._blocks(batch, cache=cache, causal=causal).output)

    def _tokens(self, batch: PackedBatch) -> Tensor:
        """[B, L, D]: the vectors of ids and images."""
        x_BLD = self.embedding(batch.tokens)
        if self.patch is not None:
            x_BLD = place(self.patch(batch.pixels), into_BLD=x_BLD, image_BL=batch.image)
        if self.vision is not None and self.connector is not None:
            images_MTD = self.connector(self.vision(batch.pixels))
            x_BLD = place(images_MTD, into_BLD=x_BLD, image_BL=batch.image)
        return x_BLD

    def _at_positions(self, x_BLD: Tensor, *, position_BL: Tensor) -> Tensor:
        """With learned positions, where there are some."""
        return x_BLD if self.position is None else x_BLD + self.position(position_BL)

    def _rotary(self, position_BL: Tensor) -> Rotary | None:
        rope = self.config.positions is Positions.rope
        return rotary(position_BL, config=self.config) if rope else None

    def logits(self, batch: PackedBatch, *, causal: bool = False) -> Tensor:
        """[B, L, V]: for tests and small batches, the whole of it is held in memory."""
        return self.head(self.hidden(batch, causal=causal))

    def first_logits(self, batch: PackedBatch, *, at: Tensor, cache: Cache) -> Tensor:
        """[B, V]: the logits at position at[b] of every row b, at int64[B]; the cache is filled.

        Every row holds one document, from its first position on.
        """
        hidden_BLD = self.hidden(batch, cache=cache, causal=self.config.auxiliary_routers)
        return self.head(hidden_BLD[torch.arange(len(at), device=at.device), at])

    def next_logits(
        self,
        tokens: Tensor,
        *,
        at: Tensor,
        cache: Cache,
        modality: Tensor | None = None,
    ) -> Tensor:
        """[B, V]: the logits after one more id of every row, tokens int64[B], at position at[b].

        `modality` uint8[B] is that of the ids, text unless it is given.
        """
        at_BL = at[:, None]
        x_BLD = self._at_positions(self.embedding(tokens[:, None]), position_BL=at_BL)
        modality_BL = (
            torch.full_like(at_BL, Modality.text) if modality is None else modality[:, None]
        )
        rotary, adding = self._rotary(at_BL), cache.add(at)
        stacked = self.blocks(
            x_BLD,
            rotary=rotary,
            plan=adding,
            modality_BL=modality_BL,
            causal=self.config.auxiliary_routers,
            rows=OneEach(modality_BL, rotary, adding),
        )
        return self.head(self.norm(stacked.output)[:, 0])


def _block(config: ModelConfig, *, layer: int) -> Block:
    picks = config.mod.picks(layer)
    rows_in_one = config.mod.group_rows if picks else 1
    ffn = MoE(config, rows_in_one=rows_in_one) if config.sparse else feed_forward(config)
    return Block(config, ffn=ffn, depth_router=DepthRouter(config) if picks else None)


def build(config: ModelConfig, *, seed: int) -> Model:
    """A float32 model on the CPU with its initial weights, a pure function of config and seed."""
    with torch.device("meta"):
        model = Model(config)
    model.to_empty(device="cpu")
    model.tie()
    initialise(model, seed=seed)
    return model
