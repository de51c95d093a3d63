"""sample.py as its users meet it: a process with a command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.small import byte_tokenizer, edit_config, write_checkpoint
from jax.profiler import ProfileData

import gpt2
import sample

ROOT = Path(__file__).parents[1]


def run(*options, stdin=None, **env):
    """`python sample.py OPTIONS` to its end; `stdin` is piped in."""
    command = [sys.executable, "sample.py", *map(str, options)]
    given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin.encode()}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, timeout=600, **given
    )
    # Decoded here, since text=True would make line feeds of the model's carriage returns.
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def text_of(*options, **more):
    """What a run that succeeds writes to standard output."""
    result = run(*options, **more)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small random GPT-2 over bytes."""
    return write_checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def records(weights):
    """Two prompts, two samples of each, as JSON."""
    out = text_of(
        "--weights",
        weights,
        "--prompt",
        "Hello",
        "--prompt",
        "a longer prompt",
        "--num-samples",
        2,
        "--max-new-tokens",
        40,
        "--json",
        "--temperature",
        1.5,
    )
    return [json.loads(line) for line in out.splitlines()]


# ---------------------------------------------------------------------------------- without options


def test_without_options_the_bundled_model_writes_and_the_real_one_is_named():
    result = run()
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 100
    assert "tiny" in result.stderr and "python sample.py --model gpt2" in result.stderr


def test_the_last_line_on_stderr_says_device_dtype_and_speed(weights):
    last = run("--weights", weights, "--prompt", "Hi").stderr.splitlines()[-1]
    for part in ["cpu", "float32", "compiled in", "first token after", "tokens/s"]:
        assert part in last


def test_help_and_list_read_without_a_model():
    assert "--max-new-tokens N" in text_of("--help")
    table = text_of("--list")
    assert "openai-community/gpt2-xl" in table and "1,557,611,200" in table and "6.43 GB" in table


