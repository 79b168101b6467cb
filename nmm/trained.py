"""A trained model to use: from a checkpoint of a run, or from what `python -m nmm.export` wrote.

An export is a folder:
model.safetensors   every weight under its name in nmm/model/, and each expert's under its number
                    (nmm/model/numbered.py); metadata is the format's own "pt"
config.yaml         the configuration of the run
tokenizer.model     the sentencepiece model
codebook/           the VQ model of the image codes, if the run has one
export.json         format, run, step, tokens, dtype, sha256 of tokenizer and codebook;
                    weights_sha256 {name: of a tensor's bytes in model.safetensors};
                    experts ["text", "text", "image", ...], by number what each serves, or "all"

Experts are SwiGLU layers, w2(silu(w1 x) * (w3 x)); their numbers are those of the router's rows,
and the same however many processes shared them.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.corpus import Corpus
from data.loader import held_out_batches
from data.tokenizer import Tokenizer
from nmm.batch import PackedBatch
from nmm.checkpoint import complete, read_progress, step_of
from nmm.codes import ImageCodes
from nmm.codes.model import read as read_codes
from nmm.config import Config, DataConfig, ModelConfig, read_yaml
from nmm.errors import UserError
from nmm.identity import CODEBOOK, TOKENIZER
from nmm.intact import DAMAGE, damage_of, newest_intact, refuse_damaged
from nmm.model import Model
from nmm.model.numbered import side_by_side
from nmm.pieces import Stored
from nmm.rundir import CONFIG

FORMAT = 2
ROWS_AT_ONCE = 8
CODEBOOK_FOLDER = "codebook"
WEIGHTS, PIECES, FACTS = "model.safetensors", "tokenizer.model", "export.json"


@dataclass(frozen=True)
class Trained:
    """A model with fp32 weights on one device, in evaluation mode, and what belongs to it.

    `name` is the run's; `tokens` were trained on until `step`, padding excluded. `codebook_sha256`
    is that of the VQ model of its image codes, if it has one.
    """

    config: Config
    model: Model
    tokenizer: Tokenizer
    name: str
    step: int
    tokens: int
    codebook_sha256: str | None = None

    def codes(self) -> ImageCodes | None:
        """The VQ model that its images were made into codes with, if any; raises UserError."""
        folder = self.config.data.codebook
        if folder is None:
            return None
        device = next(self.model.parameters()).device
        codes = read_codes(folder, key="data.codebook", device=device)
        if self.codebook_sha256 not in (None, found := codes.sha256()):
            raise UserError(
                f"data.codebook is {folder}, which is not the one of the training (sha256 "
                f"{found[:12]}, not {str(self.codebook_sha256)[:12]}); restore it."
            )
        return codes

    def open_held_out(self) -> Corpus:
        """The held-out split of the run's corpus; raises UserError."""
        data, model = self.config.data, self.config.model
        return Corpus.open(data, image=model.image, vocab_size=model.vocab_size, split="held_out")

    def held_out_batches(
        self, corpus: Corpus, *, rows_per_source: int, masked: bool = False
    ) -> list[tuple[str, Iterator[PackedBatch]]]:
        """Those of every source, by its name, all for this process; `masked` as in training."""
        group_rows = self.config.model.group_rows
        return held_out_batches(
            corpus,
            self.config.data,
            rows_per_source=rows_per_source,
            micro_batch=group_rows * max(1, ROWS_AT_ONCE // group_rows),
            masked=masked,
        )


def read_run(directory: Path, *, device: torch.device, step: int | None = None) -> Trained:
    """A complete checkpoint of a run, the newest unless `step` names one; raises UserError."""
    config = read_yaml(directory / CONFIG)
    found = _checkpoint(directory, step=step)
    progress = read_progress(found)
    tokenizer = _tokenizer(config.data, sha256=progress.identity.get(TOKENIZER))
    with damage_of(found):
        model = _model(config.model, dict(Stored(found).weights()), device=device)
    return Trained(
        config=config,
        model=model,
        tokenizer=tokenizer,
        name=config.run.name,
        step=progress.step,
        tokens=progress.totals.get("tokens", 0),
        codebook_sha256=progress.identity.get(CODEBOOK),
    )


def _checkpoint(directory: Path, *, step: int | None) -> Path:
    steps = {step_of(path): path for path in complete(directory)}
    if not steps:
        raise UserError(
            f"{directory} has no complete checkpoint; train it further, or give another run."
        )
    if step is None:
        return _newest(directory)
    if step not in steps:
        have = ", ".join(map(str, steps))
        raise UserError(
            f"--step is {step} but {directory} has complete checkpoints of the steps {have}; give "
            f"one of them, and keep more with checkpoint.keep_last."
        )
    refuse_damaged(steps[step], remedy="give another --step")
    return steps[step]


def _newest(directory: Path) -> Path:
    """Says what is damaged."""
    found = newest_intact(directory)
    for sentence in found.sentences():
        print(sentence, file=sys.stderr)
    assert found.checkpoint is not None, directory
    return found.checkpoint


def _tokenizer(data: DataConfig, *, sha256: object) -> Tokenizer:
    """Another tokenizer would give the ids other meanings."""
    tokenizer = Tokenizer(data.tokenizer, units=data.units, sentinels=data.masking.ids)
    if tokenizer.hash != sha256:
        raise UserError(
            f"data.tokenizer is {data.tokenizer}, which is not the one that the model was trained "
            f"with (sha256 {tokenizer.hash[:12]}, not {str(sha256)[:12]}); restore it."
        )
    return tokenizer


def read_export(directory: Path, *, device: torch.device) -> Trained:
    """What `nmm.export` wrote; bf16 weights become fp32 without a change. Raises UserError."""
    facts = _facts(directory)
    config = read_yaml(directory / CONFIG)
    config.data.tokenizer = str(directory / PIECES)
    if config.data.codebook is not None:
        config.data.codebook = str(directory / CODEBOOK_FOLDER)
    tokenizer = _tokenizer(config.data, sha256=facts["tokenizer_sha256"])
    path = directory / WEIGHTS
    try:
        weights = load_file(path)
        _check_sums(weights, expected=facts["weights_sha256"])
        weights = side_by_side(weights, stack=torch.stack)
        model = _model(config.model, weights, device=device)
    except (SafetensorError, *DAMAGE) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path} is damaged ({reason[0] if reason else type(error).__name__}); export the run "
            f"again."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); bring its disk back.") from None
    return Trained(
        config=config,
        model=model,
        tokenizer=tokenizer,
        name=facts["run"],
        step=facts["step"],
        tokens=facts["tokens"],
        codebook_sha256=facts.get("codebook_sha256"),
    )


