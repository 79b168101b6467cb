"""A VQ model of Hugging Face transformers (JanusVQVAE): pixels to codes, and codes to pixels.

Legend of shapes: M images of S by S pixels, each of n codes.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from nmm.errors import UserError

if TYPE_CHECKING:
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

VQ, WHOLE = "janus_vqgan", "janus"  # model_type in config.json
UNIT_WITHIN = 1e-5
IN_WHOLE = "model.vqmodel."  # where a whole Janus keeps the weights
REMEDY = (
    "give a folder with config.json and model.safetensors of a JanusVQVAE, or train one with "
    "`python -m data.prepare.image_codes train`."
)


class ImageCodes:
    """Codes of images, row by row from the top left, and what images they stand for.

    The decoder scales every code's vector to length 1, so only its direction counts. They are
    stored so; then the code nearest to a latent vector is the one of the nearest direction, as
    Janus was trained.
    """

    def __init__(self, vq: "JanusVQVAE") -> None:
        self.vq = vq.eval().requires_grad_(False)
        table = vq.quantize.embedding.weight
        # What has the length already stays to the bit, so that reading again changes nothing.
        is_unit = (table.norm(dim=-1, keepdim=True) - 1).abs() < UNIT_WITHIN
        table.copy_(torch.where(is_unit, table, functional.normalize(table, dim=-1)))

    @property
    def codes(self) -> int:
        """Codes are 0 .. codes-1."""
        return self.vq.config.num_embeddings

    @property
    def side_codes(self) -> int:
        return self.vq.config.num_patches

    @property
    def tokens(self) -> int:
        """n, the codes of an image."""
        return self.side_codes**2

    @property
    def side_pixels(self) -> int:
        """S: every level of the encoder but the last halves the image."""
        return self.side_codes * 2 ** (len(self.vq.config.channel_multiplier) - 1)

    @property
    def device(self) -> torch.device:
        return self.vq.quantize.embedding.weight.device

    @torch.no_grad()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """int64[M, n] from uint8[M, S, S, 3]."""
        x = to_model(torch.from_numpy(pixels).to(self.device))
        found = self.vq.encode(cast(torch.LongTensor, x)).image_tokens  # it takes floats
        assert found is not None
        return found.reshape(len(pixels), -1).cpu().numpy()

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint8[M, S, S, 3] from int64[M, n]."""
        ids = torch.from_numpy(codes).to(self.device, torch.int64)
        x = self.vq.decode(cast(torch.LongTensor, ids))
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def sha256(self) -> str:
        """Of names and weights: codes of another model have other meanings."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vq.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "ImageCodes":
        self.vq.to(device)  # type: ignore[arg-type]
        return self

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors, which `JanusVQVAE.from_pretrained` reads as well."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.cpu().contiguous() for name, value in self.vq.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.vq.config.to_json_file(folder / "config.json", use_diff=False)


def to_model(pixels: Tensor) -> Tensor:
    """float32[M, 3, S, S] in -1 .. 1 from uint8[M, S, S, 3]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def build(config: "JanusVQVAEConfig") -> "JanusVQVAE":
    """A model with weights that are about to be replaced."""
    # NOTE: transformers is imported where it is used: it takes seconds, which only codes need.
    from transformers.models.janus.modeling_janus import JanusVQVAE

    return JanusVQVAE(config)


def read(folder: Path | str, *, key: str, device: torch.device | None = None) -> ImageCodes:
    """The model in a local folder, alone or inside a whole Janus; raises UserError.

    `key` is where the user named the folder.
    """
    folder = Path(folder)
    vq = build(_config(folder, key=key))
    _load(vq, folder, key=key)
    return ImageCodes(vq).to(device or torch.device("cpu"))


def _config(folder: Path, *, key: str) -> "JanusVQVAEConfig":
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig

    try:
        found = json.loads((folder / "config.json").read_text())
        kind = found["model_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no configuration"
        raise UserError(
            f"{key} is {folder}, whose config.json cannot be read ({reason}); {REMEDY}"
        ) from None
    if kind not in (VQ, WHOLE):
        raise UserError(f"{key} is {folder}, a model of type {kind}; {REMEDY}")
    facts = found["vq_config"] if kind == WHOLE else found
    # Where `kernels` is installed, transformers runs code of the hub that a config names so.
    plain = {name: value for name, value in facts.items() if "attn_implementation" not in name}
    return JanusVQVAEConfig.from_dict(plain)


def _load(vq: "JanusVQVAE", folder: Path, *, key: str) -> None:
    """Every weight under its name, with none missing and of the right shape; raises UserError."""
    wanted = vq.state_dict()
    given: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 - it is no dict
                    if (name := stored.removeprefix(IN_WHOLE)) in wanted:
                        given[name] = file.get_tensor(stored).float()
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{key} is {folder}, whose weights are damaged ({error}); {REMEDY}"
        ) from None
    wrong = [
        name
        for name, value in wanted.items()
        if name not in given or given[name].shape != value.shape
    ]
    if wrong:
        raise UserError(
            f"{key} is {folder}, where {wrong[0]} is missing or of another shape, as are "
            f"{len(wrong) - 1} more of {len(wanted)} weights; {REMEDY}"
        )
    vq.load_state_dict(given)
