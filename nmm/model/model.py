"""The native multimodal decoder: text ids and image patches in one stream of tokens.

Legend of shape suffixes: B rows, L tokens of a row, D width, V ids, N labelled positions.

NOTE: ZeRO-3 gathers a parameter when the forward of the module that owns it is called, finds the
gradients of a module in its positional inputs, and walks outputs only through tuples, lists and
dicts. Hence no parameter is read from outside its module, and Output is a NamedTuple.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmm.batch import NO_LABEL, PackedBatch
from nmm.config import ModelConfig
from nmm.model.attention import rotary
from nmm.model.block import Block, Stack, Stacked
from nmm.model.heads import Head
from nmm.model.image import PatchEmbedding, place
from nmm.model.init import initialise
from nmm.model.layers import norm
from nmm.model.plan import plan


class Output(NamedTuple):
    """What a batch costs, in nats; nothing is normalised.

    loss_sum       float32 scalar, what is minimised: the sum of the losses at all labelled
                   positions, and of model.z_loss times their squared log-partitions
    token_losses   float32[N], detached: the losses alone
    positions      int64[N], their places in the flattened batch, ascending: row * L + column
    log_partition  float32[N], detached: log of the sum of exp(logits) there
    layer_squares  float32[depth], detached: sums of squares of the outputs of every block, padding
                   left out; float32[0] unless it was asked for
    """

    loss_sum: Tensor
    token_losses: Tensor
    positions: Tensor
    log_partition: Tensor
    layer_squares: Tensor


class Model(nn.Module):
    """Embeddings, `depth` blocks, a final norm and an untied head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.patch = PatchEmbedding(config.image, width=config.width)
        self.blocks = Stack([Block(config) for _ in range(config.depth)])
        self.norm = norm(config.width, eps=config.norm_eps)
        self.head = Head(config)

    def forward(self, batch: PackedBatch, *, watch: bool = False) -> Output:
        """The next-token losses of a batch; with `watch` also what the layers put out."""
        labels = batch.labels.flatten()
        positions = (labels != NO_LABEL).nonzero().flatten()
        stacked = self._blocks(batch, watched_BL=batch.document > 0 if watch else None)
        hidden_ND = self.norm(stacked.output).flatten(0, 1).index_select(0, positions)
        losses = self.head(hidden_ND, labels[positions])
        return Output(
            loss_sum=losses.loss_sum,
            token_losses=losses.token_losses,
            positions=positions,
            log_partition=losses.log_partition,
            layer_squares=stacked.squares,
        )

    def _blocks(
        self,
        batch: PackedBatch,
        *,
        lengths_change: bool = False,
        watched_BL: Tensor | None = None,
    ) -> Stacked:
        """Everything before the last norm; `lengths_change` is for `plan`."""
        x_BLD = self.embedding(batch.tokens)
        x_BLD = place(self.patch(batch.pixels), into_BLD=x_BLD, image_BL=batch.image)
        return self.blocks(
            x_BLD,
            rotary=rotary(batch.position, config=self.config),
            plan=plan(
                batch,
                backend=self.config.attention,
                image_attention=self.config.image_attention,
                dtype=x_BLD.dtype,
                lengths_change=lengths_change,
            ),
            watched_BL=watched_BL,
        )

    def hidden(self, batch: PackedBatch, *, lengths_change: bool = False) -> Tensor:
        """[B, L, D], what the head reads."""
        return self.norm(self._blocks(batch, lengths_change=lengths_change).output)

    def logits(self, batch: PackedBatch) -> Tensor:
        """[B, L, V]: for tests and small batches, the whole of it is held in memory."""
        return self.head(self.hidden(batch))

    def next_logits(self, batch: PackedBatch, *, at: Tensor) -> Tensor:
        """[B, V]: the logits at position at[b] of every row b, at int64[B]."""
        hidden_BLD = self.hidden(batch, lengths_change=True)
        rows = torch.arange(len(at), device=at.device)
        return self.head(hidden_BLD[rows, at])


def build(config: ModelConfig, *, seed: int) -> Model:
    """A float32 model on the CPU with its initial weights, a pure function of config and seed."""
    with torch.device("meta"):
        model = Model(config)
    model.to_empty(device="cpu")
    initialise(model, seed=seed)
    return model
