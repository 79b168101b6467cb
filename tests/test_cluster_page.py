"""docs/cluster.md: sizes are computed, activations counted, messages those of the code."""

import re
import subprocess
import sys

import pytest
import torch

from launch.sizing import activation_bytes
from nmm.config import AttentionBackend, ImageConfig, ModelConfig
from nmm.model import build
from tests.batches import pack
from tests.test_documentation import ROOT, named, table
from tests.test_structure import files

PAGE = ROOT / "docs" / "cluster.md"
TOKENS = 256
# What torch and Slurm say, in the failure table.
OF_OTHERS = (
    "DataLoader worker ... is killed by signal",
    "RANK 0 ... Watchdog caught collective operation timeout",
    "PENDING (BeginTime)",
    "torchrun failed: RendezvousTimeoutError",
    "torchrun failed: RendezvousConnectionError",
)


def test_the_table_is_what_the_command_prints() -> None:
    program = [sys.executable, "-m", "launch.sizing"]
    printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()
    assert printed.count("\n") > 10
    assert printed in PAGE.read_text()


def test_the_messages_of_the_failure_table_are_those_of_the_code() -> None:
    """Word for word between what differs each time: numbers, names and dots."""
    code = " ".join(path.read_text() for path in files("*.py"))
    code = re.sub(r'"\s+f?"', "", code)  # a sentence over several lines
    messages = {word for row in table(PAGE, first="symptom") for word in named(row[0])}
    messages -= {*OF_OTHERS, "--requeue"}
    assert len(messages) > 7
    for message in sorted(messages):
        literal = re.sub(r"gpu-\d+|SIGKILL|process \d+ of \d+|process \d+|step \d+", "...", message)
        words = [part.strip(" ():") for part in literal.split("...")]
        assert all(part in code for part in words), message


def kept_bytes(model: ModelConfig) -> int:
    """What autograd holds after a forward pass in bf16, parameters excluded."""
    module = build(model, seed=0).to(torch.bfloat16)
    batch = pack([[(TOKENS,)]], config=model, row_tokens=TOKENS)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(batch)
    assert output.loss_sum > 0
    storages = {key: tensor.untyped_storage() for key, tensor in kept.items()}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


@pytest.mark.parametrize(("width", "hidden"), [(256, 512), (256, 1024), (512, 1408)])
def test_activations_are_what_autograd_keeps(width: int, hidden: int) -> None:
    """Of one block more, so that what is kept once does not count."""
    one, two = (
        ModelConfig(
            width=width,
            depth=depth,
            heads=4,
            ffn_hidden=hidden,
            vocab_size=64,
            attention=AttentionBackend.mask,
            image=ImageConfig(side_pixels=8, patch_pixels=4),
        )
        for depth in (1, 2)
    )
    counted = activation_bytes(one, tokens=TOKENS, recomputes=False)
    assert kept_bytes(two) - kept_bytes(one) == pytest.approx(counted, rel=0.01)
