"""GPT-2 in one file: read it from top to bottom, run it, copy it.

GPT-2 is a stack of equal blocks on a stream of vectors, one vector for each token. Every block adds
to the stream twice: what attention gathers from earlier tokens, and what a two-layer MLP makes of
each token by itself; both read a layer-normed copy of it. Positions are a learned table, added once
at the bottom. The output head is the token table again, used the other way round.

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
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# ------------------------------------------------------------------------------------------ config

class InputError(ValueError):
    """Something that the caller can put right; the message says what and how."""

gelu_tanh = partial(jax.nn.gelu, approximate=True)  # what the published GPT-2s learned with
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
    scale_attn_weights: bool = True  # divide attention scores by sqrt(Dh),
    scale_attn_by_inverse_layer_idx: bool = False  # and by 1, 2, 3, ... in layer 0, 1, 2, ...
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    padded_vocab_size: int | None = None  # rows of wte in training; `save` writes vocab_size rows

    @classmethod
    def from_hf(cls, json: dict) -> "Config":
        """Reads the contents of a config.json. InputError: not a GPT-2, or one this file lacks."""
        kind = json.get("model_type", "gpt2")
        if kind != "gpt2":
            raise InputError(f"config.json is of a {kind!r} model, and gpt2.py reads 'gpt2' only"
                             + (f": {OTHERS[kind]} is the file for it" if kind in OTHERS else ""))
        values = {f.name: json[f.name] for f in fields(cls) if f.name in json}
        config = cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
        if config.activation_function not in ACTIVATIONS or json.get("add_cross_attention"):
            raise InputError(f"config.json wants what gpt2.py has not: add_cross_attention, or an "
                             f"activation_function other than {', '.join(ACTIVATIONS)}")
        if config.n_embd % config.n_head:
            raise InputError(f"config.json: n_embd {config.n_embd} does not split into "
                             f"n_head {config.n_head} equal heads")
        return config

    def to_hf(self) -> dict:
        """The contents of a config.json that transformers and `from_hf` read."""
        values = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **asdict(self)}
        del values["padded_vocab_size"]
        return values

OTHERS = {"opt": "opt.py", "llama": "llama.py", "gemma": "gemma.py", "gemma2": "gemma.py",
          "gemma3": "gemma.py", "gemma3_text": "gemma.py", "mistral": "mistral.py",
          "mixtral": "mistral.py"}  # which file of the project reads which model_type

def preset(parameters: int, download: float, gated: bool = False, **sizes):
    """A published checkpoint: parameter count, download in GB, whether it is gated, and config."""
    about = {"parameters": parameters, "download": download, "gated": gated}
    return SimpleNamespace(**about, config=Config(**sizes))

PRESETS = {  # the first is the default
    "openai-community/gpt2": preset(124_439_808, 0.55),
    "openai-community/gpt2-medium": preset(354_823_168, 1.52, n_embd=1024, n_layer=24, n_head=16),
    "openai-community/gpt2-large": preset(774_030_080, 3.25, n_embd=1280, n_layer=36, n_head=20),
    "openai-community/gpt2-xl": preset(1_557_611_200, 6.43, n_embd=1600, n_layer=48, n_head=25),
    "distilbert/distilgpt2": preset(81_912_576, 0.35, n_layer=6),
}

# ------------------------------------------------------------------------------------------- model

normal = nnx.initializers.normal

def norm(config: Config, **options):
    """LayerNorm over D, in float32; flax's own defaults are another epsilon and variance."""
    options |= {"epsilon": config.layer_norm_epsilon, "use_fast_variance": False}
    return nnx.LayerNorm(config.n_embd, **options)

def attend(q, k, v, q_positions, k_positions, scale, dropout=lambda probs: probs):
    """Each query gathers the values of the keys at its own and at earlier positions.

    q [B, T, H, Dh], k and v [B, S, H, Dh], q_positions [B, T], k_positions [B, S] -> [B, T, H, Dh]
    The mask comes from positions alone: a key is seen where 0 <= its position <= the query's.
    Padding, and slots that are empty, have position -1. Vaswani et al. 2017, equation (1).
    """
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * scale
    q_positions, k_positions = q_positions[:, None, :, None], k_positions[:, None, None, :]
    seen = (k_positions >= 0) & (k_positions <= q_positions)  # [B, 1, T, S]
    # Not -inf: a padding query sees no key at all, and softmax of -inf everywhere is NaN.
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    probs = dropout(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)  # softmax in float32
    return jnp.einsum("bhts,bshd->bthd", probs, v)

