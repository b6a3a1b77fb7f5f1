"""The stages that causes apply to."""

from research.diagnosis.types import STAGES

ALL = STAGES
ON_DATA = tuple(stage for stage in STAGES if stage != "rl")  # those that learn from the data's own answers
TEXT = ("pretrain", "sft")  # those whose loss is the cross-entropy of the next token
PROMPTED = ("sft", "distill", "preference", "reward")
ANSWERED = ("sft", "distill")
