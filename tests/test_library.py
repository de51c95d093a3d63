"""A model file as a library, and as a command: arguments of other kinds, and what is written."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers.families import FAMILIES, GPT2, once
from helpers.pages import python_of
from helpers.reference import ROOT, read_hf

import gemma
import gpt2
import llama
import mistral
import opt

PROMPTS = [[5, 6, 7], [8]]


def small(module, **changes):
    sizes = {"layers": 1, "heads": 2, "width": 16, "context": 64}
    return module.Config.small(**sizes, vocab_size=40, **changes)


@pytest.fixture(scope="module")
def tiny_model():
    return gpt2.Model(small(gpt2), rngs=nnx.Rngs(0))


# ------------------------------------------------------------------------------------------ Config


@pytest.mark.parametrize("module", [llama, mistral], ids=lambda module: module.__name__)
def test_kv_heads_and_head_width_that_are_left_out_are_derived(module):
    """As transformers' LlamaConfig does; a MistralConfig has 8 KV heads unless it says None."""
    config = module.Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=None)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert module.Config(num_attention_heads=16).head_dim == 256


def test_all_layers_but_those_of_a_ministral_are_as_the_window_says():
    changed = {"sliding_window": 8, "num_hidden_layers": 3}
    for model_type in ("mistral", "mixtral"):
        config = mistral.Config(model_type)
        assert set(config.layer_types) == {mistral.FULL}
        assert mistral.replace(config, **changed).layer_types == (mistral.SLIDING,) * 3
    assert set(mistral.Config("ministral", sliding_window=8).layer_types) == {mistral.SLIDING}
    assert set(mistral.Config("ministral").layer_types) == {mistral.FULL}


def test_layer_types_that_are_left_out_are_those_of_that_gemma():
    assert gemma.Config(num_hidden_layers=12).layer_types.count(gemma.FULL) == 2
    assert gemma.Config(model_type="gemma2", num_hidden_layers=4).layer_types.count(gemma.FULL) == 2
    assert gemma.Config(model_type="gemma", num_hidden_layers=3).layer_types == (gemma.FULL,) * 3


