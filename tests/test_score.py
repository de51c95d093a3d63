"""sample.py --score and --choices: log-probabilities, equal to those of transformers."""

import json
import math

import numpy as np
import pytest
import torch
from flax import nnx
from helpers.families import GPT2
from helpers.reference import ROOT, read_hf
from helpers.small import byte_tokenizer, write_checkpoint
from test_sample import run, text_of
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing

import gpt2
import sample

TEXT = "ROMEO: I love thee, my sweet; the night is come."


def reference_log_probs(hf, ids) -> np.ndarray:
    """The log-probability of each id but the first, by transformers."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        log_probs = torch.log_softmax(hf(tokens).logits[0, :-1].double(), dim=-1)
    return log_probs.gather(-1, tokens[0, 1:, None])[:, 0].numpy()


def tiny(family):
    """The bundled model of a family: (model, tokenizer, that of transformers)."""
    folder = ROOT / "tiny" / family.name
    module = family.module
    return module.load(folder), module.tokenizer(folder), read_hf(family, folder)


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.core_gpt2_only
def test_the_scores_of_a_text_are_those_of_transformers(family):
    model, codec, hf = tiny(family)
    record = sample.score_text(family.module, model, codec, TEXT)
    expected = reference_log_probs(hf, record["ids"])
    assert record["ids"] == codec.encode(TEXT)
    assert record["log_probs"][0] is None
    np.testing.assert_allclose(record["log_probs"][1:], expected, atol=1e-4)

    # The loss of transformers is the mean that perplexity is made of.
    tokens = torch.tensor([record["ids"]])
    with torch.no_grad():
        loss = hf(tokens, labels=tokens).loss.item()
    assert math.isclose(math.log(record["perplexity"]), loss, abs_tol=1e-4)


def test_every_configuration_has_the_scores_of_transformers(case, monkeypatch):
    """Windows, soft-caps, experts; the logits of five tokens at a time."""
    monkeypatch.setattr(sample, "SCORED_AT_ONCE", 5)
    ids = case.tokens[0]
    graphdef, state = nnx.split(case.model)
    x, _ = sample.run_hidden(graphdef, state, ids[None])
    log_probs, ranks, best, best_ids = sample.score_in_pieces(graphdef, state, x[0], ids, 1, top=3)
    expected = reference_log_probs(case.hf32, ids.tolist())
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-4)
    assert ranks.shape == expected.shape and ranks.min() >= 1

    # A token among the three likeliest is found there, at its rank.
    for i, rank in enumerate(ranks):
        if rank <= 3:
            assert best[i, rank - 1] == log_probs[i]
    assert best.shape == best_ids.shape == (len(expected), 3)


def test_the_likeliest_token_has_rank_1_and_bits_are_counted_by_byte():
    """Of "é", two bytes and two tokens; the first token and its bytes have no score."""
    model, codec, _ = tiny(GPT2)
    record = sample.score_text(GPT2.module, model, codec, "The é")
    logits = np.asarray(model([record["ids"]])[0, :-1])
    order = np.argsort(-logits, axis=-1).tolist()
    places = [row.index(id) + 1 for row, id in zip(order, record["ids"][1:], strict=True)]
    assert record["ranks"] == [None, *places]
    assert record["tokens"] == ["The", " ", "\ufffd", "é"]
    nats = -sum(record["log_probs"][1:])
    assert math.isclose(record["bits_per_byte"], nats / math.log(2) / 3)


def test_the_table_has_a_line_for_each_token_and_ends_with_the_perplexity():
    codec = GPT2.module.tokenizer(ROOT / "tiny/gpt2")
    printed = text_of("--prompt", "ROMEO:\nI", "--score").splitlines()
    assert len(printed) == len(codec.encode("ROMEO:\nI")) + 2
    assert printed[0].split() == ["id", "log-probability", "probability", "rank", "token"]
    assert printed[1].split()[1:4] == ["-", "-", "-"]  # no token stands before it
    assert any(line.endswith('  "\\n"') for line in printed)
    for part in ["scored: mean log-probability -", "perplexity", "bits per byte"]:
        assert part in printed[-1]


def test_several_texts_have_a_line_of_json_each():
    flags = ["--prompt", "The king", "--prompt", "To be, or not", "--score", "--json"]
    records = [json.loads(line) for line in text_of(*flags).splitlines()]
    assert [record["prompt"] for record in records] == ["The king", "To be, or not"]
    for record in records:
        sizes = {len(record[key]) for key in ("ids", "tokens", "log_probs", "ranks")}
        assert sizes == {record["scored_tokens"] + 1}
        mean = np.mean(record["log_probs"][1:])
        assert math.isclose(record["perplexity"], math.exp(-mean), rel_tol=1e-6)


def test_a_begin_token_gives_the_first_letter_a_score(tmp_path):
    """As <s> of Llama, <bos> of Gemma and </s> of OPT: it has no score itself, and no bytes."""
    write_checkpoint(tmp_path, vocab_size=257)
    codec = byte_tokenizer()
    codec.add_special_tokens(["<s>"])
    codec.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    codec.save(str(tmp_path / "tokenizer.json"))

    codec = gpt2.tokenizer(tmp_path)
    record = sample.score_text(gpt2, gpt2.load(tmp_path), codec, "king")
    assert record["tokens"] == ["<s>", *"king"]
    assert record["scored_tokens"] == 4
    nats = -sum(record["log_probs"][1:])
    assert math.isclose(record["bits_per_byte"], nats / math.log(2) / 4)


# ------------------------------------------------------------------------------------------ choices

CHOICES = [" is dead", " and the queen are gone", "dom", " x"]


@pytest.mark.core_gpt2_only
def test_continuations_have_the_log_probabilities_of_transformers(family):
    model, codec, hf = tiny(family)
    record = sample.score_choices(family.module, model, codec, "ROMEO:\nThe king", CHOICES)
    prompt_ids = codec.encode("ROMEO:\nThe king")
    assert {choice["choice"] for choice in record["choices"]} == set(CHOICES)
    for choice in record["choices"]:
        ids = codec.encode("ROMEO:\nThe king" + choice["choice"])
        assert ids == prompt_ids + choice["ids"]
        expected = reference_log_probs(hf, ids)[len(prompt_ids) - 1 :]
        np.testing.assert_allclose(choice["log_probs"], expected, atol=1e-4)
        assert math.isclose(choice["log_prob"], expected.sum(), abs_tol=1e-3)
    totals = [choice["log_prob"] for choice in record["choices"]]
    assert totals == sorted(totals, reverse=True)


def test_every_configuration_ranks_by_the_cache_as_without(case):
    """Rows of different lengths, past the shorter windows, and within the trained length of dynamic
    RoPE: beyond it each token has other angles once more follow, which a cache does not undo.
    """
    rows = case.tokens[:, :20].tolist()
    texts = [rows[0][:9] + row[: 4 + i] for i, row in enumerate(rows)]
    found = sample.score_continuations(case.family.module, case.model, texts, 9)
    for ids, log_probs in zip(texts, found, strict=True):
        expected = reference_log_probs(case.hf32, ids)[8:]
        np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-4)


def test_the_prompt_is_computed_once(monkeypatch):
    fed = []
    model, codec, _ = tiny(GPT2)

    def counted(graphdef, state, tokens, *rest, run_hidden=sample.run_hidden):
        fed.append(tokens.shape)
        return run_hidden(graphdef, state, tokens, *rest)

    monkeypatch.setattr(sample, "run_hidden", counted)
    sample.score_choices(GPT2.module, model, codec, TEXT, CHOICES)
    prompt = len(codec.encode(TEXT))
    longest = max(len(codec.encode(TEXT + choice)) for choice in CHOICES) - prompt
    assert fed == [(1, prompt), (4, longest)]


def test_a_continuation_begins_where_the_ids_part():
    """A prompt that ends in a blank: the token " king" takes it along."""
    model, codec, _ = tiny(GPT2)
    blank = sample.score_choices(GPT2.module, model, codec, "The ", ["king"])
    plain = sample.score_choices(GPT2.module, model, codec, "The", [" king"])
    assert blank["choices"][0]["ids"] == codec.encode(" king")
    np.testing.assert_allclose(
        blank["choices"][0]["log_prob"], plain["choices"][0]["log_prob"], atol=1e-5
    )


def test_a_continuation_without_a_token_of_its_own_is_one_line(tmp_path, capsys):
    """Some tokenizers drop blanks at the end of a text."""
    write_checkpoint(tmp_path, vocab_size=256)
    codec = byte_tokenizer()
    codec.normalizer = Strip()
    codec.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SystemExit):
        sample.score_choices(
            gpt2, gpt2.load(tmp_path), gpt2.tokenizer(tmp_path), "The king", [" is", " "]
        )
    assert "' ' adds no token to 'The king'" in capsys.readouterr().err


def test_choices_are_a_table_or_a_line_of_json():
    flags = ["--prompt", "The king", "--choices", " is", "--choices", " x y"]
    prompt, head, *lines = text_of(*flags).splitlines()
    assert prompt == 'after "The king":'
    assert head.split() == ["log-probability", "per", "token", "tokens", "continuation"]
    record = json.loads(text_of(*flags, "--json"))
    assert [choice["choice"] for choice in record["choices"]] == [" is", " x y"]
    for line, choice in zip(lines, record["choices"], strict=True):
        assert line.split()[0] == f"{choice['log_prob']:.4f}"
        assert line.endswith(f'  "{choice["choice"]}"')


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--score", "--prompt", "a b c " * 200], "do not fit the context length of 256"),
        (["--choices", "a b c " * 200, "--prompt", "a"], "its parts as prompts of their own"),
        (["--score", "--prompt", "a"], "a text of two tokens or more"),
        (["--choices", "", "--prompt", "a"], "--choices must be a text"),
        (["--choices", "a", "--score", "--prompt", "a"], "leave one out"),
        (["--score", "--chat", "--prompt", "a"], "neither --chat nor --attention"),
        (["--score", "--num-samples", "2", "--prompt", "a"], "do not continue a prompt"),
        (["--choices", "he king", "--prompt", "T"], "give a longer prompt"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_cannot_be_scored_is_one_line(flags, said):
    done = run("--weights", "tiny", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.wide
def test_a_sharded_model_has_the_same_scores():
    """On four devices, in each of --parallel's modes; sums are taken in another order."""
    env = {"JAX_NUM_CPU_DEVICES": "4", "NPROC": "16"}
    flags = ["--model", "llama", "--weights", "tiny", "--prompt", TEXT, "--json", "--parallel"]
    for asked in (["--score"], ["--choices", " And thou", "--choices", " Come"]):
        expected = json.loads(text_of(*flags, "no", *asked))
        for mode in ("tensor", "data", "fsdp", "pmap"):
            found = json.loads(text_of(*flags, mode, *asked, **env))
            assert_same_scores(found, expected)


def assert_same_scores(one: dict, other: dict):
    """Of two records, of a text or of continuations."""
    pairs = zip(one.get("choices", [one]), other.get("choices", [other]), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a["log_probs"][1:], b["log_probs"][1:], atol=1e-4)
