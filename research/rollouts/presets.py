"""Published algorithms as settings of a run with rewards, each spelt out; experiments copy them into their config."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """What an algorithm sets.

    Attributes:
      source: where it was published.
      loss: options of the term policy_gradient.
      advantage: of the config's `advantage`.
      rollout: of the config's `rollout`.
      besides: what else belongs to it and isn't set here, in words; "" for nothing.
    """

    source: str
    loss: Mapping[str, Any]
    advantage: Mapping[str, Any]
    rollout: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    besides: str = ""


_CLIP = {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2}
_KL_IN_REWARD = {"kl": {"weight": 0.05}}
_REFERENCE = "a reference (roles.reference)"

# Its loss is options of the term preference.
ONLINE_DPO = Preset("arXiv:2402.04792", {"kind": "sigmoid", "beta": 0.1}, {}, {"pairs": True}, besides=_REFERENCE)

PRESETS: dict[str, Preset] = {
    "reinforce": Preset(
        "Williams 1992, doi:10.1007/BF00992696",
        {"kind": "reinforce", "aggregation": "seq-mean-token-sum"},
        {"kind": "none", "scale": "none"},
    ),
    "ppo": Preset(
        "arXiv:1707.06347; of language models arXiv:2203.02155",
        {**_CLIP, "aggregation": "token-mean"},
        {"kind": "critic", "scale": "none", "whiten": "tokens", "lam": 0.95, **_KL_IN_REWARD},
        besides=f"{_REFERENCE}; a critic (roles.critic, the term value)",
    ),
    "grpo": Preset(
        "arXiv:2402.03300",
        {**_CLIP, "aggregation": "seq-mean-token-mean", "kl": "k3", "kl_coef": 0.04},
        {"kind": "group", "scale": "group"},
        besides=_REFERENCE,
    ),
    "dr_grpo": Preset(
        "arXiv:2503.20783",
        {**_CLIP, "aggregation": "seq-mean-token-sum-norm"},
        {"kind": "group", "scale": "none"},
        besides="the loss's budget is rollout.max_new_tokens",
    ),
    "dapo": Preset(
        "arXiv:2503.14476",
        {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token-mean"},
        {"kind": "group", "scale": "group"},
        {"filter_rounds": 4, "truncated": "mask"},
        besides="a reward that falls as an answer nears the longest",
    ),
    "rloo": Preset(
        "arXiv:2402.14740; its clip is TRL's",
        {"kind": "ppo_sequence", "clip_low": 0.2, "clip_high": 0.2},
        {"kind": "leave_one_out", "scale": "none", **_KL_IN_REWARD},
        besides=_REFERENCE,
    ),
    "reinforce++": Preset(
        "arXiv:2501.03262",
        {**_CLIP, "aggregation": "token-mean"},
        {"kind": "none", "scale": "none", "whiten": "tokens", **_KL_IN_REWARD},
        besides=_REFERENCE,
    ),
    "reinforce++_baseline": Preset(
        "arXiv:2501.03262, for groups of answers",
        {**_CLIP, "aggregation": "token-mean", "kl": "k2", "kl_coef": 0.001},
        {"kind": "group", "scale": "none", "whiten": "tokens"},
        besides=_REFERENCE,
    ),
    "remax": Preset(
        "arXiv:2310.10505",
        {"kind": "reinforce", "aggregation": "seq-mean-token-sum"},
        {"kind": "greedy", "scale": "none"},
        {"answers": 1},
    ),
    "opo": Preset(
        "arXiv:2505.23585",
        {"kind": "reinforce", "aggregation": "token-mean"},
        {"kind": "opo", "scale": "none"},
    ),
    "gpg": Preset(
        "arXiv:2504.02546",
        {"kind": "reinforce", "aggregation": "token-mean"},
        {"kind": "gpg", "scale": "none"},
    ),
    "gspo": Preset(
        "arXiv:2507.18071",
        {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq-mean-token-mean"},
        {"kind": "group", "scale": "group"},
    ),
    "luspo": Preset(
        "arXiv:2602.05261",
        {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq-mean-token-sum"},
        {"kind": "group", "scale": "group"},
    ),
    "cispo": Preset(
        "arXiv:2506.13585",
        {"kind": "cispo", "clip_high": 4.0, "aggregation": "token-mean"},
        {"kind": "group", "scale": "group"},
    ),
    "gmpo": Preset(
        "arXiv:2507.20673",
        {"kind": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
        {"kind": "group", "scale": "group"},
    ),
    "sapo": Preset(
        "arXiv:2511.20347",
        {"kind": "sapo", "tau_pos": 1.0, "tau_neg": 1.05, "aggregation": "seq-mean-token-mean"},
        {"kind": "group", "scale": "group"},
    ),
    "gdpo": Preset(
        "arXiv:2601.05242, for several rewards",
        {**_CLIP, "aggregation": "seq-mean-token-mean"},
        {"kind": "group", "scale": "group", "combine": "advantages", "whiten": "answers"},
    ),
}
