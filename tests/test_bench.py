"""bench.py: its arithmetic by hand, its programs as a user runs them; no assertion about speed."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from flax import nnx
from helpers.reference import ROOT
from helpers.small import DAMAGES, SIZES_FOR_GGUF, write_checkpoint

import bench
import gemma
import gpt2
import llama
import mistral
import opt
import qwen


def run(*options, code=0):
    """python bench.py OPTIONS -> what it printed."""
    done = subprocess.run(
        [sys.executable, "bench.py", "--runs", "1", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done


def results(folder):
    """(about the run, {(metric, who): record})"""
    about, *records = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return about, {(record["metric"], record["who"]): record for record in records}


# -------------------------------------------------------------------------------------- arithmetic


def test_calls_are_run_in_turn_and_the_first_round_does_not_count():
    order = []
    seconds = bench.in_turn({name: partial(order.append, name) for name in "ab"}, runs=2)
    assert order == 3 * ["a", "b"]
    assert [len(seconds[name]) for name in "ab"] == [2, 2]


def test_the_costs_of_gpt2_are_those_of_the_formula():
    """124M: 12 layers of 12 * 768^2 weights, and the token table as head."""
    config = gpt2.PRESETS["openai-community/gpt2"].config
    found = bench.costs(gpt2, config, B=2, T=100, dtype="float32")
    N, head, look = 12 * 12 * 768**2, 50257 * 768, 4 * 12 * 768
    assert found.size == 124_439_808
    assert found.prefill == 2 * (100 * 2 * N + look * 100**2 + 2 * head)
    assert found.decode == 2 * (2 * (N + head) + look * 100)
    assert found.train == 3 * 2 * 100 * (2 * (N + head) + look * 100)
    assert found.weights == 4 * (N + head)
    assert found.cache == 2 * 100 * 12 * 2 * 768 * 4


def test_an_own_head_is_read_in_place_of_the_token_table_and_key_heads_are_shared():
    config = llama.Config(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    found = bench.costs(llama, config, B=1, T=10, dtype="bfloat16")
    N = 2 * (2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 96)
    assert found.size == N + 2 * 1000 * 64 + 5 * 64
    assert found.decode_bytes == 2 * (N + 1000 * 64) + 10 * 2 * 2 * 16 * 2


def test_of_experts_only_the_chosen_ones_are_read_and_computed():
    config = mistral.Config("mixtral", 1000, 128, 64, 96, 1, 4, 4, 16, num_local_experts=8)
    others, expert = 4 * 64 * 64 + 64 * 8, 3 * 64 * 96
    for B, experts in [(1, 2), (3, 8 * (1 - 0.75**3))]:
        found = bench.costs(mistral, config, B, 10, "float32")
        assert math.isclose(found.weights, 4 * (others + experts * expert + 64_000))
        assert found.decode == B * (2 * (others + 2 * expert + 64_000) + 4 * 64 * 10)


def test_a_window_bounds_what_is_read_of_the_cache():
    config = mistral.Config("mistral", 1000, 128, 64, 96, 1, 4, 4, 16, sliding_window=8)
    assert bench.costs(mistral, config, 1, 100, "float32").cache == 8 * 2 * 64 * 4


def test_random_weights_have_the_shapes_and_types_that_were_asked_for():
    model = bench.random_model(
        gpt2, gpt2.Config(n_embd=32, n_layer=1, n_head=2), "bfloat16", "bfloat16"
    )
    assert model.h[0].mlp.c_fc.kernel[...].dtype == jnp.bfloat16
    assert abs(float(model.wte.embedding[...].astype("float32").std()) - 0.02) < 1e-3
    assert (np.asarray(model.ln_f.scale[...]) == 1).all()


def test_random_experts_are_quantized_too():
    sizes = {"layers": 1, "heads": 2, "width": 64, "context": 32, "experts": 4}
    config = mistral.Config.small(**sizes, vocab_size=100)
    model = bench.random_model(mistral, config, "float32", "float32", quantize="int4")
    kernel = model.layers[0].block_sparse_moe.experts.w1.kernel
    assert kernel.codes.shape == (4, 192, 32) and kernel.group_scale.shape == (4, 6, 64)
    assert abs(float(kernel.row_scale[...].mean()) - 0.02) < 1e-3
    assert np.isfinite(model(np.arange(6)[None])).all()


def ours_with(axes=None, **options):
    """bench.py's side of a comparison, with the tiny GPT-2 in float32."""
    options = {
        "model": "gpt2",
        "weights": "tiny",
        "task": [],
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "remat": False,
        "chunked": False,
        "accumulate": 1,
        "loss_parts": 1,
        **options,
    }
    mesh = axes and jax.sharding.Mesh(np.reshape(jax.devices()[:1], (1,) * len(axes)), axes)
    return bench.Ours(SimpleNamespace(quantize=None, **options), "float32", mesh)


ROWS = np.random.default_rng(0).integers(0, 512, (4, 33)).tolist()


