"""Given weights in place of initial ones: a decoder or a vision encoder, of a file or a folder."""

from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nmm.config import GivenWeights, ModelConfig
from nmm.errors import UserError
from nmm.model.folder import Stored, by_our_names, check_folder, weight_files
from nmm.model.model import Model
from nmm.model.numbered import side_by_side

# What joins images to the decoder is new in every model, so no file gives it.
VISION, JOINTS = "vision.", ("patch.", "connector.")
# An id that a folder's model lacks keeps its initial row: those of images and of data.units.
BY_ID = {"embedding.weight", "head.weight"}
FLOATS = ("F64", "F32", "F16", "BF16")
SHOWN = 3


def check_given(config: ModelConfig, given: GivenWeights, *, tokenizer_hash: str) -> None:
    """Refuse what does not fit the model, by headers alone; raises UserError.

    The ids of a folder must be those of the tokenizer with that sha256.
    """
    with torch.device("meta"):
        model = Model(config)
    for key, path in _places(given):
        if Path(path).is_dir():
            check_folder(Path(path), key=key, config=config, tokenizer_hash=tokenizer_hash)
        names, stored = _names(model, key), _stored(path, key=key, config=config)
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        if Path(path).is_dir():
            names |= {
                name: _with_rows_of(shapes, name, names[name]) for name in BY_ID & names.keys()
            }
        _refuse_mismatch(names, _of_part(shapes, key), key=key, path=path)
        if odd := [name for name in names if stored[name].dtype not in FLOATS]:
            raise UserError(
                f"{key} is {path}, which has {odd[0]} as {stored[odd[0]].dtype}; give "
                f"floating-point weights ({', '.join(FLOATS)})."
            )


def load_given(model: Model, given: GivenWeights) -> None:
    """Copy what is given over the initial weights, in float32; `check_given` comes first."""
    parameters = dict(model.named_parameters())
    for key, path in _places(given):
        stored = _stored(path, key=key, config=model.config)
        with torch.no_grad():
            for name in _names(model, key):
                value = stored[name].read()
                parameters[name][: len(value)].copy_(value)


def _stored(path: str, *, key: str, config: ModelConfig) -> dict[str, Stored]:
    """The tensors by our names; the files are read when a tensor is."""
    files = weight_files(Path(path), key=key) if Path(path).is_dir() else [Path(path)]
    stored: dict[str, Stored] = {}
    for place in files:
        file = _open(place, key=key)
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            read = partial(file.get_tensor, name)
            stored[name] = Stored(tuple(part.get_shape()), part.get_dtype(), read)
    stored = side_by_side(stored, stack=_stacked)
    return by_our_names(stored, config=config) if Path(path).is_dir() else stored


def _stacked(parts: list[Stored]) -> Stored:
    """Experts side by side; where they differ, a shape or type that is refused."""
    shapes = {part.shape for part in parts}
    shape = parts[0].shape if len(shapes) == 1 else ()
    odd = [part.dtype for part in parts if part.dtype not in FLOATS]
    dtype = odd[0] if odd else parts[0].dtype
    return Stored((len(parts), *shape), dtype, lambda: torch.stack([x.read() for x in parts]))


def _with_rows_of(
    shapes: dict[str, tuple[int, ...]], name: str, wanted: tuple[int, ...]
) -> tuple[int, ...]:
    """The wanted shape, with fewer rows where a folder has fewer ids."""
    given = shapes.get(name, wanted)
    return (min(given[0], wanted[0]), *wanted[1:])


def _places(given: GivenWeights) -> list[tuple[str, str]]:
    places = {"weights.decoder": given.decoder, "weights.vision": given.vision}
    return [(key, path) for key, path in places.items() if path is not None]


def _names(model: nn.Module, key: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that a file must give."""
    return _of_part({name: tuple(p.shape) for name, p in model.named_parameters()}, key)


def _of_part(shapes: dict[str, tuple[int, ...]], key: str) -> dict[str, tuple[int, ...]]:
    """A whole model's file serves too: what belongs to its other parts is left out."""
    if key == "weights.vision":
        return {name: shape for name, shape in shapes.items() if name.startswith(VISION)}
    others = (VISION, *JOINTS)
    return {name: shape for name, shape in shapes.items() if not name.startswith(others)}


def _open(path: Path, *, key: str) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        problem = "does not exist" if not path.exists() else f"cannot be read ({error})"
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
