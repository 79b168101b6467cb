"""The best mixture for one loss or for several at once, from fits as they are written down."""

import argparse
from collections.abc import Mapping, Sequence

import numpy as np

from nmm.errors import UserError
from nmm.scaling.bootstrap import intervals
from nmm.scaling.files import Record
from nmm.scaling.mixtures import MixtureLaw, best_shares

MOST_RESAMPLES = 200  # that are searched for their own best shares
KIND = "loss/kind/"

Law = tuple[MixtureLaw, Mapping[str, float]]


def weights_of(text: str | None) -> dict[str, float]:
    """ "text=2,caption=1" -> how much each loss counts; empty: all the same."""
    return {} if text is None else _numbers(text, option="--weights", example="text=2,caption=1")


def at_of(text: str | None) -> dict[str, float]:
    """ "N=1e9,D=1e11" -> the run that the mixture is for; empty: the largest of the data."""
    found = {} if text is None else _numbers(text, option="--at", example="N=1e9,D=1e11")
    if set(found) not in (set(), {"N", "D"}):
        raise UserError(f"--at is {text}; give N and D, like N=1e9,D=1e11.")
    return found


def _numbers(text: str, *, option: str, example: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = np.nan
    if not all(0 < value < np.inf for value in found.values()):
        raise UserError(f"{option} is {text}; give names with numbers above 0, like {example}.")
    return found


def check_mixing(arguments: argparse.Namespace, *, losses: Sequence[str]) -> None:
    """Refuse --weights and --at where there is no mixture to find, or no such loss."""
    given = [name for name in ("weights", "at") if getattr(arguments, name) is not None]
    if given and not arguments.law.startswith("mixture"):
        raise UserError(f"--{given[0]} belongs to --law mixture or mixture-joint; leave it out.")
    known = [loss.removeprefix(KIND) for loss in losses if loss != "loss"]
    if unknown := [name for name in weights_of(arguments.weights) if name not in known]:
        have = ", ".join(known) or "one loss only"
        raise UserError(f"--weights names {unknown[0]}, which is no loss of the data: {have}.")


def best_of_all(
    fits: Mapping[str, Record], *, weights: Mapping[str, float], at: Mapping[str, float]
) -> Record:
    """Shares with the lowest weighted mean of the losses of `fits` (by loss), with intervals.

    A loss without a weight does not count, where some have one.
    """
    counted = {name.removeprefix(KIND): fit for name, fit in fits.items()}
    if weights:
        counted = {name: counted[name] for name in weights}
    sum_of_weights = sum(weights.values()) or len(counted)
    shares_of_sum = [weights.get(name, 1.0) / sum_of_weights for name in counted]
    first = next(iter(counted.values()))
    size, tokens = (float(at.get(name, first["ranges"][name][1])) for name in "ND")
    laws = [_law(fit, parameters=fit["parameters"]) for fit in counted.values()]
    shares, loss = best_shares(laws, size=size, tokens=tokens, weights=shares_of_sum)
    columns = {f"share/{name}": np.array([share]) for name, share in shares.items()}
    columns |= {"N": np.array([size]), "D": np.array([tokens])}
    record: Record = {
        "N": size,
        "D": tokens,
        "weights": dict(zip(counted, shares_of_sum, strict=True)),
        "loss": loss,
        "losses": {
            name: float(law.predict(parameters, columns=columns)[0])
            for name, (law, parameters) in zip(counted, laws, strict=True)
        },
        "shares": shares,
        "intervals": {},
    }
    if all("bootstrap" in fit for fit in counted.values()):
        again = [
            best_shares(laws, size=size, tokens=tokens, weights=shares_of_sum, near=shares)[0]
            for laws in _resampled(list(counted.values()))
        ]
        found = {name: np.array([one[name] for one in again]) for name in shares}
        record["intervals"] = intervals(found)
    return record


def _law(fit: Record, *, parameters: Mapping[str, float]) -> Law:
    return MixtureLaw(tuple(fit["domains"]), joint=fit["law"] == "mixture_joint"), parameters


def _resampled(fits: Sequence[Record]) -> list[list[Law]]:
    """The laws of every resample; all losses were resampled alike."""
    columns = [fit["bootstrap"]["parameters"] for fit in fits]
    count = min(MOST_RESAMPLES, *(len(column["E"]) for column in columns))
    return [
        [
            _law(fit, parameters={name: values[place] for name, values in column.items()})
            for fit, column in zip(fits, columns, strict=True)
        ]
        for place in range(count)
    ]
