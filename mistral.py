"""Mistral and Mixtral in one file: read it from top to bottom, run it, copy it.

Mistral 7B is Llama with key heads shared by four query heads and, in its first version, attention
that sees only the last 4,096 tokens. Mixtral replaces the MLP by eight of them, the experts: for
each token a router picks two, so that a model of 47 billion weights computes as one of 13 does.

Papers: Jiang et al. 2023, "Mistral 7B"; Jiang et al. 2024, "Mixtral of Experts". Reference:
modeling_mistral.py and modeling_mixtral.py of Hugging Face's transformers.

Shape letters:  B batch   T tokens of this call   S slots of the cache   D width of the stream
                H heads   K key heads   Dh width of a head   F width of the MLP   V vocabulary
                E experts   N tokens of all rows, B * T

    pip install "jax<0.13" "flax<0.13" numpy safetensors tokenizers huggingface_hub sentencepiece
    python mistral.py "Once upon a time"                      # downloads mistralai/Mistral-7B-v0.1
    python mistral.py "Once upon a time" path/to/checkpoint   # either kind in Hugging Face's format

MIT License, copyright (c) 2026 the authors of "Open language models in JAX, one file each".
"""

import json
import math
import re
import sys
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal
from safetensors import safe_open
from safetensors.numpy import save_file

# ------------------------------------------------------------------------------------------- config
class InputError(ValueError):
    """Something that the caller can fix; the message says what is wrong and what to do."""

KINDS = {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}

@dataclass(frozen=True)
class Config:
    """The sizes and switches of one Mistral or Mixtral, under the names of its config.json."""
    model_type: str = "mistral"  # one of KINDS
    vocab_size: int = 32000
    max_position_embeddings: int = 32768  # the longest text
    hidden_size: int = 4096  # D
    intermediate_size: int = 14336  # F
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 8  # K
    head_dim: int = 128  # Dh
    sliding_window: int | None = None  # how many tokens one sees, itself included; None: all
    num_local_experts: int = 8  # E, of a Mixtral
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001  # how much `balance_loss` weighs in training
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    padded_vocab_size: int | None = None  # for training: so many token vectors; save drops the rest

    @classmethod
    def small(
        cls, *, layers: int, heads: int, width: int, context: int, experts: int = 0, **changes
    ) -> "Config":
        """A Mistral of these sizes or, with experts, a Mixtral, to be trained from scratch;
        `changes` are fields of the config."""
        if experts > 0:
            changes |= {"model_type": "mixtral", "num_local_experts": experts}
        return cls(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=width // heads,
            hidden_size=width,
            # Three matrices of 8 / 3 * D have as many weights as GPT-2's two of 4 * D.
            intermediate_size=round_up(8 * width / 3, 32),
            max_position_embeddings=context,
            tie_word_embeddings=True,
            **changes,
        )

    @classmethod
    def from_hf(cls, values: dict) -> "Config":
        """From the contents of a config.json. InputError: of another kind, or unsupported."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        H, D = (values.get(x, getattr(cls, x)) for x in ("num_attention_heads", "hidden_size"))
        known |= {"num_key_value_heads": values.get("num_key_value_heads") or H,
                  "head_dim": values.get("head_dim") or D // H}
        rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
        known["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", cls.rope_theta))
        for name, value, supported in [
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
            ("model_type", values.get("model_type", cls.model_type), tuple(KINDS)),
            ("hidden_act", values.get("hidden_act", "silu"), ("silu",))]:
            if value not in supported:
                raise InputError(f"config.json: {name} {value!r}: mistral.py reads {supported}")
        return cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in known.items()})

    def to_hf(self) -> dict:
        """The contents of a config.json that transformers and `from_hf` read."""
        values = {"architectures": [KINDS[self.model_type]], **asdict(self)}
        del values["padded_vocab_size"]
        return values

v3, mixtral = (partial(Config, kind, rope_theta=1e6) for kind in KINDS)
big = partial(mixtral, 32000, 65536, 6144, 16384, 56, 48)
class Preset(NamedTuple):
    """A checkpoint that is published on the Hugging Face Hub."""

    parameters: int
    download_GB: float
    gated: bool  # whether its terms must be accepted first
    config: Config

PRESETS = {  # by id on the Hub; the first is the default
    "mistralai/Mistral-7B-v0.1": Preset(7_241_732_096, 14.5, False, Config(sliding_window=4096)),
    "mistral-community/Mistral-7B-v0.2": Preset(7_241_732_096, 14.5, False, v3()),
    "mistralai/Mistral-7B-v0.3": Preset(7_248_023_552, 14.5, False, v3(32768)),
    "mistralai/Mixtral-8x7B-v0.1": Preset(46_702_792_704, 93.4, False, mixtral()),
    "mistralai/Mixtral-8x22B-v0.1": Preset(140_620_634_112, 281.2, False, big()),
}

# -------------------------------------------------------------------------------------------- model
def norm(config: Config, **options):
    """RMSNorm: x over its root mean square over D, times a weight; in float32 inside."""
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **options)

def product(x, kernel, _, **options):
    """x [..., D] times kernel [D, F] -> [..., F], made for XLA on a CPU. x becomes a matrix, or the
    kernel's gradient would copy it; a vector is cut into 16 parts, or only one core would work."""
    D, F = kernel.shape
    if x.size > D or D % 16 or x.dtype != jnp.float32 or jax.default_backend() != "cpu":
        y = jnp.matmul(x.reshape(-1, D), kernel, **options)
    else:
        y = jnp.einsum("pd,pdf->pf", x.reshape(16, -1), kernel.reshape(16, -1, F)).sum(axis=0)
    return y.reshape(*x.shape[:-1], F)
