"""A model file is all one needs: copied into an empty folder, beside one checkpoint, it works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from helpers.reference import write_random


def tiny_tokenizer(texts, vocab_size):
    """A byte-level BPE of that many tokens, which begin with those that OPT begins with."""
    codec = tokenizers.ByteLevelBPETokenizer()
    codec.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
    )
    return codec


@pytest.fixture
def alone(family, tmp_path):
    """A folder that holds the model file and a checkpoint with a tokenizer, and nothing else."""
    write_random(
        family, family.hf_config(**family.sizes | {"vocab_size": 300}), tmp_path / "checkpoint"
    )
    codec = tiny_tokenizer([Path(__file__).read_text()], 300)
    codec.save(str(tmp_path / "checkpoint" / "tokenizer.json"))
    shutil.copy(family.module.__file__, tmp_path)
    return tmp_path


def run(folder, *arguments):
    """python ARGUMENTS in that folder, with no other way to the project and none to the Hub."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.core_gpt2_only
def test_the_file_completes_a_prompt_as_a_program(family, alone):
    prompt = "A model file is"
    text = run(alone, f"{family.name}.py", prompt, "./checkpoint")
    assert text.startswith(prompt) and len(text) > len(prompt) + 10


@pytest.mark.core_gpt2_only
def test_five_lines_that_import_from_it_complete_a_prompt(family, alone):
    (alone / "mine.py").write_text(
        f"import jax\n"
        f"from {family.name} import generate, load, tokenizer\n"
        f"codec, model = tokenizer('checkpoint'), load('checkpoint')\n"
        f"[new] = generate(model, [codec.encode('def test')], 20, key=jax.random.key(0))\n"
        f"print(len(new), codec.decode(new))\n"
    )
    assert run(alone, "mine.py").startswith("20 ")
