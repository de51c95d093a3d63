"""What the tests know about mistral.py."""

from transformers import Ministral3Config, MinistralConfig, MistralConfig, MixtralConfig

import mistral
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


def mistral_config(model_type="mistral", **sizes):
    kinds = {
        "mistral": MistralConfig,
        "mixtral": MixtralConfig,
        "ministral": MinistralConfig,
        "ministral3": Ministral3Config,
    }
    return kinds[model_type](**sizes)


def mixtral_names(gradients):
    """transformers keeps all experts of a layer in two tensors; files, and mistral.py, in 3 * E."""
    found = {}
    for name, gradient in gradients.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if ".mlp.gate.weight" in name else name
        if not name.endswith(("gate_up_proj", "experts.down_proj")):
            found[name] = gradient
            continue
        layer = name.split(".mlp.")[0] + ".block_sparse_moe.experts"
        for e, tensor in enumerate(gradient):
            if name.endswith("down_proj"):
                found[f"{layer}.{e}.w2.weight"] = tensor
            else:
                w1, w3 = tensor.chunk(2)
                found |= {f"{layer}.{e}.w1.weight": w1, f"{layer}.{e}.w3.weight": w3}
    return found


MIXTRAL = {"model_type": "mixtral", "sliding_window": None}
MINISTRAL = {
    "model_type": "ministral",
    "layer_types": ["full_attention", *["sliding_attention"] * 3],
    "sliding_window": 5,
    "num_hidden_layers": 4,
}
MINISTRAL3 = {  # YaRN that does not sharpen the scores, and queries that grow every 8 positions
    "model_type": "ministral3",
    "pad_token_id": 11,  # as where it is left out
    **rope(
        "yarn",
        500.0,
        factor=4.0,
        original_max_position_embeddings=8,
        mscale=1.0,
        mscale_all_dim=1.0,
        llama_4_scaling_beta=0.3,
    ),
}
MISTRAL = Family(
    module=mistral,
    hf_config=mistral_config,
    sizes=SMALL | {"sliding_window": None, "rms_norm_eps": 1e-5},
    configs={
        "plain": {},
        "grouped heads": {**GROUPED, "num_hidden_layers": 3, "tie_word_embeddings": False},
        "window of 5": {"sliding_window": 5, **GROUPED, "num_hidden_layers": 3},
        "window of 70": {"sliding_window": 70, "head_dim": 20},
        "large epsilon and theta": {"rms_norm_eps": 1e-2, **rope("default", 1e6)},
        "windows in some layers": {**MINISTRAL, **GROUPED},
        "queries by position": {**MINISTRAL3, **GROUPED},
        **YARN,
        "8 experts": {**MIXTRAL, **GROUPED, "num_local_experts": 8},
        "3 experts, window of 7": {**MIXTRAL, "num_local_experts": 3, "sliding_window": 7},
        "both of 2 experts": {**MIXTRAL, "num_local_experts": 2},
        "4 experts, one at a time": {**MIXTRAL, "num_local_experts": 4, "num_experts_per_tok": 1},
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
    },
    parts=rotary_parts(mistral),
    mutations={
        **ROTARY_FAULTS,
        "epsilon of flax": Mutation(
            "epsilon=config.rms_norm_eps", "epsilon=1e-6", "large epsilon and theta"
        ),
        "theta of Llama 1": Mutation(
            "theta = config.rope_theta", "theta = 10000.0", "large epsilon and theta"
        ),
        "a window one longer": Mutation(
            "q_pos - k_pos < window", "q_pos - k_pos <= window", "window of 5"
        ),
        "a window one shorter": Mutation(
            "q_pos - k_pos < window", "q_pos - k_pos + 1 < window", "window of 5"
        ),
        "windows in the other layers": Mutation(
            "layer_types[layer] == SLIDING",
            "layer_types[layer] != SLIDING",
            "windows in some layers",
        ),
        "windows in all layers": Mutation(
            "self.config.sliding_window if self.sliding else None",
            "self.config.sliding_window",
            "windows in some layers",
        ),
        "queries not by position": Mutation(
            "q = q * query_scale(self.config, positions - first).astype(q.dtype)",
            "pass",
            "queries by position",
        ),
        "keys by position": Mutation(
            "q = q * query_scale(self.config, positions - first).astype(q.dtype)",
            "k = k * query_scale(self.config, positions - first).astype(q.dtype)",
            "queries by position",
        ),
        "queries grow at once": Mutation("jnp.log(1 + n)", "jnp.log(2 + n)", "queries by position"),
        "queries grow within a stretch": Mutation(
            "jnp.maximum(positions, 0) //", "jnp.maximum(positions, 0) /", "queries by position"
        ),
        "queries grow every context": Mutation(
            'jnp.maximum(positions, 0) // scaling["original_max_position_embeddings"]',
            "jnp.maximum(positions, 0) // config.max_position_embeddings",
            "queries by position",
        ),
        "another beta": Mutation('scaling["llama_4_scaling_beta"]', "0.1", "queries by position"),
        **YARN_FAULTS,
        "GELU for SiLU": Mutation("jax.nn.silu(self.gate_proj", "jax.nn.gelu(self.gate_proj"),
        "w1 and w3 exchanged": Mutation(
            "jax.nn.silu(self.w1(x))  # [..., F]\n        x = gate * self.w3(x)",
            "jax.nn.silu(self.w3(x))\n        x = gate * self.w1(x)",
            "8 experts",
        ),
        "scores of the chosen do not sum to 1": Mutation(
            "weights = weights / weights.sum(axis=-1, keepdims=True)", "", "8 experts"
        ),
        "one expert for two": Mutation(
            "self.per_token = config.num_experts_per_tok", "self.per_token = 1", "8 experts"
        ),
        "own head transposed": Mutation(
            '"lm_head.weight", True', '"lm_head.weight", False', "square head"
        ),
    },
    hf_names=mixtral_names,
    cut={"num_hidden_layers": 1, "vocab_size": 1000},
    core="3 experts, window of 7",
    **ROTARY,
)
