"""The mask and the cache: no token sees a later one or padding, and a cache changes no result.

Where two programs of different shapes are compared, sums of float32 run in another order: logits of
about 1 to 10 may then differ by 1e-5. A wrong mask or position moves them by 1e-2 and more.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.families import FAMILIES

ROUNDING = 1e-5


@pytest.fixture(scope="module")
def forward(model):
    """model(...) compiled; with a cache it gives (logits, cache)."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, *rest: nnx.merge(graphdef, state)(*rest))
    return lambda *rest: compiled(state, *rest)


@pytest.fixture(scope="module")
def tokens(model):
    return np.random.default_rng(2).integers(0, model.config.vocab_size, (3, 20))


def left_padded(tokens, padding):
    """(tokens [B, padding + T], positions) with arbitrary tokens in front, of position -1."""
    B, T = tokens.shape
    front = np.random.default_rng(padding).integers(0, tokens.max(), (B, padding))
    positions = np.tile(np.r_[np.full(padding, -1), np.arange(T)], (B, 1))
    return np.concatenate([front, tokens], axis=1), positions


@pytest.mark.parametrize("place", [1, 7, 19])
def test_a_changed_token_leaves_all_earlier_logits_bit_for_bit_the_same(forward, tokens, place):
    changed = tokens.copy()
    changed[:, place] = (changed[:, place] + 1) % tokens.max()
    before, after = np.asarray(forward(tokens)), np.asarray(forward(changed))
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert (np.abs(before - after).max(axis=(0, 2))[place:] > 1e-3).all()  # and moves the others


@pytest.mark.parametrize("padding", [1, 12])
def test_left_padded_rows_give_the_logits_of_unpadded_ones(forward, tokens, padding):
    logits = forward(*left_padded(tokens, padding))[:, padding:]
    np.testing.assert_allclose(logits, forward(tokens), rtol=0, atol=ROUNDING)


def test_what_stands_in_the_padding_does_not_matter_at_all(forward, tokens):
    padded, positions = left_padded(tokens, 5)
    other = padded.copy()
    other[:, :5] = 1
    logits, same = forward(padded, positions), forward(other, positions)
    np.testing.assert_array_equal(np.asarray(logits)[:, 5:], np.asarray(same)[:, 5:])


def test_a_row_of_nothing_but_padding_is_finite_and_leaves_its_neighbours_alone(forward, tokens):
    positions = np.tile(np.arange(20), (3, 1))
    whole = np.asarray(forward(tokens, positions))
    positions[1] = -1
    logits = np.asarray(forward(tokens, positions))
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize(
    "pieces",
    [[20], [1] * 20, [12] + [1] * 8, [9, 11], [5, 1, 14]],
    ids=["at once", "one by one", "then one by one", "two", "three"],
)
@pytest.mark.core_gpt2_only
def test_the_cache_gives_the_logits_of_the_whole_text(family, model, forward, tokens, pieces):
    cache = family.module.init_cache(model.config, 3, 32, jnp.float32)
    found = []
    for piece in np.split(tokens, np.cumsum(pieces)[:-1], axis=1):
        logits, cache = forward(piece, None, cache)  # positions go on by themselves
        found.append(logits)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found, forward(tokens), rtol=0, atol=ROUNDING)


@pytest.mark.core_gpt2_only
def test_the_cache_holds_padded_rows_as_well(family, model, forward, tokens):
    padded, positions = left_padded(tokens, 6)
    positions[0], positions[1, :9] = np.arange(26), -1  # three rows of 26, 17 and 20 tokens
    positions[1, 9:] = np.arange(17)
    cache = family.module.init_cache(model.config, 3, 64, jnp.float32)
    _, cache = forward(padded[:, :10], positions[:, :10], cache)
    logits, cache = forward(padded[:, 10:], positions[:, 10:], cache)
    np.testing.assert_array_equal(np.asarray(cache.positions)[:, :26], positions)
    assert (np.asarray(cache.positions)[:, 26:] == -1).all()
    for row, length in enumerate([26, 17, 20]):
        alone = np.asarray(forward(padded[row : row + 1, -length:]))[0, -16:]
        np.testing.assert_allclose(logits[row], alone, rtol=0, atol=ROUNDING)