@pytest.mark.parametrize(
    ("module", "fields", "said"),
    [
        (gpt2, {"n_embd": 10, "n_head": 3}, "n_embd 10 is not a multiple of n_head 3"),
        (gpt2, {"n_layer": -1}, "n_layer is -1, but must be 0 or more"),
        (gpt2, {"n_head": -2}, "n_head is -2"),
        (gpt2, {"n_embd": None}, "n_embd is None, not of type int"),
        (gpt2, {"n_embd": 64.0}, "n_embd is 64.0, not of type int"),
        (gpt2, {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5', not of type float"),
        (gpt2, {"activation_function": "mish"}, "activation_function is 'mish'"),
        (gpt2, {"n_inner": 0}, "n_inner is 0"),
        (gpt2, {"padded_vocab_size": 64}, "padded_vocab_size must not be below vocab_size"),
        (opt, {"hidden_size": 10, "num_attention_heads": 3}, "hidden_size 10 is not a multiple"),
        (opt, {"activation_function": "mish"}, "activation_function is 'mish'"),
        (llama, {"hidden_size": 10, "num_attention_heads": 3}, "hidden_size 10 is not a multiple"),
        (
            llama,
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads 4 is not",
        ),
        (llama, {"head_dim": 5}, "head_dim 5 is odd"),
        (llama, {"rope_scaling": (("rope_type", "longrope"),)}, "rope_type is 'longrope'"),
        (llama, {"rope_scaling": (("rope_type", "llama3"),)}, "of type llama3 lacks factor"),
        (gemma, {"num_attention_heads": 6}, "num_attention_heads 6 is not a multiple of"),
        (gemma, {"head_dim": 7}, "head_dim 7 is odd"),
        (gemma, {"layer_types": (gemma.FULL,)}, "layer_types has 1 entries, but num_hidden_layers"),
        (gemma, {"num_hidden_layers": 1, "layer_types": ("linear",)}, "layer_types is 'linear'"),
        (gemma, {"model_type": "gemma7"}, "model_type is 'gemma7'"),
        (gemma, {"hidden_activation": "mish"}, "hidden_activation is 'mish'"),
        (
            mistral,
            {"num_attention_heads": 12, "head_dim": 64},
            "num_attention_heads 12 is not a multiple of",
        ),
        (mistral, {"head_dim": 7}, "head_dim 7 is odd"),
        (mistral, {"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok 9 is"),
        (mistral, {"sliding_window": 0}, "sliding_window is 0"),
        (
            mistral,
            {"model_type": "ministral", "layer_types": (mistral.FULL,)},
            "layer_types has 1 entries, but num_hidden_layers",
        ),
        (
            mistral,
            {"model_type": "ministral", "num_hidden_layers": 1, "layer_types": ("linear",)},
            "layer_types is 'linear'",
        ),
        (
            mistral,
            {"model_type": "ministral", "num_hidden_layers": 1, "layer_types": (mistral.SLIDING,)},
            "layer_types has sliding layers, but no sliding_window",
        ),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else str(value),
)
def test_sizes_that_do_not_fit_are_named(module, fields, said):
    with pytest.raises(module.InputError) as error:
        module.Config(**fields)
    assert said in str(error.value)


# ---------------------------------------------------------------------------------------- generate


def greedy(model, prompts, **options):
    return gpt2.generate(model, prompts, 4, temperature=0, key=jax.random.key(0), **options)


def test_a_seed_and_an_old_prngkey_are_keys(tiny_model):
    expected = gpt2.generate(tiny_model, PROMPTS, 6, key=jax.random.key(7))
    assert gpt2.generate(tiny_model, PROMPTS, 6, key=7) == expected
    assert gpt2.generate(tiny_model, PROMPTS, 6, key=jax.random.PRNGKey(7)) == expected
    assert gpt2.generate_naive(tiny_model, PROMPTS[0], 6, key=7) == gpt2.generate_naive(
        tiny_model, PROMPTS[0], 6, key=jax.random.key(7)
    )


def test_a_key_for_each_row_must_be_that_many(tiny_model):
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(gpt2.InputError, match="there are 3 random keys for 2 prompts"):
        gpt2.generate(tiny_model, PROMPTS, 4, key=keys)
    old = jax.random.split(jax.random.PRNGKey(0), 2)
    new = jax.random.split(jax.random.key(0), 2)
    expected = gpt2.generate(tiny_model, PROMPTS, 4, key=new)
    assert gpt2.generate(tiny_model, PROMPTS, 4, key=old) == expected


@pytest.mark.parametrize("key", [None, "0", 1.5])
def test_what_is_no_key_is_refused(tiny_model, key):
    with pytest.raises(gpt2.InputError, match="is not a random key"):
        gpt2.generate(tiny_model, PROMPTS, 4, key=key)


def test_prompts_may_be_arrays(tiny_model):
    expected = greedy(tiny_model, [[5, 6], [7, 8]])
    assert greedy(tiny_model, np.array([[5, 6], [7, 8]])) == expected
    assert greedy(tiny_model, jnp.array([[5, 6], [7, 8]])) == expected
    assert greedy(tiny_model, [np.array([5, 6]), (7, 8)]) == expected


@pytest.mark.parametrize(
    "prompts", [[1, 2], "Hello", ["Hello"], [[1.5]], [["a"]], np.array([1, 2])]
)
def test_prompts_that_are_no_lists_of_token_ids_are_refused(tiny_model, prompts):
    with pytest.raises(gpt2.InputError, match="is not a list of token ids"):
        greedy(tiny_model, prompts)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
    ],
    ids=str,
)
def test_a_sampling_option_out_of_its_range_is_refused(tiny_model, option):
    [name] = option
    with pytest.raises(gpt2.InputError, match=f"^{name} must be"):
        gpt2.generate(tiny_model, PROMPTS, 4, key=0, **option)


def test_a_single_stop_id_or_none_will_do(tiny_model):
    [new] = greedy(tiny_model, [[5, 6]])
    assert greedy(tiny_model, [[5, 6]], stop_ids=new[2]) == [new[: new.index(new[2])]]
    assert greedy(tiny_model, [[5, 6]], stop_ids=None) == [new]
    assert greedy(tiny_model, [[5, 6]], stop_ids=(new[2], 39)) == [new[: new.index(new[2])]]


# --------------------------------------------------------------------------------------- the model


@pytest.mark.core_gpt2_only
def test_tokens_and_positions_may_be_lists(family):
    module = family.module
    model = module.Model(small(module), rngs=nnx.Rngs(0))
    expected = model(jnp.array([[5, 6, 7]]), jnp.array([[-1, 0, 1]]))
    np.testing.assert_array_equal(model([[5, 6, 7]], [[-1, 0, 1]]), expected)


@pytest.mark.parametrize("tokens", [[5, 6], "Hello", ["Hello"], np.ones(3, int), np.ones((1, 3))])
@once
def test_tokens_of_another_shape_or_type_are_refused(family, tiny_model, tokens):
    with pytest.raises(gpt2.InputError, match="is not a"):
        tiny_model(tokens)


V, CONTEXT = 40, 64  # of `small`
IMPOSSIBLE = {  # arguments of model(...) -> what the error says
    "an id too many": (lambda: ([[5, V]],), "token ids outside the vocabulary of 40"),
    "a negative id": (lambda: ([[-1, 5]],), "token ids outside the vocabulary of 40"),
    "rows of different lengths": (lambda: ([[5, 6], [7]],), "of different lengths"),
    "no row": (lambda: ([],), "is not an array of integers"),
    "an id that is huge": (lambda: ([[2**70]],), "is not an array of integers"),
    "too many tokens": (lambda: ([[5] * (CONTEXT + 1)],), "65 tokens do not fit"),
    "a position too many": (lambda: ([[5]], [[CONTEXT]]), "below the context length of 64"),
    "a negative position": (lambda: ([[5]], [[-2]]), "below the context length of 64"),
    "too few positions": (
        lambda: ([[5], [6]], [[0]]),
        r"positions are \[1, 1\], and tokens \[2, 1\]",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.core_gpt2_only
def test_tokens_and_positions_that_cannot_be_are_refused(family, case):
    """JAX alone would take other ids and slots, and give numbers."""
    model = family.module.Model(small(family.module), rngs=nnx.Rngs(0))
    arguments, says = IMPOSSIBLE[case]
    with pytest.raises(family.module.InputError, match=says):
        model(*arguments())


@pytest.mark.core_gpt2_only
def test_a_cache_without_room_is_refused(family):
    module = family.module
    model = module.Model(small(module), rngs=nnx.Rngs(0))

    cache = module.init_cache(model.config, 1, 4, jnp.float32)
    _, cache = model([[5, 6, 7]], cache=cache)
    with pytest.raises(module.InputError, match="3 of the 4 slots of the cache are filled"):
        model([[8, 9]], cache=cache)
    with pytest.raises(module.InputError, match="the cache is for 1 rows, and there are 2"):
        model([[8], [9]], cache=cache)
    logits, cache = model([[8]], cache=cache)  # the last slot
    expected = model([[5, 6, 7, 8]])[:, -1:]
    np.testing.assert_allclose(logits, expected, atol=1e-5)  # logits of about 1 in float32

    cache = module.init_cache(model.config, 1, CONTEXT + 8, jnp.float32)
    _, cache = model([[5] * CONTEXT], cache=cache)
    with pytest.raises(module.InputError, match="1 more tokens do not fit the context length"):
        model([[5]], cache=cache)


def test_under_jit_only_shapes_are_checked(tiny_model):
    """A compiled program has no values to look at, and holds no checks."""
    graphdef, state = nnx.split(tiny_model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    np.testing.assert_allclose(forward(state, jnp.array([[5, 6]])), tiny_model([[5, 6]]), atol=1e-5)
    assert forward(state, jnp.array([[5, V]])).shape == (1, 2, V)


# --------------------------------------------------------------------------------- load and from_hf


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"source": None}, "None is neither a folder nor an id on the Hub"),
        ({"source": 5}, "5 is neither a folder nor an id on the Hub"),
        ({"source": ROOT / "tiny" / "gpt2", "dtype": "int8"}, "dtype 'int8': it must be float32"),
        ({"source": ROOT / "tiny" / "gpt2", "dtype": "fp16"}, "dtype 'fp16': it must be float32"),
        ({"source": ROOT / "tiny" / "gpt2", "param_dtype": int}, "it must be float32"),
    ],
)
def test_what_load_cannot_take_is_refused_in_words(arguments, says):
    with pytest.raises(gpt2.InputError, match=says):
        gpt2.load(**arguments)


@pytest.mark.parametrize(
    ("module", "values"),
    [
        (gpt2, None),
        (gpt2, ["gpt2"]),
        (gpt2, {"n_layer": "x"}),
        (opt, {"ffn_dim": [1]}),
        (opt, {"hidden_size": "768"}),
        (llama, {"rope_scaling": "linear"}),
        (llama, {"rope_scaling": {"rope_type": "linear", "factor": "4.0"}}),
        (llama, {"num_attention_heads": None}),
        (gemma, {"layer_types": 5}),
        (gemma, {"model_type": "gemma3", "text_config": 5}),
        (gemma, {"num_hidden_layers": "x"}),
        (mistral, {"rope_parameters": 7}),
        (mistral, {"sliding_window": "4096"}),
        (mistral, {"model_type": "ministral", "layer_types": 5}),
        (mistral, {"model_type": "mistral3", "text_config": 5}),
    ],
    ids=str,
)
def test_from_hf_refuses_values_of_other_types(module, values):
    """As a library it is called with what users have at hand, not only by read_config."""
    if values and isinstance(values, dict):
        values = {**small(module).to_hf(), **values}
    with pytest.raises(module.InputError):
        module.Config.from_hf(values)


# -------------------------------------------------------------------------------------------- save


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_save_with_a_tokenizer_writes_a_folder_that_sample_py_reads(family, tmp_path):
    tiny = ROOT / "tiny" / family.name
    family.module.save(family.module.load(tiny), tmp_path, family.module.tokenizer(tiny))
    codec = family.module.tokenizer(tmp_path)
    assert codec.encode("Two households") == family.module.tokenizer(tiny).encode("Two households")
    if family is GPT2:
        options = ["--weights", tmp_path, "--prompt", "A", "--max-new-tokens", 5]
        result = run(ROOT / "sample.py", *options)
        assert result.returncode == 0, result.stderr


def test_save_onto_a_file_is_the_error_of_python(tiny_model, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError):
        gpt2.save(tiny_model, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


# ------------------------------------------------------------------------------------ command line


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
    )


def one_line(result, program):
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"{program}: ")
    return line


