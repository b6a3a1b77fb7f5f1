"""Causes in the precision of numbers."""

from research.diagnosis.causes import stages
from research.diagnosis.types import Cause, Prediction

GROUP = "precision"

CAUSES = (
    Cause(
        name="bf16_underflow",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("rounded.median", ">", 0.3), Prediction("update_ratio.median", ">", 0.0)),
        supports=(Prediction("moved.median", "<", 0.6), Prediction("setup/trained_bits", "<", 32)),
        sureness=0.93,
        observed=True,
        remedy="keep what is trained in float32 (trained_dtype; compute in bfloat16: model.dtype), round it "
        "stochastically (optimizer.rounding), or raise the learning rate",
        why="Updates are smaller than half a unit in the last place of the parameters, and are lost to rounding.",
        source="Micikevicius et al. 2018, arXiv:1710.03740, section 3.1 (master weights)",
        explains=("lr_too_small", "optimizer_holds_stale_params"),
        counterfactual="float32",
    ),
    Cause(
        name="nan_batches_skipped",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("nonfinite.min", ">=", 1.0),),
        supports=(Prediction("update_ratio.max", "<=", 0.0),),
        sureness=0.97,
        observed=True,
        remedy="look at the first batch: an infinite weight, 0 / 0, a logarithm of 0; --config.model.dtype=float32",
        why="Loss or gradient is never finite, so that every update is skipped.",
        source="measured by experiments/faults.py",
        explains=(
            "optimizer_holds_stale_params",
            "lr_too_small",
            "lr_zero_schedule",
            "some_batches_not_finite",
            "all_labels_masked",
        ),
    ),
    Cause(
        name="some_batches_not_finite",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("nonfinite.mean", "between", (0.02, 0.99)),),
        sureness=0.9,
        observed=True,
        remedy="look at the batches of those steps; lower the learning rate where they come late",
        why="Some batches give a loss or gradient that isn't finite, and their updates are skipped.",
        source="measured by experiments/faults.py",
        explains=("lr_too_high", "one_exploding_batch"),
    ),
    Cause(
        name="softcap_too_small",
        group=GROUP,
        stages=("pretrain", "sft", "distill", "preference"),
        predicts=(Prediction("setup/logit_softcap", "between", (1e-9, 4.0)),),
        sureness=0.85,
        observed=True,
        remedy="--config.model.logit_softcap=30, as Gemma 2 has it, or 0 for none",
        why="Logits can't be larger than the cap, so that no token can be much likelier than the others.",
        source="Gemma 2, arXiv:2408.00118, section 2",
        explains=("random_labels", "lr_too_small", "tokenizer_mismatch"),
    ),
)
