"""Gemma in one file: read it from top to bottom, run it, copy it.

Gemma is Llama with other parts. Gemma 1 scales the embeddings by sqrt(D), multiplies by 1 + weight
in its norms, gates the MLP with a GELU (GeGLU), and has heads of width 256 whatever D is. Gemma 2
adds norms after attention and MLP, caps scores and logits with a tanh (soft-capping), and gives
every other layer a sliding window. Gemma 3 norms queries and keys (QK norm) instead of capping
scores; five layers with a window, and RoPE frequencies of their own, follow each other, then comes
one without. Of multimodal checkpoints this file reads the text model.

Papers: Gemma Team 2024, "Gemma" and "Gemma 2"; 2025, "Gemma 3". Reference: modeling_gemma.py,
modeling_gemma2.py and modeling_gemma3.py of Hugging Face transformers.

Shape letters:  B batch   T query length: the tokens of this call   S cache length, in slots
                D model width (the residual stream)   H query heads   K KV heads   G = H / K
                Dh head width   F MLP width   V vocabulary size

How to read this file: Config, Architecture and KV cache are the model; a reader may stop there.
Generation, checkpoints and sharding follow. A heading says so where a section is the same in every
model file. `Linear` is defined near the end, under Faster forms; until there, read nnx.Linear.
"InputError: ..." in a docstring says when one is raised.

    pip install "jax>=0.10,<0.13" "flax>=0.12,<0.13" numpy safetensors tokenizers huggingface_hub
    pip install gguf                                 # for GGUF files
    pip install transformers sentencepiece protobuf  # for tokenizers older than tokenizer.json
    python gemma.py "Once upon a time"                      # downloads google/gemma-3-270m
    python gemma.py "Once upon a time" path/to/checkpoint   # any Gemma in Hugging Face's format

From "Open language models in JAX, one file each". MIT License, copyright (c) 2026 its authors.
"""

import argparse
import json
import math
import operator
import os
import pickle
import re
import sys
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization, traverse_util
from jax.nn.initializers import normal
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# --------------------------------------------- Config ---------------------------------------------


FULL = "full_attention"  # the kinds of layer, as config.json names them
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Config:
    """The sizes and switches of one Gemma, under the names that its config.json has for them.

    The defaults are those of a Gemma 3 whatever the model_type: a Gemma 1 or 2 must name its own
    theta and soft-caps, as PRESETS do. `from_hf` fills them in.
    """

    model_type: str = "gemma3_text"  # or gemma, gemma2
    vocab_size: int = 262208  # V
    max_position_embeddings: int = 131072  # context length, RoPE scaling included
    hidden_size: int = 2304  # D
    intermediate_size: int = 9216  # F
    num_hidden_layers: int = 26  # number of blocks
    num_attention_heads: int = 8  # H
    num_key_value_heads: int = 4  # K
    head_dim: int = 256  # Dh
    query_pre_attn_scalar: float = 256  # attention scores are divided by its square root
    layer_types: tuple = ()  # FULL or SLIDING for each layer; left out: as that Gemma has them
    sliding_window: int = 4096  # how many tokens a SLIDING layer attends to, its own included
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    rope_factor: float = 1.0  # linear RoPE scaling of the FULL layers
    rope_local_base_freq: float = 10000.0  # theta of the SLIDING layers
    rope_local_factor: float = 1.0  # and their linear RoPE scaling, if a checkpoint has one
    hidden_activation: str = "gelu_pytorch_tanh"  # of the gate in the MLP
    initializer_range: float = 0.02  # standard deviation of the initial weights
    tie_word_embeddings: bool = True  # the head is the token table
    bos_token_id: int | None = 2
    eos_token_id: int | tuple | None = 1
    padded_vocab_size: int | None = None  # V in training, rounded up for speed; not saved

    def __post_init__(self):
        """Derives what is left out. InputError: sizes that do not fit each other."""
        check_fields(self)
        check_divides(self, "num_key_value_heads", "num_attention_heads")
        check_even(self, "head_dim")
        check_supported("model_type", self.model_type, ARCHITECTURES)
        check_supported("hidden_activation", self.hidden_activation, ACTIVATIONS)

        if not self.layer_types:
            types = layer_pattern(self.num_hidden_layers, PERIODS[self.model_type])
            object.__setattr__(self, "layer_types", types)
        for kind in self.layer_types:
            check_supported("layer_types", kind, [FULL, SLIDING])
        if len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"config.json: layer_types has {len(self.layer_types)} entries, but "
                f"num_hidden_layers is {self.num_hidden_layers}"
            )

    @classmethod
    def small(cls, *, layers: int, heads: int, width: int, context: int, **changes) -> "Config":
        """A Gemma 3 of these sizes, to be trained from scratch; `changes` are further fields.

        All query heads share one KV head; the sliding window is half of the context.
        """
        return cls(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=1,
            head_dim=width // heads,
            query_pre_attn_scalar=width // heads,
            hidden_size=width,
            # Three matrices of 8 / 3 * D have as many weights as GPT-2's two of 4 * D.
            intermediate_size=round_up(8 * width / 3, 32),
            max_position_embeddings=context,
            layer_types=layer_pattern(layers, period=min(layers, 6)),
            sliding_window=math.ceil(context / 2),
            **changes,
        )

    @classmethod
    def from_hf(cls, values: dict) -> "Config":
        """From the contents of a config.json. InputError: not a Gemma, or an unsupported one."""
        return translate(values)

    def to_hf(self) -> dict:
        """The contents of a config.json that transformers and `from_hf` read."""
        return config_to_hf(self)


# ------------------------------------------ Architecture ------------------------------------------


@jax.named_scope("attend")
def attend(q, k, v, q_positions, k_positions, first=0, **score_options):
    """Each query takes a weighted mean of the values whose keys it may attend to.

    q [B, T, H, Dh], k and v [B, S, K, Dh], q_positions [B, T], k_positions [B, S] -> [B, T, H, Dh]
    first: 0, or [B, T], the position from which on each query may attend (packed rows).
    Grouped-query attention (Ainslie et al. 2023): G query heads share a KV head. The softmax is in
    float32. Vaswani et al. 2017, equation (1). score_options: as for attention_scores.
    """
    if k.dtype == jnp.int8:
        # From a cache in 8 bits: [..., Dh + 4].
        k = widen_slots(k, q.dtype)
        v = widen_slots(v, q.dtype)

    B, T, H, Dh = q.shape
    S, K = k.shape[1:3]
    G = H // K

    # Folds the G query heads that share a KV head into the queries: K heads, G * T queries each.
    q = q.reshape(B, T, K, G, Dh).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, Dh]
    q = q.reshape(B, K, G * T, Dh)
    q_positions = jnp.tile(q_positions, G)  # [B, G * T]
    first = jnp.tile(jnp.broadcast_to(first, (B, T)), G)
    k = k.swapaxes(1, 2)  # [B, K, S, Dh]
    v = v.swapaxes(1, 2)

    if is_long(T, S):
        # The same in less memory.
        x = attend_in_chunks(q, k, v, q_positions, k_positions, first, **score_options)
    else:
        scores = attention_scores(q, k, q_positions, k_positions, first, **score_options)
        probs = jax.nn.softmax(scores)  # [B, K, G * T, S]
        x = jnp.einsum("bhts,bhsd->bhtd", probs.astype(v.dtype), v)

    x = x.reshape(B, K, G, T, Dh).transpose(0, 3, 1, 2, 4)  # [B, T, K, G, Dh]
    return x.reshape(B, T, H, Dh)


def attention_scores(q, k, q_positions, k_positions, first, scale, window=None, softcap=None):
    """Scaled and masked dot products of queries and keys, in float32.

    q [B, heads, queries, Dh], k [B, heads, keys, Dh] -> [B, heads, queries, keys]
    """
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)

    mask = causal_mask(q_positions, k_positions, first, window)

    # Not -inf: a padding query has no key to attend to, and its softmax would be NaN. With the
    # lowest finite number it takes a uniform mean over all slots; no real token ever attends to it.
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)


def causal_mask(q_positions, k_positions, first, window=None):
    """Which keys each query may attend to, as bool.

    q_positions and first [B, queries], k_positions [B, keys] -> [B, 1, queries, keys]
    Positions alone decide: a key must be real, it must not be later than the query, and not before
    `first`, where the query's document begins. Padding and empty slots of the cache have position
    -1. With a sliding window, a key must also be among the last `window` positions up to the
    query's.
    """
    q_pos = q_positions[:, None, :, None]
    k_pos = k_positions[:, None, None, :]
    first = first[:, None, :, None]
    mask = (k_pos >= 0) & (k_pos >= first) & (k_pos <= q_pos)
    if window is not None:
        mask = mask & (q_pos - k_pos < window)
    return mask


def rotate(x, positions, inv_freq):
    """RoPE: rotates the pairs (i, i + Dh / 2) of each head by position * frequency, in float32.

    x [B, T, heads, Dh], positions [B, T] -> [B, T, heads, Dh]. The dot product of a query and a
    key then depends on where they are only through their distance. Su et al. 2021, (34).
    """
    angles = (positions[..., None] * inv_freq)[:, :, None]  # [B, T, 1, Dh / 2]
    cos = jnp.cos(angles)
    sin = jnp.sin(angles)

    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rope_frequencies(config: Config, sliding: bool):
    """RoPE frequencies in radians per position: [Dh / 2]; in Gemma 3 by the kind of layer.

    Full layers have a larger theta, and linear scaling in models with a long context.
    """
    theta = config.rope_theta
    factor = config.rope_factor
    if sliding:
        theta = config.rope_local_base_freq
        factor = config.rope_local_factor

    Dh = config.head_dim
    exponents = np.arange(0, Dh, 2, dtype=np.float32) / Dh  # in float32, as transformers has it
    return theta**-exponents / factor


class Attention(nnx.Module):
    """Causal self-attention with H query heads and K KV heads, and positions as rotations."""

    def __init__(self, config: Config, layer: int, **options):  # options: dtype, param_dtype, rngs
        D = config.hidden_size
        H = config.num_attention_heads
        K = config.num_key_value_heads
        Dh = config.head_dim
        init = normal(config.initializer_range)
        linear = {"use_bias": False, "kernel_init": init, **options}

        self.config = config
        self.sliding = config.layer_types[layer] == SLIDING
        self.q_proj = Linear(D, H * Dh, **linear)
        self.k_proj = Linear(D, K * Dh, **linear)
        self.v_proj = Linear(D, K * Dh, **linear)
        self.o_proj = Linear(H * Dh, D, **linear)
        if config.model_type == "gemma3_text":
            self.q_norm = RMSNorm(config, Dh, **options)
            self.k_norm = RMSNorm(config, Dh, **options)

    @jax.named_scope("self_attn")
    def __call__(self, x, positions, k_positions, layer_cache, start, first=0):
        """x [B, T, D] -> (x [B, T, D], the updated layer_cache).

        layer_cache: (k, v) of this layer; those of x are written from slot `start` on.
        positions [B, T] of x in the row; k_positions [B, S] of the whole cache, x included.
        first: 0, or [B, T], the position at which the document of each token begins.
        """
        B, T, _ = x.shape
        Dh = self.config.head_dim
        q = self.q_proj(x).reshape(B, T, -1, Dh)  # [B, T, H, Dh]
        k = self.k_proj(x).reshape(B, T, -1, Dh)  # [B, T, K, Dh]
        v = self.v_proj(x).reshape(B, T, -1, Dh)
        if self.config.model_type == "gemma3_text":
            q = self.q_norm(q)
            k = self.k_norm(k)

        inv_freq = rope_frequencies(self.config, self.sliding)
        q = rotate(q, positions - first, inv_freq)
        k = rotate(k, positions - first, inv_freq)

        # What to attend to: k and v [B, S, K, Dh] of the cache. With a ring buffer they are the old
        # ring followed by the T new ones, or just the updated ring if T = 1.
        k, v, k_positions, layer_cache = update_layer(layer_cache, k, v, k_positions, start)

        score_options = {
            "scale": self.config.query_pre_attn_scalar**-0.5,
            "window": self.config.sliding_window if self.sliding else None,
            "softcap": self.config.attn_logit_softcapping,
        }
        x = attend(q, k, v, positions, k_positions, first, **score_options)  # [B, T, H, Dh]
        x = self.o_proj(x.reshape(B, T, -1))
        return x, layer_cache


class MLP(nnx.Module):
    """A gated MLP: two projections to F, one of which gates the other, and one back to D.

    The gate's activation is GELU: GeGLU, Shazeer 2020.
    """

    def __init__(self, config: Config, **options):
        D = config.hidden_size
        F = config.intermediate_size
        init = normal(config.initializer_range)
        linear = {"use_bias": False, "kernel_init": init, **options}

        self.act = ACTIVATIONS[config.hidden_activation]
        self.gate_proj = Linear(D, F, **linear)
        self.up_proj = Linear(D, F, **linear)
        self.down_proj = Linear(F, D, **linear)

    @jax.named_scope("mlp")
    def __call__(self, x):
        """x [B, T, D] -> [B, T, D]"""
        gate = self.act(self.gate_proj(x))  # [B, T, F]
        x = gate * self.up_proj(x)
        return self.down_proj(x)  # [B, T, D]


class Block(nnx.Module):
    """One layer: attention, then the MLP. Each reads a normed copy of the residual stream.

    From Gemma 2 on, what each adds to the residual stream is normed as well.
    """

    def __init__(self, config: Config, layer: int, **options):
        D = config.hidden_size

        self.norms_after = config.model_type != "gemma"
        self.input_layernorm = RMSNorm(config, D, **options)
        self.self_attn = Attention(config, layer, **options)
        self.post_attention_layernorm = RMSNorm(config, D, **options)
        self.mlp = MLP(config, **options)
        if self.norms_after:
            self.pre_feedforward_layernorm = RMSNorm(config, D, **options)
            self.post_feedforward_layernorm = RMSNorm(config, D, **options)

    def __call__(self, x, positions, k_positions, layer_cache, start, first=0):
        """x [B, T, D] -> (x [B, T, D], the updated layer_cache); arguments as for Attention."""
        y = self.input_layernorm(x)
        y, layer_cache = self.self_attn(y, positions, k_positions, layer_cache, start, first)

        if self.norms_after:
            x = x + self.post_attention_layernorm(y)
            y = self.mlp(self.pre_feedforward_layernorm(x))
            x = x + self.post_feedforward_layernorm(y)
        else:
            # In Gemma 1 the norm before the MLP has the name that it has in Llama.
            x = x + y
            y = self.mlp(self.post_attention_layernorm(x))
            x = x + y
        return x, layer_cache


