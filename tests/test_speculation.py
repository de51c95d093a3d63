"""sample.py --draft: speculative decoding gives the text of plain decoding, token for token."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.families import GEMMA, GPT2, MISTRAL, QWEN
from helpers.small import write_checkpoint
from scipy.stats import chi2

import gpt2
import llama
import sample

ROOT = Path(__file__).parents[1]
CONTEXT = 64
# Ragged, and one that repeats itself; a look-up then has something to find.
PROMPTS = [[5, 7, 11], list(range(2, 32)), [9, 4, 3, 9, 4, 3, 9, 4]]
GREEDY = {"temperature": 0}


def options_of(**changes):
    """What the command line gives, for texts that do not stream."""
    options = {
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "repetition_penalty": 1.0,
        "seed": 3,
        "json": True,
        "no_stream": True,
        "profile": None,
        "draft": None,
    }
    return Namespace(**options | changes)


def one_device():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ["data"])


def texts_of(module, model, prompts, limit, keep=0, timing=None, **changes):
    """The new tokens of each row, as sample.py generates them."""
    timing = timing or sample.Timing()
    args = options_of(**changes)
    rows = [[] for _ in prompts]
    for new in sample.generate(module, model, one_device(), prompts, limit, keep, timing, args):
        for row, tokens in zip(rows, new, strict=True):
            row += map(int, tokens)
    assert {len(row) for row in rows} == {limit}
    return rows


def disturbed(module, model, noise=0.1):
    """The model with other weights: a draft that is right at times and wrong at times."""
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)

    def disturb(x):
        x = np.asarray(x)
        return jnp.asarray(x * (1 + noise * rng.normal(size=x.shape)), x.dtype)

    return nnx.merge(graphdef, jax.tree.map(disturb, state))


def tiny(context, **sizes):
    return gpt2.Config(
        n_positions=context, **{"vocab_size": 256, "n_embd": 16, "n_head": 2, "n_layer": 2, **sizes}
    )


def draft_of(kind, module, model):
    if kind == "ngram":
        return sample.LookUp()
    if kind == "wrong":
        model = disturbed(module, model)
    return sample.DraftModel(module, model, one_device())


drafts = pytest.mark.parametrize("kind", ["ngram", "same", "wrong"])
one_draft = pytest.mark.parametrize(
    "kind", ["wrong", *(pytest.param(kind, marks=pytest.mark.wide) for kind in ["ngram", "same"])]
)


# ------------------------------------------------------------------------------------ the same text


@drafts
@pytest.mark.core_gpt2_only
@pytest.mark.parametrize(
    "options",
    [GREEDY, {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.3}],
    ids=["greedy", "sampled"],
)
def test_the_text_is_the_one_without_a_draft(family, model, kind, options):
    """Of ragged rows, which accept different numbers of guesses."""
    module = family.module
    expected = texts_of(module, model, PROMPTS, 70, **options)
    draft = draft_of(kind, module, model)
    assert texts_of(module, model, PROMPTS, 70, draft=draft, **options) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3},
        {"temperature": 0.7, "top_p": 0.8},
        {"min_p": 0.05},
        {"top_k": 5},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
    ],
    ids=str,
)
def test_every_way_to_sample_gives_the_text_without_a_draft(make_case, options):
    model = make_case(GPT2).model
    expected = texts_of(gpt2, model, PROMPTS, 50, **options)
    draft = draft_of("wrong", gpt2, model)
    assert texts_of(gpt2, model, PROMPTS, 50, draft=draft, **options) == expected


@one_draft
def test_texts_that_stream_are_the_same(make_case, kind):
    model = make_case(GPT2).model
    expected = texts_of(gpt2, model, PROMPTS, 40)
    draft = draft_of(kind, gpt2, model)
    assert texts_of(gpt2, model, PROMPTS, 40, draft=draft, no_stream=False, json=False) == expected


@one_draft
def test_samples_of_a_prompt_are_the_same(make_case, kind):
    """They are prefilled once, up to the last token."""
    model = make_case(GPT2).model
    prompts = [PROMPTS[2]] * 3 + [PROMPTS[0]]
    expected = texts_of(gpt2, model, prompts, 40, top_k=8)
    assert (
        texts_of(gpt2, model, prompts, 40, top_k=8, draft=draft_of(kind, gpt2, model)) == expected
    )


def with_context(family, model, context):
    """The model, but for the length of its context."""
    name = "n_positions" if family is GPT2 else "max_position_embeddings"
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, state)
    model.config = dataclasses.replace(model.config, **{name: context})
    return model


@drafts
@pytest.mark.core_gpt2_only
def test_a_text_that_outgrows_the_context_is_the_same(family, model, kind):
    """Each row goes on from half a context at its own time, and from its first tokens."""
    module = family.module
    short = with_context(family, model, CONTEXT)
    options = {"keep": 5, "top_k": 20, "repetition_penalty": 1.2}
    prompts = [*PROMPTS, [9] * 100]
    expected = texts_of(module, short, prompts, 150, **options)
    draft = draft_of(kind, module, short)
    assert texts_of(module, short, prompts, 150, draft=draft, **options) == expected


@drafts
@pytest.mark.parametrize("limit", [1, 2, 3, 10, 23, 24])
def test_guesses_end_where_the_context_or_the_limit_does(make_case, kind, limit):
    """A position beyond GPT-2's table would be NaN, and so would be all that sees it."""
    model = gpt2.Model(tiny(CONTEXT), rngs=nnx.Rngs(1))
    prompts = [[1, 2, 3, 4] * 10, [5]]
    expected = texts_of(gpt2, model, prompts, limit, temperature=0)
    draft = draft_of(kind, gpt2, model)
    assert texts_of(gpt2, model, prompts, limit, temperature=0, draft=draft) == expected


