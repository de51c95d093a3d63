"""train.py: what a step computes, and what a whole run leaves behind."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiktoken
import torch
import transformers
from flax import nnx
from helpers.small import DAMAGES, write_checkpoint
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
MATERIAL = ROOT.parent / "shared/material"
SHAKESPEARE = MATERIAL / "texts/tinyshakespeare.txt"
TIKTOKEN = MATERIAL / "gpt2-tokenizer/tiktoken-cache"
sys.path.insert(0, str(ROOT))

import gemma  # noqa: E402
import gpt2  # noqa: E402
import mistral  # noqa: E402
import train  # noqa: E402

TEXT = "Größe, naïve: 日本 🙂\r\n\ttwo  spaces, 1234\n\n\n" + "".join(
    f"The {n} of {n * n} said: 'I'll go', and went {n % 7} miles.\n" for n in range(400)
)
SMALL = "--layers 1 --heads 2 --width 32 --block 16 --batch 4 --steps 8 --eval-every 4 --device cpu"


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Programs that one process compiled, the others take from here: half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    return file


def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *SMALL.split(), *map(str, flags)]


def run(*flags, env=None, **options):
    """Runs train.py with the flags (a later one wins) and returns the finished process."""
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(TIKTOKEN)} | (env or {})
    return subprocess.run(
        command(*flags), capture_output=True, text=True, timeout=600, env=env, **options
    )


def curve(stderr):
    """(step, train loss, validation loss) of the lines on standard error."""
    pattern = r"step +(\d+)/\d+ +train \(mean\) ([\d.]+) +val \(last\) ([\d.]+)"
    found = re.findall(pattern, stderr)
    return [(int(step), float(loss), float(val)) for step, loss, val in found]


def small_model(**options):
    config = gpt2.Config(
        vocab_size=50,
        padded_vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        **{"n_positions": 16, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0} | options,
    )
    return gpt2.Model(config, rngs=nnx.Rngs(0))


def some_tokens():
    return np.random.default_rng(1).integers(50, size=(3, 17)).astype(np.int32)


def some_settings(**options):
    return Namespace(
        **{
            "lr": 1e-2,
            "min_lr": 1e-3,
            "warmup": 0,
            "steps": 100,
            "accumulate": 1,
            "beta1": 0.9,
            "beta2": 0.99,
            "weight_decay": 0.1,
            "clip": 1.0,
            "optimizer": "adamw",
            "ema": 0.0,
            "schedule": "cosine",
            "dtype": "float32",
            "prune": None,
        }
        | options
    )


def some_step(model=None, balance=None, parts=1, **options):
    """(a function that takes a step, the state before it) on `some_tokens` or others."""
    settings = some_settings(**options)
    graphdef, params = nnx.split(model or small_model())
    optimizer, _ = train.make_optimizer(settings)
    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
    state = jax.tree.map(jnp.copy, train.first_state(settings, optimizer, params, mesh))
    build_model = train.make_build_model(
        mesh, graphdef, jnp.float32, state["params"], nnx.State({})
    )
    config = train.StepConfig(build_model, optimizer, balance, settings.ema)
    step, _ = train.compile_steps(config, mesh, state)

    def take(state, tokens=some_tokens()):  # noqa: B008
        batch = train.next_tokens(tokens.reshape(parts, 1, -1, 17))
        return step(jax.tree.map(jnp.copy, state), nnx.State({}), batch, jax.random.key(0))

    return take, state


# -------------------------------------------------------------------------------------------- steps


def test_the_loss_is_the_mean_negative_log_probability_of_the_next_token():
    model, tokens = small_model(), some_tokens()
    log_probs = jax.nn.log_softmax(model(tokens[:, :-1]))
    expected = -np.take_along_axis(np.array(log_probs), tokens[:, 1:, None], axis=2)[..., 0]
    # Both in float32, 50 terms in a sum: a few units of the seventh digit.
    np.testing.assert_allclose(
        train.token_losses(model, train.next_tokens(tokens))[0], expected, rtol=1e-5
    )


def test_padding_counts_for_nothing():
    model, tokens = small_model(), some_tokens()
    padded = np.concatenate([tokens[:, :10], np.full((3, 7), -1, np.int32)], axis=1)
    losses, right, _ = train.token_losses(model, train.next_tokens(padded))
    expected, _, _ = train.token_losses(model, train.next_tokens(tokens))
    np.testing.assert_allclose(losses[:, :9], expected[:, :9], rtol=1e-5)
    assert not losses[:, 9:].any() and not right[:, 9:].any()


def test_a_token_is_guessed_where_no_other_is_likelier():
    model, tokens = small_model(), some_tokens()
    likeliest = np.array(model(tokens[:, :-1])).argmax(axis=2)
    tokens[0, 1:6] = likeliest[0, 0]
    right = train.token_losses(model, train.next_tokens(tokens))[1]
    likeliest = np.array(model(tokens[:, :-1])).argmax(axis=2)
    assert (right == (likeliest == tokens[:, 1:])).all() and right.any()


def test_loss_and_gradients_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    model, tokens = small_model(), some_tokens()
    gpt2.save(model, tmp_path)
    graphdef, params = nnx.split(model)
    loss, gradients = jax.value_and_grad(
        lambda params: train.token_losses(nnx.merge(graphdef, params), train.next_tokens(tokens))[
            0
        ].mean()
    )(params)

    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    logits = theirs(torch.tensor(tokens[:, :-1])).logits
    their_loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(tokens[:, 1:]).long().flatten()
    )
    their_loss.backward()
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-6)
    their_gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    gpt2.save(nnx.merge(graphdef, gradients), tmp_path)  # and so they get the names of a checkpoint
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == their_gradients.keys()
    for name, gradient in ours.items():
        # Sums of 48 tokens in float32, in another order: 1e-5 of the largest entry is ample.
        np.testing.assert_allclose(
            gradient, their_gradients[name], err_msg=name, atol=1e-5 * np.abs(gradient).max()
        )


def test_weight_decay_shrinks_matrices_and_nothing_else():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    optimizer, rate = train.make_optimizer(some_settings())
    still = jax.tree.map(jnp.zeros_like, params)  # no gradient: only decay can move anything
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * rate(0), rtol=1e-6)
    assert not updates["bias"].any() and not updates["scale"].any()


def test_the_learning_rate_rises_and_falls_to_its_minimum():
    _, rate = train.make_optimizer(some_settings(warmup=10))
    assert 0 < rate(0) < rate(5) < rate(10) and float(rate(10)) == pytest.approx(1e-2)
    assert rate(10) > rate(50) > rate(99) and float(rate(100)) == pytest.approx(1e-3)


def test_the_rate_falls_along_a_line_or_in_the_last_fifth_alone():
    _, linear = train.make_optimizer(some_settings(schedule="linear"))
    assert float(linear(50)) == pytest.approx(5.5e-3) and float(linear(100)) == pytest.approx(1e-3)
    _, wsd = train.make_optimizer(some_settings(schedule="wsd", warmup=10))
    assert wsd(10) == wsd(79) == np.float32(1e-2)
    assert float(wsd(90)) == pytest.approx(5.5e-3) and float(wsd(100)) == pytest.approx(1e-3)


@pytest.mark.parametrize(("warmup", "steps"), [(90, 100), (99, 100), (0, 1), (1, 3), (0, 4)])
def test_wsd_falls_however_long_it_warms_up_and_however_few_steps_there_are(warmup, steps):
    settings = some_settings(schedule="wsd", warmup=warmup, steps=steps)
    _, rate = train.make_optimizer(settings)
    assert float(rate(warmup)) == pytest.approx(1e-2)
    assert float(rate(steps)) == pytest.approx(1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [2, 3, 5, 9, 10, 100])
def test_the_last_step_has_a_lower_rate_than_the_highest(schedule, steps):
    _, rate = train.make_optimizer(some_settings(schedule=schedule, steps=steps))
    assert rate(steps - 1) < 0.9e-2


@pytest.mark.parametrize(
    "optimizer, lr", [("adamw", 1e-2), ("lion", 3e-3), ("adafactor", 1e-1), ("muon", 1e-2)]
)
def test_steps_lower_the_loss(optimizer, lr):
    step, state = some_step(optimizer=optimizer, lr=lr, min_lr=lr / 10)
    losses = []
    for _ in range(30):  # the same batch again and again, which a model learns by heart
        state, found = step(state)
        losses.append(float(found["loss"]))
    assert losses[0] == pytest.approx(np.log(50), rel=0.05)  # at first every token is as likely
    assert losses[-1] < 0.7 * losses[0] and int(state["step"]) == 30


def test_muon_is_for_kernels_and_tables_are_left_to_adamw():
    params = nnx.state(small_model())
    optimizer, _ = train.make_optimizer(some_settings(optimizer="muon", weight_decay=0.0))
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    kernel = updates["h"][0]["mlp"]["c_fc"]["kernel"][...]
    assert np.linalg.matrix_rank(kernel) == 1  # ones have one direction; AdamW would keep it too
    assert np.abs(kernel).max() < 1e-3  # but not spread its length over 32 x 128 weights
    # The first step of AdamW has the rate's size, and half as much again with Nesterov's momentum.
    np.testing.assert_allclose(updates["wte"]["embedding"][...], -1.5e-2, rtol=0.05)


def one_update(params, optimizer, gradients):
    """What each parameter changes by in one step with these gradients."""
    transform, _ = train.make_optimizer(some_settings(optimizer=optimizer))
    updates, _ = transform.update(gradients, transform.init(params), params)
    return updates


def test_muon_leaves_an_untied_head_to_adamw():
    params = nnx.state(small_model(tie_word_embeddings=False))
    updates = one_update(params, "muon", jax.tree.map(jnp.ones_like, params))
    head = updates["lm_head"]["kernel"][...]
    assert np.abs(head).min() > 1e-2  # the first step of AdamW has the size of the learning rate


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon"])
def test_tables_and_heads_decay_as_all_matrices_do(optimizer):
    params = nnx.state(small_model(tie_word_embeddings=False))
    still = one_update(params, optimizer, jax.tree.map(jnp.zeros_like, params))
    for name, leaf in [("wte", "embedding"), ("wpe", "embedding"), ("lm_head", "kernel")]:
        matrix = params[name][leaf][...]
        np.testing.assert_allclose(still[name][leaf][...], -1e-2 * 0.1 * matrix, rtol=1e-4)


def test_muon_updates_both_matrices_of_an_adapter(monkeypatch):
    """And at the size of its rate: it orthogonalizes them."""
    rng = np.random.default_rng(0)
    params = {"lora_a": rng.normal(size=(32, 4)), "lora_b": rng.normal(size=(4, 32))}
    params = jax.tree.map(jnp.float32, params)
    gradients = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
    for update in one_update(params, "muon", gradients).values():
        singular = np.linalg.svd(np.asarray(update), compute_uv=False)
        assert singular.min() > 0.3 * singular.max() > 0


def test_muon_orthogonalizes_each_matrix_of_a_stack_of_experts_by_itself():
    rng = np.random.default_rng(0)
    stack = jnp.float32(rng.normal(size=(3, 16, 24)))
    gradients = jnp.float32(rng.normal(size=(3, 16, 24)))
    together = one_update({"stack": stack}, "muon", {"stack": gradients})["stack"]
    alone = one_update([*stack], "muon", [*gradients])
    # The gradients of all are clipped to the same norm in both.
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=0, atol=1e-6)


def test_dropout_is_drawn_anew_in_each_step_and_is_off_in_evaluation():
    step, state = some_step(small_model(embd_pdrop=0.5))
    later = state | {"step": state["step"] + 1}
    assert step(state)[1]["loss"] == step(state)[1]["loss"] != step(later)[1]["loss"]
    graphdef, params = nnx.split(small_model(embd_pdrop=0.5))
    plain = train.token_losses(small_model(), train.next_tokens(some_tokens()))[0].sum()
    config = train.StepConfig(partial(nnx.merge, graphdef), None, None, 0.0)
    found, _ = train.eval_step(config, params, nnx.State({}), train.next_tokens(some_tokens()))
    assert float(found) == pytest.approx(float(plain))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (119.7, "2:00"), (3599.9, "1:00:00")]
)
def test_a_time_is_rounded_as_a_whole(seconds, text):
    assert train.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1234, "1,234 rows")]
)
def test_what_is_counted_is_one_or_several(number, text):
    assert train.counted(number, "row") == text


def some_run(steps_done=0):
    """What `print_progress` and `log_steps` need of a run."""
    rows = [{"step": step, "loss": 2.0, "lr": 1e-3} for step in range(1, steps_done + 1)]
    metrics = Namespace(rows=rows)
    metrics.add = metrics.rows.extend
    clock = train.Clock()
    clock.seconds = 1.0
    return Namespace(
        args=Namespace(eval_every=5, steps=2000, batch=8, block=64, prune=None),
        step=steps_done,
        resumed_at=0,
        metrics=metrics,
        waiting=[],
        clock=clock,
        shown=0.0,
        flops_per_token=10**6,
        peak_flops=10**11,
        val_loss=2.5,
        learning_rate=lambda step: 1e-3,
        mesh=jax.sharding.Mesh(jax.devices()[:1], "data"),
    )


@pytest.mark.parametrize("columns", [20, 60, 80, 120])
def test_the_progress_line_fits_the_terminal(columns, monkeypatch, capsys):
    run = some_run(steps_done=10)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    train.print_progress(run, end="\r")
    line = capsys.readouterr().err.strip("\r")
    assert len(line) == columns - 1 and line.startswith("step     10/2000")
    assert (columns < 60) or "train (mean) 2.0000  val (last) 2.5000" in line
    assert (columns < 120) or line.rstrip().endswith("MFU  4.6%")


@pytest.mark.parametrize(("terminal", "shown"), [(True, [2, 4, 6]), (False, [])])
def test_a_terminal_shows_slow_steps_as_they_come(terminal, shown, monkeypatch, capsys):
    """Here six steps are in flight, and each takes a second and a half."""
    now = 0.0

    class Loss:
        def __float__(self):
            nonlocal now
            now += 1.5
            return 2.0

    monkeypatch.setattr(train, "time", Namespace(monotonic=lambda: now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    run = some_run()
    run.step = 6
    run.waiting = [{"loss": Loss(), "lr": 1e-3} for _ in range(6)]
    train.log_steps(run)
    lines = capsys.readouterr().err.split("\r")
    assert [int(line[4:].split("/")[0]) for line in lines if line.startswith("step")] == shown
    assert [row["step"] for row in run.metrics.rows] == [1, 2, 3, 4, 5, 6] and not run.waiting


@pytest.mark.parametrize(("overdue", "expected"), [(True, [*range(1, 13)]), (False, [1, 10, 12])])
def test_steps_are_read_when_the_progress_line_is_overdue(overdue, expected, monkeypatch):
    """And else every tenth, and the first and the last: reading waits for the device."""
    read = []
    run = some_run()
    run.args = Namespace(seed=0, steps=12, eval_every=50, save_every=0, profile=None, prune=None)
    run.args = Namespace(**vars(run.args), eval_first=False, patience=0, multihost=None)
    run.stopped = run.out_of_patience = False
    run.state = run.learned = run.frozen = run.prompt = None
    run.metrics.divergence = lambda after: ""
    run.train_step = lambda *_: (None, {"loss": 2.0})
    for name in ("say", "some_batches", "next_batch", "log_validation", "print_progress"):
        monkeypatch.setattr(train, name, lambda *_, **__: None)
    monkeypatch.setattr(train, "evaluate", lambda *_: (2.5, 0.5))
    monkeypatch.setattr(train, "is_overdue", lambda run: overdue)
    monkeypatch.setattr(train, "log_steps", lambda run: read.append(run.step))
    train.train(run, Namespace(asked=False))
    assert read == expected


def test_long_texts_are_attended_to_in_chunks_where_there_is_no_dropout():
    """Also in training: with --dropout 0, no [T, T] scores may be held."""
    model = small_model(n_positions=2049)
    graphdef, params = nnx.split(model)
    tokens = jnp.zeros((1, 2049), int)

    def loss(params, key):
        return train.token_losses(
            nnx.merge(graphdef, params), train.next_tokens(tokens), nnx.Rngs(key)
        )[0].sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params, jax.random.key(0)))
    assert "2048,2048" not in jaxpr

    graphdef, params = nnx.split(small_model(n_positions=2049, attn_pdrop=0.1))
    assert "2048,2048" in str(jax.make_jaxpr(jax.grad(loss))(params, jax.random.key(0)))


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (gpt2.Config(), [100] * 12),
        (mistral.Config(num_hidden_layers=2, sliding_window=64), [64, 64]),
        (mistral.Config(num_hidden_layers=2, sliding_window=4096), [100, 100]),
        (mistral.Config(num_hidden_layers=2), [100, 100]),
        (
            mistral.Config(
                "ministral",
                num_hidden_layers=2,
                layer_types=(mistral.FULL, mistral.SLIDING),
                sliding_window=64,
            ),
            [100, 64],
        ),
        (gemma.Config(num_hidden_layers=6, sliding_window=30), [30] * 5 + [100]),
    ],
    ids=["gpt2", "window", "wide window", "no window", "ministral", "gemma"],
)
def test_a_layer_with_a_window_is_counted_by_its_window(config, keys):
    layers = getattr(config, "num_hidden_layers", 12)
    assert train.keys_of(config, layers, 100) == keys


def assert_same(ours, expected, rtol=1e-4, atol=1e-7):
    near = partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(near, ours, expected)


def gradients_of(model, tokens):
    graphdef, params = nnx.split(model)
    return jax.grad(
        lambda p: train.token_losses(
            nnx.merge(graphdef, p), train.next_tokens(tokens), nnx.Rngs(dropout=3)
        )[0].mean()
    )(params)


def test_remat_changes_no_gradient():
    plain, again = small_model(resid_pdrop=0.5), small_model(resid_pdrop=0.5)
    again.remat = True
    # The same operations; compiled apart, so that the last bits may differ.
    assert_same(gradients_of(again, some_tokens()), gradients_of(plain, some_tokens()))


@pytest.mark.parametrize("rows", [5, 16, 47])
def test_logits_in_parts_change_no_loss_and_no_gradient(rows, monkeypatch):
    """48 rows of 50 logits: in parts of one size, with a rest, with a rest of one."""
    tokens = some_tokens()
    tokens[0, 9:] = -1
    losses, right, _ = train.token_losses(small_model(), train.next_tokens(tokens))
    expected = gradients_of(small_model(), tokens)
    monkeypatch.setattr(train, "MAX_LOGITS", rows * 50)
    in_parts, right_in_parts, _ = train.token_losses(small_model(), train.next_tokens(tokens))
    np.testing.assert_allclose(in_parts, losses, rtol=1e-6)
    assert (right_in_parts == right).all()
    # Parts are added up in another order; seven digits of float32 lose one or two.
    assert_same(gradients_of(small_model(), tokens), expected, rtol=1e-4, atol=1e-6)


def test_logits_in_parts_are_never_held_at_once(monkeypatch):
    """By what XLA says the compiled gradient needs: 4 x 512 rows of 8,192 logits take 67 MB."""

    def temporary(logits):
        monkeypatch.setattr(train, "MAX_LOGITS", logits)
        graphdef, params = nnx.split(
            gpt2.Model(
                gpt2.Config(vocab_size=8192, n_positions=512, n_embd=16, n_layer=1, n_head=1),
                rngs=nnx.Rngs(0),
            )
        )
        gradient = jax.jit(
            jax.grad(
                lambda p, tokens: train.token_losses(
                    nnx.merge(graphdef, p), train.next_tokens(tokens)
                )[0].sum()
            )
        )
        compiled = gradient.lower(params, jnp.zeros((4, 513), int)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2**28) > 67e6 and temporary(2**20) < 30e6


@pytest.mark.parametrize("parts", [2, 6])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    """Also where the parts have unlike numbers of targets."""
    tokens = np.concatenate([some_tokens(), some_tokens()[::-1]])
    tokens[1, 5:] = -1
    (whole, state), (accumulated, _) = some_step(lr=1e-4), some_step(lr=1e-4, parts=parts)
    (new, found), (new_in_parts, found_in_parts) = whole(state, tokens), accumulated(state, tokens)
    # Float32 rounding: sums in another order. Of the optimizer its two running means of gradients.
    assert_same(found_in_parts, found, rtol=1e-5)
    assert_same(new_in_parts["optimizer"], new["optimizer"], rtol=1e-3, atol=1e-8)


def test_the_moving_average_keeps_its_share():
    step, state = some_step(ema=0.9)
    new, _ = step(state)
    assert_same(
        new["ema"],
        jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, state["params"], new["params"]),
        atol=1e-6,
    )


def test_float16_scales_the_loss_and_skips_a_step_that_overflows():
    def half(**options):
        return gpt2.Model(small_model().config, rngs=nnx.Rngs(0), dtype=jnp.float16)

    step, state = some_step(half(), dtype="float16")
    new, found = step(state)
    assert float(new["scale"]) == 2**15 and np.isfinite(float(found["norm"]))
    exact, _ = some_step(half())[0](some_step(half())[1])  # the same without a scale
    assert_same(new["params"], exact["params"], rtol=0, atol=2e-2)  # a step of lr 1e-2 at most
    state["scale"] = jnp.array(2.0**40)
    new, found = step(state)
    assert_same(new["params"], state["params"], rtol=0, atol=0)
    assert float(new["scale"]) == 2**39 and int(new["step"]) == 1 and float(found["norm"]) == 0


def test_bfloat16_computes_with_float32_weights():
    model = gpt2.Model(small_model().config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    step, state = some_step(model, dtype="bfloat16")
    new, _ = step(state)
    assert all(
        p.dtype == jnp.float32 for p in jax.tree.leaves((new["params"], new["optimizer"])) if p.ndim
    )


# --------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("kind", ["char", "bytes", "bpe", "gpt2"])
def test_tokens_give_the_text_back_as_it_was(kind, monkeypatch, tmp_path):
    if kind == "gpt2" and not TIKTOKEN.exists():
        pytest.skip("needs GPT-2's vocabulary")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    (tmp_path / "text.txt").write_text(TEXT)
    train.write_tokenizer(tmp_path, kind, 300, train.Texts([tmp_path / "text.txt"]))
    codec = gpt2.tokenizer(tmp_path)
    assert codec.decode(codec.encode(TEXT)) == TEXT
    if kind == "gpt2":
        odd = "".join(map(chr, [*range(256), 0x3000, 0x4E2D, 0x1F642])) * 2 + " \n \n's 'LL\n"
        for text in (TEXT, odd, train.__doc__):
            assert codec.encode(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_windows_hold_every_token_but_the_first_as_a_target_once():
    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
    rows = train.Text(np.arange(100), 8).in_order()
    inputs, targets, _ = train.validation_batches(some_settings(block=8, batch=4), rows, mesh)
    assert inputs.shape == targets.shape == (4, 1, 4, 8)
    assert targets[targets >= 0].tolist() == list(range(1, 100))
    assert (inputs[targets >= 0] == targets[targets >= 0] - 1).all()


def test_without_data_there_is_the_standard_library():
    files = {file.name: file for file in train.find_files([])}
    assert not {"test", "tests", "site-packages"} & {
        part for file in files.values() for part in file.parts[len(Path(os.__file__).parts) - 1 :]
    }
    assert len(files) > 200 and "class ArgumentParser" in files["argparse.py"].read_text()


# ----------------------------------------------------------------------------------------- the runs


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("char", "float32"),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("bytes", "bfloat16"), ("bpe", "bfloat16")]
        ],
        pytest.param("gpt2", "float32", marks=pytest.mark.wide),
    ],
)
def test_a_finished_folder_is_read_by_the_model_file_and_by_transformers(
    kind, dtype, text_file, tmp_path
):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if kind == "gpt2" and not TIKTOKEN.exists():
        pytest.skip("needs GPT-2's vocabulary")
    out = tmp_path / "out"
    done = run(
        "--data",
        text_file,
        "--out",
        out,
        "--tokens",
        kind,
        "--vocab-size",
        300,
        "--save-dtype",
        dtype,
        "--save-every",
        0,
    )
    assert done.returncode == 0, done.stderr
    [(_, _, first), (step, _, last)] = curve(done.stderr)
    assert step == 8 and last < first
    [stated] = map(float, re.findall(r"whole text: ([\d.]+) nats per token", done.stdout))
    # The estimate is of 20 batches; and bfloat16 keeps 8 bits of each weight.
    assert stated == pytest.approx(last, abs=1e-2)
    assert f"finished: {out}, in {dtype}\n" in done.stdout
    [perplexity] = re.findall(r"perplexity ([\d.]+)", done.stdout)
    assert float(perplexity) == pytest.approx(np.exp(stated), rel=1e-3)
    assert {file.name for file in out.iterdir()} - {"tensorboard"} == {
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }

    ours, theirs = gpt2.tokenizer(out), AutoTokenizer.from_pretrained(out)
    ids = ours.encode(TEXT)
    assert ids == theirs(TEXT)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids) == TEXT
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == theirs.eos_token_id == (50256 if kind == "gpt2" else None)
    logits = gpt2.load(out, dtype=jnp.float32)(np.array([ids[:16]]))
    with torch.no_grad():
        their_model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        expected = their_model(torch.tensor([ids[:16]])).logits
    assert logits.shape[-1] == config["vocab_size"] == len(theirs)
    # float32 in another order of addition, on logits below 1.
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            flags, marks=pytest.mark.slow if flags == "--model mistral" else pytest.mark.wide
        )
        for flags in [
            "--model opt",
            "--model llama",
            "--model gemma",
            "--model mistral",
            "--model mistral --experts 4",
        ]
    ],
)
def test_every_model_file_learns_and_writes_a_folder_that_transformers_reads(
    text_file, tmp_path, flags
):
    done = run(
        "--data",
        text_file,
        "--tokens",
        "bytes",
        "--steps",
        30,
        "--out",
        tmp_path,
        "--lr",
        "1e-2",
        *flags.split(),
    )
    assert done.returncode == 0, done.stderr
    losses = [val for _, _, val in curve(done.stderr)]
    assert losses[-1] < 0.8 * np.log(256)  # bytes of this text are not all as likely
    module = importlib.import_module(flags.split()[1])
    model, codec = module.load(tmp_path), module.tokenizer(tmp_path)
    ids = torch.tensor([codec.encode("The 3 of 9 said")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    np.testing.assert_allclose(model(jnp.array(ids)), theirs.detach(), rtol=0, atol=1e-4)


@pytest.mark.wide
def test_experts_are_kept_balanced(text_file, tmp_path, monkeypatch):
    """The loss for balance is a part of what is learned: its gradient reaches the router."""
    module = importlib.import_module("mistral")
    config = module.Config("mixtral", 50, 16, 32, 64, 1, 2, 2, 16, num_local_experts=4)

    def gate_after_a_step(balance):
        step, state = some_step(module.Model(config, rngs=nnx.Rngs(0)), balance, clip=1e9)
        new, found = step(state)
        gate = new["params"]["layers"][0]["block_sparse_moe"]["gate"]["kernel"][...]
        return np.asarray(gate), float(found["loss"])

    plain, plain_loss = gate_after_a_step(None)
    balanced, loss = gate_after_a_step(lambda cache: 100 * module.balance_loss(cache))
    assert loss == plain_loss  # what is reported is that of the tokens
    assert np.abs(balanced - plain).max() > 1e-4


def test_pmap_wants_rows_for_each_device(text_file, monkeypatch, capsys):
    monkeypatch.setattr(train, "pick_devices", lambda *_: jax.devices()[:1] * 4)
    monkeypatch.setattr(sys, "argv", command("--data", text_file, "--batch", 6)[1:])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "--batch 6 does not split over 4 devices" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_the_model_that_was_there(text_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("the old one")
    flags = ["--data", text_file, "--tokens", "char", "--out", tmp_path / "out", "--save-every", 0]
    small_files = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"]  # 20 kB: the model is larger
    done = subprocess.run([*small_files, *command(*flags)], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: ")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "the old one"


def test_a_checkpoint_for_which_there_is_no_room_is_not_begun(tmp_path, monkeypatch, capsys):
    state = {"step": np.ones(()), "p": np.zeros(1000)}
    run = Namespace(
        checkpoints=train.open_checkpoints(tmp_path, 2),
        state=state,
        settings={},
        args=Namespace(out=tmp_path),
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=1000))
    with pytest.raises(SystemExit, match="2"):
        train.save_checkpoint(run, None)
    assert "a checkpoint takes" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ profile

COUNTS = """
import jax, sys, train
stats = {"bytes_in_use": 2, "peak_bytes_in_use": 3, "num_allocs": 4}
type(jax.devices("cpu")[0]).memory_stats = lambda device: stats
sys.exit(train.main())
"""


@pytest.mark.wide
def test_a_profile_shows_five_steps_and_changes_no_bit(text_file, tmp_path):
    """What the device counts of its memory is in metrics.jsonl; here the numbers are made up."""
    folder = tmp_path / "profile"
    flags = ["--data", text_file, "--tokens", "bytes", "--save-every", 0, "--steps", 16]
    plain = run(*flags, "--out", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    with_counts = [sys.executable, "-c", COUNTS, *command(*flags)[2:]]
    traced = subprocess.run(
        [*with_counts, "--out", tmp_path / "traced", "--profile", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert traced.returncode == 0, traced.stderr
    assert f"five steps are traced: run `xprof {folder}`" in traced.stderr
    assert curve(traced.stderr) == curve(plain.stderr)
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("traced", "plain"))
    assert ours.read_bytes() == theirs.read_bytes()

    [trace] = folder.glob("plugins/profile/*/*.xplane.pb")
    for name in (b"jvp(h.0)/attn/attend", b"transpose(jvp(h.0))/mlp"):  # forward and backward
        assert name in trace.read_bytes()
    runs = {
        dict(event.stats)["run_id"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if dict(event.stats).get("hlo_module") == "jit_train_step"
    }
    assert len(runs) == 5
    rows = map(json.loads, (tmp_path / "traced/metrics.jsonl").read_text().splitlines())
    assert [row["peak_bytes_in_use"] for row in rows if "val_loss" in row] == [3] * 4


# ----------------------------------------------------------------------------------------- watching


def curve_rows(steps, every=1, loss=lambda step: 4.0 / step):
    """Rows as a run writes them, with a validation point after each `every` steps."""
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": loss(step), "norm": 1.0, "lr": 0.1, "accuracy": 0.5})
        if step % every == 0:
            rows.append({"step": step, "val_loss": loss(step) + 1, "val_accuracy": 0.4})
    return rows


def panels_of(figure):
    """{label of the y axis: the panel}."""
    return {axes.get_ylabel(): axes for axes in figure.axes}


def drawn_lines(axes):
    """{label in the legend: the line}; the raw values have none."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_tensorboard_gets_the_rows_of_the_metrics(tmp_path, monkeypatch):
    shown = []
    writer = Namespace(add_scalar=lambda *point: shown.append(point))
    monkeypatch.setattr(train, "find_spec", lambda name: name == "tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard.summary", Namespace(Writer=lambda folder: writer))
    metrics = train.Metrics(tmp_path, 0)
    metrics.add(curve_rows(100, every=100))
    assert len(shown) == 4 * 100 + 2 and ("val_loss", 1.04, 100) in shown
    metrics.draw()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def stand_in_for_wandb(begun, logged):
    """A package wandb that keeps what it is told."""

    def init(**options):
        begun.append(options)
        return Namespace(dir="files", url="https://wandb.test/run", log=log)

    def log(values, step):
        logged.append((step, values))

    return Namespace(init=init, Error=RuntimeError, Settings=dict)


