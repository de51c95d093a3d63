"""From scratch: sizes, the published initialisation, dropout and rematerialisation."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.families import FAMILIES, GPT2, OPT

EVERY_PRESET = [(family, name) for family in FAMILIES for name in family.module.PRESETS]


def by_path(state):
    return {".".join(map(str, keys)): param[...] for keys, param in nnx.to_flat_state(state)}


def loss(model, tokens, rngs=None):
    logits = model(tokens[:, :-1], rngs=rngs)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -chosen.mean()


@pytest.fixture(scope="module")
def fresh(family):
    """A new model, wide enough for the spread of each matrix to be measured."""
    wider = {family.width: 96, family.depth: 3, "vocab_size": 500}
    config = family.module.Config.from_hf(family.sizes | wider)
    return family.module.Model(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens(fresh):
    return jax.random.randint(jax.random.key(5), (8, 40), 0, fresh.config.vocab_size)


@pytest.mark.core_gpt2_only("slow")
@pytest.mark.parametrize(("family", "name"), EVERY_PRESET, ids=lambda p: getattr(p, "name", p))
def test_a_preset_has_the_published_number_of_parameters(family, name):
    """Counted in shapes only: nothing is allocated, and one key serves all, as none is drawn."""
    parameters, _, _, config = family.module.PRESETS[name]
    key = jax.random.key(0)
    rngs = SimpleNamespace(params=lambda: key)
    shapes = nnx.eval_shape(lambda: family.module.Model(config, rngs=rngs))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(shapes))) == parameters


@pytest.mark.parametrize(
    ("family", "spread", "into_stream", "change"),
    [
        (GPT2, 0.02, r".+c_proj\.kernel", {}),
        (OPT, 0.006, r".+(out_proj|fc2)\.kernel", {"word_embed_proj_dim": 128}),
    ],
    ids=["gpt2", "opt"],
)
def test_a_model_starts_with_the_spreads_of_its_paper(family, spread, into_stream, change):
    """One spread everywhere, but 1 / sqrt(2 * layers) of it in what is added to the stream. The
    measured spread of n numbers is off by 1 / sqrt(2 n): less than 1% for 9,000; 4% are given."""
    sizes = family.sizes | {"vocab_size": 500, family.width: 96, family.depth: 3}
    config = family.module.Config.from_hf(sizes | {"tie_word_embeddings": False} | change)
    for path, value in by_path(nnx.state(family.module.Model(config, rngs=nnx.Rngs(0)))).items():
        if path.endswith("bias"):
            assert not value.any(), path
        elif path.endswith("scale"):
            assert (value == 1).all(), path
        else:
            expected = spread / 6**0.5 if re.fullmatch(into_stream, path) else spread
            assert abs(float(value.std()) / expected - 1) < 0.04, path
            assert abs(float(value.mean())) < 4 * expected / value.size**0.5, path


def test_no_two_matrices_start_alike(fresh):
    values = map(np.asarray, by_path(nnx.state(fresh)).values())
    starts = [value.ravel()[:64].tobytes() for value in values if value.ndim > 1]
    assert len(set(starts)) == len(starts)


def test_a_fresh_model_knows_nothing_all_tokens_are_about_equally_likely(fresh, tokens):
    assert abs(float(loss(fresh, tokens)) - np.log(fresh.config.vocab_size)) < 0.05


def test_there_is_no_dropout_unless_rngs_are_given(family, fresh, tokens):
    np.testing.assert_array_equal(fresh(tokens), fresh(tokens))
    none = dataclasses.replace(fresh.config, **dict.fromkeys(family.dropouts, 0.0))
    same = type(fresh)(none, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(fresh(tokens), same(tokens))


def test_dropout_follows_its_key(family, fresh, tokens):
    if not family.dropouts:
        pytest.skip("no dropout in this family")

    def dropped(seed):
        return np.asarray(fresh.hidden(tokens, rngs=nnx.Rngs(dropout=seed))[0])

    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert np.abs(dropped(1) - dropped(2)).max() > 0.1
    assert np.abs(dropped(1) - np.asarray(fresh.hidden(tokens)[0])).max() > 0.1


@pytest.mark.parametrize("place", GPT2.dropouts)
def test_each_kind_of_gpt2s_dropout_works_alone_and_keeps_the_mean(place):
    """The mean of 400 streams, each with another key, is the one without dropout, to within the
    standard error of such a mean, root mean square over all numbers of the stream. What a block
    adds is nearly linear in what is dropped inside it, not in its input: the embedding stands
    alone."""
    rates = dict.fromkeys(GPT2.dropouts, 0.0) | {place: 0.2}
    config = GPT2.module.Config(
        vocab_size=500,
        n_positions=64,
        n_embd=24,
        n_head=2,
        n_layer=0 if place == "embd_pdrop" else 1,
        **rates,
    )
    model = GPT2.module.Model(config, rngs=nnx.Rngs(0))
    model.ln_f = lambda x: x
    graphdef, state = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(5), (2, 12), 0, config.vocab_size)

    def stream(key):
        return nnx.merge(graphdef, state).hidden(tokens, rngs=nnx.Rngs(dropout=key))[0]

    streams = np.asarray(jax.jit(jax.vmap(stream))(jax.random.split(jax.random.key(0), 400)))
    error = streams.mean(0) - np.asarray(model.hidden(tokens)[0])
    spread = streams.std(0)
    assert spread.mean() > 1e-4
    assert np.sqrt(np.mean(error**2)) < 1.25 * np.sqrt(np.mean(spread**2)) / 400**0.5


@pytest.mark.parametrize("seed", [None, 3], ids=["no dropout", "dropout"])
@pytest.mark.core_gpt2_only
def test_remat_changes_neither_loss_nor_gradients(family, fresh, tokens, seed):
    """The same float32 steps: equal to a few roundings of gradients of 1e-3 to 1."""
    fields = {family.depth: 1}
    if hasattr(fresh.config, "layer_types"):
        fields["layer_types"] = ()  # those of one layer
    config = dataclasses.replace(fresh.config, **fields)

    def run(remat):
        graphdef, state = nnx.split(type(fresh)(config, rngs=nnx.Rngs(0), remat=remat))

        def value(state):
            rngs = None if seed is None else nnx.Rngs(dropout=seed)
            return loss(nnx.merge(graphdef, state), tokens[:2, :16], rngs)

        assert ("remat" in str(jax.make_jaxpr(value)(state))) == remat
        return jax.jit(jax.value_and_grad(value))(state)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        run(remat=False),
        run(remat=True),
    )


def test_param_dtype_is_what_is_stored_and_dtype_what_is_computed_in(family):
    config = family.module.Config.from_hf(family.sizes)
    model = family.module.Model(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    tokens = jnp.array([[1, 2, 3]])
    assert {v.dtype for v in by_path(nnx.state(model)).values()} == {jnp.dtype("float32")}
    assert model.hidden(tokens)[0].dtype == jnp.bfloat16
    assert model(tokens).dtype == jnp.float32