Linear = partial(nnx.Linear, dot_general=product)
def rotate(x, positions, speed):
    """RoPE: turns the pairs (i, i + Dh / 2) of each head by position times speed, in float32.
    A query times a key then depends on their distance alone: Su et al. 2021, equation (34)."""
    angles = (positions[..., None] * speed)[:, :, None]  # [B, T, 1, Dh / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [one * cos - other * sin, other * cos + one * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)

@jax.named_scope("attend")
def attend(q, k, v, q_positions, k_positions, **options):
    """Each query gathers the values of the keys at its own and at earlier positions.
    q [B, T, H, Dh], k and v [B, S, K, Dh], q_positions [B, T], k_positions [B, S] -> [B, T, H, Dh]
    Softmax in float32; options as in `masked_scores`. Vaswani et al. 2017, equation (1)."""
    (B, T, H, Dh), (_, S, K, _) = q.shape, k.shape
    G = H // K  # heads kG to kG + G - 1 share key head k, as G * T queries of one head
    q = q.reshape(B, T, K, G, Dh).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, Dh)
    k, v, q_positions = k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.tile(q_positions, G)
    if T * S >= LONG**2 and T > 1:
        x = attend_chunked(q, k, v, q_positions, k_positions, **options)
    else:
        probs = jax.nn.softmax(masked_scores(q, k, q_positions, k_positions, **options))
        x = jnp.einsum("bhts,bhsd->bhtd", probs.astype(v.dtype), v)
    return x.reshape(B, K, G, T, Dh).transpose(0, 3, 1, 2, 4).reshape(B, T, H, Dh)

def masked_scores(q, k, q_positions, k_positions, scale, window=None):
    """How well each key fits each query, in float32: [B, H, T, Dh], [B, H, S, Dh] -> [B, H, T, S].
    Visible are those of the last `window` positions up to the query's; padding, empty slots: -1."""
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * scale
    q_pos, k_pos = q_positions[:, None, :, None], k_positions[:, None, None, :]
    visible = (k_pos >= 0) & (k_pos <= q_pos) & (q_pos - k_pos < (window or jnp.inf))
    # Not -inf: for padding, which sees no key, softmax is then uniform and not NaN.
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min)

LONG, CHUNK = 2048, 256  # from LONG queries times LONG keys on, CHUNK keys at a time
def attend_chunked(q, k, v, q_positions, k_positions, **options):
    """What `attend` computes, a chunk of keys at a time: no [T, S] is ever held. The largest score
    and the sum that softmax needs are carried along, and what was gathered shrinks when a larger
    score comes: Milakov and Gimelshein 2018; Rabe and Staats 2021."""
    def chunks(x, axis, fill):  # [..., S, ...] -> [S / CHUNK, ..., CHUNK, ...]
        pad = [(0, -n % CHUNK * (i == axis)) for i, n in enumerate(x.shape)]
        x = jnp.pad(x, pad, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, CHUNK, *x.shape[axis + 1 :]), axis, 0)
    @jax.checkpoint  # or its gradient would keep the scores of every chunk
    def add(carry, chunk):
        gathered, total, largest = carry  # [B, H, T, Dh], [B, H, T, 1], [B, H, T, 1]
        k, v, k_positions = chunk
        scores = masked_scores(q, k, q_positions, k_positions, **options)
        new_largest = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_largest), jnp.exp(largest - new_largest)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        gathered = gathered * shrink + jnp.einsum("bhts,bhsd->bhtd", weights, v)
        return (gathered, total, new_largest), None
    x = jnp.zeros_like(q, jnp.float32)
    keys = chunks(k, 2, 0), chunks(v, 2, 0), chunks(k_positions, 1, -1)
    (gathered, total, _), _ = jax.lax.scan(add, (x, x[..., :1], x[..., :1] - jnp.inf), keys)
    return (gathered / total).astype(v.dtype)

