"""Counts without building equal counts of the built module, and the published sizes."""

import json
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nmm.activations import activation_bytes
from nmm.batch import NO_LABEL
from nmm.config import AttentionBackend, ImageKind, ModelConfig, compose, load
from nmm.config.root import CONF
from nmm.errors import UserError
from nmm.flops import (
    exact_flops,
    exact_flops_per_token,
    flops,
    flops_per_token,
    memory_bytes,
    num_parameters,
    peak_flops_per_second,
)
from nmm.model import Model, build
from nmm.model.__main__ import describe, main
from tests.family import FAMILY, batch_for
from tests.sparse import DEEP, SPARSE

# The learning rate, and millions of parameters: N, for late fusion also N_vision and N_text.
# "Scaling Laws for Native Multimodal Models", table 6; "MoMa", tables 1 and 5; metaseq's grid.
PUBLISHED = {
    "early_275m": (0.0015, 274.8),
    "early_464m": (0.0015, 464.0),
    "early_932m": (0.0005, 931.7),
    "early_1p63b": (0.00042, 1626.8),
    "early_2p28b": (0.0004, 2279.9),
    "early_3p35b": (0.00035, 3354.3),
    "early_8p13b": (0.00024, 8129.1),
    "late_289m": (0.0015, 289.8, 42.5, 247.3),
    "late_494m": (0.0015, 493.4, 81.8, 411.6),
    "late_1b": (0.0005, 1004.3, 169.9, 834.4),
    "late_1p75b": (0.00042, 1748.0, 308.3, 1439.7),
    "late_2p43b": (0.00038, 2430.5, 418.3, 2012.2),
    "late_3p7b": (0.00033, 3707.2, 679.5, 3027.8),
    "moma_dense_90m": (0.0001, 92.3),
    "moma_dense_435m": (0.0001, 436.2),
    "moma_dense_1p4b": (0.0001, 1476.35),
    "chameleon_7b": (0.0001, 7012.9),
    "chameleon_34b": (0.0001, 34292.6),
    "metaseq_8m": (0.001, 7.2),
    "metaseq_125m": (0.0006, 123.5),
    "metaseq_350m": (0.0003, 353.5),
    "metaseq_760m": (0.00025, 756.7),
    "metaseq_1p3b": (0.0002, 1310.9),
    "tiny": (0.0015, 1.6),
    "tiny_late": (0.0015, 1.8, 0.3, 1.6),
}
# Sparse models: the learning rate, millions in all, and those that a token passes through, which
# are of the first paper the sizes of its dense models. The totals are its table 6 with 8 experts;
# "MoMa", table 1, prints 210M, 1.9B and 7.1B, with a mixture of depths 110M, 635M and 2.3B, and of
# both 317M, 3B and 12B.
PUBLISHED_SPARSE = {
    "moe_8e_275m": (0.0015, 1203.8, 274.8),
    "moe_8e_464m": (0.0015, 2148.6, 464.0),
    "moe_8e_932m": (0.0005, 4511.3, 931.7),
    "moe_8e_1p63b": (0.00042, 8179.1, 1626.8),
    "moe_8e_2p28b": (0.0004, 11759.6, 2279.9),
    "moe_8e_3p35b": (0.00035, 17532.4, 3354.3),
    "moe_4e_275m": (0.0015, 673.0, 274.8),
    "moe_8e_top2_275m": (0.0015, 1203.8, 407.6),
    "moe_8e_top2_fine_275m": (0.0015, 673.0, 274.8),
    **{
        f"moma_{kind}_{size}": (0.0001, total, dense)
        for size, dense, totals in (
            ("90m", 92.3, (109.0, 209.7, 209.7)),
            ("435m", 436.2, (637.4, 1845.1, 1845.1)),
            ("1p4b", 1476.3, (2281.6, 7113.1, 7113.1)),
        )
        for kind, total in zip(("1t1i", "4t4i", "8x"), totals, strict=True)
    },
    **{
        f"mod_{kind}_{size}": (0.0001, total, active)
        for size, active, totals in (
            ("90m", 94.6, (111.1, 140.5, 316.6, 316.6)),
            ("435m", 448.7, (637.5, 972.9, 2985.7, 2985.7)),
            ("1p4b", 1576.0, (2340.4, 3699.4, 11853.1, 11853.1)),
        )
        for kind, total in zip(("dense", "moma_1t1i", "moma_4t4i", "moma_8x"), totals, strict=True)
    },
    "tiny_moe": (0.0015, 7.1, 1.6),
    "tiny_moma": (0.0015, 7.1, 1.6),
}
MEMBERS = {**FAMILY, **SPARSE, **DEEP}
PRESETS = [path.stem for path in sorted((CONF / "model").glob("*.yaml"))]