@one_draft
@pytest.mark.parametrize(
    ("family", "name"),
    [
        (MISTRAL, "window of 5"),
        pytest.param(MISTRAL, "3 experts, window of 7", marks=pytest.mark.wide),
        (GEMMA, "third"),
        pytest.param(GEMMA, "second", marks=pytest.mark.wide),
        pytest.param(QWEN, "windows of 7 in some layers", marks=pytest.mark.wide),
    ],
    ids=["mistral", "mixtral", "gemma 3", "gemma 2", "qwen"],
)
def test_sliding_windows_lose_no_token_to_a_wrong_guess(make_case, family, name, kind):
    """A ring buffer would: a wrong guess takes the place of a token that is still in the window."""
    module, model = family.module, make_case(family, name).model
    options = {"temperature": 1.1, "top_k": 10}
    expected = texts_of(module, model, PROMPTS, 60, **options)
    draft = draft_of(kind, module, model)
    assert texts_of(module, model, PROMPTS, 60, draft=draft, **options) == expected


def test_windows_alone_have_texts_longer_than_the_context(make_case):
    model = with_context(MISTRAL, make_case(MISTRAL, "window of 5").model, CONTEXT)
    expected = texts_of(MISTRAL.module, model, PROMPTS, 100, temperature=0)
    draft = draft_of("wrong", MISTRAL.module, model)
    assert texts_of(MISTRAL.module, model, PROMPTS, 100, temperature=0, draft=draft) == expected


def test_a_draft_of_another_family_with_a_shorter_context(make_case):
    """Where the text is longer than the draft can read, the model goes on alone."""
    model = gpt2.Model(tiny(128, vocab_size=64), rngs=nnx.Rngs(1))
    small = llama.Model(
        llama.Config.small(layers=1, heads=2, width=16, context=32, vocab_size=64), rngs=nnx.Rngs(2)
    )
    draft = sample.DraftModel(llama, small, one_device())
    for prompts in [[[3, 4, 5]], [[3] * 40, [4]]]:
        expected = texts_of(gpt2, model, prompts, 60, seed=1)
        assert texts_of(gpt2, model, prompts, 60, seed=1, draft=draft) == expected


