"""What a token costs as texts grow longer and more: the operations that XLA counts, not seconds."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.reference import sampling

import gemma
import mistral
import qwen

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
}
CONFIGS = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 4096},
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "ffn_dim": 48,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
        "word_embed_proj_dim": 32,
    },
}
WINDOWED = [
    (mistral, {**SIZES, "model_type": "mistral", "sliding_window": 64}),
    (
        gemma,
        {
            **SIZES,
            "model_type": "gemma2",
            "sliding_window": 64,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention"] * 2,
        },
    ),
    (
        qwen,
        {
            **SIZES,
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 64,
            "max_window_layers": 0,
        },
    ),
]


def operations(module, values, B, T, S):
    """Of the program that puts B rows of T tokens into a cache of S slots and draws the next."""
    config = module.Config.from_hf(values)
    graphdef, state = nnx.split(module.Model(config, rngs=nnx.Rngs(0)))
    cache, keys = module.init_cache(config, B, S, "float32"), jax.random.split(jax.random.key(0), B)
    options = sampling(temperature=0)
    program = module.prefill.lower(
        graphdef, state, cache, np.zeros((B, T), int), None, keys, options, top_k=None
    )
    return program.cost_analysis()["flops"]


@pytest.fixture
def values(family):
    return CONFIGS.get(family.name, SIZES)


def test_a_new_token_costs_the_same_more_for_each_slot_of_the_cache(family, values):
    short, middle, long = (operations(family.module, values, 1, 1, S) for S in (256, 512, 1024))
    assert (long - middle) == pytest.approx(2 * (middle - short), rel=0.02)


@pytest.mark.parametrize(("module", "values"), WINDOWED, ids=["mistral", "gemma", "qwen"])
def test_behind_a_window_a_new_token_costs_the_same_at_any_length(module, values):
    """But for the positions of all tokens, a few numbers each, which rings are made from."""
    short, long = (operations(module, values, 1, 1, S) for S in (128, 2048))
    whole = operations(module, {**values, "sliding_window": 4096}, 1, 1, 2048)
    assert long - short < 0.02 * (whole - short)


def test_a_prompt_costs_as_many_rows_and_at_most_its_length_squared(family, values):
    one, four, twice = (
        operations(family.module, values, B, T, T) for B, T in [(1, 128), (4, 128), (1, 256)]
    )
    assert four == pytest.approx(4 * one, rel=0.02)
    assert 2 * one < twice < 4 * one
