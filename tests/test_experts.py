"""Experts: the plain mixture, and three forms of it that do only the chosen work.

qwen.py has the forms of mistral.py.
"""

from functools import partial

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
    return mistral.Experts(MIXTURES[mistral], rngs=nnx.Rngs(0)).experts


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
        w1, w3, w2 = (getattr(experts, name).kernel[e] for name in ("w1", "w3", "w2"))
        out[t] += w * ((silu(rows[t] @ w1) * (rows[t] @ w3)) @ w2)
    return out


FORMS = [mistral.run_one_by_one, mistral.run_in_blocks, mistral.run_ragged]


@pytest.mark.parametrize("run", FORMS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("n", [1, 5, N])
def test_all_forms_are_the_weighted_sum_of_the_chosen_experts(experts, run, n):
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


def call(layer, n):
    """A layer of experts on n tokens, every third of which is padding: what is to be compared."""
    graphdef, state = nnx.split(layer)
    x = jnp.array(np.random.default_rng(1).normal(size=(1, n, D)), jnp.float32)
    real = jnp.arange(n)[None] % 3 < 2

    def loss(state, x):
        y, router_stats = nnx.merge(graphdef, state)(x, real)
        return (y**2).mean() + router_stats[1].max(), (y, router_stats)

    is_float = all(jnp.issubdtype(param.dtype, jnp.floating) for param in jax.tree.leaves(state))
    if is_float:
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)
    return loss(state, x)


