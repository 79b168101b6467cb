"""The engine against plain torch, over ZeRO stages, processes and micro-batches.

SGD is among the optimizers, because it hides no scale.
"""

import json
import math
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from data.loader import Loader
from nmm.batch import NO_LABEL, PackedBatch
from nmm.config import EngineConfig, OptimConfig, Precision
from nmm.engine import Split, deepspeed_config, split_step
from nmm.errors import UserError
from nmm.model import Group, Model, build, group
from nmm.needs import missing_for_compiling
from nmm.routing import Kept, Routed
from tests import corpora
from tests.engine_cases import MODELS, OPTIM, POISONED, STEPS, WATCHED, keys_of, rate

SAME = {"rel": 1e-5, "abs": 1e-6}


def launch(cases: list[dict], *, processes: int, directory: Path) -> list[dict]:
    """Results of the cases, all in one launch."""
    cases_path = write_cases(cases, directory / f"cases{processes}.json")
    out = directory / f"out{processes}.json"
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
    start([*launcher, "-m", "tests.engine_cases", str(cases_path), str(out)])
    return json.loads(out.read_text())


def write_cases(cases: list[dict], path: Path) -> Path:
    corpus = {"corpus": str(corpora.corpus_directory()), "tokenizer": str(corpora.tokenizer_path())}
    path.write_text(json.dumps([{**case, **corpus} for case in cases]))
    return path


def start(command: list[str]) -> None:
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def case(zero_stage: int, optim: str, *, micro_batch: int = 2, **others: object) -> dict:
    """A case of tests/engine_cases.py; any field but these may be left out."""
    return {
        "model": "early",
        "zero_stage": zero_stage,
        "optim": optim,
        "micro_batch": micro_batch,
        "precision": "fp32",
        "resume_at": None,
        "switches": {},
        "steps": STEPS,
        "blind_rank": None,
        "poison": None,
        **others,
    }


STAGES = (0, 1, 2, 3)
PLAIN = ("adamw", "sgd")
ONE = [case(z, o) for o in PLAIN for z in STAGES]
ONE += [case(z, "adamw", precision="bf16") for z in STAGES[1:]]
ONE += [case(z, "adamw", resume_at=11) for z in STAGES]
ONE += [case(z, "adamw", precision="bf16", resume_at=11) for z in STAGES[1:]]
TWO = [case(z, o, micro_batch=m) for o in PLAIN for z in STAGES for m in (2, 4)]
TWO += [case(z, "adamw", resume_at=11) for z in STAGES]