def test_holes_are_closed_where_a_cache_is_full_of_them(make_case, monkeypatch):
    """Rows that accept different numbers of guesses leave them."""
    monkeypatch.setattr(sample, "SPARE", 0)
    closed = []
    close = sample.close_holes
    monkeypatch.setattr(sample, "close_holes", lambda cache: closed.append(1) or close(cache))
    model = make_case(GPT2).model
    limit = 128 - 64 - max(sample.WIDTHS)  # the prompts take 64 slots, and all together are 128
    expected = texts_of(gpt2, model, PROMPTS, limit, top_k=4)
    draft = draft_of("wrong", gpt2, model)
    assert texts_of(gpt2, model, PROMPTS, limit, top_k=4, draft=draft) == expected
    assert closed


# --------------------------------------------------------------------------------- the distribution


def test_with_a_draft_that_is_often_wrong_texts_follow_the_models_distribution():
    """Of all texts of four tokens, by a chi-square test at p = 1e-5; the seeds are fixed."""
    V, prompt = 4, [1, 2, 0]
    sizes = {"vocab_size": V, "n_embd": 8, "n_layer": 1, "initializer_range": 0.5}
    model = gpt2.Model(tiny(16, **sizes), rngs=nnx.Rngs(0))
    draft = draft_of("same", gpt2, gpt2.Model(tiny(16, **sizes), rngs=nnx.Rngs(1)))
    timing = sample.Timing()
    options = {"temperature": 1.5, "draft": draft, "timing": timing}
    rows = []
    for seed in range(10):
        rows += texts_of(gpt2, model, [prompt] * 400, 4, seed=seed, **options)
    assert 0.1 < timing.accepted / timing.guessed < 0.9

    every = np.array(list(product(range(V), repeat=4)))  # [256, 4]
    tokens = np.concatenate([np.tile(prompt, (len(every), 1)), every], axis=1)
    logprobs = jax.nn.log_softmax(model(tokens) / 1.5)[:, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(np.asarray(logprobs), every[..., None], axis=2)
    expected = len(rows) * np.exp(chosen.sum(axis=(1, 2), dtype=np.float64))
    assert abs(expected.sum() - len(rows)) < 0.01

    counts = np.bincount(np.array(rows) @ [V**3, V**2, V, 1], minlength=V**4)
    often = expected >= 5  # as the test demands
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    surprise = chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)
    assert len(counts) > 50 and surprise > 1e-5


# --------------------------------------------------------------------------------------- acceptance


@pytest.mark.core_gpt2_only
@pytest.mark.parametrize("options", [GREEDY, {"temperature": 1.5}], ids=["greedy", "sampled"])
def test_a_draft_that_is_the_model_is_always_right(family, model, options):
    """It samples with the same random numbers."""
    timing = sample.Timing()
    draft = draft_of("same", family.module, model)
    texts_of(family.module, model, PROMPTS, 60, draft=draft, timing=timing, **options)
    assert timing.accepted == timing.guessed > 100
    assert draft.width == max(sample.WIDTHS)


def test_a_draft_that_is_like_the_model_is_mostly_right_even_when_the_text_is_random():
    """The same Gumbel noise: independent draws of 256 tokens would almost never be the same."""
    config = tiny(128, vocab_size=256, n_layer=1)
    model = gpt2.Model(config, rngs=nnx.Rngs(0))
    draft = draft_of("wrong", gpt2, model)
    timing = sample.Timing()
    texts_of(gpt2, model, PROMPTS, 90, draft=draft, timing=timing)
    assert timing.accepted > 0.8 * timing.guessed


def test_the_look_up_finds_what_repeats():
    """Without position embeddings and blocks, the greedy text is a cycle of a few tokens."""
    model = gpt2.Model(tiny(256, vocab_size=32, n_layer=1), rngs=nnx.Rngs(0))
    timing = sample.Timing()
    prompt = [1, 2, 3, 4, 5] * 4
    texts_of(gpt2, model, [prompt], 200, temperature=0, draft=sample.LookUp(), timing=timing)
    assert timing.accepted > 100


