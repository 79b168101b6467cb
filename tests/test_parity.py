"""Members of the family against the same models of Hugging Face transformers, weights mapped.

Weights are drawn so that attention is far from uniform: with small ones a wrong mask, a wrong head
or a wrong position hardly moves a logit.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from nmm.batch import NO_LABEL, PackedBatch
from nmm.config import FFN, AttentionBackend, ImageConfig, QKNorm, VisionConfig
from nmm.flops import num_parameters
from nmm.model import build
from nmm.model.image import PIXEL_MEAN, PIXEL_STD
from nmm.model.model import Model
from nmm.model.vision import VisionEncoder, WholeImages
from tests.batches import pack
from tests.family import FAMILY
from tests.test_flops import preset

ROWS = [[(12,), (7,)], [(20,)]]
EXACT = {"rtol": 0, "atol": 1e-5}
SHARP = 2.0

# Our name -> the names of the reference, joined along the first axis.
Names = dict[str, list[str]]


def llama_names(depth: int) -> Names:
    names = {
        "embedding.weight": ["model.embed_tokens.weight"],
        "norm.weight": ["model.norm.weight"],
        "head.weight": ["lm_head.weight"],
    }
    for layer in range(depth):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention = f"{theirs}.self_attn"
        names |= {
            f"{ours}.attention_norm.weight": [f"{theirs}.input_layernorm.weight"],
            f"{ours}.attention.qkv.weight": [f"{attention}.{x}_proj.weight" for x in "qkv"],
            f"{ours}.attention.out.weight": [f"{attention}.o_proj.weight"],
            f"{ours}.ffn_norm.weight": [f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.ffn.gate_up.weight": [f"{theirs}.mlp.{x}_proj.weight" for x in ("gate", "up")],
            f"{ours}.ffn.down.weight": [f"{theirs}.mlp.down_proj.weight"],
        }
    return names


def chameleon_names(depth: int) -> Names:
    extra = {
        f"blocks.{layer}.attention.{which}.{kind}": [
            f"model.layers.{layer}.self_attn.{which}.{kind}"
        ]
        for layer in range(depth)
        for which in ("q_norm", "k_norm")
        for kind in ("weight", "bias")
    }
    return {**llama_names(depth), **extra}


def with_biases(ours: str, theirs: list[str]) -> Names:
    return {f"{ours}.{k}": [f"{name}.{k}" for name in theirs] for k in ("weight", "bias")}


def blocks_with_biases(
    ours: str, theirs: str, *, out: str, norms: tuple[str, str], ffn: str
) -> Names:
    """OPT and SigLIP: queries, keys and values apart, two matrices in the feed-forward."""
    return {
        **with_biases(f"{ours}.attention_norm", [f"{theirs}.{norms[0]}"]),
        **with_biases(f"{ours}.attention.qkv", [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]),
        **with_biases(f"{ours}.attention.out", [f"{theirs}.self_attn.{out}"]),
        **with_biases(f"{ours}.ffn_norm", [f"{theirs}.{norms[1]}"]),
        **with_biases(f"{ours}.ffn.up", [f"{theirs}{ffn}fc1"]),
        **with_biases(f"{ours}.ffn.down", [f"{theirs}{ffn}fc2"]),
    }


def opt_names(depth: int) -> Names:
    decoder = "model.decoder"
    names = {
        "embedding.weight": [f"{decoder}.embed_tokens.weight"],
        "position.weight": [f"{decoder}.embed_positions.weight"],
        **with_biases("norm", [f"{decoder}.final_layer_norm"]),
    }
    for layer in range(depth):
        names |= blocks_with_biases(
            f"blocks.{layer}",
            f"{decoder}.layers.{layer}",
            out="out_proj",
            norms=("self_attn_layer_norm", "final_layer_norm"),
            ffn=".",
        )
    return names


def llama(*, kv_heads: int = 4) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            attn_implementation="eager",
        )
    )


def chameleon(*, swin: bool, kv_heads: int = 4) -> PreTrainedModel:
    config = ChameleonConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48 if swin else 256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        swin_norm=swin,
        vq_config={"base_channels": 32, "num_embeddings": 4, "channel_multiplier": [1]},
        vocabulary_map={"<image>": 4},
        attn_implementation="eager",
    )
    return ChameleonForConditionalGeneration(config)


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.0,
            attn_implementation="eager",
        )
    )


CASES = {
    "llama": (llama, llama_names),
    "chameleon": (lambda: chameleon(swin=False), chameleon_names),
    "swin": (lambda: chameleon(swin=True), chameleon_names),
    "metaseq": (opt, opt_names),
    "llama with shared keys": (lambda: llama(kv_heads=2), llama_names),
    "swin with shared keys": (lambda: chameleon(swin=True, kv_heads=1), chameleon_names),
}


@torch.no_grad()
def draw(reference: nn.Module) -> None:
    """Weights of unit gain, sharper queries and keys, gains and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    for name, p in reference.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "_norm." in name and p.ndim == 2:  # Chameleon's: ours has one for all heads
            noise = noise[:1].expand(p.shape)
        sharp = SHARP if ".q_" in name or ".k_" in name else 1.0
        if name.endswith("bias"):
            p.copy_(0.3 * noise)
        elif "norm" in name:
            p.copy_(sharp * (1 + 0.3 * noise))
        else:
            p.copy_(sharp * noise / math.sqrt(p[0].numel()))


