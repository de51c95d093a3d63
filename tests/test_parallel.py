"""--parallel and --multihost: on several devices and hosts a model does what it does on one.

The devices are 4 that JAX makes of the CPU; so each test that needs them runs in a process of its
own, with a time limit, as threads of several devices can wait for one another for ever.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train

ROOT = Path(__file__).resolve().parents[1]
MODES = ["no", "pmap", "data", "fsdp", "tensor", "data:2,tensor:2", "fsdp:2,tensor"]
TRAIN = [
    "--layers",
    "1",
    "--heads",
    "4",
    "--width",
    "32",
    "--block",
    "16",
    "--batch",
    "8",
    "--steps",
    "20",
    "--eval-every",
    "10",
    "--lr",
    "1e-3",
    "--warmup",
    "10",
    "--device",
    "cpu",
    "--tokens",
    "char",
]


def wide(*case):
    return pytest.param(*case, marks=pytest.mark.wide)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def on_devices(n=4):
    """The environment of a process that has n devices."""
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(n), "NPROC": "16", "JAX_PLATFORMS": "cpu"}


def run(program, *args, n=4, code=0, **options):
    """Runs a program on n devices; the finished process, after a look at its exit code."""
    done = subprocess.run(
        [sys.executable, *program, *map(str, args)],
        cwd=ROOT,
        text=True,
        env=on_devices(n),
        capture_output=True,
        timeout=400,
        **options,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


SEVERAL = """
import json, sys, {program}
for line in sys.stdin:
    sys.argv = ["{program}.py", *json.loads(line)]
    print(*sys.argv, flush=True)
    {call}
"""


def run_several(program, call, *lines):
    """The same for several command lines, in one process: JAX is started once."""
    lines = "\n".join(json.dumps([str(word) for word in line]) for line in lines)
    return run(["-c", SEVERAL.format(program=program, call=call)], input=lines)


def train_several(*lines):
    return run_several("train", "assert train.main() == 0", *lines)


def refused(program, *args, n=4):
    """The one line of a program that ends with exit code 2."""
    error = run([program], *args, n=n, code=2).stderr
    assert "Traceback" not in error and error.splitlines()[-1].startswith(f"{program}: ")
    return error.splitlines()[-1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"The {n} of {n * n} went {n % 7} miles.\n" for n in range(300)))
    return file


def curve(out):
    """(loss, norm of the gradient) of each step, and the validation losses."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["loss"], row["norm"]) for row in rows if "loss" in row]
    return np.array(steps), np.array([row["val_loss"] for row in rows if "val_loss" in row])


