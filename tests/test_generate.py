"""generate(): the same tokens as the naive loop and as transformers, whatever shares the batch."""

import dataclasses
import logging
import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from helpers.families import EVERY_CONFIG, FAMILIES, GPT2, MISTRAL, once
from helpers.reference import Case, sampling, write_random

FILTERS = {
    "greedy": {"temperature": 0},
    "sampled": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "penalty": {"repetition_penalty": 1.3},
    "greedy with penalty": {"temperature": 0, "repetition_penalty": 1.3},
    "all": {
        "temperature": 1.5,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
    },
}
# All of them for the first file, as sample() is the same to the letter in all.
every_filter = pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(family, options, id=f"{family.name}: {name}")
        for family in FAMILIES
        for name, options in FILTERS.items()
        if family is GPT2 or name in ("greedy", "all")
    ],
    indirect=["family"],
)
# One config of each family, of which the other three are much alike here.
HALF = [
    pytest.param(
        config.values[0],
        id=config.id,
        marks=[]
        if config.values[0][0] is MISTRAL
        else pytest.mark.wide
        if config.values[0][0] is GPT2
        else pytest.mark.slow,
    )
    for config in EVERY_CONFIG
    if not config.marks
]
# Greedy tokens are those of transformers for every config; and these are for more than one row.
RAGGED = [
    pytest.param(config.values[0], id=config.id, marks=[pytest.mark.slow] if config.marks else [])
    for config in EVERY_CONFIG
]
PROMPTS = [[5, 7, 11], [2] * 30, [9], list(range(20, 32))]
KEY = jax.random.key(7)


def row_key(index):
    """The key of a row where generate gets a single one."""
    return jax.random.fold_in(KEY, index)


def naive(module, model, prompt, n, **options):
    """The naive loop on the first row's key."""
    return module.generate_naive(model, prompt, n, key=row_key(0), **sampling(**options))


@every_filter
def test_generate_gives_the_tokens_of_the_naive_loop(family, model, options):
    prompt = [5, 7, 11]
    new = family.module.generate(model, [prompt], 12, key=KEY, **options)
    assert new == [naive(family.module, model, prompt, 12, **options)]


@pytest.mark.parametrize("case", RAGGED, indirect=True)
def test_rows_of_every_config_are_those_of_the_naive_loop(case):
    """Ragged rows, past the shorter windows, and within the trained length of dynamic RoPE: beyond
    it each token has other angles once more tokens follow, which a cache does not undo."""
    module, model, prompts = case.family.module, case.model, [[5, 7, 11], list(range(20, 27))]
    rows = module.generate(model, prompts, 8, key=KEY, temperature=0)
    assert rows == [naive(module, model, prompt, 8, temperature=0) for prompt in prompts]


@pytest.mark.parametrize("case", HALF, indirect=True)
def test_in_half_precision_the_tokens_are_drawn_from_the_same_logits_with_remat_or_without(case):
    """On a CPU the blocks stand in branches then, with the cache as their other way out. Likeliest
    tokens are those of the naive loop until two logits are as close as rounding."""
    module, results = case.family.module, []
    for remat in (False, True):
        model = module.load(case.folder, dtype="bfloat16", remat=remat)
        results.append(module.generate(model, [[5, 7, 11], list(range(20, 27))], 12, key=KEY))
    assert results[0] == results[1]
    [new] = module.generate(model, [[5, 7, 11]], 12, key=KEY, temperature=0)
    logits = np.asarray(model(np.array([[5, 7, 11, *new]])))[0, 2:-1]
    assert (logits.max(axis=-1) - logits[np.arange(12), new] < 0.05 * logits.std()).all()


@pytest.mark.core_gpt2_only
def test_they_agree_over_several_calls_of_decode(family, model):
    n = family.module.STEPS + 8
    new = family.module.generate(model, [[5, 7, 11]], n, key=KEY)
    assert new == [naive(family.module, model, [5, 7, 11], n)]


