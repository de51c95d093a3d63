"""Texts that outgrow the context: half a context is fed again, or a ring runs on."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.families import GEMMA, MISTRAL
from helpers.small import write_checkpoint

import gpt2
import sample

ROOT = Path(__file__).parents[1]
CONTEXT = 64
PROMPTS = [[5, 7, 11], list(range(2, 32)), [9] * 100]  # the last is longer than the context
KEYS = jax.random.split(jax.random.key(3), 3)


@pytest.fixture(scope="module")
def short(model, family):
    """The family's random model, but for a context of 64."""
    name = "n_positions" if family.name == "gpt2" else "max_position_embeddings"
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, state)
    model.config = dataclasses.replace(model.config, **{name: CONTEXT})
    return model


# ---------------------------------------------------------------------------------- generate


@pytest.mark.core_gpt2_only
@pytest.mark.parametrize("keep", [0, 1, 20])
def test_rows_outgrow_the_context_as_the_naive_loop_does(family, short, keep):
    """Each at its own time: a row does not depend on those that share its batch."""
    options = {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2}
    rows = family.module.generate(short, PROMPTS, 150, key=KEYS, keep=keep, **options)
    for prompt, key, row in zip(PROMPTS, KEYS, rows, strict=True):
        naive = family.module.generate_naive(short, prompt, 150, key=key, keep=keep, **options)
        assert row == naive


def test_half_a_context_is_fed_again_with_the_first_tokens():
    config = gpt2.Config(n_positions=8)
    assert gpt2.shift_context(config, [1, 2, 3, 4, 5, 6, 7], 1) == [1, 2, 3, 4, 5, 6, 7]
    assert gpt2.shift_context(config, [1, 2, 3, 4, 5, 6, 7, 8], 1) == [1, 6, 7, 8]
    assert gpt2.shift_context(config, [1, 2, 3, 4, 5, 6, 7, 8, 9], 0) == [6, 7, 8, 9]
    assert gpt2.shift_context(config, [1, 2, 3, 4, 5, 6, 7, 8], None) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_random_numbers_do_not_repeat_with_the_positions():
    """With the same numbers at the same places, a uniform model would write the same text again."""
    config = gpt2.Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    model = gpt2.Model(config, rngs=nnx.Rngs(0))
    model.wte.embedding[...] = 0 * model.wte.embedding[...]
    [row] = gpt2.generate(model, [[1] * 8], 32, key=0, keep=0)
    parts = [tuple(row[start : start + 8]) for start in range(0, 32, 8)]
    assert len(set(parts)) == len(parts)


@pytest.mark.core_gpt2_only
def test_without_keep_a_text_that_would_outgrow_the_context_is_refused(family, short):
    with pytest.raises(family.module.InputError, match="3 \\+ 62 tokens do not fit the context"):
        family.module.generate(short, [[5, 7, 11]], 62, key=0)


@pytest.mark.core_gpt2_only
@pytest.mark.parametrize("steps", [0, -1, 1.5, None])
def test_a_stream_of_no_steps_is_refused(family, short, steps):
    with pytest.raises(family.module.InputError, match="steps must be an integer of 1 or more"):
        next(family.module.generate_stream(short, [[5, 7, 11]], 5, key=0, steps=steps))


@pytest.mark.parametrize("keep", [-1, 32, 1.5, "1"])
def test_keep_must_leave_room_for_the_end_of_the_text(keep):
    model = gpt2.Model(gpt2.Config(n_positions=64, n_layer=1, n_embd=8, n_head=1), rngs=nnx.Rngs(0))
    with pytest.raises(gpt2.InputError, match="keep must be an integer from 0 to below half"):
        gpt2.generate(model, [[5]], 4, key=0, keep=keep)


