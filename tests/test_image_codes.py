"""Image codes: a model that learns, weights of others, shards in which nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.janus.modeling_janus import JanusVQVAE

from data.documents import parse
from data.images import decode
from data.prepare.image_codes.__main__ import main
from data.prepare.index import index_shards
from data.shards import ShardWriter
from data.store import CODEBOOK
from data.units import Units
from nmm.codes import ImageCodes, Usage
from nmm.codes.model import read, to_model
from nmm.codes.train import Learner, Recipe, small_config
from nmm.config import Kind, Layout, UnitModality
from nmm.errors import UserError
from tests import corpora
from tests.converting import samples

SIDE, PATCH, CODES = 16, 4, 24
SHAPE = ("--side-pixels", SIDE, "--patch-pixels", PATCH, "--codes", CODES, "--channels", 32)
STEPS = 120
PICTURE = "reconstructions.png"


def painted(rng: np.random.Generator) -> bytes:
    """A JPEG of smooth colours."""
    return corpora.encoded(corpora.picture(rng, width=SIDE, height=SIDE, blur=8), "JPEG")


@cache
def corpus() -> Path:
    """DIR/{caption,interleaved}/train-*.tar; stories have one to four images."""
    directory, rng = corpora.scratch() / "painted", np.random.default_rng(0)
    with ShardWriter(directory / "caption", name="train", documents_per_shard=50) as writer:
        for number in range(150):
            writer.caption(f"{number:04d}", image=painted(rng), text=corpora.sentence(rng, 3))
    with ShardWriter(directory / "interleaved", name="train", documents_per_shard=10) as writer:
        for number in range(60):
            pairs = [(painted(rng), corpora.sentence(rng, 3)) for _ in range(rng.integers(1, 5))]
            writer.interleaved(f"{number:04d}", [part for pair in pairs for part in pair])
    return directory


def shards(kind: Kind) -> str:
    return f"{corpus() / kind.value}/train-*.tar"


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def training(out: Path, *more: object) -> tuple[object, ...]:
    source = f"caption={shards(Kind.caption)}"
    return ("train", "--source", source, "--out", out, *SHAPE, "--steps", STEPS, *more)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert isinstance(caught.value.code, str)
    return caught.value.code + capsys.readouterr().err


@pytest.fixture(scope="module")
def codebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on small images of smooth colours."""
    out = tmp_path_factory.mktemp("codebook") / "vq"
    run(*training(out))
    return out


@pytest.fixture(scope="module")
def codes(codebook: Path) -> ImageCodes:
    return read(codebook, key="--codebook")