@pytest.mark.core_gpt2_only
@pytest.mark.parametrize("T", [1, pytest.param(16, marks=pytest.mark.wide)])
def test_half_precision_on_a_cpu_takes_no_float32_copy_of_all_weights(family, T):
    """XLA's own figure: what a program needs beside its arguments and results does not grow with
    the layers, but for a bit. A float32 copy of the weights would be 4 bytes for each of them."""

    def program(layers):
        config = family.module.Config.from_hf(
            family.sizes | {family.width: 192, family.depth: layers}
        )
        graphdef, state = nnx.split(
            nnx.eval_shape(
                lambda: family.module.Model(
                    config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
                )
            )
        )
        cache = jax.eval_shape(lambda: family.module.init_cache(config, 1, 32, jnp.bfloat16))
        steps = jax.jit(
            lambda state, cache, tokens: jax.lax.fori_loop(
                0,
                9,
                lambda i, carry: nnx.merge(graphdef, state)(tokens, None, carry[1]),
                (jnp.zeros((1, T, config.vocab_size)), cache),
            )
        )
        compiled = steps.lower(state, cache, jax.ShapeDtypeStruct((1, T), int)).compile()
        weights = sum(p.size for p in jax.tree.leaves(state))
        return compiled.memory_analysis().temp_size_in_bytes, weights

    (few, weights), (many, more_weights) = program(2), program(6)
    assert many - few < 0.1 * 4 * (more_weights - weights)


@pytest.mark.core_gpt2_only
def test_half_precision_is_as_exact_with_a_cache_as_without(family, make_case, forward, tokens):
    """There blocks stand in branches, between which XLA rounds: not bit for bit the same."""
    model = family.module.load(make_case(family).folder, dtype="bfloat16")
    graphdef, state = nnx.split(model)
    half = jax.jit(lambda state, *rest: nnx.merge(graphdef, state)(*rest))
    cache = family.module.init_cache(model.config, *tokens.shape, jnp.bfloat16)

    def error(logits):
        return np.sqrt(np.mean((np.asarray(logits) - np.asarray(forward(tokens))) ** 2))

    assert error(half(state, tokens, None, cache)[0]) < 1.5 * error(half(state, tokens))


@pytest.mark.parametrize("chunk", [None, 2, 4, 64])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_mask_is_made_of_positions_wherever_the_keys_lie(family, chunk, monkeypatch):
    """attend() alone, plain and in chunks: key slots in any order, some of them empty, against
    NumPy in float64."""
    if chunk:
        monkeypatch.setattr(family.module, "LONG", 1)
        monkeypatch.setattr(family.module, "CHUNK", chunk)
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(3, 2, 6, 3, 8)).astype(np.float32)  # [B, T, H, Dh] each
    q_positions, k_positions = (
        np.array([[0, 1, 2, 3, 4, 5]] * 2),
        np.array([[3, -1, 0, 5, 1, 2], [2, 1, 0, -1, -1, 9]]),
    )
    out = family.module.attend(q, k, v, q_positions, k_positions, scale=0.5)
    for b, t, h in np.ndindex(2, 6, 3):
        keys = [s for s in range(6) if 0 <= k_positions[b, s] <= q_positions[b, t]]
        weights = np.exp(0.5 * k[b, keys, h].astype(float) @ q[b, t, h])
        expected = weights @ v[b, keys, h] / weights.sum()
        np.testing.assert_allclose(out[b, t, h], expected, rtol=0, atol=1e-6)  # numbers of about 1


@pytest.mark.parametrize("chunk", [3, pytest.param(64, marks=pytest.mark.wide)])
@pytest.mark.core_gpt2_only
def test_attention_in_chunks_gives_the_same_logits_and_gradients(
    family, model, tokens, chunk, monkeypatch
):
    """Rows of 26, 17 and 20 tokens; the loss is that of the tokens, so padding adds nothing."""
    padded, positions = left_padded(tokens, 6)
    positions[0], positions[1, :9] = np.arange(26), -1
    positions[1, 9:] = np.arange(17)
    graphdef, state = nnx.split(model)

    def loss(state):
        logits = nnx.merge(graphdef, state)(padded, positions)
        logits = jnp.where(positions[..., None] >= 0, logits, 0)
        return (logits**2).mean(), logits

    (_, plain), expected = jax.value_and_grad(loss, has_aux=True)(state)
    monkeypatch.setattr(family.module, "LONG", 1)
    monkeypatch.setattr(family.module, "CHUNK", chunk)
    (_, chunked), gradients = jax.value_and_grad(loss, has_aux=True)(state)
    np.testing.assert_allclose(chunked, plain, rtol=0, atol=ROUNDING)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(one).max() + 1e-9)


