"""Packed rows: several documents in one row, of which none sees the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

ROUNDING = 1e-5  # as in test_cache.py
LENGTHS = [9, 1, 3, 7]  # of the documents in a row of 24 tokens; 4 of padding follow


def documents_of(case):
    text = case.tokens.ravel()
    return np.split(text[: sum(LENGTHS)], np.cumsum(LENGTHS)[:-1])


def filled(documents, length):
    """The documents one after another in a row: (tokens [length], positions [length])."""
    tokens = np.zeros(length, int)
    positions = np.full(length, -1)
    end = 0
    for document in documents:
        begin, end = end, end + len(document)
        tokens[begin:end] = document
        positions[begin:end] = np.arange(len(document))
    return tokens, positions


def packed_and_alone(case):
    """Two batches (tokens, positions): all documents in one row, and a row for each."""
    documents = documents_of(case)
    packed = [each[None] for each in filled(documents, 24)]
    rows = [filled([document], max(LENGTHS)) for document in documents]
    alone = [np.stack(each) for each in zip(*rows, strict=True)]
    return packed, alone


def logits_of(case, tokens, positions):
    """The logits of the real tokens [n, V], in order."""
    graphdef, state = nnx.split(case.model)
    forward = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    return np.asarray(forward(state, tokens, positions))[positions >= 0]


def test_a_packed_document_has_the_logits_that_it_has_alone(case):
    packed, alone = packed_and_alone(case)
    np.testing.assert_allclose(
        logits_of(case, *packed), logits_of(case, *alone), rtol=0, atol=ROUNDING
    )


@pytest.mark.wide
def test_so_it_has_in_a_long_row_where_attention_runs_in_chunks(case, monkeypatch):
    packed, alone = packed_and_alone(case)
    expected = logits_of(case, *alone)
    monkeypatch.setattr(case.family.module, "LONG", 24)
    monkeypatch.setattr(case.family.module, "CHUNK", 5)
    np.testing.assert_allclose(logits_of(case, *packed), expected, rtol=0, atol=ROUNDING)


@pytest.mark.wide
def test_the_gradient_of_a_packed_row_is_the_sum_over_its_documents(case):
    packed, alone = packed_and_alone(case)
    graphdef, params = nnx.split(case.model)
    V = case.model.config.vocab_size
    weights = np.random.default_rng(0).normal(size=(sum(LENGTHS), V)).astype("f4")

    def gradient(tokens, positions):
        def weighted(params):
            logits = nnx.merge(graphdef, params)(tokens, positions)
            return jnp.sum(logits[np.nonzero(positions >= 0)] * weights)

        return jax.tree.leaves(jax.jit(jax.grad(weighted))(params))

    for one, other in zip(gradient(*packed), gradient(*alone), strict=True):
        # Sums in another order: the error is relative to the largest entry of an array.
        atol = 1e-5 * max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def test_a_packed_row_stands_beside_a_padded_one_in_a_batch(case):
    packed, alone = packed_and_alone(case)
    padded = case.tokens[:1], np.r_[np.full(6, -1), np.arange(18)][None]
    both = [np.concatenate(pair) for pair in zip(packed, padded, strict=True)]
    expected = [logits_of(case, *alone), logits_of(case, case.tokens[:1, 6:], np.arange(18)[None])]
    np.testing.assert_allclose(
        logits_of(case, *both), np.concatenate(expected), rtol=0, atol=ROUNDING
    )