@pytest.fixture(scope="module")
def written(codebook: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coded shards of both kinds, by one process."""
    out = tmp_path_factory.mktemp("written")
    for kind in (Kind.caption, Kind.interleaved):
        run(*writing(codebook, out / kind.value, kind), "--workers", 1)
    return out


def writing(codebook: Path, out: Path, kind: Kind) -> tuple[object, ...]:
    asked = ("--kind", kind.value, "--shards", shards(kind), "--out", out)
    return ("write", "--codebook", codebook, *asked)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def pixels(count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([decode(painted(rng), SIDE) for _ in range(count)])


def test_what_is_trained_brings_images_back(codebook: Path, codes: ImageCodes) -> None:
    """Images that it never saw come back nearer than their mean is, through few codes."""
    images = pixels(64).astype(np.float32)
    returned = codes.decode(codes.encode(pixels(64)))
    mean = images.mean(axis=(0, 1, 2))
    assert np.abs(returned - images).mean() < 0.7 * np.abs(mean - images).mean()
    assert (codes.codes, codes.tokens, codes.side_pixels) == (CODES, (SIDE // PATCH) ** 2, SIDE)
    report = json.loads((codebook / "training.json").read_text())
    assert report["sha256"] == codes.sha256()
    assert 0 < report["used_fraction"] <= 1
    assert (codebook / PICTURE).exists()
    assert not (codebook / ".training").exists()


def test_transformers_reads_it_and_means_the_same(codebook: Path, codes: ImageCodes) -> None:
    theirs = JanusVQVAE.from_pretrained(str(codebook), local_files_only=True).eval()
    x = to_model(torch.from_numpy(pixels(8)))
    with torch.no_grad():
        found = theirs.encode(x).image_tokens.reshape(8, -1)
        decoded = theirs.decode(found)
    assert np.array_equal(found.numpy(), codes.encode(pixels(8)))
    levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    assert np.array_equal(levels.numpy(), codes.decode(found.numpy()))


def test_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Cut off before, at or after the first codes, it ends with the weights of one that was not."""
    shape = {"side_pixels": 16, "patch_pixels": 8, "codes": 8, "channels": 32, "blocks": 1}
    images, recipe = torch.from_numpy(pixels(20)), Recipe(8, 2, 2e-3, seed=3)

    def learner() -> Learner:
        return Learner(small_config(**shape), recipe, device=torch.device("cpu"))

    whole = learner()
    for _ in range(recipe.steps):
        whole.step(images)
    for cut in (1, recipe.plain_steps, 5):
        first, second = learner(), learner()
        for _ in range(cut):
            first.step(images)
        torch.save(first.state(), tmp_path / "state.pt")
        second.restore(torch.load(tmp_path / "state.pt", weights_only=True))
        for _ in range(cut, recipe.steps):
            second.step(images)
        assert second.finished().sha256() == whole.finished().sha256()


def test_a_finished_training_is_left_alone_and_another_refused(
    codebook: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (codebook / "model.safetensors").stat().st_mtime_ns
    run(*training(codebook))
    assert "left alone" in capsys.readouterr().out
    assert (codebook / "model.safetensors").stat().st_mtime_ns == before
    assert "was begun with recipe" in refused(capsys, *training(codebook, "--seed", 1))
    assert "holds other files" in refused(capsys, *training(codebook.parent))


def test_weights_inside_a_whole_janus_are_found(
    codebook: Path, codes: ImageCodes, tmp_path: Path
) -> None:
    config = json.loads((codebook / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "janus", "vq_config": config}))
    given = load_file(codebook / "model.safetensors")
    names = sorted(given)
    for part, some in enumerate((names[::2], names[1::2])):
        save_file(
            {f"model.vqmodel.{name}": given[name] for name in some},
            tmp_path / f"model-{part}.safetensors",
        )
    save_file({"lm_head.weight": torch.ones(3)}, tmp_path / "model-2.safetensors")
    assert read(tmp_path, key="--codebook").sha256() == codes.sha256()


def test_codes_are_those_of_the_nearest_direction(codebook: Path, codes: ImageCodes) -> None:
    """The decoder scales a code's vector to length 1, so lengths in the file mean nothing."""
    folder = codebook.parent / "longer"
    shutil.copytree(codebook, folder)
    given = load_file(folder / "model.safetensors")
    scale = torch.linspace(0.1, 9, CODES)[:, None]
    longer = {**given, "quantize.embedding.weight": given["quantize.embedding.weight"] * scale}
    save_file(longer, folder / "model.safetensors")
    found = read(folder, key="--codebook").encode(pixels(16))
    assert np.array_equal(found, codes.encode(pixels(16)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "it is no configuration"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "a model of type llama",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing or of another shape"),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 5000),
            "whose weights are damaged",
        ),
    ],
)
def test_folders_that_hold_no_model_are_refused(
    change: object, sentence: str, codebook: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vq"
    shutil.copytree(codebook, folder)
    assert callable(change)
    change(folder)
    with pytest.raises(UserError, match=sentence):
        read(folder, key="--codebook")


@pytest.mark.parametrize("kind", [Kind.caption, Kind.interleaved])
def test_every_document_is_there_with_the_codes_of_its_images(
    kind: Kind, written: Path, codes: ImageCodes
) -> None:
    """Texts, order and number of documents are kept; codes are those of what training would see."""
    before = samples(corpus() / kind.value)
    after = samples(written / kind.value)
    assert list(after) == list(before)
    layouts = Layout(kind), Layout(kind, modality=UnitModality.image)
    for key in before:
        old, new = (
            parse(layout, members[key], key=key).parts
            for layout, members in zip(layouts, (before, after), strict=True)
        )
        assert [p for p in new if isinstance(p, str)] == [p for p in old if isinstance(p, str)]
        assert [isinstance(p, Units) for p in new] == [isinstance(p, bytes) for p in old]
        images = np.stack([decode(p, SIDE) for p in old if isinstance(p, bytes)])
        # Which images are beside it in a batch may move a code, where two are equally near.
        found = np.stack([p.values for p in new if isinstance(p, Units)])
        assert (found == codes.encode(images)).mean() > 0.95
    paths = sorted((written / kind.value).glob("*.tar"))
    indexed = index_shards(paths, layout=layouts[1], tokenizer=corpora.tokenizer_path())
    assert (indexed.documents, indexed.dropped) == (len(before), {})


def test_members_that_are_no_images_stay(codebook: Path, tmp_path: Path) -> None:
    """Captions in a field of the .json, of which one is blank, and what nobody reads."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "in", name="train", documents_per_shard=9) as writer:
        texts = json.dumps({"caption": [" ", "two", "three"]}).encode()
        image = painted(rng)
        writer.members("a", {"jpg": image, "json": texts, "license.txt": b"free"})
        writer.members("b", {"jpg": image[:300], "json": texts})
        writer.members("c", {"json": texts})
        writer.members("d", {"jpg": image, "png": image, "json": texts})
        writer.members("e", {"jpg": image, "json": b"{}"})
    asked = ("write", "--codebook", codebook, "--kind", "caption", "--text-field", "caption")
    run(*asked, "--shards", tmp_path / "in" / "*.tar", "--out", tmp_path / "out", "--workers", 1)
    (members,) = samples(tmp_path / "out").values()
    assert {name: data for name, data in members.items() if name != "units.npy"} == {
        "json": texts,
        "license.txt": b"free",
    }
    receipt = json.loads((tmp_path / "out" / ".image_codes" / "train-000000.json").read_text())
    reasons = {reason: count for reason, (count, _) in receipt["left_out"].items()}
    expected = {"image_header", "missing_image", "several_images", "missing_text"}
    assert (receipt["documents"], receipt["images"], set(reasons)) == (1, 1, expected)


def test_killed_and_continued_it_writes_the_same_bytes(
    codebook: Path, written: Path, tmp_path: Path
) -> None:
    """Two processes are killed, one shard is cut off before its name, and nothing is done twice."""
    out, kind = tmp_path / "out", Kind.interleaved
    arguments = [str(word) for word in (*writing(codebook, out, kind), "--workers", 2)]
    command = [sys.executable, "-m", "data.prepare.image_codes", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(out.glob("*.tar")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    cut_off = out / "train-000000.tar"
    if cut_off in done:
        del done[cut_off]
        folder = out / ".image_codes" / "train-000000"
        folder.mkdir(exist_ok=True)
        cut_off.rename(folder / "coded-000000.tar")
    run(*writing(codebook, out, kind), "--workers", 1)
    assert contents(out) == contents(written / kind.value)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert {path.name for path in out.iterdir()} == {
        *contents(out),
        ".image_codes",
        CODEBOOK,
        PICTURE,
    }


def test_what_cannot_be_written_is_refused(
    codebook: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(codebook, other)
    given = load_file(other / "model.safetensors")
    save_file({**given, "decoder.conv_out.bias": torch.ones(3)}, other / "model.safetensors")
    caption = writing(other, written / "caption", Kind.caption)
    assert "was made with codebook" in refused(capsys, *caption)
    here = corpus() / "caption"
    assert "is not of this tool" in refused(capsys, *writing(codebook, here, Kind.caption))
    both = shards(Kind.caption).replace("/caption/", "/{caption,interleaved}/")
    asked = ("write", "--codebook", codebook, "--kind", "caption", "--shards", both)
    assert "the same name" in refused(capsys, *asked, "--out", tmp_path / "x")
    text = ("train", "--source", "text=x/*.tar", "--out", tmp_path / "y")
    assert "with a KIND of caption, interleaved" in refused(capsys, *text)
    for flag, value, sentence in (
        ("--patch-pixels", 6, "give a power of 2"),
        ("--side-pixels", 18, "make the side a multiple"),
        ("--channels", 40, "give a multiple of 32"),
        ("--codes", 1, "give 2 or more"),
        ("--steps", 0, "give 1 or more"),
    ):
        assert sentence in refused(capsys, *training(tmp_path / "z", flag, value))


@pytest.mark.parametrize(
    ("counts", "fraction", "perplexity"),
    [([3, 3, 3, 3], 1.0, 4.0), ([9, 0, 0, 0], 0.25, 1.0), ([5, 5, 0, 0], 0.5, 2.0), ([0], 0, 0)],
)
def test_usage(counts: list[int], fraction: float, perplexity: float) -> None:
    usage = Usage(np.array(counts))
    assert usage.fraction == fraction
    assert usage.perplexity == pytest.approx(perplexity)