# The other members of the family, over fewer steps.
SHORT = 4
LATE = {"model": "late", "steps": SHORT}
ONE += [case(z, o, **LATE) for o in PLAIN for z in STAGES]
ONE += [case(z, "adamw", **LATE, resume_at=2) for z in (1, 3)]
ONE += [case(z, "frozen", **LATE, resume_at=r) for z in (1, 3) for r in (None, 2)]
ONE += [case(2, "frozen", **LATE, precision="bf16", resume_at=r) for r in (None, 2)]
ONE += [
    case(z, "adamw", model="tied", steps=SHORT, resume_at=r) for z in (0, 1, 3) for r in (None, 2)
]
TWO += [case(z, "sgd", **LATE) for z in STAGES]
TWO += [case(z, "sgd", **LATE, blind_rank=1) for z in STAGES]
FEW = 6
SWITCHES = ["activation_checkpointing", *([] if missing_for_compiling() else ["compile"])]
TWO += [case(z, "sgd", switches={switch: True}, steps=FEW) for switch in SWITCHES for z in STAGES]
TWO += [case(3, "sgd", **LATE, switches={switch: True}) for switch in SWITCHES]
POISONS = ("loss", "gradient")
ORDER = (0, 1, 4, 5, 2, 3, 6, 7)  # the rows of process 0, then those of process 1
TWO += [case(z, "adamw", poison=poison, steps=FEW) for poison in POISONS for z in STAGES]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every case by name, e.g. "1 process x 4 micro-batches, ZeRO 2, sgd"."""
    directory = tmp_path_factory.mktemp("engine")
    named = {}
    for processes, cases in ((1, ONE), (2, TWO)):
        for one, result in zip(
            cases, launch(cases, processes=processes, directory=directory), strict=True
        ):
            micro_batches = 8 // processes // one["micro_batch"]
            name = f"{processes} x {micro_batches}, ZeRO {one['zero_stage']}, {one['optim']}"
            name += ", bf16" if one["precision"] == "bf16" else ""
            name += "" if one["model"] == "early" else f", {one['model']}"
            name += ", blind" if one["blind_rank"] is not None else ""
            name += "".join(f", {switch}" for switch in one["switches"])
            name += f", bad {one['poison']}" if one["poison"] else ""
            named[name + (", resumed" if one["resume_at"] else "")] = result
    return named


def plain_torch(
    optim_name: str,
    *,
    model_name: str = "early",
    steps: int = STEPS,
    left_out: int | None = None,
) -> dict:
    """The same steps without DeepSpeed: the whole batch at once, decoupled decay by hand.

    The update of the step `left_out` is not made.
    """
    optim = OPTIM[optim_name]
    torch.set_num_threads(1)
    model = build(MODELS[model_name], seed=0)
    multipliers = {
        name: optim.vision_rate_multiplier if name.startswith("vision.") else 1.0
        for name, _ in model.named_parameters()
    }
    if model.config.moe.auxiliary_routers:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(group(name) is Group.auxiliary)
    alone = [{"params": [parameter]} for parameter in model.parameters()]
    data = corpora.config()
    loader = Loader(
        corpora.open_corpus(data),
        data,
        rank=0,
        world=1,
        micro_batch=8,
        workers=0,
    )
    if optim_name == "adamw":
        optimizer = torch.optim.Adam(alone, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    else:
        optimizer = torch.optim.SGD(alone)
    losses, norms, signals, routed = [], [], [], []
    rows: list[list[str]] = []
    outputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, fed: outputs.append(fed.output.detach()))
    for step, ([batch], _) in enumerate(islice(loader, steps)):
        lr = rate(step, optim)
        outputs.clear()
        output = model(batch)
        loss = output.loss_sum / (batch.labels != NO_LABEL).sum()
        optimizer.zero_grad()
        (loss + output.auxiliary / (batch.document > 0).sum()).backward()
        if model.config.sparse:
            kept = Kept(output.kept.double()) if len(output.kept) else None
            routed.append(keys_of(Routed(output.routed.double()), kept, model=model.config))
        if step in WATCHED:
            signals.append(plain_signals(model, batch, outputs=outputs[: len(model.blocks)]))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm).item())
        losses.append(loss.item())
        if step == left_out:
            rows = batch.keys
            continue
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if group(name).decays and parameter.requires_grad:
                    shrink = 1 - optim.weight_decay * lr / optim.learning_rate
                    if optim_name == "adamw":
                        parameter.mul_(shrink)
                    else:
                        assert parameter.grad is not None
                        peak = optim.learning_rate * multipliers[name]
                        parameter.grad.add_(parameter, alpha=optim.weight_decay / peak)
        for options, multiplier in zip(optimizer.param_groups, multipliers.values(), strict=True):
            options["lr"] = lr * multiplier
        optimizer.step()
    weights = {n: p.detach().double().norm().item() for n, p in model.named_parameters()}
    found = {"losses": losses, "norms": norms, "weights": weights, "signals": signals}
    return {**found, "rows": rows, "routed": routed}


def plain_signals(model: Model, batch: PackedBatch, *, outputs: list[torch.Tensor]) -> dict:
    """The keys signals/... from whole tensors: all logits, all gradients."""
    found = {}
    for layer, output in enumerate(outputs):
        found[f"signals/output_rms/{layer}"] = output[batch.document > 0].square().mean().sqrt()
    with torch.no_grad():
        z = model.logits(batch)[batch.labels != NO_LABEL].logsumexp(dim=-1)
    found |= {"signals/logit_z/mean": z.mean(), "signals/logit_z/rms": z.square().mean().sqrt()}
    patterns = {
        "embedding": r"embedding\.weight",
        "image": r"(patch|vision|connector)\..*",
        "attention": r"blocks\.\d+\.attention\.(qkv|out)\.weight",
        "ffn": r"blocks\.\d+\.(ffn|depth_router)\..*",
        "norm": r"(blocks\..*)?norm\.(weight|bias)",
        "head": r"head\.weight",
    }
    patterns = {f"grad_norm/{name}": pattern for name, pattern in patterns.items()}
    for layer in range(model.config.depth):
        if model.config.moe.has_router:
            patterns[f"router_grad_norm/{layer}"] = rf"blocks\.{layer}\.ffn\.router\..*"
        if model.config.mod.picks(layer):
            patterns[f"depth_router_grad_norm/{layer}"] = rf"blocks\.{layer}\.depth_router\..*"
    for name, pattern in patterns.items():
        parts = [p for n, p in model.named_parameters() if re.fullmatch(pattern, n)]
        grads = [torch.zeros(1) if p.grad is None else p.grad.flatten() for p in parts]
        found[f"signals/{name}"] = torch.cat(grads).norm()
    groups = model.config.moe.groups.sizes if model.config.moe.has_router else {}
    for layer, block in enumerate(model.blocks if groups else []):
        gradient = block.ffn.router.weight.grad
        for number, name in enumerate(groups):
            if gradient is None:
                parts = list(block.ffn.router.auxiliary.get_submodule(name).parameters())
                of_group = torch.cat([p.grad.flatten() for p in parts])
            else:
                of_group = gradient.split(list(groups.values()))[number]
            found[f"signals/router_grad_norm/{layer}/{name}"] = of_group.norm()
    return {key: value.item() for key, value in found.items()}


@pytest.mark.parametrize("optim", PLAIN)
def test_every_split_and_stage_equals_plain_torch(results: dict[str, dict], optim: str) -> None:
    expected = plain_torch(optim)
    assert (
        expected["losses"][-1] < expected["losses"][0] - 0.5
    )  # it learns, so the comparison can fail
    assert max(expected["norms"]) > OPTIM[optim].clip_norm  # clipping takes part
    compared = [name for name in results if name.endswith(optim)]
    assert len(compared) == 12
    for name in compared:
        assert results[name]["losses"] == pytest.approx(expected["losses"], **SAME), name
        assert results[name]["norms"] == pytest.approx(expected["norms"], rel=1e-4), name
        assert results[name]["weights"] == pytest.approx(expected["weights"], **SAME), name
        assert len(expected["signals"]) == len(WATCHED)
        for found, plain in zip(results[name]["signals"], expected["signals"], strict=True):
            assert found == pytest.approx(plain, rel=1e-5), name


@pytest.mark.parametrize("poison", POISONS)
def test_an_update_that_is_no_number_is_as_if_it_had_not_been(
    results: dict[str, dict], poison: str
) -> None:
    """Spoiled in the first of two micro-batches of one of two processes; in every stage."""
    expected = plain_torch("adamw", steps=FEW, left_out=POISONED)
    kept = [step for step in range(FEW) if step != POISONED]
    for stage in STAGES:
        found = results[f"2 x 2, ZeRO {stage}, adamw, bad {poison}"]
        assert found["applied"] == [[step != POISONED] * 2 for step in range(FEW)], stage
        assert not math.isfinite(found["norms"][POISONED]), stage
        assert math.isfinite(found["losses"][POISONED]) == (poison == "gradient"), stage
        for key, tolerance in (("losses", SAME), ("norms", {"rel": 1e-4})):
            mine, theirs = ([one[key][step] for step in kept] for one in (found, expected))
            assert mine == pytest.approx(theirs, **tolerance), (stage, key)
        assert found["weights"] == pytest.approx(expected["weights"], **SAME), stage
        # Process 1 has rows 2 and 3, and 6 and 7, of the eight.
        rows = expected["rows"][2:4] if poison == "loss" else [expected["rows"][i] for i in ORDER]
        assert found["suspects"] == [key for row in rows for key in row], stage


@pytest.mark.parametrize("switch", ["activation_checkpointing", "compile"])
@pytest.mark.parametrize(
    ("model", "steps", "stages", "watched"),
    [("early", FEW, STAGES, 2), ("late", SHORT, (3,), 1)],
    ids=["early", "late"],
)
def test_switches_change_no_loss(
    results: dict[str, dict],
    switch: str,
    *,
    model: str,
    steps: int,
    stages: tuple[int, ...],
    watched: int,
) -> None:
    if switch == "compile" and missing_for_compiling():
        pytest.skip(f"{missing_for_compiling()} is missing, so nothing can be compiled here")
    expected = plain_torch("sgd", model_name=model, steps=steps)
    of_model = "" if model == "early" else f", {model}"
    for stage in stages:
        found = results[f"2 x 2, ZeRO {stage}, sgd{of_model}, {switch}"]
        assert found["losses"] == pytest.approx(expected["losses"], **SAME), stage
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4), stage
        assert len(found["signals"]) == watched
        for seen, plain in zip(found["signals"], expected["signals"], strict=False):
            assert seen == pytest.approx(plain, rel=1e-5), stage


def test_the_parts_of_the_gradient_are_all_of_it(results: dict[str, dict]) -> None:
    """In bf16 and after a resume too: their squares add up to the norm's."""
    for name, result in results.items():
        for step, signals in zip(WATCHED, result["signals"], strict=False):
            parts = [norm for key, norm in signals.items() if key.startswith("signals/grad_norm/")]
            assert len(parts) == 6
            assert math.hypot(*parts) == pytest.approx(result["norms"][step], rel=1e-5), name


