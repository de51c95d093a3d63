"""GPT-2 in one file: read it from top to bottom, run it, copy it.

GPT-2 is a stack of identical blocks on a stream of vectors, one vector for each token. Each block
adds to the stream twice: what attention gathers from earlier tokens, and what a two-layer MLP makes
of each token by itself; both read a layer-normed copy of the stream. Positions are a learned table,
added once at the bottom. The output head is the token table again, transposed.

Papers: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2); Vaswani
et al. 2017, "Attention Is All You Need". Reference: modeling_gpt2.py of Hugging Face transformers.

Shape letters:  B batch   T tokens of this call   S slots of the cache   D width of the stream
                H heads   Dh width of a head      F width of the MLP     V vocabulary

    pip install "jax>=0.10,<0.13" "flax>=0.12,<0.13" numpy safetensors tokenizers huggingface_hub
    python gpt2.py "Once upon a time"                      # downloads openai-community/gpt2
    python gpt2.py "Once upon a time" path/to/checkpoint   # any GPT-2 in Hugging Face's format

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

gelu_tanh = partial(jax.nn.gelu, approximate=True)  # what the published GPT-2s were trained with
ACTIVATIONS = {"gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "relu": jax.nn.relu,
               "gelu": partial(jax.nn.gelu, approximate=False), "silu": jax.nn.silu}

@dataclass(frozen=True)
class Config:
    """The sizes and switches of one GPT-2, under the names of its config.json."""
    vocab_size: int = 50257
    n_positions: int = 1024  # the longest text: the rows of the position table
    n_embd: int = 768  # D
    n_layer: int = 12
    n_head: int = 12  # H
    n_inner: int | None = None  # F; None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    scale_attn_weights: bool = True  # divide attention scores by sqrt(Dh)
    scale_attn_by_inverse_layer_idx: bool = False  # and also by layer index + 1
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    padded_vocab_size: int | None = None  # from scratch: more token vectors; `save` drops them

    @property
    def max_position_embeddings(self) -> int:
        """n_positions, under the name that other models have for it."""
        return self.n_positions

    @property
    def num_attention_heads(self) -> int:
        """n_head, under the name that other models have for it."""
        return self.n_head

    @classmethod
    def small(cls, *, layers: int, heads: int, width: int, context: int, **changes) -> "Config":
        """A GPT-2 of these sizes, to be trained from scratch; `changes` are fields of the config."""
        return cls(n_layer=layers, n_head=heads, n_embd=width, n_positions=context, **changes)

    @classmethod
    def from_hf(cls, values: dict) -> "Config":
        """From the contents of a config.json. InputError: not a GPT-2, or an unsupported one."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        config = cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in known.items()})
        kind, activation = values.get("model_type", "gpt2"), config.activation_function
        if kind != "gpt2":
            raise InputError(f"config.json: model_type {kind!r} is not 'gpt2', which gpt2.py reads")
        if activation not in ACTIVATIONS:
            raise InputError(f"config.json: activation_function {activation!r} is none of "
                             f"{', '.join(ACTIVATIONS)}")
        return config

    def to_hf(self) -> dict:
        """The contents of a config.json that transformers and `from_hf` read."""
        values = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **asdict(self)}
        del values["padded_vocab_size"]
        return values

def sizes(D: int, layers: int, heads: int) -> Config:
    """The config of a published GPT-2."""
    return Config(n_embd=D, n_layer=layers, n_head=heads)

class Preset(NamedTuple):
    """A checkpoint that is published on the Hugging Face Hub."""

    parameters: int
    download_GB: float
    gated: bool  # whether its terms must be accepted first
    config: Config

PRESETS = {  # by id on the Hub; the first is the default
    "openai-community/gpt2": Preset(124_439_808, 0.55, False, sizes(768, 12, 12)),
    "openai-community/gpt2-medium": Preset(354_823_168, 1.52, False, sizes(1024, 24, 16)),
    "openai-community/gpt2-large": Preset(774_030_080, 3.25, False, sizes(1280, 36, 20)),
    "openai-community/gpt2-xl": Preset(1_557_611_200, 6.43, False, sizes(1600, 48, 25)),
    "distilbert/distilgpt2": Preset(81_912_576, 0.35, False, sizes(768, 6, 12)),
}

