"""Causes in distillation."""

from research.diagnosis.types import Cause, Prediction

GROUP = "distillation"
_STAGES = ("distill",)

CAUSES = (
    Cause(
        name="teacher_worse_than_student",
        group=GROUP,
        stages=_STAGES,
        predicts=(Prediction("teacher_gap", ">", 0.1), Prediction("teacher_of_uniform", "<", 1.1)),
        supports=(Prediction("eval_rise", ">", 0.0),),
        sureness=0.88,
        observed=True,
        remedy="name a teacher that predicts the data better (roles.teacher.init_from), or learn from the data: sft",
        why="The teacher predicts the data worse than the student did before training.",
        source="Burns et al. 2023, arXiv:2312.09390 (weak to strong; there it is on purpose)",
    ),
    Cause(
        name="teacher_reads_other_tokens",
        group=GROUP,
        stages=_STAGES,
        predicts=(Prediction("teacher_of_uniform", ">", 1.1),),
        sureness=0.93,
        observed=True,
        remedy="a teacher with the student's tokenizer, or --config.objective.terms.distill.kind=uld",
        why="The teacher is surer of wrong tokens than chance is: ids mean other tokens to it.",
        source="Boizard et al. 2024, arXiv:2402.12030 (distillation across tokenizers)",
        explains=("teacher_worse_than_student",),
    ),
    Cause(
        name="teacher_is_student",
        group=GROUP,
        stages=_STAGES,
        predicts=(
            Prediction("teacher/difference", "<", 1e-3),
            Prediction("teacher_gap", "between", (-0.002, 0.002)),
        ),
        supports=(Prediction("grad_norm.first", "<", 1e-3),),
        sureness=0.93,
        observed=True,
        remedy="--config.roles.teacher.init_from names the model that the student begins with: name another",
        why="The teacher is the model that the student begins with: there is nothing to learn from it.",
        source="measured by experiments/faults.py",
    ),
    Cause(
        name="teacher_without_weight",
        group=GROUP,
        stages=_STAGES,
        predicts=(Prediction("setup/teacher_weight", "<", 1e-2),),
        sureness=0.88,
        observed=True,
        remedy="--config.objective.terms: raise the weight of the term that reads the teacher",
        why="The term that reads the teacher has next to no weight.",
        source="Hinton et al. 2015, arXiv:1503.02531, section 2 (both terms have considerable weight)",
    ),
    Cause(
        name="temperature_squared_missing",
        group=GROUP,
        stages=_STAGES,
        predicts=(
            Prediction("setup/temperature", "between", (1.9, 15.0)),
            Prediction("setup/temperature_scaled", "==", 0),
            Prediction("setup/terms", ">", 1),
        ),
        sureness=0.85,
        observed=True,
        remedy="--config.objective.terms.distill.scale_by_temperature=True",
        why="Gradients of soft targets shrink with the temperature squared, and those of the labels don't.",
        source="Hinton et al. 2015, arXiv:1503.02531, section 2",
    ),
    Cause(
        name="temperature_too_high",
        group=GROUP,
        stages=_STAGES,
        predicts=(Prediction("setup/temperature", ">", 15.0),),
        sureness=0.85,
        observed=True,
        remedy="--config.objective.terms.distill.temperature=2",
        why="At this temperature all tokens are about as likely, and the teacher says nothing.",
        source="Hinton et al. 2015, arXiv:1503.02531, section 2.1",
        explains=("temperature_squared_missing", "lr_too_small", "teacher_is_student"),
    ),
)
