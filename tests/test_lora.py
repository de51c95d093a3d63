"""train.py --lora: what is trained and stored, and that PEFT reads it as we do."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import peft
import pytest
import torch
from flax import nnx
from helpers.reference import ROOT, assert_same_model
from helpers.small import complaint
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import gpt2
import train

TEXT = "".join(f"The {n} of {n * n} said: 'I'll go', and went {n % 7} miles.\n" for n in range(400))
# Six steps at a high rate, so that the adapters do much to the logits; all of it in float32.
FLAGS = (
    "--lora 4 --lr 1e-2 --steps 6 --eval-every 3 --save-every 0 --block 16 --batch 4 "
    "--device cpu --dtype float32 --save-dtype float32"
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Flags (a later one wins) -> arguments and options for a process that runs train.py."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "text.txt").write_text(TEXT)
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}

    def make(*flags):
        return {
            "args": [
                sys.executable,
                str(ROOT / "train.py"),
                "--data",
                str(folder / "text.txt"),
                *FLAGS.split(),
                *map(str, flags),
            ],
            "env": env,
            "text": True,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }

    return make


@pytest.fixture(scope="module")
def run(command):
    """Runs train.py to its end -> what it printed on standard output."""

    def call(*flags):
        done = subprocess.run(**command(*flags), timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.fixture(
    scope="module",
    params=[
        "gpt2",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("opt", "llama", "gemma", "mistral", "qwen")
        ],
    ],
)
def tuned(request, run, tmp_path_factory):
    """A base, the adapter of a run on it, and the same run's --merge: three folders."""
    folder = tmp_path_factory.mktemp(request.param)
    found = Namespace(
        name=request.param,
        base=folder / "base",
        adapter=folder / "adapter",
        merged=folder / "merged",
    )
    shutil.copytree(ROOT / "tiny" / found.name, found.base)
    flags = ["--model", found.name, "--weights", found.base]
    found.stdout = run(*flags, "--save-every", 6, "--out", found.adapter)
    run(*flags, "--merge", "--out", found.merged)
    return found


def tensors(folder, name="model.safetensors"):
    """name -> float32 tensor of all that a file holds; numpy's reader knows no bfloat16."""
    with safe_open(Path(folder, name), "pt") as file:
        return {key: file.get_tensor(key).float().numpy() for key in file.keys()}  # noqa: SIM118


def adapter_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def first_loss(stdout):
    return float(re.search(r"validation loss before step 1: (\d+\.\d{4})\n", stdout)[1])


# --------------------------------------------------------------------------------- what is written


def test_peft_makes_the_same_logits_of_the_adapter_as_we_of_it_and_of_the_merged_checkpoint(tuned):
    tokens = np.random.default_rng(0).integers(512, size=(3, 24))
    theirs = AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = theirs(torch.tensor(tokens)).logits.numpy()
        with warnings.catch_warnings():  # as of missing tensors, or of a setting that PEFT corrects
            warnings.simplefilter("error", UserWarning)
            theirs = peft.PeftModel.from_pretrained(theirs, tuned.adapter).eval()
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    for folder in (tuned.merged, tuned.adapter):
        ours = importlib.import_module(tuned.name).load(folder, dtype=jnp.float32)(tokens)
        # Float32, logits up to 17, and x W + (x A) B in place of x (W + A B): at most 1.6e-5 was
        # seen, eight units of the last digit, and four times that is allowed.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=6e-5)
    assert np.abs(expected - plain).max() > 1  # 7 and more was seen


def test_every_b_is_trained_and_the_scale_is_one(tuned):
    config = adapter_config(tuned.adapter)
    assert config["r"] == config["lora_alpha"] == 4  # PEFT multiplies A B by their quotient
    assert config["base_model_name_or_path"] == str(tuned.base)
    stored = load_file(tuned.adapter / "adapter_model.safetensors")
    assert stored.keys() == {
        f"base_model.model.{name}.lora_{letter}.weight"
        for name in config["target_modules"]
        for letter in "AB"
    }
    assert all(tensor.any() for tensor in stored.values())


