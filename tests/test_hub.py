"""`python sample.py --model gpt2`, and opt, against a Hub on the loopback address: no internet."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from helpers.hub import Hub
from helpers.small import write_checkpoint

ROOT = Path(__file__).parents[1]
REPO = "openai-community/gpt2"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A repository as OpenAI's: the same weights in several formats, of which one is wanted."""
    folder = write_checkpoint(tmp_path_factory.mktemp("gpt2"), n_positions=50_000, n_embd=64)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files["model.safetensors"]) > 12e6  # more than one chunk of huggingface_hub's 10 MB
    others = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/config.json"]
    return files | dict.fromkeys(others, b"not wanted")


@pytest.fixture
def start(tmp_path):
    """Starts the exact command of the README, with a Hub and a cache folder of the test's own."""

    def popen(endpoint, *options, model="gpt2", **env):
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env = {**outside, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, **env}
        command = [sys.executable, "sample.py", "--model", model, *options]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return popen


@pytest.fixture
def sample(start):
    """Runs that command to its end."""

    def run(endpoint, *options, **env):
        process = start(endpoint, *options, **env)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def one_line(result):
    """The error of a run that failed as it should: exit code 2, a single line, no text."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("sample.py: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def test_first_run_downloads_with_its_size_and_the_second_needs_no_hub(files, sample):
    with Hub(REPO, files) as hub:
        first = sample(hub.endpoint)
    assert first.returncode == 0, first.stderr
    wanted = {"config.json", "model.safetensors", "tokenizer.json"}
    size = sum(len(files[name]) for name in wanted) / 1e6
    assert f"downloading {REPO}: {size:.2f} MB in 3 files" in first.stderr
    assert "100%" in first.stderr  # the progress bar
    assert hub.downloaded() == wanted
    second = sample(hub.endpoint)  # nothing listens there any more
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout and len(first.stdout) > 200
    assert "downloading" not in second.stderr


def test_opt_comes_from_a_repository_that_has_pytorch_model_bin_only(start, tmp_path):
    """As facebook/opt-125m: half precision in a .bin beside other formats, no tokenizer.json."""
    folder = tmp_path / "opt"
    codec = tokenizers.ByteLevelBPETokenizer()
    codec.train_from_iterator(
        [Path(__file__).read_text()],
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
    )
    config = transformers.OPTConfig(
        vocab_size=304,
        hidden_size=64,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        init_std=0.3,
    )
    model = transformers.OPTForCausalLM(config).half()
    config.save_pretrained(folder)
    codec.save_model(str(folder))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    wanted = set(files)
    files |= dict.fromkeys(["flax_model.msgpack", "tf_model.h5"], b"not wanted")
    with Hub("facebook/opt-125m", files) as hub:
        process = start(hub.endpoint, model="opt")
        first, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "downloading facebook/opt-125m" in err and "in 4 files" in err
    assert (
        hub.downloaded()
        == wanted
        == {"config.json", "vocab.json", "merges.txt", "pytorch_model.bin"}
    )
    process = start(hub.endpoint, model="opt")  # nothing listens there any more
    second, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert second == first and first.startswith("Once upon a time")


def test_a_connection_that_is_cut_is_taken_up_where_it_broke(files, sample):
    with Hub(REPO, files, cut="model.safetensors") as hub:
        result = sample(hub.endpoint)
    assert result.returncode == 0, result.stderr
    transfers = [
        {key.lower(): value for key, value in headers.items()}
        for method, path, headers in hub.requests
        if method == "GET" and path.endswith("model.safetensors")
    ]
    assert len(transfers) == 2
    assert "range" not in transfers[0]
    assert transfers[1]["range"] == "bytes=10485760-"  # what huggingface_hub had written


def test_a_download_that_was_killed_is_finished_by_the_next_run(files, start, sample):
    with Hub(REPO, files, stall="model.safetensors") as hub:
        process = start(hub.endpoint)
        assert hub.stalled.wait(600)
        process.kill()
        process.communicate()
    with Hub(REPO, files) as hub:
        result = sample(hub.endpoint)
    assert result.returncode == 0, result.stderr
    assert "downloading" in result.stderr
    assert hub.downloaded() >= {"model.safetensors"}


def test_what_another_program_left_out_of_the_cache_is_downloaded(files, sample, tmp_path):
    """Such as a loader of weights alone, which has no use for the tokenizer."""
    with Hub(REPO, files) as hub:
        assert sample(hub.endpoint).returncode == 0
        [tokenizer] = (tmp_path / "hf").rglob("tokenizer.json")
        tokenizer.unlink()
        result = sample(hub.endpoint)
    assert result.returncode == 0, result.stderr


def test_a_gated_model_names_the_page_to_accept_and_how_to_log_in(files, sample):
    with Hub(REPO, files, gated=True) as hub:
        error = one_line(sample(hub.endpoint))
    assert f"{hub.endpoint}/{REPO}" in error
    assert "hf auth login" in error and "HF_TOKEN" in error


def test_the_token_of_the_environment_is_sent(files, sample):
    with Hub(REPO, files) as hub:
        sample(hub.endpoint, HF_TOKEN="hf_test_token")
    sent = [
        {k.lower(): v for k, v in headers.items()}.get("authorization")
        for _, path, headers in hub.requests
        if "/resolve/" in path
    ]
    assert sent and set(sent) == {"Bearer hf_test_token"}


def test_without_network_and_cache_it_says_what_to_do(sample, tmp_path):
    with socket.socket() as closed:  # a port at which nothing listens
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    error = one_line(sample(endpoint))
    for hint in [REPO, str(tmp_path / "hf" / "hub"), str(ROOT / "tiny" / "gpt2"), "folder"]:
        assert hint in error


def test_a_hub_that_never_answers_is_given_up(sample):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        error = one_line(sample(f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert REPO in error and "Timeout" in error


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["gpt2.py", "Hello", REPO], marks=pytest.mark.slow),
        ["sample.py", "--weights", REPO],
        pytest.param(["train.py", "--weights", REPO], marks=pytest.mark.slow),
        pytest.param(["bench.py", "--weights", REPO], marks=pytest.mark.slow),
    ],
    ids=lambda command: command[0],
)
def test_a_hub_that_never_answers_is_given_up_without_model_too(command, tmp_path):
    """The first question to the Hub is then that for config.json."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,  # snapshot_download alone waits for ever
        )
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert REPO in line and "Timeout" in line