class Attention(nnx.Module):
    """Causal self-attention with H heads of queries and K heads of keys and values."""
    def __init__(self, config: Config, **options):
        self.config, D, Dh = config, config.hidden_size, config.head_dim
        linear = {"use_bias": False, "kernel_init": normal(config.initializer_range), **options}
        self.q_proj = Linear(D, config.num_attention_heads * Dh, **linear)
        self.k_proj = Linear(D, config.num_key_value_heads * Dh, **linear)
        self.v_proj = Linear(D, config.num_key_value_heads * Dh, **linear)
        self.o_proj = Linear(config.num_attention_heads * Dh, D, **linear)

    @jax.named_scope("self_attn")
    def __call__(self, x, positions, k_positions, past, start):
        """x [B, T, D] -> (x [B, T, D], (k, v)): what `remember` keeps of `past` and these."""
        (B, T, _), config, Dh = x.shape, self.config, self.config.head_dim
        speed = config.rope_theta ** -(np.arange(0, Dh, 2, dtype=np.float32) / Dh)
        q = rotate(self.q_proj(x).reshape(B, T, -1, Dh), positions, speed)  # [B, T, H, Dh]
        k = rotate(self.k_proj(x).reshape(B, T, -1, Dh), positions, speed)  # [B, T, K, Dh]
        v = self.v_proj(x).reshape(B, T, -1, Dh)
        k, v, k_positions, kv = remember(past, k, v, k_positions, start)
        x = attend(q, k, v, positions, k_positions, scale=Dh**-0.5, window=config.sliding_window)
        return self.o_proj(x.reshape(B, T, -1)), kv

class MLP(nnx.Module):
    """Two projections to F, of which one gates the other, and one back: Shazeer 2020 (SwiGLU)."""
    def __init__(self, config: Config, names=("gate_proj", "up_proj", "down_proj"), **options):
        D, F, init = config.hidden_size, config.intermediate_size, normal(config.initializer_range)
        self.names, options = names, {"use_bias": False, "kernel_init": init, **options}
        for name, shape in zip(names, [(D, F), (D, F), (F, D)], strict=True):
            setattr(self, name, Linear(*shape, **options))

    @jax.named_scope("mlp")
    def __call__(self, x):
        """x [..., D] -> [..., D]"""
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(jax.nn.silu(gate(x)) * up(x))  # [..., F] inside

class Experts(nnx.Module):
    """E MLPs; each token goes through the few whose router scores for it are highest."""
    def __init__(self, config: Config, **options):
        self.per_token, E = config.num_experts_per_tok, config.num_local_experts
        self.gate = Linear(config.hidden_size, E, use_bias=False,
                           kernel_init=normal(config.initializer_range), **options)
        self.experts = nnx.List([MLP(config, ("w1", "w3", "w2"), **options) for _ in range(E)])

    @jax.named_scope("block_sparse_moe")
    def __call__(self, x):
        """x [B, T, D] -> (x [B, T, D], [2, E]: each expert's choices a token, mean probability)."""
        def route(self, x):
            rows, E = x.reshape(-1, x.shape[-1]), len(self.experts)  # [N, D]
            probs = jax.nn.softmax(self.gate(rows).astype(jnp.float32))  # [N, E]
            weights, chosen = jax.lax.top_k(probs, self.per_token)  # [N, per_token], in float32
            weights = weights / weights.sum(axis=-1, keepdims=True)
            counts = jnp.zeros(E, int).at[chosen.ravel()].add(1)
            order = jnp.argsort(chosen.ravel())  # choices by expert; i was made by i // per_token
            token, weight = order // self.per_token, weights.ravel()[order]
            run = run_in_blocks if len(rows) <= E or jax.default_backend() == "cpu" else run_ragged
            y = run(self.experts, rows, token, weight, counts).astype(x.dtype).reshape(x.shape)
            return y, jnp.stack([counts / len(rows), probs.mean(axis=0)])[None]
        mesh = jax.sharding.get_abstract_mesh().shape  # of jax.set_mesh: each device sorts its own
        axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh)
        if axes and len(x) % np.prod([mesh[axis] for axis in axes]) == 0:
            route = jax.shard_map(route, in_specs=(jax.P(), jax.P(axes)), out_specs=jax.P(axes),
                                  axis_names={*axes}, check_vma=False)
        y, found = route(self, x)
        return y, found.mean(axis=0)

