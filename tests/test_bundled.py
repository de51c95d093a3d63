"""The bundled checkpoints tiny/<model>: every program and transformers read them alike."""

import json
import subprocess
import sys

import jax
import pytest
import torch
import transformers
from flax import nnx
from helpers.reference import ROOT

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
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    state = nnx.state(family.module.load(folder))
    parameters = sum(parameter.size for parameter in jax.tree.leaves(state))
    assert f"{parameters:,} parameters" in (folder / "README.md").read_text()
