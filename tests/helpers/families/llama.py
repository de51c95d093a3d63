"""What the tests know about llama.py."""

from transformers import GraniteConfig, LlamaConfig, SmolLM3Config

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
    rotary_hf_parts,
    rotary_parts,
)


def llama_config(model_type="llama", **sizes):
    kinds = {"llama": LlamaConfig, "smollm3": SmolLM3Config, "granite": GraniteConfig}
    return kinds[model_type](**sizes)


def llama_hf_parts(hf, tokens, x):
    """Of a Granite, the head includes the division that follows it."""
    parts = rotary_hf_parts(hf, tokens, x)
    return {**parts, "head": parts["head"] / getattr(hf.config, "logits_scaling", 1)}


SMOLLM3 = {"model_type": "smollm3", **GROUPED}
GRANITE = {  # no multiplier is 1: to forget it must show
    "model_type": "granite",
    **GROUPED,
    "embedding_multiplier": 12,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.05,
    "logits_scaling": 8,
}
LLAMA = Family(
    module=llama,
    hf_config=llama_config,
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
        "SmolLM3": {**SMOLLM3, "num_hidden_layers": 5},
        "SmolLM3, listed layers, yarn": {
            **SMOLLM3,
            **YARN["yarn"],
            "num_hidden_layers": 3,
            "no_rope_layers": [0, 1, 0],
            "tie_word_embeddings": False,
        },
        "Granite": GRANITE,
        "Granite, yarn": {**GRANITE, **YARN["yarn"], "num_hidden_layers": 3},
        "Granite, square head": {
            **GRANITE,
            "vocab_size": 48,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
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
        "RoPE in every layer": Mutation("if self.has_rope:", "if True:", "SmolLM3"),
        "RoPE in the other layers": Mutation(
            "self.no_rope_layers[layer] == 1",
            "self.no_rope_layers[layer] == 0",
            "SmolLM3, listed layers, yarn",
        ),
        "RoPE one layer late": Mutation(
            "self.no_rope_layers[layer] == 1", "self.no_rope_layers[layer - 1] == 1", "SmolLM3"
        ),
        "listed layers ignored": Mutation(
            "if config.no_rope_layers is None:", "if True:", "SmolLM3, listed layers, yarn"
        ),
        "YaRN's scores in layers without RoPE, too": Mutation(
            " or not has_rope:", ":", "SmolLM3, listed layers, yarn"
        ),
        "embeddings not multiplied": Mutation(
            "x = x * self.config.embedding_multiplier", "pass", "Granite"
        ),
        "embeddings multiplied by sqrt(D)": Mutation(
            "self.config.embedding_multiplier", "self.config.hidden_size**0.5", "Granite"
        ),
        "what attention adds not multiplied": Mutation(
            "x + y * self.residual_multiplier  #", "x + y  #", "Granite"
        ),
        "what the MLP adds not multiplied": Mutation(
            "x = x + y * self.residual_multiplier\n", "x = x + y\n", "Granite"
        ),
        "the stream multiplied, too": Mutation(
            "x = x + y * self.residual_multiplier\n",
            "x = (x + y) * self.residual_multiplier\n",
            "Granite",
        ),
        "Llama's attention scale": Mutation(
            "scale = config.attention_multiplier", "pass", "Granite"
        ),
        "attention scale beside Llama's": Mutation(
            "scale = config.attention_multiplier", "scale *= config.attention_multiplier", "Granite"
        ),
        "attention scale without YaRN's": Mutation(
            "scale = config.attention_multiplier",
            "return config.attention_multiplier",
            "Granite, yarn",
        ),
        "logits not divided": Mutation(
            "logits = logits / self.config.logits_scaling", "pass", "Granite"
        ),
        "logits multiplied": Mutation(
            "logits / self.config.logits_scaling",
            "logits * self.config.logits_scaling",
            "Granite, square head",
        ),
    },
    core="llama3 RoPE",
    **{**ROTARY, "hf_parts": llama_hf_parts},
)
