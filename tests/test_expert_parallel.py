"""Experts on several processes and on one: the same losses, gradients, norms, weights, logs."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from nmm.batch import Modality
from nmm.config import Config, ScheduleConfig, compose, load
from nmm.errors import UserError
from nmm.exchange import rows_of_blocks
from nmm.expert_parallel import numbers_of, refuse_uneven
from nmm.export import write_export
from nmm.flops import num_parameters
from nmm.model import build
from nmm.pieces import WEIGHT, Stored
from nmm.routing import DROPPED, KEPT, MORE_COLUMNS, SEEN
from nmm.trained import FACTS, WEIGHTS, Trained
from tests import corpora
from tests.cases import launch, result_of
from tests.expert_parallel_cases import SPARSE, begun
from tests.test_engine import moves_by_rounding

STEPS, SAVED_AT, GOES_ON = 3, 2, 6
Shape = tuple[int, int, int]  # processes, ZeRO stage, processes that share experts
ALONE: Shape = (1, 1, 1)


def case(model: str, optim: str, shape: Shape, *, steps: int = STEPS, **others: object) -> dict:
    """A case of tests/expert_parallel_cases.py; one or two micro-batches for each process."""
    processes, stage, parts = shape
    called = "".join(f"-{key}" for key in others)
    return {
        "name": f"{model}-{optim}-{processes}x-zero{stage}-of{parts}-{steps}{called}",
        "model": model,
        "optim": optim,
        "precision": "fp32",
        "processes": processes,
        "zero_stage": stage,
        "expert_parallel": parts,
        "micro_batch": {1: 4, 2: 2, 4: 2}[processes],
        "switches": {},
        "rows": "",
        "poison": False,
        "source": None,
        "steps": steps,
        "corpus": str(corpora.corpus_directory()),
        "tokenizer": str(corpora.tokenizer_path()),
        **others,
    }


# Every stage with every number of processes that share; SGD hides no scale.
SHAPES: dict[tuple[str, str], list[Shape]] = {
    ("top 2", "sgd"): [(2, 1, 2), (2, 2, 2), (2, 3, 2), (4, 2, 2), (4, 3, 4)],
    ("top 2", "adamw"): [(2, 3, 2)],
    ("moma", "sgd"): [(4, 1, 2)],
    ("groups", "sgd"): [(2, 3, 2), (4, 2, 2)],
    ("late", "sgd"): [(2, 3, 2), (4, 1, 4)],
    ("late", "adamw"): [(2, 2, 2)],
    ("wide", "sgd"): [(4, 3, 2)],
    ("depth", "sgd"): [(2, 3, 2), (4, 1, 4)],
    ("depth of moma", "sgd"): [(2, 2, 2)],
}
PLAIN = {pair: [case(*pair, shape) for shape in [ALONE, *SHAPES[pair]]] for pair in SHAPES}
RECOMPUTING = case("groups", "sgd", (2, 3, 2), switches={"activation_checkpointing": True})
APART = {
    (model, rows): [case(model, "sgd", shape, rows=rows) for shape in [(2, 1, 1), (2, 3, 2)]]
    for model, rows in [
        ("groups", "apart"),
        ("moma", "apart"),
        ("depth of moma", "apart"),
        ("depth", "on one"),
    ]
}
POISONED = [
    case("top 2", "adamw", shape, poison=True) for shape in [(2, 1, 1), (2, 2, 2), (2, 3, 2)]
]
BF16 = [case("top 2", "adamw", shape, precision="bf16") for shape in [(2, 2, 2), (2, 3, 2)]]
# Late fusion has two learning rates and two weight decays.
UNDISTURBED = case("late", "adamw", ALONE, steps=SAVED_AT + GOES_ON)
SAVED = {shape: case("late", "adamw", shape, steps=SAVED_AT) for shape in [(4, 1, 4), (2, 3, 2)]}
RESUMED = [
    case("late", "adamw", new, steps=GOES_ON, source=SAVED[old]["name"])
    for old, new in [
        ((4, 1, 4), (4, 3, 2)),
        ((4, 1, 4), (1, 0, 1)),
        ((2, 3, 2), (4, 2, 4)),
        ((2, 3, 2), (2, 2, 1)),
    ]
]
CASES = [each for cases in (*PLAIN.values(), *APART.values()) for each in cases]
CASES += [RECOMPUTING, *POISONED, *BF16, UNDISTURBED, *SAVED.values(), *RESUMED]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, in one launch for every number of processes."""
    directory = tmp_path_factory.mktemp("expert_parallel")
    launch("tests.expert_parallel_cases", CASES, directory=directory)
    return directory


def found(directory: Path, case: dict) -> dict:
    return result_of(directory, case["name"])


@cache
def numbers(checkpoint: Path) -> dict[tuple[str, str], Tensor]:
    """Every whole parameter, and all that the optimizer keeps of it."""
    stored, flat = Stored(checkpoint), {}
    for name, weight in stored.weights():
        flat[name, WEIGHT] = weight.view(-1)
        for kind in stored.about.kinds:
            flat[name, kind] = torch.empty(weight.numel())
            stored.copy(flat[name, kind], name=name, kind=kind)
    return flat


