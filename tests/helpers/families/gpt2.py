"""What the tests know about gpt2.py."""

import numpy as np
import torch
from transformers import GPT2Config

import gpt2
from helpers.families.common import VISIBLE, Family, Mutation, causal_bias, slots


def gpt2_parts(model, tokens, x):
    block, positions = model.h[-1], np.tile(np.arange(x.shape[1]), (x.shape[0], 1))
    return {
        "attention": block.attn(x, positions, positions, slots(gpt2, model, x), 0)[0],
        "mlp": block.mlp(x),
        "norm": block.ln_1(x),
        "final norm": model.ln_f(x),
        "norm far from zero": model.ln_f(x + 100),
        "token table": model.wte(tokens),
        "position table": model.wpe(positions),
        "head": model.head(x),
    }


def gpt2_hf_parts(hf, tokens, x):
    model = hf.transformer
    return {
        "attention": model.h[-1].attn(x, attention_mask=causal_bias(x))[0],
        "mlp": model.h[-1].mlp(x),
        "norm": model.h[-1].ln_1(x),
        "final norm": model.ln_f(x),
        "norm far from zero": model.ln_f(x + 100),
        "token table": model.wte(tokens),
        "position table": model.wpe(torch.arange(x.shape[1])).expand(len(x), -1, -1),
        "head": hf.lm_head(x),
    }


GPT2 = Family(
    module=gpt2,
    hf_config=GPT2Config,
    sizes={
        "vocab_size": 97,
        "n_positions": 128,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    configs={
        "plain": {},
        "n_inner and erf gelu": {"n_inner": 56, "activation_function": "gelu", "n_head": 4},
        "relu and own head": {"activation_function": "relu", "tie_word_embeddings": False},
        "four layers, scaled by layer": {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True},
        "scores not scaled": {"scale_attn_weights": False, "n_head": 6},
        "one layer, 5 heads of 7": {"n_layer": 1, "n_embd": 35, "n_head": 5, "vocab_size": 33},
        "large epsilon, one head, silu": {
            "layer_norm_epsilon": 1e-2,
            "n_head": 1,
            "activation_function": "silu",
        },
        "tanh gelu under its other name": {
            "activation_function": "gelu_pytorch_tanh",
            "n_embd": 64,
            "n_head": 2,
            "n_layer": 3,
        },
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
    },
    parts=gpt2_parts,
    hf_parts=gpt2_hf_parts,
    hf_blocks=lambda hf: hf.transformer.h,
    mutations={
        "erf for tanh in GELU": Mutation("approximate=True", "approximate=False"),
        "tanh for erf in GELU": Mutation(
            "approximate=False", "approximate=True", "n_inner and erf gelu"
        ),
        "epsilon of flax": Mutation("epsilon = config.layer_norm_epsilon", "epsilon = 1e-6"),
        "variance of flax": Mutation(
            "use_fast_variance=False",
            "use_fast_variance=True",
            seen=("parts", "norm far from zero"),
        ),
        "scale by D and not Dh": Mutation("(D // H) ** -0.5", "D ** -0.5"),
        "no scale": Mutation("(D // H) ** -0.5", "1.0"),
        "layers counted from 0": Mutation(
            "/= layer + 1", "/= max(layer, 1)", "four layers, scaled by layer"
        ),
        "a token does not see itself": Mutation(VISIBLE, VISIBLE.replace("<=", "<")),
        "a token sees the next one": Mutation("(k_pos <= q_pos)", "(k_pos <= q_pos + 1)"),
        "q and k exchanged": Mutation("attend(q, k, v, positions", "attend(k, q, v, positions"),
        "k and v exchanged": Mutation(
            "= update_layer(layer_cache, k, v", "= update_layer(layer_cache, v, k"
        ),
        "heads of c_attn interleaved": Mutation(
            ".reshape(B, T, 3, self.heads, D // self.heads)",
            ".reshape(B, T, self.heads, 3, D // self.heads).swapaxes(2, 3)",
        ),
        "positions from 1": Mutation(
            "jnp.maximum(positions - first, 0)", "jnp.maximum(positions - first, 0) + 1"
        ),
        "no final norm": Mutation("x = self.ln_f(x)", "pass"),
        "one norm for both": Mutation("self.mlp(self.ln_2(x)", "self.mlp(self.ln_1(x)"),
        "MLP beside attention": Mutation("self.mlp(self.ln_2(x)", "self.mlp(self.ln_2(x - y)"),
        "attention's c_proj transposed": Mutation(
            "CHECKPOINT = [",
            'CHECKPOINT = [(r"(.+attn.c_proj)\\.kernel", r"transformer.\\1.weight", True),',
        ),
        "own head transposed": Mutation(  # square, so that no shape tells
            '"lm_head.weight", True', '"lm_head.weight", False', "square head"
        ),
    },
    core="plain",
    width="n_embd",
    depth="n_layer",
    context="n_positions",
    dropouts=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    table="wte",
    matrix="h.1.mlp.c_fc.kernel",
    buffers=("h.0.attn.bias", "h.1.attn.masked_bias"),
)