def run_in_blocks(experts, rows, token, weight, counts, block=128):
    """The sum of each token's experts, [N, D] -> [N, D] float32: one expert after the other, a
    block of its tokens at a time. Experts and blocks without tokens are skipped, and not read."""
    out, block = jnp.zeros(rows.shape, jnp.float32), min(len(rows), block)
    for expert, first, count in zip(experts, jnp.cumsum(counts) - counts, counts, strict=True):
        @jax.checkpoint  # or the gradient would keep [blocks, block, F] of every expert
        def add(out, i, expert=expert, first=first, count=count):
            place = i * block + jnp.arange(block)
            mine = jnp.clip(first + place, max=len(token) - 1)
            share = jnp.where(place < count, weight[mine], 0)[:, None]
            return out.at[token[mine]].add(expert(rows[token[mine]]) * share)
        def step(out, i, add=add, count=count):
            return jax.lax.cond(i * block < count, add, lambda out, i: out, out, i), None
        out, _ = jax.lax.scan(step, out, jnp.arange(-(-len(rows) // block)))
    return out

def run_ragged(experts, rows, token, weight, counts):
    """The same by `ragged_dot` in one go: reads all experts; on a CPU it computes all for all."""
    def weights(name):
        return jnp.stack([getattr(e, name).kernel[...].astype(rows.dtype) for e in experts])
    x = rows[token]  # [N * per_token, D], sorted by expert
    gate, up = (jax.lax.ragged_dot(x, weights(name), counts) for name in ("w1", "w3"))
    y = jax.lax.ragged_dot(jax.nn.silu(gate) * up, weights("w2"), counts)
    return jnp.zeros(rows.shape, jnp.float32).at[token].add(y * weight[:, None])

def balance_loss(cache):
    """What a Mixtral pays for choosing the same experts always, by the cache that `hidden` gives: E
    times the sum of choices * probabilities, means of tokens and layers: Fedus et al. 2021, (4)."""
    choices, probs = jnp.stack([routed for *_, routed in cache.layers]).mean(axis=0)
    return len(probs) * jnp.sum(choices * probs)

class Block(nnx.Module):
    """One layer: attention, then the MLP, each on a normed copy of the stream and added to it."""
    def __init__(self, config: Config, **options):
        self.input_layernorm = norm(config, **options)
        self.self_attn = Attention(config, **options)
        self.post_attention_layernorm = norm(config, **options)
        if config.model_type == "mixtral":
            self.block_sparse_moe = Experts(config, **options)
        else:
            self.mlp = MLP(config, **options)

    def __call__(self, x, positions, k_positions, past, start):
        """x [B, T, D] -> (x [B, T, D], this layer's cache); arguments as for Attention."""
        y, kv = self.self_attn(self.input_layernorm(x), positions, k_positions, past, start)
        x = x + y
        y = self.post_attention_layernorm(x)
        y, routed = (self.mlp(y), None) if hasattr(self, "mlp") else self.block_sparse_moe(y)
        return x + y, (*kv, routed)

class Model(nnx.Module):
    """Mistral or Mixtral: tokens [B, T] -> logits [B, T, V]. From scratch: normal(0.02).
    `dtype` is what is computed in, `param_dtype` what is stored; norms, RoPE, attention scores,
    softmax and logits are float32. `remat` recomputes a block's activations for its gradient."""
    def __init__(self, config: Config, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32,
                 remat=False):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        D, V = config.hidden_size, config.padded_vocab_size or config.vocab_size
        init = normal(config.initializer_range)
        self.embed_tokens = nnx.Embed(V, D, embedding_init=init, **options)
        self.layers = nnx.List([Block(config, **options) for _ in range(config.num_hidden_layers)])
        self.norm = norm(config, **options)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(D, V, use_bias=False, kernel_init=init, **options)

    def hidden(self, tokens, positions=None, cache=None, *, rngs=None):
        """tokens [B, T] -> (x [B, T, D], cache): the final normed stream, which `head` reads.
        positions [B, T]: -1 is padding, in front; default: after the cache's. rngs: unused."""
        (B, T), layers = tokens.shape, []
        if cache is None and (context := self.config.max_position_embeddings) < T:
            raise InputError(f"{T} tokens, but the context is {context}")
        # XLA on a CPU computes half precision in float32, and would convert the weights of all
        # blocks before the first runs. So each is in a branch that XLA cannot know to be taken.
        fenced = cache and self.dtype != jnp.float32 and jax.default_backend() == "cpu"
        cache = init_cache(self.config, B, T, self.dtype, whole=True) if cache is None else cache
        if positions is None:
            positions = cache.positions.max(axis=1, keepdims=True) + 1 + jnp.arange(T)
        start, k_positions = cache.filled, write(cache.positions, positions, cache.filled)
        x = self.embed_tokens(tokens)  # [B, T, D]
        call = nnx.remat(Block.__call__) if self.remat and not fenced else Block.__call__
        for block, past in zip(self.layers, cache.layers, strict=True):
            run = partial(call, block, x, positions, k_positions, past, start)
            run = jax.named_scope(f"layers.{len(layers)}")(run)  # its name in a profile
            x, kv = jax.lax.cond(start >= 0, run, partial(tuple, (x, past))) if fenced else run()
            layers.append(kv)
        tokens = write(cache.tokens, tokens, start)
        return self.norm(x), Cache(tuple(layers), tokens, k_positions, start + T)

    @jax.named_scope("head")
    def head(self, x):
        """x [..., D] -> logits [..., V] in float32, without those of a padded vocabulary."""
        w = self.lm_head.kernel.T if hasattr(self, "lm_head") else self.embed_tokens.embedding
        x = jnp.einsum("...d,vd->...v", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
        return x[..., : self.config.vocab_size]

    def __call__(self, tokens, positions=None, cache=None, *, rngs=None):
        """tokens [B, T] -> logits [B, T, V] in float32; with a cache: (logits, cache)."""
        x, new_cache = self.hidden(tokens, positions, cache, rngs=rngs)
        return self.head(x) if cache is None else (self.head(x), new_cache)

class Cache(NamedTuple):
    """The keys and values so far: all, or in a ring those of the last `sliding_window`. All rows
    fill the same slots: shorter ones are padded on the left. Padding and empty slots are at -1."""
    layers: tuple  # each (k, v, what Experts said last, or None); k and v [B, S or ring, K, Dh]
    tokens: jax.Array  # [B, S], for the repetition penalty
    positions: jax.Array  # [B, S]
    filled: jax.Array  # how many slots are written, padding included: where the next go

def init_cache(config: Config, batch: int, length: int, dtype, whole=False) -> Cache:
    """An empty cache of `length` columns; k and v in a ring of `sliding_window`, unless whole."""
    slots = length if whole else min(length, config.sliding_window or length)
    shape = 2, batch, slots, config.num_key_value_heads, config.head_dim
    E = config.num_local_experts if config.model_type == "mixtral" else 0
    layers = [(*jnp.zeros(shape, dtype), jnp.zeros((2, E)) if E else None)
              for _ in range(config.num_hidden_layers)]
    tokens, positions = jnp.zeros((batch, length), int), jnp.full((batch, length), -1)
    return Cache(tuple(layers), tokens, positions, jnp.array(0))

def remember(past, k, v, positions, start):
    """Puts the new k and v [B, T, K, Dh] into a layer's slots -> (k, v, k_positions to attend to,
    what is kept). positions [B, S]: of all columns; a ring's slot i has the newest i + n * ring."""
    T, S, ring = k.shape[1], positions.shape[1], past[0].shape[1]
    if ring == S:
        k, v = write(past[0], k, start), write(past[1], v, start)
        return k, v, positions, (k, v)
    def held(end):  # in each slot once the columns before `end` are in: (its column, its position)
        column = end - 1 - (end - 1 - jnp.arange(ring)) % ring
        return column, jnp.where(column >= 0, positions[:, column], -1)
    (_, old_positions), (column, ring_positions) = held(start), held(start + T)
    kept, new = (column < start)[:, None, None], jnp.clip(column - start, 0, T - 1)
    k, v = k.astype(past[0].dtype), v.astype(past[1].dtype)
    slots = jnp.where(kept, past[0], k[:, new]), jnp.where(kept, past[1], v[:, new])
    if T == 1:  # what falls out of the ring has just left the window
        return *slots, ring_positions, slots
    now = jax.lax.dynamic_slice_in_dim(positions, start, T, axis=1)
    k, v = jnp.concatenate([past[0], k], axis=1), jnp.concatenate([past[1], v], axis=1)
    return k, v, jnp.concatenate([old_positions, now], axis=1), slots

def write(slots, new, start):
    """Puts new [B, T, ...] into slots [B, S, ...] from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=1)

# ----------------------------------------------------------------------------------- the next token
@jax.named_scope("sample")
def sample(logits, rng_keys, occurred=None, *, top_k=None, temperature=1.0, top_p=None, min_p=None,
           repetition_penalty=None):
    """Draws a token for each row: logits [B, V], rng_keys [B], occurred [B, V] -> [B]. What is None
    is left out, but temperature None takes the likeliest. In transformers' order: penalty (Keskar
    2019), temperature, top_k, top_p (Holtzman 2019), min_p (Nguyen 2024)."""
    if repetition_penalty is not None:
        factor = jnp.where(logits > 0, 1 / repetition_penalty, repetition_penalty)
        logits = jnp.where(occurred, logits * factor, logits)
    if temperature is None:
        return jnp.argmax(logits, axis=-1)
    logits, ids = logits / temperature, None
    if top_k is not None:  # from here on only k logits, of the tokens `ids`
        logits, ids = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    probs, best = jax.nn.softmax(logits, axis=-1), logits.max(axis=-1, keepdims=True)
    if top_p is not None:  # keep a token if likelier ones sum to less than top_p
        def bisect(_, bounds):  # for the least logit that is kept: far faster than to sort them
            middle = (bounds[0] + bounds[1]) / 2
            more = jnp.where(logits > middle, probs, 0).sum(axis=-1, keepdims=True) >= top_p
            return jnp.where(more, middle, bounds[0]), jnp.where(more, bounds[1], middle)
        below, _ = jax.lax.fori_loop(0, 40, bisect, (best - 104, best))  # exp(-104) is 0
        logits = jnp.where((logits > below) | (logits == best), logits, -jnp.inf)
    if min_p is not None:
        logits = jnp.where(logits >= best + jnp.log(min_p), logits, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(rng_keys, logits)
    return choice if ids is None else jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]

def generate_naive(model, prompt: list[int], max_new_tokens: int, *, key, **sampling):
    """One row of `generate`, of this prompt and key, without a cache; sampling as for `sample`."""
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    ids, end = list(prompt), len(prompt) + max_new_tokens
    for n in range(len(prompt), end):
        padded = np.array([ids + [0] * (end - n)])  # one length for all; no token sees later ones
        occurred = np.isin(np.arange(model.config.vocab_size), ids)[None]
        rng_keys = jax.random.fold_in(key, n)[None]
        ids += sample(forward(state, padded)[:, n - 1], rng_keys, occurred, **sampling).tolist()
    return ids[len(prompt) :]

@partial(jax.jit, static_argnames=("graphdef", "top_k"), donate_argnames="cache")
def prefill(graphdef, state, cache: Cache, tokens, positions, keys, sampling: dict, top_k):
    """Puts tokens [B, T] into the cache, draws the token after the last -> (cache, token [B])."""
    model = nnx.merge(graphdef, state)
    x, cache = model.hidden(tokens, positions, cache)
    logits, occurred = model.head(x[:, -1]), None
    if sampling["repetition_penalty"] is not None:
        row, real = jnp.arange(len(tokens))[:, None], cache.positions >= 0
        occurred = jnp.zeros(logits.shape, bool).at[row, cache.tokens].max(real)
    rng_keys = jax.vmap(jax.random.fold_in)(keys, 1 + cache.positions.max(axis=1))  # by position
    return cache, sample(logits, rng_keys, occurred, top_k=top_k, **sampling)

STEPS = 32  # the most tokens of one call of `decode`; Ctrl-C and stop ids take effect between calls
@partial(jax.jit, static_argnames=("graphdef", "top_k"), donate_argnames="cache")
def decode(graphdef, state, cache: Cache, token, keys, sampling: dict, steps, top_k):
    """`steps` tokens after token [B], each by a `prefill` of one -> (cache, tokens [B, STEPS])."""
    def step(i, carry):
        cache, token, new = carry
        cache, token = prefill(graphdef, state, cache, token[:, None], None, keys, sampling, top_k)
        return cache, token, new.at[:, i].set(token)
    new = jnp.zeros((len(token), STEPS), int)
    return jax.lax.fori_loop(0, steps, step, (cache, token, new))[::2]

def round_up(n, multiple: int) -> int:
    """The least multiple of `multiple` that is n or more."""
    return math.ceil(n / multiple) * multiple

def batch_prompts(config: Config, prompts: list[list[int]], max_new_tokens: int):
    """Ragged prompts as one batch, padded on the left: (tokens [B, T], positions [B, T], S). T is a
    power of two from 64 on, S, the length of the cache, a multiple of 128 (both may pass the
    context), as each B, T and S is compiled. InputError: no tokens, foreign ids, or too many."""
    longest, context = max(map(len, prompts), default=0), config.max_position_embeddings
    if not prompts or not all(map(len, prompts)) or max_new_tokens < 1:
        raise InputError("prompts must not be empty, and max_new_tokens must be 1 or more")
    if longest + max_new_tokens > context:
        raise InputError(f"{longest} + {max_new_tokens} tokens do not fit the context of {context}")
    T = max(64, 1 << (longest - 1).bit_length())
    tokens = np.array([[0] * (T - len(prompt)) + list(prompt) for prompt in prompts])
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise InputError(f"a prompt has ids outside the vocabulary of {config.vocab_size}")
    positions = np.array([np.maximum(np.arange(T) - T + len(prompt), -1) for prompt in prompts])
    return tokens, positions, round_up(T + max_new_tokens, 128)

def generate(model: Model, prompts: list[list[int]], max_new_tokens: int, *, key, temperature=1.0,
             top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, stop_ids=()):
    """Continues each prompt by up to max_new_tokens -> list[list[int]], the new tokens only. A row
    ends before its first stop id, and depends on its own prompt and key alone (but for rounding).
    key: a jax.random.key for each row, or one, folded with their numbers. temperature 0: greedy."""
    sampling = {"temperature": temperature or None, "top_p": top_p, "min_p": min_p,
                "repetition_penalty": None if repetition_penalty == 1 else repetition_penalty}
    tokens, positions, S = batch_prompts(model.config, prompts, max_new_tokens)
    B, stops = len(prompts), list(stop_ids)
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    graphdef, state = nnx.split(model)
    cache = init_cache(model.config, B, S, model.dtype)
    cache, token = prefill(graphdef, state, cache, tokens, positions, keys, sampling, top_k)
    new = np.asarray(token)[:, None]
    while new.shape[1] < max_new_tokens and not np.isin(new, stops).any(axis=1).all():
        steps = min(STEPS, max_new_tokens - new.shape[1])
        cache, more = decode(graphdef, state, cache, new[:, -1], keys, sampling, steps, top_k)
        new = np.concatenate([new, more[:, :steps]], axis=1)
    return [row[: next((i for i, t in enumerate(row) if t in stops), None)] for row in new.tolist()]

# -------------------------------------------------------------------------------------- checkpoints
# Parameter path -> its name in a checkpoint, and whether it is transposed there.
CHECKPOINT = [
    (r"lm_head\.kernel", "lm_head.weight", True),
    (r"(.+)\.kernel", r"model.\1.weight", True),
    (r"(.+)\.(embedding|scale)", r"model.\1.weight", False),
]
VOCABULARY = ("embed_tokens.embedding", "lm_head.kernel")  # their padded rows are not saved
RENAMED = (r"^(?!model\.|lm_head\.)", "model.")  # bare models lack the prefix
IGNORED = r"lm_head\.weight|.+\.rotary_emb\.inv_freq"  # the token table again; RoPE's frequencies
DOWNLOADS = ["config.json", "generation_config.json", "tokenizer*", "chat_template.jinja"]
def fetch(name, revision: str | None = None, weights=True) -> Path:
    """The folder of a checkpoint: `name` if it is one, else the Hub's cache, filled if need be."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download  # heeds HF_HOME and HF_TOKEN
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADS))
    for whole in FORMATS if weights else []:  # the first format that there is
        pattern = whole.replace(".", "*.") + "*"  # also shards and their index
        snapshot_download(name, revision=revision, allow_patterns=pattern)
        if any(folder.glob(pattern)):
            break
    return folder

def safetensors_in(file: Path) -> dict:
    """The tensors of a .safetensors file: name -> a function that reads one as a numpy array."""
    anew = partial(safe_open, file, "np")  # for each, as the pages of an open file count as memory
    return {name: lambda name=name: anew().get_tensor(name) for name in list(anew().keys())}

FORMATS = {"model.safetensors": safetensors_in}  # how each format of weights is read
def stored_tensors(folder: Path) -> dict:
    """The tensors of a checkpoint, one file or shards with an index: name -> function, as above."""
    for whole, tensors_in in FORMATS.items():
        index, files = folder / f"{whole}.index.json", [whole] if (folder / whole).exists() else []
        if index.exists() and not files:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if stored := [item for file in files for item in tensors_in(folder / file).items()]:
            return {re.sub(*RENAMED, name): read for name, read in stored}
    raise FileNotFoundError(f"{folder} has no {' or '.join(FORMATS)}")

def named_parameters(state):
    """Yields (path, parameter, name in the checkpoint, transposed there) for every parameter."""
    for parts, param in nnx.to_flat_state(state):
        path = ".".join(map(str, parts))
        pattern, name, transposed = next(row for row in CHECKPOINT if re.fullmatch(row[0], path))
        yield path, param, re.sub(pattern, name, path), transposed

def load(source, *, dtype=None, param_dtype=None, mesh=None, remat=False, revision=None) -> Model:
    """The model in a folder or under a Hub id, read a tensor at a time.
    dtype: float32 on a CPU and bfloat16 elsewhere; param_dtype: as dtype; take float32 to train.
    mesh: as jax.sharding.Mesh makes it, not jax.make_mesh; each tensor goes straight to its parts.
    InputError: another kind of model; tensors missing, unexpected or of the wrong shape."""
    folder = fetch(source, revision)
    config = Config.from_hf(json.loads((folder / "config.json").read_text()))
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    options = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
    rngs = SimpleNamespace(params=partial(jax.random.key, 0))  # faster than Rngs; nothing is drawn
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Model(config, rngs=rngs, **options)))
    stored = stored_tensors(folder)
    wanted = {name for _, _, name, _ in named_parameters(state)}
    extra = {name for name in stored.keys() - wanted if not re.fullmatch(IGNORED, name)}
    for problem, names in [("lacks", wanted - stored.keys()), ("has unexpected", extra)]:
        if names:
            raise InputError(f"{folder} {problem} {len(names)} tensors, such as {sorted(names)[0]}")
    # The largest first: while it is converted there are two more copies of it.
    for path, param, name, transposed in sorted(named_parameters(state), key=lambda p: -p[1].size):
        tensor = stored[name]().T if transposed else stored[name]()
        if tensor.shape != param.shape:
            raise InputError(f"{folder}: {name} makes {path} {tensor.shape}, not {param.shape}")
        where = mesh and sharding(mesh, config, path, param.shape)
        param.set_value(jax.device_put(tensor.astype(param.dtype, copy=False), where))
    return nnx.merge(graphdef, state)

