"""Fine-tuning on conversations: how they are written as tokens, and which tokens are learned."""

import dataclasses
import json
import math
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from flax import nnx
from helpers import templates
from helpers.small import byte_tokenizer
from test_train import run, some_settings

import llama
import train

ROOT = Path(__file__).parents[1]
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
TWO_TURNS = [*HI, {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def in_parts(part):
    """A message of two parts; this is the second."""
    return [{"role": "user", "content": [{"type": "text", "text": "What is this, "}, part]}]


def write_tokenizer(folder, template, special=templates.SPECIAL):
    """A tokenizer of bytes and special tokens, with a chat template."""
    codec = byte_tokenizer()
    codec.add_special_tokens(special)
    codec.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return codec


def with_answers_marked(folder, example):
    """The text of an example; what is learned of it stands between ‹ and ›."""
    text, answers = train.ChatTemplate(folder).example(example)
    for begin, end in reversed(answers):
        text = f"{text[:begin]}‹{text[begin:end]}›{text[end:]}"
    return text


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        pytest.param(
            templates.CHATML,
            TWO_TURNS,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n‹Hello.<|im_end|>\n›"
            "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n‹2<|im_end|>\n›",
            id="ChatML",
        ),
        pytest.param(
            templates.SMOLLM2,
            HI,
            "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n‹Hello.<|im_end|>\n›",
            id="SmolLM2",
        ),
        pytest.param(
            templates.LLAMA_3,
            [SYSTEM, *TWO_TURNS],
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n‹Hello.<|eot_id|>›"
            "<|start_header_id|>user<|end_header_id|>\n\n1+1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n‹2<|eot_id|>›",
            id="Llama 3",
        ),
        pytest.param(
            templates.GEMMA_3,
            [SYSTEM, *TWO_TURNS],
            "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
            "<start_of_turn>model\n‹Hello.<end_of_turn>\n›"
            "<start_of_turn>user\n1+1<end_of_turn>\n<start_of_turn>model\n‹2<end_of_turn>\n›",
            id="Gemma 3",
        ),
        pytest.param(
            templates.MISTRAL,
            [SYSTEM, *TWO_TURNS],
            "<s>[INST] Hi[/INST]‹ Hello.</s>›[INST] Be brief.\n\n1+1[/INST]‹ 2</s>›",
            id="Mistral",
        ),
        pytest.param(
            templates.MARKED,
            TWO_TURNS,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n‹Hello.<|im_end|>›\n"
            "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n‹2<|im_end|>›\n",
            id="marks of its own",
        ),
        pytest.param(
            templates.THINKING,
            TWO_TURNS,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n‹Hello.<|im_end|>\n›"
            "<|im_start|>user\n1+1<|im_end|>\n"
            "<|im_start|>assistant\n‹<think>\n\n</think>\n\n2<|im_end|>\n›",
            id="empty thoughts",
        ),
        pytest.param(
            templates.THINKING,
            [
                HI[0],
                {"role": "assistant", "content": "<think>A greeting.</think>Hello."},
                TWO_TURNS[2],
                {"role": "assistant", "content": "<think>A sum.</think>2"},
            ],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n‹Hello.<|im_end|>\n›"
            "<|im_start|>user\n1+1<|im_end|>\n"
            "<|im_start|>assistant\n‹<think>\nA sum.\n</think>\n\n2<|im_end|>\n›",
            id="thoughts",
        ),
        pytest.param(
            templates.CHATML,
            [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}],
            "<|im_start|>user\n\ue000<|im_end|>\n<|im_start|>assistant\n‹\ue001<|im_end|>\n›",
            id="characters for private use",
        ),
        pytest.param(
            templates.CHATML,
            [HI[0], {"role": "assistant", "content": ""}, HI[0]],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n‹<|im_end|>\n›"
            "<|im_start|>user\nHi<|im_end|>\n",
            id="an empty answer, and no answer at the end",
        ),
        pytest.param(
            None,
            [SYSTEM, *HI],
            "System: Be brief.\nUser: Hi\nAssistant:‹ Hello.</s>\n›",
            id="no template",
        ),
    ],
)
def test_the_answers_and_their_ends_of_turn_are_learned(tmp_path, template, messages, expected):
    write_tokenizer(tmp_path, template)
    example = train.read_conversation({"messages": messages}, "line 1")
    assert with_answers_marked(tmp_path, example) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "completion": "Hello."}, "<s>[INST] Hi[/INST]‹ Hello.</s>›"),
        ({"prompt": HI[:1], "completion": HI[1:]}, "<s>[INST] Hi[/INST]‹ Hello.</s>›"),
        (
            {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]},
            "<s>[INST] Hi[/INST] Hello.</s>[INST] 1+1[/INST]‹ 2</s>›",
        ),
    ],
    ids=["texts", "messages", "an answer in the prompt"],
)
def test_of_prompt_and_completion_the_completion_is_learned(tmp_path, row, expected):
    write_tokenizer(tmp_path, templates.MISTRAL)
    assert with_answers_marked(tmp_path, train.read_conversation(row, "line 1")) == expected