@every_filter
@pytest.mark.core_gpt2_only
def test_a_row_is_the_same_alone_and_in_any_batch(family, model, options):
    keys = jax.numpy.stack([row_key(i) for i in range(4)])
    together = family.module.generate(model, PROMPTS, 24, key=KEY, **options)
    assert together == family.module.generate(model, PROMPTS, 24, key=keys, **options)
    turned = family.module.generate(model, PROMPTS[::-1], 24, key=keys[::-1], **options)
    assert together == turned[::-1]
    for i, prompt in enumerate(PROMPTS):
        alone = family.module.generate(model, [prompt], 24, key=keys[i : i + 1], **options)
        assert alone == [together[i]]


def test_greedy_tokens_are_those_of_transformers(case):
    """Up to the first place where float64 sees the two best tokens within 1e-4 of each other, 10
    times what float32 may be off: there a rounding may decide."""
    hf, module = case.hf64, case.family.module
    hf.generation_config.eos_token_id = None
    total = 0
    for i, prompt in enumerate(PROMPTS[:2]):
        prompt = [token % case.model.config.vocab_size for token in prompt]
        with torch.no_grad():
            text = hf.generate(
                torch.tensor([prompt]),
                max_new_tokens=32,
                do_sample=False,
                attention_mask=torch.ones(1, len(prompt)),
                pad_token_id=0,
            )
            best = hf(text).logits[0, len(prompt) - 1 : -1].topk(2).values
        doubtful = [*(best[:, 0] - best[:, 1] < 1e-4).tolist(), True]
        agreed = doubtful.index(True)
        [new] = module.generate(case.model, [prompt], 32, key=KEY, temperature=0)
        assert len(new) == 32
        assert new[:agreed] == text[0, len(prompt) :].tolist()[:agreed], f"prompt {i}"
        total += agreed
    assert total >= 32  # of 64: a real comparison


@once
def test_greedy_with_a_repetition_penalty_is_that_of_transformers(plain):
    plain.hf64.generation_config.eos_token_id = None
    text = plain.hf64.generate(
        torch.tensor([[5, 7, 11]]),
        max_new_tokens=64,
        do_sample=False,
        attention_mask=torch.ones(1, 3),
        repetition_penalty=3.0,
        pad_token_id=0,
    )
    [new] = plain.family.module.generate(
        plain.model, [[5, 7, 11]], 64, key=KEY, temperature=0, repetition_penalty=3.0
    )
    assert new == text[0, 3:].tolist()
    assert (
        new
        != plain.family.module.generate(plain.model, [[5, 7, 11]], 64, key=KEY, temperature=0)[0]
    )


@once
def test_a_row_ends_before_its_first_stop_id_and_the_others_go_on(family, model):
    free = family.module.generate(model, PROMPTS, 40, key=KEY)
    stop = free[0][4]
    stopped = family.module.generate(model, PROMPTS, 40, key=KEY, stop_ids=(stop, 10**6))
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(stopped[0]) <= 4 and max(map(len, stopped)) > 4


@once
def test_generation_ends_early_once_every_row_has_stopped(family, model, monkeypatch):
    calls = []
    decode = family.module.decode
    monkeypatch.setattr(family.module, "decode", lambda *a: calls.append(a[-2]) or decode(*a))
    free = family.module.generate(model, [[5, 7, 11]], 100, key=KEY)
    everywhere, calls[:] = list(calls), []
    assert sum(everywhere) == 99  # one came from prefill
    assert family.module.generate(model, [[5, 7, 11]], 100, key=KEY, stop_ids=[free[0][3]])
    assert len(calls) == 1


@pytest.mark.parametrize("n", [1, 2, 32, 33, 34, 70])
@once
def test_exactly_as_many_tokens_as_asked_for_and_a_prefix_of_more(family, model, n):
    new = family.module.generate(model, PROMPTS, n, key=KEY)
    assert [len(row) for row in new] == [n] * 4
    longer = family.module.generate(model, PROMPTS, 71, key=KEY)
    assert new == [row[:n] for row in longer]


@once
def test_one_prompt_in_two_rows_is_continued_differently_and_repeatably(family, model):
    new = family.module.generate(model, [[5, 7, 11]] * 4, 16, key=KEY)
    assert len(set(map(tuple, new))) == 4
    assert new == family.module.generate(model, [[5, 7, 11]] * 4, 16, key=KEY)
    other = family.module.generate(model, [[5, 7, 11]] * 4, 16, key=jax.random.key(8))
    assert not set(map(tuple, new)) & set(map(tuple, other))