class Model(nnx.Module):
    """Gemma: tokens [B, T] -> logits [B, T, V].

    `dtype` is the type to compute in, `param_dtype` the type to store weights in. Norms, RoPE,
    attention scores, softmax and logits are float32 in any case. `remat` turns on gradient
    checkpointing: the backward pass recomputes each block's activations instead of keeping them.

    From scratch it is initialised as the reference is: normal(0.02), norm weights 0 (norms
    multiply by 1 + weight).
    InputError: float16, which the residual stream overflows.
    """

    def __init__(
        self, config: Config, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat=False
    ):
        if jnp.dtype(dtype) == jnp.float16:
            raise InputError(
                "Gemma's residual stream exceeds 65504, float16's maximum: use bfloat16"
            )
        D = config.hidden_size
        V = config.padded_vocab_size or config.vocab_size
        init = normal(config.initializer_range)
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.cache_dtype = self.dtype  # assign jnp.dtype("int8"): a cache in 8 bits
        self.remat = remat

        self.embed_tokens = nnx.Embed(V, D, embedding_init=init, **options)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([Block(config, layer, **options) for layer in layers])
        self.norm = RMSNorm(config, D, **options)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(D, V, use_bias=False, kernel_init=init, **options)

    def __call__(self, tokens, positions=None, cache=None, *, rngs=None):
        """tokens [B, T] -> logits [B, T, V] in float32; with a cache: (logits, cache)."""
        x, new_cache = self.hidden(tokens, positions, cache, rngs=rngs)
        logits = self.head(x)
        if cache is None:
            return logits
        return logits, new_cache

    def hidden(self, tokens, positions=None, cache=None, *, rngs=None):
        """tokens [B, T] -> (x [B, T, D], cache): the final normed residual stream, for `head`.

        positions [B, T]: -1 for padding. By default they follow the positions in the cache.
        Without a cache, a row may pack several documents one after another: each begins where the
        positions begin again at 0, and its tokens attend to no other.
        cache: needs T empty slots; by default a new one is filled.
        rngs: not used; other models need it to train with dropout.
        InputError: see `check_inputs`. Under jit values are not known, and the caller checks them.
        """
        tokens = as_array(tokens)  # lists will do
        check_inputs(self.config, tokens, positions, cache)
        B, T = tokens.shape
        run_block = how_to_run(self, with_cache=cache is not None)  # normally Block.__call__

        # Without a cache a new one of T slots is filled: training and generation share this code.
        first = 0  # the position in the row at which a token's document begins
        if cache is None:
            check_length(self.config, T)
            cache = init_cache(self.config, B, T, self.dtype, use_ring=False)
            if positions is not None:
                # From here on positions count within the row.
                positions, first = split_documents(as_array(positions))

        # The new tokens take the slots from `start` on. Positions in an empty cache are -1, so by
        # default the first token of a sequence has position 0.
        start = cache.filled
        if positions is None:
            positions = cache.positions.max(axis=1, keepdims=True) + 1 + jnp.arange(T)
        positions = as_array(positions)
        k_positions = write_slots(cache.positions, positions, start)  # [B, S]

        x = self.embed_tokens(tokens)  # [B, T, D]
        x = x * jnp.array(self.config.hidden_size**0.5, x.dtype)  # rounded, as in the reference

        layers = []
        for i, block in enumerate(self.layers):
            with jax.named_scope(f"layers.{i}"):  # its name in a profile
                x, layer_cache = run_block(
                    block, x, positions, k_positions, cache.layers[i], start, first
                )
            layers.append(layer_cache)

        x = self.norm(x)
        all_tokens = write_slots(cache.tokens, tokens, start)  # [B, S]
        return x, Cache(tuple(layers), all_tokens, k_positions, start + T)

    @jax.named_scope("head")
    def head(self, x):
        """x [..., D] -> logits [..., V] in float32."""
        if quantized_as(self) is not None:
            # The same from fewer bits.
            logits = quantized_head(self, x)
        else:
            if self.config.tie_word_embeddings:
                w = self.embed_tokens.embedding  # [V, D]
            else:
                w = self.lm_head.kernel.T
            w = w.astype(x.dtype)
            logits = jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)

        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits[..., : self.config.vocab_size]  # drops what pads the vocabulary


ACTIVATIONS = {
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),  # all published Gemmas have it
    "gelu": partial(jax.nn.gelu, approximate=False),
}