@pytest.mark.parametrize("optim", PLAIN)
def test_late_fusion_equals_plain_torch_with_two_learning_rates(
    results: dict[str, dict], optim: str
) -> None:
    expected = plain_torch(optim, model_name="late", steps=SHORT)
    compared = [name for name in results if name.endswith(f"{optim}, late")]
    assert len(compared) == (8 if optim == "sgd" else 4)
    for name in compared:
        (signals,), (plain,) = results[name]["signals"], expected["signals"]
        assert signals == pytest.approx(plain, rel=1e-5), name
        assert results[name]["losses"] == pytest.approx(expected["losses"], **SAME), name
        assert results[name]["norms"] == pytest.approx(expected["norms"], rel=1e-4), name
        found, weights = (
            {n: norm for n, norm in of["weights"].items() if not moves_by_rounding(n, optim)}
            for of in (results[name], expected)
        )
        assert found == pytest.approx(weights, **SAME), name


def moves_by_rounding(name: str, optim: str) -> bool:
    """One vector added to all keys changes no attention where nothing is rotated.

    So the gradient is rounding, and AdamW takes steps of full length along it.
    """
    return optim == "adamw" and re.fullmatch(r"vision\..*k_norm\.bias", name) is not None


def test_a_process_without_images_takes_part(results: dict[str, dict]) -> None:
    """One of two processes never has an image; every stage trains, and to the same weights."""
    blind = [results[f"2 x 2, ZeRO {z}, sgd, late, blind"] for z in STAGES]
    for result in blind[1:]:
        assert result["losses"] == pytest.approx(blind[0]["losses"], **SAME)
        assert result["weights"] == pytest.approx(blind[0]["weights"], **SAME)
    seeing = results["2 x 2, ZeRO 0, sgd, late"]
    assert blind[0]["weights"]["vision.position"] != seeing["weights"]["vision.position"]