def test_a_model_file_says_how_it_is_used():
    result = run("gpt2.py", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: gpt2.py [-h] [text] [checkpoint]")
    assert run("gpt2.py", "--no-such-flag").returncode == 2


def test_a_wrong_folder_and_no_network_are_one_line_that_names_the_bundled_checkpoint(tmp_path):
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    line = one_line(run("gpt2.py", "Hello", "no/such-model", **offline), "gpt2.py")
    assert "there is no folder no/such-model" in line and str(ROOT / "tiny" / "gpt2") in line
    line = one_line(run("gpt2.py", "Hello", "./no/such/folder", **offline), "gpt2.py")
    assert "./no/such/folder: no such folder" in line
    line = one_line(run("gpt2.py", "Hello", ROOT / "tiny/gpt2/model.safetensors"), "gpt2.py")
    assert "model.safetensors is a file: name the folder" in line
    line = one_line(run("gpt2.py", "Hello", tmp_path), "gpt2.py")
    assert "has no tokenizer" in line
    line = one_line(run("gpt2.py", "Hello", ROOT / "tiny" / "llama"), "gpt2.py")
    assert "model_type is 'llama', but gpt2.py supports only 'gpt2'" in line


def test_a_terminal_of_another_encoding_gets_its_text():
    """What it cannot show becomes a question mark; --json escapes it, and nothing is lost."""
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    tiny = ROOT / "tiny" / "gpt2"
    result = run("gpt2.py", "größer", tiny, **ascii_only)
    assert result.returncode == 0 and result.stdout.startswith("gr??er")
    assert run("gpt2.py", "größer", tiny, **plain).stdout.startswith("gr??er")
    options = ["--prompt", "größer", "--max-new-tokens", "3"]
    result = run("sample.py", *options, **ascii_only)
    assert result.returncode == 0 and result.stdout.startswith("gr??er")
    result = run("sample.py", *options, "--json", **ascii_only)
    assert json.loads(result.stdout)["prompt"] == "größer"
    result = run("sample.py", *options, "--json", **plain)
    assert json.loads(result.stdout)["prompt"] == "größer"


def test_the_end_tokens_of_generation_config_json_end_a_text(tmp_path):
    """Instruct checkpoints name the end of a turn only there."""
    shutil.copytree(ROOT / "tiny" / "gpt2", tmp_path / "model")
    whole = run("gpt2.py", "ROMEO:", tmp_path / "model").stdout
    ends = {"eos_token_id": list(range(512))}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(ends))
    assert len(whole) > 50 and run("gpt2.py", "ROMEO:", tmp_path / "model").stdout == "ROMEO:\n"