@pytest.mark.parametrize(
    "technique",
    [
        {"remat": True, "chunked": True, "accumulate": 4, "loss_parts": 8, "axes": ["pmap"]},
        *[
            pytest.param(each, marks=pytest.mark.slow)
            for each in [
                {"remat": True},
                {"chunked": True},
                {"accumulate": 2},
                {"loss_parts": 3},
                {"axes": ["pmap"]},
            ]
        ],
        pytest.param({"axes": ["fsdp", "tensor"], "accumulate": 2}, marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_every_technique_of_training_is_the_plain_step(technique, monkeypatch):
    """The losses of three steps; sums in another order differ in the last digits."""
    plain = ours_with().train(ROWS)
    expected = [plain() for _ in range(3)]
    monkeypatch.setattr(gpt2, "LONG", gpt2.LONG)  # which --chunked changes
    step = ours_with(**technique).train(ROWS)
    np.testing.assert_allclose([step() for _ in range(3)], expected, rtol=1e-5)
    assert expected[2] < expected[0]


@pytest.mark.parametrize("axes", [["pmap"], ["data", "tensor"]])
def test_a_mesh_draws_the_tokens_of_generate(axes):
    n = 1 + 2 * gpt2.STEPS + 3  # the first, two whole calls of decode and a part of one
    prompts = [row[:20] for row in ROWS]
    found = ours_with(axes).generate(prompts, n)()
    assert found == ours_with().generate(prompts, n)()


# ------------------------------------------------------------------------------ tables and pictures


@pytest.mark.parametrize(
    "x, text",
    [
        (0, "0"),
        (16, "16"),
        (0.02426, "0.0243"),
        (1.431e-05, "1.43e-05"),
        (0.9999, "1.00"),
        (54.02, "54.0"),
        (159.4, "159"),
        (999.4, "999"),
        (999.6, "1,000"),
        (1319.4, "1,319"),
        (25_294_214.3, "25,294,214"),
    ],
)
def test_a_number_has_three_digits_that_count_and_no_exponent_above_one(x, text):
    assert bench.number(x) == text


def figure(metric="decode", who="ours", values=(54.02, 47.1, 56.04), unit="tokens/s", **more):
    """A record, as bench.py's processes write it."""
    low, value, high = sorted(values) if len(values) == 3 else values * 3
    return {
        "task": "decode",
        "metric": metric,
        "who": who,
        "value": value,
        "low": low,
        "high": high,
        "runs": len(values),
        "unit": unit,
        "model": "gpt2",
        "weights": "openai-community/gpt2",
        "device": "NVIDIA H200",
        "batch": 1,
        "length": 32,
        "dtype": "bfloat16",
        "how": "",
        **more,
    }


def point(limits, share=0.5, intensity=4.0, **more):
    """A record with its place in the roofline: at a share of its own limits."""
    flops = share * bench.roof(limits, intensity)
    more = {"intensity": intensity, "flops": flops, "limits": limits, **more}
    more = {"limit_range": [29.1e9, 30.4e9], "in_cache": False, **more}
    return figure(share=share, of="29.9 GB/s", formula="share = bytes / time / limit", **more)


def printed(records, capsys):
    """The lines of the tables of these records."""
    bench.print_tables(records)
    return capsys.readouterr().out.splitlines()


def test_what_is_the_same_in_all_rows_stands_above_the_table(capsys):
    records = [figure(), figure("memory of decode", values=(0.4,), unit="GB")]
    assert printed(records, capsys) == [
        "gpt2 (openai-community/gpt2), bfloat16, NVIDIA H200",
        "ours, 1 x 32 tokens",
        "",
        "| figure           | median |     range | unit     |",
        "| ---------------- | -----: | --------: | -------- |",
        "| decode           |   54.0 | 47.1-56.0 | tokens/s |",
        "| memory of decode |  0.400 |           | GB       |",
        "",
        "memory: the most that the device has held; for a CPU, the process",
    ]


@pytest.mark.parametrize("speed, tables", [(13_045.0, 1), (1e9, 6)])
def test_the_figures_of_one_model_and_one_shape_fit_80_columns(speed, tables, capsys):
    """In one table as a rule; where the numbers are too large for that, in several."""
    speeds = (0.9 * speed, speed, 1.1 * speed)
    limits = {"FLOP/s": 1e15, "B/s": 1e12}
    records = []
    for task in ("prefill", "decode", "train"):
        found = point(limits, share=1.09, task=task, metric=task, values=speeds)
        memory = figure(f"memory of {task}", task=task, values=(0.361,), unit="GB")
        records += [{**found, "of": "88.4 GFLOP/s"}, memory]
        del memory["batch"], memory["length"]

    lines = printed(records, capsys)
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("| ---") for line in lines) == tables
    assert sum("109% of 88.4 GFLOP/s" in line for line in lines) == 3


@pytest.mark.parametrize("columns, width", [(None, 80), (60, 60), (100, 100), (200, 100)])
def test_prose_takes_the_width_of_the_terminal_up_to_100_columns(
    columns, width, monkeypatch, capsys
):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, bench.wrap("a " * 500).splitlines())) == width - 1  # no space at the end

    limits = {"FLOP/s": 8e14, "B/s": 4.8e12}
    records = [point(limits, share=1.5), figure("verdict", values=(1.0,), of="same " * 30)]
    prose = [line for line in printed(records, capsys) if not line.startswith("|")]
    bench.warn_if_busy([figure(values=(1.0, 2.0, 3.0)), *records])
    prose += capsys.readouterr().err.splitlines()
    assert max(map(len, prose)) <= width


def test_what_a_row_or_a_share_means_is_printed_below_the_tables(capsys):
    rows = figure("rows", task="train", unit="rows/s")
    first = figure("first token", task="prefill", unit="ms")
    cached = point({"FLOP/s": 8e14, "B/s": 4.8e12}, share=1.05, in_cache=True)
    scaling = figure("data parallel", task="plan", unit="of linear")
    lines = printed([rows, first, cached, scaling], capsys)
    assert "rows: sequences per second in training" in lines
    assert "first token: the time of a prefill" in lines
    assert "above 100% of the memory bandwidth: the model fits the processor's cache" in lines
    assert any(line.startswith("data parallel: training without FSDP") for line in lines)

    text = "\n".join(printed([figure()], capsys))
    assert "rows:" not in text and "above 100%" not in text