class RMSNorm(nnx.Module):
    """RMSNorm: x divided by its root mean square, times 1 + weight; all in float32."""

    def __init__(self, config: Config, size: int, *, dtype, param_dtype, rngs):
        self.eps = config.rms_norm_eps
        self.scale = nnx.Param(jnp.zeros(size, param_dtype))

    def __call__(self, x):
        """x [..., size] -> [..., size]"""
        x32 = x.astype(jnp.float32)
        mean_square = (x32 * x32).mean(axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(mean_square + self.eps)
        x32 = x32 * (1 + self.scale[...].astype(jnp.float32))
        return x32.astype(x.dtype)


def split_documents(positions):
    """Tells the documents of packed rows apart: positions [B, T] -> (in_row, first), both [B, T].

    positions count within a document, and begin again at 0 with the next. in_row counts the real
    tokens of the row; first is in_row where a token's document begins. Padding has -1 and 0.
    """
    real = positions >= 0
    in_row = jnp.where(real, jnp.cumsum(real, axis=1) - 1, -1)
    return in_row, in_row - positions


# -------------------------------------------- KV cache --------------------------------------------


class Cache(NamedTuple):
    """The KV cache: keys and values of all tokens so far, so that they are computed only once.

    With a sliding window a layer keeps only the last ones, in a ring buffer: see update_layer.
    A row is one sequence of the batch. All rows fill the same slots; shorter prompts are padded on
    the left. The position of padding and of empty slots is -1, which hides them from every query.
    """

    layers: tuple  # for each layer (k, v), each [B, S, K, Dh]; SLIDING: [B, ring_size, K, Dh]
    tokens: jax.Array  # [B, S], for the repetition penalty
    positions: jax.Array  # [B, S]
    filled: jax.Array  # how many slots are filled, padding included: where the next token goes


def init_cache(config: Config, batch: int, length: int, dtype, use_ring=True) -> Cache:
    """An empty cache of `length` slots.

    use_ring: a SLIDING layer holds no more tokens than its window, in a ring buffer.
    """
    width = stored_width(config.head_dim, dtype)
    layers = []
    for kind in config.layer_types:
        layer_length = length
        if kind == SLIDING and use_ring:
            layer_length = min(length, config.sliding_window)
        shape = (batch, layer_length, config.num_key_value_heads, width)
        layers.append((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    tokens = jnp.zeros((batch, length), int)
    positions = jnp.full((batch, length), -1)
    return Cache(tuple(layers), tokens, positions, jnp.array(0))


def update_layer(layer_cache, k, v, k_positions, start):
    """Writes new keys and values into a layer of the cache, from slot `start` on.

    k and v [B, T, K, Dh] -> (k, v and k_positions to attend to; the updated layer_cache). A layer
    with a sliding window is a ring buffer. A slot is an index into the whole sequence, a place one
    into the ring: slot s is at place s % ring_size, replacing a token that has left the window.
    """
    T = k.shape[1]
    S = k_positions.shape[1]
    old_k = layer_cache[0]
    old_v = layer_cache[1]
    ring_size = old_k.shape[1]

    # No window, or one at least as long as the cache: every slot has a place of its own.
    if ring_size == S:
        k = write_slots(old_k, k, start)
        v = write_slots(old_v, v, start)
        return k, v, k_positions, (k, v)

    # Each place of the ring keeps its old token, or takes one of the T new ones.
    k = as_stored(k, old_k.dtype)
    v = as_stored(v, old_v.dtype)
    slot, ring_positions = ring_contents(k_positions, ring_size, start + T)
    is_old = (slot < start)[:, None, None]
    i_new = jnp.clip(slot - start, 0, T - 1)
    ring_k = jnp.where(is_old, old_k, k[:, i_new])
    ring_v = jnp.where(is_old, old_v, v[:, i_new])

    # With one new token, the ring holds exactly the window of that token.
    if T == 1:
        return ring_k, ring_v, ring_positions, (ring_k, ring_v)

    # With several, the first ones still attend to keys that the last ones replace in the ring: all
    # attend to the ring as it was, and to the new ones.
    k = jnp.concatenate([old_k, k], axis=1)
    v = jnp.concatenate([old_v, v], axis=1)
    _, old_positions = ring_contents(k_positions, ring_size, start)
    new_positions = jax.lax.dynamic_slice_in_dim(k_positions, start, T, axis=1)
    k_positions = jnp.concatenate([old_positions, new_positions], axis=1)
    return k, v, k_positions, (ring_k, ring_v)


def ring_contents(positions, ring_size: int, end):
    """What a ring of ring_size places holds once all slots before `end` are written.

    positions [B, S] -> (the slot in each place [ring_size], its position [B, ring_size] or -1)
    """
    # The newest slot below `end` with slot % ring_size == place; negative: still empty.
    place = jnp.arange(ring_size)
    newest = end - 1
    slots_back = (newest - place) % ring_size
    slot = newest - slots_back

    ring_positions = jnp.where(slot >= 0, positions[:, slot], -1)
    return slot, ring_positions


def has_unbounded_context(config: Config) -> bool:
    """Whether a text may exceed the context length uncut: every layer has a sliding window.

    RoPE sees distances alone, and none within a window is new to the model.
    """
    return all(kind == SLIDING for kind in config.layer_types)


def write_slots(slots, new, start):
    """Writes new [B, T, ...] into slots [B, S, ...] from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, as_stored(new, slots.dtype), start, axis=1)


# ---------------------------- Generation: the same in every model file ----------------------------


class InputError(ValueError):
    """Something that the caller can fix; the message says what is wrong and what to do."""


@jax.named_scope("sample")
def sample(
    logits,
    rng_keys,
    seen=None,
    *,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
):
    """Draws the next token of each row: logits [B, V], rng_keys [B], seen [B, V] bool -> [B].

    An option that is None is off; temperature None is greedy (argmax). The order is the one of
    transformers: repetition penalty (Keskar et al. 2019), temperature, top-k, top-p, which is
    nucleus sampling (Holtzman et al. 2019), and min-p (Nguyen et al. 2024).
    """
    # The penalty makes tokens that occurred in the row less likely.
    if repetition_penalty is not None:
        factor = jnp.where(logits > 0, 1 / repetition_penalty, repetition_penalty)
        logits = jnp.where(seen, logits * factor, logits)

    if temperature is None:
        return jnp.argmax(logits, axis=-1)
    # The best logit becomes 0, so that no temperature is too low to divide by.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / jnp.maximum(temperature, 1e-30)

    # With top_k, only k logits remain; `ids` holds their token ids.
    ids = None
    if top_k is not None:
        logits, ids = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))  # [B, k]

    if top_p is not None:
        bound = top_p_bound(logits, top_p)
        logits = jnp.where((logits > bound) | (logits == 0), logits, -jnp.inf)
    if min_p is not None:
        logits = jnp.where(logits >= jnp.log(min_p), logits, -jnp.inf)

    choice = jax.vmap(jax.random.categorical)(rng_keys, logits)  # [B]
    if ids is not None:
        choice = jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]
    return choice


def top_p_bound(logits, top_p):
    """The logit above which tokens are in the nucleus: logits [B, n] -> [B, 1].

    A token is kept if the likelier ones sum to less than top_p. The bound is found by bisection,
    which is faster than sorting the vocabulary.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    best = logits.max(axis=-1, keepdims=True)

    # Invariant: the tokens above `low` hold at least top_p, those above `high` less.
    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        above = jnp.where(logits > middle, probs, 0).sum(axis=-1, keepdims=True)
        enough = above >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 40, halve, (best - 104, best))  # exp(-104) is 0 in float32
    return low


def generate_naive(model, prompt: list[int], max_new_tokens: int, *, key, keep=None, **sampling):
    """Autoregressive generation in its plainest form: recompute everything for each new token.

    No cache, and a single prompt. Up to rounding, `generate` gives the same tokens with
    key=jnp.stack([key]), a key for each row; a cache in 8 bits rounds more. `sampling` is passed on
    to `sample`. keep: see `generate_stream`; without a cache no text runs on beyond the context,
    even with sliding windows.
    """
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    key = as_key(key)
    ids = as_integers(prompt)
    length = len(ids) + max_new_tokens
    if keep is not None:
        length = min(length, model.config.max_position_embeddings)

    visible = ids  # the part of the text that the model sees
    for _ in range(max_new_tokens):
        visible = shift_context(model.config, visible, keep)
        n = len(visible)
        padded = np.array([visible + [0] * (length - n)])  # no token attends to later ones
        logits = forward(state, padded)[:, n - 1]  # [1, V]
        seen = np.isin(np.arange(model.config.vocab_size), visible)[None]
        rng_keys = jax.random.fold_in(key_after_shift(key, len(ids) - n), n)[None]
        token = sample(logits, rng_keys, seen, **sampling).item()
        ids = [*ids, token]
        visible = [*visible, token]
    return ids[len(prompt) :]


@partial(jax.jit, static_argnames=("graphdef", "top_k"), donate_argnames="cache")
def prefill(graphdef, state, cache: Cache, tokens, positions, keys, sampling: dict, top_k):
    """One forward pass, then one sampled token: tokens [B, T] -> (cache, token [B]).

    Called with the whole prompts it is the prefill; with T = 1 it is a step of `decode`. An option
    that is None is absent from the compiled program. The token is -1 where a logit is NaN.
    """
    model = nnx.merge(graphdef, state)
    x, cache = model.hidden(tokens, positions, cache)

    # Padding is on the left, so the last token of every row is real.
    last = cache.positions.max(axis=1, keepdims=True)
    token = sample_next(model, x[:, -1:], last, cache, keys, sampling, top_k)  # [B, 1]
    return cache, token[:, 0]


@partial(jax.jit, static_argnames=("graphdef", "top_k"), donate_argnames="cache")
def verify(graphdef, state, cache: Cache, tokens, positions, keys, sampling: dict, top_k):
    """For speculative decoding: tokens [B, T] -> (cache, the token after each of them [B, T]).

    A row is the newest token of a text, then guesses of what follows, then padding at position -1.
    The result at a position is what `decode` would make there, up to rounding, if all guesses up to
    that position are right. The cache holds the wrong ones, too: sample.py shows how to hide them.
    """
    model = nnx.merge(graphdef, state)
    x, cache = model.hidden(tokens, positions, cache)
    return cache, sample_next(model, x, positions, cache, keys, sampling, top_k)


def sample_next(model, x, positions, cache: Cache, keys, sampling: dict, top_k):
    """Samples the token after each position: x [B, T, D], positions [B, T] -> [B, T].

    x is the final residual stream, and the cache holds the tokens up to there. The result is -1
    where a logit is NaN: see `check_tokens`.
    """
    B, T = positions.shape
    logits = model.head(x).reshape(B * T, -1)  # [B * T, V]

    # Which tokens each row holds, up to each position; padding does not count.
    seen = None
    if sampling["repetition_penalty"] is not None:
        rows = jnp.arange(B * T)[:, None]
        tokens = jnp.repeat(cache.tokens, T, axis=0)  # [B * T, S]
        held = jnp.repeat(cache.positions, T, axis=0)
        held = (held >= 0) & (held <= positions.reshape(B * T, 1))
        seen = jnp.zeros(logits.shape, bool).at[rows, tokens].max(held)

    # A row's random numbers depend only on its own key and the position of the new token.
    fold_in = jax.vmap(jax.random.fold_in)
    rng_keys = fold_in(jnp.repeat(keys, T), positions.reshape(B * T) + 1)
    token = sample(logits, rng_keys, seen, top_k=top_k, **sampling)

    # Damaged weights, or an overflow in float16: no token is right.
    token = jnp.where(jnp.isnan(logits).any(axis=-1), -1, token)
    return token.reshape(B, T)


STEPS = 32  # tokens in one call of `decode`, at most; Ctrl-C and stop ids take effect in between


@partial(jax.jit, static_argnames=("graphdef", "top_k"), donate_argnames="cache")
def decode(graphdef, state, cache: Cache, token, keys, sampling: dict, steps, top_k):
    """Generates `steps` tokens after token [B], one at a time -> (cache, tokens [B, STEPS])."""

    def step(i, carry):
        cache, token, new = carry
        cache, token = prefill(graphdef, state, cache, token[:, None], None, keys, sampling, top_k)
        return cache, token, new.at[:, i].set(token)

    new = jnp.zeros((len(token), STEPS), int)
    cache, _, new = jax.lax.fori_loop(0, steps, step, (cache, token, new))
    return cache, new


def generate(
    model,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    key,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    stop_ids=(),
    keep=None,
) -> list[list[int]]:
    """Continues each prompt by up to max_new_tokens; returns the new tokens only.

    A row ends before its first stop id. It depends on its own prompt and key alone, up to
    rounding. key: one jax.random.key for each row, or a single one, which is folded with the row
    numbers; a seed will do. temperature 0: greedy. stop_ids: ids, or a single one, or None.
    keep: by default an InputError where a text would exceed the context; see `generate_stream`.
    InputError: see `batch_prompts`, `check_sampling` and `check_tokens`, and arguments of another
    kind.
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    stream = generate_stream(
        model,
        prompts,
        max_new_tokens,
        key=key,
        stop_ids=stop_ids,
        keep=keep,
        steps=STEPS,
        **options,
    )
    rows = [[] for _ in range(len(prompts))]
    for new in stream:
        for row, tokens in zip(rows, new, strict=True):
            row += tokens
    return rows


def generate_stream(
    model,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    key,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    stop_ids=(),
    keep=None,
    steps=1,
):
    """Generates as `generate` does, and yields the new tokens as they come: a list for each row.

    A list holds up to `steps` tokens; that of a row that has ended is empty.
    keep: a number lets texts grow beyond the context length. Where a text fills it, the model goes
    on from the first `keep` tokens (such as a begin token) and the last ones, half a context in
    all; so it does with a prompt that is too long. What is cut no longer counts for the repetition
    penalty. With sliding windows alone, any number will do and nothing is cut: see
    `has_unbounded_context`.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    sampling = {
        "temperature": temperature or None,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": None if repetition_penalty == 1 else repetition_penalty,
    }
    visible = [as_integers(prompt) for prompt in prompts]  # of each text, what the model sees
    check_prompts(model.config, visible, max_new_tokens, keep)
    keys = keys_of_rows(key, len(visible))
    stop_ids = [] if stop_ids is None else as_integers(np.ravel(stop_ids))
    dropped = [0] * len(visible)  # of each text, how many tokens the model no longer sees
    ended = [False] * len(visible)

    left = max_new_tokens
    while left > 0:
        # Where the context is full, a row goes on from its last tokens. Then all rows are prefilled
        # again, each with what it sees.
        for row, ids in enumerate(visible):
            visible[row] = shift_context(model.config, ids, keep)
            dropped[row] += len(ids) - len(visible[row])
        row_keys = jnp.stack([key_after_shift(*pair) for pair in zip(keys, dropped, strict=True)])
        limit = tokens_until_full(model.config, visible, left, keep)
        left -= limit

        for new in fill_context(model, visible, limit, row_keys, sampling, top_k, steps):
            new_rows = []
            for row, tokens in enumerate(new.tolist()):
                visible[row] += tokens
                kept = [] if ended[row] else until_stop(tokens, stop_ids)
                ended[row] = ended[row] or len(kept) < len(tokens)
                new_rows.append(kept)
            yield new_rows
            if all(ended):
                return


def fill_context(model, prompts, max_new_tokens: int, keys, sampling: dict, top_k, steps: int):
    """Prefill, then decode: yields new tokens [B, n] of all rows: first 1, then up to `steps`."""
    if not isinstance(steps, (int, np.integer)) or steps < 1:
        raise InputError("steps must be an integer of 1 or more")

    graphdef, state = nnx.split(model)
    tokens, positions, length = batch_prompts(model.config, prompts, max_new_tokens)
    cache = init_cache(model.config, len(tokens), length, model.cache_dtype)

    # The first new token comes from the prompts, the others one after another.
    cache, token = prefill(graphdef, state, cache, tokens, positions, keys, sampling, top_k)
    new = np.asarray(token)[:, None]  # [B, 1]
    check_tokens(new)
    yield new

    left = max_new_tokens - 1
    while left > 0:
        n = min(steps, STEPS, left)
        cache, new = decode(graphdef, state, cache, new[:, -1], keys, sampling, n, top_k)
        new = np.asarray(new)[:, :n]
        check_tokens(new)
        left -= n
        yield new


def shift_context(config, ids: list[int], keep: int | None) -> list[int]:
    """What the model goes on from: all of `ids`, or half a context of them where they fill it.

    The half consists of the first `keep` tokens and the last ones.
    """
    context = config.max_position_embeddings
    if keep is None or has_unbounded_context(config) or len(ids) < context:
        return ids
    last = context // 2 - keep
    return ids[:keep] + ids[len(ids) - last :]


def tokens_until_full(config, rows: list[list[int]], new_tokens: int, keep: int | None) -> int:
    """How many of new_tokens can be made before the longest row fills the context."""
    if keep is None or has_unbounded_context(config):
        return new_tokens
    return min(new_tokens, config.max_position_embeddings - max(map(len, rows)))


def key_after_shift(key, dropped: int):
    """The random key of a row that goes on after `dropped` tokens of it have been cut.

    Its positions begin again, and with the same key so would its random numbers.
    """
    return key if dropped == 0 else jax.random.fold_in(key, dropped)


def keys_of_rows(key, rows: int):
    """A random key for each row [B]. InputError: `key` holds another number of them."""
    keys = as_key(key)
    if keys.ndim == 0:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(rows))
    if keys.shape != (rows,):
        raise InputError(f"there are {len(keys)} random keys for {rows} prompts")
    return keys


def check_tokens(new) -> None:
    """InputError where the logits of a new token were NaN."""
    if (new < 0).any():
        raise InputError(
            "the logits are not numbers (NaN): the weights are damaged, or float16 is too narrow "
            "for them; try float32"
        )


def until_stop(row: list[int], stop_ids: list[int]) -> list[int]:
    """The tokens of a row before the first stop id."""
    for i, token in enumerate(row):
        if token in stop_ids:
            return row[:i]
    return row


def batch_prompts(config, prompts: list[list[int]], max_new_tokens: int):
    """Makes one batch of ragged prompts: (tokens [B, T], positions [B, T], cache length).

    Shorter prompts are padded on the left, at position -1. T is rounded up to a power of two, at
    least 64, and the cache length to a multiple of 128, since each new shape is compiled; both may
    exceed the context length. InputError: ids outside the vocabulary.
    """
    T = max(64, 2 ** (max(map(len, prompts)) - 1).bit_length())

    tokens = np.zeros((len(prompts), T), int)
    positions = np.full((len(prompts), T), -1)
    for row, prompt in enumerate(prompts):
        first = T - len(prompt)
        tokens[row, first:] = prompt
        positions[row, first:] = np.arange(len(prompt))
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise InputError(f"a prompt has ids outside the vocabulary of {config.vocab_size}")
    return tokens, positions, round_up(T + max_new_tokens, 128)


def check_prompts(config, prompts: list[list[int]], max_new_tokens: int, keep: int | None) -> None:
    """InputError where prompts are empty, or where they do not fit the context without `keep`."""
    context = config.max_position_embeddings
    if not prompts or min(map(len, prompts)) == 0:
        raise InputError("a prompt must not be empty")
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise InputError("max_new_tokens must be an integer of 1 or more")
    if keep is None:
        check_length(config, max(map(len, prompts)), max_new_tokens)
    elif not isinstance(keep, (int, np.integer)) or not 0 <= keep < context // 2:
        raise InputError(
            f"keep must be an integer from 0 to below half the context length of {context}"
        )


def check_sampling(temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    """InputError where an option of `generate` is out of its range."""
    if not temperature >= 0:
        raise InputError("temperature must be 0 (the likeliest token) or more")
    if top_k is not None and (not isinstance(top_k, (int, np.integer)) or top_k < 1):
        raise InputError("top_k must be an integer of 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError("top_p must be above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise InputError("min_p must be from 0 to 1")
    if not repetition_penalty > 0:
        raise InputError("repetition_penalty must be above 0")


def as_integers(values) -> list[int]:
    """A sequence or array of token ids as a list. InputError: anything else, such as a text."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise InputError(
            f"{values!r:.60} is not a list of token ids; a prompt is one such as [464, 3290], "
            "`tokenizer` makes it from a text, and `generate` takes a list of prompts"
        ) from None


def as_array(tokens):
    """Tokens or positions as an array [B, T]. InputError: they are something else."""
    rows = tokens
    if not hasattr(rows, "ndim"):
        rows = [as_integers(row) for row in rows]
        if len({len(row) for row in rows}) > 1:
            raise InputError(
                "rows of tokens are of different lengths: `batch_prompts` makes a batch of them"
            )
        rows = np.array(rows)
    if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise InputError(f"{rows.dtype}{list(rows.shape)} is not an array of integers [B, T]")
    return rows


def check_inputs(config, tokens, positions, cache) -> None:
    """InputError where the arguments of `Model.hidden` do not fit the model or each other.

    JAX itself raises nothing: it clamps an index that is out of range. Under jit only shapes are
    checked.
    """
    B, T = tokens.shape
    V = config.vocab_size
    context = config.max_position_embeddings
    end = np.inf if has_unbounded_context(config) else context

    if has_outside(tokens, 0, V):
        raise InputError(f"there are token ids outside the vocabulary of {V}")

    if positions is not None:
        positions = as_array(positions)
        if positions.shape != (B, T):
            raise InputError(f"positions are {list(positions.shape)}, and tokens {[B, T]}")
        if has_outside(positions, -1, end):
            raise InputError(f"positions must be below the context length of {context}, or -1")

    if cache is not None:
        rows, slots = cache.positions.shape
        if rows != B:
            raise InputError(f"the cache is for {rows} rows, and there are {B} rows of tokens")
        if has_outside(cache.filled, 0, slots - T + 1):
            raise InputError(
                f"{cache.filled} of the {slots} slots of the cache are filled: there is no room "
                f"for {T} tokens"
            )
        if positions is None and has_outside(cache.positions, -1, end - T):
            raise InputError(f"{T} more tokens do not fit the context length of {context}")


def has_outside(values, low, high) -> bool:
    """Whether a value is below `low`, or not below `high`; False under jit, where none is known."""
    if isinstance(values, jax.core.Tracer):
        return False
    values = np.asarray(values)
    return bool((values < low).any() or (values >= high).any())


def as_key(key):
    """A typed key array from what users have: itself, a seed, or an older jax.random.PRNGKey."""
    if isinstance(key, int):
        return jax.random.key(key)
    if not hasattr(key, "dtype"):
        raise InputError(f"{key!r:.60} is not a random key: use jax.random.key(0)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(key)
    return key


def check_length(config, tokens: int, new_tokens: int = 0) -> None:
    """InputError where so many tokens exceed the context length."""
    context = config.max_position_embeddings
    if tokens + new_tokens > context:
        total = f"{tokens} + {new_tokens}" if new_tokens > 0 else f"{tokens}"
        raise InputError(f"{total} tokens do not fit the context length of {context}")


def round_up(n, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least n."""
    return math.ceil(n / multiple) * multiple


# --------------------------- Checkpoints: the same in every model file ----------------------------


DOWNLOADS = [  # files to download besides the weights
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
]


EXPERT = "{expert}"  # stands for the number of an expert in the name of a stack of them


class Preset(NamedTuple):
    """A checkpoint that is published on the Hugging Face Hub."""

    parameters: int
    download_GB: float
    gated: bool  # whether one must accept its terms first
    config: Config


def load(
    source, *, dtype=None, param_dtype=None, mesh=None, remat=False, revision=None, quantize=None
):
    """The model in a folder, a GGUF file or under a Hub id. Tensors are read one at a time.

    A folder with an adapter of LoRA is loaded as its base, with the adapter merged.

    dtype: by default float32 on a CPU, bfloat16 elsewhere. param_dtype: by default the same; use
    float32 to train. mesh: a jax.sharding.Mesh, whose axes are Auto (those of jax.make_mesh are
    Explicit); each tensor goes straight to its devices, as SHARDING says. A head that differs from
    the token table is used, even if config.json says that they are tied. quantize: "int8", "int4"
    or "bfloat16" holds the matrices in fewer bits, as QuantizedMatrix says; by default they are
    held as the folder says. Such a model cannot be trained. InputError: no checkpoint, another kind
    of model, damaged files, or tensors that are missing, unexpected or misshapen.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    check_dtypes(dtype, param_dtype or dtype)
    folder = fetch(source, revision)
    config = read_config(folder)
    stored = stored_tensors(base_of(folder))
    adapters = {}
    if is_adapter(folder):
        stored, adapters = read_adapters(folder, stored)
    if config.tie_word_embeddings:
        config, stored = find_head(config, stored, adapters)
    quantize = check_quantize(folder, quantize)

    # The parameters as the files have them, and as the model will have them: quantized, perhaps.
    options = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
    expected = skeleton(config, read_quantization(folder), **options)[1]
    check_names(folder, expected, stored)
    graphdef, state = skeleton(config, quantize, **options)
    params = {join(parts): param for parts, param in nnx.to_flat_state(state)}

    # Largest first: a conversion holds two temporary copies, so do it while memory is free.
    by_size = sorted(named_parameters(expected), key=lambda row: -row[1].size)
    for path, param, template, transposed in by_size:
        parts = []  # what one tensor becomes, or that of each expert
        for name in names_of(template, param):
            tensor = read_tensor(folder, name, stored[name], param, path, transposed)
            if name in adapters:
                tensor = adapters[name](tensor)  # in float32
            tensor = tensor.astype(param.dtype, copy=False)

            values = {path: tensor}
            if path not in params:
                values = quantize_tensor(path, tensor, quantize)
            parts.append(values)

        values = parts[0]
        if EXPERT in template:
            values = jax.tree.map(lambda *each: np.stack(each), *parts)  # [E, ...]
        place(params, values, mesh, config)
    return nnx.merge(graphdef, state)


def place(params: dict, values: dict, mesh, config: Config) -> None:
    """Gives parameters their values, both by path, on the devices of a mesh if there is one."""
    for path, value in values.items():
        where = None
        if mesh is not None:
            where = sharding_of_part(mesh, config, path, value.shape)
        params[path].set_value(jax.device_put(value, where))


def read_tensor(folder: Path, name: str, read, param, path: str, transposed: bool):
    """A tensor of a checkpoint as the parameter needs it. InputError: another shape or type."""
    tensor = read()
    if transposed:
        tensor = tensor.T
    shape = param.shape[-2:]  # without the first axis of a stack of experts
    if tensor.shape != shape:
        raise InputError(f"{folder}: {name} makes {path} {tensor.shape}, not {shape}")
    both_float = all(jnp.issubdtype(each.dtype, jnp.floating) for each in (tensor, param))
    if not both_float and tensor.dtype != param.dtype:
        raise InputError(f"{folder}: {name} is {tensor.dtype}: quantized weights are not supported")
    return tensor


def check_dtypes(*dtypes) -> None:
    """InputError where one of the dtypes is not of floating-point numbers."""
    for dtype in dtypes:
        try:
            is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:  # no dtype at all
            is_float = False
        if not is_float:
            raise InputError(f"dtype {dtype!r}: it must be float32, bfloat16 or float16")


def save(model, folder, tokenizer=None) -> None:
    """Writes config.json and model.safetensors, which transformers and `load` read.

    A quantized model is for `load` alone: each matrix has the parts of its QuantizedMatrix.

    With what `tokenizer` returned it writes tokenizer.json, too: sample.py then reads the folder.
    OSError: the folder cannot be made, such as FileExistsError where `folder` is a file.
    """
    tensors = {}
    for path, param, template, transposed in named_parameters(nnx.state(model)):
        value = np.asarray(param[...])
        values = value if EXPERT in template else [value]
        for name, tensor in zip(names_of(template, param), values, strict=True):
            if transposed:
                tensor = tensor.T
            if path in VOCABULARY:
                tensor = tensor[: model.config.vocab_size]  # without a padded vocabulary
            tensors[name] = np.ascontiguousarray(tensor)

    dtypes = [tensor.dtype for tensor in tensors.values()]
    dtype = next(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))
    values = {**model.config.to_hf(), "dtype": str(dtype)}
    kind = quantized_as(model)
    if kind is not None:
        values["quantization_config"] = {"quant_method": QUANT_METHOD, "format": kind}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.backend.save(str(Path(folder, "tokenizer.json")))


def skeleton(config: Config, quantize=None, **options):
    """(graphdef, state) of a Model whose parameters have shapes and types, but no memory yet."""
    # Only shapes are traced, so one constant key stands in for nnx.Rngs.
    rngs = SimpleNamespace(params=partial(jax.random.key, 0))

    def build():
        model = Model(config, rngs=rngs, **options)
        if quantize is not None:
            quantize_layers(model, quantize)
        return model

    return nnx.split(nnx.eval_shape(build))


def named_parameters(state):
    """Yields (path, parameter, name in the checkpoint, transposed there) of each parameter.

    The name comes from the first row of CHECKPOINT, in each model's own section, whose pattern
    matches the path. What matches none, such as an adapter of LoRA, is not in checkpoints. The name
    of a stack of experts contains EXPERT: see `names_of`.
    """
    for parts, param in nnx.to_flat_state(state):
        if parts[-1] in PARTS:
            # A part of a quantized matrix, whose rows are the outputs in all files.
            name, _ = name_in_checkpoint(join(parts[:-1]))
            yield join(parts), param, f"{name}.{parts[-1]}", False
            continue

        name, transposed = name_in_checkpoint(join(parts))
        if name is not None:
            yield join(parts), param, name, transposed


def names_of(template: str, param) -> list[str]:
    """The names of a parameter's tensors in a checkpoint: one, or one for each expert of a stack.

    template: a name from `named_parameters`. A stack has a first axis E, and its tensors have not.
    """
    if EXPERT not in template:
        return [template]
    return [template.replace(EXPERT, str(e)) for e in range(param.shape[0])]


def join(parts) -> str:
    """The path of a parameter, such as layers.0.mlp.up_proj.kernel."""
    return ".".join(str(part) for part in parts)


def name_in_checkpoint(path: str) -> tuple:
    """(the name that a parameter has in checkpoints, or None; whether it is transposed there)."""
    for pattern, template, transposed in CHECKPOINT:
        if re.fullmatch(pattern, path):
            return re.sub(pattern, template, path), transposed
    return None, False


def find_head(config: Config, stored: dict, adapters: dict) -> tuple[Config, dict]:
    """The config and the stored tensors of a tied model, corrected by what the file holds.

    Some files hold the token table under the name of the head. Others, such as merged adapters,
    hold a head that differs from the table: that model is not tied. Nor is one whose head alone has
    an adapter.
    """
    table, _ = name_in_checkpoint(VOCABULARY[0])
    head, _ = name_in_checkpoint("lm_head.kernel")
    if head in stored and table not in stored:
        stored = {**stored, table: stored[head]}

    differs = head in stored and not np.array_equal(stored[head](), stored[table]())
    if head in adapters and head not in stored:
        stored = {**stored, head: stored[table]}
    if differs or head in adapters:
        config = replace(config, tie_word_embeddings=False)
    return config, stored


def check_names(folder: Path, state, stored: dict) -> None:
    """InputError where the checkpoint lacks tensors of the model, or has others."""
    wanted = set()
    for _, param, template, _ in named_parameters(state):
        wanted.update(names_of(template, param))
    missing = wanted - stored.keys()
    extra = {name for name in stored.keys() - wanted if not re.fullmatch(IGNORED, name)}
    for problem, names in [("lacks", missing), ("has unexpected", extra)]:
        if names:
            raise InputError(f"{folder} {problem} {len(names)} tensors, such as {min(names)}")


def fetch(name, revision: str | None = None, weights=True) -> Path:
    """The folder of a checkpoint, or its GGUF file: `name` itself, else in the Hub's cache.

    Downloads what the cache lacks: of the weights, only the first format in FORMATS that there is.
    Of an adapter, it is the folder of the adapter; see `base_of`.
    InputError: there is no such folder, and the Hub does not deliver it.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise InputError(f"{name!r:.60} is neither a folder nor an id on the Hub")
    if os.path.isdir(name):
        return find_gguf(Path(name))
    if is_gguf(Path(name)):
        if not os.path.lexists(name):
            raise InputError(f"there is no file {name}")
        return Path(name)
    if os.path.isfile(name):
        raise InputError(f"{name} is a file: name the folder of the checkpoint, or a .gguf file")

    from huggingface_hub import HfApi, errors, snapshot_download  # respects HF_HOME and HF_TOKEN

    failures = (errors.HTTPError, errors.HFValidationError, OSError)
    # One question with a time limit, which snapshot_download has not: if it fails, the cache alone
    # is looked at.
    problem = None
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except failures as error:
        problem = error
    snapshot = partial(
        snapshot_download, name, revision=revision, local_files_only=problem is not None
    )

    try:
        folder = Path(snapshot(allow_patterns=DOWNLOADS))
        formats = ADAPTER_FORMATS if is_adapter(folder) else FORMATS
        for whole in formats if weights else []:
            pattern = whole.replace(".", "*.") + "*"  # model*.safetensors*: shards and index, too
            snapshot(allow_patterns=pattern)
            if any(folder.glob(pattern)):
                break
    except failures as error:
        raise InputError(why_no_download(problem or error, name, revision)) from error
    return folder


def why_no_download(error, name: str, revision: str | None) -> str:
    """Says what is wrong where the Hub gives an error, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return f"{name}: no such folder, and not a name on the Hub"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: accept its terms on {constants.ENDPOINT}/{name}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no folder {name}, and the Hub has no model of that name; "
            "if it is private, set HF_TOKEN"
        )

    reason = str(error).strip().partition("\n")[0]
    bundled = Path(__file__).parent / "tiny" / Path(__file__).stem
    instead = f", or take the bundled {bundled}" if bundled.is_dir() else ""
    return (
        f"there is no folder {name}, it is not complete in {constants.HF_HUB_CACHE}, and the "
        f"download failed ({type(error).__name__}: {reason}): try again online{instead}"
    )


def check_file(file: Path) -> None:
    """InputError where a file of a checkpoint is missing, or plainly not what its name says."""
    if file.is_dir():
        raise InputError(f"{file} is a folder, not a file: download it again")
    if not file.exists() and file.is_symlink():
        raise InputError(f"{file} is a link to a file that is gone: download it again")
    if not file.exists():
        why = "no checkpoint, or an incomplete one"
        if (file.parent / "checkpoints").is_dir():
            why = "it holds a training run that is not finished (train.py --resume)"
        raise InputError(f"{file.parent} has no {file.name}: {why}")

    with open(file, "rb") as stream:
        start = stream.read(64).lstrip().lower()
    if not start:
        raise InputError(f"{file} is damaged or cut short (it is empty): download it again")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html")):
        raise InputError(f"{file} is a web page, not the file itself: download it again")


def read_json(file: Path) -> dict:
    """The object in a JSON file. InputError: it is missing, damaged or something else."""
    check_file(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))  # some begin with a BOM
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{file} is damaged ({error}): download it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} holds {type(values).__name__}, not a JSON object")
    return values


def read_json_if_any(file: Path) -> dict:
    """The object in a JSON file, or an empty one where there is no such file."""
    return read_json(file) if os.path.lexists(file) else {}


def read_config(folder: Path) -> Config:
    """The Config of the checkpoint in a folder. InputError: it has none that this file reads."""
    folder = base_of(folder, weights=False)
    values = read_values(folder)
    try:
        return Config.from_hf(values)
    except InputError as error:
        reason = str(error)
        if is_gguf(folder):
            reason = reason.replace("config.json", "its metadata")
        raise InputError(f"{folder}: {reason}") from None


def translate(values: dict) -> Config:
    """The Config for the contents of a config.json. InputError: it has values that cannot be."""
    try:
        return config_from_hf(values)
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"config.json has a value of a type that it cannot have: {error}"
        ) from error


def read_stop_ids(folder: Path, config: Config) -> list[int]:
    """The token ids that end a text: from generation_config.json, or else from config.json."""
    ids = config.eos_token_id
    file = folder / "generation_config.json"
    if not os.path.lexists(file):
        file = base_of(folder, weights=False) / "generation_config.json"
    if os.path.lexists(file):
        ids = read_json(file).get("eos_token_id", ids)

    ids = [] if ids is None else ids
    ids = [ids] if isinstance(ids, int) else ids
    try:
        return as_integers(ids)
    except InputError:
        raise InputError(
            f"{folder}: eos_token_id is {ids!r:.60}, not a token id or several"
        ) from None


def stored_tensors(folder: Path) -> dict:
    """The tensors of a checkpoint: name -> a function that reads one as a numpy array.

    InputError: there are none, or they are damaged.
    """
    if is_gguf(folder):
        return gguf_tensors_in(folder)
    stored = {}
    for name, read in read_tensors(folder, FORMATS).items():
        name, read = as_in_pytorch(name, read)
        stored[usual_name(name)] = read
    return stored


def as_in_pytorch(name: str, read):
    """(name, function that reads it) of a tensor, with the name and the layout that PyTorch has.

    Only what transformers' former Flax classes wrote is changed: their names end otherwise, and
    each kernel is transposed, that of GPT-2's Conv1D too.
    """
    path, _, kind = name.rpartition(".")
    if kind == "kernel":
        return f"{path}.weight", lambda: read().T
    if kind in ("scale", "embedding"):
        return f"{path}.weight", read
    return name, read


def usual_name(name: str) -> str:
    """The name that CHECKPOINT has for a tensor, from the name in a file."""
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def read_tensors(folder: Path, formats: dict) -> dict:
    """The tensors in a folder, by the first of the formats that there is.

    They are in one file, or in shards that an index lists. InputError: in neither, or damaged.
    """
    for whole, tensors_in in formats.items():
        files = weight_files(folder, whole)
        stored = {}
        for file in files:
            check_file(file)
            stored |= tensors_in(file)
        if files:
            return stored
    raise InputError(f"{folder} has no weights: no {' or '.join(formats)}")


def weight_files(folder: Path, whole: str) -> list[Path]:
    """The file of this name in a folder, or its shards, or nothing."""
    file = folder / whole
    if os.path.lexists(file):
        return [file]

    index = folder / f"{whole}.index.json"
    if not index.exists():
        return []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise InputError(f"{index} has no weight_map of names: download it again")
    return [folder / shard for shard in sorted(set(shards.values()))]


def safetensors_in(file: Path) -> dict:
    """The tensors of a .safetensors file: name -> a function that reads one as a numpy array."""

    def reader(name):
        def read():
            # Opened again for each tensor: pages of an open file count as memory in use.
            opened = safe_open(file, "np")
            kind = opened.get_slice(name).get_dtype()
            if kind not in ("F64", "F32", "F16", "BF16", "I8", "U8", "U16"):
                raise InputError(f"{file}: {name} is {kind}: quantized weights are not supported")
            return opened.get_tensor(name)

        return read

    try:
        names = list(safe_open(file, "np").keys())
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or cut short ({error}): download it again") from None
    return {name: reader(name) for name in names}


def flax_tensors_in(file: Path) -> dict:
    """The same of a flax_model.msgpack, of transformers' former Flax classes. It is read whole."""
    try:
        tree = serialization.msgpack_restore(file.read_bytes())
        tensors = traverse_util.flatten_dict(dict(tree), sep=".")
    except (ValueError, TypeError, SyntaxError) as error:  # SyntaxError: of the name of a dtype
        raise InputError(f"{file} is damaged or cut short ({error}): download it again") from None
    return {name: partial(np.asarray, tensor) for name, tensor in tensors.items()}


def known_fields(values: dict) -> dict:
    """The entries of a config.json that are fields of Config; lists become tuples."""
    known = {}
    for field in fields(Config):
        if field.name in values and field.name != "padded_vocab_size":  # ours alone
            value = values[field.name]
            known[field.name] = tuple(value) if isinstance(value, list) else value
    return known


def check_kind(values: dict, supported) -> str:
    """The model_type of a config.json. InputError: another kind of model, or quantized weights."""
    kind = values.get("model_type", supported[0])
    check_supported("model_type", kind, supported)
    check_supported("is_causal", values.get("is_causal", True), [True])
    quantized = values.get("quantization_config")
    if quantized:
        method = "an unknown method"
        if isinstance(quantized, dict):
            method = quantized.get("quant_method", method)
        if method != QUANT_METHOD or quantized.get("format") not in QUANTIZED:
            raise InputError(
                f"config.json: the weights are quantized ({method}), which is not supported: "
                "use the checkpoint that they were made from"
            )
    return kind


def check_supported(name: str, value, supported) -> None:
    """InputError where a value in config.json is not one that this file supports."""
    if value not in supported:
        options = ", ".join(map(repr, supported))
        file = Path(__file__).name
        raise InputError(f"config.json: {name} is {value!r}, but {file} supports only {options}")


def check_fields(config: Config) -> None:
    """InputError where a field of a Config has the wrong type, or a size is too small."""
    for field in fields(config):
        value = getattr(config, field.name)
        expected = field.type
        if expected in (float, float | None):
            expected = expected | int  # 1 for 1.0
        if not isinstance(value, expected):
            name = getattr(field.type, "__name__", field.type)
            raise InputError(f"config.json: {field.name} is {value!r}, not of type {name}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"config.json: {field.name} is {value}, not a number")
        if field.name in POSITIVE and value is not None and value <= 0:
            raise InputError(f"config.json: {field.name} is {value}, but must be above 0")
        is_size = field.type in (int, int | None) and not field.name.endswith("_token_id")
        least = 0 if field.name in ("n_layer", "num_hidden_layers") else 1
        if is_size and value is not None and value < least:
            raise InputError(f"config.json: {field.name} is {value}, but must be {least} or more")

    if config.padded_vocab_size is not None and config.padded_vocab_size < config.vocab_size:
        raise InputError("padded_vocab_size must not be below vocab_size")


POSITIVE = (  # fields of some of the models that are divided by, or raised to a power
    "rope_theta",
    "rope_factor",
    "rope_local_base_freq",
    "rope_local_factor",
    "query_pre_attn_scalar",
    "logits_scaling",
)


def check_even(config: Config, size: str) -> None:
    """InputError where a size of a Config is odd."""
    value = getattr(config, size)
    if value % 2 != 0:
        raise InputError(f"config.json: {size} {value} is odd, but RoPE rotates pairs")


def check_divides(config: Config, divisor: str, size: str) -> None:
    """InputError where one size of a Config does not divide another one."""
    a, b = getattr(config, divisor), getattr(config, size)
    if b % a != 0:
        raise InputError(f"config.json: {size} {b} is not a multiple of {divisor} {a}")


# ------------ pytorch_model.bin without PyTorch: the same in every model file ---------------------
#
# Since PyTorch 1.6 the file is a zip archive. Its member data.pkl is a pickle. For each tensor it
# says the name, the storage, the offset at which the tensor starts in the storage, and its shape
# and strides. The members data/0, data/1 and so on are the storages: plain numbers, one after
# another. Older files are no archive: the pickle comes first, and the storages follow it.
#
# A pickle is a program for a small stack machine. Its instructions build lists and dicts, but they
# can also look up any function of any package by name and call it, so a pickle from a stranger may
# run any code. Here `find_class` answers each look-up. It has harmless stand-ins for the few names
# that weights need, and refuses all others.

STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


DAMAGE = (  # what pickle and zipfile raise where bytes are not what they should be
    *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError),
    *(AttributeError, IndexError, KeyError, TypeError, ValueError, NotImplementedError),
)


class Storage(NamedTuple):
    """The flat array behind one or more tensors."""

    kind: str  # a key of STORAGES
    key: str  # its name in the file


def torch_tensors_in(file: Path) -> dict:
    """The tensors of a pytorch_model.bin: name -> a function that reads one as a numpy array.

    InputError: it is damaged, or its pickle asks for more than weights need.
    """
    try:
        tensors_in = zipped_tensors_in if zipfile.is_zipfile(file) else older_tensors_in
        found = tensors_in(file)
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"{file} is damaged or cut short ({error}): download it again") from None

    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{file} holds no tensors by their names")
    return {name: read for name, read in found.items() if callable(read)}


def zipped_tensors_in(file: Path) -> dict:
    """The tensors of a file that PyTorch has written since version 1.6."""
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not pickles:
            raise InputError(f"{file} is damaged, or not of PyTorch: it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")

        def read_storage(storage: Storage) -> bytes:
            with zipfile.ZipFile(file) as archive:
                return archive.read(f"{folder}data/{storage.key}")

        with archive.open(pickles[0]) as stream:
            return TorchUnpickler(stream, file, read_storage).load()


def older_tensors_in(file: Path) -> dict:
    """The tensors of a file of PyTorch before 1.6.

    It holds five pickles: a magic number, a version, the sizes of integers, the tensors, and the
    keys of the storages. The storages follow in that order, each after its length in 8 bytes.
    """
    starts = {}  # key of a storage -> where its numbers begin, and how many bytes they are

    def read_storage(storage: Storage) -> bytes:
        start, size = starts[storage.key]
        with open(file, "rb") as stream:
            stream.seek(start)
            return stream.read(size)

    with open(file, "rb") as stream:
        unpickler = TorchUnpickler(stream, file, read_storage)
        _magic, _version, _sizes, tensors, keys = [unpickler.load() for _ in range(5)]
        for key in keys:
            length = int.from_bytes(stream.read(8), "little")
            size = length * np.dtype(STORAGES[unpickler.kinds[key]]).itemsize
            starts[key] = stream.tell(), size
            stream.seek(size, os.SEEK_CUR)
    return tensors


class TorchUnpickler(pickle.Unpickler):
    """Runs the pickles of a file, which call find_class and persistent_load as they go.

    pickle calls find_class for each class or function, persistent_load for each storage.
    """

    def __init__(self, stream, file: Path, read_storage):
        super().__init__(stream)
        self.file = file
        self.read_storage = read_storage  # Storage -> its bytes
        self.kinds = {}  # key of a storage -> its kind

    def find_class(self, module: str, name: str):
        """What the pickle gets when it looks up a class or a function."""
        if name in STORAGES:
            return name  # its kind
        if name == "OrderedDict":
            return Weights
        if name == "_rebuild_tensor_v2":
            return self.rebuild_tensor
        if name == "_rebuild_parameter":
            return lambda tensor, *_: tensor  # a parameter is read as its tensor
        raise InputError(f"{self.file} asks for {module}.{name}, which weights do not need")

    def persistent_load(self, reference):
        """What the pickle gets for a storage."""
        _, kind, key, *_ = reference  # "storage", kind, key, device, length
        self.kinds[key] = kind
        return Storage(kind, key)

    def rebuild_tensor(self, storage, offset, shape, strides, *_):
        """The pickle calls this for each tensor, with the storage from persistent_load."""
        return partial(self.read_tensor, storage, offset, shape, strides)

    def read_tensor(self, storage, offset, shape, strides):
        """Reads a tensor from a storage. offset and strides count numbers, not bytes."""
        if not isinstance(storage, Storage) or storage.kind not in STORAGES:
            raise InputError(f"{self.file} is damaged: no numbers for a tensor {shape}")
        dtype = np.dtype(STORAGES[storage.kind])
        if 0 in shape:
            return np.zeros(shape, dtype)

        strides = [stride * dtype.itemsize for stride in strides]
        try:
            data = self.read_storage(storage)
            if not data:
                raise InputError(f"{self.file} is damaged: no numbers for a tensor {shape}")
            return np.ndarray(shape, dtype, data, offset * dtype.itemsize, strides)
        except InputError:
            raise
        except DAMAGE as error:  # such as a tensor that reaches beyond its storage
            raise InputError(f"{self.file} is damaged or cut short: {error}") from None


class Weights(dict):
    """Stands for OrderedDict."""

    def __setstate__(self, attributes):
        """The pickle sets an attribute, _metadata, which is not needed."""


# ------------------------- Adapters of LoRA: the same in every model file -------------------------
#
# LoRA leaves a matrix W [out, in] as it is, and trains two narrow ones beside it: A [r, in] and
# B [out, r], of rank r. The layer computes W x + s B A x, and the scale s is lora_alpha / r; with
# use_rslora it is lora_alpha / sqrt(r). Hu et al. 2021; Kalajdzievski 2023. Here they are merged:
# W + s B A is a matrix like any other.
#
# PEFT writes a folder: A and B of each adapted matrix are in adapter_model.safetensors, and
# adapter_config.json names the checkpoint that W is in, the base.

ADAPTER_FORMATS = {
    "adapter_model.safetensors": safetensors_in,
    "adapter_model.bin": torch_tensors_in,
}
OFF = [None, False, [], {}]
MERGEABLE = {  # values in adapter_config.json; the first is what an absent key means
    "peft_type": ["LORA"],
    "bias": ["none"],
    # PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ begin by changing W.
    "init_lora_weights": [True, False, None, "gaussian", "eva", "orthogonal", "mica"],
    # Other parameters than A and B are trained,
    "modules_to_save": OFF,
    "trainable_token_indices": OFF,
    "target_parameters": OFF,
    "lora_bias": OFF,
    # or A and B are not used as above.
    "use_dora": OFF,
    "use_qalora": OFF,
    "use_bdlora": OFF,
    "alora_invocation_tokens": OFF,
    "arrow_config": OFF,
    "kasa_config": OFF,
    "monteclora_config": OFF,
    "layer_replication": OFF,
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a checkpoint."""
    return os.path.lexists(folder / "adapter_config.json")


def base_of(folder: Path, weights=True) -> Path:
    """The folder of the checkpoint that an adapter belongs to; a checkpoint's own folder.

    A relative path is looked up from the working directory; one that is no Hub id, such as ../base,
    also from where the adapter's folder is. weights: whether they are needed, too, if the base is
    on the Hub. InputError: there is no base, or the adapter cannot be merged.
    """
    if not is_adapter(folder):
        return folder

    values = read_adapter_config(folder)
    name = values["base_model_name_or_path"]
    beside = folder.absolute().parent / name
    is_path = name.startswith(".") or name.count("/") > 1  # no Hub id looks so
    if os.path.isdir(name):
        base = Path(name)
    elif is_path and beside.is_dir():
        base = beside
    else:
        try:
            base = fetch_once(name, values.get("revision"), weights)
        except InputError as error:
            raise InputError(f"{folder} is an adapter, and its base is missing: {error}") from None

    if is_adapter(base):
        raise InputError(
            f"{folder} is an adapter of {base}, which is an adapter, too: merge that one first, "
            "with `load` and `save`"
        )
    return base


fetch_once = lru_cache(fetch)  # the Hub is not asked again each time that a base is looked up


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a folder is: an adapter may have one, or its base has."""
    own = any(os.path.lexists(folder / name) for name in TOKENIZER_FILES)
    return folder if own else base_of(folder, weights=False)


TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "tokenizer.model"]


def read_adapter_config(folder: Path) -> dict:
    """The contents of adapter_config.json. InputError: such an adapter cannot be merged."""
    file = folder / "adapter_config.json"
    values = read_json(file)
    for key, supported in MERGEABLE.items():
        value = values.get(key, supported[0])
        if value not in supported:
            raise InputError(
                f"{file}: {key} is {value!r:.60}, which is not supported: "
                "merge the adapter with PEFT (merge_and_unload), and load the result"
            )
    if not isinstance(values.get("base_model_name_or_path"), str):
        raise InputError(f"{file} has no base_model_name_or_path, the checkpoint to adapt")
    if not isinstance(values.get("revision"), str | None):
        raise InputError(f"{file}: revision is {values['revision']!r:.60}, not the name of one")
    return values


def read_adapters(folder: Path, stored: dict) -> tuple[dict, dict]:
    """The tensors of the base, and what is to be merged: (stored, adapters).

    adapters: the name of a tensor in the checkpoint -> a function that takes the kernel [in, out]
    and returns the merged one. stored: as given, but for tensors that the adapter brings whole:
    where the head has an adapter, PEFT writes the token table and the head beside it. InputError:
    damaged files, or tensors that do not belong to the base.
    """
    held = read_quantization(folder)
    if held is not None:
        raise InputError(
            f"{folder} is an adapter, and its base holds its weights in {held}: merge it with the "
            "checkpoint that they were made from"
        )

    values = read_adapter_config(folder)
    factors = {}  # name of a matrix, as PEFT has it -> {"A": its reader, "B": its reader}
    whole = {}
    for name, read in read_tensors(folder, ADAPTER_FORMATS).items():
        name = name.removeprefix("base_model.model.")
        factor = re.fullmatch(r"(.+)\.lora_([AB])(\.default)?\.weight", name)
        if factor:
            factors.setdefault(factor[1], {})[factor[2]] = read
        else:
            whole[usual_name(name.replace(".base_layer.", "."))] = read

    adapters = {}
    for name, pair in factors.items():
        if len(pair) < 2:
            raise InputError(f"{folder} has only lora_{min(pair)} of {name}: download it again")
        rank, scale = rank_and_scale(folder, values, name)
        adapters[usual_name(f"{name}.weight")] = partial(
            merge, f"{folder}: {name}", pair["A"], pair["B"], rank, scale
        )

    head, _ = name_in_checkpoint("lm_head.kernel")  # a file of a tied model lacks it
    unknown = (adapters.keys() | whole.keys()) - stored.keys() - {head}
    if unknown:
        raise InputError(
            f"{folder} has {len(unknown)} tensors for which its base {base_of(folder)} has no "
            f"place, such as {min(unknown)}"
        )
    if not adapters:
        raise InputError(f"{folder} has no adapters: no tensor is a lora_A or lora_B")
    return {**stored, **whole}, adapters


def rank_and_scale(folder: Path, values: dict, name: str) -> tuple[int, float]:
    """The rank r of an adapter, and the scale s. InputError: adapter_config.json lacks them."""
    file = folder / "adapter_config.json"
    rank = value_for(name, values, "r", "rank_pattern", file)
    alpha = value_for(name, values, "lora_alpha", "alpha_pattern", file)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise InputError(
            f"{file} gives {name} rank {rank!r:.60} and lora_alpha {alpha!r:.60}: "
            "the rank must be 1 or more, and lora_alpha a number"
        )
    if values.get("use_rslora"):
        return rank, alpha / math.sqrt(rank)
    return rank, alpha / rank


def value_for(name: str, values: dict, key: str, patterns_key: str, file: Path):
    """What adapter_config.json says for one matrix: the first pattern that matches its name wins.

    A pattern is a regular expression for the last parts of the name, or for all of it.
    """
    patterns = values.get(patterns_key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{file}: {patterns_key} is {patterns!r:.60}, not a JSON object")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise InputError(
                f"{file}: {patterns_key} has {pattern!r}, not a regular expression: {error}"
            ) from None
        if matches:
            return value
    return values.get(key)


def merge(what: str, read_A, read_B, rank: int, scale: float, kernel):
    """kernel [in, out] -> the kernel with its adapter, in float32. InputError: they do not fit."""
    A = read_A().astype(np.float32)
    B = read_B().astype(np.float32)
    if kernel.ndim != 2 or A.shape != (rank, kernel.shape[0]) or B.shape != (kernel.shape[1], rank):
        raise InputError(
            f"{what} has lora_A {A.shape} and lora_B {B.shape}, which do not fit rank {rank} "
            f"and a matrix {kernel.shape[::-1]}"
        )
    return kernel.astype(np.float32) + np.float32(scale) * (A.T @ B.T)


# ----------------------------- Tokenizer: the same in every model file ----------------------------


def tokenizer(name, revision: str | None = None):
    """An object with encode(text) -> ids and decode(ids) -> text, of all that `load` takes.

    The checkpoint's own files say how a text is split, and which tokens begin it. The text of a
    special token becomes its id, and `decode` leaves those ids out. InputError: no tokenizer, or
    damaged files.
    """
    folder = tokenizer_folder(fetch(name, revision, weights=False))
    if is_gguf(folder):
        codec = read_gguf_tokenizer(folder)
    elif os.path.lexists(folder / "tokenizer.json"):
        codec = read_new_tokenizer(folder / "tokenizer.json")
    else:
        codec = read_old_tokenizer(folder)

    def encode(text: str) -> list[int]:
        try:
            return codec.encode(text).ids
        except TypeError:
            raise InputError(f"{text!r:.60} is not a text of valid Unicode characters") from None

    return SimpleNamespace(encode=encode, decode=codec.decode, backend=codec)


def read_new_tokenizer(file: Path):
    """The tokenizer in a tokenizer.json, as an object of the package tokenizers."""
    from tokenizers import Tokenizer

    check_file(file)
    try:
        codec = Tokenizer.from_str(file.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the package raises nothing narrower
        raise InputError(f"{file} is damaged or cut short ({error}): download it again") from None

    codec.no_truncation()  # some files ask to cut or to pad every text
    codec.no_padding()
    known = {token.content for token in codec.get_added_tokens_decoder().values()}
    codec.add_tokens(added_tokens(file.parent, known))
    return codec


def added_tokens(folder: Path, known: set[str]) -> list:
    """The tokens that files beside a tokenizer.json add to it, in the order of their ids.

    First those that are described with their ids, then the special tokens that are only named, but
    for the `known` ones. tokenizer_config.json has both, or older files do: added_tokens.json and
    special_tokens_map.json. All this is as in transformers. InputError: damaged files.
    """
    settings = read_json_if_any(folder / "tokenizer_config.json")
    older_ids = {}
    if "added_tokens_decoder" not in settings:
        settings = settings | read_json_if_any(folder / "special_tokens_map.json")
        older_ids = read_json_if_any(folder / "added_tokens.json")

    try:
        named, listed = special_tokens(settings)
        described = settings.get("added_tokens_decoder") or {}
        for text, id in older_ids.items():
            described[id] = {"content": text, "special": text in listed}

        tokens = {}
        for id in sorted(described, key=int):
            token = added_token(described[id])
            token.special = token.special or token.content in named
            tokens[token.content] = token
        for text, token in (named | listed).items():
            if text not in known:
                tokens.setdefault(text, token)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} describes an added token wrongly: {error}") from None
    return list(tokens.values())


ROLES = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]


def special_tokens(settings: dict) -> tuple[dict, dict]:
    """The special tokens in tokenizer_config.json: those with a role, such as EOS, and the others.

    Each is a dict: text -> AddedToken.
    """
    more_roles = [key for key in settings if key.endswith("_token") and key not in ROLES]
    values = [settings.get(role) for role in ROLES + more_roles]
    values = [value for value in values if isinstance(value, (str, dict))]  # not add_bos_token
    others = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(others, dict):  # role -> token
        values += others.values()
        others = []

    named = {}
    for value in values:
        token = added_token(value)
        token.special = True
        named[token.content] = token
    listed = {}
    for value in others:
        token = added_token(value)
        listed[token.content] = token
    return named, listed


def added_token(value):
    """An AddedToken of the package tokenizers, from a description in JSON or a special text."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value.get("content"), str):
        raise TypeError(f"{value} has no content")
    options = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{name: value[name] for name in options if name in value})


def read_old_tokenizer(folder: Path):
    """The same from older files: vocab.json and merges.txt, or a SentencePiece tokenizer.model.

    The package transformers builds it, as it needs the settings in tokenizer_config.json and the
    tokens in added_tokens.json, too. Without tokenizer_config.json, OLD_TOKENIZER is used.
    """
    files = []
    for kind in (["vocab.json", "merges.txt"], ["tokenizer.model"]):
        if any(os.path.lexists(folder / name) for name in kind):
            files += kind
    if not files:
        raise InputError(
            f"{folder} has no tokenizer: none of tokenizer.json, vocab.json, tokenizer.model; copy "
            "one from a checkpoint with the same tokens (tekken.json is not read)"
        )
    for name in files:
        check_file(folder / name)

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it says that PyTorch is missing
    try:
        import transformers
    except ImportError:
        needed = "transformers sentencepiece protobuf"
        raise InputError(
            f"{folder} has no tokenizer.json, so needs: pip install {needed}"
        ) from None

    try:
        if os.path.lexists(folder / "tokenizer_config.json"):
            read_json(folder / "tokenizer_config.json")
            # Code that came with the folder is not run, nor does transformers ask whether to.
            made = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        else:
            class_name, settings = OLD_TOKENIZER
            made = getattr(transformers, class_name).from_pretrained(folder, **settings)
        return made.backend_tokenizer
    except InputError:
        raise
    except Exception as error:  # transformers and what it calls raise errors of all kinds
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} has a tokenizer that cannot be read: {reason}") from error


# ------------------------------- GGUF: the same in every model file -------------------------------
#
# One file of llama.cpp's format holds the config and the tokenizer, as keys and values (the
# metadata), and the weights. Most of these are quantized. Q8_0, for example, holds 32 weights of a
# row as a block: a scale in float16 and 32 integers of 8 bits. The package gguf reads the metadata,
# knows the kinds of numbers, and widens them to float32. Names and layouts are llama.cpp's own.
# What they are in a family stands with its checkpoints: in GGUF_KINDS, GGUF_KEYS, GGUF_OPTIONAL,
# GGUF_NAMES and GGUF_LAYOUTS, and in `complete_gguf`.

NORMAL = 1  # the types of tokens
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
LLAMA_3 = ["llama-bpe", "llama3", "llama-v3"]  # names of its tokenizer
# What cuts a text into words, before byte-level BPE: regular expressions by tokenizer.ggml.pre.
# None: that of GPT-2, which the package tokenizers has.
GGUF_WORDS = {
    **dict.fromkeys(["gpt-2", "default", "smollm", "refact"]),
    **dict.fromkeys(
        [*LLAMA_3, "smaug-bpe"],
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


class GGUF(NamedTuple):
    """What stands before the data of a GGUF file."""

    metadata: dict
    tensors: dict  # name -> GGUFTensor


class GGUFTensor(NamedTuple):
    """Where a tensor is in a GGUF file, and what it is."""

    shape: tuple  # as numpy has it
    kind: object  # of the numbers: a gguf.GGMLQuantizationType
    start: int  # where it begins in the file


def is_gguf(path: Path) -> bool:
    """Whether a checkpoint is a GGUF file, and not a folder."""
    return path.suffix == ".gguf" and not path.is_dir()


def find_gguf(path: Path) -> Path:
    """The GGUF file in a folder that holds no other weights; else the path itself."""
    found = sorted(path.glob("*.gguf"))
    others = any(weight_files(path, whole) for whole in FORMATS)
    if not found or others or is_adapter(path):
        return path
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{path} holds {len(found)} GGUF files: name one of {names:.200}")
    return found[0]


def read_gguf(file: Path) -> GGUF:
    """The metadata and the tensors of a GGUF file. InputError: it is damaged, or not supported."""
    check_file(file)
    status = file.stat()
    return parse_gguf(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)  # config, weights and tokenizer are read one after another
def parse_gguf(file: Path, size: int, _changed: int) -> GGUF:
    """The same, of a file that has this size and was changed at this time."""
    gguf = import_gguf(file)
    damage = (LookupError, ValueError, TypeError, ArithmeticError)
    try:
        reader = gguf.GGUFReader(file)
        metadata = {key: gguf_value(field.contents()) for key, field in reader.fields.items()}
    except damage as error:
        raise InputError(
            f"{file} is damaged, cut short or of another version ({error}): download it again"
        ) from None

    parts = metadata.get("split.count", 0)
    if parts > 1:
        raise InputError(f"{file} is one of {parts} parts: join them by llama-gguf-split --merge")

    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        tensors[tensor.name] = GGUFTensor(shape, tensor.tensor_type, tensor.data_offset)
    return GGUF(metadata, tensors)


def gguf_value(value):
    """A value of the metadata. A float32 is read as the shortest decimal: 1e-05, not 9.9999e-06."""
    if isinstance(value, np.floating | float):
        return float(str(np.float32(value)))
    return value


def read_kind(folder: Path) -> str | None:
    """The model_type of a checkpoint, if it says one."""
    if not is_gguf(folder):
        return read_json(folder / "config.json").get("model_type")

    metadata, _ = read_gguf(folder)
    architecture = str(metadata.get("general.architecture"))
    if architecture == "llama" and metadata.get("llama.expert_count"):
        return "mixtral"
    return GGUF_KINDS.get(architecture, architecture)


def read_values(folder: Path) -> dict:
    """The contents of config.json, or what the metadata of a GGUF file says instead."""
    if not is_gguf(folder):
        return read_json(folder / "config.json")
    try:
        return gguf_values(folder)
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"{folder} is damaged: its metadata cannot be ({error})") from None


GGUF_SCALING = {  # keys of the metadata for the scaling of RoPE, and those of config.json
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def gguf_values(file: Path) -> dict:
    """What a config.json would say of a GGUF file. InputError: no model that this file reads."""
    metadata, tensors = read_gguf(file)
    architecture = str(metadata.get("general.architecture"))
    if architecture not in GGUF_KINDS:
        known = ", ".join(GGUF_KINDS) or "none, as llama.cpp has no such model"
        raise InputError(
            f"{file} is of the architecture {architecture!r}; {Path(__file__).name} reads of GGUF "
            f"files: {known}"
        )
    if "token_embd.weight" not in tensors:
        raise InputError(f"{file} has no weights: it lacks token_embd.weight")

    values = {"model_type": read_kind(file), "vocab_size": tensors["token_embd.weight"].shape[0]}
    for key, name in (GGUF_KEYS | GGUF_OPTIONAL).items():
        if f"{architecture}.{key}" in metadata:
            values[name] = metadata[f"{architecture}.{key}"]
        elif key in GGUF_KEYS:
            raise InputError(f"{file} has no {architecture}.{key} in its metadata")

    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        values["rope_scaling"] = {"rope_type": scaling}
        for key, name in GGUF_SCALING.items():
            if f"{architecture}.rope.scaling.{key}" in metadata:
                values["rope_scaling"][name] = metadata[f"{architecture}.rope.scaling.{key}"]

    # A chat ends its turns with a token of its own, EOT.
    ends = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    values["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    return complete_gguf(file, values)


def gguf_tensors_in(file: Path) -> dict:
    """The tensors of a GGUF file, as a folder has them: name -> a function that reads one.

    InputError: the file is cut short, or the package gguf is missing or does not know a kind.
    """
    gguf = import_gguf(file)
    config = read_config(file)
    stored = {}
    for name, tensor in each_expert(gguf, read_gguf(file).tensors).items():
        check_kind_of_numbers(gguf, file, name, tensor)
        name, undo = name_in_folder(file, name)
        stored[name] = partial(read_gguf_tensor, gguf, file, tensor, undo, config)
    return stored


def name_in_folder(file: Path, name: str) -> tuple:
    """(the name that a folder has for a tensor of a GGUF file; what undoes its layout, or None).

    A name that is not in GGUF_NAMES stays as it is.
    """
    module, _, kind = name.rpartition(".")
    numbers = re.findall(r"\.(\d+)", module)
    module = re.sub(r"\.\d+", ".N", module)
    names = GGUF_NAMES[read_gguf(file).metadata["general.architecture"]]
    if module not in names:
        return name, None

    translated = names[module]
    for number in numbers:
        translated = translated.replace(".N", f".{number}", 1)
    return f"{translated}.{kind}", GGUF_LAYOUTS.get(module)


def import_gguf(file: Path):
    """The package gguf. InputError: it is not installed."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"{file} is a GGUF file, so needs: pip install gguf") from None
    return gguf


def each_expert(gguf, tensors: dict) -> dict:
    """The tensors, but those that stack the matrices of all experts as one matrix for each.

    ffn_up_exps [E, F, D] becomes ffn_up.0, ffn_up.1 and so on, as older files have them.
    """
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith("_exps.weight"):
            found[name] = tensor
            continue
        experts, *shape = tensor.shape
        matrix = GGUFTensor(tuple(shape), tensor.kind, tensor.start)
        for expert in range(experts):
            found[name.replace("_exps", f".{expert}")] = matrix
            matrix = matrix._replace(start=matrix.start + size_in_bytes(gguf, matrix))
    return found


def size_in_bytes(gguf, tensor: GGUFTensor) -> int:
    """How many bytes a tensor of a known kind takes in the file."""
    weights, size = gguf.GGML_QUANT_SIZES[tensor.kind]  # of a block
    return math.prod(tensor.shape) // weights * size


def check_kind_of_numbers(gguf, file: Path, name: str, tensor: GGUFTensor) -> None:
    """InputError where the package cannot widen the numbers of a tensor, such as integers."""
    _, size = gguf.GGML_QUANT_SIZES[tensor.kind]  # of a block
    try:
        gguf.quants.dequantize(np.zeros(size, np.uint8), tensor.kind)
    except NotImplementedError:
        raise InputError(
            f"{file}: {name} is of kind {tensor.kind.name}, which the package gguf cannot widen"
        ) from None


def read_gguf_tensor(gguf, file: Path, tensor: GGUFTensor, undo, config: Config):
    """A tensor of a GGUF file in float32. undo: what its layout needs to be that of a folder."""
    data = np.fromfile(file, np.uint8, size_in_bytes(gguf, tensor), offset=tensor.start)
    data = data.reshape(*tensor.shape[:-1], -1)
    weights = gguf.quants.dequantize(data, tensor.kind)
    if undo is not None:
        weights = undo(weights, config)
    return weights


def read_gguf_tokenizer(file: Path):
    """The tokenizer in the metadata of a GGUF file, as an object of the package tokenizers."""
    metadata, _ = read_gguf(file)
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": byte_level_bpe, "llama": sentencepiece_bpe}
    if kind not in makers:
        raise InputError(f"{file} has a tokenizer of kind {kind!r}: only {', '.join(makers)} work")
    words = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and words not in GGUF_WORDS:
        raise InputError(
            f"{file} cuts a text into words as {words!r} does: only {', '.join(GGUF_WORDS)} work"
        )

    try:
        codec = makers[kind](metadata)
        add_special_tokens(codec, metadata)
    except Exception as error:  # the package tokenizers raises nothing narrower
        raise InputError(f"{file} has a tokenizer that cannot be read: {error!r}") from None
    return codec


def types_of_tokens(metadata: dict) -> list[int]:
    """The type of each token: NORMAL, CONTROL or another."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))


def ids_of_tokens(metadata: dict) -> dict[str, int]:
    """The vocabulary: the text of a token -> its id, without those that only fill it up."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = types_of_tokens(metadata)
    return {text: id for id, text in enumerate(tokens) if types[id] != UNUSED}


def byte_level_bpe(metadata: dict):
    """A tokenizer of GPT-2's kind: a text is cut into words, and their bytes are merged."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre", "default")
    words = GGUF_WORDS[name]
    steps = []
    if name in ("smollm", "refact"):
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if words is not None:
        steps.append(pre_tokenizers.Split(Regex(words), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))

    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    whole_words = name in (*LLAMA_3, "tekken")  # a word of the vocabulary is one token
    model = models.BPE(ids_of_tokens(metadata), merges, ignore_merges=whole_words)
    codec = Tokenizer(model)
    if name == "qwen2":
        codec.normalizer = normalizers.NFC()  # which llama.cpp leaves out
    codec.pre_tokenizer = pre_tokenizers.Sequence(steps)
    codec.decoder = decoders.ByteLevel()
    return codec


def sentencepiece_bpe(metadata: dict):
    """A tokenizer of Llama 2's kind: SentencePiece's BPE, which falls back to bytes.

    It has no list of merges. Of all neighbours whose whole is a token, those with the highest score
    are merged first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = ids_of_tokens(metadata)
    types = types_of_tokens(metadata)
    scores = metadata["tokenizer.ggml.scores"]
    found = []
    for text, id in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if types[id] == NORMAL and left in ids and right in ids:
                found.append((-scores[id], id, -cut, left, right))
    merges = [(left, right) for *_, left, right in sorted(found)]

    codec = Tokenizer(models.BPE(ids, merges, byte_fallback=True))
    codec.model.fuse_unk = True  # what no token can spell becomes one unknown token
    if "tokenizer.ggml.unknown_token_id" in metadata:
        id = metadata["tokenizer.ggml.unknown_token_id"]
        codec.model.unk_token = metadata["tokenizer.ggml.tokens"][id]

    # A blank is written as U+2581, also the one that is put in front of a text.
    steps = [normalizers.Replace(" ", "\u2581")]
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("\u2581"))
        back.append(decoders.Strip(" ", 1, 0))
    codec.normalizer = normalizers.Sequence(steps)
    codec.decoder = decoders.Sequence(back)
    return codec


