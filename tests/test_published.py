"""The published checkpoints give the published texts: greedy ones, of transformers' own tests.

Needs the Hub, and half a gigabyte for the weights: pytest -m network
"""

import json

import jax
import pytest
from reference import MATERIAL

import gpt2

GREEDY = [  # (prompt, text): float32 in PyTorch unless another is said
    ("The dog", "The dog was found in a field near the intersection of West and West Streets.\n\n"
                "The dog"),
    ("Hello, my dog is a little", "Hello, my dog is a little bit of a mess. I'm not sure if he's "
                                  "going"),
    ("Today, I", "Today, I'm going to be doing a lot of research on this. I"),
    ("hi", "hi, who was born in the city of Kolkata, was a member of the Kolkata"),  # float16
    ("Hello this is a very long sentence",
     "Hello this is a very long sentence. I'm sorry. I'm sorry. I'm sorry. I'm sorry. I'm sorry"),
]
DOG = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13,
       198, 198, 464, 3290]


def assert_continues(codec, model, expected):
    """All prompts in one ragged batch give their texts, greedily."""
    prompts = [codec.encode(prompt) for prompt, _ in expected]
    texts = [codec.encode(text) for _, text in expected]
    longest = max(len(text) - len(prompt) for prompt, text in zip(prompts, texts, strict=True))
    new = gpt2.generate(model, prompts, longest, key=jax.random.key(0), temperature=0)
    for prompt, text, row, (_, wanted) in zip(prompts, texts, new, expected, strict=True):
        assert text[: len(prompt)] == prompt
        assert codec.decode(prompt + row[: len(text) - len(prompt)]) == wanted


@pytest.fixture(scope="module")
def published():
    name = "openai-community/gpt2"
    return gpt2.tokenizer(name), gpt2.load(name, dtype="float32")


@pytest.mark.network
def test_gpt2_continues_the_published_prompts_with_the_published_texts(published):
    assert_continues(*published, GREEDY)


@pytest.mark.network
def test_gpt2_gives_the_published_ids(published):
    _, model = published
    [new] = gpt2.generate(model, [DOG[:2]], 18, key=jax.random.key(0), temperature=0)
    assert DOG[:2] + new == DOG


@pytest.mark.skipif(not MATERIAL.exists(), reason="the references are not at hand")
def test_the_expectations_are_the_published_ones():
    """What stands above is what transformers' tests say, and its texts are of the given length."""
    references = json.loads((MATERIAL / "references" / "published-references.json").read_text())
    ours = [entry["expected"] for entry in references
            if entry["model"] == "openai-community/gpt2" and "modeling_gpt2" in entry["file"]]
    texts = [text for expected in ours
             for text in expected.get("greedy_texts", [expected.get("text")])]
    assert {text for _, text in GREEDY} <= set(texts)
    assert DOG in [expected.get("greedy_ids_max_length_20") for expected in ours]
    assert all(text.startswith(prompt) for prompt, text in GREEDY)
