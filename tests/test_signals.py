"""Every parameter is of one part, whose sizes are those of the accounting; sums become keys."""

import pytest
import torch

from nmm.flops import num_parameters
from nmm.model import build
from nmm.signals import PARTS, Signals, part
from tests.batches import IMAGE, pack, small
from tests.family import FAMILY


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
    signals = Signals.zeros(layers=2, width=3, has_routers=True, device=torch.device("cpu"))
    for log_partition in ([1.0, 2.0], [6.0]):
        signals.add(
            layer_squares=torch.tensor([6.0, 54.0]), log_partition=torch.tensor(log_partition)
        )
    signals.add_gradient("blocks.0.ffn.experts.w1", torch.tensor(9.0))
    signals.add_gradient("blocks.1.ffn.router.weight", torch.tensor(16.0))
    keys = signals.keys(tokens=4, labels=3)
    assert keys["signals/output_rms/0"] == pytest.approx(1.0)
    assert keys["signals/output_rms/1"] == pytest.approx(3.0)
    assert keys["signals/logit_z/mean"] == pytest.approx(3.0)
    assert keys["signals/logit_z/rms"] == pytest.approx((41 / 3) ** 0.5)
    assert keys["signals/grad_norm/ffn"] == pytest.approx(5.0)
    assert keys["signals/grad_norm/head"] == 0
    assert keys["signals/router_grad_norm/0"] == 0
    assert keys["signals/router_grad_norm/1"] == pytest.approx(4.0)
    assert signals.keys(tokens=4, labels=0)["signals/logit_z/mean"] is None


def test_only_routers_have_keys_of_routers() -> None:
    signals = Signals.zeros(layers=2, width=3, has_routers=False, device=torch.device("cpu"))
    assert not any("router" in key for key in signals.keys(tokens=1, labels=1))
