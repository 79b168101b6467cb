"""The same steps with experts divided in many ways; tests/test_expert_parallel.py starts it.

    python -m tests.expert_parallel_cases DIR

DIR/cases.json lists cases {"name", "model", "optim", "precision", "processes", "zero_stage",
"expert_parallel", "micro_batch", "switches", "rows", "poison", "source", "steps"}. A case without a
source trains from the start; one with takes the checkpoint that another wrote at its end, writes it
again, and trains on. Checkpoints are DIR/NAME/first (after one step) and DIR/NAME/end; what a case
found is DIR/NAME.json.
"""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from data.loader import Loader
from nmm import parallel
from nmm.batch import Modality, PackedBatch
from nmm.config import (
    EngineConfig,
    ExpertGroups,
    MoDConfig,
    ModelConfig,
    MoEConfig,
    Precision,
    Routing,
)
from nmm.engine import Engine, split_step
from nmm.model import Model, build
from nmm.parallel import World
from nmm.shares import held
from tests import corpora
from tests.cases import compute, result_of
from tests.engine_cases import MODELS, OPTIM, config, held_out, rate, save

SEEN = {  # on even processes, and on odd ones
    "apart": (Modality.text, Modality.image),
    "on one": (Modality.text, Modality.pad),
}
BALANCED = 0.5  # a weight of the balance that can be seen in the gradients
SPARSE: dict[str, ModelConfig] = {
    "top 2": MODELS["moe"],
    "moma": MODELS["moma"],
    "groups": replace(
        MODELS["early"],
        moe=MoEConfig(
            Routing.modality_groups,
            groups=ExpertGroups(text=4, image=2),
            top_k=2,
            hidden=48,
            balance_weight=BALANCED,
        ),
    ),
    # Two learning rates; and routers that leave two of the experts without a token.
    "late": replace(
        MODELS["late"],
        moe=MoEConfig(Routing.token_choice, experts=4, hidden=48, balance_weight=BALANCED),
    ),
    # Half of the tokens of two rows, and the experts that these choose or that choose these.
    "depth": replace(
        MODELS["early"],
        moe=MoEConfig(
            Routing.token_choice, experts=4, hidden=48, balance_weight=BALANCED, group_rows=2
        ),
        mod=MoDConfig(every=2, capacity=0.5, group_rows=2),
    ),
    "depth of moma": replace(MODELS["moma"], mod=MoDConfig(every=2, capacity=0.5, group_rows=2)),
    # Weights that ZeRO 3 gathers anew for every layer, which it does not do with small ones.
    "wide": replace(MODELS["early"], moe=MoEConfig(Routing.token_choice, experts=4, hidden=1600)),
}


def begun(name: str) -> Model:
    """A model whose routers prefer some experts by far; of "late", two get nothing at first.

    What experts choose stays as it was drawn: rounding grows with scores, and could part equals.
    """
    model = build(SPARSE[name], seed=0)
    for layer, weight in enumerate(routers(model)):
        if model.config.moe.chooses_tokens:
            continue
        with torch.no_grad():
            weight *= 10
            if name == "late" and layer == 0:
                weight[1] = -weight[0]  # one of the two is always above 0
                weight[2:] = 0
    return model


def routers(model: Model) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("ffn.router.weight")]


def seen(batch: PackedBatch, modality: Modality) -> PackedBatch:
    """The batch as if all its tokens were of one modality; only image has images beside it."""
    kinds = torch.where(batch.modality > 0, int(modality), 0).to(batch.modality.dtype)
    if modality is Modality.image:
        return replace(batch, modality=kinds)
    image = torch.zeros_like(batch.image)
    return replace(batch, modality=kinds, image=image, pixels=batch.pixels[:0])


def run(case: dict, *, directory: Path, world: World) -> None:
    data, optim = config(case), OPTIM[case["optim"]]
    corpus = corpora.open_corpus(data)
    split = split_step(data.global_rows, micro_batch=case["micro_batch"], world_size=world.size)
    engine = Engine(
        begun(case["model"]),
        config=EngineConfig(
            case["zero_stage"],
            split.micro_batch,
            Precision(case["precision"]),
            expert_parallel=case["expert_parallel"],
            **case["switches"],
        ),
        optim=optim,
        split=split,
        num_sources=len(corpus.sources),
        world=world,
        seed=0,
    )
    own, step, stream = directory / case["name"], 0, None
    if case["source"]:
        engine.load(directory / case["source"] / "end")
        save(engine, own / "first")
        there = result_of(directory, case["source"])
        step, stream = there["step"], there["stream"]
    if case["poison"]:
        poison(engine, world=world)
    loader = Loader(
        corpus,
        data,
        rank=world.rank,
        world=world.size,
        micro_batch=split.micro_batch,
        workers=0,
        state=stream,
    )
    found: dict = {key: [] for key in ("losses", "norms", "applied", "routed", "kept", "signals")}
    for batches, place in islice(loader, case["steps"]):
        step, stream = step + 1, place
        if kinds := SEEN.get(case["rows"]):
            batches = [seen(batch, kinds[world.rank % 2]) for batch in batches]
        result = engine.train_step(batches, learning_rate=rate(step, optim), watch=True)
        assert result.routed is not None
        assert result.signals is not None
        found["losses"].append(result.tally.loss())
        found["norms"].append(result.grad_norm)
        found["applied"].append(parallel.gather_lists([result.applied]))
        found["routed"].append(result.routed.tables.tolist())
        found["kept"].append(result.kept.tables.tolist() if result.kept else [])
        found["signals"].append(result.signals.sums.tolist())
        if step == 1:
            save(engine, own / "first")
    save(engine, own / "end")
    module = engine.model.module
    assert isinstance(module, nn.Module)
    if case["zero_stage"] < 3:  # which holds no more than parts of them
        numbers = [sum(parameter.numel() for parameter in module.parameters())]
        found["parameters"] = parallel.gather_lists(numbers)
    states = [sum(each.weight.numel() for each in held(engine.model, world=world))]
    found["states"] = parallel.gather_lists(states)
    if case["model"] == "top 2" and case["optim"] == "sgd" and not case["rows"]:
        found["held_out"] = held_out(engine, data, split=split, world=world)
    if world.is_main:
        found |= {"step": step, "stream": stream}
        (directory / f"{case['name']}.json").write_text(json.dumps(found))


def poison(engine: Engine, *, world: World) -> None:
    """Of the first gradient of the last process's own experts one number is none."""
    model = engine.model.module
    assert isinstance(model, Model)
    calls = 0

    def spoil(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1 or world.rank < world.size - 1:
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[7] = torch.nan
        return spoiled

    model.get_parameter("blocks.1.ffn.experts.w2").register_hook(spoil)


if __name__ == "__main__":
    compute(run)
