"""What the tests know about opt.py."""

import numpy as np
import torch
from transformers import OPTConfig

import opt
from helpers.families.common import VISIBLE, Family, Mutation, causal_bias, slots


def opt_parts(model, tokens, x):
    block, positions = model.layers[-1], np.tile(np.arange(x.shape[1]), (x.shape[0], 1))
    parts = {
        "attention": block.self_attn(x, positions, positions, slots(opt, model, x), 0)[0],
        "mlp": block.mlp(x),
        "norm": block.self_attn_layer_norm(x),
        "second norm": block.final_layer_norm(x),
        "norm far from zero": block.final_layer_norm(x + 100),
        "token table": model.embed_tokens(tokens),
        "position table": model.embed_positions(positions + 2),
        "head": model.head(x[..., : model.embed_tokens.features]),
    }
    if model.projected:
        parts["project_in"] = model.project_in(x[..., : model.embed_tokens.features])
        parts["project_out"] = model.project_out(x)
    if hasattr(model, "final_layer_norm"):
        parts["final norm"] = model.final_layer_norm(x)
    return parts


def opt_hf_parts(hf, tokens, x):
    model, E = hf.model.decoder, hf.config.word_embed_proj_dim
    block, mask = model.layers[-1], torch.ones(x.shape[:2])
    parts = {
        "attention": block.self_attn(x, attention_mask=causal_bias(x))[0],
        "mlp": block.fc2(block.activation_fn(block.fc1(x))),
        "norm": block.self_attn_layer_norm(x),
        "second norm": block.final_layer_norm(x),
        "norm far from zero": block.final_layer_norm(x + 100),
        "token table": model.embed_tokens(tokens),
        "position table": model.embed_positions(mask),
        "head": hf.lm_head(x[..., :E]),
    }
    if model.project_in:
        parts["project_in"] = model.project_in(x[..., :E])
        parts["project_out"] = model.project_out(x)
    if model.final_layer_norm:
        parts["final norm"] = model.final_layer_norm(x)
    return parts


OPT = Family(
    module=opt,
    hf_config=OPTConfig,
    sizes={
        "vocab_size": 97,
        "max_position_embeddings": 128,
        "hidden_size": 48,
        "ffn_dim": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    },
    configs={
        "plain": {},
        "norms after, narrow tokens": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
        "no biases": {"enable_bias": False, "num_attention_heads": 4, "num_hidden_layers": 3},
        "norms without weights": {"layer_norm_elementwise_affine": False, "ffn_dim": 40},
        "no last norm": {"_remove_final_layer_norm": True, "layer_norm_elementwise_affine": False},
        "gelu, one head": {"activation_function": "gelu", "num_attention_heads": 1},
        "own head, narrow tokens": {"tie_word_embeddings": False, "word_embed_proj_dim": 24},
        "one layer, 5 heads of 7": {
            "num_hidden_layers": 1,
            "hidden_size": 35,
            "vocab_size": 33,
            "num_attention_heads": 5,
        },
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
    },
    parts=opt_parts,
    hf_parts=opt_hf_parts,
    hf_blocks=lambda hf: hf.model.decoder.layers,
    mutations={
        "positions from row 1": Mutation(
            "embed_positions(positions - first + 2)", "embed_positions(positions + 1)"
        ),
        "positions from row 0": Mutation(
            "embed_positions(positions - first + 2)", "embed_positions(positions - first)"
        ),
        "no ReLU": Mutation("x = self.act(x)", "pass"),
        "GELU for ReLU": Mutation('"relu": jax.nn.relu', '"relu": jax.nn.gelu'),
        "tanh for erf in GELU": Mutation("approximate=False", "approximate=True", "gelu, one head"),
        "epsilon of flax": Mutation("epsilon=1e-5", "epsilon=1e-6"),
        "variance of flax": Mutation(
            "use_fast_variance=False",
            "use_fast_variance=True",
            seen=("parts", "norm far from zero"),
        ),
        "scale by D and not Dh": Mutation("(D // H) ** -0.5", "D ** -0.5"),
        "no scale": Mutation("(D // H) ** -0.5", "1.0"),
        "a token does not see itself": Mutation(VISIBLE, VISIBLE.replace("<=", "<")),
        "a token sees the next one": Mutation("(k_pos <= q_pos)", "(k_pos <= q_pos + 1)"),
        "q and k exchanged": Mutation("attend(q, k, v, positions", "attend(k, q, v, positions"),
        "k and v exchanged": Mutation(
            "= update_layer(layer_cache, k, v", "= update_layer(layer_cache, v, k"
        ),
        "heads of v interleaved": Mutation(
            "self.v_proj(x).reshape(B, T, -1, Dh)",
            "self.v_proj(x).reshape(B, T, Dh, -1).swapaxes(2, 3)",
        ),
        "norms after for before": Mutation(
            "= config.do_layer_norm_before", "= not config.do_layer_norm_before"
        ),
        "norms before for after": Mutation(
            "= config.do_layer_norm_before",
            "= not config.do_layer_norm_before",
            "norms after, narrow tokens",
        ),
        "no norm after attention": Mutation(
            "x = self.self_attn_layer_norm(x + y)", "x = x + y", "norms after, narrow tokens"
        ),
        "no norm after the MLP": Mutation(
            "x = self.final_layer_norm(x + y)", "x = x + y", "norms after, narrow tokens"
        ),
        "no final norm": Mutation("x = self.final_layer_norm(x)", "pass"),
        "one norm for both": Mutation(
            "self.mlp(self.final_layer_norm(x)", "self.mlp(self.self_attn_layer_norm(x)"
        ),
        "MLP beside attention": Mutation(
            "self.mlp(self.final_layer_norm(x)", "self.mlp(self.final_layer_norm(x - y)"
        ),
        "own head transposed": Mutation(  # square, so that no shape tells
            '"lm_head.weight", True', '"lm_head.weight", False', "square head"
        ),
        **{
            f"{name} not transposed": Mutation(
                "CHECKPOINT = [",
                (f'CHECKPOINT = [(r"(.+{name})\\.kernel", r"model.decoder.\\1.weight", False),'),
            )
            for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        },
    },
    core="norms after, narrow tokens",
    width="hidden_size",
    depth="num_hidden_layers",
    context="max_position_embeddings",
    dropouts=("dropout",),
    table="embed_tokens",
    matrix="layers.1.mlp.fc1.kernel",
)
