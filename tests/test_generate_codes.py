"""Images that a model writes as codes: whole ones only, in their places, and as pixels again."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore  # pyright: ignore

from data.codebook import write
from data.documents import Parts
from data.loader import held_out_batches
from data.prepare.image_codes.__main__ import main as image_codes
from data.prepare.index import index_shards
from data.store import CODEBOOK
from data.tokenizer import IdTable, Tokenizer, UnitIds
from data.units import Units
from nmm import evaluate, export
from nmm.batch import NO_LABEL, Modality
from nmm.begin import make_plan
from nmm.codes import ImageCodes
from nmm.codes.model import read
from nmm.codes.train import Learner, Recipe, small_config
from nmm.config import (
    ExpertGroups,
    ImageConfig,
    ImageKind,
    Kind,
    Layout,
    ModelConfig,
    MoEConfig,
    Routing,
    UnitModality,
    compose,
    load,
    read_yaml,
)
from nmm.errors import UserError
from nmm.generate import Sampling, Writing, continue_prompts, generate
from nmm.generate.__main__ import main
from nmm.generate.loop import Rule
from nmm.generate.rules import image_left, one_image, only_text, with_images
from nmm.generate.text import lay_out
from nmm.image_gap import with_images_of_others, with_text_labels
from nmm.model import Model, build
from nmm.parallel import World
from nmm.trained import read_export, read_run
from tests import corpora, runs

CPU = torch.device("cpu")
SIDE, CODES, TOKENS = 16, 8, 4
ROOM = 20
IMAGE = ImageConfig(ImageKind.codes)


@pytest.fixture(scope="module")
def codebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQ model that learned a little: images of 16 pixels are 4 of 8 codes."""
    shape = {"side_pixels": SIDE, "patch_pixels": 8, "codes": CODES, "channels": 32, "blocks": 0}
    learner = Learner(small_config(**shape), Recipe(20, 4, 2e-3, seed=1), device=CPU)
    rng = np.random.default_rng(0)
    images = [corpora.picture(rng, width=SIDE, height=SIDE, blur=8) for _ in range(32)]
    for _ in range(20):
        learner.step(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
    folder = tmp_path_factory.mktemp("codebook")
    learner.finished().save(folder)
    return folder


@pytest.fixture(scope="module")
def codes(codebook: Path) -> ImageCodes:
    return read(codebook, key="data.codebook")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(corpora.tokenizer_path(), units={UnitModality.image: CODES})


@pytest.fixture(scope="module")
def image(tokenizer: Tokenizer) -> UnitIds:
    return tokenizer.ids.units[Modality.image]


def that_prefers(ids: list[int], **options: object) -> Model:
    """An untrained model of whose logits these are by far the largest, or the smallest."""
    sizes = {"width": 32, "depth": 2, "heads": 2, "vocab_size": corpora.VOCAB_SIZE}
    model = build(ModelConfig(**{**sizes, "image": IMAGE, **options}), seed=3).eval()
    with torch.no_grad():
        model.head.weight[ids] *= 1000
    return model


@pytest.fixture(scope="module")
def model(image: UnitIds) -> Model:
    return that_prefers([image.begin])


def prompts() -> list[Parts]:
    """Images first, inside, last, beside each other and none; one that is empty."""
    one, two = Units(np.array([7, 0, 3, 3])), Units(np.array([1, 2, 3, 4]))
    return [[one], [one, "two green", two, "circle"], ["a small gate"], ["seven", two, one], []]


def written(model: Model, tokenizer: Tokenizer, rule: Rule, *, end: int) -> list[list[int]]:
    asked = prompts() * 40
    return continue_prompts(
        model,
        lay_out(asked, tokenizer=tokenizer, image=IMAGE),
        rule=rule,
        end=end,
        max_tokens=ROOM,
        sampling=Sampling(3.0, seed=1),
        streams=range(len(asked)),
    )


def letters(row: list[int], ids: IdTable) -> str:
    """t for text, < c > for the parts of an image, e for the end, ? for what may never come."""
    image = ids.units[Modality.image]
    names = {ids.eos: "e", image.begin: "<", image.end: ">"}
    names |= dict.fromkeys(range(image.first, image.first + image.count), "c")
    names |= dict.fromkeys((ids.pad, ids.unk, ids.bos), "?")
    return "".join(names.get(i, "t" if i < ids.text_end else "?") for i in row)


@pytest.mark.parametrize(
    ("ids", "left"),
    [
        ("", 0),
        ("x", 0),
        ("x<", 3),
        ("x<7", 2),
        ("x<73", 1),
        ("x<73>", 0),
        ("<73><", 3),
        ("<73>xxxx", 0),
    ],
)
def test_what_an_image_still_needs(ids: str, left: int) -> None:
    table = {"x": 1, "<": 40, ">": 41, "7": 49, "3": 45}
    image = UnitIds(begin=40, end=41, count=9)
    given = torch.tensor([[table[letter] for letter in ids]], dtype=torch.int64)
    assert image_left(given, image, image_codes=2).tolist() == [left]


@pytest.mark.parametrize("eager", ["image", "codes", "padding"])
def test_images_are_whole_and_codes_are_nowhere_else(
    tokenizer: Tokenizer, image: UnitIds, eager: str
) -> None:
    """Whatever a model prefers: beginning images, codes outside of them, or ids without meaning."""
    ids = tokenizer.ids
    unused = [ids.pad, ids.unk, ids.bos, ids.image, *range(ids.size, corpora.VOCAB_SIZE)]
    inside = [*range(image.first, image.first + CODES), image.end]
    preferred = {"image": [image.begin], "codes": inside, "padding": unused}[eager]
    model = that_prefers(preferred)
    rule = with_images(ids, model=model, image_codes=TOKENS, max_tokens=ROOM, end=ids.eos)
    rows = [letters(row, ids) for row in written(model, tokenizer, rule, end=ids.eos)]
    for row in rows:
        assert re.fullmatch(r"(t|<c{4}>)*e?", row), row
        assert len(row) == ROOM or row.endswith("e")
    if eager == "image":
        seen = Counter(letter for row in rows for letter in row)
        assert min(seen["<"], seen["t"], seen["e"]) > 0
        assert any(row.endswith("<cccc>") and len(row) == ROOM for row in rows)
    alone = written(
        model,
        tokenizer,
        one_image(ids, model=model, image_codes=TOKENS),
        end=image.end,
    )
    assert {letters(row, ids) for row in alone} == {"<cccc>"}
    text = written(model, tokenizer, only_text(ids, model=model, end=ids.eos), end=ids.eos)
    assert {letter for row in text for letter in letters(row, ids)} <= {"t", "e"}


ONE_EACH = MoEConfig(Routing.modality_hard, groups=ExpertGroups(text=1, image=1))


@pytest.mark.parametrize("moe", [MoEConfig(), ONE_EACH], ids=["dense", "experts by modality"])
def test_an_image_is_what_a_whole_document_predicts(
    moe: MoEConfig, tokenizer: Tokenizer, codes: ImageCodes, image: UnitIds
) -> None:
    """Every greedy code is the likeliest after all before it, in one pass without a cache."""
    model = that_prefers([image.begin], moe=moe)
    inside = slice(image.first, image.first + CODES)
    for parts in prompts():
        (drawn,) = generate(
            model, [parts], tokenizer=tokenizer, max_tokens=6, writing=Writing.image, codes=codes
        )
        (row,) = continue_prompts(
            model,
            lay_out([parts], tokenizer=tokenizer, image=IMAGE),
            rule=one_image(tokenizer.ids, model=model, image_codes=TOKENS),
            end=image.end,
            max_tokens=TOKENS + 2,
            sampling=Sampling(),
            streams=[0],
        )
        found = np.array(row[1:-1]) - image.first
        whole = lay_out([[*parts, Units(found)]], tokenizer=tokenizer, image=IMAGE)
        with torch.no_grad():
            logits = model.logits(whole.batch)[0]
        last = int(whole.lengths[0]) - 1  # the position of the image's end
        predicted = logits[last - TOKENS - 1 : last - 1, inside].argmax(-1)
        assert predicted.tolist() == found.tolist()
        assert drawn.ended
        assert drawn.text == ""
        assert np.array_equal(drawn.images, codes.decode(found[None]))


def test_texts_and_images_come_in_the_order_of_their_ids(
    model: Model, tokenizer: Tokenizer, codes: ImageCodes, image: UnitIds
) -> None:
    """Read by hand; and what is beside a prompt does not matter."""
    asked, sampling = prompts() * 8, Sampling(3.0, seed=2)
    rows = continue_prompts(
        model,
        lay_out(asked, tokenizer=tokenizer, image=IMAGE),
        rule=with_images(
            tokenizer.ids, model=model, image_codes=TOKENS, max_tokens=ROOM, end=tokenizer.ids.eos
        ),
        end=tokenizer.ids.eos,
        max_tokens=ROOM,
        sampling=sampling,
        streams=range(len(asked)),
    )
    several = [
        generate(
            model,
            asked,
            tokenizer=tokenizer,
            max_tokens=ROOM,
            sampling=sampling,
            at_once=at_once,
            writing=Writing.both,
            codes=codes,
        )
        for at_once in (64, 7)
    ]
    for number, (row, one, other) in enumerate(zip(rows, *several, strict=True)):
        shape = "".join("t" if isinstance(part, str) else "i" for part in one.parts)
        plain = letters(row, tokenizer.ids).removesuffix("e")
        # Ids of text that stand for no letter give no part, so shapes may have less text.
        assert shape.count("i") == plain.count("<")
        assert "tt" not in shape
        starts = [at for at, token in enumerate(row) if token == image.begin]
        for start, pixels in zip(starts, one.images, strict=True):
            inside = np.array(row[start + 1 : start + 1 + TOKENS]) - image.first
            assert np.array_equal(pixels, codes.decode(inside[None])[0])
        if len(asked[number]) == 0 and starts:
            first = tokenizer.decode(row[: starts[0]])
            assert (one.parts[0] if first else "") == first
        assert [*map(str, one.parts)] == [*map(str, other.parts)]
    assert sum(len(one.images) for one in several[0]) > 5


def coded(kind: Kind, codebook: Path, out: Path) -> Path:
    """The shards of the small run with their images as codes."""
    shards = f"{runs.corpus()}/{kind.value}/{{train-0,held_out}}*.tar"
    asked = ("--codebook", codebook, "--kind", kind.value, "--shards", shards)
    image_codes([str(word) for word in ("write", *asked, "--out", out, "--workers", 1)])
    layout = Layout(kind, modality=UnitModality.image)
    paths = sorted(out.glob("*.tar"))
    index_shards(paths, layout=layout, tokenizer=corpora.tokenizer_path())
    return out


@pytest.fixture(scope="module")
def words(codebook: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides of a short training on codes of both directions."""
    home = tmp_path_factory.mktemp("coded")
    sources = {
        f"data.sources.{kind.value}.{split}": f"{coded_at}/{split}*.tar"
        for kind in (Kind.caption, Kind.interleaved)
        for coded_at in [coded(kind, codebook, home / kind.value)]
        for split in ("train", "held_out")
    }
    given = dict(word.split("=", 1) for word in runs.overrides(runs.corpus(), home, *runs.WHOLE))
    given |= sources | {
        "data": "demo_codes",
        "data.codebook": str(codebook),
        "data.units.image": str(CODES),
        "model.image.kind": "codes",
        **runs.DEFAULT_PIXELS,
        "schedule.total_steps": "30",
        "checkpoint.every_steps": "30",
    }
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def other(codebook: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed_codebook(codebook, tmp_path_factory.mktemp("other") / "other")


@pytest.fixture(scope="module")
def launch(words: list[str], other: Path) -> CompletedProcess[str]:
    """The training, and then with another codebook, while no shard says which one it is of."""
    marks = {path: path.read_bytes() for path in marked(words)}
    more = (f"data.codebook={other}", "schedule.total_steps=40")
    done = runs.one_after_the_other([words, [*words, *more]], remove=[*marks])
    for path, content in marks.items():
        path.write_bytes(content)
    return done


@pytest.fixture(scope="module")
def run(words: list[str], launch: CompletedProcess[str]) -> Path:
    assert "finished" in launch.stdout, launch.stdout + launch.stderr
    (directory,) = [word.partition("=")[2] for word in words if word.startswith("run.dir=")]
    return Path(directory) / "whole"


def command(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_held_out_captions_are_drawn(run: Path, tmp_path: Path, codes: ImageCodes) -> None:
    """One image for each, as a file and on the page, which also has those of the documents."""
    drawn = ("--write", "image", "--held-out", 3, "--temperature", 1)
    command("--run", run, *drawn, "--out", tmp_path)
    command("--run", run, *drawn, "--out", tmp_path / "b", "--batch", 1)
    rows = lines(tmp_path / "drawings.jsonl")
    assert [row["written_images"] for row in rows] == [[f"drawings/{n}-0.png"] for n in range(3)]
    assert [row["written"] for row in rows] == [""] * 3
    for row in rows:
        (file,) = row["written_images"]
        shown = pixels(tmp_path / file)
        assert shown.shape == (SIDE, SIDE, 3)
        assert np.array_equal(shown, pixels(tmp_path / "b" / file))
        assert {*row["prompt"].strip(".").split()} <= {*corpora.WORDS}
    page = (tmp_path / "drawings.html").read_text()
    assert page.count("<img") == 6
    assert page.count('<img class="written') == page.count('<img class="reference') == 3
    assert re.findall(r'(?:src|href)="(?!data:)|url\(|@import', page) == []
    assert (tmp_path / "drawings.png").exists()


def test_images_are_read_and_written_between_texts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture as a file is made into codes; captions of held-out codes; both in one document."""
    picture = tmp_path / "a.jpg"
    picture.write_bytes(corpora.jpeg(np.random.default_rng(0), width=64, height=48))
    command("--run", run, "--image", picture, "--prompt", "two", "--max-tokens", 5)
    assert capsys.readouterr().out.startswith("[a.jpg]two")
    command("--run", run, "--held-out", 3, "--max-tokens", 5, "--out", tmp_path)
    assert all(row["reference"] for row in lines(tmp_path / "captions.jsonl"))
    both = ("--write", "both", "--temperature", 2, "--samples", 12, "--out", tmp_path)
    command("--run", run, "--image", picture, "--prompt", "two", *both)
    said = capsys.readouterr().out
    rows = lines(tmp_path / "generated.jsonl")
    files = [name for row in rows for name in row.get("written_images", []) if name]
    assert len(files) == said.count("[image]") > 0
    assert all(pixels(tmp_path / file).shape == (SIDE, SIDE, 3) for file in files)
    texts = [
        "".join(part or "[image]" for part in row.get("written_texts", [row["written"]]))
        for row in rows
    ]
    assert len({*texts}) > 1


def test_an_export_holds_the_codebook(
    run: Path, tmp_path: Path, codebook: Path, codes: ImageCodes
) -> None:
    """It draws the same images after the run's codebook has gone."""
    asked = ("--write", "image", "--prompt", "two", "--temperature", 1)
    command("--run", run, *asked, "--out", tmp_path / "a")
    export.main(["--run", str(run), "--out", str(tmp_path / "export")])
    found = read_export(tmp_path / "export", device=CPU)
    kept = found.codes()
    assert kept is not None
    manifest = json.loads((run / "manifest.json").read_text())
    hashes = {kept.sha256(), codes.sha256(), found.codebook_sha256, manifest["codebook_sha256"]}
    assert len(hashes) == 1
    command("--export", tmp_path / "export", *asked, "--out", tmp_path / "b")
    one, other = (pixels(tmp_path / side / "generated" / "0-0.png") for side in "ab")
    assert np.array_equal(one, other)
    trained = read_run(run, device=CPU)
    weights = dict(trained.model.state_dict())
    assert export.differences(trained, weights, tmp_path / "export") == []
    shutil.rmtree(tmp_path / "export" / "codebook")
    changed_codebook(codebook, tmp_path / "export" / "codebook")
    assert export.differences(trained, weights, tmp_path / "export") == ["codebook"]


def test_the_gap_swaps_codes_and_counts_text(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image gets that of another document, nothing else moves, and units are no labels."""
    trained = read_run(run, device=CPU)
    ids, data = trained.tokenizer.ids, trained.config.data
    corpus = trained.open_held_out()
    batch = next(
        batch
        for name, batches in held_out_batches(corpus, data, rows_per_source=2, micro_batch=2)
        for batch in batches
        if name == "caption"
    )
    swapped = with_images_of_others(batch)
    assert swapped is not None
    is_code = batch.modality == Modality.image
    assert torch.equal(swapped.tokens[~is_code], batch.tokens[~is_code])
    before, after = (b.tokens[is_code].view(-1, TOKENS).tolist() for b in (batch, swapped))
    assert after == [before[-1], *before[:-1]]  # a caption has one image
    text = with_text_labels(batch, ids)
    kept = text.labels != NO_LABEL
    assert torch.equal(kept, (batch.labels >= 0) & (batch.labels < ids.image))
    assert torch.equal(text.labels[kept], batch.labels[kept])
    assert not text.label_modality[~kept].any()
    monkeypatch.setattr("sys.argv", ["evaluate", "--run", str(run), "--image-gap", "--json"])
    evaluate.main()
    found = json.loads(capsys.readouterr().out)
    assert found["caption/own_images"] != found["caption/other_images"]
    assert found["loss/modality/image"] > 0
    assert found["loss/modality/text"] > 0


def changed_codebook(codebook: Path, out: Path) -> Path:
    """Of the same shape, with another colour."""
    shutil.copytree(codebook, out)
    given = load_file(out / "model.safetensors")
    save_file({**given, "decoder.conv_out.bias": torch.ones(3)}, out / "model.safetensors")
    return out


def marked(words: list[str]) -> list[Path]:
    """What says which codebook the shards of a training are of."""
    globs = [
        word.partition("=")[2] for word in words if re.match(r"data\.sources\.\w+\.train", word)
    ]
    return [path for glob in globs if (path := Path(glob).parent / CODEBOOK).exists()]


def test_another_codebook_is_refused(
    run: Path,
    launch: CompletedProcess[str],
    codebook: Path,
    other: Path,
    words: list[str],
    tmp_path: Path,
) -> None:
    """By training, new or going on, by generation, and one of another size."""
    # What no shard says is not checked, but for what the run began with.
    assert launch.returncode != 0
    assert "data.codebook (sha256)" in launch.stderr

    def plan(*changes: str) -> object:
        return make_plan(load(compose([*words, *changes])), world=World(0, 1, CPU, HashStore()))

    with pytest.raises(UserError, match=r"other \(sha256 .* of another VQ model .*; give that one"):
        plan(f"data.codebook={other}", "schedule.total_steps=40")
    marks = {path: path.read_bytes() for path in marked(words)}
    assert len(marks) == 2
    write(next(iter(marks)).parent, sha256="0" * 64, codes=CODES)
    with pytest.raises(UserError, match=r"data\.sources has image codes of two VQ models, in "):
        plan("data.codebook=null")
    for path, content in marks.items():
        path.write_bytes(content)
    copied = shutil.copytree(run, tmp_path / "run")
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(codebook), str(other)))
    assert read_run(copied, device=CPU).config.data.codebook == str(other)
    with pytest.raises(SystemExit, match=r"other, which is not the one of the training"):
        command("--run", copied, "--write", "image", "--prompt", "a", "--out", tmp_path)
    with pytest.raises(UserError, match=r"which has 8 codes, and data\.units\.image is 9; set"):
        plan("data.units.image=9")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--run", "PIXELS", "--write", "image", "--prompt", "a", "--out", "X"], "kind is patches"),
        (["--run", "NONE", "--write", "both", "--prompt", "a", "--out", "X"], "codebook is null"),
        (["--run", "RUN", "--write", "image", "--prompt", "a"], "images are files; give --out"),
        (["--run", "RUN", "--write", "both", "--held-out", "1"], "compares texts or images"),
        (
            [
                "--run",
                "RUN",
                "--write",
                "image",
                "--prompt",
                "a",
                "--max-tokens",
                "9",
                "--out",
                "X",
            ],
            "all images have the same length; leave it out",
        ),
        (
            ["--run", "RUN", "--write", "image", "--prompt", "two green " * 40, "--out", "X"],
            "at most 64",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    run: Path, tmp_path: Path, given: list[str], error: str
) -> None:
    without = shutil.copytree(run, tmp_path / "none")
    codebook = read_yaml(without / "config.yaml").data.codebook
    config = (without / "config.yaml").read_text()
    (without / "config.yaml").write_text(config.replace(f"codebook: {codebook}", "codebook: null"))
    places = {"PIXELS": runs.undisturbed(), "NONE": without, "RUN": run, "X": tmp_path / "x"}
    with pytest.raises(SystemExit, match=f"^error: .*{error}") as refusal:
        command(*(places.get(word, word) for word in given))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "x").exists()
