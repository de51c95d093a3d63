"""What the tests know about each model file: the rest of the suite is the same for all of them.

A family names its file, the reference class in transformers, small configs that differ in what can
go wrong, the parts that are compared alone, and faults that the parity tests have to notice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
)

import gemma
import gpt2
import llama
import mistral
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
    hf_config: Callable  # (sizes) -> the config of transformers
    sizes: dict  # the config that is called plain
    configs: dict[str, dict]  # what the others change in it
    parts: Callable  # (model, tokens, x) -> {name: array}
    hf_parts: Callable  # (model, tokens, x) -> {name: tensor}
    hf_blocks: Callable  # model -> its blocks
    mutations: dict[str, Mutation]
    core: str  # the config that stands for all in the core suite
    width: str  # what config.json calls D,
    depth: str  # the number of layers
    context: str  # and the longest text
    dropouts: tuple[str, ...]  # the rates of dropout in config.json
    table: str  # the module that is the token table
    matrix: str  # the path of a matrix of layer 1 that is not square
    activation: str = "activation_function"  # what config.json calls it
    own_head: bool = True  # whether a config may ask for one
    halves: tuple[str, ...] = ("bfloat16", "float16")  # dtypes beside float32
    buffers: tuple[str, ...] = ()  # tensors of old files that are no parameters
    cut: dict = field(default_factory=dict)  # makes the published size small enough for a test
    hf_names: Callable = lambda gradients: gradients  # as transformers names them -> as files do

    @property
    def name(self) -> str:
        return self.module.__name__

    def config(self, name: str = "plain"):
        """The transformers config of that name."""
        return self.hf_config(**(self.sizes | self.configs[name]))


def slots(module, model, x):
    """The part of an empty cache that attention writes the keys and values of x into."""
    return module.init_cache(model.config, *x.shape[:2], x.dtype).layers[0]


def causal_bias(x, window=None):
    """x [B, T, D] -> [1, 1, T, T] to be added to scores: the lowest number where a token does not
    look, above the diagonal and a window or more below it."""
    T = x.shape[1]
    hidden = torch.ones(T, T).triu(1) + torch.ones(T, T).tril(-(window or T))
    return (hidden.to(x.dtype) * torch.finfo(x.dtype).min)[None, None]


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
    core="plain",
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
    core="norms after, narrow tokens",
    width="hidden_size",
    depth="num_hidden_layers",
    context="max_position_embeddings",
    dropouts=("dropout",),
    table="embed_tokens",
    matrix="layers.1.fc1.kernel",
)


# --------------------------------------------------------------- llama, gemma, mistral: all rotary


def rotary_parts(module):
    """The parts of a model whose positions are angles; its last layer stands for all."""

    def parts(model, tokens, x):
        block, x = model.layers[-1], jnp.array(x)
        positions = jnp.tile(jnp.arange(x.shape[1]), (x.shape[0], 1))
        past = module.init_cache(model.config, *x.shape[:2], x.dtype).layers[-1]
        experts = getattr(block, "block_sparse_moe", None)
        return {
            "attention": block.self_attn(x, positions, positions, past, 0)[0],
            "mlp": experts(x)[0] if experts else block.mlp(x),
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
SMALL = {"tie_word_embeddings": True, "vocab_size": 97, "max_position_embeddings": 128,
         "hidden_size": 48, "head_dim": 16,
         "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3,
         "num_key_value_heads": 3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}


def rope(kind, theta=10000.0, **scaling):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


MASK_FAULTS = {
    "a token does not see itself": Mutation(VISIBLE, VISIBLE.replace("<=", "<")),
    "a token sees the next one": Mutation("(k_pos <= q_pos)", "(k_pos <= q_pos + 1)"),
}
ROTARY_FAULTS = {
    **MASK_FAULTS,
    "pairs side by side": Mutation(
        "one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)",
        "one, other = x[..., ::2], x[..., 1::2]"),
    "turned backwards": Mutation("one * cos - other * sin, other * cos + one * sin",
                                 "one * cos + other * sin, other * cos - one * sin"),
    "query heads in another order": Mutation("q.reshape(B, T, K, G, Dh).transpose(0, 2, 3, 1, 4)",
                                             "q.reshape(B, T, G, K, Dh).transpose(0, 3, 2, 1, 4)",
                                             "grouped heads"),
    "no final norm": Mutation("return self.norm(x), Cache", "return x, Cache"),
    "o_proj not transposed": Mutation("CHECKPOINT = [", (
        'CHECKPOINT = [(r"(.+o_proj)\\.kernel", r"model.\\1.weight", False),')),
}
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
        "llama3 RoPE": rope("llama3", 500.0, factor=8.0, low_freq_factor=1.0,
                            high_freq_factor=4.0, original_max_position_embeddings=32),
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
    },
    parts=rotary_parts(llama),
    mutations={
        **ROTARY_FAULTS,
        "epsilon of flax": Mutation("epsilon=config.rms_norm_eps", "epsilon=1e-6",
                                    "large epsilon and theta"),
        "dynamic RoPE that does not grow": Mutation(
            "(positions.max(axis=1) + 1)", "(positions.max(axis=1) * 0 + 1)", "dynamic RoPE"),
        "theta of Llama 1": Mutation("config.head_dim, config.rope_theta",
                                     "config.head_dim, 10000.0", "large epsilon and theta"),
        "keys not turned": Mutation("k = rotate(self.k_proj(x).reshape(B, T, -1, Dh), positions, "
                                    "speed)", "k = self.k_proj(x).reshape(B, T, -1, Dh)"),
        "linear scaling ignored": Mutation('(factor if kind == "linear" else 1)', "1",
                                           "linear RoPE"),
        "Llama 3.1's scaling ignored": Mutation('kind == "llama3"', "False", "llama3 RoPE"),
        "no transition between the bands": Mutation(
            "kept = np.clip((turns - low) / (high - low), 0, 1)", "kept = 1.0 * (turns > high)",
            "llama3 RoPE"),
        "scale by D and not Dh": Mutation("scale=Dh**-0.5", "scale=D**-0.5 if (D := 48) else 1"),
        "gate and up exchanged": Mutation("jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)",
                                          "jax.nn.silu(self.up_proj(x)) * self.gate_proj(x)"),
        "GELU for SiLU": Mutation("jax.nn.silu(", "jax.nn.gelu("),
        "one norm for both": Mutation("self.mlp(self.post_attention_layernorm(x))",
                                      "self.mlp(self.input_layernorm(x))"),
        "own head transposed": Mutation('"lm_head.weight", True', '"lm_head.weight", False',
                                        "square head"),
    },
    core="llama3 RoPE",
    **ROTARY,
)
GEMMA2 = {"model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": 20,
          "num_hidden_layers": 3}
GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 5, "query_pre_attn_scalar": 20,
          "num_hidden_layers": 6}


def gemma_config(model_type="gemma", **sizes):
    """The three generations have a class each."""
    kinds = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig}
    return kinds[model_type](**sizes)


GEMMA_ROPE = {"rope_parameters": {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}
GEMMA = Family(
    module=gemma,
    hf_config=gemma_config,
    cut={"vocab_size": 2000},
    halves=("bfloat16",),
    own_head=False,
    sizes=SMALL | {"pad_token_id": 0},
    configs={
        "plain": {},
        "grouped heads": GROUPED,
        "square head": {"vocab_size": 48},
        "one key head, wide": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20,
                               "rms_norm_eps": 1e-2},
        "second": GEMMA2,
        "second, grouped, no caps": {**GEMMA2, **GROUPED, "attn_logit_softcapping": None,
                                     "final_logit_softcapping": None, "sliding_window": 16},
        "third": GEMMA3,
        "third, slow": {**GEMMA3, **GROUPED, **GEMMA_ROPE, "num_hidden_layers": 7},
    },
    parts=rotary_parts(gemma),
    mutations={
        **ROTARY_FAULTS,
        "epsilon of flax": Mutation("config.rms_norm_eps", "1e-6", "one key head, wide"),
        "weight and not 1 + weight": Mutation("x32 * (1 + self.scale", "x32 * (0 + self.scale"),
        "tokens not scaled": Mutation("self.config.hidden_size**0.5", "1.0"),
        "erf for tanh in GELU": Mutation("approximate=True", "approximate=False"),
        "gate and up exchanged": Mutation(
            "gate = jax.nn.gelu(self.gate_proj(x), approximate=True)",
            "gate = jax.nn.gelu(self.up_proj(x), approximate=True) / self.up_proj(x) * "
            "self.gate_proj(x)"),
        "scores not capped": Mutation("softcap=config.attn_logit_softcapping", "softcap=None",
                                      "second"),
        "logits not capped": Mutation("logits if cap is None", "logits if True", "second"),
        "a window one longer": Mutation("q_pos - k_pos < window", "q_pos - k_pos <= window",
                                        "second"),
        "a window one shorter": Mutation("q_pos - k_pos < window", "q_pos - k_pos < window - 1",
                                         "third"),
        "windows in the other layers": Mutation("layer_types[layer] == SLIDING",
                                                "layer_types[layer] != SLIDING", "second"),
        "scale by Dh": Mutation("config.query_pre_attn_scalar**-0.5", "config.head_dim**-0.5",
                                "second"),
        "norm after the sum": Mutation("x = x + self.post_attention_layernorm(y)",
                                       "x = self.post_attention_layernorm(x + y)", "second"),
        "no norm after the MLP": Mutation("return x + self.post_feedforward_layernorm(y)",
                                          "return x + y", "third"),
        "queries and keys not normed": Mutation("q, k = self.q_norm(q), self.k_norm(k)", "pass",
                                                "third"),
        "one theta for all": Mutation(
            "config.rope_local_base_freq if self.sliding else config.rope_theta",
            "config.rope_theta", "third"),
        "all layers slow": Mutation("speed if self.sliding else speed / config.rope_factor",
                                    "speed / config.rope_factor", "third, slow"),
        "no layer slow": Mutation("speed if self.sliding else speed / config.rope_factor",
                                  "speed", "third, slow"),
    },
    core="third",
    **ROTARY,
)


def mistral_config(model_type="mistral", **sizes):
    kinds = {"mistral": MistralConfig, "mixtral": MixtralConfig}
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
        "8 experts": {**MIXTRAL, **GROUPED, "num_local_experts": 8},
        "2 experts, window of 7": {**MIXTRAL, "num_local_experts": 2, "sliding_window": 7},
        "4 experts, one at a time": {**MIXTRAL, "num_local_experts": 4, "num_experts_per_tok": 1},
        "square head": {"vocab_size": 48, "tie_word_embeddings": False},
    },
    parts=rotary_parts(mistral),
    mutations={
        **ROTARY_FAULTS,
        "epsilon of flax": Mutation("epsilon=config.rms_norm_eps", "epsilon=1e-6",
                                    "large epsilon and theta"),
        "theta of Llama 1": Mutation("speed = config.rope_theta **", "speed = 10000.0 **",
                                     "large epsilon and theta"),
        "a window one longer": Mutation("q_pos - k_pos < (window", "q_pos - k_pos <= (window",
                                        "window of 5"),
        "a window one shorter": Mutation("q_pos - k_pos < (window", "q_pos - k_pos + 1 < (window",
                                         "window of 5"),
        "GELU for SiLU": Mutation("down(jax.nn.silu(", "down(jax.nn.gelu("),
        "w1 and w3 exchanged": Mutation('MLP(config, ("w1", "w3", "w2")',
                                        'MLP(config, ("w3", "w1", "w2")', "8 experts"),
        "scores of the chosen do not sum to 1": Mutation(
            "weights = weights / weights.sum(axis=-1, keepdims=True)", "", "8 experts"),
        "one expert for two": Mutation("self.per_token, E = config.num_experts_per_tok",
                                       "self.per_token, E = 1", "8 experts"),
        "own head transposed": Mutation('"lm_head.weight", True', '"lm_head.weight", False',
                                        "square head"),
    },
    hf_names=mixtral_names,
    cut={"num_hidden_layers": 1, "vocab_size": 1000},
    core="2 experts, window of 7",
    **ROTARY,
)

FAMILIES = [GPT2, OPT, LLAMA, GEMMA, MISTRAL]
EVERY_CONFIG = [
    pytest.param((family, name), marks=[] if name == family.core else pytest.mark.wide,
                 id=f"{family.name}: {name}")
    for family in FAMILIES for name in family.configs]

# A test of what is the same to the letter in all files, as test_copies.py holds it: once is enough.
once = pytest.mark.parametrize("family", [GPT2], ids=["gpt2"], indirect=True)