@pytest.mark.parametrize("name", ["ZeRO 1", "ZeRO 2, bf16", "ZeRO 3"])
def test_a_frozen_encoder_stays_as_it_began(results: dict[str, dict], name: str) -> None:
    stage, _, precision = name.partition(", ")
    result = results[f"1 x 4, {stage}, frozen, {'bf16, ' if precision else ''}late"]
    for parameter, p in build(MODELS["late"], seed=0).named_parameters():
        began = (p.bfloat16() if precision else p).detach().double().norm().item()
        stays = result["weights"][parameter] == pytest.approx(began, rel=1e-12)
        assert stays == parameter.startswith("vision."), parameter
    assert result["losses"][-1] < result["losses"][0]


def test_losses_by_source_do_not_depend_on_the_split(results: dict[str, dict]) -> None:
    expected = results["1 x 4, ZeRO 0, sgd"]["sources"]
    for name in ("2 x 2, ZeRO 1, sgd", "2 x 1, ZeRO 3, sgd"):
        for step, by_source in enumerate(results[name]["sources"]):
            assert by_source == pytest.approx(expected[step], rel=1e-4), (name, step)


def test_counts_are_summed_over_processes_and_micro_batches(results: dict[str, dict]) -> None:
    expected = results["1 x 4, ZeRO 0, sgd"]["counts"]
    assert len({step["skipped_images"] for step in expected}) > 3
    for name, result in results.items():
        if "blind" in name:  # which is about the images that its batches still have
            continue
        assert result["counts"] == expected[: len(result["counts"])], name