def test_no_table_is_wider_than_100_columns_and_no_figure_is_lost(capsys):
    """The longest names and large numbers; what is too wide as one table is several."""
    limits = {"FLOP/s": 8e14, "B/s": 4.8e12}
    large = (9_876_543.0, 8_876_543.0, 10_876_543.0)
    records = []
    for metric in ("prefill", "decode", "train"):
        for batch in (1, 1024):
            shape = {"task": metric, "metric": metric, "batch": batch, "length": 131_072}
            records.append(point(limits, values=large, **shape))
            for peer in bench.PEERS:
                records.append(figure(who=peer, values=large, **shape))
                records.append(figure(who=f"ours / {peer}", unit="times", **shape))
        scaling = {"task": metric, "metric": f"{metric}, scaling", "unit": "of linear"}
        records.append(figure(who="data:16,fsdp:16,tensor:16", **scaling))

    tables = [line for line in printed(records, capsys) if line.startswith("|")]
    assert max(map(len, tables)) <= 100
    peers = len(bench.PEERS)
    assert sum("9,876,543" in line for line in tables) == 3 * 2 * (1 + peers)
    assert sum("54.0" in line for line in tables) == 3 * (2 * peers + 1)


def test_other_dtypes_and_options_have_tables_of_their_own(capsys):
    records = [figure(), figure(dtype="float32"), figure(), figure(how="ragged")]
    lines = printed(records, capsys)
    above = [line for line in lines if line.startswith("gpt2")]
    start = "gpt2 (openai-community/gpt2), "
    assert above == [
        f"{start}bfloat16, NVIDIA H200",
        f"{start}float32, NVIDIA H200",
        f"{start}bfloat16, NVIDIA H200, ragged",
    ]


def test_the_verdict_is_the_last_line(capsys):
    verdict = figure("verdict", task="validate", values=(1.0,), of="the same model")
    lines = printed([verdict, figure("logits", task="validate")], capsys)
    expected = "validate: gpt2 (openai-community/gpt2), bfloat16, NVIDIA H200"
    assert lines[-2:] == [expected, "verdict: the same model"]
    assert sum("same model" in line for line in lines) == 1


@pytest.mark.parametrize(
    "values, busy",
    [
        ((50.0, 54.0, 74.0), False),
        ((50.0, 54.0, 76.0), True),
        ((-2.0, 54.0, 56.0), True),  # where the first token took longer than all
        ((54.0,), False),
    ],
)
def test_runs_that_differ_by_half_say_that_the_machine_was_busy(values, busy, capsys):
    bench.warn_if_busy([figure(values=values), figure("prefill")])
    err = capsys.readouterr().err
    assert ("the machine was busy: decode " in err) == busy
    assert "prefill" not in err


@pytest.mark.parametrize(
    "share, limit_range, in_cache, too_low",
    [
        (0.5, [20e9, 29e9], False, False),
        (0.5, [20e9, 31e9], False, True),  # its runs differ by half
        (0.5, [20e9, 31e9], True, True),
        (1.05, [29e9, 30e9], False, True),  # more than there is
        (1.05, [29e9, 30e9], True, False),
        (1.004, [29e9, 30e9], False, False),  # printed as 100%
    ],
)
def test_a_limit_that_was_measured_too_low_is_named_with_its_shares(
    share, limit_range, in_cache, too_low, capsys
):
    limits = {"FLOP/s": 8e14, "B/s": 29.9e9}
    found = point(limits, share=share, limit_range=limit_range, in_cache=in_cache, values=(54.0,))
    bench.warn_if_busy([found, figure("prefill", values=(54.0,))])
    err = " ".join(capsys.readouterr().err.split())
    said = f"a limit was measured too low, and its shares mean nothing: decode {share:.0%} of 29.9"
    assert (said in err) == too_low
    assert (err == "") != too_low


def test_a_share_is_of_the_limit_that_allows_less_with_the_range_of_its_runs(monkeypatch):
    """10 FLOPs for 2 bytes: reading takes longer here, and in half a second it is 4 B/s."""
    needs = SimpleNamespace(decode=10, decode_bytes=2)
    reached = {"FLOP/s": [100, 90, 110], "B/s": [8, 7, 9]}
    for size, in_cache in [(1, False), (2, True)]:
        monkeypatch.setattr(bench, "cache_size", lambda size=size: size)
        found = bench.share_of_limit("decode", needs, 0.5, reached)
        assert (found["share"], found["limit_range"]) == (0.5, [7, 9])
        assert found["limits"] == {"FLOP/s": 100, "B/s": 8}
        assert found["in_cache"] == in_cache


def drawn(records, tmp_path, monkeypatch):
    """The axes of a roofline."""
    kept = []
    savefig = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda picture, *args, **more: [kept.append(picture), savefig(picture, *args, **more)],
    )
    bench.draw_roofline(records, tmp_path / "roofline.png")
    [axes] = kept[0].axes
    return axes