class Attention(nnx.Module):
    """Causal self-attention with H heads; one fused projection makes query, key and value."""

    def __init__(self, config: Config, layer: int, **options):
        D, std = config.n_embd, config.initializer_range
        self.n_head = config.n_head
        self.scale = (D // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nnx.Linear(D, 3 * D, kernel_init=normal(std), **options)
        std /= (2 * config.n_layer) ** 0.5
        self.c_proj = nnx.Linear(D, D, kernel_init=normal(std), **options)
        self.attn_dropout = nnx.Dropout(config.attn_pdrop)
        self.resid_dropout = nnx.Dropout(config.resid_pdrop)

    def __call__(self, x, positions, k_positions, past=None, start=0, rngs=None):
        """x [B, T, D] -> (x [B, T, D], (k, v)), the new k and v put into `past` from slot start."""
        B, T, D = x.shape
        train = {"deterministic": rngs is None, "rngs": rngs}
        qkv = self.c_attn(x).reshape(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, T, H, Dh] each
        if past is not None:
            k, v = write(past[0], k, start), write(past[1], v, start)  # [B, S, H, Dh]
        x = attend(q, k, v, positions, k_positions, self.scale, partial(self.attn_dropout, **train))
        return self.resid_dropout(self.c_proj(x.reshape(B, T, D)), **train), (k, v)

class MLP(nnx.Module):
    """Widens each token's vector to F, applies GELU, and narrows it again."""

    def __init__(self, config: Config, **options):
        D, F, std = config.n_embd, config.n_inner or 4 * config.n_embd, config.initializer_range
        self.act = ACTIVATIONS[config.activation_function]
        self.c_fc = nnx.Linear(D, F, kernel_init=normal(std), **options)
        std /= (2 * config.n_layer) ** 0.5
        self.c_proj = nnx.Linear(F, D, kernel_init=normal(std), **options)
        self.dropout = nnx.Dropout(config.resid_pdrop)

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

    def __call__(self, x, positions, k_positions, past=None, start=0, rngs=None):
        """x [B, T, D] -> (x [B, T, D], this layer's (k, v)); arguments as for Attention."""
        y, kv = self.attn(self.ln_1(x), positions, k_positions, past, start, rngs)
        x = x + y
        return x + self.mlp(self.ln_2(x), rngs), kv

class Model(nnx.Module):
    """GPT-2: tokens [B, T] -> logits [B, T, V].

    From scratch with GPT-2's own initialisation: normal(0.02), biases 0, norms 1, and the two
    projections back into the stream scaled by 1 / sqrt(2 * n_layer), the number of additions to it.
    `dtype` is what is computed in, `param_dtype` what is stored; norms, softmax and logits are
    always float32. `remat` recomputes a block in the backward pass instead of keeping its insides.
    """

    def __init__(self, config: Config, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32,
                 remat=False):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = normal(config.initializer_range)
        rows = config.padded_vocab_size or config.vocab_size
        self.config, self.dtype, self.remat = config, dtype, remat
        self.wte = nnx.Embed(rows, config.n_embd, embedding_init=init, **options)
        self.wpe = nnx.Embed(config.n_positions, config.n_embd, embedding_init=init, **options)
        self.embd_dropout = nnx.Dropout(config.embd_pdrop)
        self.h = nnx.List([Block(config, layer, **options) for layer in range(config.n_layer)])
        self.ln_f = norm(config, **options)
        if not config.tie_word_embeddings:
            options |= {"use_bias": False, "kernel_init": init}
            self.lm_head = nnx.Linear(config.n_embd, rows, **options)

    def hidden(self, tokens, positions=None, cache=None, *, rngs=None):
        """tokens [B, T] -> (x [B, T, D], cache): what the head is applied to.

        positions [B, T]: 0, 1, 2, ... after those of the cache, unless given; -1 for padding.
        rngs: an nnx.Rngs from which dropout is drawn; None: no dropout.
        """
        B, T = tokens.shape
        start = 0 if cache is None else cache.length
        if positions is None:
            if self.config.n_positions < T:
                raise InputError(f"{T} tokens, but the context is {self.config.n_positions}")
            positions = jnp.broadcast_to(start + jnp.arange(T), (B, T))
        k_positions = positions if cache is None else write(cache.positions, positions, start)
        x = self.wte(tokens) + self.wpe(jnp.maximum(positions, 0))  # [B, T, D]
        x = self.embd_dropout(x, deterministic=rngs is None, rngs=rngs)
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        layers = []
        for i, block in enumerate(self.h):
            past = None if cache is None else cache.layers[i]
            x, kv = run(block, x, positions, k_positions, past, start, rngs)
            layers.append(kv)
        cache = None if cache is None else Cache(tuple(layers), k_positions, start + T)
        return self.ln_f(x), cache

    def head(self, x):
        """x [..., D] -> logits [..., V] in float32; rows that only pad the table are cut off."""
        w = self.wte.embedding[...] if self.config.tie_word_embeddings else self.lm_head.kernel.T
        w = w.astype(x.dtype)  # [V, D]
        logits = jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)
        return logits[..., : self.config.vocab_size]

    def __call__(self, tokens, positions=None, cache=None, *, rngs=None):
        """tokens [B, T] -> logits [B, T, V] in float32; with a cache: (logits, cache)."""
        x, new_cache = self.hidden(tokens, positions, cache, rngs=rngs)
        return self.head(x) if cache is None else (self.head(x), new_cache)