def add_special_tokens(codec, metadata: dict) -> None:
    """Tells a tokenizer which tokens are never cut, and which begin and end a text."""
    from tokenizers import AddedToken, processors

    tokens = metadata["tokenizer.ggml.tokens"]
    whole = []
    for text, kind in zip(tokens, types_of_tokens(metadata), strict=True):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            whole.append(AddedToken(text, special=kind != USER_DEFINED, normalized=False))
    codec.add_tokens(whole)

    # Where a file does not say it, the tokenizers of Llama 1, 2 and 3 begin a text with BOS.
    is_llama = metadata["tokenizer.ggml.model"] == "llama"
    is_llama |= metadata.get("tokenizer.ggml.pre") in LLAMA_3
    template = ["$A"]
    special = []
    if metadata.get("tokenizer.ggml.add_bos_token", is_llama):
        id = metadata["tokenizer.ggml.bos_token_id"]
        template.insert(0, tokens[id])
        special.append((tokens[id], id))
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        id = metadata["tokenizer.ggml.eos_token_id"]
        template.append(tokens[id])
        special.append((tokens[id], id))
    if special:
        codec.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )


def gguf_chat_settings(file: Path) -> dict:
    """What a tokenizer_config.json would say of chats: the template, and texts that it may use."""
    metadata, _ = read_gguf(file)
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    settings = {"chat_template": metadata.get("tokenizer.chat_template")}
    for role in ("bos", "eos"):
        id = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if id is not None and id < len(tokens):
            settings[f"{role}_token"] = tokens[id]
    return settings