def assert_same_curve(one, other):
    """Sums are taken in another order, and 20 steps of AdamW add to that."""
    for ours, theirs in zip(curve(one), curve(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "model, modes",
    [("gpt2", ["no", "pmap", "fsdp:2,tensor"]), *[slow(name, MODES) for name in train.MODELS]],
)
def test_every_mode_learns_what_one_device_learns(model, modes, text, tmp_path):
    more = ["--experts", "4"] if model in ("mistral", "qwen") else []
    printed = train_several(
        *[
            [
                *TRAIN,
                "--data",
                text,
                "--model",
                model,
                "--save-every",
                0,
                "--parallel",
                mode,
                *more,
                "--out",
                tmp_path / mode,
            ]
            for mode in modes
        ]
    ).stdout
    steps, val = curve(tmp_path / "no")
    assert len(steps) == 20 and val[-1] < val[0]
    for mode in modes[1:]:
        assert_same_curve(tmp_path / mode, tmp_path / "no")
    assert printed.count("on 1 x cpu") == 1 and printed.count("on 4 x cpu") == len(modes) - 1


@pytest.mark.parametrize(
    "model, modes",
    [
        wide("llama", ["no", "pmap", "fsdp:2,tensor"]),
        *[slow(name, MODES) for name in train.MODELS],
    ],
)
def test_every_mode_weighs_the_answers_of_conversations_alike(model, modes, tmp_path):
    """Devices and microbatches hold different numbers of answers; each answer counts the same."""
    flags = "--steps 6 --batch 8 --accumulate 2 --block 64 --lr 1e-3 --warmup 0 --eval-every 3"
    flags = f"--model {model} --weights tiny --device cpu --save-every 0 {flags}".split()
    data = ["--data", ROOT / "docs/conversations.jsonl"]
    train_several(*[[*flags, *data, "--parallel", x, "--out", tmp_path / x] for x in modes])
    steps, val = curve(tmp_path / "no")
    assert len(steps) == 6 and len(val) >= 2
    for mode in modes[1:]:
        assert_same_curve(tmp_path / mode, tmp_path / "no")


# What a layer needs: (parameters, those that FSDP splits, sums over tensor). Sums are one for each
# product behind a split one, and backward one for each before it, as XLA leaves them; GPT-2's fused
# c_attn is split across its three parts, so that query, key and value must be gathered.
LAYER = {
    "gpt2": (12, 4, {"all-reduce": 4, "all-gather": 2}),
    "opt": (16, 6, {"all-reduce": 6}),
    "llama": (9, 7, {"all-reduce": 7}),
    "gemma": (13, 7, {"all-reduce": 8}),
    "mistral": (9, 7, {"all-reduce": 7}),
    "mistral, 4 experts": (10, 7, {"all-reduce": 8}),
    "qwen": (11, 7, {"all-reduce": 9}),
    "qwen, 4 experts": (12, 7, {"all-reduce": 10}),
}


@pytest.mark.parametrize(
    "case",
    [
        "gpt2",
        slow("opt"),
        slow("llama"),
        wide("gemma"),
        slow("mistral"),
        wide("mistral, 4 experts"),
        wide("qwen"),
        slow("qwen, 4 experts"),
    ],
)
def test_gradients_are_those_of_one_device_and_arrays_travel_as_they_must(case):
    """Data: each gradient is summed. FSDP: besides, each split parameter is gathered; no activation
    travels, and with experts each device routes its own tokens. Tensor: activations are summed, of
    experts each block's. (A CPU sums where a GPU would reduce and scatter.)"""
    model, _, experts = case.replace(" experts", "").partition(", ")
    found = json.loads(run(["tests/helpers/collectives.py"], model, experts or 0).stdout)
    parameters, split, tensor = LAYER[case]
    gathers = {"all-gather": split}
    both = {"all-reduce": tensor["all-reduce"] + parameters}
    assert {mode: result["layer"] for mode, result in found.items()} == {
        "data": {"all-reduce": parameters},
        "fsdp": {"all-reduce": parameters} | gathers,
        "tensor": tensor,
        "data,tensor": tensor | both,
        "fsdp,tensor": both | {"all-gather": split + tensor.get("all-gather", 0)},
    }
    for mode, result in found.items():  # gradients below 1, in float32
        assert result["error"] < 4e-6, mode


@pytest.mark.parametrize(
    "first, then",
    [
        wide("no", "fsdp:2,tensor"),
        slow("fsdp", "tensor"),
        slow("pmap", "data"),
        slow("tensor", "no"),
    ],
)
def test_a_checkpoint_of_one_mode_is_resumed_under_another(first, then, text, tmp_path):
    flags = [*TRAIN, "--data", text, "--save-every", 10, "--optimizer", "muon"]
    train_several([*flags, "--parallel", first, "--out", tmp_path / "first"])
    shutil.copytree(tmp_path / "first", tmp_path / "then")
    shutil.rmtree(tmp_path / "then/checkpoints/20")
    (tmp_path / "then/model.safetensors").unlink()
    train_several([*flags, "--parallel", then, "--resume", "--out", tmp_path / "then"])
    assert_same_curve(tmp_path / "then", tmp_path / "first")


@pytest.mark.parametrize(
    "flags",
    [
        wide("--lora 4 --weights tiny"),
        slow("--accumulate 2 --ema 0.9"),
        slow("--optimizer adafactor --remat"),
        wide("--optimizer lion --lr 1e-4 --dropout 0.1"),
    ],
)
def test_what_else_training_does_is_the_same_when_it_is_split(flags, text, tmp_path):
    flags = [*TRAIN, "--data", text, "--save-every", 0, *flags.split()]
    flags = [x for x in flags if x not in ("--tokens", "char")] if "--lora" in flags else flags
    modes = ["no", "fsdp:2,tensor:2"]
    train_several(*[[*flags, "--parallel", x, "--out", tmp_path / x] for x in modes])
    assert_same_curve(tmp_path / modes[1], tmp_path / "no")


# --------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "model", [wide("gpt2"), slow("opt"), slow("llama"), wide("gemma"), slow("mistral")]
)
def test_every_mode_draws_the_greedy_tokens_of_one_device(model):
    flags = [
        "--model",
        model,
        "--weights",
        "tiny",
        "--temperature",
        0,
        "--max-new-tokens",
        40,
        "--json",
        "--prompt",
        "ROMEO: my",
        "--prompt",
        "First Citizen:",
        "--prompt",
        "What",
    ]
    lines = run_several(
        "sample", "sample.main()", *[[*flags, "--parallel", mode] for mode in MODES]
    ).stdout.splitlines()
    texts = [json.loads(line)["completion_ids"] for line in lines if line.startswith("{")]
    assert len(texts) == 3 * len(MODES) and set(map(len, texts)) == {40}
    assert all(texts[i : i + 3] == texts[:3] for i in range(0, len(texts), 3))


