"""Weights in fewer bits: `load(..., quantize=...)` and `sample.py --quantize`.

The plain form of a quantized model is the ordinary one with the weights that the few bits stand
for, so a wrong scale or a wrong order of the columns cannot hide behind the error of rounding.
"""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.reference import MATERIAL, ROOT
from safetensors.numpy import load_file, save_file

import gpt2
import llama
import mistral
import qwen

KINDS = ["int8", "int4", "bfloat16"]
TOKENS = [[5, 7, 9, 11, 3, 2, 8]]


def tiny(family):
    return ROOT / "tiny" / family.name


def dequantized(module, quantized, folder):
    """The ordinary model, with the weights that a quantized one stands for."""
    model = module.load(folder)
    for path, layer in nnx.iter_modules(quantized):
        plain = model
        for part in path:
            plain = plain[part] if isinstance(part, int) else getattr(plain, part)
        if isinstance(layer, module.QuantizedLinear):
            is_stack = layer.kernel.codes.ndim == 3
            widened = module.QuantizedMatrix.widened
            w = (jax.vmap(widened) if is_stack else widened)(layer.kernel)
            plain.kernel.set_value(w.swapaxes(-1, -2))
        if isinstance(layer, module.QuantizedEmbed):
            plain.embedding.set_value(layer.embedding.widened())
    return model


def assert_close(a, b):
    """Equal up to float32 rounding: sums of a few hundred products, over a few layers."""
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def random_matrix(F, D, seed=0):
    return np.random.default_rng(seed).normal(size=(F, D)).astype(np.float32)


# ---------------------------------------------------------------------------------- one matrix


def test_int8_is_a_scale_for_each_row_and_rounding():
    matrix = llama.QuantizedMatrix(np.array([[127.0, -63.4, 0.6], [0.0, 0.0, 0.0]]), "int8")
    assert matrix.codes[...].tolist() == [[127, -63, 1], [0, 0, 0]]
    assert matrix.row_scale[...].tolist() == [[1.0], [0.0]]


def test_int8_is_half_a_step_off_at_most():
    w = random_matrix(50, 64)
    error = np.abs(llama.QuantizedMatrix(w, "int8").widened() - w)
    step = np.abs(w).max(axis=1, keepdims=True) / 127
    assert (error <= 0.5001 * step).all()


def of_rows_with_rms_1(w):
    return w / np.sqrt(np.square(w).mean(axis=1, keepdims=True))


def test_int4_is_half_a_step_off_at_most_but_beyond_its_range():
    """The largest weight of a group is -8 steps; one with the other sign is cut to 7."""
    w = of_rows_with_rms_1(random_matrix(64, 50))
    groups = w.reshape(2, 32, 50)
    step = np.abs(groups).max(axis=1, keepdims=True) / 8
    error = np.abs(llama.QuantizedMatrix(w, "int4").widened().reshape(groups.shape) - groups)
    assert (error <= 1.02 * step).all()
    assert (error <= 0.52 * step).mean() > 0.98  # the step is rounded to bfloat16