# -------------------------------------- Checkpoints of Gemma --------------------------------------


def preset(parameters: int, GB: float, kind: dict, *, D, F, L, H, K, Dh=256, scalar=256) -> Preset:
    """A published Gemma: all are gated. kind: what its config.json has beside the sizes."""
    sizes = {
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": Dh,
        "query_pre_attn_scalar": scalar,
    }
    return Preset(parameters, GB, gated=True, config=config_from_hf({**kind, **sizes}))


def config_from_hf(values: dict) -> Config:
    """The Config for the contents of a config.json; see Config.from_hf."""
    kind = check_kind(values, [*ARCHITECTURES, "gemma3"])
    if kind == "gemma3":  # a multimodal one, of which the text model is read
        values = text_values(values)
        kind = check_kind(values, [*ARCHITECTURES])
    values = {**ABSENT[kind], **values}
    both_ways = values.get("use_bidirectional_attention") or False
    check_supported("use_bidirectional_attention", both_ways, [False])

    known = known_fields(values)
    known |= rope_of(values, kind)
    known["layer_types"] = layer_types_of(values, kind)
    known["hidden_activation"] = activation_of(values, kind)
    if kind == "gemma":
        known["query_pre_attn_scalar"] = values["head_dim"]
        known["final_logit_softcapping"] = None
    if kind != "gemma2":
        known["attn_logit_softcapping"] = None  # the reference ignores it, where a file has it
    return Config(**known)


