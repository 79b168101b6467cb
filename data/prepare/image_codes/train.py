"""OUT: a VQ model trained on a sample of the images of shards.

OUT/.training/settings.json   what was asked: another command is refused
OUT/.training/state.pt        where the training stands, every 100 steps
OUT/config.json, model.safetensors    the model, as `JanusVQVAE.save_pretrained` writes it
OUT/reconstructions.png       images that were not trained on, above what came back of them
OUT/training.json             what was asked and what came of it; written last
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data import atomic
from data.prepare.alone import alone
from data.prepare.image_codes.look import look
from data.prepare.image_codes.sample import Sources, sample
from data.store import LOCAL
from nmm.codes.train import Learner, Recipe, small_config
from nmm.errors import UserError

FOLDER, REPORT = ".training", "training.json"
STATE_EVERY_STEPS, TELL_TIMES = 100, 10
FEWEST_IMAGES, MOST_KEPT_APART, KEPT_APART_FRACTION = 16, 128, 0.1


@dataclass(frozen=True)
class Shape:
    """A code for every square of `patch_pixels` of an image; how wide and deep the model is."""

    side_pixels: int
    patch_pixels: int
    codes: int
    channels: int
    blocks: int

    def __post_init__(self) -> None:
        patch, side = self.patch_pixels, self.side_pixels
        if patch < 2 or patch & (patch - 1):
            raise UserError(f"--patch-pixels is {patch}; give a power of 2, such as 8 or 16.")
        if side < patch or side % patch:
            raise UserError(
                f"--side-pixels is {side} and --patch-pixels is {patch}; make the side a multiple "
                f"of the patch."
            )
        if self.channels < 1 or self.channels % 32:
            raise UserError(f"--channels is {self.channels}; give a multiple of 32.")
        if self.blocks < 0:
            raise UserError(f"--blocks is {self.blocks}; give 0 or more.")
        if self.codes < 2:
            raise UserError(f"--codes is {self.codes}; give 2 or more.")


def train(sources: Sources, *, shape: Shape, recipe: Recipe, images: int, out: Path) -> None:
    """Train, or go on, or say that it is finished; raises UserError."""
    asked = json.dumps(
        {"shape": asdict(shape), "recipe": asdict(recipe), "images": images, **_inputs(sources)}
    )
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, doing="trains"):
        if _finished(out, asked=asked):
            print(f"{out} is finished with these settings: left alone.")
            return
        _begin(out, asked=asked)
        pixels = sample(sources, images=images, side_pixels=shape.side_pixels, seed=recipe.seed)
        if len(pixels) < FEWEST_IMAGES:
            raise UserError(
                f"--source holds {len(pixels)} images that can be read; give shards with "
                f"{FEWEST_IMAGES} or more."
            )
        kept = min(MOST_KEPT_APART, int(KEPT_APART_FRACTION * len(pixels)))
        print(f"training on {len(pixels) - kept:,} images, {kept} are kept apart", flush=True)
        started = time.perf_counter()
        learner = _learned(pixels[kept:], shape=shape, recipe=recipe, out=out)
        _publish(learner, pixels[:kept], asked=asked, out=out)
        print(f"{out} is complete after {time.perf_counter() - started:.0f} s")


def _inputs(sources: Sources) -> dict[str, list]:
    """The shards and their sizes."""
    layouts = [[layout.kind.value, layout.text_field] for layout, _ in sources]
    paths = [shard for _, shards in sources for shard in shards]
    sizes = zip(paths, LOCAL.sizes(paths), strict=True)
    return {"layouts": layouts, "shards": [[path, size] for path, size in sizes]}


def _finished(out: Path, *, asked: str) -> bool:
    """Is this very model there? Refuses one with other settings, and other content."""
    report, settings = out / REPORT, out / FOLDER / "settings.json"
    there = report if report.exists() else settings
    if there.exists():
        found = json.loads(there.read_text())
        found = found["asked"] if there == report else found
        for name, value in json.loads(asked).items():
            if found[name] != value:
                raise UserError(
                    f"--out is {out}, which was begun with {name} {found[name]}, and now it is "
                    f"{value}; give the same command, choose another --out, or delete that folder."
                )
        return there == report
    if any(out.iterdir()):
        raise UserError(f"--out is {out}, which holds other files; choose a new or empty folder.")
    return False


def _begin(out: Path, *, asked: str) -> None:
    with atomic.writing(out / FOLDER / "settings.json") as file:
        file.write(asked.encode())


def _learned(pixels: np.ndarray, *, shape: Shape, recipe: Recipe, out: Path) -> Learner:
    """All steps, from the newest state on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner = Learner(small_config(**asdict(shape)), recipe, device=device)
    state = out / FOLDER / "state.pt"
    if state.exists():
        learner.restore(torch.load(state, map_location=device, weights_only=True))
        print(f"continuing after step {learner.step_number} of {recipe.steps}", flush=True)
    images = torch.from_numpy(pixels)
    while learner.step_number < recipe.steps:
        losses = learner.step(images)
        step = learner.step_number
        if step == recipe.steps or step % max(1, recipe.steps // TELL_TIMES) == 0:
            plain = " (no codes yet)" if step <= recipe.plain_steps else ""
            print(
                f"step {step}/{recipe.steps}  image {losses.image:.3f}  code {losses.code:.3f}"
                f"{plain}",
                flush=True,
            )
        if step == recipe.steps or step % STATE_EVERY_STEPS == 0:
            with atomic.writing(state) as file:
                torch.save(learner.state(), file)
    return learner


def _publish(learner: Learner, kept_apart: np.ndarray, *, asked: str, out: Path) -> None:
    """The files of the model, then what came of it, then nothing but these."""
    codes = learner.finished()
    beside = out / FOLDER / "model"
    codes.save(beside)
    for path in sorted(beside.iterdir()):
        path.replace(out / path.name)
    found = look(codes, kept_apart)
    picture = found.picture(out)
    print(f"{found.said()}\nwrote {picture}")
    report = {
        "asked": json.loads(asked),
        "sha256": codes.sha256(),
        "kept_apart": len(kept_apart),
        "mean_difference": found.difference,
        "psnr_db": found.psnr_db,
        "used_fraction": found.usage.fraction,
        "perplexity": found.usage.perplexity,
    }
    with atomic.writing(out / REPORT) as file:
        file.write(json.dumps(report, indent=1).encode())
    shutil.rmtree(out / FOLDER)