def test_resumed_equals_undisturbed_to_the_bit(results: dict[str, dict]) -> None:
    resumed = [name for name in results if name.endswith(", resumed")]
    assert len(resumed) == 19
    for name in resumed:
        assert results[name] == results[name.removesuffix(", resumed")], name


def test_held_out_losses_do_not_depend_on_stage_or_processes(results: dict[str, dict]) -> None:
    expected = results["1 x 4, ZeRO 0, sgd"]["held_out"]
    assert set(expected) > {"loss", "loss/kind/caption", "loss/source/text", "loss/modality/text"}
    for name in [name for name in results if name.endswith(", sgd")]:
        assert results[name]["held_out"] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("stage", STAGES[1:])
def test_bf16_learns_like_fp32(results: dict[str, dict], stage: int) -> None:
    bf16 = results[f"1 x 4, ZeRO {stage}, adamw, bf16"]
    fp32 = results[f"1 x 4, ZeRO {stage}, adamw"]
    assert bf16["losses"] != fp32["losses"]
    assert bf16["losses"] == pytest.approx(fp32["losses"], rel=0.02)
    assert bf16["norms"] == pytest.approx(fp32["norms"], rel=0.1)
    assert bf16["held_out"] == pytest.approx(fp32["held_out"], rel=0.02)


def test_bf16_without_zero_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"engine.zero_stage is 0 and engine.precision is bf16.*zero1"
    ):
        EngineConfig(zero_stage=0, precision=Precision.bf16)


@pytest.mark.parametrize(
    ("micro_batch", "world_size", "expected"),
    [
        (None, 1, Split(8, 1)),
        (2, 1, Split(2, 4)),
        (2, 2, Split(2, 2)),
        (4, 2, Split(4, 1)),
        (1, 8, Split(1, 1)),
    ],
)
def test_split_step(micro_batch: int | None, world_size: int, expected: Split) -> None:
    assert split_step(8, micro_batch=micro_batch, world_size=world_size) == expected


@pytest.mark.parametrize(("micro_batch", "world_size"), [(3, 1), (8, 2), (None, 3)])
def test_a_step_that_cannot_be_split_is_refused(micro_batch: int | None, world_size: int) -> None:
    with pytest.raises(UserError, match=r"data.global_rows is 8"):
        split_step(8, micro_batch=micro_batch, world_size=world_size)


def test_deepspeed_config_writes_out_what_releases_changed() -> None:
    config = deepspeed_config(
        EngineConfig(zero_stage=2), split=Split(2, 4), clip_norm=OptimConfig().clip_norm
    )
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["zero_optimization"] == {"stage": 2}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (
        2,
        4,
    )