def check_alike(directory: Path, case: dict, expected: dict, *, skipped: int = 0) -> None:
    """Losses, norms, statistics and signals of every step; all numbers after one and at the end.

    After one step AdamW's first moment is every gradient. Nothing is asked of the first `skipped`.
    """
    mine, theirs = found(directory, case), found(directory, expected)
    for key in ("losses", "norms"):
        one, other = mine[key][skipped:], theirs[key][skipped:]
        assert one == pytest.approx(other, rel=1e-5), (case["name"], key)
    for key in ("routed", "kept", "signals"):
        one, other = (torch.tensor(of[key][skipped:]) for of in (mine, theirs))
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-4), (case["name"], key)
    for when in ("first", "end"):
        one, other = (numbers(directory / of["name"] / when) for of in (case, expected))
        assert one.keys() == other.keys()
        for (name, kind), values in one.items():
            if moves_by_rounding(name, case["optim"]):
                continue
            norm, off = other[name, kind].norm(), (values - other[name, kind]).norm()
            assert off <= 1e-5 * norm + 1e-7, (case["name"], when, name, kind)


@pytest.mark.parametrize("pair", SHAPES, ids=" ".join)
def test_any_number_of_processes_may_share_experts(directory: Path, pair: tuple[str, str]) -> None:
    alone, *divided = PLAIN[pair]
    assert found(directory, alone)["losses"][-1] < found(directory, alone)["losses"][0] - 0.3
    assert max(found(directory, alone)["norms"]) > 1  # clipping takes part
    for each in divided:
        check_alike(directory, each, alone)


def test_held_out_losses_do_not_depend_on_who_has_the_experts(directory: Path) -> None:
    alone, *divided = PLAIN["top 2", "sgd"]
    expected = found(directory, alone)["held_out"]
    for each in divided:
        assert found(directory, each)["held_out"] == pytest.approx(expected, rel=1e-5), each["name"]


def test_blocks_that_run_twice_send_twice(directory: Path) -> None:
    check_alike(directory, RECOMPUTING, PLAIN["groups", "sgd"][0])


def test_the_load_is_far_from_even(directory: Path) -> None:
    """In the first step; of "late" two experts, all those of a process, get no token at all."""
    load = {}
    for model, times in {"top 2": 1.2, "wide": 1.4, "late": 1.2}.items():
        tables = torch.tensor(found(directory, PLAIN[model, "sgd"][0])["routed"][0])
        load[model] = tables[..., :-MORE_COLUMNS].sum(dim=1)
        most, mean = load[model].max(dim=1).values, load[model].mean(dim=1)
        assert (most > times * mean).all(), model
        assert tables[..., DROPPED].sum() == 0
    assert load["late"][0, 2:].tolist() == [0, 0]


@pytest.mark.parametrize("pair", APART, ids=" ".join)
def test_text_on_one_process_and_images_on_the_other(
    directory: Path, pair: tuple[str, str]
) -> None:
    """Or padding only, so that a block takes nothing there."""
    together, *divided = APART[pair]
    for each in divided:
        check_alike(directory, each, together)


def test_a_block_takes_nothing_on_a_process_that_has_padding_only(directory: Path) -> None:
    """Its experts, who serve the other process too, are asked all the same."""
    for each in APART["depth", "on one"]:
        (table,) = found(directory, each)["kept"][-1]
        kept = torch.tensor(table)[:, [KEPT, SEEN]]
        assert kept[Modality.text].min() > 0
        assert kept.sum(dim=0).tolist() == kept[Modality.text].tolist()


def test_a_gradient_that_is_no_number_reaches_all(directory: Path) -> None:
    """One process has it in its own experts; no process changes anything in that step."""
    together, *divided = POISONED
    begins = {name: p.detach().view(-1) for name, p in begun("top 2").named_parameters()}
    for each in [together, *divided]:
        applied = found(directory, each)["applied"]
        assert applied == [[step > 0] * each["processes"] for step in range(STEPS)]
        for (name, kind), values in numbers(directory / each["name"] / "first").items():
            assert torch.equal(values, begins[name] if kind == WEIGHT else 0 * values), name
    for each in divided:
        check_alike(directory, each, together, skipped=1)


def test_bf16_learns_like_fp32(directory: Path) -> None:
    expected = found(directory, PLAIN["top 2", "adamw"][0])
    for each in BF16:
        mine = found(directory, each)
        assert mine["losses"] != expected["losses"]
        assert mine["losses"] == pytest.approx(expected["losses"], rel=0.02)
        assert mine["norms"] == pytest.approx(expected["norms"], rel=0.1)


