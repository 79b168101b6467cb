"""Text that a trained model writes after images and text."""

from nmm.generate.loop import Prompts, Rule, continue_prompts
from nmm.generate.sampling import Sampling
from nmm.generate.text import Written, generate

__all__ = ["Prompts", "Rule", "Sampling", "Written", "continue_prompts", "generate"]
