"""Held-out losses of a run: in the loop, and by `python -m nmm.evaluate --run runs/X`.

With --report, a page about the run instead (nmm/report); with --experts, which experts take which
of the held-out tokens (nmm/specialisation.py).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from data.corpus import Corpus
from data.loader import held_out_batches
from data.tokenizer import IdTable
from nmm.batch import NO_LABEL, Dropped, Modality, PackedBatch
from nmm.config import DataConfig, Kind, ModelConfig
from nmm.errors import UserError
from nmm.held_out import AHEAD, HeldOut
from nmm.model.depth import flip
from nmm.parallel import World, gather_lists
from nmm.tally import Row
from nmm.trained import Trained, add_arguments, read

ROWS_AT_ONCE = 8
NOT_CAUSAL = """\
These losses are NOT causal: experts or blocks choose their tokens among all of a row, later ones
too, so that a token's loss depends on what follows it (expert choice, mixture of depths)."""
CAUSAL = f"""\
These losses are causal: auxiliary routers say who takes a token, and know no later one.
Those below {AHEAD} are NOT: there it is chosen among all tokens of a row, as in training."""


def held_out_row(
    model: torch.nn.Module,
    corpus: Corpus,
    data: DataConfig,
    *,
    config: ModelConfig,
    rows_per_source: int,
    micro_batch: int,
    world: World,
    between: Callable[[PackedBatch], None] = lambda batch: None,
) -> tuple[Row, list[Dropped]]:
    """The loss keys of evals.jsonl (docs/scaling.md), and the documents that could not be read.

    Every process takes part and gets both. Each gives every micro-batch to `between`
    first, as often as all others; what that raises ends the evaluation.
    """
    model.eval()
    dropped: list[Dropped] = []
    sums = HeldOut.zeros(config, num_sources=len(corpus.sources), device=world.device)
    for _, batches in held_out_batches(
        corpus,
        data,
        rows_per_source=rows_per_source,
        micro_batch=micro_batch,
        rank=world.rank,
        world=world.size,
    ):
        for batch in batches:
            between(batch)
            sums.add(model, batch)
            dropped += batch.dropped
    sums.add_over_ranks()
    model.train()
    return sums.row(corpus, units=data.units), gather_lists(dropped)


def objective(data: DataConfig, *, masked: bool = False) -> Row:
    """Which objective was scored, where training masks spans: documents in their order, or its own.

    Absent otherwise: there is only one.
    """
    if not data.masking.mean_spans:
        return {}
    return {"objective": "causal_masked" if masked else "causal"}


def with_images_of_others(batch: PackedBatch) -> PackedBatch | None:
    """The same batch, every image replaced by one of another document of the batch.

    None where the batch has too few images of other documents. Labels stay as they are.
    """
    codes = _code_positions(batch)
    owners = _image_owners(batch) if codes is None else _documents(batch).flatten()[codes[:, 0]]
    most = int(torch.bincount(owners).max()) if len(owners) else 0
    if len(owners) < 2 * most or most == 0:
        return None
    if codes is None:
        return replace(batch, pixels=batch.pixels.roll(most, dims=0))
    tokens = batch.tokens.flatten().clone()
    tokens[codes] = tokens[codes].roll(most, dims=0)
    return replace(batch, tokens=tokens.view_as(batch.tokens))


def _code_positions(batch: PackedBatch) -> torch.Tensor | None:
    """int64[M, n]: where in B*L the n codes of every image are; None without images of codes."""
    inside = ((batch.modality == Modality.image) & (batch.image == 0)).flatten()
    places = inside.nonzero()[:, 0]
    if len(places) == 0:
        return None
    # Codes stand between a begin and an end, so no two images touch.
    images = int((places.diff() > 1).sum()) + 1
    assert len(places) % images == 0, (len(places), images)
    return places.view(images, -1)


def with_text_labels(batch: PackedBatch, ids: IdTable) -> PackedBatch:
    """The same batch, in which only text and the ends of documents are labels, and no units."""
    units = min((unit.begin for unit in ids.units.values()), default=ids.size)
    is_text = batch.labels < units
    return replace(
        batch,
        labels=torch.where(is_text, batch.labels, NO_LABEL),
        label_modality=torch.where(is_text, batch.label_modality, 0),
    )


def _documents(batch: PackedBatch) -> torch.Tensor:
    """int64[B, L]: a number for every document of the batch."""
    row = torch.arange(batch.tokens.shape[0])[:, None].expand_as(batch.document)
    return row * (int(batch.document.max()) + 1) + batch.document


