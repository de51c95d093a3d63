"""Experts: the plain mixture, and two forms of it that do only the chosen work.

qwen.py has the forms of mistral.py, but for the names of the matrices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers.families import MISTRAL, QWEN
from jax.nn import silu

import mistral
import qwen

N, D, F, E, CHOSEN = 96, 16, 24, 8, 2
SIZES = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def experts():
    config = mistral.Config("mixtral", **SIZES, initializer_range=0.3)
    return [mistral.Expert(config, rngs=nnx.Rngs(e)) for e in range(E)]


def choices(n, seed=0):
    """The arguments that come after the experts: rows, and who goes where, sorted by expert."""
    rng = np.random.default_rng(seed)
    rows = jnp.array(rng.normal(size=(n, D)), jnp.float32)
    chosen = np.array([rng.choice(E, CHOSEN, replace=False) for _ in range(n)])
    order = np.argsort(chosen.ravel(), kind="stable")
    weight = rng.uniform(size=n * CHOSEN).astype(np.float32)
    counts = np.bincount(chosen.ravel(), minlength=E)
    return rows, jnp.array(order // CHOSEN), jnp.array(weight[order]), jnp.array(counts)


def dense(experts, rows, token, weight, counts):
    """One choice after the other, in NumPy."""
    out, expert = np.zeros(rows.shape), np.repeat(np.arange(E), counts)
    for t, w, e in zip(token, weight, expert, strict=True):
        w1, w3, w2 = (getattr(experts[e], name).kernel[...] for name in ("w1", "w3", "w2"))
        out[t] += w * ((silu(rows[t] @ w1) * (rows[t] @ w3)) @ w2)
    return out


@pytest.mark.parametrize(
    "run", [mistral.run_in_blocks, mistral.run_ragged], ids=["blocks", "ragged"]
)
@pytest.mark.parametrize("n", [1, 5, N])
def test_both_forms_are_the_weighted_sum_of_the_chosen_experts(experts, run, n):
    inputs = choices(n)
    np.testing.assert_allclose(run(experts, *inputs), dense(experts, *inputs), rtol=0, atol=1e-5)


MIXTURES = {
    mistral: mistral.Config("mixtral", **SIZES, num_local_experts=E, initializer_range=0.3),
    qwen: qwen.Config(
        "qwen3_moe",
        **SIZES,
        num_key_value_heads=None,
        moe_intermediate_size=F,
        num_experts=E,
        num_experts_per_tok=CHOSEN,
        initializer_range=0.3,
    ),
}


@pytest.mark.parametrize("module", MIXTURES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("form", "unrolled"), [("run_in_blocks", 16), ("run_in_blocks", 1), ("run_ragged", 16)]
)
@pytest.mark.parametrize("n", [1, N])
def test_the_faster_forms_are_the_plain_mixture(module, form, unrolled, n, monkeypatch):
    """Experts as a whole: results, router_stats, and the gradients of both."""
    monkeypatch.setattr(module, "MOST_UNROLLED", unrolled)
    graphdef, state = nnx.split(module.Experts(MIXTURES[module], rngs=nnx.Rngs(0)))
    x = jnp.array(np.random.default_rng(1).normal(size=(1, n, D)), jnp.float32)
    real = jnp.arange(n)[None] % 3 < 2  # every third token is padding

    def loss(state, x):
        y, router_stats = nnx.merge(graphdef, state)(x, real)
        return (y**2).mean() + router_stats[1].max(), (y, router_stats)

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    monkeypatch.setattr(module, "run_in_blocks", getattr(module, form))  # which a CPU calls
    fast = jax.tree.leaves(step(state, x))
    monkeypatch.setattr(module, "is_sparse", lambda experts: False)
    monkeypatch.setattr(module, "run_sorted", None)  # must not be called
    plain = jax.tree.leaves(step(state, x))
    for one, other in zip(fast, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_the_plain_mixture_runs_where_all_experts_are_chosen(experts):
    config = mistral.Config(
        "mixtral", num_local_experts=experts, num_experts_per_tok=min(2, experts)
    )
    layer = nnx.eval_shape(lambda: mistral.Experts(config, rngs=nnx.Rngs(0)))
    assert mistral.is_sparse(layer) == (experts == 4)


@pytest.mark.parametrize("block", [1, 7, 32, 128])
def test_the_size_of_a_block_changes_nothing(experts, block):
    inputs = choices(N)
    found = mistral.run_in_blocks(experts, *inputs, block=block)
    np.testing.assert_allclose(found, dense(experts, *inputs), rtol=0, atol=1e-5)


def test_both_forms_have_the_same_gradients(experts):
    graphdef, state = nnx.split(nnx.List(experts))
    rows, *rest = choices(N)

    def gradients(run):
        def loss(state, rows):
            return (run(nnx.merge(graphdef, state), rows, *rest) ** 2).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(state, rows))

    for one, other in zip(
        gradients(lambda *a: mistral.run_in_blocks(*a, block=16)),
        gradients(mistral.run_ragged),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("n", "block", "most"), [(1, 128, CHOSEN), (4, 4, 4 * CHOSEN), (N, 8, N * CHOSEN // 8 + E)]
)
def test_only_the_chosen_work_is_done_in_blocks(n, block, most):
    """Each expert counts its blocks; one that nobody chose is not called at all."""
    calls = []

    def expert(e):
        def run(rows):
            jax.debug.callback(lambda: calls.append(e))
            return rows

        return run

    inputs = choices(n)
    run = jax.jit(
        lambda *inputs: mistral.run_in_blocks([expert(e) for e in range(E)], *inputs, block=block)
    )
    run(*inputs).block_until_ready()
    jax.effects_barrier()
    assert 0 < len(calls) <= most
    assert set(calls) == set(np.flatnonzero(inputs[3]).tolist())


@pytest.mark.parametrize(
    ("run", "platform"), [(mistral.run_in_blocks, "cpu"), (mistral.run_ragged, "cuda")]
)
def test_no_program_holds_all_tokens_for_all_experts(experts, run, platform):
    """Read in the program before the compiler: no tensor of experts x tokens x anything."""
    graphdef, state = nnx.split(nnx.List(experts))
    program = jax.jit(lambda state, *rest: run(nnx.merge(graphdef, state), *rest))
    text = program.trace(state, *choices(N)).lower(lowering_platforms=(platform,)).as_text()
    for tokens in (N, N * CHOSEN):
        assert f"tensor<{E}x{tokens}x" not in text and f"tensor<{tokens}x{E}x" not in text
    assert ("ragged_dot" in text) == (run is mistral.run_ragged)


@pytest.mark.parametrize("module", MIXTURES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_quantized_experts_run_on_a_gpu_too(module, kind, monkeypatch):
    """Where more rows than experts would take the ragged form, which knows no quantized weights."""
    layer = module.Experts(MIXTURES[module], rngs=nnx.Rngs(0))
    for expert in layer.experts:
        for name, linear in list(vars(expert).items()):
            if isinstance(linear, nnx.Linear):
                setattr(expert, name, module.QuantizedLinear(linear, kind))
    x = jnp.array(np.random.default_rng(1).normal(size=(1, N, D)), jnp.float32)
    real = jnp.ones((1, N), bool)
    expected, _ = layer(x, real)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found, _ = layer(x, real)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_many_experts_are_one_loop_in_the_program(kind, monkeypatch):
    """It is no longer for 32 experts than for 17; quantized experts run in it, too."""

    def program(experts):
        config = qwen.Config(
            "qwen3_moe",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=32,
            num_experts=experts,
        )
        model = qwen.Model(config, rngs=nnx.Rngs(0))
        if kind is not None:
            qwen.quantize_layers(model, kind)
        graphdef, state = nnx.split(model)
        run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
        tokens = np.arange(12).reshape(2, 6)
        return run(state, tokens), str(jax.make_jaxpr(run)(state, tokens)).count("dot_general")

    logits, operations = program(32)
    assert operations == program(17)[1]
    monkeypatch.setattr(qwen, "MOST_UNROLLED", 32)
    np.testing.assert_allclose(logits, program(32)[0], rtol=0, atol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("family", "name"),
    [
        (MISTRAL, "8 experts"),
        (MISTRAL, "4 experts, one at a time"),
        (QWEN, "8 experts"),
        (QWEN, "3 experts in some layers, windows, yarn"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_balance_loss_is_that_of_transformers(make_case, family, name):
    case = make_case(family, name)
    _, cache = case.model.hidden(jnp.array(case.tokens))
    with torch.no_grad():
        theirs = case.hf32(torch.tensor(case.tokens), output_router_logits=True).aux_loss
    assert float(family.module.balance_loss(cache)) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize("family", [MISTRAL, QWEN], ids=lambda family: family.name)
def test_the_balance_loss_does_not_count_padding(make_case, family):
    case = make_case(family, "8 experts")
    mask = np.ones(case.tokens.shape, int)
    mask[0, :5] = 0
    mask[2, :11] = 0
    positions = np.where(mask, mask.cumsum(axis=1) - 1, -1)
    _, cache = case.model.hidden(jnp.array(case.tokens), positions)
    options = {"attention_mask": torch.tensor(mask), "output_router_logits": True}
    with torch.no_grad():
        theirs = case.hf32(torch.tensor(case.tokens), **options).aux_loss
    assert float(family.module.balance_loss(cache)) == pytest.approx(float(theirs), rel=1e-5)
