"""Every parameter is of one part, whose sizes are those of the accounting; sums become keys."""

from dataclasses import replace

import pytest
import torch

from nmm.flops import num_parameters
from nmm.model import build
from nmm.signals import PARTS, Signals, part
from tests.batches import IMAGE, pack, small
from tests.family import FAMILY
from tests.sparse import DEEP, SPARSE

CPU = torch.device("cpu")
MOMA = SPARSE["moma"]


@pytest.mark.parametrize("name", FAMILY)
def test_parts_are_those_of_the_accounting(name: str) -> None:
    """The biases of attention and feed-forward are counted together there."""
    sizes = dict.fromkeys(PARTS, 0)
    for parameter_name, parameter in build(FAMILY[name], seed=0).named_parameters():
        sizes[part(parameter_name)] += parameter.numel()
    counted = num_parameters(FAMILY[name])
    assert sizes["embedding"] == counted.embedding + counted.position
    assert sizes["image"] == counted.patch + counted.connector + counted.vision
    assert sizes["attention"] + sizes["ffn"] == counted.attention + counted.ffn + counted.bias
    assert (sizes["norm"], sizes["head"]) == (counted.norm, counted.head)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vision.blocks.3.attention.qkv.weight", "image"),
        ("connector.weight", "image"),
        ("position.weight", "embedding"),
        ("blocks.0.attention.q_norm.weight", "norm"),
        ("blocks.0.ffn.down.bias", "ffn"),
    ],
)
def test_part(name: str, expected: str) -> None:
    assert part(name) == expected


def test_nothing_is_watched_unless_asked() -> None:
    config = small()
    model = build(config, seed=0)
    batch = pack([[(2, IMAGE, 3), (9,)]], config=config, row_tokens=30)
    plain, watched = model(batch), model(batch, watch=True)
    assert plain.layer_squares.shape == (0,)
    assert watched.layer_squares.shape == (config.depth,)
    assert torch.equal(plain.loss_sum, watched.loss_sum)


def test_sums_become_means() -> None:
    signals = Signals.zeros(replace(MOMA, width=8), device=CPU)
    for log_partition in ([1.0, 2.0], [6.0]):
        signals.add(
            layer_squares=torch.tensor([16.0, 144.0]), log_partition=torch.tensor(log_partition)
        )
    signals.add_gradient("blocks.0.ffn.experts.w1", torch.tensor([0.0, 9.0]))
    signals.add_gradient("blocks.1.ffn.router.weight", torch.full((5, 8), 2.0))
    keys = signals.keys(tokens=4, labels=3)
    assert keys["signals/output_rms/0"] == pytest.approx(1.0)
    assert keys["signals/output_rms/1"] == pytest.approx(3.0)
    assert keys["signals/logit_z/mean"] == pytest.approx(3.0)
    assert keys["signals/logit_z/rms"] == pytest.approx((41 / 3) ** 0.5)
    assert keys["signals/grad_norm/ffn"] == pytest.approx((81 + 160) ** 0.5)
    assert keys["signals/grad_norm/head"] == 0
    assert keys["signals/router_grad_norm/0"] == 0
    assert keys["signals/router_grad_norm/1"] == pytest.approx(160**0.5)
    assert signals.keys(tokens=4, labels=0)["signals/logit_z/mean"] is None


@pytest.mark.parametrize("length", [1, 7, 40])
def test_a_router_s_gradient_is_told_by_modality_however_it_is_cut(length: int) -> None:
    """2 experts for text and 3 for images, each row of the router 8: 16 elements, then 24."""
    signals = Signals.zeros(replace(MOMA, width=8), device=CPU)
    gradient = torch.arange(40.0)
    for start in range(0, 40, length):
        piece = gradient[start : start + length]
        signals.add_gradient("blocks.1.ffn.router.weight", piece, start=start)
    signals.add_gradient("blocks.0.ffn.router.auxiliary.image.2.weight", torch.ones(3), start=9)
    keys = signals.keys(tokens=1, labels=1)
    norms = {"": gradient, "/text": gradient[:16], "/image": gradient[16:]}
    for name, part_of_it in norms.items():
        assert keys[f"signals/router_grad_norm/1{name}"] == pytest.approx(part_of_it.norm().item())
    assert keys["signals/router_grad_norm/0/text"] == 0
    assert keys["signals/router_grad_norm/0/image"] == pytest.approx(3**0.5)


def test_only_routers_have_keys_of_routers() -> None:
    config = small()
    names = {"": config, "depth": DEEP["mod"], "hard": SPARSE["hard"], "one": SPARSE["top 2"]}
    keys = {
        name: [k for k in Signals.zeros(each, device=CPU).keys(tokens=1, labels=1) if "router" in k]
        for name, each in names.items()
    }
    assert keys == {
        "": [],
        "depth": ["signals/depth_router_grad_norm/0"],
        "hard": [],
        "one": ["signals/router_grad_norm/0", "signals/router_grad_norm/1"],
    }