@pytest.mark.parametrize("ids", ["2", ["</s>"], [[1]], {}, 2.0], ids=str)
@once
def test_an_end_token_that_is_no_id_is_refused(family, tmp_path, ids):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    if ids == {}:
        assert gpt2.read_stop_ids(tmp_path, gpt2.Config()) == []
        return
    with pytest.raises(gpt2.InputError, match=r"eos_token_id is .*, not a token id or several"):
        gpt2.read_stop_ids(tmp_path, gpt2.Config())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama", {"rope_scaling": "linear"}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "4.0"}}),
        ("llama", {"rope_scaling": {"rope_type": ["linear"], "factor": 2}}),
        ("gemma", {"num_hidden_layers": "x"}),
        ("gemma", {"layer_types": 5}),
        ("mistral", {"rope_parameters": 7}),
        ("gpt2", {"quantization_config": "awq"}),
        ("gpt2", {"model_type": ["gpt2"]}),
        ("gpt2", {"eos_token_id": [["1"]]}),
    ],
    ids=str,
)
def test_values_of_other_types_in_a_config_json_are_one_line(name, values, tmp_path):
    module = {"gpt2": gpt2, "llama": llama, "gemma": gemma, "mistral": mistral}[name]
    stored = json.loads((ROOT / "tiny" / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, **values}))
    with pytest.raises(module.InputError):
        module.read_stop_ids(tmp_path, module.read_config(tmp_path))