def preset(name: str) -> ModelConfig:
    return describe([f"model={name}"]).model


def built(config: ModelConfig) -> dict[str, int]:
    """Parameters of the module by name, without their values."""
    with torch.device("meta"):
        return {name: p.numel() for name, p in Model(config).named_parameters()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes_and_rates(name: str) -> None:
    composed = compose([f"model={name}"])
    config = OmegaConf.to_object(composed.model)
    assert isinstance(config, ModelConfig)
    parameters = num_parameters(config)
    found = (parameters.N, parameters.N_vision, parameters.N_text)
    rate, *sizes = PUBLISHED[name]
    for count, millions in zip(found, sizes, strict=False):
        assert abs(count / 1e6 - millions) < 0.06
    assert (parameters.N_vision > 0) == (len(sizes) == 3)
    assert parameters.N == parameters.N_text + parameters.N_vision == parameters.N_active
    assert parameters.total == sum(built(config).values())
    assert composed.optim.learning_rate == rate


@pytest.mark.parametrize("name", PUBLISHED_SPARSE)
def test_sparse_presets_have_the_published_sizes_and_rates(name: str) -> None:
    composed = compose([f"model={name}"])
    config = OmegaConf.to_object(composed.model)
    assert isinstance(config, ModelConfig)
    parameters = num_parameters(config)
    rate, total, active = PUBLISHED_SPARSE[name]
    for count, millions in ((parameters.N, total), (parameters.N_active, active)):
        assert abs(count / 1e6 - millions) < 0.06
    assert flops_per_token(config) == 6 * parameters.N_active
    assert parameters.total == sum(built(config).values())
    assert composed.optim.learning_rate == rate
    assert composed.schedule.longer_warmup == name.startswith("moe")


@pytest.mark.parametrize(("size", "more"), [("90m", 9.4), ("435m", 4.2), ("1p4b", 5.5)])
def test_a_mixture_of_depths_costs_4_to_9_percent_more(size: str, more: float) -> None:
    """What a token passes through in the blocks, against the dense model of its class."""
    dense = num_parameters(preset(f"moma_dense_{size}"))
    for kind in ("dense", "moma_1t1i", "moma_4t4i", "moma_8x"):
        mixed = num_parameters(preset(f"mod_{kind}_{size}"))
        part = (mixed.attention + mixed.ffn) / (dense.attention + dense.ffn)
        assert 100 * (part - 1) == pytest.approx(more, abs=0.05)


def test_early_275m_exactly() -> None:
    config = preset("early_275m")
    assert num_parameters(config).N == 274_841_600
    assert flops_per_token(config) == 6 * 274_841_600
    assert flops_per_token(config, is_image=True) == 6 * 274_841_600


def test_late_3p7b_is_printed_with_patch_position_and_connector() -> None:
    """Table 6 prints 3.714B; norms are the rest of the total."""
    p = num_parameters(preset("late_3p7b"))
    printed = p.N + p.vision_patch + p.vision_position + p.connector
    assert round(printed / 1e6, 1) == 3713.3
    assert p.total == printed + p.norm + p.vision_norm


def test_presets_choose_optimizer_and_schedule() -> None:
    moma, chameleon, metaseq = (
        compose([f"model={name}"]) for name in ("moma_dense_435m", "chameleon_7b", "metaseq_125m")
    )
    assert (moma.schedule.warmup_steps, moma.schedule.cooldown.name) == (4000, "linear")
    assert (moma.optim.eps, moma.optim.weight_decay) == (1e-5, 1e-5)
    assert (chameleon.schedule.cooldown.name, chameleon.model.dropout) == ("exponential", 0.1)
    assert (metaseq.schedule.warmup_steps, metaseq.schedule.min_fraction) == (500, 0.1)
    other = compose(["model=moma_dense_435m", "schedule=nmm", "optim.learning_rate=3e-4"])
    assert other.schedule.warmup_steps is None
    assert other.optim.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("metaseq_8m", "mixed_modal"),
        ("metaseq_1p3b", "mixed_modal"),
        ("chameleon_7b", "chameleon"),
        ("moma_4t4i_90m", "chameleon"),
        ("early_275m", "mix_45_45_10"),
        ("late_289m", "mix_45_45_10"),
    ],
)
def test_a_preset_and_the_corpus_of_its_paper_need_nothing_else(model: str, data: str) -> None:
    """But for a length; its ids have room for a tokenizer beside the units."""
    config = load(compose([f"model={model}", f"data={data}", "schedule.total_steps=9"]))
    assert (config.model.image.kind is ImageKind.codes) == bool(config.data.units)
    assert config.model.vocab_size - sum(config.data.units.values()) > 32_000