def sum_of(weight: Tensor) -> str:
    """The sha256 of a tensor's bytes, as safetensors has them."""
    numbers = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(numbers.numpy().data).hexdigest()


def _check_sums(weights: Mapping[str, Tensor], *, expected: Mapping[str, str]) -> None:
    """Raises LookupError for weights that are missing, unknown or not as they were written."""
    if differing := sorted(weights.keys() ^ expected.keys()):
        where = "missing" if differing[0] in expected else f"unknown to {FACTS}"
        raise LookupError(f"{differing[0]} is {where}")
    for name, weight in weights.items():
        if sum_of(weight) != expected[name]:
            raise LookupError(f"{name} has another sha256 than in {FACTS}")


def _model(config: ModelConfig, weights: dict[str, Tensor], *, device: torch.device) -> Model:
    """A model with these weights, every one of them under its name; initial ones are not drawn.

    The head of a tied model may be missing. Raises LookupError for weights of another model.
    """
    with torch.device("meta"):
        model = Model(config)
    given = {name: value.float() for name, value in weights.items()}
    if config.tied_head:
        given["head.weight"] = given["embedding.weight"]
    try:
        model.load_state_dict(given, assign=True)
    except RuntimeError as error:
        raise LookupError(f"{error}") from None
    model.tie()
    return model.to(device).eval()


def _facts(directory: Path) -> dict[str, Any]:
    path = directory / FACTS
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a folder that `python -m nmm.export` wrote, or --run."
        )
    try:
        facts = json.loads(path.read_text())
        missing = {"format", "run", "step", "tokens", "tokenizer_sha256", "weights_sha256"}
        missing -= set(facts)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); export the run again.") from None
    if missing or facts["format"] != FORMAT:
        raise UserError(
            f"{path} is not of format {FORMAT}, which this version reads; export the run again."
        )
    return facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--run or --export, and --step."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="DIR", help="a run, e.g. runs/demo")
    which.add_argument(
        "--export", type=Path, metavar="DIR", help="or a folder that python -m nmm.export wrote"
    )
    parser.add_argument(
        "--step", type=int, metavar="K", help="with --run: the checkpoint (default: the newest)"
    )


def read(arguments: argparse.Namespace) -> Trained:
    """The model that the arguments name, on the GPU if there is one; raises UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.export is None:
        return read_run(arguments.run, device=device, step=arguments.step)
    if arguments.step is not None:
        raise UserError(
            f"--step is {arguments.step} but an export has one step only; leave it out, or give "
            f"--run."
        )
    return read_export(arguments.export, device=device)