def save(model: Model, folder) -> None:
    """Writes config.json and model.safetensors, which transformers and `load` read."""
    tensors, V = {}, model.config.vocab_size
    for path, param, name, transposed in named_parameters(nnx.state(model)):
        tensor = np.asarray(param[...]).T if transposed else np.asarray(param[...])
        tensors[name] = np.ascontiguousarray(tensor[:V] if path in VOCABULARY else tensor)
    config = {**model.config.to_hf(), "dtype": str(next(iter(tensors.values())).dtype)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")

# Which dimensions of a parameter are split over a mesh that has axes "fsdp" and "tensor".
SHARDING = [
    (r"embed_tokens\.embedding", ("tensor", "fsdp")),
    (r"(.+\.(q_proj|k_proj|v_proj|gate_proj|up_proj|w1|w3)|lm_head)\.kernel", ("fsdp", "tensor")),
    (r".+\.(o_proj|down_proj|w2)\.kernel", ("tensor", "fsdp")),
    (r".+", ()),
]
def sharding(mesh, config: Config, path: str, shape):
    """Where the parts of the parameter at `path` go: a dimension that its axis divides is split."""
    axes = next(axes for pattern, axes in SHARDING if re.fullmatch(pattern, path))
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)  # never cut in two
    shape = *shape[:-1], heads if re.search("[kv]_proj", path) else shape[-1]
    axes = [axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=False)]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

def tokenizer(name, revision: str | None = None):
    """An object with encode(text) -> ids and decode(ids) -> text, from a folder or a Hub id: of
    tokenizer.json, which says how a text begins, else of tokenizer.model, where it is with <s>."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    folder = fetch(name, revision, weights=False)
    if (folder / "tokenizer.json").exists():
        codec = Tokenizer.from_file(f"{folder}/tokenizer.json")
        return SimpleNamespace(encode=lambda text: codec.encode(text).ids, decode=codec.decode)
    codec = SentencePieceProcessor(f"{folder}/tokenizer.model")
    return SimpleNamespace(encode=partial(codec.encode, add_bos=True), decode=codec.decode)

if __name__ == "__main__":
    text = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
    name = sys.argv[2] if len(sys.argv) > 2 else next(iter(PRESETS))
    codec, model = tokenizer(name), load(name)
    [new] = generate(model, [codec.encode(text)], 100, key=jax.random.key(0), temperature=0.8,
                     top_k=50, stop_ids=np.ravel(model.config.eos_token_id))
    print(codec.decode(codec.encode(text) + new))
