"""What llama.py, gemma.py and mistral.py have in common: rotary positions and grouped heads."""

import jax.numpy as jnp
import torch

from helpers.families.common import MASK_FAULTS, Mutation, causal_bias


def rotary_parts(module):
    """The parts of a model whose positions are angles; its last layer stands for all."""

    def parts(model, tokens, x):
        block, x = model.layers[-1], jnp.array(x)
        positions = jnp.tile(jnp.arange(x.shape[1]), (x.shape[0], 1))
        layer_cache = module.init_cache(model.config, *x.shape[:2], x.dtype).layers[-1]
        experts = getattr(block, "block_sparse_moe", None)
        return {
            "attention": block.self_attn(x, positions, positions, layer_cache, 0)[0],
            "mlp": experts(x, positions >= 0)[0] if experts else block.mlp(x),
            "norm": block.input_layernorm(x),
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
    bias = causal_bias(x, window)
    return {
        "attention": layer.self_attn(x, position_embeddings=turn, attention_mask=bias)[0],
        "mlp": layer.mlp(x),
        "norm": layer.input_layernorm(x),
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
