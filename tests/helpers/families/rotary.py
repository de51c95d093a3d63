"""What the model files with rotary positions have in common: those and grouped heads."""

import jax.numpy as jnp
import torch

from helpers.families.common import MASK_FAULTS, Mutation, causal_bias


def rotary_parts(module):
    """The parts of a model whose positions are angles; its last layer stands for all."""

    def parts(model, tokens, x):
        block, x = model.layers[-1], jnp.array(x)
        positions = jnp.tile(jnp.arange(x.shape[1]), (x.shape[0], 1))
        layer_cache = module.init_cache(model.config, *x.shape[:2], x.dtype).layers[-1]
        mlp = getattr(block, "mlp", None) or block.block_sparse_moe
        return {
            "attention": block.self_attn(x, positions, positions, layer_cache, 0)[0],
            "mlp": mlp(x, positions >= 0)[0] if hasattr(mlp, "experts") else mlp(x),
            "norm": block.post_attention_layernorm(x),
            "final norm": model.norm(x),
            "token table": model.embed_tokens(tokens),
            "head": model.head(x),
        }

    return parts


def rotary_hf_parts(hf, tokens, x):
    layer, config, positions = hf.model.layers[-1], hf.config, torch.arange(x.shape[1])[None]
    kind = getattr(config, "layer_types", ["sliding_attention"])[-1]
    separate = config.model_type == "gemma3_text"  # the two kinds of layer turn at other speeds
    turn = hf.model.rotary_emb(x, positions, *[kind] * separate)
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    cap = getattr(config, "final_logit_softcapping", None)
    head = hf.lm_head(x)
    options = {"position_embeddings": turn, "attention_mask": causal_bias(x, window)}
    if config.model_type == "ministral3":
        options["position_ids"] = positions
    return {
        "attention": layer.self_attn(x, **options)[0],
        "mlp": layer.mlp(x),
        "norm": layer.post_attention_layernorm(x),
        "final norm": hf.model.norm(x),
        "token table": hf.model.embed_tokens.weight[tokens],
        "head": cap * torch.tanh(head / cap) if cap else head,
    }


ROTARY = {
    "hf_parts": rotary_hf_parts,
    "hf_blocks": lambda hf: hf.model.layers,
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "context": "max_position_embeddings",
    "dropouts": (),
    "table": "embed_tokens",
    "matrix": "layers.1.mlp.up_proj.kernel",
    "activation": "hidden_act",
}
SMALL = {
    "tie_word_embeddings": True,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "hidden_size": 48,
    "head_dim": 16,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}


def rope(kind, theta=10000.0, **scaling):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


ROTARY_FAULTS = {
    **MASK_FAULTS,
    "pairs side by side": Mutation(
        "x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)",
        "x1, x2 = x[..., ::2], x[..., 1::2]",
    ),
    "turned backwards": Mutation(
        "x1 * cos - x2 * sin, x2 * cos + x1 * sin",
        "x1 * cos + x2 * sin, x2 * cos - x1 * sin",
    ),
    "query heads in another order": Mutation(
        "q.reshape(B, T, K, G, Dh).transpose(0, 2, 3, 1, 4)",
        "q.reshape(B, T, G, K, Dh).transpose(0, 3, 2, 1, 4)",
        "grouped heads",
    ),
    "no final norm": Mutation("x = self.norm(x)", "pass"),
    "o_proj not transposed": Mutation(
        "CHECKPOINT = [", ('CHECKPOINT = [(r"(.+o_proj)\\.kernel", r"model.\\1.weight", False),')
    ),
}

# What YaRN adds: of Dh / 2 = 8 frequencies, and of 32, where the ends of the ramp are not whole.
YARN = {
    "yarn": rope("yarn", 500.0, factor=4.0, original_max_position_embeddings=32),
    "yarn, steep": {
        "head_dim": 64,
        **rope(
            "yarn",
            factor=3.0,
            original_max_position_embeddings=40,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=1.5,
            mscale_all_dim=0.6,
            truncate=False,
        ),
    },
}
YARN_FAULTS = {
    "YaRN's frequencies not scaled": Mutation(
        "inv_freq = yarn_frequencies(inv_freq, theta, scaling)", "pass", "yarn"
    ),
    "YaRN's scores as without it": Mutation("return scale * m**2", "return scale", "yarn"),
    "YaRN's factor once and not twice": Mutation("scale * m**2", "scale * m", "yarn"),
    "YaRN's mscale ignored": Mutation('if scaling.get("mscale")', "if False", "yarn, steep"),
    "beta_fast ignored": Mutation('scaling.get("beta_fast") or 32', "32", "yarn, steep"),
    "beta_slow ignored": Mutation('scaling.get("beta_slow") or 1', "1", "yarn, steep"),
    "YaRN's ramp with whole ends": Mutation('scaling.get("truncate", True)', "True", "yarn, steep"),
    "YaRN's ramp with broken ends": Mutation('scaling.get("truncate", True)', "False", "yarn"),
    "scale by D and not Dh": Mutation(
        "scale = config.head_dim**-0.5", "scale = config.hidden_size**-0.5"
    ),
}