# -------------------------------------------------------------------------------------------- model
def norm(config: Config, **options):
    """LayerNorm over D, in float32 inside; GPT-2's epsilon and variance formula, not flax's."""
    epsilon = config.layer_norm_epsilon
    return nnx.LayerNorm(config.n_embd, epsilon=epsilon, use_fast_variance=False, **options)

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

@jax.named_scope("attend")
def attend(q, k, v, q_positions, k_positions, scale, dropout=None):
    """Each query gathers the values of the keys at its own and at earlier positions.
    q [B, T, H, Dh], k and v [B, S, H, Dh], q_positions [B, T], k_positions [B, S] -> [B, T, H, Dh]
    Softmax in float32. Vaswani et al. 2017, equation (1)."""
    T, S = q.shape[1], k.shape[1]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, T or S, Dh]: batches first
    if T * S >= LONG**2 and T > 1 and dropout is None:
        x = attend_chunked(q, k, v, q_positions, k_positions, scale=scale)
    else:
        probs = jax.nn.softmax(masked_scores(q, k, q_positions, k_positions, scale))
        probs = probs if dropout is None else dropout(probs)
        x = jnp.einsum("bhts,bhsd->bhtd", probs.astype(v.dtype), v)
    return x.swapaxes(1, 2)

def masked_scores(q, k, q_positions, k_positions, scale):
    """How well each key fits each query, in float32: [B, H, T, Dh], [B, H, S, Dh] -> [B, H, T, S].
    A key is visible where 0 <= its position <= the query's; padding and empty slots are at -1."""
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * scale
    q_pos, k_pos = q_positions[:, None, :, None], k_positions[:, None, None, :]
    visible = (k_pos >= 0) & (k_pos <= q_pos)  # [B, 1, T, S]
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
    """Causal self-attention with H heads; one fused projection makes query, key and value."""
    def __init__(self, config: Config, layer: int, **options):
        D, std = config.n_embd, config.initializer_range
        self.n_head = config.n_head
        self.scale = (D // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Linear(D, 3 * D, kernel_init=normal(std), **options)
        proj_std = std / (2 * config.n_layer) ** 0.5
        self.c_proj = Linear(D, D, kernel_init=normal(proj_std), **options)
        self.attn_dropout = nnx.Dropout(config.attn_pdrop)
        self.resid_dropout = nnx.Dropout(config.resid_pdrop)

    @jax.named_scope("attn")
    def __call__(self, x, positions, k_positions, past, start, rngs=None):
        """x [B, T, D] -> (x [B, T, D], (k, v)): `past` with those of x written from `start` on."""
        B, T, D = x.shape
        dropout = rngs and partial(self.attn_dropout, deterministic=False, rngs=rngs)
        qkv = self.c_attn(x).reshape(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, T, H, Dh] each
        k, v = write(past[0], k, start), write(past[1], v, start)  # [B, S, H, Dh]
        x = attend(q, k, v, positions, k_positions, self.scale, dropout).reshape(B, T, D)
        return self.resid_dropout(self.c_proj(x), deterministic=rngs is None, rngs=rngs), (k, v)

class MLP(nnx.Module):
    """Widens each token's vector to F, applies the activation, and narrows it again."""
    def __init__(self, config: Config, **options):
        D, F, std = config.n_embd, config.n_inner or 4 * config.n_embd, config.initializer_range
        self.act = ACTIVATIONS[config.activation_function]
        self.c_fc = Linear(D, F, kernel_init=normal(std), **options)
        proj_std = std / (2 * config.n_layer) ** 0.5
        self.c_proj = Linear(F, D, kernel_init=normal(proj_std), **options)
        self.dropout = nnx.Dropout(config.resid_pdrop)

    @jax.named_scope("mlp")
    def __call__(self, x, rngs=None):
        """x [B, T, D] -> [B, T, D]"""
        x = self.act(self.c_fc(x))  # [B, T, F]
        return self.dropout(self.c_proj(x), deterministic=rngs is None, rngs=rngs)

class Block(nnx.Module):
    """One layer: attention, then the MLP, each on a normed copy of the stream and added to it."""
    def __init__(self, config: Config, layer: int, **options):
        self.ln_1 = norm(config, **options)
        self.attn = Attention(config, layer, **options)
        self.ln_2 = norm(config, **options)
        self.mlp = MLP(config, **options)

    def __call__(self, x, positions, k_positions, past, start, rngs=None):
        """x [B, T, D] -> (x [B, T, D], this layer's (k, v)); arguments as for Attention."""
        y, kv = self.attn(self.ln_1(x), positions, k_positions, past, start, rngs)
        x = x + y
        return x + self.mlp(self.ln_2(x), rngs), kv

class Model(nnx.Module):
    """GPT-2: tokens [B, T] -> logits [B, T, V].

    From scratch with GPT-2's own initialisation: normal(0.02), biases 0, norms 1, and the two
    projections back into the stream scaled by 1 / sqrt(2 * n_layer), as it gets that many of them.
    `dtype` is what is computed in, `param_dtype` what is stored; norms, attention scores, softmax
    and logits are float32 regardless. `remat` recomputes a block's activations for its gradient.
    """
    def __init__(self, config: Config, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32,
                 remat=False):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        D, V = config.n_embd, config.padded_vocab_size or config.vocab_size
        init = normal(config.initializer_range)
        self.wte = nnx.Embed(V, D, embedding_init=init, **options)
        self.wpe = nnx.Embed(config.n_positions, D, embedding_init=init, **options)
        self.embd_dropout = nnx.Dropout(config.embd_pdrop)
        self.h = nnx.List([Block(config, layer, **options) for layer in range(config.n_layer)])
        self.ln_f = norm(config, **options)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(D, V, use_bias=False, kernel_init=init, **options)

    def hidden(self, tokens, positions=None, cache=None, *, rngs=None):
        """tokens [B, T] -> (x [B, T, D], cache): the final normed stream, which `head` reads.

        positions [B, T]: below n_positions, -1 for padding; default: counts on from the cache,
        which must have T slots left. rngs: an nnx.Rngs, to train with dropout.
        """
        (B, T), layers = tokens.shape, []
        if cache is None and (context := self.config.max_position_embeddings) < T:
            raise InputError(f"{T} tokens, but the context is {context}")
        # XLA on a CPU computes half precision in float32, and would convert the weights of all
        # blocks before the first runs. So each is in a branch that XLA cannot know to be taken.
        fenced = cache and self.dtype != jnp.float32 and jax.default_backend() == "cpu"
        cache = init_cache(self.config, B, T, self.dtype) if cache is None else cache
        if positions is None:
            positions = cache.positions.max(axis=1, keepdims=True) + 1 + jnp.arange(T)
        start, k_positions = cache.filled, write(cache.positions, positions, cache.filled)
        x = self.wte(tokens) + self.wpe(jnp.maximum(positions, 0))  # [B, T, D]
        x = self.embd_dropout(x, deterministic=rngs is None, rngs=rngs)
        call = nnx.remat(Block.__call__) if self.remat and not fenced else Block.__call__
        for block, past in zip(self.h, cache.layers, strict=True):
            run = partial(call, block, x, positions, k_positions, past, start, rngs)
            run = jax.named_scope(f"h.{len(layers)}")(run)  # its name in a profile
            x, kv = jax.lax.cond(start >= 0, run, partial(tuple, (x, past))) if fenced else run()
            layers.append(kv)
        tokens = write(cache.tokens, tokens, start)
        cache = Cache(tuple(layers), tokens, k_positions, start + T)
        return self.ln_f(x), cache

    @jax.named_scope("head")
    def head(self, x):
        """x [..., D] -> logits [..., V] in float32, without those of a padded vocabulary."""
        w = self.lm_head.kernel.T if hasattr(self, "lm_head") else self.wte.embedding
        x = jnp.einsum("...d,vd->...v", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
        return x[..., : self.config.vocab_size]

    def __call__(self, tokens, positions=None, cache=None, *, rngs=None):
        """tokens [B, T] -> logits [B, T, V] in float32; with a cache: (logits, cache)."""
        x, new_cache = self.hidden(tokens, positions, cache, rngs=rngs)
        return self.head(x) if cache is None else (self.head(x), new_cache)

class Cache(NamedTuple):
    """The keys and values of all tokens so far, so that a new token computes only its own. All rows
    fill the same slots: shorter ones are padded on the left. Padding and empty slots are at -1."""
    layers: tuple  # for each layer (k, v), each [B, S, heads, Dh]
    tokens: jax.Array  # [B, S], for the repetition penalty
    positions: jax.Array  # [B, S]
    filled: jax.Array  # how many slots are written, padding included: where the next go

def init_cache(config: Config, batch: int, length: int, dtype) -> Cache:
    """An empty cache of `length` slots."""
    shape = batch, length, config.n_head, config.n_embd // config.n_head
    layers = [tuple(jnp.zeros((2, *shape), dtype)) for _ in range(config.n_layer)]
    tokens, positions = jnp.zeros(shape[:2], int), jnp.full(shape[:2], -1)
    return Cache(tuple(layers), tokens, positions, jnp.array(0))

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
# Parameter path -> its name in a checkpoint, and whether it is transposed there. GPT-2's Conv1D
# keeps [in, out], as nnx.Linear does; only a separate head is [out, in].
CHECKPOINT = [
    (r"lm_head\.kernel", "lm_head.weight", True),
    (r"(.+)\.(embedding|scale|kernel)", r"transformer.\1.weight", False),
    (r"(.+)\.bias", r"transformer.\1.bias", False),
]
VOCABULARY = ("wte.embedding", "lm_head.kernel")  # their padded rows are not saved
RENAMED = (r"^(?!transformer\.|lm_head\.)", "transformer.")  # bare models lack the prefix
# Skipped where a file has them: causal masks of old files, and a copy of the token table as head.
IGNORED = r"transformer\.h\.\d+\.attn\.(masked_)?bias|lm_head\.weight"
DOWNLOADS = ["config.json", "generation_config.json", "tokenizer*.json", "vocab.json", "merges.txt"]
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
    (r"wte\.embedding", ("tensor", "fsdp")),
    (r"wpe\.embedding", (None, "fsdp")),
    (r".+\.(c_attn|c_fc)\.kernel|lm_head\.kernel", ("fsdp", "tensor")),
    (r".+\.(c_attn|c_fc)\.bias", ("tensor",)),
    (r".+\.c_proj\.kernel", ("tensor", "fsdp")),
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
    """An object with encode(text) -> ids and decode(ids) -> text. GPT-2 begins without a BOS token.

    Reads tokenizer.json, else vocab.json and merges.txt, of a folder or a Hub id.
    """
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    folder = fetch(name, revision, weights=False)
    if (folder / "tokenizer.json").exists():
        codec = Tokenizer.from_file(f"{folder}/tokenizer.json")
    else:
        codec = ByteLevelBPETokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
        codec.add_special_tokens(["<|endoftext|>"])
    return SimpleNamespace(encode=lambda text: codec.encode(text).ids, decode=codec.decode)

if __name__ == "__main__":
    text = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
    name = sys.argv[2] if len(sys.argv) > 2 else next(iter(PRESETS))
    codec, model = tokenizer(name), load(name)
    [new] = generate(model, [codec.encode(text)], 100, key=jax.random.key(0), temperature=0.8,
                     top_k=50, stop_ids=np.ravel(model.config.eos_token_id))
    print(codec.decode(codec.encode(text) + new))
