"""What the tests know about llama.py."""

from transformers import LlamaConfig

import llama
from helpers.families.common import Family, Mutation
from helpers.families.rotary import (
    GROUPED,
    ROTARY,
    ROTARY_FAULTS,
    SMALL,
    YARN,
    YARN_FAULTS,
    rope,
    rotary_parts,
)

LLAMA = Family(
    module=llama,
    hf_config=LlamaConfig,
    sizes=SMALL | {"rms_norm_eps": 1e-5},
    configs={
        "plain": {},
        "grouped heads": {**GROUPED, "num_hidden_layers": 3, "tie_word_embeddings": False},
        "one key head": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20},
        "biases": {"attention_bias": True, "mlp_bias": True, **GROUPED, "head_dim": 8},
        "large epsilon and theta": {"rms_norm_eps": 1e-2, **rope("default", 500000.0)},
        "linear RoPE": rope("linear", factor=3.0),
        # Of 24 tokens and more, of which 16 were trained.
        "dynamic RoPE": {"max_position_embeddings": 16, **rope("dynamic", factor=8.0)},
        "llama3 RoPE": rope(
            "llama3",
            500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        **YARN,
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
    },
    parts=rotary_parts(llama),
    mutations={
        **ROTARY_FAULTS,
        "epsilon of flax": Mutation(
            "epsilon=config.rms_norm_eps", "epsilon=1e-6", "large epsilon and theta"
        ),
        "dynamic RoPE that does not grow": Mutation(
            "positions.max(axis=1) + 1", "positions.max(axis=1) * 0 + 1", "dynamic RoPE"
        ),
        "theta of Llama 1": Mutation(
            "theta = config.rope_theta",
            "theta = 10000.0",
            "large epsilon and theta",
        ),
        "keys not turned": Mutation(
            "k = rotate(k, positions - first, inv_freq)",
            "pass",
        ),
        "linear scaling ignored": Mutation("inv_freq = inv_freq / factor", "pass", "linear RoPE"),
        "Llama 3.1's scaling ignored": Mutation(
            "inv_freq = scale_low_frequencies(inv_freq, scaling)", "pass", "llama3 RoPE"
        ),
        "no transition between the bands": Mutation(
            "unscaled = np.clip((turns - low) / (high - low), 0, 1)",
            "unscaled = 1.0 * (turns > high)",
            "llama3 RoPE",
        ),
        **YARN_FAULTS,
        "gate and up exchanged": Mutation(
            "x = gate * self.up_proj(x)",
            "x = jax.nn.silu(self.up_proj(x)) * self.gate_proj(x)",
        ),
        "GELU for SiLU": Mutation("jax.nn.silu(", "jax.nn.gelu("),
        "one norm for both": Mutation(
            "self.mlp(self.post_attention_layernorm(x))", "self.mlp(self.input_layernorm(x))"
        ),
        "own head transposed": Mutation(
            '"lm_head.weight", True', '"lm_head.weight", False', "square head"
        ),
    },
    core="llama3 RoPE",
    **ROTARY,
)