def test_without_a_template_prompt_and_completion_are_one_text(tmp_path):
    write_tokenizer(tmp_path, None)
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    example = train.read_conversation(row, "line 1")
    assert with_answers_marked(tmp_path, example) == "2 + 2 =‹ 4</s>›"


@pytest.mark.parametrize(
    "template",
    [templates.CHATML, templates.LLAMA_3, templates.GEMMA_3, templates.MISTRAL],
    ids=["ChatML", "Llama 3", "Gemma 3", "Mistral"],
)
def test_what_follows_the_prompt_is_learned_as_trl_finds_it(tmp_path, template):
    """TRL encodes the prompt and the whole apart: a completion begins where the ids differ."""
    codec = write_tokenizer(tmp_path, template)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    row = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}

    def ids(messages, **options):
        return reference.apply_chat_template(messages, return_dict=True, **options)["input_ids"]

    prompt, whole = ids(row["prompt"], add_generation_prompt=True), ids(TWO_TURNS)
    assert whole[: len(prompt)] == prompt

    text, answers = train.ChatTemplate(tmp_path).example(train.read_conversation(row, "line 1"))
    encoded = codec.encode(text, add_special_tokens=False)
    assert encoded.ids == whole
    learned = train.learned_tokens(encoded.offsets, answers)
    assert learned.tolist() == [i >= len(prompt) for i in range(len(whole))]


def test_tokens_that_end_in_an_answer_are_learned():
    """A tokenizer may give a blank to the word after it, or no width at all. The last one here
    reaches into what follows the answer."""
    answers = [(5, 10), (14, 16)]
    offsets = [(0, 3), (3, 5), (4, 6), (6, 9), (9, 9), (9, 10), (10, 14), (14, 14), (14, 17)]
    expected = [False, False, True, True, True, True, False, False, False]
    assert train.learned_tokens(offsets, answers).tolist() == expected


