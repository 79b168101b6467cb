"""Text and images that a trained model writes after text and images."""

from nmm.generate.loop import Prompts, Rule, continue_prompts
from nmm.generate.rules import Writing
from nmm.generate.sampling import Sampling
from nmm.generate.text import Written, generate

__all__ = ["Prompts", "Rule", "Sampling", "Writing", "Written", "continue_prompts", "generate"]
