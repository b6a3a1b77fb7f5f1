"""Causes in what an evaluation can show."""

from research.diagnosis.causes import stages
from research.diagnosis.types import Cause, Prediction, Relative

GROUP = "evaluation"

CAUSES = (
    Cause(
        name="evaluation_too_small",
        group=GROUP,
        stages=stages.ON_DATA,
        predicts=(Prediction("data/eval_examples", "<", 6),),
        sureness=0.7,
        observed=True,
        remedy="--config.data.eval_fraction=0.2, or --config.data.eval_path with some hundred records",
        why="So few held-out examples can't tell a gain from chance.",
        source="Card et al. 2020, arXiv:2010.06595 (power)",
    ),
    Cause(
        name="evaluation_seen_in_training",
        group=GROUP,
        stages=stages.ON_DATA,
        predicts=(Prediction("data/overlap", ">", 0.3),),
        sureness=0.8,
        observed=True,
        remedy="take the held-out records out of training: understudy split",
        why="Held-out records are among those to train on: the evaluation tests memory.",
        source="Lee et al. 2022, arXiv:2107.06499, section 6",
    ),
    Cause(
        name="average_lags",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("average_horizon", "<", 0.5), Prediction("steps", ">=", 10)),
        supports=(Prediction("eval_fall", "<", Relative("loss_drop", 0.5)),),
        sureness=0.85,
        observed=True,
        remedy="--config.ema_decay=0: or one whose 1 / (1 - decay) is a small part of the steps",
        why="What is evaluated is a moving average that has hardly left the start.",
        source="Izmailov et al. 2018, arXiv:1803.05407 (averages of weights)",
    ),
    Cause(
        name="evaluation_of_other_data",
        group=GROUP,
        stages=stages.TEXT,
        predicts=(Prediction("eval_gap", ">", 0.25), Prediction("epochs", "<", 6.0)),
        sureness=0.65,
        remedy="--config.data.eval_path: evaluate on data like that which is trained on",
        why="Before training the held-out data is far harder than the data to train on: it is another kind.",
        source="measured by experiments/faults.py",
    ),
)
