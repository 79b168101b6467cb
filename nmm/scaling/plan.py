"""From a law and a compute budget to a run: size, tokens, learning rate, days and the command.

What the papers say about a run of that size is in `nmm/scaling/rules.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nmm.errors import UserError
from nmm.flops import num_parameters, peak_flops_per_second
from nmm.scaling.allocation import Accounting, numeric_optimum
from nmm.scaling.bootstrap import intervals
from nmm.scaling.files import Written
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.rules import (
    GPU_BYTES,
    ROW_TOKENS,
    Model,
    checkpoint_steps,
    choose_model,
    learning_rate,
    published_rates,
    step_rows,
    zero_stage,
)
from nmm.schedule import Phases, phases

CHECKPOINT_BYTES = 12  # per parameter, in fp32 and bf16: float32 weights and two moments
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Budget:
    """What there is to spend: training FLOPs on so many GPUs at this fraction of their peak."""

    flops: float
    gpus: int = 8
    gpu: str = "H100"
    mfu: float = 0.4


@dataclass(frozen=True)
class Plan:
    """A run that spends the budget; `best_*` are the law's optimum, the others the model's."""

    budget: Budget
    family: str
    best_size: float
    best_tokens: float
    best_loss: float
    intervals: dict[str, tuple[float, float]]
    beyond: float  # times the largest FLOPs that the law was fitted to
    model: Model
    tokens: int
    loss: float
    rows: int
    learning_rate: float
    phases: Phases
    days: float
    zero_stage: int
    checkpoint_steps: int
    data: str

    @property
    def checkpoints(self) -> int:
        return -(-self.phases.total_steps // self.checkpoint_steps)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint."""
        return CHECKPOINT_BYTES * num_parameters(self.model.config).total

    @property
    def command(self) -> str:
        """The exact command for every node."""
        nodes = -(-self.budget.gpus // 8)
        launcher = f"torchrun --nproc_per_node {min(8, self.budget.gpus)}"
        if nodes > 1:
            launcher += f" --nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint HOST:29500"
        return f"{launcher} train.py {' '.join(self.overrides)}"

    @property
    def overrides(self) -> tuple[str, ...]:
        longer = ["schedule.longer_warmup=true"] * self.model.schedule.longer_warmup
        return (
            f"run.name=plan_{self.budget.flops:.3g}".replace("+", ""),
            *self.model.overrides,
            f"data={self.data}",
            f"data.global_rows={self.rows}",
            f"schedule.total_tokens={self.tokens}",
            *longer,
            f"optim.learning_rate={self.learning_rate:.3g}",
            f"engine=zero{self.zero_stage}",
            f"checkpoint.every_steps={self.checkpoint_steps}",
        )


def make_plan(
    fitted: Written, budget: Budget, *, family: str = "early", data: str = "mix_45_45_10"
) -> Plan:
    """The run for this budget by a law that was fitted; intervals where it was resampled."""
    record = fitted.record
    if record["law"] != "chinchilla":
        raise UserError(f"--fit holds the law {record['law']}; plans need the chinchilla law.")
    _check(budget)
    accounting = Accounting(**record["accounting"])
    parameters, flops = record["parameters"], np.array([budget.flops])
    best = numeric_optimum(parameters, flops=flops, accounting=accounting)
    model = choose_model(float(best[0][0]), family=family, data=data)
    tokens = round(accounting.tokens(flops=flops, size=np.array([float(model.size)]))[0])
    rows = step_rows(tokens, gpus=budget.gpus)
    step_tokens = rows * ROW_TOKENS
    schedule = replace(model.schedule, total_steps=None, total_tokens=tokens)
    steps = phases(schedule, tokens_per_step=step_tokens)
    days = budget.flops / (_peak(budget) * budget.gpus * budget.mfu * SECONDS_PER_DAY)
    return Plan(
        budget=budget,
        family=family,
        best_size=float(best[0][0]),
        best_tokens=float(best[1][0]),
        best_loss=_loss(parameters, size=best[0][0], tokens=best[1][0]),
        intervals=_intervals(fitted.resamples, flops=flops, accounting=accounting),
        beyond=budget.flops / _largest_flops(record),
        model=model,
        tokens=tokens,
        loss=_loss(parameters, size=float(model.size), tokens=float(tokens)),
        rows=rows,
        learning_rate=learning_rate(model.size, family=family, data=data),
        phases=steps,
        days=days,
        zero_stage=zero_stage(model.config, gpus=budget.gpus, gpu=budget.gpu),
        checkpoint_steps=checkpoint_steps(steps.total_steps, days=days),
        data=data,
    )


def _check(budget: Budget) -> None:
    if not 0 < budget.flops < np.inf:
        raise UserError(f"--flops is {budget.flops}; give a number above 0, like 1e21.")
    if budget.gpus < 1 or not 0 < budget.mfu <= 1:
        raise UserError(
            f"--gpus is {budget.gpus} and --mfu is {budget.mfu}; give at least one GPU and a "
            f"fraction above 0 and up to 1."
        )
    if budget.gpu not in GPU_BYTES:
        raise UserError(f"--gpu is {budget.gpu}; choose of: {', '.join(GPU_BYTES)}.")


def _peak(budget: Budget) -> float:
    peak = peak_flops_per_second(budget.gpu)
    assert peak is not None, budget
    return peak


def _loss(parameters: Mapping[str, float], *, size: float, tokens: float) -> float:
    columns = {"N": np.array([size]), "D": np.array([tokens])}
    return float(CHINCHILLA.predict(parameters, columns=columns)[0])


def _largest_flops(record: Mapping[str, Any]) -> float:
    ranges = record["ranges"]
    return ranges["C"][1] if "C" in ranges else 6 * ranges["N"][1] * ranges["D"][1]


def _intervals(
    resamples: Mapping[str, np.ndarray], *, flops: np.ndarray, accounting: Accounting
) -> dict[str, tuple[float, float]]:
    """Of the optimum's size, tokens and loss."""
    if not resamples:
        return {}
    spent = np.broadcast_to(flops, resamples["E"].shape)
    size, tokens = numeric_optimum(resamples, flops=spent, accounting=accounting)
    loss = CHINCHILLA.predict(resamples, columns={"N": size, "D": tokens})
    return intervals({"size": size, "tokens": tokens, "loss": loss})


def text(plan: Plan) -> str:
    """For people."""
    spread = {name: f"   [{low:.3g}, {high:.3g}]" for name, (low, high) in plan.intervals.items()}
    lines = [
        f"budget {plan.budget.flops:.4g} FLOPs",
        f"  best N      {plan.best_size:>12.4g}{spread.get('size', '')}",
        f"  best D      {plan.best_tokens:>12.4g}{spread.get('tokens', '')}",
        f"  loss        {plan.best_loss:>12.4f}{spread.get('loss', '')}",
        *_run_lines(plan),
    ]
    if plan.beyond > 1:
        lines.append(f"this is {plan.beyond:,.3g} times the FLOPs of the largest run of the fit")
    if plan.model.size < published_rates(plan.family, data=plan.data)[0][0] * 0.9:
        lines.append("the rate is that of the smallest published model, and this one is smaller")
    return "\n".join([*lines, "", plan.command])


def _run_lines(plan: Plan) -> list[str]:
    size, steps, budget = plan.model.size, plan.phases, plan.budget
    return [
        f"model {' '.join(plan.model.overrides)}: N = {size:,}, {plan.tokens / size:.1f} tokens a "
        f"parameter",
        f"  tokens      {plan.tokens:>12.4g}   in {steps.total_steps:,} steps of {plan.rows} rows "
        f"of {ROW_TOKENS:,}",
        f"  loss        {plan.loss:>12.4f}",
        f"  rate        {plan.learning_rate:>12.3g}   warmup {steps.warmup_steps:,}, cooldown "
        f"{steps.cooldown_steps:,} steps",
        f"  days        {plan.days:>12.2f}   on {budget.gpus} {budget.gpu} at {budget.mfu:.0%} of "
        f"their peak",
        f"  checkpoints {plan.checkpoints:>12}   of {plan.checkpoint_bytes / 1e9:,.1f} GB, every "
        f"{plan.checkpoint_steps:,} steps",
    ]
