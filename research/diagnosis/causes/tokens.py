"""Causes in the tokenizer and the template."""

from research.diagnosis.causes import stages
from research.diagnosis.types import Cause, Prediction

GROUP = "tokens"
_LANGUAGE = ("pretrain", "sft", "distill", "preference")

CAUSES = (
    Cause(
        name="tokenizer_mismatch",
        group=GROUP,
        stages=_LANGUAGE,
        predicts=(
            Prediction("setup/init_from", "==", 1),
            Prediction("tokens_of_base", "<", 0.9),
            Prediction("base_of_uniform", ">", 1.15),
        ),
        supports=(Prediction("parameters/from_checkpoint", ">", 0.99), Prediction("loss.last_over_first", "<", 0.8)),
        sureness=0.85,
        remedy="--config.tokenizer.kind=auto, which takes the tokenizer of model.init_from",
        why="The model that it begins with is surer of wrong tokens than chance is: ids mean other tokens to it.",
        source="measured by experiments/faults.py",
        explains=("random_labels", "answers_of_other_prompts", "lr_too_high", "evaluation_of_other_data"),
    ),
    Cause(
        name="ids_beyond_vocabulary",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("setup/ids_beyond", ">", 0.0),),
        sureness=0.99,
        observed=True,
        remedy="--config.model.vocab_size=0, which follows the tokenizer; and the tokenizer of the model",
        why="The batches have ids that the embedding has no rows for: they read, and predict, another token's.",
        source="JAX clamps indices that are out of bounds",
        explains=("tokenizer_mismatch", "random_labels"),
    ),
    Cause(
        name="double_bos",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("tokens/double_bos", ">", 0.5),),
        sureness=0.93,
        observed=True,
        remedy="take the token that begins a text out of the template, or out of the data's texts",
        why="Texts begin with their first token twice, which the model has never seen.",
        source="transformers adds it where a chat template has written it already",
        explains=("tokenizer_mismatch",),
    ),
    Cause(
        name="lossy_tokenizer",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("tokens/round_trip", "<", 0.9),),
        sureness=0.9,
        observed=True,
        remedy="another tokenizer (tokenizer.kind), or one without a normalizer",
        why="The tokenizer loses what sets texts apart, so that the model can't learn it.",
        source="Ali et al. 2024, arXiv:2310.08754 (what tokenizers do to models)",
        explains=("unknown_tokens", "contradictory_duplicates"),
    ),
    Cause(
        name="unknown_tokens",
        group=GROUP,
        stages=stages.ALL,
        predicts=(Prediction("tokens/unknown", ">", 0.02),),
        sureness=0.9,
        observed=True,
        remedy="a tokenizer with bytes to fall back on: tokenizer.kind = 'bpe' or 'byte'",
        why="Many tokens are the one for what the tokenizer doesn't know.",
        source="measured by nothing here: the tokenizers of the study know every byte",
    ),
    Cause(
        name="untrained_tokens",
        group=GROUP,
        stages=_LANGUAGE,
        predicts=(Prediction("setup/init_from", "==", 1), Prediction("tokens/untrained", ">", 0.05)),
        sureness=0.8,
        observed=True,
        remedy="--config.model.new_rows=mean, and train them: trainable or adapter.also = 'embed.*'",
        why="Many of the tokens have embeddings that were never trained, far from all the others.",
        source="Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html; Land and Bartolo 2024, arXiv:2405.05417",
        explains=("tokenizer_mismatch", "random_labels", "weights_partly_loaded"),
    ),
)