def text_values(values: dict) -> dict:
    """The config.json of the text model in a multimodal one, as the reference reads it.

    All is in text_config but whether the head is tied, and perhaps the ids of special tokens. The
    logits of a multimodal model are not soft-capped, where a file says so all the same.
    """
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id") if key in values}
    return {
        **ids,
        **(values.get("text_config") or {}),
        "model_type": "gemma3_text",
        "tie_word_embeddings": values.get("tie_word_embeddings", True),
        "final_logit_softcapping": None,
    }


def activation_of(values: dict, kind: str) -> str:
    """The activation of the MLP. In every Gemma 1 "gelu" means its tanh form."""
    if kind == "gemma":
        name = values.get("hidden_act", "gelu")
        name = {"gelu": "gelu_pytorch_tanh"}.get(name, name)
    else:
        name = values.get("hidden_activation", "gelu_pytorch_tanh")
    return name


def rope_of(values: dict, kind: str) -> dict:
    """The fields of Config about RoPE.

    Old files have rope_theta, rope_local_base_freq and rope_scaling, new ones rope_parameters: in
    Gemma 3 one set of them for each kind of layer.
    """
    scaling = values.get("rope_scaling") or {}
    parameters = values.get("rope_parameters") or {}
    if kind == "gemma3_text":
        scaling = {key: value for key, value in scaling.items() if key != "type"}  # not read here
        full = {**(parameters.get(FULL) or {}), **scaling}
        sliding = parameters.get(SLIDING) or {}
        local = values["rope_local_base_freq"]
    else:
        full = sliding = scaling or parameters
        local = values["rope_theta"]
    return {
        "rope_theta": full.get("rope_theta", values["rope_theta"]),
        "rope_factor": linear_factor(full),
        "rope_local_base_freq": sliding.get("rope_theta", local),
        "rope_local_factor": linear_factor(sliding),
    }


