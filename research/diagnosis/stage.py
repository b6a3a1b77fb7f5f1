"""What kind of training a run is."""

from research.config import Config
from research.objectives.terms import Terms


def stage_of(config: Config, terms: Terms) -> str:
    """One of types.STAGES, by what the objective reads."""
    read = {field for term in terms.values() for field in term.objective.fields}
    frozen = {role for term in terms.values() for role in term.objective.frozen}
    if config.rewards:
        return "rl"
    if config.model.num_labels == 1 or "reward" in terms:
        return "reward"
    if read & {"pair", "side", "desirable", "mismatched", "reference_log_prob"} or "reference" in frozen:
        return "preference"
    if frozen or "teacher_ids" in read:
        return "distill"
    if "label_probs" in read:
        return "classify"
    return "sft" if "loss_mask" in read else "pretrain"