# ---------------------------------------------------------------------------------------- KV cache

class Cache(NamedTuple):
    """The keys and values of all tokens so far, so that a new token computes only its own.

    All rows fill the same slots; shorter rows are padded on the left. `positions` tells what a slot
    holds: a token's position, or -1 for padding and for a slot that is still empty.
    """

    layers: tuple  # for each layer (k, v), each [B, S, H, Dh]
    positions: jax.Array  # [B, S]
    length: jax.Array  # how many slots are filled

def init_cache(config: Config, batch: int, length: int, dtype) -> Cache:
    """An empty cache of `length` slots."""
    shape = (batch, length, config.n_head, config.n_embd // config.n_head)
    layers = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)]
    return Cache(tuple(layers), jnp.full((batch, length), -1), jnp.array(0))

def write(slots, new, start):
    """Puts new [B, T, ...] into slots [B, S, ...] from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=1)

# ---------------------------------------------------------------------------------- the next token

@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. None leaves a step out, and compiles a program without it."""

    temperature: float | None  # None: always the likeliest token
    top_k: int | None = field(metadata={"static": True})
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None

    @classmethod
    def of(cls, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
        """From the arguments of `generate`. InputError: one of them is out of its range."""
        for fits, rule in [
            (temperature >= 0, "temperature must be 0 (the likeliest token) or more"),
            (top_k is None or top_k >= 1, "top_k must be 1 or more"),
            (top_p is None or 0 < top_p <= 1, "top_p must be above 0 and at most 1"),
            (min_p is None or 0 <= min_p <= 1, "min_p must be from 0 to 1"),
            (repetition_penalty > 0, "repetition_penalty must be above 0"),
        ]:
            if not fits:
                raise InputError(rule)
        draw = (temperature, top_k, top_p, min_p) if temperature else (None, None, None, None)
        return cls(*draw, None if repetition_penalty == 1 else repetition_penalty)

def sample(logits, keys, sampling: Sampling, seen=None):
    """Draws a token for each row: logits [B, V], keys [B], seen [B, V] (earlier tokens) -> [B].

    The penalty is from Keskar et al. 2019 (CTRL), top_p from Holtzman et al. 2019, min_p from
    Nguyen et al. 2024; the steps and their order are those of transformers.
    """
    if sampling.repetition_penalty is not None:
        penalty = sampling.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1)
    logits, ids = logits / sampling.temperature, None
    if sampling.top_k is not None or sampling.top_p is not None:  # from here on best first
        V = logits.shape[-1]
        logits, ids = jax.lax.top_k(logits, min(sampling.top_k or V, V))
    probs = jax.nn.softmax(logits, axis=-1)
    if sampling.top_p is not None:  # as long as the better tokens hold less than top_p together
        logits = jnp.where(jnp.cumsum(probs, axis=-1) - probs < sampling.top_p, logits, -jnp.inf)
    if sampling.min_p is not None:
        best = probs.max(axis=-1, keepdims=True)
        logits = jnp.where(probs >= sampling.min_p * best, logits, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, logits)
    return choice if ids is None else jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]