SHARES = """
import importlib, json, sys
from argparse import Namespace
import jax, numpy as np
from flax import nnx
import sample
module, axes = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2])
placed = []
put = jax.device_put
jax.device_put = lambda x, where=None: placed.append(put(x, where)) or placed[-1]
mesh = jax.sharding.Mesh(np.reshape(jax.devices(), [*axes.values()]), [*axes])
model = module.load("tiny/" + sys.argv[1], dtype="float32", mesh=mesh)
jax.device_put = put
held = dict.fromkeys(map(str, jax.devices()), 0)
for array in placed:  # all that loading put on a device
    for shard in array.addressable_shards:
        held[str(shard.device)] += shard.data.nbytes
args = Namespace(temperature=0, top_p=None, min_p=None, repetition_penalty=1, top_k=None, seed=0,
                 profile=None, json=True, no_stream=False)
keys = list(jax.random.split(jax.random.key(0), 4))
rows = sample.place(module, model, mesh, [[5, 6], [7, 8], [9], [5]], keys, 8)
timing = sample.Timing()
programs = sample.Programs(model, mesh, None, timing)
texts = sample.fill_context(module, programs, rows, 8, timing, args)
caches = [next(texts) is None or texts.gi_frame.f_locals["cache"] for _ in range(2)]
def split(array):  # the axis along which each dimension is split
    spec = [axis[0] if isinstance(axis, tuple) else axis for axis in array.sharding.spec]
    return spec + [None] * (array.ndim - len(spec))
print(json.dumps([held, sum(p.nbytes for p in jax.tree.leaves(nnx.state(model))),
                  [split(cache.layers[0][0]) for cache in caches]]))
"""


@pytest.mark.parametrize(
    "model, axes, rows_and_heads",
    [
        ("llama", {"data": 2, "tensor": 2}, ["data", "tensor"]),
        ("gpt2", {"tensor": 4}, [None, "tensor"]),
        ("gemma", {"data": 2, "tensor": 2}, ["data", None]),  # its one head is on all
        ("mistral", {"fsdp": 4}, ["fsdp", None]),
        ("qwen", {"data": 2, "tensor": 2}, ["data", "tensor"]),
    ],
)
def test_weights_go_to_their_shards_and_the_cache_is_split_as_the_heads_are(
    model, axes, rows_and_heads
):
    held, size, caches = json.loads(run(["-c", SHARES], model, json.dumps(axes)).stdout)
    split = axes.get("tensor", 1) * axes.get("fsdp", 1)
    assert len(held) == 4  # norms, biases and a table that does not divide are on each whole
    assert all(size / split <= n < size / split + 0.12 * size for n in held.values())
    rows, heads = rows_and_heads
    assert caches == [[rows, None, heads, None]] * 2  # after the prefill, and after the steps


# ---------------------------------------------------------------------------------- auto, bad input

AUTO = """
import sys, jax, {program}
stats = {{"bytes_limit": {room}, "peak_bytes_in_use": 1, "bytes_in_use": 1}}
type(jax.devices()[0]).memory_stats = lambda device: stats
sys.argv = ["{program}.py", *sys.argv[1:]]
sys.exit({program}.main())
"""


@pytest.mark.parametrize("room, picked", [slow(10**9, "data"), wide(10**5, "tensor")])
def test_auto_splits_the_data_unless_the_model_does_not_fit_and_says_so(
    room, picked, text, tmp_path
):
    program = AUTO.format(program="train", room=room)
    printed = run(
        ["-c", program],
        *TRAIN,
        "--steps",
        2,
        "--warmup",
        0,
        "--data",
        text,
        "--out",
        tmp_path / "out",
    ).stdout
    than, axis = ("less", "data") if picked == "data" else ("more", "tensor:4")
    assert f"--parallel {axis}: the state takes {than} than the memory of one device" in printed
    program = AUTO.format(program="sample", room=room)
    error = run(["-c", program], "--prompt", "a", "--prompt", "b", "--max-new-tokens", 3).stderr
    assert {
        "data": "--parallel data:2 of 4 devices: 2 texts",
        "tensor": "--parallel tensor:4 of 4 devices: 0.0 GB do not fit one",
    }[picked] in error


