"""Causes in what is trained, and in adapters."""

from research.diagnosis.causes import stages
from research.diagnosis.types import Cause, Prediction

GROUP = "frozen"
_NO_GRADIENT = Prediction("grad_norm.max", "<=", 0.0)
_SUPERVISED = Prediction("supervised_fraction.max", ">", 0.0)

CAUSES = (
    Cause(
        name="frozen_all",
        group=GROUP,
        stages=stages.ON_DATA,
        predicts=(
            _NO_GRADIENT,
            _SUPERVISED,
            Prediction("setup/adapter", "==", 0),
            Prediction("setup/kernels", ">", 1e-6),
        ),
        supports=(Prediction("update_ratio.max", "<=", 0.0),),
        sureness=0.93,
        remedy="--config.trainable='' trains all; and look for a stop_gradient (or no_grad) around the loss",
        why="Tokens are supervised, and every gradient is 0: nothing that is trained is in the loss.",
        source="measured by experiments/faults.py",
        explains=("lr_too_small",),
    ),
    Cause(
        name="only_norms_trainable",
        group=GROUP,
        stages=stages.ALL,
        predicts=(
            Prediction("setup/trained_share", "<", 0.02),
            Prediction("setup/adapter", "==", 0),
            Prediction("norms_of_gradient", ">", 0.95),
        ),
        sureness=0.9,
        observed=True,
        remedy="--config.trainable='' trains all; or an adapter: adapter = {'kind': 'lora'}",
        why="Hardly anything but the scales of norms is trained.",
        source="measured by experiments/faults.py",
        explains=("lr_too_small",),
        counterfactual="all_trained",
    ),
    Cause(
        name="lora_both_zero",
        group=GROUP,
        stages=stages.ON_DATA,
        predicts=(_NO_GRADIENT, _SUPERVISED, Prediction("setup/adapter", "==", 1)),
        supports=(Prediction("adapter_zero.last", ">", 0.0),),
        sureness=0.95,
        remedy="draw A at random (adapter.init = 'default'): where A and B are 0, neither has a gradient",
        why="The adapter has no gradient at all: both of its matrices are 0.",
        source="Hu et al. 2021, arXiv:2106.09685, section 4.1 (A is random, B is 0)",
        explains=(
            "frozen_all",
            "adapter_stays_zero",
            "lr_too_small",
            "optimizer_holds_stale_params",
            "weights_partly_loaded",
        ),
    ),
    Cause(
        name="adapter_stays_zero",
        group=GROUP,
        stages=stages.ALL,
        predicts=(
            Prediction("adapter_zero.last", ">", 0.0),
            Prediction("grad_norm.median", ">", 0.0),
            Prediction("steps", ">=", 8),
        ),
        sureness=0.9,
        observed=True,
        remedy="look at optimizer.groups and the learning rate of the adapter's B: it is 0 still",
        why="The adapter's second matrix is 0 still after some steps, so that the model is as it was.",
        source="Hu et al. 2021, arXiv:2106.09685",
        explains=("idle_group", "lr_too_small"),
    ),
    Cause(
        name="adapter_scale_tiny",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("setup/adapter_scale", "<", 0.05),),
        supports=(Prediction("loss_fall", "<", 0.02),),
        sureness=0.85,
        observed=True,
        remedy="adapter.alpha = ... about twice adapter.rank",
        why="What the adapter adds is multiplied by a very small number (alpha / rank), and so is its gradient.",
        source="Kalajdzievski 2023, arXiv:2312.03732 (the scale of LoRA)",
        explains=("lr_too_small", "adapter_stays_zero", "adam_eps_too_big"),
    ),
    Cause(
        name="adapter_matched_nothing",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("setup/adapter", "==", 1), Prediction("setup/trained_share", "<=", 0.0)),
        sureness=0.99,
        observed=True,
        remedy="adapter.targets = 'all', or an expression that matches the model's linear maps",
        why="The adapter's targets match none of the model's maps.",
        source="a run of this project refuses to begin so",
    ),
)