@pytest.mark.parametrize("name", MEMBERS)
def test_parts_equal_the_built_module(name: str) -> None:
    config = MEMBERS[name]
    module, parameters = built(config), num_parameters(config)
    assert parameters.total == sum(module.values())

    def count(end: str, *, vision: bool = False) -> int:
        part = {n: c for n, c in module.items() if n.startswith("vision.") == vision}
        return sum(c for n, c in part.items() if n.removeprefix("vision.").endswith(end))

    def norms(*, vision: bool = False) -> int:
        return sum(
            c for n, c in module.items() if "norm" in n and n.startswith("vision.") == vision
        )

    attention = count("qkv.weight") + count("out.weight")
    ffn = sum(map(count, ("gate_up.weight", "up.weight", "down.weight", "w1", "w2", "w3"))) - (
        count("gate_up.weight") if "blocks.0.ffn.gate_up.weight" in module else 0
    )
    found = parameters.attention + parameters.ffn + parameters.idle_experts + parameters.idle_depth
    assert found == attention + ffn
    if config.mod.every is None:
        assert (parameters.attention, parameters.idle_depth) == (attention, 0)
    assert parameters.router == count("router.weight")
    assert (parameters.norm, parameters.vision_norm) == (norms(), norms(vision=True))
    assert parameters.vision == sum(c for n, c in module.items() if n.startswith("vision."))
    assert parameters.connector == sum(c for n, c in module.items() if n.startswith("connector."))
    assert parameters.patch == module.get("patch.weight", 0)
    assert parameters.position == module.get("position.weight", 0)
    assert parameters.head == module.get("head.weight", 0)


@pytest.mark.parametrize("name", MEMBERS)
def test_exact_flops_are_those_that_torch_counts(name: str) -> None:
    """Forward and backward of a batch; this backend computes every pair of a row."""
    member = MEMBERS[name]
    mod = replace(member.mod, group_rows=1)  # else pairs of different rows are computed too
    config = replace(member, attention=AttentionBackend.mask, mod=mod)
    batch = batch_for(config, row_tokens=40)
    model = build(config, seed=0)
    # The counter does not know CPUs' fused attention, nor products that are added in place, nor
    # grouped ones: each row of the first, or of the result, is in one group only.
    unknown = {
        torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
        torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],
    }
    counter = FlopCounterMode(display=False, custom_mapping=unknown)
    with sdpa_kernel(SDPBackend.MATH), counter:
        output = model(batch)
        (output.loss_sum + output.auxiliary).backward()
    # Sums over tokens, as products; of a block that takes some, over these.
    taken = [config.mod.capacity if config.mod.picks(i) else 1 for i in range(len(output.routed))]
    routed = sum(each * table.numel() for each, table in zip(taken, output.routed, strict=True))
    statistics = 2 * 2 * 40 * (routed + output.kept.numel())
    assert counter.get_total_flops() - statistics == exact_flops(
        config,
        tokens=2 * 40,
        image_tokens=len(batch.pixels) * config.image.tokens,
        labels=int((batch.labels != NO_LABEL).sum()),
        pairs=2 * 40 * 40,
    )


def test_flops_of_a_token_are_means_over_a_document() -> None:
    """One image of 9 tokens at any place among 91 texts: the pairs of all 100 tokens, counted."""
    config, context, image = FAMILY["late"], 100, FAMILY["late"].image.tokens
    ends = [
        [max(q, s + image - 1) if s <= q < s + image else q for q in range(context)]
        for s in range(92)
    ]
    pairs = sum(end + 1 for document in ends for end in document) / len(ends)
    exact = exact_flops(config, tokens=100, image_tokens=9, labels=91, pairs=int(pairs))
    assert pairs == int(pairs)
    text, picture = (
        exact_flops_per_token(config, context_tokens=context, is_image=is_image)
        for is_image in (False, True)
    )
    assert exact == 91 * text + 9 * picture


