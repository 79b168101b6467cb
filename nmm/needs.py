"""What a configuration needs of the machine, checked before any work."""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from nmm.config import AttentionBackend, EngineConfig, LossBackend, ModelConfig
from nmm.errors import UserError
from nmm.model.loss import uses_liger
from nmm.model.plan import backend_on


def refuse_missing(model: ModelConfig, engine: EngineConfig, *, device: torch.device) -> None:
    """Raise UserError where training on `device` lacks a GPU, a package or a compiler."""
    on_gpu = device.type == "cuda"
    if model.attention is AttentionBackend.flex and not on_gpu:
        raise UserError(
            "model.attention is flex and this machine has no GPU; FlexAttention computes no "
            "gradients on CPUs: set model.attention=auto."
        )
    if model.loss is LossBackend.liger and not on_gpu:
        raise UserError(
            "model.loss is liger and this machine has no GPU, where its kernels run; set "
            "model.loss=auto."
        )
    if model.loss is LossBackend.liger and find_spec("liger_kernel") is None:
        raise UserError(
            "model.loss is liger and the package liger-kernel is not installed; run "
            "`pip install '.[liger]'`, or set model.loss=chunked."
        )
    missing = missing_for_compiling()
    for key, value, remedy in _compiling(model, engine, device=device):
        if missing:
            raise UserError(
                f"{key} is {value}, which compiles at the start, and {missing} is missing; "
                f"install it, or set {remedy}."
            )


def _compiling(
    model: ModelConfig, engine: EngineConfig, *, device: torch.device
) -> list[tuple[str, str, str]]:
    """Key, value and what to set instead, of everything that builds kernels on this device."""
    found = []
    if engine.compile:
        found.append(("engine.compile", "true", "engine.compile=false"))
    if backend_on(device, asked=model.attention) is AttentionBackend.flex:
        found.append(("model.attention", model.attention.name, "model.attention=mask"))
    if uses_liger(device, asked=model.loss):
        found.append(("model.loss", model.loss.name, "model.loss=chunked"))
    return found


def missing_for_compiling() -> str | None:
    """What torch.compile and Triton would not find: a compiler or Python's headers; else None."""
    compilers = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang"]
    if not any(shutil.which(name) for name in compilers if name):
        return "a C++ compiler (g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h (the package python3-dev)"
    return None
