"""docs/adding-a-model.md: its commands and diffs make a model file, and that is an OLMo 2."""

import importlib.util
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from helpers.pages import python_of, scripts_of
from helpers.reference import ROOT, Case, mutated, read_hf, write_random
from transformers import Olmo2ForCausalLM

import llama

PAGE = (ROOT / "docs" / "adding-a-model.md").read_text()
MAKE, TRY, _ = scripts_of(PAGE)  # the third downloads
CONFIGS = [
    "plain",
    *(pytest.param(x, marks=pytest.mark.wide) for x in ("grouped heads", "square head")),
]


def run(folder, script):
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,  # only against what hangs
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the top folder in which the first commands of the page were run."""
    folder = tmp_path_factory.mktemp("adding")
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, folder)
    for name in ("docs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tiny").symlink_to(ROOT / "tiny")
    printed = run(folder, "\n".join(MAKE.commands))
    assert "fuzz" not in printed, f"a file has changed beside a diff of the page:\n{printed}"
    return folder


@pytest.fixture(scope="module")
def olmo2(folder):
    """What the page says that the tests know about olmo2.py."""
    spec = importlib.util.spec_from_file_location("olmo2", folder / "olmo2.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["olmo2"] = module
    spec.loader.exec_module(module)
    [block] = python_of(PAGE)
    names = {}
    exec(compile(block.code, "adding-a-model.md", "exec"), names)
    yield names["OLMO2"]
    del sys.modules["olmo2"]


@pytest.fixture(scope="module")
def make_olmo2(olmo2, tmp_path_factory):
    """Name of a config -> its Case."""

    def make(name):
        where = tmp_path_factory.mktemp("olmo2")
        return Case(olmo2, write_random(olmo2, olmo2.config(name), where))

    return make


def test_the_new_file_keeps_the_copies_and_the_programs_know_it(folder):
    assert run(folder, "python tests/copies.py") == ""
    for program in ("sample.py", "train.py", "bench.py"):
        assert '"olmo2": "olmo2",' in (folder / program).read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_transformers_computes(make_olmo2, name):
    case = make_olmo2(name)
    case.assert_close("parts")
    case.assert_close("stream")


def test_its_greedy_text_is_that_of_transformers_and_its_checkpoint_is_read(make_olmo2, tmp_path):
    case = make_olmo2("plain")
    module = case.family.module
    prompt = case.tokens[0].tolist()
    [new] = module.generate(case.model, [prompt], 20, key=0, temperature=0)
    theirs = case.hf32.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert new == module.until_stop(theirs[0, len(prompt) :].tolist(), [])

    module.save(case.model, tmp_path)
    again = read_hf(case.family, tmp_path)
    assert isinstance(again, Olmo2ForCausalLM)
    for one, other in zip(again.parameters(), case.hf32.parameters(), strict=True):
        np.testing.assert_array_equal(one.detach(), other.detach())


def test_a_norm_that_is_forgotten_is_noticed(olmo2, make_olmo2, tmp_path):
    """One of the faults of the page; the others with the commands of the page."""
    mutant = mutated(olmo2.module, olmo2.mutations["what attention adds not normed"], tmp_path)
    error, allowed = make_olmo2("plain").worst("stream", mutant)["logits"]
    assert error > 10 * allowed


def test_the_preset_has_its_parameters(olmo2):
    for preset in olmo2.module.PRESETS.values():
        _, state = olmo2.module.skeleton(preset.config)
        assert sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(state))) == preset.parameters


def test_neither_file_reads_the_others_checkpoints(olmo2):
    with pytest.raises(olmo2.module.InputError, match="'llama'"):
        olmo2.module.Config.from_hf({"model_type": "llama"})
    with pytest.raises(llama.InputError, match="'olmo2'"):
        llama.Config.from_hf({"model_type": "olmo2"})


@pytest.mark.wide
def test_the_tests_of_the_project_pass_and_it_trains(folder):
    test, train, sample = TRY.commands
    assert "passed" in run(folder, f"{test} -q -n 1")
    run(folder, f"{train} --steps 2 --warmup 0")
    assert run(folder, f"{sample} --max-new-tokens 5").startswith("The model")