def test_each_point_of_the_roofline_has_one_label_and_lies_below_the_limit_of_its_own_runs(
    tmp_path, monkeypatch
):
    """The machine was slow in the second: its point is above the third's limits, not its own."""
    fast, slow = {"FLOP/s": 2e11, "B/s": 3e10}, {"FLOP/s": 1e11, "B/s": 1e10}
    records = [
        point(fast, share=0.9),
        point(fast, share=0.9, batch=8),
        point(slow, share=0.4, how="ragged"),
        point(fast, share=0.9, how="ragged"),
    ]
    axes = drawn(records, tmp_path, monkeypatch)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "decode 1 x 32: 90%",
        "decode 8 x 32: 90%",
        "decode 1 x 32, ragged: 40%",
        "decode 1 x 32, ragged, again (2): 90%",
    ]
    bars = [line for line in axes.lines if line.get_marker() == "_"]
    points = [line for line in axes.lines if line.get_label() in labels]
    for found, bar, dot in zip(records, bars, points, strict=True):
        [limit], [height] = bar.get_ydata(), dot.get_ydata()
        assert limit == bench.roof(found["limits"], 4.0)
        assert math.isclose(height, found["share"] * limit)


# ---------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize(
    "tasks", [["decode"], pytest.param(["prefill", "train"], marks=pytest.mark.wide)], ids=",".join
)
def test_the_bundled_model_is_measured_and_the_figures_are_kept(tmp_path, tasks):
    done = run(
        "--task",
        ",".join(tasks),
        "--batch",
        "2",
        "--new-tokens",
        100,
        "--out",
        tmp_path,
        "--runs",
        3,
    )  # a single first token can take longer than all that follow
    assert f"| {tasks[0]} " in done.stdout and "2 x 32 tokens" in done.stdout
    assert "% of " in done.stdout
    progress = re.findall(r"^bench.py: \d+ of \d+: .*$", done.stderr, re.MULTILINE)
    assert progress == [
        f"bench.py: {i} of {len(tasks)}: --task {task}" for i, task in enumerate(tasks, 1)
    ]
    about, found = results(tmp_path)
    assert about["command"].startswith("bench.py --runs 1") and "jax" in about
    for metric in tasks:
        record = found[metric, "ours"]
        assert record["low"] <= record["value"] <= record["high"] and record["share"] > 0
        assert record["batch"] == 2 and record["weights"] == "tiny"
    if "train" in tasks:
        rows = found["rows", "ours"]["value"]
        assert math.isclose(32 * rows, found["train", "ours"]["value"], rel_tol=1e-6)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "mode, names",
    [
        pytest.param("pmap", ["pmap:1", "pmap:2", "pmap:4"], marks=pytest.mark.slow),
        pytest.param("fsdp", ["fsdp:1", "fsdp:2", "fsdp:4"], marks=pytest.mark.slow),
        pytest.param(
            "data:2,tensor:2", ["data:1,tensor:1", "data:2,tensor:2"], marks=pytest.mark.wide
        ),
    ],
)
def test_scaling_is_measured_on_several_devices_and_all_of_it_traced(
    mode, names, tmp_path, monkeypatch
):
    monkeypatch.setenv("NPROC", "16")  # or the emulated devices wait for each other forever
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    run(
        "--task",
        "decode,train",
        "--parallel",
        mode,
        "--new-tokens",
        50,
        "--out",
        tmp_path,
        "--profile",
        tmp_path / "trace",
        "--runs",
        3,
        "--batch",
        2,
    )
    _, found = results(tmp_path)
    for metric in ("decode", "train"):
        assert all(found[metric, name]["value"] > 0 for name in names)
        assert all(found[f"{metric}, scaling", name]["value"] > 0 for name in names[1:])
    assert len(list(tmp_path.glob("trace/**/*.xplane.pb"))) == 2


@pytest.mark.parametrize(
    "memory, said, names",
    [
        (math.inf, "--parallel data: the state takes less than the memory", ["data:1"]),
        (101, "--parallel data: the state takes less than the memory", ["data:1"]),
        (99, "--parallel tensor: the state takes more than the memory", []),
    ],
)
def test_auto_splits_the_rows_unless_one_device_is_too_small_and_says_so(
    memory, said, names, monkeypatch, capsys
):
    """Here is one device: what it cannot hold would be measured on two and four."""
    monkeypatch.setattr(bench, "memory_of", lambda device: memory)
    meshes = bench.make_meshes("auto", jax.devices()[:1], heads=4, needed=100)
    assert said in capsys.readouterr().out
    assert [f"{axis}:{n}" for mesh in meshes for axis, n in mesh.shape.items()] == names


