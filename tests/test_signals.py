"""Every parameter is of one part, whose sizes are those of the accounting; sums become keys."""

from dataclasses import asdict

import pytest
import torch

from nmm.flops import num_parameters
from nmm.model import build
from nmm.signals import PARTS, Signals, part
from tests.batches import IMAGE, pack, small

AS_COUNTED = {"image": "patch"}  # the name of a part in nmm/flops.py, where it differs


def test_parts_are_those_of_the_accounting() -> None:
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in build(small(), seed=0).named_parameters():
        sizes[part(name)] += parameter.numel()
    counted = asdict(num_parameters(small()))
    assert {AS_COUNTED.get(name, name): size for name, size in sizes.items()} == counted


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
    signals = Signals.zeros(layers=2, width=3, device=torch.device("cpu"))
    for log_partition in ([1.0, 2.0], [6.0]):
        signals.add(
            layer_squares=torch.tensor([6.0, 54.0]), log_partition=torch.tensor(log_partition)
        )
    signals.add_gradient("ffn", torch.tensor(9.0))
    signals.add_gradient("ffn", torch.tensor(16.0))
    keys = signals.keys(tokens=4, labels=3)
    assert keys["signals/output_rms/0"] == pytest.approx(1.0)
    assert keys["signals/output_rms/1"] == pytest.approx(3.0)
    assert keys["signals/logit_z/mean"] == pytest.approx(3.0)
    assert keys["signals/logit_z/rms"] == pytest.approx((41 / 3) ** 0.5)
    assert keys["signals/grad_norm/ffn"] == pytest.approx(5.0)
    assert keys["signals/grad_norm/head"] == 0
    assert signals.keys(tokens=4, labels=0)["signals/logit_z/mean"] is None