def test_the_rows_of_an_int4_group_may_differ_in_size():
    """Each row has a scale besides that of the group: else the smaller ones would be zeros."""
    w = of_rows_with_rms_1(random_matrix(64, 50))
    size = np.geomspace(1, 1000, 64, dtype=np.float32)[:, None]
    of_one_size = llama.QuantizedMatrix(w, "int4").widened()
    np.testing.assert_allclose(
        llama.QuantizedMatrix(size * w, "int4").widened(), size * of_one_size, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_the_weights_does_not_matter(kind, size):
    """Also where the square of a weight is no float32."""
    w = random_matrix(32, 64)
    of_size_1 = llama.QuantizedMatrix(w, kind).widened()
    tolerance = {"rtol": 0.02, "atol": 1e-6}  # the rounding of a code may change
    np.testing.assert_allclose(
        llama.QuantizedMatrix(w * np.float32(size), kind).widened() / size, of_size_1, **tolerance
    )


def test_bfloat16_holds_the_bits_of_bfloat16():
    w = random_matrix(8, 10)
    matrix = llama.QuantizedMatrix(w, "bfloat16")
    expected = jnp.asarray(w).astype(jnp.bfloat16).astype(jnp.float32)
    assert (matrix.widened() == expected).all()


@pytest.mark.parametrize("F, D", [(48, 96), (32, 95)])
def test_what_does_not_divide_into_groups_and_halves_is_held_in_int8(F, D):
    matrix = llama.QuantizedMatrix(random_matrix(F, D), "int4")
    assert matrix.group_scale is None
    assert matrix.codes.shape == (F, D)
    assert matrix.codes.dtype == jnp.int8


# A prime number of rows, a single row, more than one tile, vectors of 16 kB and more.
SHAPES = [(257, 64), (1, 64), (32, 64), (5024, 512), (320, 4096), (96, 8640), (64, 11008)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("F, D", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_product_is_that_of_the_dequantized_matrix(kind, F, D, rows):
    matrix = llama.QuantizedMatrix(random_matrix(F, D), kind)
    x = random_matrix(rows, D, seed=1)
    w = np.asarray(matrix.widened(), np.float64)
    error = np.abs(jax.jit(matrix.dot)(x) - x.astype(np.float64) @ w.T)
    # A few roundings of float32, each at most 6e-8 of the sum of the magnitudes.
    assert (error <= 1e-6 * (np.abs(x) @ np.abs(w).T)).all()


def test_a_byte_of_int4_holds_a_column_and_that_of_the_other_half():
    """Column j stands in the low half of a byte, column j + D / 2 in the high half, plus 8."""
    w = np.zeros((32, 64), np.float32)
    w[0, 3] = -8.0
    w[0, 32 + 5] = -4.0
    matrix = llama.QuantizedMatrix(w, "int4")
    np.testing.assert_allclose(matrix.widened(), w, rtol=0.01)  # 0 stays 0
    assert matrix.codes[0, 3] == 0 + 16 * 8  # -8 and 0
    assert matrix.codes[0, 5] == 8 + 16 * 0  # 0 and -8, with half the scale
    assert matrix.group_scale.shape == (1, 64)


# ---------------------------------------------------------------------------------- whole models


@pytest.fixture(params=KINDS)
def pair(family, request):
    """(the tiny model, quantized; the ordinary one with the weights that it stands for)."""
    quantized = family.module.load(tiny(family), quantize=request.param)
    return quantized, dequantized(family.module, quantized, tiny(family))


@pytest.mark.core_gpt2_only
def test_logits_are_those_of_the_dequantized_weights(pair):
    quantized, plain = pair
    assert_close(quantized(TOKENS), plain(TOKENS))


@pytest.mark.core_gpt2_only
def test_generation_is_that_of_the_dequantized_weights(family, pair):
    quantized, plain = pair
    how = {"key": 0, "temperature": 0}
    prompts = [[5, 7, 9], [11, 3]]
    mine = family.module.generate(quantized, prompts, 12, **how)
    assert mine == family.module.generate(plain, prompts, 12, **how)
    alone = family.module.generate(quantized, prompts[:1], 12, **how)
    assert alone == mine[:1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.core_gpt2_only
def test_a_saved_model_is_loaded_bit_for_bit(family, kind, tmp_path):
    model = family.module.load(tiny(family), quantize=kind)
    family.module.save(model, tmp_path)
    again = family.module.load(tmp_path)
    assert family.module.quantized_as(again) == kind
    assert (again(TOKENS) == model(TOKENS)).all()


def test_config_json_states_the_format(tmp_path):
    gpt2.save(gpt2.load(ROOT / "tiny/gpt2", quantize="int4"), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["quantization_config"] == {"quant_method": "one-file-models", "format": "int4"}
    assert values["dtype"] == "float32"


def test_an_untied_head_is_quantized_too():
    config = llama.Config.small(layers=1, heads=2, width=64, context=32, vocab_size=100)
    config = llama.replace(config, tie_word_embeddings=False)
    model = llama.Model(config, rngs=nnx.Rngs(0))
    before = model(TOKENS)
    llama.quantize_layers(model, "int8")
    assert isinstance(model.lm_head, llama.QuantizedLinear)
    assert 0 < jnp.abs(model(TOKENS) - before).max() < 0.05 * jnp.abs(before).max()


def test_the_router_of_a_mixtral_keeps_its_digits():
    model = mistral.load(ROOT / "tiny/mistral", quantize="int4")
    experts = model.layers[0].block_sparse_moe
    assert isinstance(experts.gate, nnx.Linear)
    assert isinstance(experts.experts.w1, mistral.QuantizedLinear)


def small_mixture(module):
    sizes = {"layers": 1, "heads": 2, "width": 64, "context": 32, "experts": 5}
    return module.Model(module.Config.small(**sizes, vocab_size=100), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", [mistral, qwen], ids=lambda module: module.__name__)
def test_experts_are_quantized_alike_one_by_one_and_as_a_stack(module, kind, tmp_path):
    """`quantize_layers` has the stack, `load` one expert after the other; files hold each alone."""
    model = small_mixture(module)
    module.save(model, tmp_path / "whole")
    module.quantize_layers(model, kind)
    module.save(model, tmp_path / "stack")
    module.save(module.load(tmp_path / "whole", quantize=kind), tmp_path / "one by one")
    one, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("stack", "one by one")
    )
    assert one.keys() == other.keys()
    assert sum(".experts.4." in name and name.endswith(".codes") for name in one) == 3
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_product_with_a_matrix_of_a_stack_is_that_with_the_matrix_alone(kind, rows):
    w = random_matrix(3 * 96, 40).reshape(3, 96, 40)
    x = random_matrix(rows, 40, seed=1)
    stack = qwen.QuantizedMatrix(w, kind)
    for e in range(3):
        alone = qwen.QuantizedMatrix(w[e], kind)
        assert_close(jax.jit(stack.dot)(x, e), alone.dot(x))


def size_of(state) -> int:
    return sum(param.size * param.dtype.itemsize for _, param in nnx.to_flat_state(state))


# Gemma 3 270M misses 0.2 (0.207): two thirds of its weights are the token table, in int8.
@pytest.mark.parametrize("kind, share", [("int8", 0.32), ("int4", 0.2), ("bfloat16", 0.51)])
def test_published_sizes_take_so_much_of_float32s_memory(kind, share):
    for module, name in [
        (gpt2, "openai-community/gpt2"),
        (llama, "HuggingFaceTB/SmolLM2-135M"),
        (llama, "meta-llama/Llama-3.2-1B"),
        (llama, "meta-llama/Llama-2-7b-hf"),
    ]:
        config = module.PRESETS[name].config
        whole = size_of(module.skeleton(config)[1])
        assert size_of(module.skeleton(config, kind)[1]) <= share * whole
        if kind == "int4" and "7b" in name:
            assert size_of(module.skeleton(config, kind)[1]) <= 4.5e9


def perplexity(model, ids) -> float:
    rows = jnp.array(ids).reshape(-1, 128)

    @jax.jit
    def loss(rows):
        log_probs = jax.nn.log_softmax(model(rows)[:, :-1])
        return -jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=-1).mean()

    return math.exp(loss(rows))


@pytest.mark.core_gpt2_only
def test_perplexity_of_a_held_out_text_hardly_changes(family):
    """The tiny models have learned the first nine tenths of this text."""
    text_file = MATERIAL / "texts/tinyshakespeare.txt"
    if not text_file.exists():
        pytest.skip("needs ../shared/material")
    module = family.module
    ids = module.tokenizer(tiny(family)).encode(text_file.read_text()[-30000:])
    ids = ids[: 32 * 128]
    ids = ids[: len(ids) // 128 * 128]

    whole = perplexity(module.load(tiny(family)), ids)
    for kind, most in [("int8", 1.005), ("int4", 1.05)]:
        quantized = module.load(tiny(family), quantize=kind)
        assert whole / most < perplexity(quantized, ids) < whole * most


def test_perplexity_of_a_real_llama_hardly_changes():
    """On 32 stories of its own. The rows of its k_proj differ much in size."""
    folder = MATERIAL / "tinyllamas/stories260K-hf"
    if not folder.exists():
        pytest.skip("needs ../shared/material")
    model = llama.load(folder)
    stories = llama.generate(model, [[1]] * 32, 127, key=0, temperature=1.0)
    ids = [[1, *story] for story in stories]

    whole = perplexity(model, ids)
    for kind, most in [("int8", 1.005), ("int4", 1.05)]:
        quantized = llama.load(folder, quantize=kind)
        assert whole / most < perplexity(quantized, ids) < whole * most


# ---------------------------------------------------------------------------------- wrong requests


def test_another_format_is_refused():
    with pytest.raises(gpt2.InputError, match="quantize is 'int3': it must be one of int8, int4"):
        gpt2.load(ROOT / "tiny/gpt2", quantize="int3")


@pytest.mark.parametrize("part", ["codes", "group_scale"])
def test_parts_of_another_type_are_refused(part, tmp_path):
    """Such as the bits of a bfloat16 that another program has read as a bfloat16."""
    llama.save(llama.load(ROOT / "tiny/llama", quantize="int4"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.0.mlp.down_proj.weight.{part}"
    tensors[name] = tensors[name].astype(np.float32)
    save_file(tensors, file)
    with pytest.raises(llama.InputError, match=f"{part} is float32: quantized weights"):
        llama.load(tmp_path)


def test_int4_is_not_made_of_int8(tmp_path):
    gpt2.save(gpt2.load(ROOT / "tiny/gpt2", quantize="int8"), tmp_path)
    with pytest.raises(gpt2.InputError, match="in int8: for int4, load the checkpoint that"):
        gpt2.load(tmp_path, quantize="int4")


def test_an_adapter_is_not_merged_into_quantized_weights(tmp_path):
    gpt2.save(gpt2.load(ROOT / "tiny/gpt2", quantize="int8"), tmp_path / "base")
    adapter = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(gpt2.InputError, match="its base holds its weights in int8: merge it with"):
        gpt2.load(tmp_path)


def run(*command):
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_train_refuses_quantized_weights(tmp_path):
    gpt2.save(gpt2.load(ROOT / "tiny/gpt2", quantize="int8"), tmp_path / "int8")
    done = run("train.py", "--weights", tmp_path / "int8", "--data", ROOT / "README.md")
    assert done.returncode == 2
    assert "holds its weights in int8, which cannot be trained: name the" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------- sample.py


@pytest.mark.parametrize(
    "options, said",
    [
        (["--quantize", "int8"], "float32, weights in int8: "),
        (["--quantize", "int4", "--dtype", "bfloat16"], "bfloat16, weights in int4: "),
        (["--dtype", "bfloat16"], "1 x cpu, bfloat16: "),
    ],
)
def test_sample_says_how_it_holds_the_weights(options, said):
    sample = ["sample.py", "--weights", "tiny", "--max-new-tokens", 5, "--device", "cpu"]
    done = run(*sample, *options)
    assert done.returncode == 0
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.wide
@pytest.mark.parametrize("mode", ["pmap", "data", "fsdp", "tensor:2", "fsdp:2,tensor:2"])
def test_every_way_to_split_gives_the_same_text(mode):
    program = (
        "import os, runpy, sys; os.environ['NPROC'] = '16'; import jax; "
        "jax.config.update('jax_num_cpu_devices', 4); "
        "sys.argv = ['sample.py'] + sys.argv[1:]; runpy.run_path('sample.py', run_name='__main__')"
    )
    sample = ["--model", "llama", "--weights", "tiny", "--prompt", "ROMEO:", "--num-samples", "4"]
    sample += ["--temperature", "0", "--max-new-tokens", "12", "--quantize", "int4"]
    texts = []
    for parallel in ["no", mode]:
        done = subprocess.run(
            [sys.executable, "-c", program, *sample, "--parallel", parallel],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "NPROC": "16"},
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------- the KV cache


def test_a_key_in_8_bits_is_half_a_step_off_at_most():
    k = jnp.asarray(random_matrix(30, 64).reshape(1, 5, 6, 64))
    stored = llama.as_stored(k, jnp.int8)
    assert stored.shape == (1, 5, 6, 68)
    step = jnp.abs(k).max(axis=-1, keepdims=True) / 127
    assert (jnp.abs(llama.widen_slots(stored, jnp.float32) - k) <= 0.5001 * step).all()


def test_an_empty_slot_is_zero():
    empty = llama.init_cache(llama.Config(num_hidden_layers=1), 1, 4, jnp.int8).layers[0][0]
    assert (llama.widen_slots(empty, jnp.float32) == 0).all()


def in_steps(module, model, tokens, cache_dtype):
    """Logits of tokens [B, T]: half of them in one call, the others one after another."""
    B, T = tokens.shape
    cache = module.init_cache(model.config, B, T, cache_dtype)
    logits, cache = model(tokens[:, : T // 2], None, cache)
    parts = [logits]
    for t in range(T // 2, T):
        logits, cache = model(tokens[:, t : t + 1], None, cache)
        parts.append(logits)
    return jnp.concatenate(parts, axis=1)


@pytest.mark.core_gpt2_only
def test_a_cache_in_8_bits_changes_the_logits_by_a_hundredth(family):
    """Each key and value is off by up to 1 / 254 of its largest number; so are the outputs."""
    model = family.module.load(tiny(family))
    tokens = jnp.array(np.random.default_rng(0).integers(0, 200, (2, 40)))
    whole = in_steps(family.module, model, tokens, jnp.float32)
    rounded = in_steps(family.module, model, tokens, jnp.int8)
    assert 0 < jnp.abs(rounded - whole).max() < 0.01 * jnp.abs(whole).max()


@pytest.mark.core_gpt2_only
def test_generation_takes_the_type_of_the_cache_from_the_model(family):
    model = family.module.load(tiny(family))
    model.cache_dtype = jnp.dtype("int8")
    prompts = [[5, 7, 9], [11, 3]]
    how = {"key": 0, "temperature": 0}
    both = family.module.generate(model, prompts, 12, **how)
    assert family.module.generate(model, prompts[1:], 12, **how) == both[1:]


def test_a_ring_buffer_in_8_bits_is_the_window_of_a_whole_cache():
    """Keys that have left the window are replaced; each keeps the scale that it came with."""
    config = mistral.Config.small(layers=2, heads=2, width=64, context=64, vocab_size=50)
    config = mistral.replace(config, sliding_window=8)
    model = mistral.Model(config, rngs=nnx.Rngs(0))
    tokens = jnp.array(np.random.default_rng(0).integers(0, 50, (2, 24)))
    ring = in_steps(mistral, model, tokens, jnp.int8)
    whole = in_steps(mistral, model, tokens, jnp.float32)
    assert mistral.init_cache(config, 2, 24, jnp.int8).layers[0][0].shape == (2, 8, 2, 36)
    assert jnp.abs(ring - whole).max() < 0.02 * jnp.abs(whole).max()


@pytest.mark.parametrize("Dh, share", [(64, 0.27), (128, 0.26)])
def test_a_cache_in_8_bits_takes_a_quarter_of_the_memory(Dh, share):
    config = llama.Config(num_hidden_layers=2, head_dim=Dh)

    def size(dtype):
        cache = jax.eval_shape(lambda: llama.init_cache(config, 1, 100, dtype))
        return sum(k.size * k.dtype.itemsize for k, _ in cache.layers)

    assert size(jnp.int8) < share * size(jnp.float32)


def test_sample_takes_a_type_for_the_cache():
    sample = ["sample.py", "--weights", "tiny", "--max-new-tokens", 5, "--device", "cpu"]
    done = run(*sample, "--cache-dtype", "int8", "--draft", "ngram", "--temperature", 0)
    assert done.returncode == 0
    plain = run(*sample, "--cache-dtype", "int8", "--temperature", 0)
    assert done.stdout == plain.stdout
