"""Experts: who takes what, what comes out, and what it costs, against plain loops."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmm.batch import Modality, PackedBatch
from nmm.config import ExpertGroups, ModelConfig, MoEConfig, Routing
from nmm.model import build
from nmm.model.dispatch import collect, distribute, slots_of_choices
from nmm.model.experts import grouped_linear
from nmm.model.moe import MoE
from nmm.model.router import Assignment, highest
from nmm.routing import BALANCE, DROPPED, ENTROPY, MORE_COLUMNS, TOKENS, Routed
from tests.batches import pack, random_rows
from tests.family import batch_for
from tests.sparse import ROUTINGS, SPARSE, by_loops

SAME = {"rtol": 1e-5, "atol": 1e-6}
WITH_ROUTER = [name for name, config in SPARSE.items() if config.moe.has_router]


def layer_of(config: ModelConfig) -> MoE:
    """The first layer of a model, with a router that has opinions."""
    layer = build(config, seed=0).blocks[0].ffn
    assert isinstance(layer, MoE)
    for weight in layer.router.parameters():
        weight.data.mul_(30)
    return layer.eval()


def tokens_of(config: ModelConfig, *, rows: int = 4, length: int = 12) -> tuple[Tensor, Tensor]:
    """x [B, L, D] and modality [B, L]: texts, images and padding in rows of different shares."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(rows, length, config.width, generator=draw)
    is_image = torch.rand(rows, length, generator=draw) < torch.linspace(0, 0.8, rows)[:, None]
    modality = torch.where(is_image, Modality.image, Modality.text).byte()
    modality[:, -2:] = Modality.pad
    modality[0, -5:] = Modality.pad
    return x, modality


def assignment(layer: MoE, x: Tensor, modality: Tensor) -> Assignment:
    return layer.router(x.flatten(0, 1), modality.reshape(-1, layer.group_rows * x.shape[1]))


def taken_by(found: Assignment, *, tokens: int) -> Tensor:
    """bool[T, E]: who takes what, read off the slots that count."""
    experts = len(found.slots.ends)
    expert = torch.searchsorted(found.slots.ends, torch.arange(len(found.weight)), right=True)
    taken = torch.zeros(tokens, experts, dtype=torch.bool)
    counts = torch.zeros(len(expert), dtype=torch.bool)
    counts[found.slots.by_token] = found.weight > 0
    taken[found.slots.token[counts], expert[counts]] = True
    assert taken.sum() == counts.sum()  # nobody takes a token twice
    return taken


@pytest.mark.parametrize("name", SPARSE)
def test_equals_a_loop_over_tokens_and_experts(name: str) -> None:
    config = SPARSE[name]
    layer = layer_of(config)
    x, modality = tokens_of(config)
    parameters = [*layer.parameters()]
    real = (modality != Modality.pad)[..., None]
    found = layer(x.requires_grad_(), modality).output * real
    expected = by_loops(layer, x, modality, config=config.moe)
    torch.testing.assert_close(found, expected.float(), **SAME)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad((found * weight).sum(), [x, *parameters])
    theirs = torch.autograd.grad((expected * weight).sum(), [x, *parameters])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert other.abs().max() > 1e-3


def test_all_that_is_taken_has_a_slot() -> None:
    """0.29 of 1,000 tokens are 290 in each of three groups; of all 3,000 rounding makes 869."""
    moe = MoEConfig(
        Routing.expert_choice, groups=ExpertGroups(text=1, image=1), capacity=0.29, hidden=8
    )
    config = replace(SPARSE["moma"], moe=moe)
    x = torch.randn(3, 1000, config.width, generator=torch.Generator().manual_seed(1))
    modality = torch.full((3, 1000), Modality.text).byte()
    found = assignment(layer_of(config), x, modality)
    assert taken_by(found, tokens=3000).sum(dim=0).tolist() == [870, 0]
    assert (found.slots.ends.diff() >= 0).all()