def linear_factor(rope: dict) -> float:
    """The factor of linear RoPE scaling; 1 where there is none."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    check_supported("rope_type", kind, ["default", "linear"])
    if kind == "default":
        return 1.0
    if "factor" not in rope:
        raise InputError("config.json: RoPE scaling of type linear lacks factor")
    return rope["factor"]


def layer_types_of(values: dict, kind: str) -> tuple[str, ...]:
    """FULL or SLIDING for each layer; where config.json does not list them, as each Gemma has."""
    period = PERIODS[kind]
    if values.get("layer_types") and kind != "gemma":
        return tuple(values["layer_types"])
    if kind == "gemma3_text":
        period = values.get("sliding_window_pattern", period)
    return layer_pattern(values["num_hidden_layers"], period)


def layer_pattern(layers: int, period: int) -> tuple[str, ...]:
    """SLIDING for all layers but each `period`-th, which is FULL."""
    return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))


def config_to_hf(config: Config) -> dict:
    """The contents of config.json for a Config; see Config.to_hf."""
    values = {
        "architectures": [ARCHITECTURES[config.model_type]],
        **asdict(config),
        "hidden_act": config.hidden_activation,
        "rope_scaling": None,
    }
    factor = values.pop("rope_factor")
    if factor != 1:
        values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    local_factor = values.pop("rope_local_factor")
    if config.model_type == "gemma3_text" and local_factor != 1:
        sliding = {"rope_type": "linear", "factor": local_factor}
        sliding["rope_theta"] = config.rope_local_base_freq
        full = {"rope_type": "default", "rope_theta": config.rope_theta}
        values["rope_parameters"] = {SLIDING: sliding, FULL: full}
    del values["padded_vocab_size"]
    return values


PERIODS = {"gemma": 1, "gemma2": 2, "gemma3_text": 6}  # each such layer is FULL
ARCHITECTURES = {  # by model_type
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma": "GemmaForCausalLM",
}
# What transformers assumes where a config.json lacks a key.
ABSENT = {
    "gemma3_text": {
        "num_hidden_layers": 26,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "gemma2": {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 26,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_theta": 1e4,
    },
    "gemma": {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "rope_theta": 1e4,
    },
}
GEMMA1 = {"model_type": "gemma", "vocab_size": 256000, "max_position_embeddings": 8192}
GEMMA2 = GEMMA1 | {"model_type": "gemma2"}
GEMMA3_SMALL = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
PRESETS = {  # by id on the Hub; the first is the default
    "google/gemma-3-270m": preset(268_098_176, 0.5, GEMMA3_SMALL, D=640, F=2048, L=18, H=4, K=1),
    "google/gemma-3-270m-it": preset(268_098_176, 0.5, GEMMA3_SMALL, D=640, F=2048, L=18, H=4, K=1),
    "google/gemma-3-1b-pt": preset(999_885_952, 2.0, GEMMA3_SMALL, D=1152, F=6912, L=26, H=4, K=1),
    "google/gemma-3-4b-pt": preset(3_880_263_168, 8.6, GEMMA3, D=2560, F=10240, L=34, H=8, K=4),
    "google/gemma-3-12b-pt": preset(11_766_034_176, 24.4, GEMMA3, D=3840, F=15360, L=48, H=16, K=8),
    "google/gemma-3-27b-pt": preset(
        27_009_346_304, 54.9, GEMMA3, D=5376, F=21504, L=62, H=32, K=16, Dh=128, scalar=168
    ),
    "google/gemma-2-2b": preset(2_614_341_888, 10.5, GEMMA2, D=2304, F=9216, L=26, H=8, K=4),
    "google/gemma-2-9b": preset(9_241_705_984, 37.0, GEMMA2, D=3584, F=14336, L=42, H=16, K=8),
    "google/gemma-2-27b": preset(
        27_227_128_320, 108.9, GEMMA2, D=4608, F=36864, L=46, H=32, K=16, Dh=128, scalar=144
    ),
    "google/gemma-2b": preset(2_506_172_416, 5.0, GEMMA1, D=2048, F=16384, L=18, H=8, K=1),
    "google/gemma-7b": preset(8_537_680_896, 17.1, GEMMA1, D=3072, F=24576, L=28, H=16, K=16),
}

# Parameter path -> its name in a checkpoint, and whether it is transposed there. For example,
# layers.0.self_attn.q_proj.kernel -> model.layers.0.self_attn.q_proj.weight.
CHECKPOINT = [
    (r"lm_head\.kernel", "lm_head.weight", True),
    (r"(.+)\.kernel", r"model.\1.weight", True),
    (r"(.+)\.(embedding|scale)", r"model.\1.weight", False),
]
VOCABULARY = ("embed_tokens.embedding", "lm_head.kernel")  # `save` drops what pads the vocabulary
# (pattern, replacement) pairs, applied in turn to each name in a file before CHECKPOINT's names are
# looked up: a row for tensors that other files name otherwise.
RENAMED = [
    (r"^(language_model\.|model\.)+(?=lm_head\.)", ""),  # multimodal models have other prefixes,
    (r"^(language_model\.|model\.)*(?!lm_head\.)", "model."),  # and bare models have none
]
# Ignored where a file has them: the token table again as the head, and what is for pictures.
IGNORED = r"lm_head\.weight|model\.(vision_tower|multi_modal_projector)\..+"
FORMATS = {  # files of weights, and what reads them: the first one present is used
    "model.safetensors": safetensors_in,
    "pytorch_model.bin": torch_tensors_in,
    "flax_model.msgpack": flax_tensors_in,
}
# Class and settings of the tokenizer where a folder does not say them.
OLD_TOKENIZER = ("TokenizersBackend", {"add_bos_token": True})

# GGUF files: each architecture, as a model_type,
GGUF_KINDS = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
# keys of the metadata, after the architecture, as keys of config.json,
GGUF_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GGUF_OPTIONAL = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
# names of tensors as a folder has them, where N is a number,
GGUF_NAMES_2 = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.attn_q_norm": "model.layers.N.self_attn.q_norm",
    "blk.N.attn_k_norm": "model.layers.N.self_attn.k_norm",
    "blk.N.post_attention_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_norm": "model.layers.N.pre_feedforward_layernorm",
    "blk.N.post_ffw_norm": "model.layers.N.post_feedforward_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}
GGUF_NAMES = {
    "gemma": GGUF_NAMES_2 | {"blk.N.ffn_norm": "model.layers.N.post_attention_layernorm"},
    "gemma2": GGUF_NAMES_2,
    "gemma3": GGUF_NAMES_2,
}


def without_one(weights, config: Config):
    """The scale of a norm: a file has 1 more, as llama.cpp multiplies by what it reads."""
    return weights - 1


# and what undoes the layouts that differ: those of the norms
GGUF_LAYOUTS = {name: without_one for name in GGUF_NAMES_2 if name.endswith("_norm")}


def complete_gguf(file: Path, values: dict) -> dict:
    """Adds what else config.json says, as llama.cpp has it: by the number of layers."""
    kind = values["model_type"]
    layers = values["num_hidden_layers"]
    scalar = values["head_dim"]
    if (kind, layers) in [("gemma2", 46), ("gemma3_text", 62)]:  # the models of 27B
        scalar = values["hidden_size"] // values["num_attention_heads"]
    details = {"query_pre_attn_scalar": scalar}
    if kind == "gemma3_text" and "sliding_window" not in values:
        details["layer_types"] = [FULL] * layers
    return {**values, **details}


# ------------------------------------------ Many devices ------------------------------------------

# How each dimension of a parameter is split over a mesh with the axes "fsdp" and "tensor".
SHARDING = [
    (r"embed_tokens\.embedding", ("tensor", "fsdp")),
    (r".+\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.kernel|lm_head\.kernel", ("fsdp", "tensor")),
    (r".+\.(o_proj|down_proj)\.kernel", ("tensor", "fsdp")),
    (r".+", ()),
]


def sharding(mesh, config: Config, path: str, shape):
    """The jax.sharding.NamedSharding of the parameter at `path`.

    A dimension is split over an axis of the mesh if the axis divides it. The outputs of k_proj and
    v_proj are split only between whole KV heads.
    """
    axes = next(axes for pattern, axes in SHARDING if re.fullmatch(pattern, path))

    sizes = list(shape)
    if re.search("[kv]_proj", path):
        sizes[-1] = getattr(config, "num_key_value_heads", config.num_attention_heads)

    spec = []
    for axis, size in zip(axes, sizes, strict=False):
        fits = axis in mesh.shape and size % mesh.shape[axis] == 0
        spec.append(axis if fits else None)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


# --------------------------- Faster forms: the same in every model file ---------------------------
# A reader may stop here. The model is the same with `Linear = nnx.Linear`, with Block.__call__ as
# `run_block`, and without the branch of `attend` that calls `attend_in_chunks`; each form below
# only takes less time or memory. On a GPU or TPU, delete `linear_dot` and `run_fenced`, which are
# for XLA on a CPU: write `Linear = nnx.Linear` and drop the first `if` of `how_to_run`. The branch
# of `attend` for a cache in int8 and that of `Model.head` for quantized weights call the next
# section.


def linear_dot(x, kernel, dimension_numbers, **matmul_options):
    """x [..., D] times kernel [D, F] -> [..., F]: the product in nnx.Linear, for XLA on a CPU."""
    D, F = kernel.shape
    one_vector = x.size == D and x.dtype == jnp.float32
    if one_vector and D % 16 == 0 and jax.default_backend() == "cpu":
        # Vector times matrix runs on a single core: 16 parts of the sum keep all cores busy.
        parts = jnp.einsum("pd,pdf->pf", x.reshape(16, -1), kernel.reshape(16, -1, F))
        y = parts.sum(axis=0)
    else:
        # As a matrix [rows, D]: for its gradient, XLA on a CPU copies an x of more dimensions.
        y = jnp.matmul(x.reshape(-1, D), kernel, **matmul_options)
    return y.reshape(*x.shape[:-1], F)


Linear = partial(nnx.Linear, dot_general=linear_dot)


def how_to_run(model, with_cache: bool):
    """The function that runs a block: Block.__call__, or a form that takes less memory."""
    if with_cache and model.dtype != jnp.float32 and jax.default_backend() == "cpu":
        return run_fenced
    if model.remat:
        return nnx.remat(Block.__call__)
    return Block.__call__


def run_fenced(block, x, positions, k_positions, layer_cache, start, *rest):
    """Block.__call__ inside a conditional that XLA cannot resolve at compile time.

    XLA on a CPU computes half precision in float32. Without the conditionals it would convert the
    weights of all blocks before the first one runs, and hold them all in memory.
    """

    def run():
        return block(x, positions, k_positions, layer_cache, start, *rest)

    def skip():
        return x, layer_cache

    return jax.lax.cond(start >= 0, run, skip)


LONG = 2048  # attention is in chunks where queries times keys reach LONG^2
CHUNK = 256  # keys in a chunk


def is_long(T: int, S: int) -> bool:
    """Whether T queries and S keys are so many that their scores should not all be held at once."""
    return T > 1 and T * S >= LONG**2


def attend_in_chunks(q, k, v, q_positions, k_positions, first, **score_options):
    """What `attend` computes, with the scores of one chunk of keys in memory at a time.

    q [B, heads, queries, Dh], k and v [B, heads, keys, Dh] -> [B, heads, queries, Dh]
    score_options: as for attention_scores.

    On a CPU the queries are in blocks, too, and chunks of keys that a block may not attend to are
    skipped: those after its queries, and those that have left the sliding window.
    """
    queries = q.shape[2]
    block = CHUNK if jax.default_backend() == "cpu" else queries
    k_positions = in_chunks(k_positions, 1, CHUNK, fill=-1)
    chunks = (in_chunks(k, 2, CHUNK), in_chunks(v, 2, CHUNK), k_positions)
    q_positions = in_chunks(q_positions, 1, block, fill=-1)
    blocks = (in_chunks(q, 2, block), q_positions, in_chunks(first, 1, block))

    def attend_one(arrays):
        return attend_block(*arrays, chunks, score_options, skips=block < queries)

    out = jax.lax.map(attend_one, blocks)
    out = jnp.moveaxis(out, 0, 2)  # [B, heads, blocks, block, Dh]
    return out.reshape(*q.shape[:2], -1, q.shape[-1])[:, :, :queries]


def attend_block(q, q_positions, first, chunks, score_options: dict, skips: bool):
    """Attention by an online softmax, from chunk to chunk of the keys: q [B, heads, block, Dh].

    The maximum and the normalizer of the softmax are carried along; a new maximum rescales the sums
    so far. Milakov and Gimelshein 2018; Rabe and Staats 2021. The same idea is behind flash
    attention. skips: whether chunks that no query may attend to are left out.
    """

    @jax.checkpoint  # otherwise the backward pass would keep the scores of every chunk
    def add_chunk(carry, chunk):
        out, normalizer, maximum = carry  # [B, heads, block, Dh], the other two [..., 1]
        k, v, k_positions = chunk
        scores = attention_scores(q, k, q_positions, k_positions, first, **score_options)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_maximum)
        # Of a query that sees no key so far, all weights are 1. At its first key, rescale is 0.
        rescale = jnp.exp(maximum - new_maximum)

        normalizer = normalizer * rescale + weights.sum(axis=-1, keepdims=True)
        out = out * rescale + jnp.einsum("bhts,bhsd->bhtd", weights, v)
        return out, normalizer, new_maximum

    def skip(carry, chunk):
        return carry

    mask_options = {name: score_options[name] for name in ["window"] if name in score_options}

    def step(carry, chunk):
        if not skips:
            return add_chunk(carry, chunk), None
        mask = causal_mask(q_positions, chunk[2], first, **mask_options)
        return jax.lax.cond(mask.any(), add_chunk, skip, carry, chunk), None

    zeros = jnp.zeros_like(q, jnp.float32)
    start = (zeros, zeros[..., :1], zeros[..., :1] - jnp.inf)
    (out, normalizer, _), _ = jax.lax.scan(step, start, chunks)

    # Where all chunks were skipped there is only padding: 0, as NaN would spread.
    normalizer = jnp.where(normalizer == 0, 1, normalizer)
    return (out / normalizer).astype(chunks[1].dtype)


def in_chunks(x, axis: int, size: int, fill=0):
    """Splits an axis into chunks: [..., n, ...] -> [n / size, ..., size, ...]."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, pad, constant_values=fill)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


# ----------------- Quantized weights and KV cache: the same in every model file -------------------
# `load(..., quantize="int8")` holds each matrix in few bits and widens it where it is used. That
# takes less memory, and generation is faster where its time goes into reading weights from memory.
# The format does not depend on the device. Not quantized: norms, biases, position tables, and the
# routers of experts. The token table and the head have 8 bits even where others have 4.

QUANTIZED = ("int8", "int4", "bfloat16")  # how a QuantizedMatrix can hold its weights
GROUP = 32  # int4: neighbouring rows whose weights in a column share a scale
TILE = 2**21  # weights that are widened at a time: a part that stays in the cache of a CPU
QUANT_METHOD = "one-file-models"  # what config.json says of a folder that `save` wrote
PARTS = ("codes", "row_scale", "group_scale")  # the parameters of a QuantizedMatrix


