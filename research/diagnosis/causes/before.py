"""Causes that are seen before a run, in what some steps at other learning rates give."""

from research.diagnosis.causes import stages
from research.diagnosis.types import Cause, Prediction, Relative

GROUP = "before a run"

CAUSES = (
    Cause(
        name="rate_above_range",
        group=GROUP,
        stages=stages.ON_DATA,
        predicts=(Prediction("range/diverges_at", "<=", 1.0), Prediction("range/own_over_best", ">=", 10.0)),
        sureness=0.8,
        remedy="--config.optimizer.learning_rate=... what range/best says, or less",
        why="At the config's learning rate the loss of a batch rises within six updates on it; a tenth lowers it.",
        source="a range test (Smith 2017, arXiv:1506.01186)",
        counterfactual="learning_rate_down",
    ),
    Cause(
        name="batch_not_learned",
        group=GROUP,
        stages=stages.TEXT,
        predicts=(Prediction("probe/memorise", ">", 0.98),),
        sureness=0.6,
        remedy="look at what is trained, at the masks, and at how the model begins",
        why="Some updates on one batch don't lower its loss, whatever the learning rate.",
        source="Karpathy 2019, A Recipe for Training Neural Networks (overfit one batch)",
    ),
    Cause(
        name="rate_below_range",
        group=GROUP,
        stages=stages.ON_DATA,
        predicts=(
            Prediction("range/own_over_best", "<=", 0.011),
            Prediction("range/own_gain", "<", Relative("range/gain", 0.02)),
            Prediction("range/gain", ">", Relative("probe/loss_train_mode", 0.02)),
        ),
        sureness=0.6,
        remedy="--config.optimizer.learning_rate=... a tenth of what range/best says",
        why="A learning rate a hundred times as high lowers the loss, and the config's doesn't.",
        source="a range test (Smith 2017, arXiv:1506.01186)",
        counterfactual="learning_rate_far_up",
    ),
)