def _image_owners(batch: PackedBatch) -> torch.Tensor:
    """int64[M]: a number for the document that each image belongs to."""
    shown = batch.image > 0
    owners = torch.zeros(len(batch.pixels), dtype=torch.int64)
    owners[batch.image[shown].long() - 1] = _documents(batch)[shown]
    return owners


def image_gap(trained: Trained, corpus: Corpus, *, rows_per_source: int) -> tuple[float, float]:
    """Held-out nats per token of captions: with their own images, and with those of others.

    Tokens are those of text, also where images are predicted too.
    """
    device = next(trained.model.parameters()).device
    own, other = (
        HeldOut.zeros(trained.config.model, num_sources=len(corpus.sources), device=device)
        for _ in range(2)
    )
    held_out = of_run(trained, corpus, rows_per_source=rows_per_source)
    for source, (_, batches) in zip(corpus.sources, held_out, strict=True):
        if source.kind is Kind.caption:
            for batch in (with_text_labels(b, trained.tokenizer.ids) for b in batches):
                swapped = with_images_of_others(batch)
                if swapped is not None:
                    own.add(trained.model, batch)
                    other.add(trained.model, swapped)
    losses = own.tally.loss(), other.tally.loss()
    if losses[0] is None or losses[1] is None:
        raise UserError(
            "--image-gap found no two held-out documents of kind caption in data.sources; leave it "
            "out."
        )
    return losses[0], losses[1]