def test_convention_counts_image_tokens_twice_over() -> None:
    config = FAMILY["late"]
    p = num_parameters(config)
    expected = 6 * (100 * p.N_text + 30 * p.N_vision)
    assert flops(config, tokens=100, image_tokens=30) == expected
    assert flops_per_token(config) == 6 * p.N_text
    assert flops_per_token(config, is_image=True) == 6 * p.N


def test_memory_is_16_bytes_a_parameter_shared_by_stage() -> None:
    for stage, eight in ((0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)):
        assert memory_bytes(1000, zero_stage=stage, gpus=1) == 16_000
        assert memory_bytes(1000, zero_stage=stage, gpus=8) == 1000 * eight


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, 700 * 16 + 200 * 16 / 2 + 100 * 4),
        (1, 700 * (4 + 12 / 8) + 100 * (4 + 12 / 4) + 100 * 2),
        (2, 700 * (2 + 14 / 8) + 100 * (2 + 14 / 4) + 100 * 2),
        (3, 700 * 2 + 100 * 16 / 4 + 100 * 2 / 8),
    ],
)
def test_memory_of_experts_and_frozen_parts(stage: int, expected: float) -> None:
    """8 GPUs in pairs that share experts: each expert's states are split over 4 of them."""
    found = memory_bytes(1000, zero_stage=stage, gpus=8, frozen=100, experts=200, expert_parallel=2)
    assert found == expected


