"""The model: plain torch modules that know no process group."""

from nmm.model.cache import Cache
from nmm.model.given import check_given, load_given
from nmm.model.init import Group, group, initialise, number
from nmm.model.model import Model, Output, build

__all__ = [
    "Cache",
    "Group",
    "Model",
    "Output",
    "build",
    "check_given",
    "group",
    "initialise",
    "load_given",
    "number",
]