def of_run(
    trained: Trained, corpus: Corpus, *, rows_per_source: int, masked: bool = False
) -> list[tuple[str, Iterator[PackedBatch]]]:
    """The held-out batches of a run, all of them for this process; `masked` as in training."""
    group_rows = trained.config.model.group_rows
    return held_out_batches(
        corpus,
        trained.config.data,
        rows_per_source=rows_per_source,
        micro_batch=group_rows * max(1, ROWS_AT_ONCE // group_rows),
        masked=masked,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nmm.evaluate",
        description="Held-out losses of a trained model, in nats per token.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    parser.add_argument(
        "--image-gap",
        action="store_true",
        help="also the loss of captions with the images of other documents: do images matter?",
    )
    parser.add_argument(
        "--rows-per-source", type=int, help="most rows of each source (default: as the run)"
    )
    parser.add_argument(
        "--masked",
        action="store_true",
        help="score the causal masked objective of the training, not documents in their order",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="instead: one HTML page from the run's files, DIR/report.html",
    )
    parser.add_argument(
        "--experts",
        action="store_true",
        help="instead: which experts take which tokens, as a picture and tables in DIR",
    )
    parser.add_argument(
        "--depth-noise",
        type=float,
        metavar="FRACTION",
        help="of a mixture of depths: turn this fraction of who is taken round, by a draw",
    )
    parser.add_argument("--noise-seed", type=int, default=0, help="of that draw (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.report:
        _report(arguments)
        return
    if arguments.rows_per_source is not None and arguments.rows_per_source < 1:
        sys.exit(f"error: --rows-per-source is {arguments.rows_per_source}; set it to 1 or more.")
    try:
        if arguments.experts:
            _experts(arguments)
            return
        row = _evaluate(
            read(arguments),
            rows_per_source=arguments.rows_per_source,
            with_gap=arguments.image_gap,
            masked=arguments.masked,
            depth_noise=arguments.depth_noise,
            noise_seed=arguments.noise_seed,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        print(json.dumps(row))
        return
    where = arguments.run or arguments.export
    print(f"{where}, step {row.pop('step')}: held-out loss in nats per token")
    if "causal" in row:
        print(CAUSAL if row["causal"] else NOT_CAUSAL)
    for key, value in row.items():
        shown = f"{value:.4f}" if isinstance(value, float) else "-" if value is None else value
        print(f"  {key:32} {shown}")


def _report(arguments: argparse.Namespace) -> None:
    """The page of a run; nothing is evaluated."""
    others = {
        "--export": arguments.export,
        "--step": arguments.step,
        "--rows-per-source": arguments.rows_per_source,
        "--image-gap": arguments.image_gap or None,
        "--masked": arguments.masked or None,
        "--depth-noise": arguments.depth_noise,
        "--json": arguments.json or None,
        "--experts": arguments.experts or None,
    }
    given = [flag for flag, value in others.items() if value is not None]
    try:
        if given:
            raise UserError(
                f"--report shows what a run has written and evaluates nothing, but {given[0]} was "
                f"given; leave it out, and give --run."
            )
        # Here, because training evaluates too, and matplotlib takes half a second of every start.
        from nmm import report

        print(f"wrote {report.write(arguments.run)}")
    except UserError as error:
        sys.exit(f"error: {error}")


def _experts(arguments: argparse.Namespace) -> None:
    """Which experts take which held-out tokens; raises UserError."""
    from nmm import specialisation  # here, because of matplotlib

    others = {
        "--image-gap": arguments.image_gap,
        "--masked": arguments.masked,
        "--json": arguments.json,
        "--depth-noise": arguments.depth_noise is not None,
    }
    for flag, given in others.items():
        if given:
            raise UserError(
                f"--experts writes tables and a picture and no losses, but {flag} was given; leave "
                f"one of them out."
            )
    trained = read(arguments)
    rows = arguments.rows_per_source or trained.config.evaluation.rows_per_source
    found = assigned_experts(trained, open_held_out(trained), rows_per_source=rows)
    directory = arguments.run or arguments.export
    title = f"{trained.name}, step {trained.step}: held-out tokens by expert"
    lines = specialisation.score_lines(found)
    print("specialisation of the experts, 0 (alike) to 1 (each for one modality)")
    print(f"{'kind':12} {'layer':>5} {'as they are':>12} {'equal parts':>12}")
    for line in lines:
        shown = ("-" if x is None else f"{x:.4f}" for x in (line.specialisation, line.normalised))
        print(f"{line.kind:12} {line.layer:5} " + " ".join(f"{x:>12}" for x in shown))
    for path in specialisation.write(
        found, trained.config.model.moe, directory=directory, title=title
    ):
        print(f"wrote {path}")


def assigned_experts(
    trained: Trained, corpus: Corpus, *, rows_per_source: int
) -> dict[str, torch.Tensor]:
    """The tables of nmm/specialisation.py by kind of documents; raises UserError."""
    from nmm import specialisation

    sources = of_run(trained, corpus, rows_per_source=rows_per_source)
    kinds = (source.kind.value for source in corpus.sources)
    batches = [(kind, each) for kind, (_, each) in zip(kinds, sources, strict=True)]
    device = next(trained.model.parameters()).device
    return specialisation.assigned(trained.model, batches, device=device)


def _evaluate(
    trained: Trained,
    *,
    rows_per_source: int | None,
    with_gap: bool,
    masked: bool,
    depth_noise: float | None = None,
    noise_seed: int = 0,
) -> Row:
    device = next(trained.model.parameters()).device
    data = trained.config.data
    rows = rows_per_source or trained.config.evaluation.rows_per_source
    if masked and not data.masking.mean_spans:
        raise UserError(
            "--masked scores the objective of data.masking, but data.masking.mean_spans was 0 in "
            "the training; leave it out."
        )
    if depth_noise is not None:
        _flip(trained, fraction=depth_noise, seed=noise_seed)
    corpus = open_held_out(trained)
    sums = HeldOut.zeros(trained.config.model, num_sources=len(corpus.sources), device=device)
    dropped: list[Dropped] = []
    for _, batches in of_run(trained, corpus, rows_per_source=rows, masked=masked):
        for batch in batches:
            sums.add(trained.model, batch)
            dropped += batch.dropped
    said = objective(data, masked=masked)
    losses = sums.row(corpus, units=data.units)
    row = {"step": trained.step, **losses, **said, "dropped": len(dropped)}
    if depth_noise is not None:
        row |= {"depth_noise": depth_noise, "noise_seed": noise_seed}
    if with_gap:
        row["caption/own_images"], row["caption/other_images"] = image_gap(
            trained, corpus, rows_per_source=rows
        )
    return row


def _flip(trained: Trained, *, fraction: float, seed: int) -> None:
    """Errors in who is taken by the blocks of a mixture of depths, as in "MoMa"."""
    if trained.config.model.mod.every is None:
        raise UserError(
            "--depth-noise turns decisions of a mixture of depths round, but model.mod.every was "
            "null in the training; leave it out."
        )
    if not 0 <= fraction <= 1 or seed < 0:
        raise UserError(
            f"--depth-noise is {fraction} and --noise-seed is {seed}; give a fraction between 0 "
            f"and 1, and a seed of 0 or more."
        )
    flip(trained.model, fraction=fraction, seed=seed)


def open_held_out(trained: Trained) -> Corpus:
    """The held-out split of a run's corpus."""
    data, model = trained.config.data, trained.config.model
    return Corpus.open(data, image=model.image, vocab_size=model.vocab_size, split="held_out")


if __name__ == "__main__":
    main()
