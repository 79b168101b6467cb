"""The model: plain torch modules that know no process group."""

from nmm.model.init import decays, initialise
from nmm.model.model import Model, Output, build

__all__ = ["Model", "Output", "build", "decays", "initialise"]