def test_every_process_holds_its_share_of_the_experts(directory: Path) -> None:
    for (model, _), cases in PLAIN.items():
        parts = num_parameters(SPARSE[model])
        depth, moe = SPARSE[model].depth, SPARSE[model].moe
        experts = depth * moe.total_experts * 3 * SPARSE[model].width * SPARSE[model].expert_hidden
        for each in cases:
            here = parts.total - experts + experts // each["expert_parallel"]
            if each["zero_stage"] < 3:
                assert found(directory, each)["parameters"] == [here] * each["processes"]
            states = found(directory, each)["states"]
            assert sum(states) == pytest.approx(parts.total, rel=0.01)  # and padding
            assert max(states) == pytest.approx(sum(states) / len(states), rel=0.1)


@pytest.mark.parametrize("each", RESUMED, ids=lambda each: each["name"])
def test_a_run_goes_on_with_experts_elsewhere(directory: Path, each: dict) -> None:
    """What is read and written again is the same to the bit; then six steps of the run."""
    read, written = directory / each["source"] / "end", directory / each["name"] / "first"
    one, other = numbers(read), numbers(written)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    after, expected = found(directory, each), found(directory, UNDISTURBED)
    assert after["stream"] == expected["stream"]
    for key in ("losses", "norms"):
        assert after[key] == pytest.approx(expected[key][SAVED_AT:], rel=1e-5), key


def test_exports_do_not_tell_who_had_the_experts(directory: Path, tmp_path: Path) -> None:
    """What 4 processes wrote, and what one wrote that read it: the same bytes and checksums."""
    (alone,) = [each for each in RESUMED if each["expert_parallel"] == each["processes"] == 1]
    config = Config(model=SPARSE["late"], data=corpora.config(), schedule=ScheduleConfig(9))
    written = []
    for checkpoint in (directory / alone["source"] / "end", directory / alone["name"] / "first"):
        model = build(config.model, seed=5)
        model.load_state_dict(dict(Stored(checkpoint).weights()))
        out = tmp_path / str(len(written))
        tokenizer = Tokenizer(config.data.tokenizer)
        write_export(Trained(config, model, tokenizer, name="a", step=2, tokens=9), out)
        written.append([(out / name).read_bytes() for name in (WEIGHTS, FACTS)])
    assert written[0] == written[1]
    assert f'"blocks.1.ffn.experts.{config.model.moe.experts - 1}.w1"'.encode() in written[0][1]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([8], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([4, 2], [[0, 1, 4], [2, 3, 5]]),
        ([3, 3, 3], [[0, 3, 6], [1, 4, 7], [2, 5, 8]]),
    ],
)
def test_every_process_has_a_part_of_every_group(
    sizes: list[int], expected: list[list[int]]
) -> None:
    parts = len(expected)
    assert [numbers_of(sizes, part=part, parts=parts) for part in range(parts)] == expected


def test_blocks_change_places() -> None:
    draw = torch.Generator().manual_seed(0)
    for blocks in (1, 2, 7):
        for _ in range(20):
            sizes = torch.randint(0, 4, (blocks,), generator=draw)
            order = torch.randperm(blocks, generator=draw)
            begins = [0, *sizes.cumsum(0).tolist()]
            expected = [row for j in order for row in range(begins[j], begins[j + 1])]
            rows = int(sizes.sum())
            assert rows_of_blocks(sizes, order_J=order, rows=rows).tolist() == expected


AUXILIARY = [
    "model.moe.auxiliary_routers=true",
    "parent.run=a",
    "parent.step=1",
    "parent.mode=auxiliary_routers",
]
MOD_AUXILIARY = ["model.mod.every=2", "model.mod.auxiliary_router=true", *AUXILIARY[1:]]
ONE_EACH = [f"model.moe.groups.{name}=1" for name in ("text", "image")]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=tiny"], "model.moe.routing is none, so that there are no experts"),
        (["model=tiny_moe", "engine=zero0"], "engine.zero_stage is 0 .* choose engine=zero1"),
        (["model=tiny_moe", "engine.expert_parallel=3"], "{'all': 8}.*=1 or 2 or 4 or 8"),
        (
            ["model=tiny_moma", "model.moe.routing=modality_hard", *ONE_EACH],
            "'text': 1, .*expert_parallel=1, because one expert cannot be divided",
        ),
        (
            ["model=tiny_moma", *AUXILIARY],
            "model.moe.auxiliary_routers is true, .*no expert is trained",
        ),
        (
            ["model=tiny_moe", *MOD_AUXILIARY],
            "model.mod.auxiliary_router is true, .*no expert is trained",
        ),
        (["engine.expert_parallel=0"], "engine.expert_parallel"),
    ],
)
def test_what_cannot_be_divided_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(compose(["schedule.total_steps=9", "engine.expert_parallel=2", *overrides]))


def test_processes_that_cannot_share_are_refused() -> None:
    refuse_uneven(2, world_size=4)
    with pytest.raises(UserError, match=r"expert_parallel is 2 and there are 3 processes"):
        refuse_uneven(2, world_size=3)