def test_the_last_line_is_a_command_that_reads_what_was_written(tuned):
    assert tuned.stdout.endswith(f"python sample.py --weights {tuned.adapter}\n")


@pytest.mark.wide
@pytest.mark.parametrize("tuned", ["gpt2"], indirect=True)
def test_training_goes_on_from_an_adapter_as_from_the_merged_checkpoint(tuned, run, tmp_path):
    """All weights, or a new adapter that is merged: the first losses are the same."""
    flags = {
        "all": ["--weights", tuned.adapter, "--lora", 0],
        "new": ["--weights", tuned.adapter, "--merge", "--lora-targets", "c_attn"],
        "of merged": ["--weights", tuned.merged, "--lora", 0],
    }
    losses = {
        name: first_loss(run(*options, "--steps", 1, "--out", tmp_path / name))
        for name, options in flags.items()
    }
    assert losses["all"] == losses["new"] == losses["of merged"] != first_loss(tuned.stdout)
    assert (tmp_path / "new/config.json").exists()


def test_merging_changes_the_targets_and_not_a_bit_of_any_other_tensor(tuned):
    base, merged = tensors(tuned.base), tensors(tuned.merged)
    assert base.keys() == merged.keys()
    changed = {name for name in base if (base[name] != merged[name]).any()}
    targets = adapter_config(tuned.adapter)["target_modules"]
    assert changed == {f"{name}.weight" for name in targets}


def test_a_checkpoint_of_the_run_holds_the_adapters_and_no_other_weights(tuned):
    state = ocp.StandardCheckpointer().metadata(tuned.adapter / "checkpoints/6/state")
    leaves = jax.tree.leaves_with_path(state.item_metadata.tree)  # the optimizer's state as well
    names = [path[-2].key for path, leaf in leaves if leaf.shape]  # path[-1] is nnx's "value"
    targets = adapter_config(tuned.adapter)["target_modules"]
    assert set(names) == {"lora_a", "lora_b"}
    assert len(names) == 3 * 2 * len(targets)  # each with the two means of Adam


@pytest.mark.parametrize("tuned", ["gpt2"], indirect=True)
def test_an_adapted_model_begins_as_the_base(tuned, run, tmp_path):
    """B is zero at first: the losses are equal to the last of the four decimals."""
    stdout = run("--weights", tuned.base, "--lora", 0, "--steps", 1, "--out", tmp_path)
    assert first_loss(tuned.stdout) == first_loss(stdout)


def test_targets_are_picked_by_their_path(run, tmp_path):
    run(
        "--weights",
        "tiny",
        "--lora",
        3,
        "--lora-targets",
        r".*\.c_attn",
        "--steps",
        1,
        "--out",
        tmp_path,
    )
    names = [f"transformer.h.{i}.attn.c_attn" for i in range(4)]
    assert adapter_config(tmp_path)["target_modules"] == names
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        f"base_model.model.{name}.lora_{letter}.weight": shape  # of a matrix from 128 to 3 * 128
        for name in names
        for letter, shape in [("A", (3, 128)), ("B", (384, 3))]
    }


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(command, run, tmp_path):
    flags = ["--weights", "tiny", "--steps", 40, "--eval-every", 10]
    run(*flags, "--out", tmp_path / "whole")
    parts = [*flags, "--out", tmp_path / "parts"]
    process = subprocess.Popen(**command(*parts))
    first = ""
    while not first.startswith("step "):  # the tenth
        first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, first + stderr
    assert 10 <= int(re.search(r"stopped after step (\d+)", stderr)[1]) < 40
    assert not list((tmp_path / "parts").glob("*.safetensors"))

    run(*parts, "--resume")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


# ------------------------------------------------------------------------------------ without a run


