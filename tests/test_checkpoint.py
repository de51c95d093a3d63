"""Checkpoints: what load reads, what it refuses and how it says so, and what save writes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx
from helpers.families import GPT2, MISTRAL, once
from helpers.reference import ROOT, assert_same_model, read_hf, state_of
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
)

OLD_GPT2_CONFIG = {  # of openai-community/gpt2 as it was published, in the order of its keys
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "vocab_size": 50257,
    "torch_dtype": "float32",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}


def name_of(plain, path):
    """What a parameter is called in a checkpoint."""
    parameters = plain.family.module.named_parameters(nnx.state(plain.model))
    return next(name for other, _, name, _ in parameters if other == path)


@pytest.fixture
def tensors(plain):
    """The tensors of the plain checkpoint under the names of its file."""
    return load_file(plain.folder / "model.safetensors")


@pytest.fixture
def folder(plain, tmp_path):
    """A folder with the plain checkpoint's config.json, and no weights yet."""
    (tmp_path / "config.json").write_text((plain.folder / "config.json").read_text())
    return tmp_path


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def run(script, timeout=600, **environment):
    """Runs a script in a process of its own, from which the model files can be imported."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------- what is read


def test_every_parameter_is_the_tensor_of_its_name(plain, tensors):
    for path, param, name, turned in plain.family.module.named_parameters(nnx.state(plain.model)):
        tensor = tensors[name]
        np.testing.assert_array_equal(param[...], tensor.T if turned else tensor, err_msg=path)


@once
def test_shards_give_the_same_model_as_one_file(family, plain, tmp_path):
    plain.hf32.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_model(family.module.load(tmp_path), plain.model)


def test_names_without_a_prefix_are_those_of_the_bare_model(family, plain, folder):
    plain.hf32.base_model.save_pretrained(folder)
    prefix = f"{plain.hf32.base_model_prefix}."
    assert not any(name.startswith(prefix) for name in load_file(folder / "model.safetensors"))
    assert_same_model(family.module.load(folder), plain.model)


@pytest.mark.parametrize("prefix", ["model.", "language_model."], ids=["new names", "old names"])
@pytest.mark.parametrize("name", ["plain", "grouped heads", "queries by position"])
def test_of_a_multimodal_mistral_the_text_model_is_read(make_case, tmp_path, name, prefix):
    """The first and the last are tied; the third is a Ministral 3."""
    case = make_case(MISTRAL, name)
    text = AutoConfig.from_pretrained(case.folder)
    pictures = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    pictures |= {"num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    config = Mistral3Config(
        text_config=text,
        vision_config=PixtralVisionConfig(**pictures),
        tie_word_embeddings=text.tie_word_embeddings,
    )
    whole = Mistral3ForConditionalGeneration(config).eval()
    whole.model.language_model = case.hf32.model
    whole.lm_head = case.hf32.lm_head
    tensors = {}
    for path, tensor in whole.state_dict().items():
        if prefix == "language_model.":  # as published
            path = path.replace("model.language_model.", "language_model.model.")
            path = re.sub("^lm_head", "language_model.lm_head", path)
            path = path.removeprefix("model.")
        tensors[path] = tensor.detach().contiguous().clone()
    assert any(path.startswith(prefix) for path in tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)

    model = MISTRAL.module.load(tmp_path)
    assert_same_model(model, case.model)
    theirs = Mistral3ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    logits = theirs(torch.tensor(case.tokens)).logits
    assert torch.equal(logits, case.hf32(torch.tensor(case.tokens)).logits)


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "with prefix"])
def test_buffers_and_a_repeated_tied_head_are_skipped(family, plain, folder, tensors, bare):
    head = tensors[name_of(plain, f"{family.table}.embedding")]
    prefix = f"{plain.hf32.base_model_prefix}."
    old = tensors | {prefix + name: np.ones((1, 1, 8, 8), np.float32) for name in family.buffers}
    old = {name.removeprefix(prefix) if bare else name: t for name, t in old.items()}
    write(folder, old | {"lm_head.weight": head})
    assert_same_model(family.module.load(folder), plain.model)


def test_a_tied_file_with_a_head_of_its_own_is_loaded_with_it(family, plain, folder, tensors):
    """Merged adapters leave such files. transformers uses the head that is there, too."""
    table = tensors[name_of(plain, f"{family.table}.embedding")]
    head = np.random.default_rng(0).normal(size=table.shape).astype(np.float32)
    write(folder, tensors | {"lm_head.weight": head})
    model = family.module.load(folder)
    np.testing.assert_array_equal(model.lm_head.kernel[...], head.T)
    theirs = read_hf(family, folder)
    np.testing.assert_array_equal(theirs.lm_head.weight.detach(), head)
    tokens = np.arange(20)[None]
    expected = theirs(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(model(tokens), expected, rtol=1e-3, atol=1e-3)  # logits of about 50

    family.module.save(model, folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same_model(family.module.load(folder), model)


def test_a_tied_file_may_hold_the_token_table_as_the_head_alone(family, plain, folder, tensors):
    table = name_of(plain, f"{family.table}.embedding")
    head = tensors.pop(table)
    write(folder, tensors | {"lm_head.weight": head})
    assert_same_model(family.module.load(folder), plain.model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@once
def test_parameters_are_stored_as_dtype_or_param_dtype_says(family, plain, dtype):
    if dtype not in ("float32", *family.halves):
        pytest.skip(f"{family.name} refuses {dtype}")
    model = family.module.load(plain.folder, dtype=dtype)
    for path, value in state_of(model).items():
        expected = np.asarray(state_of(plain.model)[path]).astype(dtype)
        assert value.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(value, expected, err_msg=path)
    mixed = family.module.load(plain.folder, dtype=dtype, param_dtype=jnp.float32)
    assert {value.dtype for value in state_of(mixed).values()} == {jnp.dtype("float32")}
    assert mixed.hidden(jnp.array([[1, 2]]))[0].dtype == jnp.dtype(dtype)


@once
def test_half_precision_files_are_read_into_any_dtype(family, plain, folder):
    half = read_hf(plain.family, plain.folder, torch.bfloat16)
    half.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype.name for tensor in stored.values()} == {"bfloat16"}
    assert_same_model(
        family.module.load(folder, dtype=jnp.bfloat16),
        family.module.load(plain.folder, dtype=jnp.bfloat16),
    )
    assert {v.dtype.name for v in state_of(family.module.load(folder)).values()} == {"float32"}


@pytest.mark.core_gpt2_only
def test_a_model_on_several_devices_gives_the_logits_of_one(family, make_case):
    """On 4 emulated devices. NPROC lets as many threads wait for each other as there are devices;
    sums over split dimensions run in another order, so logits of about 5 differ by 1e-5."""
    even = str(make_case(family, "square head").folder)  # a vocabulary of 48
    odd = str(make_case(family).folder)  # of 97, odd as the 50257 of GPT-2: not split
    run(
        f"""
        import jax, numpy as np, {family.name} as module
        from flax import nnx
        jax.config.update("jax_default_matmul_precision", "highest")
        tokens = np.arange(40).reshape(2, 20)

        def logits(model):
            graphdef, state = nnx.split(model)
            return np.asarray(jax.jit(lambda s: nnx.merge(graphdef, s)(tokens))(state))

        assert jax.device_count() == 4
        for folder in ({even!r}, {odd!r}):
            expected = logits(module.load(folder))
            for shape, names in [((1,), ("fsdp",)), ((4,), ("fsdp",)), ((4,), ("data",)),
                                 ((2, 2), ("fsdp", "tensor"))]:
                devices = np.array(jax.devices())[: np.prod(shape)].reshape(shape)
                model = module.load(folder, mesh=jax.sharding.Mesh(devices, names))
                np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-5)
                parts = 1
                for path, param, *_ in module.named_parameters(nnx.state(model)):
                    assert len(param[...].sharding.device_set) == len(devices.flat), path
                    parts = max(parts, param.size // param[...].addressable_shards[0].data.size)
                assert parts == (1 if names == ("data",) else len(devices.flat)), (shape, parts)
    """,
        JAX_NUM_CPU_DEVICES="4",
        NPROC="16",
        JAX_PLATFORMS="cpu",
    )


# ---------------------------------------------------------------------------------- what is refused


def refuse(module, folder, *parts):
    with pytest.raises(module.InputError) as error:
        module.load(folder)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_named(family, plain, folder, tensors):
    module, name = family.module, name_of(plain, family.matrix)
    matrix, no_layer = tensors[name], name.replace(".1.", ".2.")
    write(folder, {other: t for other, t in tensors.items() if other != name})
    refuse(module, folder, "lacks", name)
    for unexpected in (no_layer, f"{plain.hf32.base_model_prefix}.score.weight"):
        write(folder, tensors | {unexpected: matrix})
        refuse(module, folder, "unexpected", unexpected)
    write(folder, tensors | {name: np.ascontiguousarray(matrix.T)})
    D, F = state_of(plain.model)[family.matrix].shape
    refuse(module, folder, name, family.matrix, f"({F}, {D})", f"({D}, {F})")


def test_an_own_head_is_missed_where_the_config_wants_one(family, folder, tensors):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    write(folder, tensors)
    refuse(family.module, folder, "lacks", "lm_head.weight")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
@once
def test_a_file_that_was_cut_short_is_refused(family, folder, tensors, share):
    write(folder, tensors)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(share * len(data))])
    refuse(family.module, folder, "model.safetensors is damaged or cut short")


@once
def test_a_missing_file_is_named(family, plain, folder, tmp_path_factory):
    def missing(folder, file):
        named = re.escape(str(file.parent)) + ".*" + re.escape(file.name)
        with pytest.raises(family.module.InputError, match=named):
            family.module.load(folder)

    missing(folder, folder / "model.safetensors")
    plain.hf32.save_pretrained(folder, max_shard_size="60KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    missing(folder, shard)
    empty = tmp_path_factory.mktemp("empty")
    missing(empty, empty / "config.json")


def test_a_config_of_something_else_is_refused_with_what_would_do(family, folder):
    config = json.loads((folder / "config.json").read_text())
    for name, value, possible in [
        ("model_type", "bert", [family.name]),
        (family.activation, "swish2", ["silu", "relu", "gelu"]),
    ]:
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(family.module.InputError, match=value) as error:
            family.module.load(folder)
        assert any(other in str(error.value) for other in possible)


@once
def test_quantized_weights_are_refused_by_name(family, plain, folder, tensors):
    values = json.loads((folder / "config.json").read_text())
    quantized = values | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(family.module.InputError, match=r"quantized \(gptq\)"):
        family.module.Config.from_hf(quantized)

    name = name_of(plain, family.matrix)
    write(folder, tensors | {name: tensors[name].astype(np.int8)})
    refuse(family.module, folder, name, "int8", "quantized")
    float8 = {key: torch.tensor(value) for key, value in tensors.items()}
    float8[name] = float8[name].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(float8, folder / "model.safetensors")
    refuse(family.module, folder, name, "F8_E4M3", "quantized")


# -------------------------------------------------------------------------------------- the config


def test_a_config_survives_the_way_to_transformers_and_back(case, tmp_path):
    config = case.model.config
    assert type(config).from_hf(config.to_hf()) == config
    assert type(config).from_hf(json.loads(json.dumps(config.to_hf()))) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == AutoConfig.from_pretrained(case.folder).model_type
    original = AutoConfig.from_pretrained(case.folder).to_dict()
    unlike = {key for key, value in theirs.to_dict().items() if original.get(key, value) != value}
    assert unlike <= {"dtype", "_name_or_path"}


def test_several_end_tokens_survive_it_too_and_a_padded_vocabulary_is_not_saved(family):
    config = dataclasses.replace(
        next(iter(family.module.PRESETS.values())).config,
        eos_token_id=(5, 6),
        padded_vocab_size=300_000,
    )
    back = family.module.Config.from_hf(json.loads(json.dumps(config.to_hf())))
    assert back == dataclasses.replace(config, padded_vocab_size=None)


def test_the_config_of_the_published_gpt2_is_the_default():
    assert GPT2.module.Config.from_hf(OLD_GPT2_CONFIG) == GPT2.module.Config()
    assert GPT2.module.PRESETS["openai-community/gpt2"].config == GPT2.module.Config()


# ---------------------------------------------------------------------------------- what is written


def test_a_saved_model_is_read_back_bit_for_bit_by_transformers_and_by_load(case, tmp_path):
    case.family.module.save(case.model, tmp_path / "new" / "folder")
    assert_same_model(case.family.module.load(tmp_path / "new" / "folder"), case.model)
    tokens = torch.tensor(case.tokens)
    theirs = read_hf(case.family, tmp_path / "new" / "folder")
    assert torch.equal(theirs(tokens).logits, case.hf32(tokens).logits)
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert written == ["config.json", "model.safetensors"]


def test_a_bfloat16_model_is_saved_as_such(family, plain, tmp_path):
    model = family.module.load(plain.folder, dtype=jnp.bfloat16)
    family.module.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_model(family.module.load(tmp_path, dtype=jnp.bfloat16), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.core_gpt2_only
def test_rows_that_pad_the_vocabulary_are_not_saved(family, tmp_path, tied):
    config = dataclasses.replace(
        family.module.Config.from_hf(family.sizes),
        padded_vocab_size=128,
        tie_word_embeddings=tied,
    )
    model = family.module.Model(config, rngs=nnx.Rngs(0))
    assert getattr(model, family.table).embedding.shape[0] == 128
    family.module.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 97
    tokens = np.arange(30)[None]
    theirs = read_hf(family, tmp_path)(torch.tensor(tokens)).logits.detach().numpy()
    again = family.module.load(tmp_path)
    assert getattr(again, family.table).embedding.shape[0] == 97
    np.testing.assert_allclose(theirs, model(tokens), rtol=0, atol=1e-5)  # logits of about 1
    np.testing.assert_allclose(again(tokens), model(tokens), rtol=0, atol=1e-5)


@once
def test_saving_over_a_sharded_checkpoint_replaces_it(family, plain, tmp_path):
    other = family.module.Model(plain.model.config, rngs=nnx.Rngs(3))
    plain.hf32.save_pretrained(tmp_path, max_shard_size="60KB")
    family.module.save(other, tmp_path)
    assert_same_model(family.module.load(tmp_path), other)
    theirs = read_hf(family, tmp_path)
    np.testing.assert_array_equal(
        theirs.get_input_embeddings().weight.detach(), getattr(other, family.table).embedding[...]
    )