@pytest.mark.parametrize(
    ("family", "name"),
    [(MISTRAL, "window of 5"), pytest.param(GEMMA, "third", marks=pytest.mark.wide)],
    ids=["mistral", "gemma"],
)
def test_with_sliding_windows_alone_the_ring_runs_on(make_case, family, name):
    """The text is that of a model whose context has room for all of it."""
    model = make_case(family, name).model
    module = family.module
    changes = {}
    if family is GEMMA:
        changes["layer_types"] = ("sliding_attention",) * model.config.num_hidden_layers
    config = dataclasses.replace(model.config, max_position_embeddings=512, **changes)
    graphdef, state = nnx.split(module.Model(config, rngs=nnx.Rngs(0)))
    roomy = nnx.merge(graphdef, state)
    short = nnx.merge(graphdef, state)
    short.config = dataclasses.replace(config, max_position_embeddings=CONTEXT)

    assert module.has_unbounded_context(short.config)
    options = {"temperature": 0, "repetition_penalty": 1.2}
    rows = module.generate(short, PROMPTS, 150, key=KEYS, keep=0, **options)
    assert rows == module.generate(roomy, PROMPTS, 150, key=KEYS, **options)

    # Neither does a call of the model refuse a position there.
    beyond = {"positions": [[CONTEXT]], "cache": module.init_cache(config, 1, 128, jnp.float32)}
    np.testing.assert_array_equal(short([[5]], **beyond)[0], roomy([[5]], **beyond)[0])


def test_a_model_with_a_layer_that_sees_everything_does_not_run_on(make_case):
    assert not GEMMA.module.has_unbounded_context(make_case(GEMMA, "third").model.config)
    for name in ("plain", "windows in some layers"):
        assert not MISTRAL.module.has_unbounded_context(make_case(MISTRAL, name).model.config)


# ----------------------------------------------------------------------------------- stream


@pytest.mark.core_gpt2_only
@pytest.mark.parametrize("steps", [1, 7])
def test_a_stream_brings_the_tokens_of_generate_as_they_come(family, short, steps):
    module = family.module
    options = {"key": KEYS, "keep": 0}
    expected = module.generate(short, PROMPTS, 80, **options)
    options["stop_ids"] = [expected[0][20], expected[1][50]]
    expected = module.generate(short, PROMPTS, 80, **options)
    assert len({len(row) for row in expected}) > 1

    rows = [[], [], []]
    for new in module.generate_stream(short, PROMPTS, 80, steps=steps, **options):
        assert max(map(len, new)) <= steps
        for row, tokens in zip(rows, new, strict=True):
            row += tokens
    assert rows == expected


def test_a_stream_ends_where_all_rows_have_ended():
    model = gpt2.load("tiny/gpt2")
    [[first]] = gpt2.generate(model, [[5, 6]], 1, key=0)
    assert list(gpt2.generate_stream(model, [[5, 6]], 50, key=0, stop_ids=first)) == [[[]]]


# -------------------------------------------------------------------------------- sample.py


