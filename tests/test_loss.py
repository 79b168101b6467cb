"""The loss without whole logits: the same numbers and gradients, and no large tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nmm.config import LossBackend, ModelConfig
from nmm.errors import UserError
from nmm.model import build
from nmm.model.loss import CHUNK_POSITIONS, Losses, chunked, liger, losses
from tests.batches import pack, small

WIDTH, IDS = 24, 301


def drawn(positions: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(IDS, WIDTH, generator=draw).mul(0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, IDS, (positions,), generator=draw)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float) -> Losses:
    """In float64 with all logits, differentiated by torch."""
    logits = hidden.double() @ weight.double().T
    log_partition = logits.logsumexp(dim=-1)
    token_losses = log_partition - logits[torch.arange(len(labels)), labels]
    loss_sum = (token_losses + z_loss * log_partition.square()).sum()
    return Losses(loss_sum, token_losses, log_partition)


def with_gradients(
    function: Callable[..., Losses], given: tuple[Tensor, Tensor, Tensor], **options: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Its three outputs, and the gradients of a mean that is taken from the sum."""
    found = function(*given, **options)
    gradients = torch.autograd.grad(found.loss_sum / 7, given[:2])
    return [x.detach().double() for x in found], [x.double() for x in gradients]


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("positions", "chunk_positions"), [(0, 4), (1, 4), (8, 4), (50, 16)])
def test_chunked_equals_plain(positions: int, chunk_positions: int, z_loss: float) -> None:
    given = drawn(positions)
    expected = with_gradients(plain, given, z_loss=z_loss)
    found = with_gradients(chunked, given, z_loss=z_loss, chunk_positions=chunk_positions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        without = chunked(*given, z_loss=z_loss, chunk_positions=chunk_positions)
    assert all(torch.equal(x.double(), y) for x, y in zip(without, found[0], strict=True))


def test_only_the_sum_carries_gradients() -> None:
    found = chunked(*drawn(9), z_loss=0.0)
    assert [x.requires_grad for x in found] == [True, False, False]


def test_bf16_gradients_are_near() -> None:
    """Rounding of inputs and products only: chunks are added up in float32."""
    given = drawn(500, dtype=torch.bfloat16)
    (_, expected), (_, found) = (
        with_gradients(plain, given, z_loss=0.0),
        with_gradients(chunked, given, z_loss=0.0, chunk_positions=10),
    )
    for gradient, truth in zip(found, expected, strict=True):
        assert (gradient - truth).norm() < 0.01 * truth.norm()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = (x.numel() for x in tree_iter(out) if isinstance(x, Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return out


def largest(run: Callable[[], Tensor]) -> int:
    with Largest() as seen:
        run().backward()
    return seen.elements


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    given = drawn(400)
    assert largest(lambda: plain(*given, z_loss=0.0).loss_sum) == 400 * IDS
    found = largest(lambda: chunked(*given, z_loss=1e-3, chunk_positions=40).loss_sum)
    assert found == 40 * IDS


def test_no_tensor_of_a_training_step_is_larger_than_a_chunk_of_logits() -> None:
    config = ModelConfig(width=32, depth=1, heads=2, vocab_size=2000, image=small().image)
    batch = pack([[(40,)] * 40] * 2, config=config, row_tokens=1600)
    model = build(config, seed=0)
    labels = int((batch.labels >= 0).sum())
    assert labels > 2 * CHUNK_POSITIONS
    assert largest(lambda: model(batch).loss_sum) == CHUNK_POSITIONS * config.vocab_size


def test_the_z_loss_is_minimised_and_not_logged() -> None:
    plain_config = small()
    z_config = ModelConfig(**{**vars(plain_config), "z_loss": 0.1})
    batch = pack([[(20,), (7,)]], config=plain_config, row_tokens=30)
    without, with_z = (build(config, seed=0)(batch) for config in (plain_config, z_config))
    assert torch.equal(with_z.token_losses, without.token_losses)
    added = 0.1 * without.log_partition.square().sum()
    torch.testing.assert_close(with_z.loss_sum, without.loss_sum + added)
    assert added > 0.1


def test_a_negative_z_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.z_loss is -0.1"):
        ModelConfig(z_loss=-0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_equals_chunked(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    given = drawn(500, dtype=dtype)
    on_gpu = tuple(x.detach().cuda().requires_grad_(x.is_floating_point()) for x in given)
    assert losses(*on_gpu, backend=LossBackend.auto, z_loss=0.0).loss_sum.is_cuda
    for z_loss in (0.0, 1e-2):
        expected = with_gradients(chunked, on_gpu, z_loss=z_loss)
        found = with_gradients(liger, on_gpu, z_loss=z_loss)
        tolerance = 1e-4 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