def test_peaks_by_device_name() -> None:
    assert peak_flops_per_second("NVIDIA H200") == 989.4e12
    assert peak_flops_per_second("NVIDIA H100 PCIe") == 756e12
    assert peak_flops_per_second("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops_per_second("") is None


def test_describe_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data.context_tokens=1024", "+data.units.speech=500", "data.masking.mean_spans=1"]
    main(["describe", "model=late_289m", "--json", "model.depth=12", *data])
    printed = json.loads(capsys.readouterr().out)
    assert printed["ids"] == {"speech": 502, "masks": 513, "text": 50432 - 502 - 513}
    config = replace(preset("late_289m"), depth=12)
    expected = num_parameters(config)
    assert printed["N"] == printed["N_active"] == expected.N
    assert (printed["N_vision"], printed["N_text"]) == (expected.N_vision, expected.N_text)
    assert printed["parameters_total"] == sum(printed["parts"].values()) == expected.total
    assert printed["flops_per_token"] == 6 * expected.N_text
    assert printed["flops_per_image_token"] == 6 * expected.N
    assert printed["exact_flops_per_token"] == exact_flops_per_token(config, context_tokens=1024)
    (row,) = (r for r in printed["memory"] if (r["zero_stage"], r["gpus"]) == (2, 8))
    assert row["bytes_per_gpu"] == memory_bytes(expected.total, zero_stage=2, gpus=8)
    kept = activation_bytes(config, tokens=printed["row_tokens"], recomputes=False)
    assert printed["activation_bytes"]["row"]["all"] == kept
    assert printed["activation_bytes"]["image"].keys() == printed["activation_bytes"]["row"].keys()


def test_describe_plans_for_every_way_to_divide_experts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four experts for each modality: over 1, 2 or 4 GPUs, of at least as many."""
    main(["describe", "model=moma_4t4i_90m", "--json"])
    found = {
        (row["zero_stage"], row["gpus"], row["expert_parallel"]): row["bytes_per_gpu"]
        for row in json.loads(capsys.readouterr().out)["memory"]
    }
    whole = [(stage, gpus, 1) for stage in range(4) for gpus in (1, 8, 64)]
    divided = [(stage, gpus, n) for stage in (1, 2, 3) for n in (2, 4) for gpus in (8, 64)]
    assert found.keys() == {*whole, *divided}
    experts = 8 * 8 * 3 * 512 * 1365
    # In stage 1 only weights and gradients are whole on every GPU: 4 bytes; in stage 3 nothing.
    assert found[1, 8, 1] - found[1, 8, 4] == 4 * experts * 3 / 4
    assert found[3, 8, 1] == found[3, 8, 4]
    main(["describe", "model=moma_4t4i_90m"])
    assert capsys.readouterr().out.count("engine.expert_parallel=4\n") == 3


def test_describe_of_a_frozen_encoder_needs_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    totals = []
    for multiplier in ("0.01", "0"):
        main(
            ["describe", "model=late_289m", f"optim.vision_rate_multiplier={multiplier}", "--json"]
        )
        printed = json.loads(capsys.readouterr().out)
        totals.append(printed["memory"][0]["bytes_per_gpu"])
        assert ("image" in printed["activation_bytes"]) == (multiplier != "0")
    assert totals[0] - totals[1] == 12 * num_parameters(preset("late_289m")).vision


def test_describe_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["describe", "model=early_275m"])
    printed = capsys.readouterr().out
    assert "274,841,600" in printed
    assert "1,649,049,600" in printed
    assert "no images" not in printed
    main(["describe", "model=metaseq_8m"])
    assert "images are ids" in capsys.readouterr().out
    main(["describe", "model=metaseq_8m", "model.image.kind=none"])
    assert "no images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.kv_heads=3"], "model.kv_heads is 3 and model.heads is 4; make the heads a mult"),
        (["model.kv_heads=8"], "model.kv_heads is 8 and model.heads is 4; make the heads a mult"),
        (["model.kv_heads=0"], "model.kv_heads is 0"),
        (["model.heads=128"], "model.heads is 128 and model.width is 128.*rotary"),
        (["model.dept=3"], "Key 'dept'"),
        (["model=nope"], "Could not find 'model/nope'"),
        (["model.width=wide"], "could not be converted to Integer"),
        (["model.norm=batch"], "Invalid value 'batch', expected one of"),
        (["model.dropout=1.0"], "model.dropout is 1.0"),
        (["model.ffn_hidden=0"], "model.ffn_hidden is 0"),
        (["model.z_loss=-1"], "model.z_loss is -1.0"),
        (["model.positions=learned"], "model.max_positions is null; set it to data.context"),
        (["model.max_positions=9"], "model.max_positions is 9 and model.positions is rope"),
        (["model.vision.width=32"], "model.vision is set up and model.image.kind is patches"),
        (["model=tiny_late", "model.vision.heads=3"], "model.vision.heads is 3.*must divide"),
        (["model=tiny_late", "model.vision.depth=0"], "model.vision.depth is 0"),
        (["optim.vision_rate_multiplier=-1"], "optim.vision_rate_multiplier is -1"),
        (["model.moe.experts=4"], "model.moe.experts is 4 .*none.*token_choice or expert_choice"),
        (["model=tiny_moe", "model.moe.capacity=2"], "model.moe.capacity is 2.0.*expert_choice"),
        (["model=tiny_moe", "model.moe.top_k=9"], "model.moe.top_k is 9 and there are 8 experts"),
        (["model=tiny_moe", "model.moe.groups.text=2"], "groups is .*routing=modality_groups"),
        (["model=tiny_moe", "model.biases=true"], "without biases: set model.ffn=swiglu"),
        (
            ["model=tiny_moe", "model.width=132", "model.heads=2"],
            "model.width is 132.*a multiple of 8",
        ),
        (["model=tiny_moe", "model.moe.group_rows=0"], "model.moe.group_rows is 0"),
        (["model=tiny_moma", "model.moe.capacity=5"], "model.moe.capacity is 5.0 and there are 4"),
        (["model=tiny_moma", "model.moe.experts=4"], "model.moe.experts is 4 .*leave one of them"),
        (["model=tiny_moma", "model.moe.top_k=2"], "model.moe.top_k is 2 .*does not use it"),
        (["model=tiny_moma", "model.moe.groups.taste=2"], "Key 'taste'"),
        (["model.mod.capacity=0.5"], "model.mod.every is null.*for example to 2"),
        (["model.mod.every=2", "model.mod.capacity=1.5"], "model.mod.capacity is 1.5; it is a fra"),
        (["model.mod.every=0"], "model.mod.every is 0; set it above 0"),
        (["model=tiny_moma", "model.mod={every:2,group_rows:2}"], "moe.group_rows is 1 and .*mult"),
        (["model.moe.routing=modality_hard"], "groups is empty; say how many"),
        (["model=tiny_moma", "model.moe.routing=modality_hard"], "set them to 1, or model.moe.ro"),
    ],
)
def test_describe_refuses_in_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        describe(overrides)
    assert "\n" not in str(caught.value)


def test_every_preset_is_in_the_tables() -> None:
    assert set(PRESETS) == PUBLISHED.keys() | PUBLISHED_SPARSE.keys()
    assert describe([]).model == preset("tiny") == ModelConfig()
