"""How a step is spread over processes and in which precision it is computed."""

from dataclasses import dataclass
from enum import Enum

from nmm.config.check import positive
from nmm.errors import UserError


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class EngineConfig:
    """`micro_batch` is rows per process and forward pass; null is a step's whole share at once.

    `activation_checkpointing` keeps only the inputs of the blocks for the way back and runs each
    block a second time there: less memory for a third more work. `compile` runs the blocks through
    torch.compile, which takes a minute or so at the start and needs a C++ compiler. An update whose
    loss or gradient is no number is left out; `max_skipped_in_a_row` of them stop the run.

    `expert_parallel` neighbouring processes share the experts of every layer, each with an equal
    part of every group of experts; tokens travel to them and back. More memory for experts, and
    more to send; 1 is every expert on every process.
    """

    zero_stage: int = 1
    micro_batch: int | None = None
    precision: Precision = Precision.bf16
    activation_checkpointing: bool = False
    compile: bool = False
    max_skipped_in_a_row: int = 3
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        positive(engine__micro_batch=self.micro_batch)
        positive(engine__max_skipped_in_a_row=self.max_skipped_in_a_row)
        positive(engine__expert_parallel=self.expert_parallel)
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"engine.zero_stage is {self.zero_stage}; choose 0, 1, 2 or 3.")
        if self.zero_stage == 0 and self.precision is Precision.bf16:
            raise UserError(
                "engine.zero_stage is 0 and engine.precision is bf16; DeepSpeed's optimizer for "
                "this pair diverges from plain torch: choose "
                "engine=zero1, or engine.precision=fp32."
            )
        if self.zero_stage == 0 and self.expert_parallel > 1:
            raise UserError(
                f"engine.zero_stage is 0 and engine.expert_parallel is {self.expert_parallel}, "
                f"which DeepSpeed does not do together; choose engine=zero1, or "
                f"engine.expert_parallel=1."
            )
