"""What the tests know about each model file: the rest of the suite is the same for all of them.

A family names its file, the reference class in transformers, small configs that differ in what can
go wrong, the parts that are compared alone, and faults that the parity tests have to notice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import gpt2
import opt

@dataclass(frozen=True)
class Mutation:
    """A fault: `text` of the model file becomes `replacement`; seen on the config called so."""

    text: str
    replacement: str
    config: str = "plain"
    seen: tuple[str, str] = ("stream", "logits")  # where: see Case.worst


@dataclass(frozen=True)
class Family:
    module: ModuleType
    hf_config: type
    hf_model: type
    sizes: dict  # the config that is called plain
    configs: dict[str, dict]  # what the others change in it
    parts: Callable  # (model, tokens, x) -> {name: array}
    hf_parts: Callable  # (model, tokens, x) -> {name: tensor}
    hf_blocks: Callable  # model -> its blocks
    mutations: dict[str, Mutation]
    width: str  # what config.json calls D,
    depth: str  # the number of layers
    context: str  # and the longest text
    dropouts: tuple[str, ...]  # the rates of dropout in config.json
    table: str  # the module that is the token table
    matrix: str  # the path of a matrix of layer 1 that is not square
    buffers: tuple[str, ...] = ()  # tensors of old files that are no parameters

    @property
    def name(self) -> str:
        return self.module.__name__

    def config(self, name: str = "plain"):
        """The transformers config of that name."""
        return self.hf_config(**(self.sizes | self.configs[name]))


def slots(module, model, x):
    """The part of an empty cache that attention writes the keys and values of x into."""
    return module.init_cache(model.config, *x.shape[:2], x.dtype).layers[0]


def causal_bias(x):
    """x [B, T, D] -> [1, 1, T, T] to be added to scores: the lowest number above the diagonal."""
    T = x.shape[1]
    return torch.full((T, T), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]


# ------------------------------------------------------------------------------------------- gpt2


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


QKV = "q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]"
VISIBLE = "(k_pos >= 0) & (k_pos <= q_pos)"

GPT2 = Family(
    module=gpt2,
    hf_config=GPT2Config,
    hf_model=GPT2LMHeadModel,
    sizes={"vocab_size": 97, "n_positions": 128, "n_embd": 48, "n_layer": 2, "n_head": 3,
           "bos_token_id": 0, "eos_token_id": 0},
    configs={
        "plain": {},
        "n_inner and erf gelu": {"n_inner": 56, "activation_function": "gelu", "n_head": 4},
        "relu and own head": {"activation_function": "relu", "tie_word_embeddings": False},
        "four layers, scaled by layer": {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True},
        "scores not scaled": {"scale_attn_weights": False, "n_head": 6},
        "one layer, 5 heads of 7": {"n_layer": 1, "n_embd": 35, "n_head": 5, "vocab_size": 33},
        "large epsilon, one head, silu": {"layer_norm_epsilon": 1e-2, "n_head": 1,
                                          "activation_function": "silu"},
        "tanh gelu under its other name": {"activation_function": "gelu_pytorch_tanh",
                                           "n_embd": 64, "n_head": 2, "n_layer": 3},
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
    },
    parts=gpt2_parts,
    hf_parts=gpt2_hf_parts,
    hf_blocks=lambda hf: hf.transformer.h,
    mutations={
        "erf for tanh in GELU": Mutation("approximate=True", "approximate=False"),
        "tanh for erf in GELU": Mutation("approximate=False", "approximate=True",
                                         "n_inner and erf gelu"),
        "epsilon of flax": Mutation("epsilon = config.layer_norm_epsilon", "epsilon = 1e-6"),
        "variance of flax": Mutation("use_fast_variance=False", "use_fast_variance=True",
                                     seen=("parts", "norm far from zero")),
        "scale by D and not Dh": Mutation("(D // config.n_head) ** -0.5", "D ** -0.5"),
        "no scale": Mutation("(D // config.n_head) ** -0.5", "1.0"),
        "layers counted from 0": Mutation("/= layer + 1", "/= max(layer, 1)",
                                          "four layers, scaled by layer"),
        "a token does not see itself": Mutation(VISIBLE, VISIBLE.replace("<=", "<")),
        "a token sees the next one": Mutation("(k_pos <= q_pos)", "(k_pos <= q_pos + 1)"),
        "q and k exchanged": Mutation(QKV, QKV.replace("q, k, v", "k, q, v")),
        "k and v exchanged": Mutation(QKV, QKV.replace("q, k, v", "q, v, k")),
        "heads of c_attn interleaved": Mutation(
            ".reshape(B, T, 3, self.n_head, D // self.n_head)",
            ".reshape(B, T, self.n_head, 3, D // self.n_head).swapaxes(2, 3)"),
        "positions from 1": Mutation("jnp.maximum(positions, 0)", "jnp.maximum(positions, 0) + 1"),
        "no final norm": Mutation("return self.ln_f(x), cache", "return x, cache"),
        "one norm for both": Mutation("self.mlp(self.ln_2(x)", "self.mlp(self.ln_1(x)"),
        "MLP beside attention": Mutation("self.mlp(self.ln_2(x)", "self.mlp(self.ln_2(x - y)"),
        "attention's c_proj transposed": Mutation(
            "CHECKPOINT = [",
            'CHECKPOINT = [(r"(.+attn.c_proj)\\.kernel", r"transformer.\\1.weight", True),'),
        "own head transposed": Mutation(  # square, so that no shape tells
            '"lm_head.weight", True', '"lm_head.weight", False', "square head"),
    },
    width="n_embd",
    depth="n_layer",
    context="n_positions",
    dropouts=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    table="wte",
    matrix="h.1.mlp.c_fc.kernel",
    buffers=("h.0.attn.bias", "h.1.attn.masked_bias"),
)

# -------------------------------------------------------------------------------------------- opt


def opt_parts(model, tokens, x):
    block, positions = model.layers[-1], np.tile(np.arange(x.shape[1]), (x.shape[0], 1))
    parts = {
        "attention": block.self_attn(x, positions, positions, slots(opt, model, x), 0)[0],
        "mlp": block.fc2(block.act(block.fc1(x))),
        "norm": block.self_attn_layer_norm(x),
        "second norm": block.final_layer_norm(x),
        "norm far from zero": block.final_layer_norm(x + 100),
        "token table": model.embed_tokens(tokens),
        "position table": model.embed_positions(positions + 2),
        "head": model.head(x[..., : model.embed_tokens.features]),
    }
    if model.project_in:
        parts["project_in"] = model.project_in(x[..., : model.embed_tokens.features])
        parts["project_out"] = model.project_out(x)
    if model.final_layer_norm:
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


HEADS = ".reshape(B, T, *self.heads)"
OPT = Family(
    module=opt,
    hf_config=OPTConfig,
    hf_model=OPTForCausalLM,
    sizes={"vocab_size": 97, "max_position_embeddings": 128, "hidden_size": 48, "ffn_dim": 192,
           "num_hidden_layers": 2, "num_attention_heads": 3},
    configs={
        "plain": {},
        "norms after, narrow tokens": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
        "no biases": {"enable_bias": False, "num_attention_heads": 4, "num_hidden_layers": 3},
        "norms without weights": {"layer_norm_elementwise_affine": False, "ffn_dim": 40},
        "gelu, one head": {"activation_function": "gelu", "num_attention_heads": 1},
        "own head, narrow tokens": {"tie_word_embeddings": False, "word_embed_proj_dim": 24},
        "one layer, 5 heads of 7": {"num_hidden_layers": 1, "hidden_size": 35, "vocab_size": 33,
                                    "num_attention_heads": 5},
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
    },
    parts=opt_parts,
    hf_parts=opt_hf_parts,
    hf_blocks=lambda hf: hf.model.decoder.layers,
    mutations={
        "positions from row 1": Mutation("embed_positions(positions + 2)",
                                         "embed_positions(positions + 1)"),
        "positions from row 0": Mutation("embed_positions(positions + 2)",
                                         "embed_positions(positions)"),
        "no ReLU": Mutation("self.act(self.fc1(y))", "self.fc1(y)"),
        "GELU for ReLU": Mutation('"relu": jax.nn.relu', '"relu": jax.nn.gelu'),
        "tanh for erf in GELU": Mutation("approximate=False", "approximate=True",
                                         "gelu, one head"),
        "epsilon of flax": Mutation('"epsilon": 1e-5', '"epsilon": 1e-6'),
        "variance of flax": Mutation('"use_fast_variance": False', '"use_fast_variance": True',
                                     seen=("parts", "norm far from zero")),
        "scale by D and not Dh": Mutation("self.heads[1] ** -0.5", "D ** -0.5"),
        "no scale": Mutation("self.heads[1] ** -0.5", "1.0"),
        "a token does not see itself": Mutation(VISIBLE, VISIBLE.replace("<=", "<")),
        "a token sees the next one": Mutation("(k_pos <= q_pos)", "(k_pos <= q_pos + 1)"),
        "q and k exchanged": Mutation("x = attend(q, k, v,", "x = attend(k, q, v,"),
        "k and v exchanged": Mutation("write(past[0], k, start), write(past[1], v, start)",
                                      "write(past[0], v, start), write(past[1], k, start)"),
        "heads of v interleaved": Mutation(
            f"self.v_proj(x){HEADS}",
            "self.v_proj(x).reshape(B, T, *self.heads[::-1]).swapaxes(2, 3)"),
        "norms after for before": Mutation("= config.do_layer_norm_before",
                                           "= not config.do_layer_norm_before"),
        "norms before for after": Mutation("= config.do_layer_norm_before",
                                           "= not config.do_layer_norm_before",
                                           "norms after, narrow tokens"),
        "no norm after attention": Mutation("x = x if self.norm_first else self.self_attn_l",
                                            "x = x if True else self.self_attn_l",
                                            "norms after, narrow tokens"),
        "no norm after the MLP": Mutation("return x if self.norm_first", "return x if True",
                                          "norms after, narrow tokens"),
        "no final norm": Mutation("x if self.final_layer_norm is None", "x if True"),
        "one norm for both": Mutation("y = self.final_layer_norm(x)",
                                      "y = self.self_attn_layer_norm(x)"),
        "MLP beside attention": Mutation("y = self.final_layer_norm(x)",
                                         "y = self.final_layer_norm(x - y)"),
        "own head transposed": Mutation(  # square, so that no shape tells
            '"lm_head.weight", True', '"lm_head.weight", False', "square head"),
        **{f"{name} not transposed": Mutation("CHECKPOINT = [", (
            f'CHECKPOINT = [(r"(.+{name})\\.kernel", r"model.decoder.\\1.weight", False),'))
           for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    },
    width="hidden_size",
    depth="num_hidden_layers",
    context="max_position_embeddings",
    dropouts=("dropout",),
    table="embed_tokens",
    matrix="layers.1.fc1.kernel",
)

FAMILIES = [GPT2, OPT]
