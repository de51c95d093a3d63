"""Sliding windows: what a ring of slots keeps is what a token may still look at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.families import EVERY_CONFIG, GEMMA, MISTRAL, QWEN

ROUNDING = 1e-5  # as in test_cache.py
WINDOWED = [
    config
    for config in EVERY_CONFIG
    if config.values[0]
    in [
        (MISTRAL, "window of 5"),
        (MISTRAL, "3 experts, window of 7"),
        (MISTRAL, "windows in some layers"),
        (GEMMA, "second"),
        (GEMMA, "third"),
        (QWEN, "windows of 7 in some layers"),
        (QWEN, "Qwen2, a window from layer 1 on"),
    ]
]
every_window = pytest.mark.parametrize("case", WINDOWED, indirect=True)


def compiled(case):
    graphdef, state = nnx.split(case.model)
    program = jax.jit(lambda state, *rest: nnx.merge(graphdef, state)(*rest))
    return lambda *rest: program(state, *rest)


@every_window
@pytest.mark.parametrize(
    "pieces",
    [
        [1] * 24,
        [3, 1, 1, 13, 1, 5],
        *[pytest.param(pieces, marks=pytest.mark.wide) for pieces in ([24], [12, 12])],
    ],
    ids=str,
)
def test_a_ring_no_longer_than_the_window_gives_the_logits_of_the_whole_text(case, pieces):
    forward, module = compiled(case), case.family.module
    cache = module.init_cache(case.model.config, 3, 64, jnp.float32)
    window = case.model.config.sliding_window
    assert min(k.shape[1] for k, *_ in cache.layers) == window < 24
    found = []
    for piece in np.split(case.tokens, np.cumsum(pieces)[:-1], axis=1):
        logits, cache = forward(piece, None, cache)
        found.append(logits)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found, forward(case.tokens), rtol=0, atol=ROUNDING)


@every_window
def test_rows_of_different_lengths_keep_their_own_windows(case):
    forward, module = compiled(case), case.family.module
    positions = np.tile(np.arange(24), (3, 1))
    for row, padding in [(1, 6), (2, 20)]:
        positions[row] = np.r_[np.full(padding, -1), np.arange(24 - padding)]
    cache = module.init_cache(case.model.config, 3, 40, jnp.float32)
    first, cache = forward(case.tokens[:, :21], positions[:, :21], cache)
    logits = [first]
    for i in range(21, 24):
        one, cache = forward(case.tokens[:, i : i + 1], positions[:, i : i + 1], cache)
        logits.append(one)
    logits = np.concatenate(logits, axis=1)
    for row, padding in enumerate([0, 6, 20]):
        alone = forward(case.tokens[row : row + 1, padding:])[0]
        np.testing.assert_allclose(logits[row, padding:], alone, rtol=0, atol=ROUNDING)


@every_window
def test_what_left_every_window_changes_nothing(case):
    """Each layer looks one window back, so the stream depends on layers * (window - 1) tokens."""
    config, forward = case.model.config, compiled(case)
    if "full_attention" in config.layer_types:
        pytest.skip("its other layers have no window")
    reach = config.num_hidden_layers * (config.sliding_window - 1)
    changed = case.tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % config.vocab_size
    same = np.abs(np.asarray(forward(case.tokens)) - np.asarray(forward(changed))).max(axis=(0, 2))
    assert (same[reach + 1 :] == 0).all() and (same[: reach + 1] > 0).all()