@once
def test_no_key_is_used_twice(family, model, monkeypatch):
    """Every draw of every row and step, prefill's included, has a key of its own."""
    keys, sample = [], family.module.sample

    def spy(logits, rng_keys, *rest, **options):
        keys.extend(map(bytes, np.asarray(jax.random.key_data(rng_keys))))
        return sample(logits, rng_keys, *rest, **options)

    monkeypatch.setattr(family.module, "sample", spy)
    with jax.disable_jit():
        family.module.generate(model, [[5, 7, 11], [5, 7], [5, 7, 11]], 3, key=KEY)
    assert len(keys) == len(set(keys)) == 9


@pytest.mark.core_gpt2_only
def test_ids_that_only_pad_the_vocabulary_are_never_drawn(family, plain):
    """The extra rows of the token table are so large that they would win everywhere."""
    module, V = family.module, plain.model.config.vocab_size
    config = dataclasses.replace(plain.model.config, padded_vocab_size=V + 31)
    padded = module.Model(config, rngs=nnx.Rngs(0))
    nnx.update(padded, nnx.state(plain.model))
    table = getattr(padded, family.table).embedding
    extra = 1e3 * np.random.default_rng(4).normal(size=(31, table.shape[1]))
    table.set_value(jax.numpy.concatenate([table[...], extra]).astype(jax.numpy.float32))
    assert padded(jax.numpy.array([[1, 2]])).shape[-1] == V
    new = module.generate(padded, PROMPTS, 33, key=KEY)
    assert new == module.generate(plain.model, PROMPTS, 33, key=KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "must not be empty"),
        ({"prompts": [[1], []]}, "must not be empty"),
        ({"prompts": [[1, 97]]}, "outside the vocabulary of 97"),
        ({"prompts": [[-1]]}, "outside the vocabulary of 97"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more"),
        ({"prompts": [[1] * 120], "max_new_tokens": 9}, r"120 \+ 9 tokens.* 128"),
    ],
    ids=str,
)
@once
def test_what_cannot_be_continued_is_refused_with_the_reason(family, model, change, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 1, "key": KEY} | change
    with pytest.raises(family.module.InputError, match=message):
        family.module.generate(model, **arguments)


@pytest.mark.core_gpt2_only
def test_the_context_can_be_filled_to_its_last_position(family, model):
    limit = model.config.max_position_embeddings
    prompt = [token % 50 for token in range(limit - 8)]
    [new] = family.module.generate(model, [prompt], 8, key=KEY, temperature=0)
    assert new == naive(family.module, model, prompt, 8, temperature=0)


@once
def test_64_prompt_lengths_below_512_compile_at_most_8_programs(family, tmp_path, caplog):
    """Counted in the compiler's own log, which also shows that the counter works: every other
    batch size, and every other max_new_tokens that needs more cache, is a new pair of programs."""
    longer = {family.context: 1024, family.depth: 1, family.width: 24}
    write_random(family, family.hf_config(**family.sizes | longer), tmp_path)
    model = Case(family, tmp_path).model

    def programs(lengths, rows=1):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            for n in lengths:
                family.module.generate(model, [[1] * n] * rows, 20, key=KEY)
        named = [
            re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage())
            for record in caplog.records
        ]
        return [match[1] for match in named if match and match[1] in ("prefill", "decode")]

    few = programs(np.linspace(1, 511, 64).astype(int))
    assert 2 <= len(few) <= 8
    assert sorted(programs([100], rows=2)) == ["decode", "prefill"]
    assert programs([3, 77, 511]) == []


@pytest.mark.core_gpt2_only
@every_filter
def test_logits_that_are_no_numbers_end_it_with_one_line(family, options):
    """Damaged weights, or float16 overflowing: a NaN is the likeliest of all to argmax, and token
    0 would be written for ever."""
    module = family.module
    model = module.load(f"tiny/{family.name}")
    graphdef, state = nnx.split(model)
    broken = nnx.merge(graphdef, jax.tree.map(lambda x: x * np.nan if x.ndim > 1 else x, state))
    for prompts in ([[5, 6]], [[5, 6], [7]]):
        with pytest.raises(module.InputError, match="NaN"):
            module.generate(broken, prompts, 3, key=0, **options)