def test_the_list_fits_100_columns_and_has_a_checkpoint_to_chat_with_of_each_family(capsys):
    """GPT-2 and OPT were published without one."""
    sample.print_presets()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split()[:2] for line in lines]
    for family, checkpoint in [
        ("llama", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("llama", "tiny/llama-instruct"),
        ("gemma", "google/gemma-3-270m-it"),
        ("mistral", "mistralai/Mistral-7B-Instruct-v0.3"),
    ]:
        assert [family, checkpoint] in rows


# ------------------------------------------------------------------------------------ prompts, text


def test_a_prompt_needs_no_flag_and_may_stand_anywhere(weights):
    flags = ["--weights", weights, "--max-new-tokens", 1, "--json"]
    out = text_of("Once", *flags, "upon a time", "--temperature", 0, "--prompt", "first")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [
        "first",
        "Once",
        "upon a time",
    ]


def test_a_prompt_that_is_a_dash_is_standard_input(weights):
    flags = ["--weights", weights, "--max-new-tokens", 1, "--json"]
    for dash in (["--prompt", "-"], ["-"]):
        out = text_of("--prompt", "a", *dash, *flags, stdin="To be,\n")
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a", "To be,\n"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--prompt", "-", "-"], "give it once"), (["--prompt", "-"], "an empty prompt")],
)
def test_standard_input_that_is_empty_or_read_twice_is_refused(flags, said):
    done = run(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_json_has_a_line_for_each_text(records):
    assert [record["prompt"] for record in records] == ["Hello"] * 2 + ["a longer prompt"] * 2
    for record in records:
        assert record["prompt_ids"] == byte_tokenizer().encode(record["prompt"]).ids
        assert len(record["completion_ids"]) == 40
        assert record["completion"] == byte_tokenizer().decode(record["completion_ids"])
        assert record["finish_reason"] == "length"
        assert record["time_to_first_token_s"] > 0 and record["decode_tokens_per_s"] > 0


def test_samples_of_one_prompt_differ(records):
    assert records[0]["completion"] != records[1]["completion"]


def test_streamed_and_whole_text_are_the_same_and_separated_by_a_line(weights, records):
    options = [
        "--weights",
        weights,
        "--prompt",
        "Hello",
        "--prompt",
        "a longer prompt",
        "--num-samples",
        2,
        "--max-new-tokens",
        40,
        "--temperature",
        1.5,
    ]
    line = "-" * 40 + "\n"
    texts = line.join(r["prompt"] + r["completion"] + "\n" for r in records)
    assert text_of(*options) == texts
    assert text_of(*options, "--no-stream") == texts


def test_prompts_come_from_files_and_from_standard_input_too(weights, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("from a file, größer", encoding="utf-8")
    options = ["--weights", weights, "--max-new-tokens", 5]
    assert text_of(*options, "--prompt-file", file).startswith("from a file, größer")
    assert text_of(*options, stdin="from a pipe\n").startswith("from a pipe\n")
    assert text_of(*options, "--prompt", "given", stdin="not read").startswith("given")
    assert text_of(*options, stdin="").startswith("Once upon a time")


def test_the_seed_decides(weights):
    options = ["--weights", weights, "--prompt", "Hello", "--temperature", 1.5, "--seed"]
    assert text_of(*options, 1) == text_of(*options, 1) != text_of(*options, 2)
    assert text_of(*options, 1) != text_of(*options, 2**32 + 1)  # whose last 32 bits are the same


def test_temperature_0_is_greedy_and_top_k_1_the_same(weights):
    options = ["--weights", weights, "--prompt", "Hello", "--max-new-tokens", 30]
    greedy = text_of(*options, "--temperature", 0)
    assert greedy == text_of(*options, "--top-k", 1)
    assert greedy != text_of(*options, "--temperature", 0, "--repetition-penalty", 1.5)
    assert text_of(*options, "--top-p", 0.5, "--min-p", 0.2).startswith("Hello")


def test_a_stop_text_that_is_a_special_token_stops_at_its_id(tmp_path):
    """Its text is never shown, so no text could be compared with it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    assert sample.special_ids(gpt2.tokenizer(tmp_path), ["<|end|>", "a", "<|end|"]) == [256]
    assert sample.special_ids(gpt2.tokenizer(tmp_path), []) == []


def test_a_stop_text_ends_before_it(weights, records):
    completion = records[0]["completion"]
    stop = completion[10:13]
    out = text_of(
        "--weights",
        weights,
        "--prompt",
        "Hello",
        "--max-new-tokens",
        40,
        "--json",
        "--temperature",
        1.5,
        "--stop",
        stop,
        "--stop",
        "never to be seen",
    )
    record = json.loads(out)
    assert record["completion"] == completion[: completion.index(stop)]
    assert record["finish_reason"] == "stop"


def test_the_end_token_of_the_checkpoint_ends_a_text(tmp_path, weights, records):
    ids = records[0]["completion_ids"]
    end = ids[10]
    folder = write_checkpoint(tmp_path / "weights")
    options = [
        "--weights",
        folder,
        "--prompt",
        "Hello",
        "--max-new-tokens",
        40,
        "--json",
        "--temperature",
        1.5,
    ]
    edit_config(folder, eos_token_id=end)
    from_config = json.loads(text_of(*options))
    edit_config(folder, eos_token_id=None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 300]}))
    from_generation_config = json.loads(text_of(*options))
    for record in (from_config, from_generation_config):
        assert record["completion_ids"] == ids[: ids.index(end)]
        assert record["finish_reason"] == "stop"


class ByteCodec:
    """encode, decode and backend as `gpt2.tokenizer` gives them, over bytes."""

    backend = byte_tokenizer()

    def encode(self, text):
        return byte_tokenizer().encode(text).ids

    def decode(self, ids):
        return byte_tokenizer().decode(list(ids))


def settled(text, stops=()):
    """What is shown after each byte of a completion."""
    row = sample.Text(ByteCodec(), ">", list(stops))
    steps = []
    for token in ByteCodec().encode(text):
        row.add([token], [], limit=10**6)
        steps.append(row.completion)
    return steps


def test_a_character_is_shown_when_all_its_bytes_are_there():
    assert settled("aé€") == ["a", "a", "aé", "aé", "aé", "aé€"]


def test_what_may_become_a_stop_text_is_held_back():
    assert settled("a END b", stops=[" EN?"]) == ["a", "a", "a", "a", "a END", "a END", "a END b"]
    assert settled("a END b", stops=["END"])[-1] == "a "


def test_an_unfinished_character_at_the_limit_is_shown_as_unknown():
    row = sample.Text(ByteCodec(), ">", [])
    row.add(ByteCodec().encode("é")[:1], [], limit=1)
    assert (row.completion, row.reason) == ("\ufffd", "length")


def test_text_flows_in_several_writes(weights):
    program = (
        "import sys, sample; writes = []; write = sys.stdout.write\n"
        "sys.stdout.write = lambda text: (writes.append(text), write(text))[1]\n"
        "sample.main(); print(len([w for w in writes if w]), file=sys.stderr)"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "--weights",
        str(weights),
        "--prompt",
        "Hello",
        "--max-new-tokens",
        "100",
    ]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    # Steps of 1, then of at most 32 tokens: at least 5 calls for 100 tokens.
    assert int(result.stderr.splitlines()[-1]) >= 5


# ------------------------------------------------------------------------------------------ machine


def test_pmap_gives_the_texts_of_one_device_also_for_an_odd_number(weights):
    options = [
        "--weights",
        weights,
        "--prompt",
        "Hello",
        "--prompt",
        "a longer prompt",
        "--prompt",
        "x",
        "--max-new-tokens",
        20,
        "--json",
        "--repetition-penalty",
        1.1,
    ]
    emulated = {"NPROC": "16", "JAX_NUM_CPU_DEVICES": "2"}
    one = [json.loads(line)["completion_ids"] for line in text_of(*options).splitlines()]
    result = run(*options, "--parallel", "pmap", **emulated)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["completion_ids"] for line in result.stdout.splitlines()] == one
    assert "2 x cpu" in result.stderr


def test_device_and_dtype_can_be_chosen_and_are_said(weights):
    emulated = {"NPROC": "16", "JAX_NUM_CPU_DEVICES": "2"}
    for dtype in ("bfloat16", "float16"):
        result = run("--weights", weights, "--device", "cpu:1", "--dtype", dtype, **emulated)
        assert result.returncode == 0, result.stderr
        assert f"1 x cpu, {dtype}" in result.stderr


def test_the_compile_cache_is_filled_and_used(weights, tmp_path):
    options = ["--weights", weights, "--prompt", "Hello", "--compile-cache", tmp_path / "cache"]
    first = text_of(*options)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len([file for file in kept if "prefill" in file.name or "decode" in file.name]) >= 2
    assert text_of(*options) == first
    names = {file.name for file in kept if not file.name.endswith("-atime")}
    again = {f.name for f in (tmp_path / "cache").iterdir() if not f.name.endswith("-atime")}
    assert again == names  # nothing was compiled anew
    text_of("--weights", weights, "--compile-cache", "off", XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert not (tmp_path / "xdg").exists()


def test_ctrl_c_ends_at_once_without_a_traceback(tmp_path):
    folder = write_checkpoint(tmp_path / "long", n_positions=60_000)
    heed = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"  # `&` ignores
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [
        sys.executable,
        "-c",
        heed,
        "sample.py",
        "--weights",
        str(folder),
        "--prompt",
        "Hello",
        "--max-new-tokens",
        "50000",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(6).startswith("Hello")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped"
    assert "Traceback" not in err


@pytest.mark.parametrize("where", ["in the program", "in a callback of the garbage collector"])
def test_ctrl_c_is_heard_at_any_moment_and_where_a_shell_ignores_it(where):
    """Python goes on after an exception in such a callback. JAX has one, which runs often while a
    program starts. A shell ignores Ctrl-C for what it runs in the background."""
    program = """
import gc, signal, sys, time
import sample

signal.signal(signal.SIGINT, signal.SIG_IGN)

def interrupt(*_):
    gc.callbacks.remove(interrupt)
    signal.raise_signal(signal.SIGINT)

def main():
    gc.callbacks.append(interrupt)
    if sys.argv[1] == "in the program":
        interrupt()
    gc.collect()
    time.sleep(60)

sample.run_program(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, where],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    assert done.stderr.split() == ["stopped"]


def test_other_exceptions_that_are_lost_are_shown_as_ever(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    lost = SimpleNamespace(exc_value=ValueError("some"))
    sample.hear_again(lost)
    assert shown == [lost]


def test_a_reader_that_leaves_early_is_no_error(weights):
    command = f"{sys.executable} sample.py --weights {weights} --num-samples 8 | head -c 3"
    result = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert result.stdout == "Onc"
    assert "Traceback" not in result.stderr and "Broken" not in result.stderr


# ------------------------------------------------------------------------------------------ profile


def test_a_profile_shows_the_parts_of_the_model_at_work_and_nothing_compiling(weights, tmp_path):
    folder = tmp_path / "made" / "anew"
    result = run(
        "--weights",
        weights,
        "--prompt",
        "Hello",
        "--no-stream",
        "--max-new-tokens",
        40,
        "--profile",
        folder,
        "--compile-cache",
        "off",
    )
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stderr.splitlines()[-2]
    assert f"{folder}: look at it with `xprof {folder}`" in result.stderr.splitlines()[-1]
    [trace] = folder.glob("plugins/profile/*/*.xplane.pb")
    for name in (b"h.0/attn/attend", b"h.1/mlp", b"head/", b"sample/"):
        assert name in trace.read_bytes()  # in the operations' metadata
    events = [
        event
        for plane in ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    programs = {value for event in events for name, value in event.stats if name == "hlo_module"}
    assert {"jit_prefill", "jit_decode"} <= programs
    assert not [event.name for event in events if "compile" in event.name.lower()]
    assert not (folder / "memory.jsonl").exists()  # a CPU does not count it


COUNTS = """
import jax, sample, sys
stats = {"bytes_in_use": 2, "peak_bytes_in_use": 3, "num_allocs": 4}
type(jax.devices()[0]).memory_stats = lambda device: stats
sample.main()
"""


def test_a_profile_has_the_memory_in_use_where_the_device_counts_it(weights, tmp_path):
    (tmp_path / "memory.jsonl").write_text("of an older run\n")
    command = [
        sys.executable,
        "-c",
        COUNTS,
        "--weights",
        str(weights),
        "--prompt",
        "Hello",
        "--no-stream",
        "--max-new-tokens",
        "40",
        "--profile",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    seconds = [line.pop("seconds") for line in lines]
    assert lines == [{"bytes_in_use": 2, "peak_bytes_in_use": 3}] * 3  # after 1, 32 and 7 tokens
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_a_profile_is_not_begun_where_nothing_may_be_written(refused, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write everywhere")
    for folder in (tmp_path, tmp_path / "a" / "b"):
        assert "--profile must be a writable folder" in refused("--profile", folder)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "gpt5"], "invalid choice: 'gpt5' (choose from"),
        (["--prompt", ""], "empty prompt"),
        (["--prompt-file", "no/such/file"], "no/such/file"),
        (["--prompt-file", sys.executable], "cannot be read"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
        (["--seed", "-1"], "--seed must be from 0 to 2^63 - 1"),
        (["--prompt", "caf\udce9"], "--prompt must be UTF-8 text"),  # as Python gives byte E9
        (["--num-samples", "-1"], "--num-samples must be 1 or more"),
        (["--stop", ""], "--stop must be a text; leave it out"),
        (["--temperature", "-1"], "--temperature must be 0"),
        (["--temperature", "warm"], "--temperature"),
        (["--top-k", "0"], "--top-k must be 1 or more"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1"),
        (["--top-p", "1.5"], "--top-p must be above 0 and at most 1"),
        (["--min-p", "-0.1"], "--min-p must be from 0 to 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be above 0"),
        (["--device", "gpu:9"], "--device gpu:9: "),
        (["--device", "cpu:9"], "--device cpu:9: there are 1, counted from 0"),
        (["--device", "toaster"], "--device toaster: it must be cpu, gpu or tpu"),
        (["--profile", __file__], "--profile must be a writable folder"),
        (["--profile", f"{__file__}/in"], "--profile must be a writable folder"),
        (["--dtype", "int8"], "--dtype"),
        (["--parallel", "magic"], "--parallel"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(weights, refused, options, said):
    assert said in refused("--weights", weights, "--prompt", "Hello", *options)


def test_bad_input_leaves_no_traceback_on_a_real_standard_error(weights):
    result = run("--weights", weights, "--top-p", "7")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "sample.py: --top-p must be above 0 and at most 1\n"


def damage_missing(folder):
    (folder / "model.safetensors").unlink()


def damage_truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_html(folder):
    (folder / "model.safetensors").write_text("<!DOCTYPE html><html>404</html>")


def damage_lfs(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"
    (folder / "model.safetensors").write_text(pointer)


def damage_tokenizer_lfs(folder):
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid")


def damage_tokenizer_truncated(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def damage_empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def damage_not_a_checkpoint(folder):
    (folder / "config.json").unlink()


def damage_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_shape(folder):
    edit_config(folder, n_positions=64)


def damage_layers(folder):
    edit_config(folder, n_layer=3)


def damage_config(folder):
    (folder / "config.json").write_text("{not json")


def damage_family(folder):
    edit_config(folder, model_type="llama")


def damage_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_missing, "model.safetensors"),
        (damage_empty, "model.safetensors is damaged or cut short"),
        (damage_not_a_checkpoint, "has no config.json"),
        (damage_a_shard, "model-00002-of-00002.safetensors"),
        (damage_tokenizer_lfs, "tokenizer.json is a Git LFS pointer"),
        (damage_tokenizer_truncated, "tokenizer.json is damaged or cut short"),
        (damage_truncated, "damaged or cut short"),
        (damage_html, "a web page"),
        (damage_lfs, "git lfs pull"),
        (damage_shape, "wpe.weight"),
        (damage_layers, "lacks 12 tensors, such as transformer.h.2.attn.c_attn.bias"),
        (damage_config, "config.json is damaged"),
        (damage_family, "which llama.py reads: --model llama"),
        (damage_tokenizer, "has no tokenizer: none of tokenizer.json"),
    ],
)
def test_a_bad_checkpoint_is_named_in_one_line(tmp_path, refused, damage, said):
    folder = write_checkpoint(tmp_path / "weights")
    damage(folder)
    assert said in refused("--model", "gpt2", "--weights", folder, "--prompt", "Hello")


def test_a_file_that_is_not_read_may_be_anything(tmp_path):
    """As after a git clone that fetched only what is needed."""
    folder = write_checkpoint(tmp_path / "weights")
    for name in ("pytorch_model.bin", "consolidated.safetensors"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    assert text_of("--weights", folder, "--prompt", "Hello", "--max-new-tokens", 5)


def test_a_fault_of_the_program_keeps_its_traceback(weights, tmp_path):
    """Only what the user can fix is one line: here the model file itself is broken."""
    for name in ("sample.py", "gpt2.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    broken = tmp_path / "gpt2.py"
    broken.write_text(broken.read_text().replace("x = x + y", "x = x + z"))
    command = [sys.executable, "sample.py", "--weights", str(weights), "--prompt", "Hello"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1 and "NameError" in result.stderr


@pytest.mark.parametrize("flags", [[], ["--temperature", 0, "--no-stream"]])
def test_weights_that_are_no_numbers_are_one_line(flags, tmp_path):
    folder = write_checkpoint(tmp_path)
    model = gpt2.load(folder)
    model.h[1].mlp.c_fc.kernel[...] *= float("nan")
    gpt2.save(model, folder)
    result = run("--weights", folder, "--prompt", "Hello", *flags)
    assert result.returncode == 2
    assert "the logits are not numbers (NaN)" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