@pytest.mark.parametrize("name", SPARSE)
def test_slots_are_conserved(name: str) -> None:
    """Tokens are taken K times, or experts take exactly their part; none of another modality."""
    config = SPARSE[name].moe
    layer = layer_of(SPARSE[name])
    x, modality = tokens_of(SPARSE[name])
    found = assignment(layer, x, modality)
    flat = modality.flatten()
    taken, first = taken_by(found, tokens=len(flat)), 0
    for group, experts in config.sizes.items():
        here = taken[:, first : first + experts]
        held = flat != Modality.pad if group == "all" else flat == Modality[group]
        if group != "all":
            assert not here[(flat != Modality.pad) & ~held].any()
        if config.chooses_tokens:
            by_rows = held.view(-1, config.group_rows * x.shape[1])
            each = [int(n * config.capacity / experts) for n in by_rows.sum(dim=1).tolist()]
            counts = here.view(len(each), -1, experts).sum(dim=1)
            assert counts.tolist() == [[n] * experts for n in each]
            assert not here[~held].any()
        else:
            assert (here[held].sum(dim=1) == config.top_k).all()
        first += experts
    dropped = (~taken.any(dim=1))[flat != Modality.pad].sum()
    table = found.statistics
    torch.testing.assert_close(
        table[:, : taken.shape[1]].sum(dim=0), taken[flat != Modality.pad].sum(dim=0).float()
    )
    assert table[:, DROPPED].sum() == dropped
    for modality_of in Modality:
        count = 0 if modality_of is Modality.pad else int((flat == modality_of).sum())
        assert table[modality_of, TOKENS] == count


def test_equals_are_taken_in_their_order_whatever_rounding_makes_of_them() -> None:
    """Of three that are equal but for 1e-6 two are taken; of two exactly equal ones the first."""
    score = torch.tensor([[0.2, 1 - 1e-6, 1 + 1e-6, 1.0, 0.201], [-1.0, 3.0, 3.0, 3.0, -1.0]])
    taken = highest(score, limit=torch.tensor([2, 4]))
    assert taken.int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_random_experts_drop_as_many_tokens_as_independent_choices() -> None:
    """With E experts that each take 1/E at random, (1 - 1/E)^E of the tokens are left."""
    for experts, expected in ((2, 0.250), (4, 0.316), (8, 0.344)):
        moe = MoEConfig(Routing.expert_choice, experts=experts)
        config = replace(SPARSE["expert choice"], width=64, moe=moe)
        x, modality = tokens_of(config, rows=8, length=512)
        table = assignment(layer_of(config), x, modality).statistics.sum(dim=0)
        assert table[DROPPED] / table[TOKENS] == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("name", ["token choice", "top 2", "groups"])