def test_ctrl_c_ends_a_model_file_without_a_traceback():
    pressed = """
import json, runpy, sys

def press(text):
    raise KeyboardInterrupt

json.loads = press  # which read_config calls
sys.argv = ["gpt2.py", "ROMEO:", "tiny/gpt2"]
runpy.run_path("gpt2.py", run_name="__main__")
"""
    result = run("-c", pressed)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


TEXT = ROOT / "README.md"
PROGRAMS = {  # commands that write to standard output
    "gpt2.py": ["gpt2.py", "Hello", ROOT / "tiny" / "gpt2"],
    "sample.py": ["sample.py", "--max-new-tokens", 3],
    "train.py": ["train.py", "--steps", 1, "--data", TEXT, "--out"],
    "bench.py": ["bench.py", "--weights", "tiny", "--task", "load", "--runs", 1],
}


def shell(program, redirection, tmp_path):
    """Runs a command of PROGRAMS with standard output as users have it, buffered."""
    out = [tmp_path / "out"] if program == "train.py" else []
    command = [sys.executable, *PROGRAMS[program], *out]
    quoted = " ".join(shlex.quote(str(word)) for word in command)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {quoted} {redirection}"],
        cwd=ROOT,
        env=buffered,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_reader_that_leaves_ends_the_program_without_a_word(program, tmp_path):
    """As under `| head`: 141 is the code of other tools, 128 + SIGPIPE."""
    result = shell(program, "| true", tmp_path)
    assert result.returncode == 141
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("program", PROGRAMS)
def test_standard_output_on_a_full_disk_is_one_line(program, tmp_path):
    result = shell(program, "> /dev/full", tmp_path)
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if "No space left" in line]
    assert line.startswith(f"{program}: [Errno 28]")
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


@pytest.mark.parametrize("program", ["gpt2.py", "sample.py", "bench.py"])
def test_a_closed_standard_output_is_one_line(program, tmp_path):
    """train.py goes on: what it makes is a folder."""
    result = shell(program, ">&-", tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"{program}: standard output is closed"]


def test_with_standard_error_closed_standard_output_has_the_text_alone(tmp_path):
    text = shell("sample.py", "2> /dev/null", tmp_path).stdout
    result = shell("sample.py", "2>&-", tmp_path)
    assert (result.returncode, result.stdout) == (0, text)


@pytest.mark.parametrize(
    "command",
    [
        ["gpt2.py", "Hello", "a" * 300],
        ["sample.py", "--weights", "a" * 300],
        ["sample.py", "--profile", "a" * 300],
        ["train.py", "--weights", "a" * 300],
        ["bench.py", "--weights", "a" * 300],
        ["bench.py", "--out", "a" * 300],
        ["bench.py", "--task", "eval", "--text", "a" * 300],
    ],
    ids=lambda command: " ".join(command)[:30],
)
def test_names_that_are_too_long_for_a_file_are_one_line(command):
    one_line(run(*command, HF_HUB_OFFLINE="1"), command[0])


def test_bench_py_names_wrong_weights_once_and_not_for_each_task(tmp_path):
    command = ["bench.py", "--model", "gpt2", "--weights", tmp_path, "--task", "load,decode"]
    assert "has no config.json" in one_line(run(*command), "bench.py")


