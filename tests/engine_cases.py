"""Train the same small model in many ways; tests/test_engine.py runs it, also under torchrun.

    python -m tests.engine_cases CASES.json OUT.json     (one launch runs all cases)
    python -m tests.engine_cases --forked DIR            (DIR/cases2.json by 2 processes, ...)

A case is {"model", "zero_stage", "optim", "micro_batch", "precision", "resume_at", "switches",
"steps", "blind_rank", "poison"}, its switches are further fields of EngineConfig; its result holds
the loss and gradient norm of every step, the signals of some, and without switches a checksum of
the weights afterwards and, for the early model, the held-out losses.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data.corpus import Corpus
from data.loader import Loader
from nmm import parallel
from nmm.batch import COUNTS, PackedBatch
from nmm.config import (
    DataConfig,
    EngineConfig,
    ExpertGroups,
    ImageKind,
    MoDConfig,
    ModelConfig,
    MoEConfig,
    Norm,
    NormPosition,
    OptimConfig,
    OptimName,
    Positions,
    Precision,
    QKNorm,
    Routing,
    VisionConfig,
)
from nmm.engine import Engine, Split, split_step
from nmm.held_out import evaluate
from nmm.model import Model, Output, build
from nmm.parallel import World
from nmm.pieces import Stored
from nmm.routing import Kept, Routed
from nmm.tally import LABELS, TOKENS
from tests import corpora
from tests.forked import together

STEPS = 20
WATCHED = (0, 5, 13)  # the steps with signals
POISONED = 2  # the step that goes wrong in a poisoned case
MODEL = ModelConfig(width=32, depth=2, heads=2, vocab_size=corpora.VOCAB_SIZE, image=corpora.IMAGE)
MODELS = {
    "early": MODEL,
    "late": replace(
        MODEL,
        image=replace(corpora.IMAGE, kind=ImageKind.encoder),
        vision=VisionConfig(width=16, depth=2, heads=2, biases=True),
    ),
    # What no other case has: one matrix for two modules, a table of positions, drawn zeros.
    "tied": replace(
        MODEL,
        tied_head=True,
        positions=Positions.learned,
        max_positions=64,
        dropout=0.1,
    ),
    # Routers' own losses are large enough to matter, and groups of rows are half a micro-batch.
    "moe": replace(
        MODEL,
        moe=MoEConfig(
            Routing.token_choice,
            experts=4,
            top_k=2,
            hidden=48,
            balance_weight=0.5,
            router_z_weight=0.1,
            group_rows=2,
        ),
    ),
    "moma": replace(
        MODEL,
        norm=Norm.rms,
        norm_position=NormPosition.swin,
        qk_norm=QKNorm.head,
        moe=MoEConfig(
            Routing.expert_choice, groups=ExpertGroups(text=2, image=2), hidden=48, group_rows=2
        ),
    ),
    "hard": replace(
        MODEL, moe=MoEConfig(Routing.modality_hard, groups=ExpertGroups(text=1, image=1), hidden=48)
    ),
}
# All else of it is frozen.
MODELS["auxiliary"] = replace(
    MODELS["moma"], moe=replace(MODELS["moma"].moe, auxiliary_routers=True)
)
# Half of the tokens of two rows, then experts among these.
MODELS["depth"] = replace(
    MODELS["hard"],
    moe=replace(MODELS["hard"].moe, group_rows=2),
    mod=MoDConfig(every=2, capacity=0.5, group_rows=2),
)
OPTIM = {
    "adamw": OptimConfig(
        learning_rate=3e-3, weight_decay=1e-2, clip_norm=1.0, vision_rate_multiplier=0.5
    ),
    "sgd": OptimConfig(
        name=OptimName.sgd,
        learning_rate=0.5,
        weight_decay=1e-2,
        clip_norm=1.0,
        vision_rate_multiplier=0.5,
    ),
    "frozen": OptimConfig(learning_rate=3e-3, vision_rate_multiplier=0.0),
}


def config(case: dict) -> DataConfig:
    """The corpus that the calling test made, because this is another process."""
    return corpora.config(Path(case["corpus"]), tokenizer=case["tokenizer"])


def rate(step: int, optim: OptimConfig) -> float:
    """A learning rate that changes every step, so that one that is set too late shows."""
    return optim.learning_rate * (1 - step / (2 * STEPS))


def run(case: dict, *, corpus: Corpus, directory: Path, world: World) -> dict:
    """Train; with "resume_at", into a new engine from a checkpoint of that step."""
    optim, data = OPTIM[case["optim"]], config(case)
    split = split_step(data.global_rows, micro_batch=case["micro_batch"], world_size=world.size)

    def new_engine() -> Engine:
        return Engine(
            build(MODELS[case["model"]], seed=0),
            config=EngineConfig(
                case["zero_stage"],
                split.micro_batch,
                Precision(case["precision"]),
                **case["switches"],
            ),
            optim=optim,
            split=split,
            num_sources=len(corpus.sources),
            world=world,
            seed=0,
        )

    engine = new_engine()
    loader = Loader(
        corpus,
        data,
        rank=world.rank,
        world=world.size,
        micro_batch=split.micro_batch,
        workers=0,
    )
    losses, norms, sources, counts, signals, applied, routed = [], [], [], [], [], [], []
    suspects: list[str] = []
    if case["poison"]:
        poison(engine, case["poison"], micro_batches=split.accumulation_steps, world=world)
    for step, (batches, _) in zip(range(case["steps"]), loader, strict=False):
        if case["blind_rank"] == world.rank:
            batches = [blind(batch) for batch in batches]
        if step == case.get("resume_at"):
            save(engine, directory / "middle")
            engine = new_engine()
            engine.load(directory / "middle")
        for batch in batches:  # a number whose sum no split may change
            batch.counts = dict.fromkeys(COUNTS, len(batch.pixels))
        watch = step in WATCHED
        result = engine.train_step(batches, learning_rate=rate(step, optim), watch=watch)
        if watch:
            assert result.signals is not None
            tokens, labels = result.tally.count(TOKENS), result.tally.count(LABELS)
            signals.append(result.signals.keys(tokens=tokens, labels=labels))
        applied.append(parallel.gather_lists([result.applied]))
        suspects += result.suspects
        counts.append(result.counts)
        losses.append(result.tally.loss())
        norms.append(result.grad_norm)
        if result.routed:
            routed.append(keys_of(result.routed, result.kept, model=MODELS[case["model"]]))
        by_source = [result.tally.loss(source=i) for i in range(len(corpus.sources))]
        sources.append([-1.0 if loss is None else loss for loss in by_source])
    found = {"losses": losses, "norms": norms, "sources": sources, "counts": counts}
    found |= {"signals": signals, "applied": applied, "suspects": suspects, "routed": routed}
    if case["switches"]:
        return found
    save(engine, directory / "end")
    weights = dict(Stored(directory / "end").weights())
    return {
        **found,
        "weights": {name: tensor.double().norm().item() for name, tensor in weights.items()},
        "held_out": held_out(engine, data, split=split, world=world)
        if case["model"] == "early"
        else None,
    }


def keys_of(routed: Routed, kept: Kept | None, *, model: ModelConfig) -> dict:
    """Of a step, the keys of the log about experts and depth, lists number by number."""
    found = routed.keys(model.moe) | routed.signals(model.moe)
    if kept:
        found |= kept.keys(model.mod) | kept.signals(model.mod)
    lists = [key for key, value in found.items() if isinstance(value, list)]
    for key in lists:
        found |= {f"{key}/{number}": value for number, value in enumerate(found.pop(key))}
    return found


def save(engine: Engine, checkpoint: Path) -> None:
    """Into a new folder, and whole when this returns."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    engine.save(checkpoint)
    parallel.barrier()


