"""What the tests know about gemma.py."""

from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

import gemma
from helpers.families.common import Family, Mutation
from helpers.families.rotary import GROUPED, ROTARY, ROTARY_FAULTS, SMALL, rope, rotary_parts

GEMMA2 = {
    "model_type": "gemma2",
    "sliding_window": 5,
    "query_pre_attn_scalar": 20,
    "num_hidden_layers": 3,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "sliding_window": 5,
    "query_pre_attn_scalar": 20,
    "num_hidden_layers": 6,
}


def gemma_config(model_type="gemma", **sizes):
    """The three generations have a class each."""
    kinds = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig}
    return kinds[model_type](**sizes)


GEMMA_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}
GEMMA = Family(
    module=gemma,
    hf_config=gemma_config,
    cut={"vocab_size": 2000},
    halves=("bfloat16",),
    sizes=SMALL | {"pad_token_id": 0},
    configs={
        "plain": {},
        "grouped heads": GROUPED,
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
        "one key head, wide": {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "rms_norm_eps": 1e-2,
        },
        "second": GEMMA2,
        "second, grouped, no caps": {
            **GEMMA2,
            **GROUPED,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 16,
        },
        "third": GEMMA3,
        "third, slow": {**GEMMA3, **GROUPED, **GEMMA_ROPE, "num_hidden_layers": 7},
        # What no published Gemma has, but a config.json may say.
        "gelu": {"hidden_act": "gelu"},  # which means the tanh form in the first generation only
        "second, slow": {**GEMMA2, **rope("linear", factor=4.0), "hidden_activation": "gelu"},
        "third, erf": {**GEMMA3, "hidden_activation": "gelu"},
        "third, slow in its windows": {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            },
        },
    },
    parts=rotary_parts(gemma),
    mutations={
        **ROTARY_FAULTS,
        "epsilon of flax": Mutation("config.rms_norm_eps", "1e-6", "one key head, wide"),
        "weight and not 1 + weight": Mutation("x32 * (1 + self.scale", "x32 * (0 + self.scale"),
        "own head transposed": Mutation(
            '"lm_head.weight", True', '"lm_head.weight", False', "square head"
        ),
        "tokens not scaled": Mutation("self.config.hidden_size**0.5", "1.0"),
        "erf for tanh in GELU": Mutation("approximate=True", "approximate=False"),
        "gate and up exchanged": Mutation(
            "gate = self.act(self.gate_proj(x))",
            "gate = self.act(self.up_proj(x)) / self.up_proj(x) * self.gate_proj(x)",
        ),
        "scores not capped": Mutation(
            '"softcap": self.config.attn_logit_softcapping', '"softcap": None', "second"
        ),
        "logits not capped": Mutation("if cap is not None", "if False", "second"),
        "a window one longer": Mutation(
            "q_pos - k_pos < window", "q_pos - k_pos <= window", "second"
        ),
        "a window one shorter": Mutation(
            "q_pos - k_pos < window", "q_pos - k_pos < window - 1", "third"
        ),
        "windows in the other layers": Mutation(
            "layer_types[layer] == SLIDING", "layer_types[layer] != SLIDING", "second"
        ),
        "scale by Dh": Mutation(
            "config.query_pre_attn_scalar**-0.5", "config.head_dim**-0.5", "second"
        ),
        "norm after the sum": Mutation(
            "x = x + self.post_attention_layernorm(y)",
            "x = self.post_attention_layernorm(x + y)",
            "second",
        ),
        "no norm after the MLP": Mutation(
            "x = x + self.post_feedforward_layernorm(y)", "x = x + y", "third"
        ),
        "queries and keys not normed": Mutation(
            "q = self.q_norm(q)\n            k = self.k_norm(k)", "pass", "third"
        ),
        "one theta for all": Mutation(
            "theta = config.rope_local_base_freq", "theta = config.rope_theta", "third"
        ),
        "all layers slow": Mutation(
            "factor = config.rope_local_factor", "factor = config.rope_factor", "third, slow"
        ),
        "no layer slow": Mutation("inv_freq / factor", "inv_freq", "third, slow"),
        "sliding layers not slow": Mutation(
            "factor = config.rope_local_factor", "factor = 1.0", "second, slow"
        ),
        "tanh for erf in GELU": Mutation("approximate=False", "approximate=True", "third, erf"),
    },
    core="third",
    **ROTARY,
)
