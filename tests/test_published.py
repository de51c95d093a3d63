"""The published checkpoints give what was published of them, mostly by transformers' own tests.

Needs the Hub, 114 GB of disk and, for the largest, 30 GB of memory; gated ones need their terms
accepted. One family: pytest -m network -k opt
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference import MATERIAL

import gemma
import gpt2
import llama
import mistral
import opt
import qwen

CITIES = [
    "Today is a beautiful day and I want",
    "In the city of",
    "Paris is the capital of France and",
    "Computers and mobile phones have taken",
]
SCENERY = [
    "This is a nice place. " * 800 + "I really enjoy the scenery,",  # past all windows
    "A list of colors: red, blue",
]
# A row for each test: the file, the Hub id, the dtype, the prompts of one ragged batch, and what
# follows each greedily. Gemma's are in float32 where the published run was in float16.
GREEDY = [
    (
        gpt2,
        "openai-community/gpt2",
        "float32",
        ["Hello, my dog is a little", "Today, I"],
        [
            " bit of a mess. I'm not sure if he's going",
            "'m going to be doing a lot of research on this. I",
        ],
    ),
    (
        gpt2,
        "openai-community/gpt2",
        "float32",
        ["hi", "Hello this is a very long sentence"],
        [
            ", who was born in the city of Kolkata, was a member of the Kolkata",
            ". I'm sorry. I'm sorry. I'm sorry. I'm sorry. I'm sorry",
        ],
    ),
    (
        opt,
        "facebook/opt-125m",
        "float32",
        CITIES,
        [" to", " New York, the city", " the capital", " over the"],
    ),
    (
        opt,
        "facebook/opt-350m",
        "float32",
        CITIES,
        [" to", " San Francisco, the city", " the capital", " over the"],
    ),
    (
        opt,
        "facebook/opt-350m",
        "float32",
        ["Hello, my dog is a little", "Today, I"],
        [
            " bit of a dork.\nI'm a little bit",
            " was in the middle of a conversation with a friend about the",
        ],
    ),
    (
        llama,
        "meta-llama/Llama-2-7b-hf",
        "float16",
        [
            "Simply put, the theory of relativity states that ",
            "My favorite all time favorite condiment is ketchup.",
        ],
        [
            "1) the speed of light is constant in all inertial reference frames, and 2) the laws "
            "of physics are the same for all inertial reference frames.\nThe theory of relativ",
            " I love it on everything. I love it on my eggs, my fries, my chicken, my burgers, my "
            "hot dogs, my sandwiches, my salads, my p",
        ],
    ),
    (
        mistral,
        "mistralai/Mistral-7B-v0.1",
        "float16",
        ["My favourite condiment is "],
        ["100% ketchup. I love it on everything. I’m not a big"],
    ),
    (
        gemma,
        "google/gemma-2b",
        "float32",
        ["Hello I am doing", "Hi today"],
        [
            " a project on the 1990s and I need to know what the most popular music",
            " I am going to share with you a very easy and simple recipe of <strong><em>Kaju Kat",
        ],
    ),
    (
        gemma,
        "google/gemma-2-9b",
        "bfloat16",
        ["Hello I am doing", "Hi today"],
        [
            " a project on the 1918 flu pandemic and I am trying to find out how many",
            " I'm going to be talking about the history of the United States. The United States of "
            "America",
        ],
    ),
    (
        gemma,
        "google/gemma-2-2b",
        "bfloat16",
        ["Hello I am doing", "Hi today"],
        [
            " a project on the 1960s and I am trying to find out what the average",
            " I'm going to be talking about the 10 most powerful characters in the Naruto series.",
        ],
    ),
    (
        gemma,
        "google/gemma-2-2b",
        "float32",
        SCENERY,
        [
            " the people, the food, the culture, the history, the music, the art, the architecture",
            ", green, yellow, orange, purple, pink, brown, black, white, gray, silver",
        ],
    ),
    (
        gemma,
        "google/gemma-3-1b-it",
        "bfloat16",
        ["Write a poem about Machine Learning."],
        [
            "\n\n---\n\nThe data flows, a silent stream,\nInto the neural net, a waking dream.\n"
            "Algorithms hum, a coded grace,\n"
        ],
    ),
    (
        gemma,
        "google/gemma-3-1b-it",
        "float32",
        SCENERY,
        [
            " and I'm going to take a walk.\n\nI really enjoy the scenery, and I'",
            ", green, yellow, orange, purple, brown, black, white, gray.\n\nI'",
        ],
    ),
]
DOG = [
    464,
    3290,
    373,
    1043,
    287,
    257,
    2214,
    1474,
    262,
    16246,
    286,
    2688,
    290,
    2688,
    27262,
    13,
    198,
    198,
    464,
    3290,
]
MEANING = [1, 306, 4658, 278, 6593, 310, 2834, 338]  # "I believe the meaning of life is" to Llama
MEANS = [  # of the logits after each of those tokens, and how far from them they may be
    (
        llama,
        "meta-llama/Llama-2-7b-hf",
        "float16",
        0.02,
        [-6.6544, -4.1259, -4.984, -3.2456, 0.8261, -3.0124, 1.2971, -3.3641],
    ),
    (
        llama,
        "meta-llama/Llama-2-7b-hf",
        "bfloat16",
        0.05,
        [-6.5208, -4.1218, -4.9377, -3.2536, 0.8127, -2.9811, 1.2918, -3.3848],
    ),
    (
        mistral,
        "mistralai/Mistral-7B-v0.1",
        "float32",
        0.001,
        [-2.5548, -2.5737, -3.06, -2.5906, -2.8478, -2.8118, -2.9325, -2.7694],
    ),
]
MISTRAL_FIRST = [  # the logits of the first 30 tokens after the first of MEANING, in float32
    -5.8781,
    -5.8616,
    -0.1052,
    -4.72,
    -5.8781,
    -5.8774,
    -5.8773,
    -5.8777,
    -5.8781,
    -5.878,
    -5.8781,
    -5.8779,
    -1.0787,
    1.7583,
    -5.8779,
    -5.878,
    -5.8783,
    -5.8778,
    -5.8776,
    -5.8781,
    -5.8784,
    -5.8778,
    -5.8778,
    -5.8777,
    -5.8779,
    -5.8778,
    -5.8776,
    -5.878,
    -5.8779,
    -5.8781,
]
OPT_350M_IDS = [0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2]
OPT_350M_HIDDEN = [  # three numbers after each of the first three
    [-0.28726277, -1.9241608, -0.3058734],
    [-1.2737825, -0.13332152, -0.18766522],
    [0.41159445, 0.1191957, -1.3107123],
]
OPT_350M_MEANS = {  # the mean logit after each token of a prompt without </s>, from Metaseq itself
    "Today is a beautiful day and I want to": [
        1.3851,
        -13.8923,
        -10.5229,
        -10.7533,
        -0.2309,
        -10.2384,
        -0.5365,
        -9.0947,
        -5.167,
    ],
    "In the city of": [-4.7073, -10.6276, -3.9415, -21.5242],
    "Paris is the capital of France and": [
        0.6247,
        -3.4229,
        -8.9179,
        -1.4297,
        -14.165,
        1.4146,
        -9.0218,
    ],
    "Computers and mobile phones have taken": [
        6.4783,
        -1.9913,
        -10.7926,
        -2.3336,
        1.5092,
        -0.9974,
        -6.8213,
    ],
}
SMOLLM3_MEANS = [9.3306, 8.1721, 6.4764, 7.6011, 11.1218, 7.5343, 7.1195, 8.0956]  # as in MEANS
SMOLLM3_FIRST = [15.7759, 17.6274, 16.3404, 14.5543, 13.1366, 14.2475, 15.871, 15.6753]
GRAVITY = "Gravity is the force"
PULLS = (
    " that pulls objects toward the center of the Earth. It is a force that is always present, even"
)
POWERLM_MEANS = [-1.9798, -3.1626, -2.8062, -2.3777, -2.7091, -2.2338, -2.5924, -2.3974]
MIXTRAL_TINY = [[0.167, 0.162, 0.6094], [-0.8906, -0.1588, -0.606], [0.1572, 0.129, 0.7246]]


@pytest.fixture(scope="module")
def load():
    """Loads a model; only the last one is kept, as some are large."""
    kept = {}

    def load(module, name, dtype):
        if (name, dtype) not in kept:
            kept.clear()
            kept[name, dtype] = module.load(name, dtype=jnp.dtype(dtype))
        return kept[name, dtype]

    return load


def ids_of(row):
    return f"{row[1]} {row[2]}"


@pytest.mark.network
@pytest.mark.parametrize("row", GREEDY, ids=ids_of)
def test_the_published_prompts_are_continued_by_the_published_texts(load, row):
    module, name, dtype, prompts, expected = row
    codec, model = module.tokenizer(name), load(module, name, dtype)
    prompts = [codec.encode(prompt) for prompt in prompts]
    new = module.generate(model, prompts, 60, key=jax.random.key(0), temperature=0)
    for prompt, row, completion in zip(prompts, new, expected, strict=True):
        text = codec.decode(prompt + row)[len(codec.decode(prompt)) :]
        assert text[: len(completion)] == completion


@pytest.mark.network
def test_gpt2_gives_the_published_ids(load):
    model = load(gpt2, "openai-community/gpt2", "float32")
    [new] = gpt2.generate(model, [DOG[:2]], 18, key=jax.random.key(0), temperature=0)
    assert DOG[:2] + new == DOG


@pytest.mark.network
@pytest.mark.parametrize("row", MEANS, ids=ids_of)
def test_mean_logits_are_the_published_ones(load, row):
    module, name, dtype, tolerance, expected = row
    logits = load(module, name, dtype)(jnp.array([MEANING]))
    np.testing.assert_allclose(logits.mean(axis=-1)[0], expected, atol=tolerance)
    if dtype == "float32":  # published to four places
        np.testing.assert_allclose(logits[0, 0, :30], MISTRAL_FIRST, atol=0.001)


@pytest.mark.network
def test_mistral_repeats_a_pattern_longer_than_its_window(load):
    model = load(mistral, "mistralai/Mistral-7B-v0.1", "float16")
    prompt = [1] + [306, 338] * 2048  # 4,097 tokens
    [new] = mistral.generate(model, [prompt], 4, key=jax.random.key(0), temperature=0)
    assert new[-2:] == [306, 338]


@pytest.mark.network
def test_ministral_gives_the_published_means_and_text(load):
    """Of tests/models/ministral/test_modeling_ministral.py in transformers, at 120807f1."""
    name = "mistralai/Ministral-8B-Instruct-2410"
    model, codec = load(mistral, name, "bfloat16"), mistral.tokenizer(name)
    expected = [-1.5029, -7.2815, 4.5190, 0.5930, -5.2526, 3.0765, -0.6314, 1.8068]
    means = model(jnp.array([MEANING])).mean(axis=-1)[0]
    np.testing.assert_allclose(means, expected, rtol=0.01, atol=0.05)

    prompt = codec.encode("My favourite condiment is ")
    [new] = mistral.generate(model, [prompt], 20, key=jax.random.key(0), temperature=0)
    text = codec.decode(prompt + new)
    assert text.startswith("My favourite condiment is 100% natural, 100% organic, 100% free of")


@pytest.mark.network
def test_opt_350m_gives_the_hidden_states_of_transformers_and_the_logits_of_metaseq(load):
    model, codec = load(opt, "facebook/opt-350m", "float32"), opt.tokenizer("facebook/opt-350m")
    hidden, _ = model.hidden(jnp.array([OPT_350M_IDS]))
    assert hidden.shape == (1, 11, 512)
    np.testing.assert_allclose(hidden[0, :3, :3], OPT_350M_HIDDEN, atol=5e-5)
    for prompt, expected in OPT_350M_MEANS.items():
        logits = model(jnp.array([codec.encode(prompt)[1:]]))
        np.testing.assert_allclose(logits.mean(axis=-1)[0], expected, atol=1e-4)


@pytest.mark.network
def test_smollm3_gives_the_logits_and_the_text_of_transformers(load):
    """What tests/models/smollm3 of transformers expects, in float32 and within its tolerance."""
    name = "HuggingFaceTB/SmolLM3-3B"
    model, codec = load(llama, name, "float32"), llama.tokenizer(name)
    logits = model(jnp.array([MEANING]))
    np.testing.assert_allclose(logits.mean(axis=-1)[0], SMOLLM3_MEANS, rtol=0.01, atol=0.01)
    np.testing.assert_allclose(logits[0, 0, :8], SMOLLM3_FIRST, rtol=1e-3)
    [new] = llama.generate(model, [codec.encode(GRAVITY)], 20, key=0, temperature=0)
    assert codec.decode(new) == PULLS


@pytest.mark.network
def test_a_granite_gives_the_logits_of_transformers(load):
    """What tests/models/granite of transformers expects, in bfloat16 and within its tolerance."""
    logits = load(llama, "ibm/PowerLM-3b", "bfloat16")(jnp.array([MEANING]))
    np.testing.assert_allclose(logits.mean(axis=-1)[0], POWERLM_MEANS, rtol=0.01, atol=0.01)


@pytest.mark.network
def test_qwen3_writes_what_transformers_tests_say(load):
    """test_modeling_qwen3.py, test_model_600m_generation."""
    name = "Qwen/Qwen3-0.6B-Base"
    model = load(qwen, name, "float32")
    codec = qwen.tokenizer(name)
    prompt = codec.encode("My favourite condiment is ")
    [new] = qwen.generate(model, [prompt], 20, key=0, temperature=0)
    assert codec.decode(new) == "100% plain, unflavoured, and unadulterated. It is"


@pytest.mark.network
def test_mixtral_tiny_gives_the_logits_of_the_original_code(load):
    """The published ones are rounded to bfloat16: by up to 0.002 below 1, and so are the hidden
    states on the way."""
    model = load(mistral, "hf-internal-testing/Mixtral-tiny", "bfloat16")
    logits = model(jnp.array([[0, 1, 0], [0, 1, 0]]))
    np.testing.assert_allclose(logits[0, :, :3], MIXTRAL_TINY, atol=0.01)


@pytest.mark.skipif(not MATERIAL.exists(), reason="the references are not at hand")
def test_the_expectations_are_the_published_ones():
    """What stands above is what the collected references say, to the letter."""
    references = json.loads((MATERIAL / "references" / "published-references.json").read_text())
    for _, name, _, prompts, completions in GREEDY:
        texts = [
            text
            for entry in references
            if entry["model"] == name and "expected" in entry
            for value in entry["expected"].values()
            for text in np.ravel(value)
        ]
        for prompt, completion in zip(prompts, completions, strict=True):
            assert any(
                str(text).endswith(prompt + completion) or text == completion for text in texts
            ), completion
    numbers = json.dumps([entry.get("expected") for entry in references])
    for values in [
        DOG,
        *(row[4] for row in MEANS),
        MISTRAL_FIRST,
        *OPT_350M_HIDDEN,
        *MIXTRAL_TINY,
        *OPT_350M_MEANS.values(),
    ]:
        assert json.dumps(values)[:-1] in numbers