def run(*options, **env):
    command = [sys.executable, "sample.py", *map(str, options)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small random GPT-2 over bytes, with a context of 64."""
    return write_checkpoint(tmp_path_factory.mktemp("short"), n_positions=CONTEXT)


LONG = ["--prompt", "Hello", "--prompt", "A longer prompt", "--max-new-tokens", 100]


@pytest.fixture(scope="module")
def written(weights):
    """What sample.py writes of two texts that outgrow the context, and says."""
    return run("--weights", weights, *LONG)


def test_a_text_goes_on_beyond_the_context_and_that_is_said(weights, written):
    note = "longer than the context of 64 tokens: wherever it was full, the model went on from the"
    assert note in written.stderr
    model = gpt2.load(weights)
    codec = gpt2.tokenizer(weights)
    prompts = [codec.encode("Hello"), codec.encode("A longer prompt")]
    rows = gpt2.generate(model, prompts, 100, key=0, temperature=0.8, keep=0)
    texts = [codec.decode(prompt + row) for prompt, row in zip(prompts, rows, strict=True)]
    assert written.stdout == texts[0] + "\n" + "-" * 40 + "\n" + texts[1] + "\n"


def test_without_a_stream_the_texts_are_the_same(weights, written):
    assert run("--weights", weights, *LONG, "--no-stream").stdout == written.stdout


@pytest.mark.wide
@pytest.mark.parametrize("mode", ["pmap", "data", "fsdp:2", "tensor:2"])
def test_on_several_devices_the_texts_are_the_same(weights, written, mode):
    env = {"NPROC": "16", "JAX_NUM_CPU_DEVICES": "2"}
    assert run("--weights", weights, *LONG, "--parallel", mode, **env).stdout == written.stdout


def test_the_speed_of_the_prefill_counts_what_the_model_saw_of_a_prompt(weights):
    """Of a prompt that is too long, half a context. The time in the record is rounded."""
    done = run("--weights", weights, "--prompt", "a" * 5000, "--max-new-tokens", 1, "--json")
    seconds = json.loads(done.stdout)["time_to_first_token_s"]
    speed = re.search(r"prefill ([\d,]+) tokens/s", done.stderr)[1]
    assert int(speed.replace(",", "")) * seconds == pytest.approx(CONTEXT // 2, rel=0.5)


def test_a_text_that_fits_the_context_gets_no_note(weights):
    assert "context" not in run("--weights", weights, "--max-new-tokens", 20).stderr


# ------------------------------------------------------------------------------ many samples


SAMPLES = ["--prompt", "Hello there", "--num-samples", 3, "--max-new-tokens", 100, "--json"]


@pytest.mark.parametrize(
    "mode", ["none", *[pytest.param(m, marks=pytest.mark.wide) for m in ("pmap", "fsdp", "tensor")]]
)
def test_samples_of_a_prompt_that_is_prefilled_once_are_those_of_generate(weights, mode):
    env = {"NPROC": "16", "JAX_NUM_CPU_DEVICES": "2"} if mode != "none" else {}
    parallel = ["--parallel", mode] if mode != "none" else []
    out = run("--weights", weights, *SAMPLES, *parallel, **env).stdout
    found = [json.loads(line)["completion_ids"] for line in out.splitlines()]
    ids = gpt2.tokenizer(weights).encode("Hello there")
    model = gpt2.load(weights)
    options = {"temperature": 0.8, "keep": 0}
    assert found == gpt2.generate(model, [ids] * 3, 100, key=0, **options)


def started_texts(*reasons):
    """Texts of a prompt "P": each has the completion of its number, and has ended or not."""
    texts = []
    for number, reason in enumerate(reasons):
        texts.append(SimpleNamespace(prompt="P", completion=str(number), reason=reason))
    return texts


@pytest.mark.parametrize(
    ("samples", "order"),
    [pytest.param(4, "P0 P2 P1 P3", id="samples"), pytest.param(1, "P0 P1 P2 P3", id="prompts")],
)
def test_samples_are_shown_as_they_end_and_prompts_in_their_order(capsys, samples, order):
    texts = started_texts(None, None, None, None)
    args = SimpleNamespace(num_samples=samples, no_stream=False, json=False, chat=False)
    writer = sample.Writer(texts, args)
    writer.write(None)
    assert capsys.readouterr().out == "P0"  # the first streams
    texts[2].reason = "stop"
    for number in (0, 1, 3):
        texts[number].reason = "length"
        writer.write(None)
    assert capsys.readouterr().out.replace("\n" + "-" * 40, "").split() == order[2:].split()


def test_at_ctrl_c_the_texts_that_have_ended_are_written(capsys):
    texts = started_texts(None, "stop", None, "stop")
    args = SimpleNamespace(num_samples=4, no_stream=False, json=False, chat=False)
    writer = sample.Writer(texts, args)
    writer.write_new(texts[0])
    writer.write_ended(None)
    line = "-" * 40
    assert capsys.readouterr().out == f"P0\n{line}\nP1\n{line}\nP3\n"


def test_ctrl_c_while_samples_are_made_leaves_no_traceback(weights):
    command = [sys.executable, "sample.py", "--weights", str(weights), "--prompt", "Hello"]
    process = subprocess.Popen(
        [*command, "--num-samples", "8", "--max-new-tokens", "1000000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(100)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130 and b"Traceback" not in err