def test_adapters_that_learned_nothing_leave_the_model_as_it_was_when_merged():
    def load():
        return gpt2.load(ROOT / "tiny/gpt2", param_dtype="float32")

    model = load()
    names = train.add_adapters(
        gpt2, model, Namespace(lora=3, lora_targets=r".*\.c_\w+", seed=0, model="gpt2")
    )
    assert len(names) == 4 * 4 and nnx.state(model, nnx.LoRAParam)
    train.merge_adapters(model, names, keep_zeros=False)
    assert nnx.graphdef(model) == nnx.graphdef(load())
    assert_same_model(model, load())


@pytest.mark.parametrize(
    "model, targets, expected",
    [
        ("gpt2", "c_attn", r"transformer\.h\.\d\.attn\.c_attn"),
        ("gpt2", "mlp.c_proj,c_attn", r"transformer\.h\.\d\.(mlp\.c_proj|attn\.c_attn)"),
        ("gpt2", "h.1.attn.c_proj", r"transformer\.h\.1\.attn\.c_proj"),
        ("gpt2", "transformer.h.1.attn.c_proj", r"transformer\.h\.1\.attn\.c_proj"),
        ("gpt2", r".*1\.mlp.*", r"transformer\.h\.1\.mlp\.(c_fc|c_proj)"),
        ("opt", "q_proj,fc1", r"model\.decoder\.layers\.\d\.(self_attn\.q_proj|fc1)"),
        ("opt", "layers.0.fc1", r"model\.decoder\.layers\.0\.fc1"),
        ("llama", "q_proj,v_proj", r"model\.layers\.\d\.self_attn\.(q_proj|v_proj)"),
    ],
)
def test_targets_are_names_as_in_peft_or_a_regular_expression(model, targets, expected):
    """A name is the last parts of the name in the checkpoint: c_proj is no name of fc_proj."""
    model_file = importlib.import_module(model)
    config = model_file.Config.small(layers=2, heads=2, width=8, context=8)
    made = model_file.Model(config, rngs=nnx.Rngs(0))
    names = train.find_targets(model_file, made, train.linear_layers(made), targets).values()
    every = [n.removesuffix(".weight") for *_, n, _ in model_file.named_parameters(nnx.state(made))]
    assert set(names) == {name for name in every if re.fullmatch(expected, name)} != set()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lora 4", "name them with --weights"),
        ("--weights tiny --merge", "--merge is for --lora"),
        ("--weights tiny --lora -1", "--lora must be 0 or more"),
        (
            "--weights tiny --lora 4 --lora-targets c_attn,attn.c_porj",
            "attn.c_porj matches no matrix of gpt2.py; there are c_attn, c_fc, c_proj",
        ),
        (
            "--weights tiny --lora 4 --lora-targets .*norm",
            ".*norm matches no matrix of gpt2.py; there are c_attn, c_fc, c_proj",
        ),
        ("--weights tiny --lora 4 --lora-targets (", "--lora-targets is not a regular expression"),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_wrong(
    flags, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--device",
            "cpu",
            "--steps",
            "1",
            "--data",
            "text.txt",
            "--out",
            "out",
            *flags.split(),
        ],
    )
    with pytest.raises(SystemExit) as stop:
        train.main()
    jax.config.update("jax_default_device", None)  # which main set
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert message in complaint(err) and not Path("out").exists()


def test_an_adapter_on_top_of_an_adapter_must_be_merged(tmp_path, monkeypatch, capsys):
    """PEFT and `load` look for the base in a whole checkpoint."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(ROOT / "tiny/gpt2")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    flags = ["--weights", str(adapter), "--lora", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *flags])
    with pytest.raises(SystemExit) as stop:
        train.main()
    jax.config.update("jax_default_device", None)  # which main set
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert f"{adapter} is an adapter" in complaint(err) and "add --merge" in err


@pytest.mark.wide
def test_the_adapter_names_its_base_so_that_peft_finds_it_from_anywhere(run, tmp_path, monkeypatch):
    run("--weights", "tiny", "--lora", 2, "--out", tmp_path / "out", "--steps", 1)
    monkeypatch.chdir(tmp_path)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.peft_config["default"].base_model_name_or_path == str(ROOT / "tiny/gpt2")