@pytest.mark.wide
def test_ctrl_c_shows_what_was_measured(tmp_path):
    heed = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    bench = subprocess.Popen(
        [
            sys.executable,
            "-c",
            heed,  # a shell's background processes do not
            "bench.py",
            "--task",
            "plan,decode",
            "--runs",
            "9999",
            "--preset",
            "openai-community/gpt2",
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    while "decode" not in bench.stderr.readline():
        pass
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
    while not children.read_text():  # the process of the task
        time.sleep(0.05)
    os.killpg(bench.pid, signal.SIGINT)
    out, _ = bench.communicate(timeout=600)
    assert bench.returncode == 130 and "| decode: step" in out


@pytest.mark.parametrize(
    "tasks",
    [
        pytest.param(["decode"], marks=pytest.mark.wide),
        pytest.param(["load", "start"], marks=pytest.mark.slow),
    ],
    ids=",".join,
)
def test_peers_run_in_turn_on_the_same_weights(tasks, tmp_path):
    run("--task", ",".join(tasks), "--vs", "transformers", "--new-tokens", 4, "--out", tmp_path)
    _, found = results(tmp_path)
    for metric in tasks:
        ours, theirs = found[metric, "ours"]["value"], found[metric, "transformers"]["value"]
        assert math.isclose(found[metric, "ours / transformers"]["value"], ours / theirs)


# --------------------------------------------------------------------------------------- llama.cpp

SIZES = {**SIZES_FOR_GGUF, "vocab_size": 256}
GEMMA = {**SIZES, "query_pre_attn_scalar": 32, "sliding_window": 8, "rope_theta": 10000.0}
IN_LLAMA_CPP = {  # name -> (model file, config; None: the model in tiny/)
    "gpt2": (gpt2, None),
    "llama": (llama, None),
    "gemma": (gemma, None),
    "mistral": (mistral, mistral.Config(**SIZES, sliding_window=64)),
    "llama with biases": (llama, llama.Config(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama 3.1": (llama, llama.Config(**SIZES, rope_scaling=llama.LLAMA31["rope_scaling"])),
    "smollm3": (llama, llama.Config(**SIZES | {"num_hidden_layers": 5}, model_type="smollm3")),
    "granite": (
        llama,
        llama.Config(
            **SIZES,
            model_type="granite",
            embedding_multiplier=12,
            residual_multiplier=0.22,
            attention_multiplier=0.05,
            logits_scaling=8,
        ),
    ),
    "gemma 1": (gemma, gemma.Config(**GEMMA, model_type="gemma")),
    "gemma 2": (
        gemma,
        gemma.Config(
            **GEMMA, model_type="gemma2", attn_logit_softcapping=50, final_logit_softcapping=30
        ),
    ),
    "gemma 3": (gemma, gemma.Config(**GEMMA | {"num_hidden_layers": 7}, rope_factor=8.0)),
    # llama.cpp takes biases as wide as the residual stream: D = H * Dh.
    "qwen 2": (qwen, qwen.Config(**SIZES | {"head_dim": None}, model_type="qwen2")),
    "qwen 3": (qwen, qwen.Config(**SIZES)),
}
EVERY_MODEL = [
    pytest.param(name, marks=[] if config is None else pytest.mark.wide)
    for name, (_, config) in IN_LLAMA_CPP.items()
]


def folder_of(name, tmp_path):
    """(model file, folder of a checkpoint): biases and norms have random weights, too."""
    module, config = IN_LLAMA_CPP[name]
    if config is None:
        return module, ROOT / "tiny" / name

    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(module.Model(config, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda w: w + 0.3 * rng.normal(size=w.shape).astype(w.dtype), state)
    module.save(nnx.merge(graphdef, state), tmp_path / "weights")
    return module, tmp_path / "weights"


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_llama_cpp_draws_our_greedy_tokens(name, tmp_path, monkeypatch):
    """The tokens in float32; so does its sampler where it has only the likeliest token left."""
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-dev.txt")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # more threads spin where others have the cores
    module, folder = folder_of(name, tmp_path)
    prompts = [row[:20] for row in (np.array(ROWS[:2]) % 256).tolist()]
    prompts[1] = prompts[1][5:]
    expected = module.generate(
        module.load(folder, dtype="float32"), prompts, 12, key=0, temperature=0
    )

    args = SimpleNamespace(
        model=module.__name__,
        quantize=None,
        scratch=tmp_path,
        batch=[1, 2],
        length=[20],
        new_tokens=12,
        temperature=None,
    )
    subject = bench.LlamaCpp(args, "float32", folder)
    assert subject.generate(prompts, 12)() == expected
    assert subject.generate(prompts[1:], 12)() == expected[1:]
    assert subject.prefill(prompts)() == [row[:1] for row in expected]
    for args.temperature, args.top_k, args.top_p in [(1.0, 1, None), (1.0, None, 1e-6)]:
        assert subject.generate(prompts, 12)() == expected


def test_a_batch_of_the_longest_texts_fits_into_llama_cpp(tmp_path, monkeypatch):
    """300 tokens and 4 more: it counts its context in parts of 256."""
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-dev.txt")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    folder = write_checkpoint(tmp_path / "weights", n_positions=304)
    args = SimpleNamespace(
        model="gpt2",
        quantize="int8",
        scratch=tmp_path,
        batch=[3],
        length=[20, 300],
        new_tokens=3,
        temperature=None,
    )
    subject = bench.LlamaCpp(args, "float32", folder)
    rows = subject.generate(3 * [[7] * 300], 4)()
    assert [len(row) for row in rows] == [4, 4, 4]


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_what_llama_cpp_is_given_is_the_checkpoint(name, tmp_path):
    """As this project's own reader reads a GGUF file. 1e-6: Gemma's norms have 1 added to them."""
    pytest.importorskip("gguf", reason="pip install -r requirements-dev.txt")
    module, folder = folder_of(name, tmp_path)
    bench.write_gguf(module, folder, tmp_path / "a.gguf", "F32", tokens=32)
    expected = nnx.state(module.load(folder, dtype="float32"))
    found = nnx.state(module.load(tmp_path / "a.gguf", dtype="float32"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), found, expected)


@pytest.mark.parametrize(
    "quantize, kinds", [("int8", ["Q8_0"] * 3), ("int4", ["Q8_0", "Q4_0", "Q4_0"])]
)
def test_llama_cpp_has_matrices_in_8_or_4_bits_where_ours_have(quantize, kinds, tmp_path):
    """In int4 the token table has 8 bits, as ours has; what is no matrix is not quantized."""
    gguf = pytest.importorskip("gguf", reason="pip install -r requirements-dev.txt")
    kind = bench.GGML_KINDS[quantize]
    bench.write_gguf(gpt2, ROOT / "tiny/gpt2", tmp_path / "a.gguf", kind, tokens=32)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    names = ["token_embd", "blk.0.attn_qkv", "blk.3.ffn_down"]
    assert [held[f"{name}.weight"].tensor_type.name for name in names] == kinds
    for name in ("position_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_qkv.bias"):
        assert held[name].tensor_type.name == "F32"


def test_rows_that_are_no_whole_blocks_have_16_bits(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install -r requirements-dev.txt")
    folder = write_checkpoint(tmp_path / "weights", n_embd=48)
    bench.write_gguf(gpt2, folder, tmp_path / "a.gguf", "Q4_0", tokens=32)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert held["blk.0.ffn_up.weight"].tensor_type.name == "F16"
    assert held["blk.0.ffn_down.weight"].tensor_type.name == "Q4_0"  # 192 weights


@pytest.mark.parametrize(
    "module, config, said",
    [
        (opt, opt.Config.small(layers=1, heads=2, width=32, context=64), "not opt"),
        (mistral, mistral.Config(**SIZES | {"model_type": "mixtral"}), "not mixtral"),
        (mistral, mistral.Config(**SIZES | {"model_type": "ministral"}), "not ministral"),
        (mistral, mistral.Config(**SIZES, sliding_window=31), "cannot say sliding_window 31"),
        (
            gpt2,
            gpt2.Config(n_embd=32, n_layer=1, n_head=2, activation_function="relu"),
            "cannot say activation_function 'relu'",
        ),
        (
            llama,
            llama.Config(
                **SIZES,
                rope_scaling=(("factor", 2.0), ("rope_type", "dynamic"), ("trained", 64)),
            ),
            "cannot say max_position_embeddings 128",
        ),
        (
            llama,
            llama.Config(**SIZES, model_type="smollm3", no_rope_layers=(1, 0)),
            r"cannot say no_rope_layers \(1, 0\)",
        ),
        (
            gemma,
            gemma.Config(**GEMMA | {"query_pre_attn_scalar": 8}),
            "cannot say query_pre_attn_scalar 8",
        ),
        (
            gemma,
            gemma.Config(
                **GEMMA | {"num_hidden_layers": 3}, layer_types=(gemma.FULL, *[gemma.SLIDING] * 2)
            ),
            "cannot say layer_types",
        ),
    ],
)
def test_a_model_that_llama_cpp_does_not_have_is_refused(module, config, said, tmp_path):
    pytest.importorskip("gguf", reason="pip install -r requirements-dev.txt")
    model = bench.random_model(module, config, "float32", "float32")
    module.save(model, tmp_path / "weights")
    with pytest.raises(OSError, match=f"^--vs llama.cpp.*{said}"):
        bench.write_gguf(module, tmp_path / "weights", tmp_path / "a.gguf", "F32", tokens=32)


@pytest.mark.wide
def test_llama_cpp_runs_in_turn_with_ours_and_prints_nothing(tmp_path):
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-dev.txt")
    options = ["--quantize", "int8", "--vs", "llama.cpp", "--new-tokens", 2, "--out", tmp_path]
    done = run("--task", "decode,prefill", *options)
    assert done.stdout.startswith("gpt2 (tiny), float32, cpu") and "llama" not in done.stderr
    about, found = results(tmp_path)
    assert "xllamacpp" in about
    for metric in ("decode", "prefill"):
        ours, theirs = found[metric, "ours"]["value"], found[metric, "llama.cpp"]["value"]
        assert math.isclose(found[metric, "ours / llama.cpp"]["value"], ours / theirs)

    folder = ROOT / "tiny/mistral"
    done = run("--task", "decode", "--weights", folder, "--vs", "llama.cpp", code=2)
    said = "bench.py: --vs llama.cpp is for GPT-2, Llama, Mistral, Gemma and Qwen without experts, "
    assert done.stderr.splitlines()[-1] == said + "not mixtral"


# --------------------------------------------------------------------------------- the other tasks


@pytest.mark.wide
def test_compiling_is_measured_without_and_with_the_cache(tmp_path):
    run("--task", "compile", "--out", tmp_path)
    _, found = results(tmp_path)
    cold, warm = (found[f"compile, {how}", "ours"]["value"] for how in ("cold", "cached"))
    assert cold > warm


@pytest.mark.wide
def test_a_checkpoint_is_validated_against_transformers_and_both_lose_the_same(tmp_path):
    text = tmp_path / "text"
    text.write_text("O Romeo, Romeo! wherefore art thou Romeo?\nDeny thy father " * 12)
    done = run(
        "--task",
        "validate,eval",
        "--model",
        "llama",
        "--weights",
        "tiny",
        "--text",
        text,
        "--new-tokens",
        16,
        "--out",
        tmp_path,
    )
    _, found = results(tmp_path)
    ids = found["token ids", bench.BESIDE]
    assert ids["unit"] == f"of {ids['value']:,.0f} the same"
    assert found["logits", bench.BESIDE]["value"] < 1e-4
    assert found["verdict", bench.BESIDE]["value"] == 1
    said = " ".join(done.stdout.split())
    about = "validate: llama (tiny), float32, cpu verdict: the same model as in transformers"
    assert re.search(rf"{re.escape(about)} \(logits \S+ of their norm apart, rounding", said)
    assert {f"after block {i}" for i in range(3)} <= {metric for metric, _ in found}
    assert found["greedy tokens", bench.BESIDE]["value"] == 16
    ours, theirs = found["loss", "ours"]["value"], found["loss", "transformers"]["value"]
    assert abs(ours - theirs) < 1e-4 and 1 < ours < 5
    assert math.isclose(found["perplexity", "ours"]["value"], math.exp(ours))


@pytest.mark.slow
def test_texts_stand_side_by_side(tmp_path):
    done = run("--task", "compare", "--new-tokens", 20, "--out", tmp_path)
    _, mine, theirs, *_ = done.stdout.split("--- ")
    assert mine.removeprefix("greedy, ours") == theirs.removeprefix("greedy, transformers")
    _, found = results(tmp_path)
    assert 0 < found["greedy: distinct-1", "ours"]["value"] <= 1


@pytest.mark.parametrize(
    "fault, said",
    [
        pytest.param(None, "the same model as in transformers", marks=pytest.mark.wide),
        ("gelu", "NOT the same model as in transformers: other logits"),
        pytest.param(
            "decode",
            "NOT the same model as in transformers: other greedy tokens",
            marks=pytest.mark.wide,
        ),
    ],
)
def test_the_verdict_of_validate_is_about_logits_and_greedy_tokens(
    fault, said, tmp_path, monkeypatch, capsys
):
    """The exact GELU in place of GPT-2's; and a `generate` that makes other tokens."""
    if fault == "gelu":
        exact = partial(jax.nn.gelu, approximate=False)
        monkeypatch.setitem(gpt2.ACTIVATIONS, "gelu_new", exact)
    if fault == "decode":
        monkeypatch.setattr(gpt2, "generate", lambda model, prompts, n, **options: [[7] * n])
    monkeypatch.setattr(gpt2.Block, "__call__", gpt2.Block.__call__)  # which `validate` wraps
    options = ["--weights", "tiny", "--task", "validate", "--scratch", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model", "gpt2", *options])
    args = bench.parse_command_line()
    bench.pick_devices("cpu", "no")
    precision = jax.config.jax_default_matmul_precision
    try:
        bench.validate(args, "float32")
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
        jax.config.update("jax_default_device", None)

    [verdict] = [found for found in bench.read_records(tmp_path) if found["metric"] == "verdict"]
    assert verdict["of"].startswith(said) and "of their norm apart" in verdict["of"]
    assert verdict["value"] == (fault is None)


def test_a_plan_is_for_the_weights_that_were_named(tmp_path):
    name = "meta-llama/Llama-2-13b-hf"
    run("--model", "llama", "--weights", name, "--task", "plan", "--out", tmp_path)
    _, found = results(tmp_path)
    assert {who for _, who in found} == {name}


def test_a_plan_needs_no_weights(tmp_path):
    """7B parameters, 16 bytes each to train, on 8 chips; decoding reads 2 bytes of each."""
    run(
        "--model",
        "llama",
        "--preset",
        "meta-llama/Llama-2-7b-hf",
        "--task",
        "plan",
        "--chips",
        8,
        "--kind",
        "h100",
        "--length",
        64,
        "--out",
        tmp_path,
    )
    _, found = results(tmp_path)
    parameters = llama.PRESETS["meta-llama/Llama-2-7b-hf"].parameters
    found = {metric: record["value"] for (metric, _), record in found.items()}
    assert 0 < found["train: memory"] - 16 * parameters / 8e9 < 0.1
    assert 0.97 < found["decode: step"] / (2e3 * parameters / 8 / 3.35e12) < 1.02


@pytest.mark.slow
def test_a_plan_without_a_model_is_for_the_largest_of_each_on_8_64_and_512_chips(tmp_path):
    run("--task", "plan", "--length", 1024, "--batch", 512, "--out", tmp_path)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()[1:]
    found = [json.loads(line) for line in lines]
    assert {record["who"] for record in found} == {
        "openai-community/gpt2-xl",
        "facebook/opt-66b",
        "meta-llama/Llama-3.1-405B",
        "google/gemma-2-27b",
        "mistralai/Mixtral-8x22B-v0.1",
    }
    for record in found:
        if record["metric"] == "train: memory":
            chips = int(record["chips"].split()[0])
            assert chips in (8, 64, 512)
            assert ("not" in record["of"]) == (record["value"] > 80)


@pytest.mark.parametrize(
    "preset", ["benchmarks/gpt2-60m", "openai-community/gpt2", "openai-community/gpt2-medium"]
)
def test_four_gpus_train_nine_tenths_as_fast_as_linear_says_the_plan(preset, tmp_path):
    """4 bytes of each parameter are summed, as the compiled program does (test_parallel.py): over N
    chips each sends and gets 2 (N - 1) / N of that. Nothing is hidden behind the products."""
    run(
        "--model",
        "gpt2",
        "--preset",
        preset,
        "--task",
        "plan",
        "--chips",
        4,
        "--batch",
        128,
        "--length",
        1024,
        "--out",
        tmp_path,
    )
    _, found = results(tmp_path)
    [scaling] = [record for (metric, _), record in found.items() if metric == "data parallel"]
    assert 0.89 < scaling["value"] < 0.99


@pytest.mark.slow
def test_a_task_that_takes_too_long_is_given_up_and_the_others_are_kept(tmp_path):
    done = run(
        "--task",
        "plan,train",
        "--limit",
        15,
        "--preset",
        "openai-community/gpt2-xl",
        "--batch",
        64,
        "--length",
        1000,
        "--out",
        tmp_path,
        code=1,
    )
    assert "given up after 15 s" in done.stderr
    assert {metric for metric, _ in results(tmp_path)[1]} >= {"train: step", "decode: step"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "dance"], "--task must be of prefill"),
        (["--vs", "vllm"], "--vs must be of transformers"),
        (["--dtype", "int8"], "--dtype"),
        (["--preset", "gpt5"], "--preset must be of openai-community/gpt2"),
        (["--batch", "0"], "--batch must be 1 or more"),
        (["--accumulate", "0"], "--accumulate must be 1 or more"),
        (["--temperature", "1", "--top-k", "-1"], "--top-k must be 1 or more"),
        (["--temperature", "-1"], "--temperature must be 0"),
        (["--temperature", "1", "--top-p", "2"], "--top-p must be above 0"),
        (["--task", "decode", "--remat"], "--loss-parts: for --task train, without --vs"),
        (["--loss-parts", "2"], "--remat, --chunked, --accumulate, --loss-parts: for --task train"),
        (["--parallel", "rows"], "--parallel must be pmap, or like data, tensor:2"),
        (["--out", "README.md"], "--out README.md is a file"),
        (["--dataset", "wikitext", "--task", "eval"], "needs datasets: pip install datasets"),
        (["--batch", "many"], "--batch"),
        (["--text", "no/such/file"], "no such file"),
        (["--task", "train", "--ragged"], "--ragged is for --task decode"),
        (
            ["--task", "train", "--batch", "6", "--accumulate", "4"],
            "--accumulate must divide --batch",
        ),
        (["--parallel", "pmap", "--vs", "transformers"], "leave --parallel out"),
        (["--weights", "random", "--task", "validate"], "random weights have no tokenizer"),
        (["--vs", "ctranslate2"], "needs ctranslate2: pip install ctranslate2"),
        (["--vs", "llama.cpp"], "needs gguf and xllamacpp: pip install gguf xllamacpp"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(options, said, monkeypatch, capsys):
    find_spec = bench.find_spec
    missing = ("ctranslate2", "datasets", "gguf", "xllamacpp")
    monkeypatch.setattr(
        bench,
        "find_spec",
        lambda name: None if name in missing else find_spec(name),
    )
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    with pytest.raises(SystemExit) as stop:
        bench.parse_command_line()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and err.count("\n") == 1 and said in err


def test_a_folder_with_quantized_weights_is_refused(tmp_path, monkeypatch, capsys):
    """No other library reads it, and float32 is not made of it."""
    gpt2.save(gpt2.load(ROOT / "tiny/gpt2", quantize="int8"), tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--weights", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        bench.parse_command_line()
    assert stop.value.code == 2
    said = (
        "holds its weights in int8: name the checkpoint that they were made from, with --quantize"
    )
    assert said in capsys.readouterr().err


def test_what_is_not_there_is_one_line_too(tmp_path):
    for options, said in [
        (["--device", "tpu"], "--device tpu: JAX finds no such device"),
        (["--parallel", "data:64"], "--parallel data:64 needs 64 devices, and there are 1"),
        (["--weights", tmp_path], "config.json"),
        (["--length", "192"], "257 tokens do not fit the context of 256"),
    ]:
        done = run("--task", "decode", *options, code=2)
        assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "damage, said",
    [pytest.param(*case, marks=[] if case is DAMAGES[2] else pytest.mark.wide) for case in DAMAGES],
)
def test_a_bad_checkpoint_is_named_in_one_line(damage, said, tmp_path):
    folder = write_checkpoint(tmp_path / "weights")
    damage(folder)
    done = run("--model", "gpt2", "--weights", folder, "--task", "decode", "--length", 8, code=2)
    *about, line = done.stderr.splitlines()
    assert line.startswith("bench.py: ") and said in line
    assert about in ([], ["bench.py: 1 of 1: --task decode"])  # some are found before it begins


def test_a_checkpoint_that_cannot_be_validated_is_named_in_one_line(tmp_path):
    """A file that was cut short is named in our words; one that only transformers refuses, too."""
    folder = tmp_path / "tiny"
    shutil.copytree(ROOT / "tiny" / "gpt2", folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "layer_norm_epsilon": 1}))
    done = run("--weights", folder, "--task", "validate", code=2)
    assert done.stderr.splitlines()[-1].startswith("bench.py: transformers does not read")

    os.truncate(folder / "model.safetensors", 5000)
    done = run("--weights", folder, "--task", "validate", code=2)
    assert "model.safetensors is damaged or cut short" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("suite", ["cpu", "gpu", "tpu"])
def test_every_line_of_a_suite_is_a_command_and_all_end_in_eight_minutes(suite, monkeypatch):
    limits = []
    for line in (ROOT / "benchmarks" / f"{suite}.txt").read_text().splitlines():
        weights = "tiny" if suite == "cpu" else "random"
        monkeypatch.setattr(sys, "argv", ["bench.py", "--weights", weights, *line.split()])
        monkeypatch.setattr(bench, "find_spec", lambda name: True)
        monkeypatch.chdir(ROOT)
        args = bench.parse_command_line()
        assert max(args.length) <= bench.find_config(args).max_position_embeddings or suite == "cpu"
        limits.append(args.limit)
    assert suite == "cpu" or sum(limits) <= 480