def generate_naive(model, prompt: list[int], max_new_tokens: int, *, key, **options) -> list[int]:
    """What `generate` does to a single row, without a cache: the whole text again for each token."""
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    text, end = list(prompt), len(prompt) + max_new_tokens
    for n in range(len(prompt), end):
        logits = forward(state, jnp.array([text + [0] * (end - n)]))[:, n - 1]  # 0s: unseen
        seen = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(text))
        keys = jax.random.fold_in(jax.random.fold_in(key, 0), n)[None]  # of row 0, position n
        text += sample(logits, keys, Sampling.of(**options), seen).tolist()
    return text[len(prompt) :]

class Rows(NamedTuple):
    """A batch in the middle of generation: all that the next step needs."""

    cache: Cache
    seen: jax.Array | None  # [B, V] which tokens occurred; None without a repetition penalty
    token: jax.Array | None = None  # [B] drawn last, and not in the cache yet
    position: jax.Array | None = None  # [B] where that token stands

@partial(jax.jit, static_argnames="graphdef", donate_argnames="rows")
def prefill(graphdef, state, rows: Rows, tokens, positions, keys, sampling: Sampling) -> Rows:
    """Puts tokens [B, T] into the cache and draws the token that follows the last of them."""
    model, seen, position = nnx.merge(graphdef, state), rows.seen, positions[:, -1] + 1
    x, cache = model.hidden(tokens, positions, rows.cache)
    if seen is not None:
        seen = seen.at[jnp.arange(len(tokens))[:, None], tokens].max(positions >= 0)
    keys = jax.vmap(jax.random.fold_in)(keys, position)  # so that no key is used twice
    return Rows(cache, seen, sample(model.head(x[:, -1]), keys, sampling, seen), position)

STEPS = 32  # the most tokens of one call of `decode`; between calls text is shown, and Ctrl-C works

@partial(jax.jit, static_argnames="graphdef", donate_argnames="rows")
def decode(graphdef, state, rows: Rows, keys, sampling: Sampling, steps):
    """Draws `steps` <= STEPS more tokens, one by one -> (rows, new tokens [B, STEPS])."""

    def step(i, carry):
        rows, new = carry
        tokens, positions = rows.token[:, None], rows.position[:, None]
        rows = prefill(graphdef, state, rows, tokens, positions, keys, sampling)
        return rows, new.at[:, i].set(rows.token)

    return jax.lax.fori_loop(0, steps, step, (rows, jnp.zeros((len(rows.token), STEPS), int)))