def poison(engine: Engine, what: str, *, micro_batches: int, world: World) -> None:
    """In the first micro-batch of one step, on the last process only.

    loss      is infinite, and all gradients are finite
    gradient  has one number that is none, and the loss is finite
    """
    model = engine.model.module
    assert isinstance(model, Model)
    forwards = 0

    def is_now() -> bool:
        last = world.rank == world.size - 1
        return last and forwards == POISONED * micro_batches + 1

    def spoil_loss(module: Model, given: tuple, output: Output) -> Output:
        nonlocal forwards
        forwards += 1
        if what != "loss" or not is_now():
            return output
        losses = (output.loss_sum + torch.inf, output.token_losses + torch.inf)
        return output._replace(loss_sum=losses[0], token_losses=losses[1])

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor:
        if what != "gradient" or not is_now():
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[7] = torch.nan
        return spoiled

    model.register_forward_hook(spoil_loss)
    model.get_parameter("blocks.0.ffn.down.weight").register_hook(spoil_gradient)


def blind(batch: PackedBatch) -> PackedBatch:
    """The batch with its images' positions left to the image id, and no pixels."""
    return replace(batch, image=torch.zeros_like(batch.image), pixels=batch.pixels[:0])


def held_out(engine: Engine, data: DataConfig, *, split: Split, world: World) -> dict:
    corpus = corpora.open_corpus(data, split="held_out")
    row, _ = evaluate(
        engine.model,
        corpus,
        data,
        config=MODELS["early"],
        rows_per_source=5,
        micro_batch=split.micro_batch,
        world=world,
    )
    return row


def run_all(world: World, *, cases_path: Path, out: Path) -> None:
    cases = json.loads(cases_path.read_text())
    torch.set_num_threads(1)
    results = []
    for number, case in enumerate(cases):
        corpus = corpora.open_corpus(config(case))
        results.append(
            run(case, corpus=corpus, directory=out.parent / f"{out.stem}-{number}", world=world)
        )
    if world.is_main:
        out.write_text(json.dumps(results))


def main() -> None:
    if sys.argv[1] == "--forked":
        for path in sorted(Path(sys.argv[2]).glob("cases*.json")):
            out = path.with_name(path.name.replace("cases", "out"))
            work = partial(run_all, cases_path=path, out=out)
            together(work, processes=int(path.stem.removeprefix("cases")))
        return
    world = parallel.start()
    run_all(world, cases_path=Path(sys.argv[1]), out=Path(sys.argv[2]))
    parallel.stop()


if __name__ == "__main__":
    main()
