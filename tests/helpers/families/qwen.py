"""What the tests know about qwen.py."""

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

import qwen
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


def qwen_config(model_type="qwen3", **sizes):
    kinds = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
    return kinds[model_type](**sizes)


def qwen_names(gradients):
    """transformers keeps all experts of a layer in two tensors; files, and qwen.py, in 3 * E."""
    found = {}
    for name, gradient in gradients.items():
        if not name.endswith(("gate_up_proj", "experts.down_proj")):
            found[name] = gradient
            continue
        experts, _, kind = name.rpartition(".")
        for e, tensor in enumerate(gradient):
            if kind == "down_proj":
                found[f"{experts}.{e}.down_proj.weight"] = tensor
            else:
                gate, up = tensor.chunk(2)
                found[f"{experts}.{e}.gate_proj.weight"] = gate
                found[f"{experts}.{e}.up_proj.weight"] = up
    return found


QWEN2 = {"model_type": "qwen2", **GROUPED}
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
WINDOW = {"use_sliding_window": True, "num_hidden_layers": 3}
QWEN = Family(
    module=qwen,
    hf_config=qwen_config,
    sizes=SMALL,
    configs={
        "plain": {},
        "grouped heads": {**GROUPED, "num_hidden_layers": 3, "tie_word_embeddings": False},
        "biases": {"attention_bias": True, **GROUPED, "head_dim": 8},
        "Qwen2": QWEN2,
        "Qwen2, a window from layer 1 on": {
            **QWEN2,
            **WINDOW,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        "windows of 7 in some layers": {
            **WINDOW,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "large epsilon and theta": {"rms_norm_eps": 1e-2, **rope("default", 1e6)},
        "yarn": YARN["yarn"],
        "yarn, steep": YARN["yarn, steep"],
        "8 experts": {**MOE, **GROUPED},
        "3 experts in some layers, windows, yarn": {
            **MOE,
            **WINDOW,
            **YARN["yarn"],
            "num_experts": 3,
            "sliding_window": 7,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
        },
        "4 experts, one at a time, not in layer 0": {
            **MOE,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "mlp_only_layers": [0],
        },
        "both of 2 experts": {**MOE, "num_experts": 2, "norm_topk_prob": False},
        "weights that do not sum to 1": {**MOE, "norm_topk_prob": False},
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
    },
    parts=rotary_parts(qwen),
    mutations={
        **ROTARY_FAULTS,
        **YARN_FAULTS,
        "epsilon of flax": Mutation(
            "epsilon=config.rms_norm_eps", "epsilon=1e-5", "large epsilon and theta"
        ),
        "theta of Llama 1": Mutation(
            "theta = config.rope_theta", "theta = 10000.0", "large epsilon and theta"
        ),
        "queries not normed": Mutation("q = self.q_norm(q)", "pass"),
        "keys not normed": Mutation("k = self.k_norm(k)", "pass"),
        "norms of queries and keys exchanged": Mutation("self.q_norm(q)", "self.k_norm(q)"),
        "queries without their bias": Mutation(
            "q = self.q_proj(x).reshape", "q = (x @ self.q_proj.kernel[...]).reshape", "Qwen2"
        ),
        "keys not turned": Mutation("k = rotate(k, positions - first, inv_freq)", "pass"),
        "a window one longer": Mutation(
            "q_pos - k_pos < window", "q_pos - k_pos <= window", "Qwen2, a window from layer 1 on"
        ),
        "a window one shorter": Mutation(
            "q_pos - k_pos < window", "q_pos - k_pos + 1 < window", "windows of 7 in some layers"
        ),
        "GELU for SiLU": Mutation("jax.nn.silu(self.gate_proj", "jax.nn.gelu(self.gate_proj"),
        "gate and up exchanged": Mutation(
            "x = gate * self.up_proj(x)",
            "x = jax.nn.silu(self.up_proj(x)) * self.gate_proj(x)",
        ),
        "one norm for both": Mutation(
            "self.post_attention_layernorm(x)", "self.input_layernorm(x)"
        ),
        "weights of the chosen do not sum to 1": Mutation(
            "if self.norm_topk_prob:", "if False:", "8 experts"
        ),
        "weights of the chosen sum to 1": Mutation(
            "if self.norm_topk_prob:", "if True:", "weights that do not sum to 1"
        ),
        "one expert for two": Mutation(
            "self.per_token = config.num_experts_per_tok", "self.per_token = 1", "8 experts"
        ),
        "own head transposed": Mutation(
            '"lm_head.weight", True', '"lm_head.weight", False', "square head"
        ),
    },
    hf_names=qwen_names,
    cut={"num_hidden_layers": 1, "vocab_size": 1000},
    core="3 experts in some layers, windows, yarn",
    **ROTARY,
)
