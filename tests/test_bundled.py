"""The bundled checkpoints tiny/<model>: every program and transformers read them alike."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest
import torch
import transformers
from flax import nnx
from helpers.reference import ROOT

import llama
import sample

PROMPTS = ["Ünïcödé, 中文 and\ttabs", 4 * "Two households, both alike in dignity, in fair Verona. "]


@pytest.fixture
def tiny(family):
    return family, ROOT / "tiny" / family.name


@pytest.mark.core_gpt2_only
def test_transformers_reads_it_and_writes_the_same_greedy_text(tiny):
    """The longer prompt and 100 tokens more go past the window of tiny/gemma, which is of 128."""
    family, folder = tiny
    model, codec = family.module.load(folder), family.module.tokenizer(folder)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hf_codec = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        ids = codec.encode(prompt)
        assert ids == hf_codec.encode(prompt)
        [new] = family.module.generate(model, [ids], 100, key=jax.random.key(0), temperature=0)
        theirs = hf.generate(
            torch.tensor([ids]),
            max_new_tokens=100,
            do_sample=False,
            attention_mask=torch.ones(1, len(ids)),
            pad_token_id=0,
        )
        assert new == theirs[0, len(ids) :].tolist()
        assert codec.decode(ids + new) == hf_codec.decode(theirs[0])


def test_sample_py_writes_with_it_and_no_network(tiny):
    family, _ = tiny
    command = [sys.executable, "sample.py", "--model", family.name, "--weights", "tiny"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ROMEO:\n") and len(done.stdout) > 200
    assert f"python sample.py --model {family.name}" in done.stderr


def test_it_is_small_and_its_card_tells_its_size(tiny):
    family, folder = tiny
    assert_small_with_a_card(family.module, folder)


def assert_small_with_a_card(module, folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    state = nnx.state(module.load(folder))
    parameters = sum(parameter.size for parameter in jax.tree.leaves(state))
    assert f"{parameters:,} parameters" in (folder / "README.md").read_text()


# --------------------------------------------------------------------------- tiny/llama-instruct

INSTRUCT = ROOT / "tiny" / "llama-instruct"


def test_the_one_to_chat_with_is_small_and_its_card_tells_its_size():
    assert_small_with_a_card(llama, INSTRUCT)


def test_chat_alone_talks_to_it_and_names_a_real_one():
    command = [sys.executable, "sample.py", "--chat", "--temperature", "0"]
    done = subprocess.run(
        [*command, "--prompt", "What is the capital of France?"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    assert "--chat --weights HuggingFaceTB/SmolLM2-135M-Instruct" in done.stderr


@pytest.mark.parametrize("flag", ["--chat", "--ui"])
def test_chat_and_the_page_take_it_where_no_model_is_named(monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["sample.py", flag])
    args = sample.parse_command_line()
    assert (args.model, args.weights) == ("llama", str(INSTRUCT))


def conversation(*messages: str, system=None) -> list[str]:
    """Its greedy answers to these messages, one after another."""
    codec = sample.ChatTokenizer(llama.tokenizer(INSTRUCT).backend, INSTRUCT, system)
    model = llama.load(INSTRUCT)
    stop_ids = llama.read_stop_ids(INSTRUCT, model.config)
    turns = []
    for message in messages:
        turns.append({"role": "user", "content": message})
        [new] = llama.generate(
            model, [codec.encode(turns)], 60, key=0, temperature=0, stop_ids=stop_ids
        )
        turns.append({"role": "assistant", "content": codec.decode(new).strip()})
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def test_it_remembers_a_name_and_what_the_last_question_was_about():
    said = conversation(
        "Hello!",
        "My name is Maria.",
        "What is the opposite of hot?",
        "And of big?",
        "What is my name?",
    )
    assert said == [
        "Hello! I am Pip. What is your name?",
        "Nice to meet you, Maria!",
        "The opposite of hot is cold.",
        "The opposite of big is small.",
        "Your name is Maria.",
    ]


def test_it_follows_the_system_messages_that_it_has_learned():
    question = "What is the capital of France?"
    assert conversation(question, system="Be brief.") == ["Paris."]
    pirate = conversation(question, system="Speak like a pirate.")
    assert pirate == ["Arr! The capital of France is Paris."]


def test_it_says_when_it_does_not_know():
    [said] = conversation("Who wrote Hamlet?")
    assert said.startswith("I do not know that.")


@pytest.mark.wide
def test_its_card_says_how_many_held_out_questions_it_answers():
    """A few answers may differ on another machine, where two tokens are nearly as likely."""
    command = [sys.executable, INSTRUCT / "conversations.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    right, total = re.search(r"(\d+) of (\d+) held-out", done.stdout).groups()
    card = (INSTRUCT / "README.md").read_text()
    stated = re.search(rf"answer (\d+) of {total} to the letter", card)[1]
    assert abs(int(right) - int(stated)) <= 5


def test_its_conversations_leave_the_held_out_questions_out():
    """And are ones that train.py reads: after a system message the two take turns."""
    spec = importlib.util.spec_from_file_location("rules", INSTRUCT / "conversations.py")
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)

    held_out = set()
    for fact in rules.facts():
        held_out |= {wording for wording in fact.wordings if rules.is_held_out(fact, wording)}
    assert len(held_out) > 200
    for messages in rules.conversations(500):
        turns = [message for message in messages if message["role"] != "system"]
        assert messages[-len(turns) :] == turns and len(messages) - len(turns) <= 1
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert not held_out & {turn["content"] for turn in turns}
