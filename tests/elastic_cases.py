"""Runs that are saved in one shape and go on in another; tests/test_elastic.py starts it.

    python -m tests.elastic_cases DIR

DIR/cases.json lists cases {"name", "model", "optim", "precision", "processes", "zero_stage",
"micro_batch", "source", "last"}. A case without a source trains from the start and saves after step
`last`; one with takes the checkpoint of another, saves it again at once, and trains on. Checkpoints
are DIR/NAME/; losses, gradient norms and the place in the data are DIR/NAME.json.
"""

import json
from itertools import islice
from pathlib import Path

from data.loader import Loader
from nmm.config import EngineConfig, Precision
from nmm.engine import Engine, split_step
from nmm.model import build
from nmm.parallel import World
from tests import corpora
from tests.cases import compute, result_of
from tests.engine_cases import MODELS, OPTIM, config, rate, save


def run(case: dict, *, directory: Path, world: World) -> None:
    data, optim = config(case), OPTIM[case["optim"]]
    corpus = corpora.open_corpus(data)
    split = split_step(data.global_rows, micro_batch=case["micro_batch"], world_size=world.size)
    engine = Engine(
        build(MODELS[case["model"]], seed=0),
        config=EngineConfig(case["zero_stage"], split.micro_batch, Precision(case["precision"])),
        optim=optim,
        split=split,
        num_sources=len(corpus.sources),
        world=world,
        seed=0,
    )
    step, stream = 0, None
    if case["source"]:
        engine.load(directory / case["source"])
        save(engine, directory / case["name"])
        there = result_of(directory, case["source"])
        step, stream = there["step"], there["stream"]
    loader = Loader(
        corpus,
        data,
        rank=world.rank,
        world=world.size,
        micro_batch=split.micro_batch,
        workers=0,
        state=stream,
    )
    losses, norms = [], []
    for batches, place in islice(loader, case["last"] - step):
        step, stream = step + 1, place
        result = engine.train_step(batches, learning_rate=rate(step, optim))
        losses.append(result.tally.loss())
        norms.append(result.grad_norm)
    if not case["source"]:
        save(engine, directory / case["name"])
    found = {"step": step, "stream": stream, "losses": losses, "norms": norms}
    if world.is_main:
        (directory / f"{case['name']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    compute(run)