def joined(values: dict[str, Tensor], names: list[str], *, like: Tensor, summed: bool) -> Tensor:
    """The reference's tensors as ours has them.

    Where ours is one for all heads, that is the first row of theirs, or the sum of their gradients.
    OPT's positions begin at row 2.
    """
    value = torch.cat([values[name] for name in names])
    if value.ndim == 2 and like.ndim == 1:
        return value.sum(0) if summed else value[0]
    if "embed_positions" in names[0]:
        return value[2:]
    if value.ndim == 4:  # patches: theirs are channels first, ours channels last
        return value.permute(0, 2, 3, 1).reshape(like.shape)
    return value


def copy_into(model: nn.Module, reference: nn.Module, names: Names) -> None:
    theirs = dict(reference.named_parameters())
    assert names.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(joined(theirs, names[name], like=p, summed=False))


def check_gradients(model: nn.Module, reference: nn.Module, names: Names) -> None:
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        expected = joined(grads, names[name], like=p, summed=True)
        assert expected.abs().max() > 1e-4, name
        torch.testing.assert_close(p.grad, expected, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def documents(batch: PackedBatch) -> list[tuple[int, Tensor]]:
    """(row, columns) of every document."""
    return [
        (row, (batch.document[row] == number).nonzero().flatten())
        for row in range(len(batch.tokens))
        for number in range(1, int(batch.document[row].max()) + 1)
    ]


def reference_loss(reference: PreTrainedModel, batch: PackedBatch, logits: Tensor) -> Tensor:
    """Each document alone through the reference; its logits equal ours. Returns the mean loss."""
    loss = torch.zeros(())
    for row, columns in documents(batch):
        out = reference(
            input_ids=batch.tokens[row, columns][None], output_attentions=True, use_cache=False
        )
        torch.testing.assert_close(logits[row, columns], out.logits[0], **EXACT)
        labels = batch.labels[row, columns]
        loss = loss + nn.functional.cross_entropy(
            out.logits[0], labels, ignore_index=NO_LABEL, reduction="sum"
        )
        for layer in out.attentions:
            check_not_uniform(layer[0, :, 5:])
    return loss / (batch.labels != NO_LABEL).sum()


def check_not_uniform(shares: Tensor) -> None:
    """[..., keys]: on average, attention has less than 0.8 of the entropy that it could have."""
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1)
    most = (shares > 0).sum(-1).log()
    assert (entropy / most).mean() < 0.8


@pytest.mark.parametrize("backend", [AttentionBackend.mask, AttentionBackend.documents])
@pytest.mark.parametrize("name", CASES)
def test_text_equals_transformers(name: str, backend: AttentionBackend) -> None:
    """Packed rows here, one document at a time there: logits and every gradient to 1e-5."""
    make, names_of = CASES[name]
    config = replace(FAMILY[name], attention=backend, dropout=0.0)
    reference = make()
    draw(reference)
    names = names_of(config.depth)
    model = build(config, seed=0)
    copy_into(model, reference, names)
    batch = pack(ROWS, config=config, row_tokens=24)
    expected = reference_loss(reference, batch, model.logits(batch))
    expected.backward()
    loss = model(batch).loss_sum / (batch.labels != NO_LABEL).sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    check_gradients(model, reference, names)


SIGLIP = VisionConfig(
    width=32, depth=3, heads=4, qk_norm=QKNorm.none, ffn=FFN.gelu, biases=True, norm_eps=1e-6
)
SQUARE = ImageConfig(side_pixels=12, patch_pixels=4)


def siglip() -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
        hidden_act="gelu",
        vision_use_head=False,
        attn_implementation="eager",
    )
    return SiglipVisionModel(config)


def siglip_names() -> Names:
    names = {
        "patch.weight": ["embeddings.patch_embedding.weight"],
        "position": ["embeddings.position_embedding.weight"],
        **with_biases("norm", ["post_layernorm"]),
    }
    for layer in range(SIGLIP.depth):
        names |= blocks_with_biases(
            f"blocks.{layer}",
            f"encoder.layers.{layer}",
            out="out_proj",
            norms=("layer_norm1", "layer_norm2"),
            ffn=".mlp.",
        )
    return names


def test_the_encoder_equals_siglip_block_for_block() -> None:
    """The output of every block, and every gradient. Our patch projection has no bias."""
    reference = siglip()
    draw(reference)
    with torch.no_grad():
        reference.embeddings.patch_embedding.bias.zero_()
    encoder = VisionEncoder(SIGLIP, image=SQUARE)
    copy_into(encoder, reference, siglip_names())
    pixels = torch.randint(
        0, 256, (5, 12, 12, 3), generator=torch.Generator().manual_seed(1)
    ).byte()
    normalised = (pixels / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    theirs = reference(
        normalised.permute(0, 3, 1, 2), output_hidden_states=True, output_attentions=True
    )
    for layer in theirs.attentions:
        check_not_uniform(layer)

    x = encoder.patch(pixels) + encoder.position
    for block, before, after in zip(
        encoder.blocks, theirs.hidden_states, theirs.hidden_states[1:], strict=False
    ):
        torch.testing.assert_close(x, before, **EXACT)
        x = block(x, rotary=None, plan=WholeImages()).output
        torch.testing.assert_close(x, after, **EXACT)
    found = encoder(pixels)
    torch.testing.assert_close(found, theirs.last_hidden_state, **EXACT)

    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)) / found.numel()
    (found * weight).sum().backward()
    (theirs.last_hidden_state * weight).sum().backward()
    check_gradients(encoder, reference, siglip_names())


def test_metaseq_125m_has_the_size_of_opt() -> None:
    config = preset("metaseq_125m")
    with torch.device("meta"):
        ours = Model(config)
        theirs = OPTForCausalLM(
            OPTConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                ffn_dim=config.hidden,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                max_position_embeddings=2048 - 2,  # two more rows are for no token
                word_embed_proj_dim=config.width,
            )
        )
    count = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in ours.parameters()) == count == num_parameters(config).total