def assert_plain(found, module, layer, n, monkeypatch, tolerance=1e-5):
    """The results, router_stats and gradients (if there are any) are those of the plain form."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "is_sparse", lambda experts: False)
        patch.setattr(module, "run_sorted", None)  # must not be called
        plain = call(layer, n)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        one, other = np.float32(one), np.float32(other)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("module", MIXTURES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("form", ["run_one_by_one", "run_in_blocks", "run_ragged"])
@pytest.mark.parametrize("n", [1, 8, N])
def test_the_faster_forms_are_the_plain_mixture(module, form, n, monkeypatch):
    """Experts as a whole: results, router_stats, and the gradients of both."""
    layer = module.Experts(MIXTURES[module], rngs=nnx.Rngs(0))
    with monkeypatch.context() as patch:
        for name in ("run_one_by_one", "run_in_blocks"):  # which a CPU calls
            patch.setattr(module, name, getattr(module, form))
        found = call(layer, n)
    assert_plain(found, module, layer, n, monkeypatch)


@pytest.mark.parametrize("kind", [None, "int8", "int4", "bfloat16"])
@pytest.mark.parametrize("n", [1, 8, 20, N])
def test_128_experts_are_the_plain_mixture(n, kind, monkeypatch):
    """A choice at a time for one row and for eight, then in blocks, of copied experts at last."""
    config = qwen.replace(MIXTURES[qwen], hidden_size=64, moe_intermediate_size=32, num_experts=128)
    monkeypatch.setattr(qwen, "EXPERT_TILE", 200)
    monkeypatch.setattr(qwen, "TILE", 200)
    monkeypatch.setitem(globals(), "D", 64)
    layer = qwen.Experts(qwen.replace(config, num_experts_per_tok=8), rngs=nnx.Rngs(0))
    if kind is not None:
        quantize(qwen, layer, kind)
    assert_plain(call(layer, n), qwen, layer, n, monkeypatch)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", [1, 8, N])
def test_half_precision_is_that_of_the_plain_mixture(n, dtype, monkeypatch):
    """A bfloat16 has 8 digits, after which each form rounds elsewhere. Gradients reach all weights,
    although matrices in bfloat16 are read as integers."""
    options = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    layer = mistral.Experts(MIXTURES[mistral], rngs=nnx.Rngs(0), **options)
    found = call(layer, n)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[1]))
    assert_plain(found, mistral, layer, n, monkeypatch, tolerance=0.03)


@pytest.mark.parametrize("module", MIXTURES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("n", [1, 8, N])
def test_an_expert_that_overflows_spoils_only_the_tokens_that_chose_it(module, n, monkeypatch):
    """In the plain form, too, where it runs for all tokens: 0 times infinity must be 0."""
    layer = module.Experts(MIXTURES[module], rngs=nnx.Rngs(0))
    x = jnp.array(np.random.default_rng(1).normal(size=(1, n, D)), jnp.float32)
    real = jnp.ones((1, n), bool)
    expected, _ = layer(x, real)
    _, chosen, _ = layer.route(x[0])
    last = chosen[0, -1]
    spoiled = (chosen == last).any(axis=1)
    for name in vars(layer.experts):
        kernel = getattr(getattr(layer.experts, name), "kernel", None)
        if kernel is not None:
            kernel.set_value(kernel[...].at[last].set(jnp.inf))
    for sparse in (True, False):
        monkeypatch.setattr(module, "is_sparse", lambda experts, sparse=sparse: sparse)
        found, _ = layer(x, real)
        np.testing.assert_allclose(found[0][~spoiled], expected[0][~spoiled], rtol=0, atol=1e-5)
        assert not np.isfinite(found[0][spoiled]).any()


@pytest.mark.parametrize("run", [mistral.run_one_by_one, mistral.run_in_blocks])
def test_an_expert_with_a_weight_of_0_adds_nothing_even_if_it_overflows(run):
    """A router's softmax may make the weight of a chosen expert 0 exactly. Not for `run_ragged`,
    as ragged_dot on a CPU multiplies all rows with all matrices."""
    experts = mistral.Experts(MIXTURES[mistral], rngs=nnx.Rngs(0)).experts
    rows, token, weight, counts = choices(N)
    weight = weight.at[-counts[-1] :].set(0)  # those of the last expert
    expected = run(experts, rows, token, weight, counts)
    for name in ("w1", "w3", "w2"):
        kernel = getattr(experts, name).kernel
        kernel.set_value(kernel[...].at[-1].set(jnp.inf))
    np.testing.assert_array_equal(run(experts, rows, token, weight, counts), expected)


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


def test_all_forms_have_the_same_gradients(experts):
    graphdef, state = nnx.split(experts)
    rows, *rest = choices(N)

    def gradients(run):
        def loss(state, rows):
            return (run(nnx.merge(graphdef, state), rows, *rest) ** 2).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(state, rows))

    ragged = gradients(mistral.run_ragged)
    for run in (mistral.run_one_by_one, partial(mistral.run_in_blocks, block=16)):
        for one, other in zip(gradients(run), ragged, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("n", "block", "most"),
    [
        (1, 128, CHOSEN),
        (4, 4, 4 * CHOSEN),
        (60, 8, 60 * CHOSEN // 8 + E),
        (N, 8, N * CHOSEN // 8 + E),
    ],
)
def test_only_the_chosen_work_is_done_in_blocks(experts, n, block, most, monkeypatch):
    """An expert counts its blocks; one that nobody chose is not called at all."""
    calls = []
    w1 = np.asarray(experts.w1.kernel[:, 0, 0])  # tells the experts apart

    def run(self, rows):
        jax.debug.callback(
            lambda w: calls.append(int(np.flatnonzero(w1 == w)[0])), self.w1.kernel[0, 0]
        )
        return rows

    def run_at(experts, e):
        def expert(rows):
            jax.debug.callback(lambda e: calls.append(int(e)), e)
            return rows

        return expert

    monkeypatch.setattr(mistral.Expert, "__call__", run)  # of an expert that the scan has copied
    monkeypatch.setattr(mistral, "expert_at", run_at)  # of one that is read in place
    inputs = choices(n)
    jax.jit(partial(mistral.run_in_blocks, block=block))(experts, *inputs).block_until_ready()
    jax.effects_barrier()
    assert 0 < len(calls) <= most
    assert set(calls) == set(np.flatnonzero(inputs[3]).tolist())


@pytest.mark.parametrize(
    ("run", "platform"), [(mistral.run_in_blocks, "cpu"), (mistral.run_ragged, "cuda")]
)
def test_no_program_holds_all_tokens_for_all_experts(experts, run, platform):
    """Read in the program before the compiler: no tensor of experts x tokens x anything."""
    graphdef, state = nnx.split(experts)
    program = jax.jit(lambda state, *rest: run(nnx.merge(graphdef, state), *rest))
    text = program.trace(state, *choices(N)).lower(lowering_platforms=(platform,)).as_text()
    for tokens in (N, N * CHOSEN):
        assert f"tensor<{E}x{tokens}x" not in text and f"tensor<{tokens}x{E}x" not in text
    assert ("ragged_dot" in text) == (run is mistral.run_ragged)


def quantize(module, layer, kind):
    """Quantizes the experts of a layer."""
    for name, linear in list(vars(layer.experts).items()):
        if isinstance(linear, nnx.Linear):
            setattr(layer.experts, name, module.QuantizedLinear(linear, kind))


@pytest.mark.parametrize("module", MIXTURES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_quantized_experts_run_on_a_gpu_too(module, kind, monkeypatch):
    """Where more rows than experts would take the ragged form, which knows no quantized weights."""
    layer = module.Experts(MIXTURES[module], rngs=nnx.Rngs(0))
    quantize(module, layer, kind)
    x = jnp.array(np.random.default_rng(1).normal(size=(1, N, D)), jnp.float32)
    real = jnp.ones((1, N), bool)
    expected, _ = layer(x, real)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found, _ = layer(x, real)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 64], ids=["one by one", "in place", "copied"])
def test_many_experts_are_no_more_arrays_and_no_longer_program_than_few(kind, rows):
    def sizes(experts):
        """(arrays in the model, products in the program, lines of the compiled program)"""
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
            num_experts_per_tok=8,
        )
        model = qwen.Model(config, rngs=nnx.Rngs(0))
        if kind is not None:
            qwen.quantize_layers(model, kind)
        graphdef, state = nnx.split(model)
        run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
        tokens = np.arange(6 * rows).reshape(rows, 6)[:, : 1 if rows == 1 else 6] % 64
        products = str(jax.make_jaxpr(run)(state, tokens)).count("dot_general")
        lines = run.lower(state, tokens).compile().as_text().count("\n")
        return len(jax.tree.leaves(state)), products, lines

    few, many = sizes(10), sizes(12)
    if rows == 2:
        few, many = sizes(17), sizes(32)
    assert few[:2] == many[:2]
    assert abs(few[2] - many[2]) < 0.02 * few[2]


@pytest.mark.parametrize("module", MIXTURES, ids=lambda module: module.__name__)
def test_each_expert_is_drawn_by_itself_and_a_skeleton_traces_one_for_a_layer(module, monkeypatch):
    stack = module.Experts(MIXTURES[module], rngs=nnx.Rngs(0)).experts
    kernels = [param[...] for param in jax.tree.leaves(nnx.state(stack))]
    starts = {np.asarray(matrix).tobytes() for kernel in kernels for matrix in kernel}
    assert len(starts) == 3 * E
    for kernel in kernels:
        np.testing.assert_allclose(kernel.std(axis=(1, 2)), 0.3, rtol=0.15)

    made = []
    kind = type(stack)
    init = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, *a, **k: made.append(init(self, *a, **k)))
    config = module.replace(MIXTURES[module], num_hidden_layers=3, layer_types=())
    module.skeleton(config)
    assert len(made) == 3


@pytest.mark.parametrize("module", MIXTURES, ids=lambda module: module.__name__)
def test_a_stack_has_a_name_for_each_expert(module):
    config = module.replace(MIXTURES[module], num_hidden_layers=1, layer_types=())
    found = {}
    for path, param, template, transposed in module.named_parameters(module.skeleton(config)[1]):
        if "experts" in path:
            found[path] = module.names_of(template, param)
            assert transposed
    assert len(found) == 3
    for path, names in found.items():
        stem, _, kind = path.removesuffix(".kernel").rpartition(".")
        assert names == [f"model.{stem}.{e}.{kind}.weight" for e in range(E)]


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