@pytest.mark.parametrize(
    "dropped, changes, same",
    [
        (False, [], True),
        (True, [], True),  # told again as it was
        (False, ["--steps 20 -> 40"], True),
        (True, ["--lr 1 -> 0.1"], False),  # steps that it has are told otherwise
    ],
)
def test_weights_and_biases_gets_the_rows_and_a_resumed_run_goes_on_there(
    dropped, changes, same, tmp_path, monkeypatch
):
    begun, logged = [], []
    monkeypatch.setitem(sys.modules, "wandb", stand_in_for_wandb(begun, logged))
    monkeypatch.setenv("WANDB_SILENT", "")
    for name in ("offline-run-20260101_100000-older", "run-20260101_110000-newer", "latest-run"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    metrics = train.Metrics(tmp_path, 0)
    metrics.dropped = dropped
    run = Namespace(
        args=Namespace(out=tmp_path, model="gpt2", named=[]),
        settings={"lr": 0.1},
        metrics=metrics,
        changes=changes,
    )
    metrics.wandb = train.open_wandb(run)
    [options] = begun
    assert options["id"] == ("newer" if same else None) and options["resume"] == "allow"
    assert options["config"] == {"out": str(tmp_path), "model": "gpt2", "lr": 0.1}
    metrics.add([{"step": 3, "loss": 2.0, "lr": 0.1}, {"step": 3, "val_loss": 2.5}])
    assert logged == [(3, {"loss": 2.0, "lr": 0.1}), (3, {"val_loss": 2.5})]


@pytest.mark.skipif(not find_spec("wandb"), reason="needs the package wandb")
def test_weights_and_biases_keeps_a_run_offline_and_goes_on_with_it(text_file, tmp_path):
    flags = ["--data", text_file, "--tokens", "bytes", "--log", "wandb", "--out", tmp_path / "out"]
    offline = {"WANDB_MODE": "offline"}
    for more in (["--steps", 8], ["--steps", 12, "--resume"]):
        done = run(*flags, *more, env=offline)
        assert done.returncode == 0, done.stderr
        assert "`wandb sync` sends it" in done.stderr
    first, second = sorted((tmp_path / "out/wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name  # run-ID.wandb
    assert b"val_loss" in first.read_bytes() and b"val_loss" in second.read_bytes()


@pytest.mark.skipif(not find_spec("wandb"), reason="needs the package wandb")
def test_who_is_not_logged_in_gets_one_line_and_no_prompt(text_file, tmp_path):
    nobody = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_API_KEY": ""}
    flags = ["--data", text_file, "--tokens", "bytes", "--out", tmp_path / "out", "--log", "wandb"]
    done = run(*flags, env=nobody)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("train.py: --log wandb: ") and "WANDB_MODE=offline" in line


def test_the_curves_say_what_they_show():
    figure = train.draw_curves(curve_rows(200, every=50), "gpt2.py: 5 parameters")
    assert figure.get_suptitle() == "gpt2.py: 5 parameters"
    panels = panels_of(figure)
    assert list(panels) == [
        "loss (nats per token)",
        "accuracy (% of tokens)",
        "gradient norm",
        "learning rate",
    ]
    assert all(axes.get_xlabel() == "step" for axes in panels.values())
    lines = drawn_lines(panels["loss (nats per token)"])
    assert list(lines) == ["training, mean of 4 steps", "validation", "lowest: 1.0200 at step 200"]
    assert lines["validation"].get_xdata().tolist() == [50, 100, 150, 200]
    assert lines["validation"].get_marker() == "o"
    accuracy = drawn_lines(panels["accuracy (% of tokens)"])
    assert accuracy["validation"].get_ydata().tolist() == [40.0] * 4


def test_a_long_run_is_drawn_with_few_points_and_ends_with_its_last():
    panels = panels_of(train.draw_curves(curve_rows(100_000, every=1000), ""))
    for axes in panels.values():
        for line in axes.lines:
            assert len(line.get_xdata()) <= 2000 and line.get_xdata().max() == 100_000


def test_the_first_steps_of_a_long_run_do_not_rule_the_range_and_neither_does_a_divergence():
    def loss(step):
        return 10.0 - step / 10 if step < 50 else 2.0 + 1 / step

    rows = [*curve_rows(2000, 100, loss), {"step": 2001, "loss": 1e9, "norm": 1.0}]
    bottom, top = panels_of(train.draw_curves(rows, ""))["loss (nats per token)"].get_ylim()
    assert 1.8 < bottom < 2.0 and 3.0 < top < 3.2  # training from 2.0, validation to 3.0


@pytest.mark.parametrize("first", [2.2, 9.0])
def test_a_point_before_the_first_step_has_room(first):
    """Near, as in fine-tuning, or far, as from scratch: --eval-first asked for it."""
    rows = [{"step": 0, "val_loss": first, "val_accuracy": 0.0}]
    rows += curve_rows(100, 10, lambda step: 1.0)
    axes = panels_of(train.draw_curves(rows, ""))["loss (nats per token)"]
    assert drawn_lines(axes)["validation"].get_ydata()[0] == first
    assert first < axes.get_ylim()[1] < 1.1 * first


def fine_tuning(steps):
    """A loss that falls from 3.3 to almost 0 in twenty steps."""
    return curve_rows(steps, every=steps // 4, loss=lambda step: 3.3 * 0.8 ** (step - 1))


@pytest.mark.parametrize("steps", [20, 100, 500])
def test_a_short_run_shows_its_whole_fall(steps):
    figure = train.draw_curves(fine_tuning(steps), "")
    bottom, top = panels_of(figure)["loss (nats per token)"].get_ylim()
    assert 3.3 < top < 3.6 and bottom < 0.1


@pytest.mark.parametrize("rows", [fine_tuning(100), curve_rows(2000, 100)], ids=["short", "long"])
@pytest.mark.parametrize("height", [8.0, 1e9])
def test_no_single_spike_rules_the_range_wherever_it_is(rows, height):
    axis = "loss (nats per token)"
    expected = panels_of(train.draw_curves(rows, ""))[axis].get_ylim()
    for place in range(1, len(rows), len(rows) // 7):
        if "loss" in rows[place]:
            spiked = [*rows[:place], rows[place] | {"loss": height}, *rows[place + 1 :]]
            assert panels_of(train.draw_curves(spiked, ""))[axis].get_ylim() == expected


@pytest.mark.parametrize(
    "rows",
    [
        [],
        curve_rows(1),
        curve_rows(2, every=2),
        curve_rows(30, every=31),
        curve_rows(1, 1, lambda step: math.nan),
    ],
    ids=["none", "one step", "one validation point", "no validation point", "NaN alone"],
)
def test_short_and_broken_runs_are_drawn(rows, tmp_path):
    train.draw_curves(rows, "").savefig(tmp_path / "curves.png")


def test_the_mean_of_the_nearest_values_leaves_out_what_is_no_number():
    values = np.array([1.0, 2.0, math.nan, 4.0, math.inf, math.nan, math.nan])
    found = train.running_mean(values, 3)
    np.testing.assert_array_equal(found, [1.5, 1.5, 3.0, 4.0, 4.0, math.nan, math.nan])
    assert train.running_mean(np.arange(6.0), 2).tolist() == [0, 0.5, 1.5, 2.5, 3.5, 4.5]


@pytest.mark.parametrize(
    "options, title",
    [
        ({}, "gpt2.py: 6 parameters trained on Python's source"),
        ({"data": ["my/a.txt"]}, "gpt2.py: 6 parameters trained on a.txt"),
        ({"data": [*"abcd"]}, "gpt2.py: 6 parameters trained on a, b, 2 more"),
        ({"dataset": "wiki:raw"}, "gpt2.py: 6 parameters trained on wiki:raw"),
        ({"weights": "a/b"}, "gpt2.py, from a/b: 6 parameters trained on Python's source"),
    ],
)
def test_the_title_says_what_was_trained_on_what(options, title):
    args = {"model": "gpt2", "data": [], "dataset": None, "weights": None} | options
    assert train.title_of(Namespace(**args), {"w": np.zeros((2, 3))}) == title


@pytest.mark.slow
def test_a_prompt_is_continued_at_each_estimate_and_changes_no_bit(text_file, tmp_path):
    flags = ["--data", text_file, "--tokens", "bytes", "--save-every", 0]
    shown = run(*flags, "--out", tmp_path / "shown", "--prompt", "The 3")
    plain = run(*flags, "--out", tmp_path / "plain")
    assert shown.returncode == plain.returncode == 0, shown.stderr
    estimates = len(curve(shown.stderr))
    assert estimates == 2 and shown.stdout.count(": The 3") == estimates
    assert "The 3" not in plain.stdout and curve(shown.stderr) == curve(plain.stderr)


def test_the_progress_line_has_memory_and_utilisation_where_the_device_says_them(monkeypatch):
    """As for an NVIDIA GPU with pynvml; here the numbers are made up."""
    gpu = Namespace(
        platform="gpu", local_hardware_id=1, memory_stats=lambda: {"peak_bytes_in_use": 3 * 10**9}
    )
    pynvml = Namespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: [40, 93][i],
        nvmlDeviceGetUtilizationRates=lambda handle: Namespace(gpu=handle),
    )
    monkeypatch.setattr(train, "find_spec", lambda name: name == "pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    assert train.usage(gpu) == ["3.00 GB", "93% busy"]
    assert train.usage(jax.devices("cpu")[0]) == []


# ---------------------------------------------------------------------------------------- bad input


def test_sizes_beside_weights_are_said_not_to_be_used(text_file, tmp_path):
    """Also where they are the defaults: the layers of tiny/gpt2 are its own."""
    flags = ["--weights", "tiny", "--data", text_file, "--steps", 1, "--warmup", 0]
    done = run(*flags, "--out", tmp_path / "out")  # with the --layers, --heads and --width of SMALL
    assert done.returncode == 0, done.stderr
    said = "not used: --layers, --heads, --width; the model of --weights has its own"
    assert said in done.stderr.splitlines()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model bert", "no model file for 'bert'"),
        ("--data missing.txt", "missing.txt: no such file: name text, .jsonl"),
        ("--data empty.txt", "--block 16 is longer than the text: 0 tokens to train on, 0 to"),
        ("--data short.txt", "--block 16 is longer than the text"),
        ("--data latin.txt", "latin.txt is not UTF-8 text: 'utf-8' codec can't decode byte 0xf6"),
        ("--width 30 --heads 4", "--width must be a multiple of --heads"),
        ("--width 6 --heads 2 --model llama", "--width 6 with --heads 2: "),
        ("--patience -1", "--patience must be 0 or more"),
        ("--steps -5", "--steps must be 1 or more"),
        ("--block 0", "--block must be 1 or more"),
        ("--steps many", "invalid int value: 'many'"),
        ("--vocab-size 100", "--vocab-size must be 256 or more"),
        ("--warmup 8", "--warmup must be below --steps"),
        ("--dropout 1", "--dropout: 0 to below 1"),
        ("--dropout -0.5", "--dropout: 0 to below 1"),
        ("--min-lr 1", "--min-lr: at most --lr"),
        ("--batch 4 --accumulate 3", "does not split over 1 devices (or groups of them) in"),
        ("--tokens words", "--tokens words: it must be bpe or char or bytes or gpt2 here"),
        ("--tokens char --weights tiny", "--tokens char: --weights bring their own tokenizer"),
        (f"--out {'a' * 300}", "--out cannot be used: [Errno 36] File name too long"),
        (f"--data {'a' * 300}", "File name too long"),
        ("--weights nowhere/here", "there is no folder nowhere/here"),
        ("--weights tiny --model llama --data short.txt", "--block 16 is longer than the text"),
        ("--weights tiny --block 300", "the context of this model is 256"),
        ("--dtype float16 --model gemma", "gemma.py overflows in float16"),
        ("--data bare.jsonl", 'bare.jsonl, line 1: it must be like {"text": "..."}'),
        ("--optimizer sgd", "invalid choice: 'sgd'"),
        ("--lr 0", "--lr, --clip: above 0"),
        ("--block 100000", "--block 100000 is longer than the text"),
        ("--device tpu", "--device tpu: JAX finds no such device"),
        ("--device cpu:99", "--device cpu:99: there are 1, counted from 0"),
        ("--device abacus", "it must be cpu, gpu or tpu, or"),
        ("--out short.txt", "--out short.txt is a file"),
        ("--profile some", "--profile traces five steps after ten"),
        ("--profile short.txt --steps 15", "--profile short.txt:"),
        ("--profile short.txt/in --steps 15", "--profile short.txt/in:"),
        ("--resume", "no checkpoints: leave --resume out"),
        ("--tokens gpt2", "GPT-2's vocabulary cannot be downloaded"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(flags, message, text_file, monkeypatch, capsys):
    folder = text_file.parent
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # forget what is loaded
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("too short to learn from")
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (folder / "bare.jsonl").write_text('{"words": "hello"}\n')
    monkeypatch.setattr(train, "CACHE", folder.parent / "cache")
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", [*command("--data", text_file)[1:], *flags.split()])
    with pytest.raises(SystemExit) as stop:
        train.main()
    stderr = capsys.readouterr().err
    assert stop.value.code == 2
    [line] = [line for line in stderr.splitlines() if not line.endswith(" ...")]
    assert line.startswith("train.py: ") and message in line
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("damage, said", DAMAGES)
def test_a_bad_checkpoint_is_named_in_one_line(
    damage, said, text_file, tmp_path, monkeypatch, capsys
):
    folder = write_checkpoint(tmp_path / "weights")
    damage(folder)
    flags = ["--model", "gpt2", "--weights", folder, "--out", tmp_path / "out"]
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", command("--data", text_file, *flags)[1:])
    with pytest.raises(SystemExit) as stop:
        train.main()
    stderr = capsys.readouterr().err
    assert stop.value.code == 2
    [line] = [line for line in stderr.splitlines() if not line.endswith(" ...")]
    assert line.startswith("train.py: ") and said in line
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs Tiny Shakespeare")
@pytest.mark.parametrize(
    "flags",
    [
        "--seed 0",
        "--seed 1",
        (
            "--steps 450 --optimizer muon --lr 1.3e-2 --schedule linear --min-lr 0 --warmup 10 "
            "--weight-decay 0.01"
        ),
    ],
    ids=["defaults", "another seed", "Muon"],
)
def test_shakespeare_is_learned_to_nanogpts_loss(flags, tmp_path):
    """nanoGPT's CPU example, with its sizes: a validation loss of 1.88 after its 2,000 steps, and
    after 450 as README has them."""
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "train.py",
            "--data",
            SHAKESPEARE,
            "--tokens",
            "char",
            *flags.split(),
            "--out",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"whole text: ([\d.]+) nats", done.stdout)[1]) <= 1.88


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs Tiny Shakespeare")
@pytest.mark.parametrize("model", train.MODELS)
def test_the_tiny_checkpoint_has_the_loss_of_its_model_card(model):
    folder, module = ROOT / "tiny" / model, importlib.import_module(model)
    text = SHAKESPEARE.read_text()
    ids = module.tokenizer(folder).encode(text[int(0.9 * len(text)) :])
    graphdef, params = nnx.split(module.load(folder, dtype=jnp.float32))
    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
    config = train.StepConfig(partial(nnx.merge, graphdef), None, None, 0.0)
    eval_step = jax.jit(partial(train.eval_step, config))
    run = Namespace(eval_step=eval_step, mesh=mesh, frozen=nnx.State({}))
    rows = train.Text(np.array(ids), 256).in_order()
    batches = train.validation_batches(some_settings(batch=8, block=256), rows, mesh)
    loss, _ = train.evaluate(run, params, batches)
    stated = re.search(r"([\d.]+) nats a token", (folder / "README.md").read_text())[1]
    assert loss == pytest.approx(float(stated), abs=1e-3)