class QuantizedMatrix(nnx.Module):
    """A matrix [F, D] that is held in few bits: F outputs, each a row of D inputs.

    It may also be a stack of the matrices of E experts: each part then has a first axis E.

    int8: a weight is code * row_scale, codes [F, D] from -127 to 127, row_scale [F, 1] in float32.
    int4: a weight is code * group_scale * row_scale, and a code is from -8 to 7. row_scale [F, 1]
    is the root mean square of a row. GROUP neighbouring rows share a scale in each column:
    group_scale [F / GROUP, D], the bits of bfloat16s as uint16. A byte of codes [F, D / 2] holds
    code + 8 of column j in its low four bits, and of column j + D / 2 in its high four. Where F is
    not a multiple of GROUP, or D is odd, the matrix is held as int8.
    (With groups along a row, as in GGUF, XLA on a CPU would look up a scale for each weight; so it
    multiplies x by the scales, once for all rows of a group: see `dot_with_vector`.)
    bfloat16: the bits of the weights as uint16 [F, D]. XLA on a CPU is slow to widen bfloat16, but
    not to shift integers.
    """

    def __init__(self, w, kind: str):
        """w [F, D], or [E, F, D], in any floating-point type; kind: one of QUANTIZED."""
        parts = quantize_matrix(w, kind)
        self.codes = nnx.Param(parts["codes"])
        self.row_scale = nnx.data(None)
        self.group_scale = nnx.data(None)
        if "row_scale" in parts:
            self.row_scale = nnx.Param(parts["row_scale"])
        if "group_scale" in parts:
            self.group_scale = nnx.Param(parts["group_scale"])

    def widened(self, rows=None):
        """The weights of some rows, or of all, in float32: [..., D]. The plain form of `dot`."""
        if rows is None:
            rows = jnp.arange(len(self.codes))

        w = jnp.concatenate(unpacked(self.codes[rows]), axis=-1).astype(jnp.float32)
        if self.group_scale is not None:
            w = w * from_bits(self.group_scale[rows // GROUP])
        if self.row_scale is not None:
            w = w * self.row_scale[rows]
        return w

    def dot(self, x, e=None):
        """x [..., D] -> x times the transposed matrix, [..., F] in float32. e: which of a stack."""
        vectors = x.reshape(-1, x.shape[-1])  # [N, D]
        which = ... if e is None else e  # of each part: all of it, or what belongs to expert e
        group_scale = None
        if self.group_scale is not None:
            group_scale = from_bits(self.group_scale[which])

        if jax.default_backend() == "cpu":
            stack = self.codes[...] if e is not None else self.codes[None]  # [E, F, D]
            index = e if e is not None else 0
            y = dot_in_tiles(vectors.astype(jnp.float32), stack, index, group_scale)
        else:
            blocks = without_row_scale(self.codes[which], group_scale)
            w = jnp.concatenate(blocks, axis=-1).astype(x.dtype)
            y = jnp.matmul(vectors, w.T, preferred_element_type=jnp.float32)

        # The scale of a row is that of an output, so it can wait until after the sum.
        if self.row_scale is not None:
            y = y * self.row_scale[which].T
        return y.reshape(*x.shape[:-1], y.shape[-1])


class QuantizedLinear(nnx.Module):
    """nnx.Linear with a quantized kernel, whose rows are the outputs: [F, D]."""

    def __init__(self, linear: nnx.Linear, kind: str):
        self.kernel = QuantizedMatrix(linear.kernel[...].swapaxes(-1, -2), kind)
        self.bias = linear.bias
        self.dtype = linear.dtype

    def __call__(self, x):
        """x [..., D] -> [..., F]"""
        y = self.kernel.dot(x).astype(self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return y


class QuantizedEmbed(nnx.Module):
    """nnx.Embed with a quantized table [V, D]; `Model.head` uses the same table where tied."""

    def __init__(self, embed: nnx.Embed, kind: str):
        self.embedding = QuantizedMatrix(embed.embedding[...], kind)
        self.dtype = embed.dtype

    def __call__(self, tokens):
        """tokens [B, T] -> [B, T, D]"""
        return self.embedding.widened(tokens).astype(self.dtype)


def quantize_layers(model, kind: str) -> None:
    """Replaces the token table and each Linear, except for routers, by quantized ones."""
    for path, module in list(nnx.iter_modules(model)):
        for name, layer in list(vars(module).items()):
            if isinstance(layer, nnx.Linear) and name != "gate":
                kind_here = kind_at(join([*path, name, "kernel"]), kind)
                setattr(module, name, QuantizedLinear(layer, kind_here))

    table, _ = VOCABULARY[0].split(".")
    setattr(model, table, QuantizedEmbed(getattr(model, table), kind_at(VOCABULARY[0], kind)))
    model.quantized = kind


def kind_at(path: str, kind: str) -> str:
    """How the matrix at `path` is held: int4 would hurt the token table and the head too much."""
    if kind == "int4" and path in VOCABULARY:
        return "int8"
    return kind


def quantized_as(model) -> str | None:
    """How a model holds its weights: one of QUANTIZED, or None."""
    return getattr(model, "quantized", None)


def quantized_head(model, x):
    """Model.head before the padding is dropped: x [..., D] -> logits [..., V] in float32."""
    if model.config.tie_word_embeddings:
        table, _ = VOCABULARY[0].split(".")
        return getattr(model, table).embedding.dot(x)
    return model.lm_head.kernel.dot(x)


@partial(jax.jit, static_argnames="kind")
def quantize_matrix(w, kind: str) -> dict:
    """The parts of a QuantizedMatrix by name: the codes nearest to w [F, D], and their scales."""
    if w.ndim == 3:
        return jax.lax.map(partial(quantize_matrix, kind=kind), w)  # one expert after the other

    F, D = w.shape
    if kind == "bfloat16":
        return {"codes": as_bits(w)}
    w = w.astype(jnp.float32)
    if kind == "int4" and F % GROUP == 0 and D % 2 == 0:
        return quantize_groups(w)

    row_scale = jnp.abs(w).max(axis=1, keepdims=True) / 127
    codes = jnp.round(w / jnp.where(row_scale == 0, 1, row_scale))
    return {"codes": codes.astype(jnp.int8), "row_scale": row_scale}


def quantize_groups(w) -> dict:
    """The parts of a QuantizedMatrix in int4, of w [F, D] in float32."""
    F, D = w.shape

    # The rows of a group may differ much, as those of k_proj do: first they get the same root mean
    # square. That of a row whose largest weight is 1 cannot overflow.
    most = jnp.abs(w).max(axis=1, keepdims=True)
    rows = w / jnp.where(most == 0, 1, most)
    rms = jnp.sqrt(jnp.square(rows).mean(axis=1, keepdims=True))
    rows = rows / jnp.where(rms == 0, 1, rms)
    groups = rows.reshape(F // GROUP, GROUP, D)

    # The largest weight of a group gets the code -8: the scale has the opposite sign.
    largest = jnp.abs(groups).argmax(axis=1, keepdims=True)
    scale_bits = as_bits(jnp.take_along_axis(groups, largest, axis=1) / -8)  # [F / GROUP, 1, D]
    scale = from_bits(scale_bits)
    codes = jnp.round(groups / jnp.where(scale == 0, 1, scale)).clip(-8, 7)

    shifted = (codes + 8).astype(jnp.uint8).reshape(F, D)
    low, high = jnp.split(shifted, 2, axis=1)
    return {
        "codes": low | (high << 4),
        "row_scale": most * rms,
        "group_scale": scale_bits[:, 0],
    }


def as_bits(w):
    """w rounded to bfloat16, as uint16."""
    return jax.lax.bitcast_convert_type(w.astype(jnp.bfloat16), jnp.uint16)


def from_bits(bits):
    """What `as_bits` made, as float32."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def read_quantization(folder: Path) -> str | None:
    """How a folder that `save` wrote holds its weights: one of QUANTIZED, or None."""
    values = read_values(base_of(folder, weights=False))
    quantized = values.get("quantization_config") or {}
    return quantized.get("format")


def check_quantize(folder: Path, quantize: str | None) -> str | None:
    """How to hold the weights of a folder. InputError: it cannot be as asked for."""
    stored_as = read_quantization(folder)
    if quantize is not None and quantize not in QUANTIZED:
        raise InputError(f"quantize is {quantize!r}: it must be one of {', '.join(QUANTIZED)}")
    if stored_as is not None and quantize not in (None, stored_as):
        raise InputError(
            f"{folder} holds its weights in {stored_as}: for {quantize}, load the checkpoint that "
            "they were made from"
        )
    return quantize or stored_as


def quantize_tensor(path: str, tensor, kind: str) -> dict:
    """The parts of the QuantizedMatrix for the parameter at `path`: their paths and values."""
    rows = tensor
    if path.endswith(".kernel"):
        rows = tensor.swapaxes(-1, -2)  # [F, D], or [E, F, D]
    parts = quantize_matrix(rows, kind_at(path, kind))
    return {f"{path}.{part}": value for part, value in parts.items()}


def sharding_of_part(mesh, config: Config, path: str, shape):
    """`sharding`, also of a part of a quantized matrix: its rows are split as the outputs are."""
    matrix, _, part = path.rpartition(".")
    if part not in PARTS:
        return sharding(mesh, config, path, shape)
    if matrix.endswith(".embedding"):
        return sharding(mesh, config, matrix, shape)

    *stack, rows, columns = shape  # [F, D], or of experts [E, F, D]
    of_kernel = sharding(mesh, config, matrix, (*stack, columns, rows))
    *spec, inputs, outputs = of_kernel.spec
    if outputs is not None and rows % mesh.shape[outputs] != 0:
        outputs = None  # there are fewer groups of rows than heads, say
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec, outputs, inputs))


def unpacked(codes) -> list:
    """The codes as numbers, in blocks of columns: one [..., D], or the halves of int4."""
    if codes.dtype == jnp.uint16:
        return [from_bits(codes)]
    if codes.dtype == jnp.int8:
        return [codes]

    pairs = codes.astype(jnp.int32)
    return [(pairs & 15) - 8, (pairs >> 4) - 8]


def without_row_scale(codes, group_scale) -> list:
    """The weights [F, D], row_scale left out, in blocks of columns as from `unpacked`."""
    blocks = unpacked(codes)
    if group_scale is None:
        return blocks
    scales = jnp.split(group_scale, 2, axis=1)
    return [times_groups(*pair) for pair in zip(blocks, scales, strict=True)]


def times_groups(w, factors):
    """w [F, D] times factors [F / GROUP, D], of which GROUP rows share each."""
    groups = w.reshape(len(factors), GROUP, -1)
    return (groups * factors[:, None]).reshape(w.shape)


def dot_in_tiles(x, codes, e, group_scale):
    """x [N, D] times the transposed weights, row_scale left out -> [N, F], for XLA on a CPU.

    The weights are matrix e of a stack: codes [E, F, D], or in int4 [E, F, D / 2]; group_scale is
    None, or in int4 that of the matrix, [F / GROUP, D] in float32.
    XLA would write the whole matrix to memory in float32 before the product. In a loop over tiles
    of some rows each, a tile is widened within the CPU's cache.
    """
    N, D = x.shape
    _, F, columns = codes.shape
    if N == 1:
        return dot_with_vector(x[0], codes, e, group_scale)

    tile, tiles = tiles_of(F, D, group_scale)
    halves = x.reshape(N, -1, columns).swapaxes(0, 1)  # [1, N, D], or of int4 [2, N, D / 2]
    few = N < 64  # then the transposed product is faster

    def multiply_tile(i, y):
        row = jnp.minimum(i * tile, F - tile)  # the last tile may overlap another
        part = jax.lax.dynamic_slice(codes, (e, row, 0), (1, tile, columns))[0]
        scale = group_scale
        if group_scale is not None:
            scale = jax.lax.dynamic_slice_in_dim(group_scale, row // GROUP, tile // GROUP)

        product = 0
        for w, half in zip(without_row_scale(part, scale), halves, strict=True):
            w = w.astype(jnp.float32)
            if few:
                product = product + w @ half.T  # [tile, N]
            else:
                product = product + half @ w.T  # [N, tile]
        return jax.lax.dynamic_update_slice_in_dim(y, product, row, axis=0 if few else 1)

    y = jnp.zeros((F, N) if few else (N, F))
    y = jax.lax.fori_loop(0, tiles, multiply_tile, y)
    if few:
        y = y.T
    return y


def dot_with_vector(x, codes, e, group_scale):
    """`dot_in_tiles` of one x: [D] -> [1, F].

    A tile is only as wide as a piece of the vector: see `pieces_of_vector`.
    """
    _, F, columns = codes.shape
    tile, tiles = tiles_of(F, x.size, group_scale)
    pieces = pieces_of_vector(columns)
    width = columns // pieces
    if group_scale is not None:
        # x times the scales, once for each group: less work than to scale the weights.
        scaled_x = (group_scale * x).reshape(F // GROUP, 2, columns)

    def multiply_tile(i, y):
        piece = i % pieces  # those of the same rows in turn: rows are then read from end to end
        column = piece * width
        row = jnp.minimum(i // pieces * tile, F - tile)
        part = jax.lax.dynamic_slice(codes, (e, row, column), (1, tile, width))[0]

        if group_scale is None:
            vector = jax.lax.dynamic_slice_in_dim(x, column, width)
            [w] = unpacked(part)
        else:
            vector = jnp.ones(width)  # x is in w already: the product only sums it
            sizes = (tile // GROUP, 2, width)
            factors = jax.lax.dynamic_slice(scaled_x, (row // GROUP, 0, column), sizes)
            low, high = unpacked(part)
            w = times_groups(low, factors[:, 0]) + times_groups(high, factors[:, 1])
        product = vector[None] @ w.astype(jnp.float32).T  # [1, tile]
        return jax.lax.dynamic_update_slice(y, product[None], (piece, 0, row))

    y = jnp.zeros((pieces, 1, F))
    y = jax.lax.fori_loop(0, tiles * pieces, multiply_tile, y)
    return y.sum(axis=0)


def tiles_of(F: int, D: int, group_scale) -> tuple[int, int]:
    """(rows in a tile of a matrix [F, D], how many tiles there are)"""
    # At least two tiles: without a loop, XLA widens the whole matrix.
    tiles = max(2, math.ceil(F * D / TILE))
    tile = math.ceil(F / tiles)
    if group_scale is not None:
        tile = round_up(tile, GROUP)  # whole groups
    return tile, math.ceil(F / tile)


def pieces_of_vector(length: int) -> int:
    """Into how many equal pieces to cut a vector, each of less than 4,096 numbers (16 kB).

    XLA on a CPU widens a tile within its product with a vector only if the vector is so small.
    """
    pieces = 1
    while length % pieces != 0 or length // pieces >= 4096:
        pieces += 1
    return pieces


def stored_width(Dh: int, dtype) -> int:
    """How many numbers a key or value takes in the cache: Dh, and in int8 the scale's 4 bytes."""
    return Dh + 4 if dtype == jnp.int8 else Dh


def as_stored(new, dtype):
    """New entries of the cache [..., Dh] as the cache holds them, [..., stored_width].

    In int8 each key and value has a scale of its own, the largest magnitude over 127. Its float32
    takes the last 4 bytes, so that a key and its scale move together.
    """
    if dtype != jnp.int8:
        return new.astype(dtype)

    new = new.astype(jnp.float32)
    scale = jnp.abs(new).max(axis=-1, keepdims=True) / 127  # [..., 1]
    codes = jnp.round(new / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    scale_bytes = jax.lax.bitcast_convert_type(scale[..., 0], jnp.int8)  # [..., 4]
    return jnp.concatenate([codes, scale_bytes], axis=-1)


def widen_slots(slots, dtype):
    """Keys or values from a cache in int8: [..., Dh + 4] -> [..., Dh]"""
    scale = jax.lax.bitcast_convert_type(slots[..., -4:], jnp.float32)
    return (slots[..., :-4] * scale[..., None]).astype(dtype)


# --------------------------- Command line: the same in every model file ---------------------------


def main():
    """Continues a text. See the top of this file for two examples."""
    parser = argparse.ArgumentParser(
        description="Continues a text.", epilog="For all options see sample.py."
    )
    parser.add_argument("text", nargs="?", default="Once upon a time", help="what to continue")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=next(iter(PRESETS)),
        help="a folder in Hugging Face's format, a GGUF file, or a Hub id (default: %(default)s)",
    )
    args = parser.parse_args()
    if sys.stdout is None:
        parser.exit(2, f"{parser.prog}: standard output is closed\n")

    # Where the terminal is not of UTF-8, Python reads its bytes as surrogates.
    text = args.text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    try:
        folder = fetch(args.checkpoint)
        codec = tokenizer(folder)
        model = load(folder)
        prompt = codec.encode(text)
        [new] = generate(
            model,
            [prompt],
            100,
            key=jax.random.key(0),
            temperature=0.8,
            top_k=50,
            stop_ids=read_stop_ids(folder, model.config),
            keep=len(codec.encode("")),  # the begin token, if there is one
        )
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")

    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every character
    try:
        print(codec.decode(prompt + new), flush=True)
    except BrokenPipeError:  # nobody reads on, as under `| head`
        os._exit(141)
    except OSError as error:  # the disk is full
        print(f"{parser.prog}: {error}", file=sys.stderr)
        os._exit(2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)  # at once: the usual clean-up can crash under a computation that still runs