def test_offline_mode_of_the_hub_is_respected(files, sample):
    with Hub(REPO, files) as hub:
        error = one_line(sample(hub.endpoint, HF_HUB_OFFLINE="1"))
    assert hub.requests == []
    assert REPO in error and "HF_HUB_OFFLINE" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--revision", "no-such-branch"], "no revision no-such-branch"),
        (["--weights", "no/such-model"], "the Hub has no model of that name"),
        (["--weights", "./no/such/folder"], "no such folder"),
        (["--weights", "two words"], "no such folder"),
    ],
)
def test_what_the_hub_does_not_have_is_named(files, sample, options, said):
    with Hub(REPO, files) as hub:
        assert said in one_line(sample(hub.endpoint, *options))


def test_a_revision_can_be_asked_for(files, sample):
    with Hub(REPO, files) as hub:
        result = sample(hub.endpoint, "--revision", "main", "--max-new-tokens", "5")
    assert result.returncode == 0, result.stderr
    assert any(path.endswith("/revision/main") for _, path, _ in hub.requests)


def write_adapter(folder, base):
    """A random adapter of one matrix."""
    folder.mkdir()
    name = "base_model.model.transformer.h.0.attn.c_proj"
    tensors = {}
    for letter, shape in [("A", (2, 64)), ("B", (64, 2))]:
        factor = np.random.default_rng(0).normal(size=shape)
        tensors[f"{name}.lora_{letter}.weight"] = factor.astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"revision": "main"}))
    return folder


def test_an_adapter_on_the_hub_brings_only_its_own_files(files, sample, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (base / name).write_bytes(files[name])
    folder = write_adapter(tmp_path / "adapter", base)
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    repo = "someone/adapter"
    options = ["--weights", repo, "--temperature", "0", "--max-new-tokens", "9"]
    with Hub(repo, wanted | {"optimizer.pt": b"not wanted"}) as hub:
        first = sample(hub.endpoint, *options)
    assert first.returncode == 0, first.stderr
    assert f"downloading {repo}" in first.stderr and hub.downloaded() == set(wanted)
    second = sample(hub.endpoint, *options)  # nothing listens there any more
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr
    assert "downloading" not in second.stderr
    plain = sample(hub.endpoint, "--weights", str(base), *options[2:])
    assert plain.stdout != first.stdout


def test_the_base_of_an_adapter_comes_from_the_hub_in_its_revision(files, sample, tmp_path):
    folder = str(write_adapter(tmp_path / "adapter", REPO))
    options = ["--weights", folder, "--temperature", "0", "--max-new-tokens", "9"]
    with Hub(REPO, files) as hub:
        first = sample(hub.endpoint, *options)
    assert first.returncode == 0, first.stderr
    assert hub.downloaded() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert any(path.endswith("/revision/main") for _, path, _ in hub.requests)
    second = sample(hub.endpoint, *options)  # nothing listens there any more
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr

    folder = str(write_adapter(tmp_path / "other", "no/such-model"))
    with Hub(REPO, files) as hub:
        error = one_line(sample(hub.endpoint, "--weights", folder))
    assert f"{folder} is an adapter, and its base is missing" in error and "no/such-model" in error