def test_the_header_of_the_next_message_is_not_learned(tmp_path):
    """Here the text ends in </s>, which begins as the header of the user does."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    )
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    codec = write_tokenizer(tmp_path, template, special)
    example = train.read_conversation({"messages": TWO_TURNS}, "line 1")
    text, answers = train.ChatTemplate(tmp_path).example(example)
    encoded = codec.encode(text, add_special_tokens=False)
    learned = train.learned_tokens(encoded.offsets, answers)
    found = codec.decode(np.array(encoded.ids)[learned].tolist(), skip_special_tokens=False)
    assert found == "Hello.<|end|>\n2<|end|>\n</s>"


def test_blanks_that_have_no_width_are_learned_in_answers_only():
    """Where offsets are trimmed, white space is a token that ends where it begins."""
    codec = byte_tokenizer()
    codec.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    encoded = codec.encode("Q  a\n\nA  b\n\n", add_special_tokens=False)
    learned = train.learned_tokens(encoded.offsets, [(6, 12)])
    assert codec.decode(np.array(encoded.ids)[learned].tolist()) == "A  b\n\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "messages must be a list of one message or more"),
        ({"messages": "Hi"}, "messages must be a list of one message or more"),
        ({"messages": ["Hi"]}, 'message 1 must be like {"role": "user", "content": "..."}'),
        ({"messages": [{"content": "Hi"}]}, "message 1 must be like"),
        ({"messages": [*HI, {"role": "user"}]}, "the content of message 3 must be a text"),
        ({"messages": in_parts({"type": "image"})}, "message 1 has parts that are no texts"),
        ({"messages": in_parts({"type": "text"})}, "message 1 has parts that are no texts"),
        ({"messages": in_parts("Hi")}, "message 1 has parts that are no texts"),
        ({"prompt": "Hi"}, "prompt and completion must both be texts, or both lists"),
        ({"prompt": HI[:1], "completion": 3}, "prompt and completion must both be texts"),
        ({"messages": HI, "tools": [{}]}, "tools are not supported"),
    ],
    ids=str,
)
def test_a_malformed_row_is_named(row, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.read_conversation(row, "--data a.jsonl, line 7")
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: --data a.jsonl, line 7: {said}")
    assert error.count("\n") == 1


def test_a_content_in_parts_is_one_text():
    row = {"messages": in_parts({"type": "text", "text": "and what?"})}
    [message] = train.read_conversation(row, "line 1").messages
    assert message == {"role": "user", "content": "What is this, and what?"}


def test_a_row_with_messages_and_text_is_a_conversation_wherever_it_stands(monkeypatch):
    both = {"messages": HI, "text": "User: Hi\nAssistant: Hello."}
    written = {"prompt": "Write of the sea.", "text": "The sea is wide."}
    for row, expected in [(both, True), (written, False), (written | {"completion": ""}, True)]:
        assert train.is_conversation(row) == expected
        rows = Namespace(column_names=list(row), select_columns=lambda names: "the texts alone")
        found = Namespace(load_dataset=lambda name, split, rows=rows: rows)
        monkeypatch.setitem(sys.modules, "datasets", found)
        assert train.load_rows("some/name") == (rows if expected else "the texts alone")


def test_what_a_template_refuses_is_named(tmp_path, capsys):
    write_tokenizer(tmp_path, templates.GEMMA_3)
    with pytest.raises(SystemExit, match="2"):
        train.ChatTemplate(tmp_path).example(train.Conversation([HI[0], HI[0]], 0, "line 2"))
    error = capsys.readouterr().err
    assert "train.py: line 2: the chat template of" in error and "must alternate" in error


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (templates.COUNTED, TWO_TURNS, "because of message 2, so it is not clear what to learn"),
        (templates.ALWAYS_BEGUN, HI, "begins an answer at the end of every text: let it do so"),
        (templates.ALWAYS_BEGUN, TWO_TURNS, "begins an answer at the end of every text"),
    ],
    ids=["the length comes first", "one answer", "two answers"],
)
def test_a_template_by_which_answers_cannot_be_told_is_refused(
    tmp_path, template, messages, said, capsys
):
    write_tokenizer(tmp_path, template)
    example = train.read_conversation({"messages": messages}, "line 2")
    with pytest.raises(SystemExit, match="2"):
        train.ChatTemplate(tmp_path).example(example)
    assert said in capsys.readouterr().err
    text, answers = train.ChatTemplate(tmp_path).example(example, loss="all")
    assert "Hello." in text and answers == []


# ------------------------------------------------------------------------------- rows of examples


def examples_of(lengths, block, packed=True):
    """Examples whose tokens are numbered through; the even ones are learned."""
    lengths = np.array(lengths)
    tokens = np.arange(1, 1 + lengths.sum())
    starts = np.cumsum(lengths) - lengths
    return train.Examples(tokens, tokens % 2 == 0, starts, lengths, block, packed)


def test_a_row_holds_examples_whose_positions_begin_again():
    batch = examples_of([4, 5], block=8).in_order()
    # The longer one comes first, tokens 5 to 9; the last token of each is a target alone.
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 1, 2, 3, 0]]
    assert batch.targets.tolist() == [[6, -1, 8, -1, 2, -1, 4, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, -1]]


def test_without_packing_each_example_has_a_row():
    batch = examples_of([4, 5], block=8, packed=False).in_order()
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [5, 6, 7, 8, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2] + [-1] * 5, [0, 1, 2, 3] + [-1] * 4]


def test_every_example_is_packed_once_and_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(1, 65, 5000)
    rows = train.pack(lengths, 64)
    assert sorted(example for row in rows for example in row) == list(range(5000))
    used = [lengths[row].sum() for row in rows]
    assert max(used) <= 64
    assert np.mean(used) > 0.99 * 64


def test_an_epoch_has_every_row_once_in_an_order_of_its_own():
    examples = examples_of(np.random.default_rng(0).integers(2, 10, 100), block=16)
    n = len(examples.packing)
    epochs = [examples.rows(np.arange(n) + epoch * n, seed=0).tokens for epoch in range(2)]
    in_order = examples.in_order().tokens
    for rows in epochs:
        assert sorted(rows.tolist()) == sorted(in_order.tolist())
    assert (epochs[0] != epochs[1]).any()
    assert (examples.rows(np.arange(n), seed=1).tokens != epochs[0]).any()


def test_rows_have_the_shape_of_their_numbers():
    numbers = np.arange(12).reshape(2, 2, 3)
    batch = examples_of([5] * 8, block=4).rows(numbers, seed=0)
    assert batch.tokens.shape == batch.targets.shape == batch.positions.shape == (2, 2, 3, 4)


# ----------------------------------------------------------------------------------- learning

STEPS = 20


def their_losses(hf, steps: list[list[tuple]]) -> list[float]:
    """PyTorch's losses, step by step: every example alone, on its learned tokens."""
    matrices = [p for p in hf.parameters() if p.ndim >= 2]
    vectors = [p for p in hf.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    losses = []
    for examples in steps:
        total, count = 0, 0
        for ids, learned in examples:
            logits = hf(torch.tensor(ids[None, :-1])).logits[0]
            targets = torch.tensor(np.where(learned[1:], ids[1:], -100))
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            count += learned[1:].sum()
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.core_gpt2_only
def test_twenty_steps_on_packed_conversations_are_those_of_torch_on_each_alone(family, tmp_path):
    """Rows of several examples, of which some tokens are learned; two microbatches."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(family.config("plain")).save_pretrained(tmp_path)
    model = family.module.load(tmp_path)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Dropout):
            module.rate = 0.0

    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 20, size=200)
    # Without the lowest ids: in transformers a padding token's vector is not learned.
    tokens = rng.integers(3, model.config.vocab_size, size=lengths.sum())
    learned = rng.random(lengths.sum()) < 0.5
    starts = np.cumsum(lengths) - lengths
    examples = train.Examples(tokens, learned, starts, lengths, 24, packed=True)
    assert max(len(row) for row in examples.packing) > 2

    # Ours, as train.py does it.
    settings = some_settings(lr=1e-3, min_lr=1e-3, clip=1e9, steps=STEPS)
    optimizer, _ = train.make_optimizer(settings)
    graphdef, params = nnx.split(model)
    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
    state = train.first_state(settings, optimizer, params, mesh)
    config = train.StepConfig(partial(nnx.merge, graphdef), optimizer, None, 0.0)
    step, _ = train.compile_steps(config, mesh, state)
    ours, alone = [], []
    for number in range(STEPS):
        numbers = number * 4 + np.arange(4)
        batch = examples.rows(numbers.reshape(2, 1, 2), seed=0)
        state, metrics = step(state, nnx.State({}), batch, jax.random.key(0))
        ours.append(float(metrics["loss"]))
        rows = train.epoch_order(len(examples.packing), 0, 0)[numbers]
        which = [example for row in rows for example in examples.packing[row]]
        spans = [slice(starts[i], starts[i] + lengths[i]) for i in which]
        alone.append([(tokens[span], learned[span]) for span in spans])

    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    theirs = their_losses(hf.train(False), alone)
    assert np.std(theirs) > 1e-3  # each step has other examples
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------- the program


def chats(folder, rows, name="chats.jsonl"):
    """A file of these rows."""
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def talk(number):
    """A short conversation."""
    return [
        {"role": "user", "content": f"Count to {number}."},
        {"role": "assistant", "content": " ".join(map(str, range(1, number + 1)))},
    ]


def test_a_model_from_scratch_learns_to_answer_and_chats(tmp_path):
    file = chats(tmp_path, [{"messages": talk(number % 4 + 1)} for number in range(200)])
    flags = ["--model", "llama", "--data", file, "--tokens", "bytes", "--block", 48]
    flags += ["--steps", 150, "--lr", 1e-2, "--width", 64, "--eval-every", 150]
    out = tmp_path / "out"
    done = run(*flags, "--prompt", "Count to 3.", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "180 conversations" in done.stdout and "20 conversations" in done.stdout
    assert done.stdout.count("--- step 150: User: Count to 3.\nAssistant: 1 2 3\n") == 1

    answered = subprocess.run(
        [sys.executable, "sample.py", "--weights", out, "--chat", "--temperature", "0"],
        input="Count to 3.",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert answered.stdout.strip() == "1 2 3"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "first in the data: 32 tokens, 4 of them learned"),
        (["--loss", "all"], "first in the data: 32 tokens, 31 of them learned"),
    ],
    ids=["assistant", "all"],
)
def test_the_first_example_is_shown_with_what_is_learned(tmp_path, flags, said):
    file = chats(tmp_path, [{"messages": talk(1)}] * 3)
    flags = ["--data", file, "--tokens", "bytes", "--block", 48, "--show-data", *flags]
    done = run(*flags, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    if "--loss" not in flags:
        assert "not learned  'User: Count to 1.\\nAssistant:'" in done.stdout
        assert "learned      ' 1<|endoftext|>\\n'" in done.stdout
    assert not (tmp_path / "out").exists()


def test_long_conversations_are_cut_and_those_with_nothing_to_learn_left_out(tmp_path):
    long_question = [{"role": "user", "content": "x" * 100}, *talk(1)[1:]]
    rows = [talk(1), talk(1), talk(30), long_question]
    file = chats(tmp_path, [{"messages": messages} for messages in rows])
    flags = ["--data", file, "--tokens", "bytes", "--block", 40, "--steps", 1, "--warmup", 0]
    done = run(*flags, "--pack", "no", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (
        "of 4 conversations: 2 longer than --block 40, and cut; 1 without anything to learn before "
        "the cut, and left out"
    ) in done.stdout
    assert "2 conversations (2 rows, " in done.stdout
    assert "1 conversation (1 row, " in done.stdout


def shown_first(tmp_path, rows):
    """What --show-data prints of these rows, by a tokenizer of bytes."""
    file = chats(tmp_path, rows)
    flags = ["--data", file, "--tokens", "bytes", "--block", 48, "--show-data"]
    done = run(*flags, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.wide
def test_a_prompt_as_text_and_as_message_are_not_taken_for_each_other(tmp_path):
    """Their messages are the same, and what was encoded before is kept under a checksum."""
    row = {"prompt": "1+1=", "completion": "2"}
    messages = {"prompt": talk(1)[:1], "completion": talk(1)[1:]}
    messages["prompt"][0]["content"], messages["completion"][0]["content"] = row.values()
    assert "'1+1='" in shown_first(tmp_path, [row] * 3)
    assert "'User: 1+1=\\nAssistant:'" in shown_first(tmp_path, [messages] * 3)
    assert "'1+1='" in shown_first(tmp_path, [row] * 3)


def test_among_conversations_prompt_and_completion_are_one(tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}, {"messages": talk(1)}, {"messages": talk(1)}]
    assert "'User: 1+1=\\nAssistant:'" in shown_first(tmp_path, rows)


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        ([{"messages": talk(1)}, {"text": "a"}], [], "line 2: it must be like {"),
        ([{"text": "a"}, {"messages": talk(1)}], [], 'line 2: it must be like {"text": "..."}'),
        ([{"messages": talk(1)}, {"messages": []}], [], "line 2: messages must be a list"),
        ([{"messages": talk(1)}], [], "leaves 1 conversation, and two are needed: raise it"),
        ([{"messages": talk(1)[:1]}] * 3, [], "no message has the role assistant, so no answer"),
        ([{"messages": [{"role": "user", "content": "\ud800"}]}] * 3, [], "is no Unicode text"),
        ([{"text": "some text"}] * 9, ["--loss", "all"], "--loss is for conversations"),
        ([{"text": "some text"}] * 9, ["--pack", "no"], "--pack is for conversations"),
    ],
    ids=[
        *("text among them", "among texts", "empty", "one", "no answers", "half a character"),
        *("loss", "pack"),
    ],
)
def test_what_no_run_can_use_is_one_line(tmp_path, rows, flags, said):
    file = chats(tmp_path, rows)
    done = run(
        *["--data", file, "--tokens", "bytes", "--block", 48], *flags, "--out", tmp_path / "out"
    )
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert said in line and "Traceback" not in done.stderr


@pytest.mark.wide
@pytest.mark.parametrize(("block", "code"), [(32, 0), (48, 2)])
def test_packed_rows_are_no_longer_than_what_dynamic_rope_leaves_alone(tmp_path, block, code):
    config = llama.Config.small(layers=1, heads=2, width=16, context=64, vocab_size=300)
    scaling = (("rope_type", "dynamic"), ("factor", 2.0), ("trained", 32))
    model = llama.Model(dataclasses.replace(config, rope_scaling=scaling), rngs=nnx.Rngs(0))
    folder = tmp_path / "model"
    llama.save(model, folder)
    write_tokenizer(folder, templates.CHATML)
    file = chats(tmp_path, [{"messages": talk(1)}] * 4)
    flags = ["--model", "llama", "--weights", folder, "--data", file, "--block", block]
    done = run(*flags, "--steps", 1, "--warmup", 0, "--out", tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert ("beyond 32 tokens, RoPE scaling depends on" in done.stderr) == (code == 2)


@pytest.mark.parametrize(
    ("kind", "context", "given", "block"),
    [
        (train.Texts, math.inf, None, 64),
        (train.Texts, 32, None, 32),
        (train.Conversations, 256, None, 256),
        (train.Conversations, 8192, None, 1024),
        (train.Conversations, math.inf, None, 1024),
        (train.Conversations, 8192, 48, 48),
    ],
)
def test_rows_of_conversations_are_long_unless_block_is_given(kind, context, given, block):
    args = Namespace(block=given, loss=None, pack=None)
    train.check_source(args, kind.__new__(kind), context)
    assert args.block == block


def teach_tiny_llama(*flags):
    """Runs train.py as the README does -> what it printed on both outputs."""
    command = [sys.executable, "train.py", "--model", "llama", "--weights", "tiny"]
    command += map(str, flags)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_conversations_of_two_turns_fit_a_row_without_further_flags(tmp_path):
    flags = ["--data", "docs/conversations.jsonl", "--show-data"]
    printed = teach_tiny_llama(*flags, "--out", tmp_path / "out")
    assert "first in the data" in printed and "--block" not in printed


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "1+1=", "completion": "2"}], "does not learn to stop after a completion"),
        ([{"text": "some text" * 99}], "does not learn where a text ends"),
        ([{"messages": HI}], None),  # a line ends an answer
    ],
    ids=["prompts", "texts", "messages"],
)
def test_where_no_token_ends_a_text_this_is_said(tmp_path, rows, said):
    """tiny/llama has no such token."""
    file = chats(tmp_path, rows * 3)
    printed = teach_tiny_llama("--data", file, "--show-data", "--out", tmp_path / "out")
    assert ("no end-of-text token: " in printed) == (said is not None)
    assert said is None or said in printed


@pytest.mark.wide
def test_lora_on_a_checkpoint_without_a_template_brings_one(tmp_path):
    """tiny/llama has neither a template nor a token that ends a text."""
    out = tmp_path / "out"
    file = chats(tmp_path, [{"messages": talk(number % 4 + 1)} for number in range(40)])
    teach_tiny_llama("--lora", 2, "--data", file, "--steps", 2, "--warmup", 0, "--out", out)
    assert (out / "chat_template.jinja").read_text() == train.PLAIN_TEMPLATE
    codec = llama.tokenizer(out)
    [stop] = llama.read_stop_ids(out, llama.read_config(out))
    assert codec.decode([stop]) == "\n"


@pytest.mark.slow
def test_the_example_of_the_readme_teaches_tiny_llama_to_answer(tmp_path):
    """Before: verse. After: the answers of docs/conversations.jsonl, to the letter."""

    def sample(*options):
        command = [sys.executable, "sample.py", *options, "--temperature", "0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    plain = ["--model", "llama", "--weights", "tiny"]
    before = sample(*plain, "--prompt", "User: Who are you?\nAssistant:")
    assert "I am Lear" not in before

    flags = ["--lora", 8, "--lr", 3e-3, "--data", "docs/conversations.jsonl"]
    teach_tiny_llama(*flags, "--block", 128, "--steps", 100, "--out", tmp_path / "lear")
    chat = ["--weights", str(tmp_path / "lear"), "--chat", "--prompt"]
    assert sample(*chat, "Who are you?") == "I am Lear, a very small model."
    assert sample(*chat, "Will you sing?") == "Hey, ho, the wind and the rain!"
