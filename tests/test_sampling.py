"""sample(): the filters of transformers, and draws that really follow the distribution.

20,000 draws are held against the exact probabilities in a chi-square test at p = 1e-5: the seeds
are fixed, so it either passes always or never. It is shown to fail at a temperature of 1.1 for 1,
and at other options that are as little off.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.families import GPT2
from helpers.reference import sampling
from scipy.stats import chi2
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

V, DRAWS, SIGNIFICANCE = 24, 20_000, 1e-5
OCCURRED = [0, 3, 5, 21]
OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k of all": {"top_k": 100},
    "top_p": {"top_p": 0.7},
    "top_p of almost nothing": {"top_p": 1e-6},
    "top_p 1": {"top_p": 1.0},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "penalty": {"repetition_penalty": 1.5},
    "reward": {"repetition_penalty": 0.7},
    "top_k, then top_p of what is left": {"top_k": 6, "top_p": 0.6},
    "top_p and min_p": {"top_p": 0.9, "min_p": 0.08},
    "temperature before top_p": {"temperature": 1.8, "top_p": 0.7},
    "everything": {
        "temperature": 1.4,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
    },
}


def exact(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """The probabilities [V] that transformers draws from, in float64."""
    steps = LogitsProcessorList()
    if repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1:
        steps.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        steps.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        steps.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        steps.append(MinPLogitsWarper(min_p))
    scores = steps(torch.tensor([OCCURRED]), torch.tensor(logits, dtype=torch.float64)[None])
    return scores.softmax(-1)[0].numpy()


@pytest.fixture(scope="module")
def family():
    """One is enough: sample() is the same to the letter in all files (test_copies.py)."""
    return GPT2


@pytest.fixture(scope="module")
def draw(family):
    """(logits [V], options) -> how often each token came in DRAWS draws, with a key for each."""
    sample = jax.jit(family.module.sample, static_argnames="top_k")

    def counts(logits, seed=0, **options):
        rows = jnp.tile(jnp.array(logits, jnp.float32), (DRAWS, 1))
        occurred = jnp.zeros((DRAWS, V), bool).at[:, jnp.array(OCCURRED)].set(True)
        keys = jax.random.split(jax.random.key(seed), DRAWS)
        drawn = sample(rows, keys, occurred, **sampling(**options))
        return np.bincount(drawn, minlength=V)

    return counts


def surprise(counts, probabilities):
    """How unlikely the counts are: the p-value of the chi-square test, 0 for an impossible token.

    Tokens that are expected fewer than 5 times are counted as one, as the test demands."""
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * DRAWS
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    if expected[-1] < 5:  # too few even together: to the least of the others
        expected[-2] += expected[-1]
        observed[-2] += observed[-1]
        observed, expected = observed[:-1], expected[:-1]
    if len(expected) == 1:
        return 1.0
    return chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1)


def logits_of(seed):
    return np.random.default_rng(seed).normal(scale=1.5, size=V)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_draws_follow_the_exact_distribution_of_transformers(draw, options):
    for seed in range(5):
        probabilities = exact(logits_of(seed), **options)
        counts = draw(logits_of(seed), seed, **options)
        assert surprise(counts, probabilities) > SIGNIFICANCE
        certain = probabilities * DRAWS > 30  # missing by chance: e^-30
        assert (counts[certain] > 0).all()


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"temperature": 1.1}, {}),
        ({"top_k": 6}, {"top_k": 5}),
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.5}),
        ({"min_p": 0.05}, {"min_p": 0.1}),
        ({"top_p": 0.9}, {"top_p": 0.7}),
    ],
    ids=str,
)
def test_the_chi_square_test_notices_an_option_that_is_a_little_off(draw, asked, meant):
    assert surprise(draw(logits_of(0), **asked), exact(logits_of(0), **meant)) < SIGNIFICANCE


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-44])
def test_a_temperature_near_0_is_greedy(draw, temperature):
    """1e-44 is so small that a CPU counts it as 0, by which nothing can be divided."""
    counts = draw(logits_of(0), temperature=temperature)
    assert counts[logits_of(0).argmax()] == DRAWS


def test_the_filters_keep_the_tokens_that_can_be_worked_out_by_hand(draw):
    """0.4, 0.3, 0.15, 0.1, 0.05: in an order of its own, so that sorting cannot hide an error."""
    logits = np.full(V, -1e9)
    tokens = [11, 2, 17, 5, 8]
    logits[tokens] = np.log([0.4, 0.3, 0.15, 0.1, 0.05])
    for options, kept in [
        ({}, 5),
        ({"top_k": 3}, 3),
        ({"top_p": 0.41}, 2),
        ({"top_p": 0.39}, 1),
        ({"top_p": 0.86}, 4),
        ({"min_p": 0.3}, 3),
        ({"min_p": 0.26}, 3),
        ({"min_p": 0.24}, 4),
        ({"top_k": 4, "top_p": 0.74}, 3),
        ({"top_k": 2, "top_p": 0.56}, 1),
        ({"top_p": 0.71, "min_p": 0.7}, 2),
    ]:
        found = np.flatnonzero(draw(logits, **options))
        assert found.tolist() == sorted(tokens[:kept]), options


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_top_p_keeps_of_a_whole_vocabulary_what_sorting_it_would(family, scale, monkeypatch):
    """But for tokens whose likelier ones sum to top_p to within the rounding of float32."""
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits: logits)  # not to draw
    logits = np.random.default_rng(0).normal(scale=scale, size=(3, 50257)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    probs = np.float64(jax.nn.softmax(logits.astype(np.float64)))
    order = np.argsort(-probs)
    sorted_probs = np.take_along_axis(probs, order, 1)
    likelier = np.cumsum(sorted_probs, 1) - sorted_probs
    for top_p in (1e-3, 0.05, 0.5, 0.9, 0.999):
        kept = np.isfinite(family.module.sample(jnp.array(logits), keys, top_p=top_p))
        other = np.take_along_axis(kept, order, 1) != (likelier < top_p)
        assert (abs(likelier[other] - top_p) < 1e-5).all()
        assert kept.any(axis=1).all()


def test_top_k_keeps_exactly_k_of_tokens_that_tie(draw):
    for k in (1, 3, 7):
        counts = draw(np.zeros(V), top_k=k)
        assert np.count_nonzero(counts) == k
        assert surprise(counts, (counts > 0) / k) > SIGNIFICANCE


def test_a_score_of_zero_is_a_score_and_no_mask(draw):
    logits = np.full(V, -3.0)
    logits[:3] = 0
    assert surprise(draw(logits), exact(logits)) > SIGNIFICANCE
    assert set(np.flatnonzero(draw(logits, top_k=3))) == {0, 1, 2}


def test_temperature_zero_takes_the_likeliest_token_whatever_else_is_asked(draw):
    for seed in range(3):
        counts = draw(logits_of(seed), temperature=0, top_k=5, top_p=0.5, min_p=0.1)
        assert counts.argmax() == logits_of(seed).argmax() and counts.max() == DRAWS


def test_the_penalty_lowers_both_signs_and_only_tokens_that_occurred(draw):
    logits = np.full(V, -8.0)
    logits[3], logits[4] = 2.0, 1.5  # 3 occurred
    assert draw(logits, temperature=0).argmax() == 3
    assert draw(logits, temperature=0, repetition_penalty=1.5).argmax() == 4
    logits[3], logits[4] = -1.0, -1.2
    assert draw(logits, temperature=0).argmax() == 3
    assert draw(logits, temperature=0, repetition_penalty=1.5).argmax() == 4


def test_each_row_is_drawn_from_its_own_logits_with_its_own_key(family):
    module, rows = family.module, np.stack([logits_of(seed) for seed in range(6)])
    keys = jax.random.split(jax.random.key(3), 6)
    for options in ({}, {"top_k": 4, "top_p": 0.9}):
        together = module.sample(jnp.array(rows), keys, **options)
        alone = [
            module.sample(jnp.array(rows[i : i + 1]), keys[i : i + 1], **options)[0]
            for i in range(6)
        ]
        assert together.tolist() == [int(token) for token in alone]