def test_chunks_of_keys_after_all_queries_are_skipped(family, monkeypatch):
    """NaN would spread from a key that is only masked: 0 times NaN is NaN."""
    monkeypatch.setattr(family.module, "LONG", 1)
    monkeypatch.setattr(family.module, "CHUNK", 4)
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 8, 2, 8)).astype(np.float32)
    positions = np.arange(8)[None]
    expected = family.module.attend(q, k, v, positions, positions, scale=1.0)
    k[:, 4:] = np.nan
    v[:, 4:] = np.nan
    found = family.module.attend(q, k, v, positions, positions, scale=1.0)
    np.testing.assert_array_equal(found[:, :4], expected[:, :4])
    assert np.isnan(found[:, 4:]).all()


@pytest.mark.parametrize("name", ["gemma", "mistral", "qwen"])
def test_chunks_of_keys_before_the_window_are_skipped(name, monkeypatch):
    [module] = [family.module for family in FAMILIES if family.name == name]
    monkeypatch.setattr(module, "LONG", 1)
    monkeypatch.setattr(module, "CHUNK", 4)
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 12, 2, 8)).astype(np.float32)
    positions = np.arange(12)[None]
    expected = module.attend(q, k, v, positions, positions, scale=1.0, window=3)
    k[:, :4] = np.nan
    v[:, :4] = np.nan
    found = module.attend(q, k, v, positions, positions, scale=1.0, window=3)
    np.testing.assert_array_equal(found[:, 8:], expected[:, 8:])


def test_chunks_of_padding_alone_give_no_nan(family, monkeypatch):
    monkeypatch.setattr(family.module, "LONG", 1)
    monkeypatch.setattr(family.module, "CHUNK", 4)
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 8, 2, 8)).astype(np.float32)
    positions = np.array([[-1, -1, -1, -1, -1, 0, 1, 2]])
    found = family.module.attend(q, k, v, positions, positions, scale=1.0)
    assert np.isfinite(found).all()


def test_a_long_prefill_holds_no_tensor_of_length_by_length(family):
    """A text of 16,384 tokens: what the compiled attention needs beside its arguments, in bytes."""
    T, H, Dh = 16_384, 2, 8
    x = jax.ShapeDtypeStruct((1, T, H, Dh), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, T), int)
    attend = jax.jit(partial(family.module.attend, scale=1.0))
    compiled = attend.lower(x, x, x, positions, positions).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 4 * H * T * T


def test_a_text_longer_than_the_position_table_is_refused(family, model):
    limit = model.config.max_position_embeddings
    with pytest.raises(
        family.module.InputError, match=f"{limit + 1} tokens.*context length of {limit}"
    ):
        model(jnp.zeros((1, limit + 1), int))


# --------------------------------------------------------------------------- one vector, many cores


@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 1, 40), (2, 1, 48), (1, 3, 48)])
def test_a_product_in_parts_is_the_product(family, shape):
    """Of one vector whose length has 16 parts; of others it is the plain product itself."""
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=shape), jnp.float32)
    kernel = jnp.array(rng.normal(size=(shape[-1], 24)), jnp.float32)
    dimensions = ((2,), (0,)), ((), ())
    product = partial(family.module.linear_dot, dimension_numbers=dimensions)  # which flax names
    plain = jax.lax.dot_general(x, kernel, dimensions)
    np.testing.assert_allclose(product(x, kernel), plain, atol=1e-5)  # sums of 48 of about 1
    text = str(jax.make_jaxpr(product)(x, kernel))
    assert ("16,3,24" in text) == (shape == (1, 1, 48))


def test_the_gradient_of_a_product_copies_nothing(family):
    """On a CPU a copy of [B, T, D] for each of its products took a fifth of a training step."""
    x, kernel = jnp.ones((2, 3, 48)), jnp.ones((48, 24))
    product = partial(family.module.linear_dot, dimension_numbers=(((2,), (0,)), ((), ())))
    gradient = jax.jit(jax.grad(lambda kernel, x: jnp.square(product(x, kernel)).sum()))
    assert " copy(" not in gradient.lower(kernel, x).compile().as_text()


def test_half_precision_is_multiplied_whole(family):
    """Adding parts that are rounded to bfloat16 would lose what the product keeps."""
    x, kernel = jnp.ones((1, 1, 48), jnp.bfloat16), jnp.ones((48, 24), jnp.bfloat16)
    product = partial(family.module.linear_dot, dimension_numbers=(((2,), (0,)), ((), ())))
    assert product(x, kernel).dtype == jnp.bfloat16
    assert "16,3,24" not in str(jax.make_jaxpr(product)(x, kernel))