# ------------------------------------------------------------------------------------------ look-up


def test_the_look_up_proposes_what_followed_the_longest_match():
    #                    0  1  2  3  4  5  6  7  8  9
    assert sample.look_up([1, 2, 3, 8, 9, 7, 2, 3, 5, 6, 1, 2, 3], 3) == [8, 9, 7]  # 1 2 3 8 9 7
    assert sample.look_up([4, 2, 3, 8, 9, 7, 2, 3, 5, 6, 1, 2, 3], 3) == [5, 6, 1]  # the last 2 3


def test_the_look_up_needs_a_match_of_two_tokens():
    assert sample.look_up([7, 3, 8, 9, 3], 3) == []
    assert sample.look_up([7, 3, 8, 7, 3], 3) == [8, 7, 3]
    assert sample.look_up([1, 2, 3, 4, 5], 3) == []
    assert sample.look_up([1], 3) == []
    assert sample.look_up([7, 3, 8, 7, 3], 0) == []


def test_a_text_that_has_begun_to_repeat_itself_is_taken_to_go_on():
    """The copy runs into itself."""
    assert sample.look_up([5, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert sample.look_up([4, 4, 4], 4) == [4, 4, 4, 4]


def test_the_look_up_rests_longer_each_time_its_guesses_are_wrong():
    draft = sample.LookUp()
    text = [1, 2, 9, 1, 2]
    rests = []
    for _ in range(10):
        [guess] = draft.guess([text], [3])
        assert guess == [9, 1, 2]
        draft.learn([text], [guess], [[5]])  # all wrong; the model's own token is another
        rests.append(draft.pause_left([text]))
        text = [8] * rests[-1] + text  # so many tokens later it ends like this again
    assert rests == [0, 0, 1, 2, 4, 8, 16, 32, 32, 32]  # at first it only guesses fewer tokens

    draft.learn([text], [[9, 1, 2]], [[9, 1, 2, 5]])
    assert draft.pause == 1 and draft.width == sample.WIDTHS[1]


# ---------------------------------------------------------------------------------- in conversation


@drafts
def test_a_conversation_is_the_same_and_its_cache_is_kept(make_case, kind):
    """Answers end in the middle of the tokens of a step; the next message follows what was said."""
    model = make_case(GPT2).model
    plain, memory = sample.Memory(), sample.Memory()
    draft = draft_of(kind, gpt2, model)
    args = options_of(top_k=30)
    ids = [9, 4, 3] * 5
    for n in [5, 11, 3, 20]:
        ends = [np.concatenate(list(sample.answer(gpt2, model, plain, ids, n, 0, args)))]
        parts = sample.answer(gpt2, model, memory, ids, n + 7, 0, args, draft)
        ends.append(np.concatenate(list(parts))[:n])
        np.testing.assert_array_equal(*ends)
        ids = [*ids, *ends[0].tolist(), 8, 7]
        assert sample.count_shared(memory.ids, ids) >= len(ids) - 3


def test_a_conversation_reads_only_what_is_new(make_case):
    """Though the last answer was cut within the tokens of a step."""
    fed = []

    class Watched:
        def __getattr__(self, name):
            return getattr(gpt2, name)

        def prefill(self, graphdef, state, cache, tokens, *rest, **options):
            fed.append(tokens.shape[1])
            return gpt2.prefill(graphdef, state, cache, tokens, *rest, **options)

    model, memory, draft = make_case(GPT2).model, sample.Memory(), sample.LookUp()
    answer = sample.answer(Watched(), model, memory, [7] * 70, 50, 0, options_of(**GREEDY), draft)
    new = [token for _, part in zip(range(6), answer, strict=False) for token in part.tolist()]
    fed.clear()
    ids = [7] * 70 + new[:-1] + [1, 2]
    next(sample.answer(Watched(), model, memory, ids, 50, 0, options_of(**GREEDY), draft))
    assert sum(fed) <= 3


# --------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A GPT-2 over bytes, a smaller one, and one with another vocabulary."""
    model = write_checkpoint(tmp_path_factory.mktemp("model"))
    small = write_checkpoint(tmp_path_factory.mktemp("small"), n_layer=1)
    other = write_checkpoint(tmp_path_factory.mktemp("other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model, small, other


def run(*options, **env):
    command = [sys.executable, "sample.py", *map(str, options)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )


def test_stop_strings_and_samples_are_those_without_a_draft(folders):
    model, small, _ = folders
    options = ["--weights", model, "--prompt", "abcabcabc", "--prompt", "x", "--num-samples", 2]
    options += ["--max-new-tokens", 60, "--stop", "e", "--stop", "zz", "--top-k", 40, "--json"]

    results = [run(*options, *more) for more in ([], ["--draft", "ngram"], ["--draft", small])]
    records = []
    for result in results:
        assert result.returncode == 0, result.stderr
        lines = map(json.loads, result.stdout.splitlines())
        records.append({(line["prompt"], line["completion"]) for line in lines})
    assert records[0] == records[1] == records[2] and len(records[0]) == 4
    assert "draft" not in results[0].stderr

    last = results[2].stderr.splitlines()[-1]
    accepted = r", draft: \d+\.\d of \d+\.\d tokens accepted a step, then [\d.,]+ tokens/s$"
    assert re.search(accepted, last)


def test_a_draft_with_another_vocabulary_is_refused(folders, refused):
    model, _, other = folders
    line = refused("--weights", model, "--draft", other)
    assert f"--draft {other} has another vocabulary than the model: token" in line
    assert "is 'b' and not 'a'" in line or "is 'a' and not 'b'" in line
    line = refused("--weights", model, "--draft", "tiny/gpt2")
    assert "has another vocabulary than the model: " in line and " tokens and not 256" in line


@pytest.mark.parametrize("option", ["--ui", "--score", "--attention=a.png", "--choices=x"])
def test_a_draft_needs_a_text_that_is_continued(refused, option):
    assert "leave it out" in refused("--draft", "ngram", option)


def test_a_draft_is_refused_where_the_length_so_far_matters(refused, tmp_path):
    """Dynamic RoPE: checked together, tokens would have the angles of a longer text."""
    model = shutil.copytree(ROOT / "tiny/llama", tmp_path / "dynamic")
    values = json.loads((model / "config.json").read_text())
    values["rope_scaling"] = {"rope_type": "dynamic", "factor": 8.0}
    (model / "config.json").write_text(json.dumps(values))
    assert "--draft does not work with dynamic RoPE" in refused(
        "--weights", model, "--draft", "ngram"
    )


def test_a_draft_that_is_no_checkpoint_is_refused(folders, refused, tmp_path):
    line = refused("--weights", folders[0], "--draft", tmp_path / "nothing")
    assert "nothing: no such folder" in line


@pytest.mark.wide
@pytest.mark.parametrize("mode", ["pmap", "data", "fsdp", "tensor", "data:2,tensor:2"])
def test_every_way_to_split_a_model_gives_the_same_text(folders, mode):
    model, small, _ = folders
    options = ["--weights", model, "--temperature", 0, "--max-new-tokens", 50, "--json"]
    options += ["--prompt", "abcabcabc", "--prompt", "x", "--prompt", "What is it?"]
    devices = {"JAX_NUM_CPU_DEVICES": "4", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    texts = []
    for more in ([], ["--draft", "ngram"], ["--draft", small]):
        result = run(*options, "--parallel", mode, *more, **devices)
        assert result.returncode == 0, result.stderr
        texts.append([json.loads(line)["completion_ids"] for line in result.stdout.splitlines()])
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 3