def test_balance_is_that_of_the_papers_formula(name: str) -> None:
    """E / (K N) sum_e n_e p_e over every group of rows and modality, weighted by its tokens."""
    config = SPARSE[name].moe
    layer, (x, modality) = layer_of(SPARSE[name]), tokens_of(SPARSE[name])
    found = assignment(layer, x, modality)
    scores = x.flatten(0, 1) @ layer.router.get_parameter("weight").T
    taken = taken_by(found, tokens=len(scores))
    expected, z, first = torch.zeros(()), torch.zeros(()), 0
    for group, experts in config.sizes.items():
        chance = scores[:, first : first + experts].softmax(dim=1)
        log_z = scores[:, first : first + experts].logsumexp(dim=1)
        held = modality != Modality.pad if group == "all" else modality == Modality[group]
        for rows in held.view(-1, config.group_rows * x.shape[1]).nonzero()[:, 0].unique():
            inside = torch.zeros_like(held).view(-1, config.group_rows * x.shape[1])
            inside[rows] = held.view_as(inside)[rows]
            inside = inside.flatten()
            on = taken[inside, first : first + experts].sum(dim=0)
            mean = chance[inside].mean(dim=0)
            expected = expected + experts / config.top_k * (on * mean).sum()
        z = z + log_z[held.flatten()].square().sum()
        first += experts
    torch.testing.assert_close(found.statistics[:, BALANCE].sum(), expected, **SAME)
    loss = config.balance_weight * expected + config.router_z_weight * z
    torch.testing.assert_close(found.auxiliary, loss, **SAME)
    ours, theirs = (
        torch.autograd.grad(each, layer.router.get_parameter("weight"))[0]
        for each in (found.auxiliary, loss)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert theirs.abs().max() > 1e-3


def test_balance_is_one_for_equal_experts_and_their_number_for_one_alone() -> None:
    config = SPARSE["token choice"]
    x, _ = tokens_of(config, rows=1, length=64)
    layer, modality = layer_of(config), torch.full((1, 64), Modality.text)
    weight = layer.router.get_parameter("weight")
    weight.data.zero_()
    weight.data[:, :4] = torch.eye(4)
    x[..., :4] = 30 * torch.eye(4)[torch.arange(64) % 4]
    sums = assignment(layer, x, modality).statistics.sum(dim=0)
    assert sums[BALANCE] / sums[TOKENS] == pytest.approx(1)
    assert sums[ENTROPY] == pytest.approx(0, abs=1e-4)
    x[..., :4] = 30 * torch.eye(4)[torch.zeros(64, dtype=torch.int64)]
    sums = assignment(layer, x, modality).statistics.sum(dim=0)
    assert sums[BALANCE] / sums[TOKENS] == pytest.approx(4)


def test_the_keys_of_the_log_are_means_over_tokens_and_layers() -> None:
    config = SPARSE["moma"]
    batch = batch_for(config, row_tokens=40)
    routed = Routed.zeros(shape=(2, len(Modality), 5 + MORE_COLUMNS), device=torch.device("cpu"))
    model = build(config, seed=0).eval()
    routed.add(model(batch).routed)
    keys, tables = routed.keys(config.moe), model(batch).routed
    assert keys["moe/balance"] is None
    tokens = int((batch.document > 0).sum())
    assert keys["moe/dropped_fraction"] == tables[..., DROPPED].sum() / (2 * tokens)
    assert 0 < keys["moe/entropy"] < 0.6932
    assert Routed(tables).keys(SPARSE["hard"].moe)["moe/entropy"] is None


@pytest.mark.parametrize("name", ["top 2", "hard", "moma"])
def test_the_signals_of_the_log_are_by_layer_and_modality(name: str) -> None:
    """Loads of those that may take it add up to what was taken; as many keys for any experts."""
    config = replace(SPARSE[name], moe=replace(SPARSE[name].moe, gumbel_noise=False))
    batch = batch_for(config, row_tokens=40)
    tables = build(config, seed=0).eval()(batch).routed.double()
    keys = Routed(tables).signals(config.moe)
    numbers = {"load", "dropped_fraction", *(["entropy"] if config.moe.has_router else [])}
    where = [f"{layer}/{kind}" for layer in (0, 1) for kind in ("text", "image")]
    assert keys.keys() == {f"signals/{number}/{place}" for number in numbers for place in where}
    for place in where:
        layer, modality = int(place[0]), Modality[place[2:]]
        row = tables[layer, modality]
        taken = row[:-MORE_COLUMNS] / row[TOKENS]
        assert keys[f"signals/load/{place}"] == pytest.approx(
            taken[taken > 0 if config.moe.groups.sizes else slice(None)].tolist(), abs=1e-4
        )
        assert keys[f"signals/dropped_fraction/{place}"] == row[DROPPED] / row[TOKENS]
    assert not Routed(torch.zeros_like(tables)).signals(config.moe)


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_minimised_does_not_depend_on_micro_batches(name: str) -> None:
    """Losses, statistics and every gradient of four rows at once, and of two and two."""
    config = replace(SPARSE[name], moe=replace(SPARSE[name].moe, gumbel_noise=False))
    model = build(config, seed=0)
    rows = random_rows(4, config=config, row_tokens=60)
    whole = pack(rows, config=config, row_tokens=60)
    found = []
    for batches in ([whole], [rows_of(whole, slice(0, 2)), rows_of(whole, slice(2, 4))]):
        model.zero_grad()
        outputs = [model(batch) for batch in batches]
        sum(output.loss_sum + output.auxiliary for output in outputs).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((gradients, sum(output.routed for output in outputs)))
    (whole_gradients, table), (halves, table_of_halves) = found
    torch.testing.assert_close(table_of_halves, table, **SAME)
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(halves[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0, name


def rows_of(batch: PackedBatch, rows: slice) -> PackedBatch:
    """Some rows of a batch, with their images."""
    fields = ("tokens", "modality", "source", "document", "image", "position", "labels")
    part = replace(batch, **{f: getattr(batch, f)[rows] for f in (*fields, "label_modality")})
    shown = part.image[part.image > 0]
    first, last = (int(shown.min()) - 1, int(shown.max())) if len(shown) else (0, 0)
    image = (part.image - first) * (part.image > 0)
    return replace(part, image=image, pixels=batch.pixels[first:last])


@pytest.mark.parametrize("name", ["token choice", "top 2", "hard", "groups"])
def test_tokens_that_choose_do_not_look_ahead(name: str) -> None:
    """The logits of a prefix stay when a later token changes; expert choice moves them."""
    config = replace(SPARSE[name], image=replace(SPARSE[name].image))
    for other, same in ((config, True), (SPARSE["expert choice"], False)):
        model = build(other, seed=0).eval()
        for layer in model.blocks:
            for weight in layer.ffn.router.parameters():
                weight.data.mul_(30)
        batch = pack([[(30,)]], config=other, row_tokens=32)
        before = model.logits(batch)
        batch.tokens[0, 20:30] = batch.tokens[0, 20:30].flip(0)
        moved = (model.logits(batch) - before).abs().amax(dim=-1)[0]
        assert moved[20:29].max() > 1e-3
        assert (moved[:20].max() < 1e-6) == same


def test_rows_at_the_end_of_an_evaluation_are_groups_too() -> None:
    """Three rows in groups of two are two groups, the last one filled with padding."""
    config = SPARSE["moma"]
    layer, (x, modality) = layer_of(config), tokens_of(config)
    found = layer(x[:3], modality[:3]).output
    assert found.shape == x[:3].shape
    torch.testing.assert_close(found[:2], layer(x, modality).output[:2], **SAME)
    alone = layer(x[2:3], modality[2:3]).output
    torch.testing.assert_close(found[2:], alone, **SAME)


def test_noise_is_drawn_in_training_only_and_is_the_difference_of_gumbels() -> None:
    moe = MoEConfig(Routing.expert_choice, experts=2, gumbel_noise=True)
    config = replace(SPARSE["expert choice"], moe=moe)
    layer, (x, modality) = layer_of(config), tokens_of(config, rows=8, length=500)
    plain = assignment(layer, x, modality)
    torch.testing.assert_close(assignment(layer, x, modality).weight, plain.weight)
    layer.train()
    layer.router.get_parameter("weight").data.zero_()
    torch.manual_seed(0)
    chance = assignment(layer, x, modality).weight.detach()
    # Each expert takes the higher half.
    draw = torch.distributions.Gumbel(0.0, 1.0).sample((2, 100_000))
    higher = (draw[0] - draw[1]).sort().values[50_000:]
    assert chance[chance > 0].logit().mean() == pytest.approx(higher.mean().item(), abs=0.05)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_routers_score_in_fp32_and_round_only_what_goes_back(
    dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SPARSE["token choice"], width=64)
    layer = layer_of(config).to(dtype).router
    x = torch.randn(200, 64).to(dtype).requires_grad_()
    modality = torch.full((1, 200), int(Modality.text), dtype=torch.uint8)
    upstream = torch.randn(200 * config.moe.top_k)

    def gradients(weight: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        layer.weight = nn.Parameter(weight)
        found = layer(x, modality)
        loss = (found.weight * upstream).sum() + found.auxiliary
        return found.weight, list(torch.autograd.grad(loss, [x, layer.weight]))

    weight = layer.weight.detach()
    mine, grads = gradients(weight, x)
    with monkeypatch.context() as patched:  # what autograd makes of it
        patched.setattr("nmm.model.router._logits", lambda x, weight: weight @ x.t())
        exact, exact_grads = gradients(weight.float(), x.detach().float().requires_grad_())
    assert mine.equal(exact)
    for grad, right in zip(grads, exact_grads, strict=True):
        assert grad.dtype is dtype
        assert (grad - right).norm() < close * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traps_of_grouped_products(dtype: torch.dtype) -> None:
    """Empty experts at every place, and a gradient without strides, as a sum gives."""
    draw = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 3, 3, 10, 10], dtype=torch.int32)
    x = torch.randn(10, 16, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(5, 24, 16, generator=draw).to(dtype).requires_grad_()
    for _ in range(3):  # what is not written would be what was there before
        torch.full((5, 24, 16), 7.0, dtype=dtype)
        grad_x, grad_weight = torch.autograd.grad(
            grouped_linear(x, weight, ends).sum(), [x, weight]
        )
        expected_x, expected_weight = torch.autograd.grad(_each(x, weight, ends).sum(), [x, weight])
        torch.testing.assert_close(grad_x, expected_x)
        torch.testing.assert_close(grad_weight, expected_weight)
        assert (grad_weight[[0, 2, 4]] == 0).all()


def _each(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One product after the other."""
    parts = x.tensor_split(ends[:-1].tolist())
    return torch.cat([nn.functional.linear(part, w) for part, w in zip(parts, weight, strict=True)])


@pytest.mark.parametrize("name", SPARSE)
def test_no_row_is_left_out_of_the_grouped_products(name: str) -> None:
    """Rows behind the last offset would hold whatever was in memory, and NaN times 0 is NaN."""
    for rows, length in ((4, 12), (1, 1), (2, 3)):
        layer = layer_of(SPARSE[name])
        x, modality = tokens_of(SPARSE[name], rows=4, length=max(length, 6))
        x, modality = x[:rows, :length], modality[:rows, :length]
        more = -rows % layer.group_rows
        padded = torch.cat([x, x[:1].expand(more, -1, -1)])
        found = assignment(layer, padded, torch.cat([modality, modality[:1].expand(more, -1)]))
        assert found.slots.ends[-1] == len(found.slots.token) == len(found.weight)
        assert (found.slots.ends.diff(prepend=found.slots.ends.new_zeros(1)) >= 0).all()
        assert found.slots.by_token.sort().values.tolist() == list(range(len(found.weight)))


def test_a_layer_with_one_modality_only_is_differentiable_everywhere() -> None:
    """Experts without tokens get a gradient of zero, not none: other processes wait for it."""
    for name, config in SPARSE.items():
        layer, (x, modality) = layer_of(config), tokens_of(config)
        layer(x, torch.full_like(modality, Modality.text)).output.sum().backward()
        for parameter_name, parameter in layer.named_parameters():
            assert parameter.grad is not None, (name, parameter_name)
            assert parameter.grad.isfinite().all(), (name, parameter_name)


def test_any_list_of_modalities_has_experts_of_its_own() -> None:
    sizes = {"text": 2, "speech": 1, "molecule": 3}
    for routing in (Routing.modality_groups, Routing.expert_choice):
        moe = MoEConfig(routing, groups=ExpertGroups(**sizes))
        config = replace(SPARSE["groups"], moe=moe)
        layer, (x, _) = layer_of(config), tokens_of(config)
        kinds = torch.tensor([Modality.text, Modality.speech, Modality.molecule, Modality.pad])
        modality = kinds[torch.arange(48).view(4, 12) % 4].byte()
        found = layer(x, modality).output * (modality != Modality.pad)[..., None]
        expected = by_loops(layer, x, modality, config=moe)
        torch.testing.assert_close(found, expected.float(), **SAME)
        assert (expected.abs().amax(dim=-1)[modality == Modality.speech] > 0).all()


def test_inner_sizes_that_kernels_refuse_are_filled_up() -> None:
    config = replace(SPARSE["token choice"], ffn_hidden=37)
    layer, (x, modality) = layer_of(config), tokens_of(config)
    found = layer(x, modality).output * (modality != Modality.pad)[..., None]
    expected = by_loops(layer, x, modality, config=config.moe)
    torch.testing.assert_close(found, expected.float(), **SAME)
    found.sum().backward()
    assert layer.experts.w2.grad is not None
    assert layer.experts.w2.grad.shape == (4, 32, 37)


class Watched(TorchDispatchMode):
    """Notes what is computed that a GPU would have to be waited for, or would do in any order."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")
    ADDS = ("scatter_add", "scatter_reduce", "index_put", "index_reduce", "dense_backward")

    def __init__(self) -> None:
        super().__init__()
        self.computed, self.found = 0, []

    def __torch_dispatch__(
        self, func: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name, self.computed = str(func), self.computed + 1
        by_flags = name == "aten.index.Tensor" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_flags or any(word in name for word in self.WAITS + self.ADDS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SPARSE)
def test_nothing_waits_for_counts_or_is_left_to_chance(name: str) -> None:
    """There and back. What index_add adds to, the score of a slot, is of no other that counts."""
    layer, (x, modality) = layer_of(SPARSE[name]).train(), tokens_of(SPARSE[name])
    with Watched() as watched:
        fed = layer(x.requires_grad_(), modality)
        (fed.output.square().sum() + fed.auxiliary).backward()
    assert watched.computed > 20
    assert watched.found == []


def test_what_waits_is_seen() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with Watched() as watched:
        x[torch.tensor([0, 0, 2])].sum().backward()
        assert x[x.detach().sum(dim=1) < 9].sum().item() == x.sum().item()
    waits = {"aten.index.Tensor", "aten.index_put.default", "aten._local_scalar_dense.default"}
    assert waits <= set(watched.found)


def test_moving_there_and_back_are_each_others_gradients() -> None:
    """Against plain indexing, in float64, with tokens that have several slots."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, generator=draw, requires_grad=True)
    weight = torch.rand(14, dtype=torch.float64, generator=draw, requires_grad=True)
    slots = slots_of_choices(torch.randint(0, 3, (7, 2), generator=draw), experts=3)

    def there_and_back(x: Tensor, weight: Tensor) -> Tensor:
        return collect(distribute(x, slots).square(), weight, slots)

    token = slots.token[slots.by_token]
    expected = torch.zeros_like(x).index_add(0, token, weight[:, None] * x[token] ** 2)
    torch.testing.assert_close(there_and_back(x, weight), expected)
    ours = torch.autograd.grad(there_and_back(x, weight).cos().sum(), [x, weight])
    theirs = torch.autograd.grad(expected.cos().sum(), [x, weight])
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1].to(ours[1].dtype), rtol=1e-5, atol=1e-6)


def test_experts_and_routers_begin_as_the_table_says() -> None:
    config = replace(SPARSE["groups"], width=256, ffn_hidden=200)
    weights = dict(build(config, seed=0).named_parameters())
    dense = dict(build(replace(config, moe=MoEConfig()), seed=0).named_parameters())
    for layer in range(2):
        names = {"w1": "gate_up", "w3": "gate_up", "w2": "down"}
        for ours, theirs in names.items():
            found = weights[f"blocks.{layer}.ffn.experts.{ours}"].std().item()
            expected = dense[f"blocks.{layer}.ffn.{theirs}.weight"].std().item()
            assert found == pytest.approx(expected, rel=0.02)
        std = weights[f"blocks.{layer}.ffn.router.weight"].std().item()
        assert std == pytest.approx(0.02, rel=0.1)
    same = [name for name in dense if ".ffn." not in name]
    assert all(torch.equal(weights[name], dense[name]) for name in same)
    assert len({w.sum().item() for w in weights["blocks.0.ffn.experts.w1"]}) == 5
    assert ROUTINGS["groups"].total_experts == 5