@pytest.mark.parametrize(
    "program, flags, message",
    [
        ("train.py", "--parallel data:8", "--parallel data:8 needs 8 devices, and there are 4"),
        ("train.py", "--parallel data,tensor", "say how many along all axes but one"),
        (
            "train.py",
            "--parallel data:2,data:2",
            "--parallel: pmap, or like fsdp or data:2,tensor:4",
        ),
        ("train.py", "--multihost auto --parallel no", "--multihost takes all devices"),
        ("train.py", "--multihost 127.0.0.1:9,2,2", "there is no host 2 of 2, counted from 0"),
        ("train.py", "--parallel tensor:3", "4 heads split over tensor: [1, 2, 4], not over 3"),
        (
            "train.py",
            "--parallel data --batch 6",
            "--batch 6 does not split over 4 devices (or groups "
            "of them) in --accumulate 1 microbatches: choose a multiple of 4",
        ),
        ("train.py", "--parallel rows", "--parallel: pmap, or like fsdp or data:2,tensor:4"),
        ("train.py", "--parallel pmap --multihost auto", "--prompt are for one host"),
        ("train.py", "--multihost here", "--multihost must be auto, or like 10.0.0.1:1234,2,0"),
        ("train.py", "--multihost auto", "--multihost auto: coordinator_address should be defined"),
        (
            "sample.py",
            "--parallel tensor:8",
            "--parallel tensor:8 needs 8 devices, and there are 4",
        ),
        ("sample.py", "--parallel tensor:3", "4 heads split over tensor: [1, 2, 4], not over 3"),
        ("sample.py", "--parallel rows", "--parallel must be pmap, or like data, tensor:2"),
    ],
)
def test_a_mode_that_does_not_fit_is_one_line(program, flags, message, text, tmp_path):
    more = [*TRAIN, "--data", text, "--out", tmp_path / "out"] if program == "train.py" else []
    assert message in refused(program, *more, *flags.split())
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ several hosts


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("again", [0, slow(1)])
def test_two_hosts_learn_what_one_learns_and_only_the_first_prints(again, text, tmp_path):
    """Two processes with two devices each, checkpoints and all; then both go on from those."""
    flags = [*TRAIN, "--data", text, "--save-every", 10, "--parallel", "fsdp:2,tensor:2", "--out"]
    run(["train.py"], *flags, tmp_path / "one")
    for resume in [[], ["--resume"]][: 1 + again]:
        port = free_port()
        hosts = [
            subprocess.Popen(
                [
                    sys.executable,
                    "train.py",
                    *map(str, flags),
                    str(tmp_path / "two"),
                    *resume,
                    "--multihost",
                    f"127.0.0.1:{port},2,{i}",
                ],
                cwd=ROOT,
                env=on_devices(2),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for i in range(2)
        ]
        printed = [host.communicate(timeout=600) for host in hosts]
        assert [host.returncode for host in hosts] == [0, 0], printed
        (first, lines), (second, nothing) = printed
        assert "on 4 x cpu" in first and "finished" in first and "step     20/20" in lines
        # Gloo's own lines may be torn apart.
        assert all(re.search(r"Gloo|peer ranks|^\d*$", line) for line in second.splitlines())
        assert not nothing
        assert_same_curve(tmp_path / "two", tmp_path / "one")
        shutil.rmtree(tmp_path / "two/checkpoints/20")
        (tmp_path / "two/model.safetensors").rename(tmp_path / f"{len(resume)}.safetensors")
    whole = {(tmp_path / f"{i}.safetensors").read_bytes() for i in range(1 + again)}
    assert len(whole) == 1  # resuming is exact here, too


MEET = """
import sys, train
train.JOIN = 3
train.main()
"""


@pytest.mark.parametrize("host, missing", [(0, "[1, 2]"), (1, "[0]")])
def test_a_host_that_never_joins_is_named(host, missing, tmp_path):
    error = run(
        ["-c", MEET],
        "--out",
        tmp_path / "out",
        "--multihost",
        f"127.0.0.1:{free_port()},3,{host}",
        code=2,
    ).stderr
    assert f"{missing} of 3 did not connect in 3 s" in error and error.count("\n") == 1
