"""Given weights in place of initial ones: a decoder or a vision encoder from a safetensors file."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nmm.config import GivenWeights, ModelConfig
from nmm.errors import UserError
from nmm.model.model import Model

# What joins images to the decoder is new in every model, so no file gives it.
VISION, JOINTS = "vision.", ("patch.", "connector.")
FLOATS = ("F64", "F32", "F16", "BF16")
SHOWN = 3


def check_given(config: ModelConfig, given: GivenWeights) -> None:
    """Refuse files that do not fit the model, by their headers alone; raises UserError."""
    with torch.device("meta"):
        model = Model(config)
    for key, path in _files(given):
        names = _names(model, key)
        with _open(path, key=key) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            stored = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
        _refuse_mismatch(names, _of_part(stored, key), key=key, path=path)
        if odd := [name for name in names if dtypes[name] not in FLOATS]:
            raise UserError(
                f"{key} is {path}, which has {odd[0]} as {dtypes[odd[0]]}; give floating-point "
                f"weights ({', '.join(FLOATS)})."
            )


def load_given(model: Model, given: GivenWeights) -> None:
    """Copy the files' tensors over the initial weights, in float32; `check_given` comes first."""
    parameters = dict(model.named_parameters())
    for key, path in _files(given):
        with _open(path, key=key) as file, torch.no_grad():
            for name in _names(model, key):
                parameters[name].copy_(file.get_tensor(name))


def _files(given: GivenWeights) -> list[tuple[str, str]]:
    files = {"weights.decoder": given.decoder, "weights.vision": given.vision}
    return [(key, path) for key, path in files.items() if path is not None]


def _names(model: nn.Module, key: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that a file must give."""
    return _of_part({name: tuple(p.shape) for name, p in model.named_parameters()}, key)


def _of_part(shapes: dict[str, tuple[int, ...]], key: str) -> dict[str, tuple[int, ...]]:
    """A whole model's file serves too: what belongs to its other parts is left out."""
    if key == "weights.vision":
        return {name: shape for name, shape in shapes.items() if name.startswith(VISION)}
    others = (VISION, *JOINTS)
    return {name: shape for name, shape in shapes.items() if not name.startswith(others)}


def _open(path: str, *, key: str) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        problem = "does not exist" if not Path(path).exists() else f"cannot be read ({error})"
        raise UserError(f"{key} is {path}, which {problem}; give a safetensors file.") from None


def _refuse_mismatch(
    wanted: dict[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
    *,
    key: str,
    path: str,
) -> None:
    """Every name once, every shape the same."""
    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    differing = [name for name in wanted if name in stored and wanted[name] != stored[name]]
    said = [
        f"lacks {_some(missing)}" if missing else "",
        f"has {_some(unknown)}, unknown to the model" if unknown else "",
        f"has {differing[0]} of shape {list(stored[differing[0]])} where the model has "
        f"{list(wanted[differing[0]])} ({len(differing)} differ)"
        if differing
        else "",
    ]
    if any(said):
        raise UserError(
            f"{key} is {path}, which {' and '.join(filter(None, said))}; give weights of the same "
            f"model.* keys, under the names of nmm/model/."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