def pack(config: Config, prompts: list[list[int]], max_new_tokens: int):
    """Ragged prompts as one batch, padded on the left: (tokens [B, T], positions [B, T], S).

    T is a power of two and S, the cache's length, a multiple of 128, so that many lengths share few
    programs. InputError: an empty prompt, ids of another vocabulary, a text beyond the context.
    """
    B, T = len(prompts), max(64, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens, positions = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    for i, prompt in enumerate(prompts):
        n = len(prompt)
        if n == 0 or max_new_tokens < 1:
            raise InputError("a prompt needs at least one token, and so does its continuation")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise InputError(f"a prompt has ids outside the vocabulary of {config.vocab_size}")
        if n + max_new_tokens > config.n_positions:
            raise InputError(f"a prompt of {n} tokens and {max_new_tokens} new ones do not fit the "
                             f"context of {config.n_positions}")
        tokens[i, T - n :], positions[i, T - n :] = prompt, range(n)
    return tokens, positions, -(-(T + max_new_tokens) // 128) * 128

def generate(model: Model, prompts: list[list[int]], max_new_tokens: int, *, key, temperature=1.0,
             top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, stop_ids=()):
    """Continues each prompt by up to max_new_tokens -> list[list[int]], the new tokens only.

    A row ends before its first stop id. `key` is a jax.random.key, or one for each row: a row's
    tokens follow from its own key and prompt, whatever the rows beside it. temperature 0 always
    takes the likeliest token. InputError: an argument out of its range, or a text too long.
    """
    sampling = Sampling.of(temperature, top_k, top_p, min_p, repetition_penalty)
    tokens, positions, length = pack(model.config, prompts, max_new_tokens)
    B, V = len(prompts), model.config.vocab_size
    keys = key if key.ndim else jax.vmap(partial(jax.random.fold_in, key))(np.arange(B))
    seen = jnp.zeros((B, V), bool) if sampling.repetition_penalty is not None else None
    rows = Rows(init_cache(model.config, B, length, model.dtype), seen)
    graphdef, state = nnx.split(model)
    rows = prefill(graphdef, state, rows, tokens, positions, keys, sampling)
    new = np.array(rows.token)[:, None]  # a copy: decode overwrites its rows
    while new.shape[1] < max_new_tokens and not np.isin(new, stop_ids).any(axis=1).all():
        steps = min(STEPS, max_new_tokens - new.shape[1])
        rows, more = decode(graphdef, state, rows, keys, sampling, steps)
        new = np.concatenate([new, more[:, :steps]], axis=1)
    stops = [np.flatnonzero(np.isin(row, stop_ids)) for row in new]
    return [row[: end[0] if end.size else None].tolist()
            for row, end in zip(new, stops, strict=True)]

# -------------------------------------------------------------------------------------- checkpoints

# Parameter path -> its name in a checkpoint, and whether the matrix is turned round there: like
# nnx.Linear, OpenAI's layers keep [in, out] (Conv1D in transformers); a separate head is [out, in].
PREFIX = "transformer."
CHECKPOINT = [
    (r"lm_head\.kernel", "lm_head.weight", True),
    (r"(.+)\.(embedding|scale|kernel)", PREFIX + r"\1.weight", False),
    (r"(.+)\.bias", PREFIX + r"\1.bias", False),
]
# Tensors that are not read: causal masks in old files, and a head that repeats the token table.
IGNORED = r"transformer\.h\.\d+\.attn\.(masked_)?bias|lm_head\.weight"
# The files of a repository that are wanted, of its many formats.
DOWNLOADS = ["config.json", "generation_config.json", "model.safetensors", "model-*.safetensors",
             "model.safetensors.index.json", "tokenizer*.json", "vocab.json", "merges.txt"]

def fetch(name, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name` if that is a folder, else the Hub's cache, brought up to
    date where there is a network. HF_HOME, HF_TOKEN and the like work as everywhere."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name)):
        raise InputError(f"{name}: no such folder, and not a name on the Hugging Face Hub")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADS))

@contextmanager
def reading(path: Path):
    """Turns what goes wrong while a file is read into an InputError that says what it is."""
    try:
        yield path
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the checkpoint is incomplete, or is none") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        head = path.read_bytes()[:64].lstrip().lower()
        what = f"damaged or cut short ({error}): download it again"
        if head.startswith(b"version https://git-lfs"):
            what = "a Git LFS pointer and not the file itself: run `git lfs pull`"
        elif head.startswith((b"<!doctype", b"<html")):
            what = "a web page and not the file itself: download it again"
        raise InputError(f"{path} is {what}") from None

def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: a single one, or the shards that its index names."""
    if not (folder / "model.safetensors.index.json").exists():
        return [folder / "model.safetensors"]
    with reading(folder / "model.safetensors.index.json") as index:
        weight_map = json.loads(index.read_text())["weight_map"]
    return [folder / file for file in sorted(set(weight_map.values()))]

def parameters(state):
    """(path such as "h.0.attn.c_attn.kernel", parameter, checkpoint name, turned there) of all."""
    for keys, param in nnx.to_flat_state(state):
        path = ".".join(map(str, keys))
        matches = ((re.fullmatch(pattern, path), *rule) for pattern, *rule in CHECKPOINT)
        match, name, turned = next(found for found in matches if found[0])
        yield path, param, match.expand(name), turned

def load(name, *, dtype=None, param_dtype=None, mesh=None, remat=False, revision=None) -> Model:
    """The model in a folder or under a Hub id, read tensor by tensor: none is held twice.

    dtype: float32 on a CPU and bfloat16 elsewhere, unless given; param_dtype: the same as dtype.
    mesh: each tensor goes straight to the devices where SHARDING puts its parts.
    InputError: not to be had, not a GPT-2, or tensors missing, unexpected or of the wrong shape.
    """
    folder = fetch(name, revision)
    with reading(folder / "config.json") as file:
        config = Config.from_hf(json.loads(file.read_text()))
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    options = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
    key = jax.random.key(0)  # one for all, as nothing is drawn: one for each takes ten times longer
    rngs = SimpleNamespace(params=lambda: key)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Model(config, rngs=rngs, **options)))
    stored = {}  # name -> its file
    for path in weight_files(folder):
        with reading(path), safe_open(path, "np") as file:
            stored |= dict.fromkeys(file.keys(), path)
    bare = not any(name.startswith(PREFIX) for name in stored)  # saved without the head
    names = {PREFIX * (bare and name != "lm_head.weight") + name: name for name in stored}
    wanted = {name for _, _, name, _ in parameters(state)}
    extra = {name for name in names.keys() - wanted if not re.fullmatch(IGNORED, name)}
    for problem, some in [("lacks", wanted - names.keys()), ("has unexpected", extra)]:
        if some:
            more = f" and {len(some) - 5} more" * (len(some) > 5)
            raise InputError(f"{folder} {problem} {', '.join(sorted(some)[:5])}{more}")
    for path, param, name, turned in parameters(state):
        file = stored[names[name]]
        with reading(file), safe_open(file, "np") as tensors:  # anew: its pages count as ours
            tensor = tensors.get_tensor(names[name])
        tensor = tensor.T if turned else tensor
        if tensor.shape != param.shape:
            raise InputError(f"{file}: {name} makes {path} {list(tensor.shape)}, but config.json "
                             f"says {list(param.shape)}")
        tensor = tensor.astype(param.dtype, copy=False)
        param.set_value(jax.device_put(tensor, mesh and sharding(mesh, path)))
    return nnx.merge(graphdef, state)

def save(model: Model, folder) -> None:
    """Writes the config.json and model.safetensors of transformers. OSError: neither is written."""
    tensors = {}
    for path, param, name, turned in parameters(nnx.state(model)):
        tensor = np.asarray(param[...])
        tensor = tensor.T if turned else tensor
        rows = model.config.vocab_size if path in ("wte.embedding", "lm_head.kernel") else None
        tensors[name] = np.ascontiguousarray(tensor[:rows])
    config = {**model.config.to_hf(), "dtype": tensor.dtype.name}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:  # moved to the folder when all is there
        try:
            save_file(tensors, f"{part}/model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {folder}/model.safetensors: {error}") from None
        Path(part, "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in Path(part).iterdir():
            file.replace(Path(folder, file.name))

# Which dimensions of a parameter may be split over a mesh that has axes "fsdp" and "tensor".
SHARDING = [
    (r"wte\.embedding", ("tensor", "fsdp")),
    (r"wpe\.embedding", (None, "fsdp")),
    (r".+\.(c_attn|c_fc)\.kernel|lm_head\.kernel", ("fsdp", "tensor")),
    (r".+\.(c_attn|c_fc)\.bias", ("tensor",)),
    (r".+\.c_proj\.kernel", ("tensor", "fsdp")),
    (r".+", ()),
]

def sharding(mesh, path: str):
    """Where the parts of the parameter at `path` go, by SHARDING."""
    axes = next(axes for pattern, axes in SHARDING if re.fullmatch(pattern, path))
    spec = (axis if axis in mesh.axis_names else None for axis in axes)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

def tokenizer(name, revision: str | None = None):
    """An object with encode(text) -> ids and decode(ids) -> text, of a folder or a Hub id.

    Read from tokenizer.json, else from vocab.json and merges.txt. GPT-2 puts nothing before a text.
    """
    import tokenizers

    folder = fetch(name, revision)
    if (folder / "tokenizer.json").exists():
        codec = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        codec = tokenizers.ByteLevelBPETokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
        codec.add_special_tokens(["<|endoftext|>"])
    else:
        raise InputError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt")
    return SimpleNamespace(encode=lambda text: codec.encode(text).ids, decode=codec.decode)

if __name__ == "__main__":
    text = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
    name = sys.argv[2] if len(sys.argv) > 2 else next(iter(PRESETS))
    codec, model = tokenizer(name), load(name)
    stop_ids = np.atleast_1d(model.config.eos_token_id or ())
    options = {"key": jax.random.key(0), "temperature": 0.8, "top_k": 50, "stop_ids": stop_ids}
    [new] = generate(model, [codec.encode(text)], 100, **options)
    print(text + codec.decode(new))