def test_bench_py_takes_weights_or_a_preset():
    command = ["bench.py", "--weights", "tiny", "--preset", "openai-community/gpt2"]
    assert "--preset is for random weights" in one_line(run(*command), "bench.py")


def test_a_chat_template_that_is_a_dangling_link_is_named(tmp_path):
    shutil.copytree(ROOT / "tiny" / "gpt2", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").symlink_to(tmp_path / "gone")
    result = run("sample.py", "--weights", tmp_path / "model", "--chat", "--prompt", "Hello")
    line = one_line(result, "sample.py")
    assert "chat_template.jinja is a link to a file that is gone: download it again" in line


# -------------------------------------------------------------------- --model, from the checkpoint


@pytest.mark.parametrize("name", ["opt", pytest.param("mistral", marks=pytest.mark.wide)])
def test_without_model_sample_py_takes_the_one_of_the_checkpoint(name):
    options = ["--prompt", "ROMEO:", "--max-new-tokens", "5", "--temperature", "0"]
    tiny = ROOT / "tiny" / name
    expected = run("sample.py", "--model", name, "--weights", tiny, *options)
    result = run("sample.py", "--weights", tiny, *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected.stdout


@pytest.mark.wide
def test_without_model_train_py_and_bench_py_take_it_too(tmp_path):
    tiny = ROOT / "tiny" / "opt"
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be. " * 200)
    run_length = ["--steps", 2, "--batch", 2, "--block", 16]
    files = ["--weights", tiny, "--data", text, "--out", tmp_path / "out"]
    result = run("train.py", *files, *run_length)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "opt"
    result = run("bench.py", "--task", "load", "--runs", 1, "--weights", tiny)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("program", ["sample.py", "train.py", "bench.py"])
def test_a_checkpoint_that_no_file_reads_and_one_that_is_not_there_are_one_line(program, tmp_path):
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    data = ["--data", "README.md"] if program == "train.py" else []
    task = ["--task", "load"] if program == "bench.py" else []
    folder = tmp_path / "phi"
    shutil.copytree(ROOT / "tiny" / "llama", folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    line = one_line(run(program, *data, *task, "--weights", folder), program)
    assert "is of model_type 'phi3'; gpt2, opt, llama" in line
    line = one_line(run(program, *data, *task, "--weights", "runs/typo", **offline), program)
    assert "there is no folder runs/typo" in line
    # As of a shell variable that is not set: it would mean the default.
    line = one_line(run(program, *data, *task, "--weights", ""), program)
    assert "--weights: it is empty" in line


# ------------------------------------------------------------------------- the README's own blocks


def readme_block(word: str) -> str:
    """The Python of README.md that has this word in it."""
    [code] = [
        block.code for block in python_of((ROOT / "README.md").read_text()) if word in block.code
    ]
    return code


@pytest.mark.core_gpt2_only
def test_hidden_states_and_attention_are_those_of_transformers(family, monkeypatch):
    """At most 1e-4 of the largest number apart: float32 after four layers of a trained model."""
    monkeypatch.chdir(ROOT)
    call = family.module.Block.__call__
    found = {}
    exec(readme_block("hidden_states").replace("llama", family.name), found)
    assert family.module.Block.__call__ is call

    hf = read_hf(family, ROOT / "tiny" / family.name)
    with torch.no_grad():
        asked = {"output_hidden_states": True, "output_attentions": True}
        expected = hf(torch.tensor([found["ids"]]), **asked)
    assert len(found["hidden_states"]) == len(expected.hidden_states)
    for ours, theirs in zip(found["hidden_states"], expected.hidden_states, strict=True):
        largest = theirs.abs().max().item()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * largest)
    np.testing.assert_allclose(found["weights"], torch.cat(expected.attentions), atol=1e-4)


def test_a_script_with_the_readmes_lines_compiles_nothing_the_second_time(tmp_path):
    script = (
        readme_block("jax_compilation_cache_dir")
        + """
import gpt2
misses = []
jax.monitoring.register_event_listener(lambda event, **_: misses.append(event))
model = gpt2.load("tiny/gpt2")
gpt2.generate(model, [[1, 2, 3]], 4, key=0)
print(misses.count("/jax/compilation_cache/cache_misses"))
"""
    )
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    numbers = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        numbers.append(int(done.stdout))
    first, second = numbers
    assert first > 0 and second == 0
    assert any((tmp_path / "compiled").iterdir())
