"""Adapters of LoRA in place of a checkpoint: what PEFT wrote is loaded as PEFT computes with it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from argparse import Namespace

import numpy as np
import peft
import pytest
import torch
from flax import nnx
from helpers.families import MISTRAL
from helpers.reference import ROOT, Float64, assert_same_model, jit, read_hf, state_of
from helpers.small import byte_tokenizer, write_checkpoint
from safetensors.numpy import load_file, save_file
from transformers.pytorch_utils import Conv1D

import gpt2
import sample
import train


def matrices_of(hf) -> list[str]:
    """The names of the matrices in the blocks, as PEFT has them."""
    kinds = torch.nn.Linear | Conv1D
    names = [name for name, module in hf.named_modules() if isinstance(module, kinds)]
    return [name for name in names if name != "lm_head"]


def last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def write_by_peft(family, base, folder, dtype=torch.float32, **settings):
    """An adapter with random A and B, as PEFT writes it, for the checkpoint in `base`."""
    hf = read_hf(family, base)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": matrices_of(hf), **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as: fan_in_fan_out is corrected
        model = peft.get_peft_model(hf, config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
    return folder


def logits_by_peft(family, base, folder, tokens, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = read_hf(family, base, dtype)
        model = peft.PeftModel.from_pretrained(hf, folder, autocast_adapter_dtype=False)
    model = model.to(dtype).eval()  # A and B, too
    with torch.no_grad(), Float64() if dtype == torch.float64 else contextlib.nullcontext():
        return model(torch.tensor(tokens)).logits.double().numpy()


def assert_as_by_peft(case, folder):
    """The logits of our merged model are those of PEFT, which does not merge.

    In float64 they are exact; ours may be off by 4 times what PEFT's are in float32, as explained
    in the README of the tests.
    """
    given = case.family, case.folder, folder, case.tokens
    exact = logits_by_peft(*given, torch.float64)
    rough = logits_by_peft(*given, torch.float32)
    graphdef, state = nnx.split(case.family.module.load(folder, dtype="float32"))
    ours = jit(lambda state: nnx.merge(graphdef, state)(case.tokens))(state)

    allowed = 4 * np.abs(rough - exact).max()
    assert np.abs(np.asarray(ours, np.float64) - exact).max() <= allowed
    plain = np.asarray(case.model(case.tokens), np.float64)
    assert np.abs(plain - exact).max() > 1000 * allowed  # the adapter does much


def scheme(name: str, hf) -> dict:
    """Settings of PEFT that differ in which matrices have adapters, their rank and their scale."""
    names = matrices_of(hf)
    if name == "names":
        return {"target_modules": [last_part(names[0]), last_part(names[-1])], "lora_alpha": 3}
    if name == "rank-stabilized":
        return {"use_rslora": True}
    if name == "a regular expression":
        return {"target_modules": "|".join(name for name in names if ".1." in name), "r": 2}
    if name == "bfloat16":
        return {"dtype": torch.bfloat16}

    # The first pattern that matches counts, in the order of the file, which PEFT sorts.
    ranks = {f"^{names[0]}": 2, last_part(names[0]): 3, r"k_proj|fc\d|mlp.c_fc": 5}
    alphas = {f".*{names[-1][-8:]}": 40, last_part(names[-1]): 1, names[1]: 7}
    return {
        "rank_pattern": dict(sorted(ranks.items())),
        "alpha_pattern": dict(sorted(alphas.items())),
        "use_rslora": True,
    }


SCHEMES = ["patterns", "names", "rank-stabilized", "a regular expression", "bfloat16"]


@pytest.mark.parametrize(
    "name", [SCHEMES[0], *[pytest.param(n, marks=pytest.mark.core_gpt2_only) for n in SCHEMES[1:]]]
)
def test_an_adapter_by_peft_gives_the_logits_of_peft(family, plain, tmp_path, name):
    folder = write_by_peft(family, plain.folder, tmp_path, **scheme(name, plain.hf32))
    assert_as_by_peft(plain, folder)


@pytest.mark.core_gpt2_only
@pytest.mark.parametrize("config", ["plain", "square head"])  # tied, and not
def test_an_adapter_of_the_head_leaves_the_token_table_as_it_is(
    family, make_case, tmp_path, config
):
    """Beside it PEFT writes the head and an untied token table whole."""
    case = make_case(family, config)
    folder = write_by_peft(family, case.folder, tmp_path, target_modules=["lm_head"])
    assert_as_by_peft(case, folder)
    model = family.module.load(folder)
    assert not model.config.tie_word_embeddings
    table = getattr(model, family.table).embedding
    np.testing.assert_array_equal(table[...], getattr(case.model, family.table).embedding[...])


@pytest.mark.wide
@pytest.mark.parametrize("family", [MISTRAL], ids=["mistral"])
def test_attention_of_a_mixtral(family, make_case, tmp_path):
    case = make_case(family, "3 experts, window of 7")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    folder = write_by_peft(family, case.folder, tmp_path, target_modules=targets)
    assert_as_by_peft(case, folder)


@pytest.mark.wide
@pytest.mark.parametrize("family", [MISTRAL], ids=["mistral"])
def test_a_router_and_experts_as_peft_wrote_them_before_they_were_fused(
    family, make_case, tmp_path
):
    case = make_case(family, "3 experts, window of 7")
    names = [f"model.layers.1.block_sparse_moe.{x}" for x in ("gate", "experts.2.w1")]
    write_adapter(tmp_path / "adapter", case.folder, names)
    write_merged(tmp_path / "merged", case.folder, names)
    expected = family.module.load(tmp_path / "merged")
    assert_same_model(family.module.load(tmp_path / "adapter"), expected)


# -------------------------------------------------------------------- how it is merged, by the file

RANK = 4


def matrices_for(shape):
    """A [r, in] and B [out, r] for a matrix [out, in]: integers, so that B A is exact."""
    rng = np.random.default_rng(sum(shape))
    A = rng.integers(-2, 3, (RANK, shape[1])).astype(np.float32)
    B = rng.integers(-2, 3, (shape[0], RANK)).astype(np.float32)
    return A, B


def is_conv1d(name: str) -> bool:
    """GPT-2 stores [in, out]."""
    return name.startswith("transformer.h.")


def write_adapter(folder, base, names, form="base_model.model.{}.lora_{}.weight", **settings):
    """An adapter for these matrices, by hand -> its tensors; the scale is 3."""
    folder.mkdir(exist_ok=True)
    stored = load_file(base / "model.safetensors")
    tensors = {}
    for name in names:
        matrix = stored[f"{name}.weight"]
        factors = matrices_for(matrix.T.shape if is_conv1d(name) else matrix.shape)
        for letter, factor in zip("AB", factors, strict=True):
            tensors[form.format(name, letter)] = factor
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 3 * RANK,
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def write_merged(folder, base, names):
    """The checkpoint that `write_adapter` should make of its base."""
    shutil.copytree(base, folder)
    stored = load_file(base / "model.safetensors")
    for name in names:
        matrix = stored[f"{name}.weight"]
        A, B = matrices_for(matrix.T.shape if is_conv1d(name) else matrix.shape)
        change = 3 * (B @ A)
        stored[f"{name}.weight"] = matrix + (change.T if is_conv1d(name) else change)
    save_file(stored, folder / "model.safetensors")


NAMES = ["transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc"]  # the first is square


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path):
    write_adapter(tmp_path / "adapter", base, NAMES)
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def merged(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    write_merged(folder, base, NAMES)
    return folder


def test_a_matrix_gets_three_times_b_a_and_all_else_stays_bit_for_bit(adapter, merged):
    assert_same_model(gpt2.load(adapter), gpt2.load(merged))


@pytest.mark.parametrize(
    "form",
    [
        "base_model.model.{}.lora_{}.default.weight",
        "{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.weight",
    ],
)
def test_names_of_tensors_have_a_prefix_and_the_adapters_name_or_not(base, merged, tmp_path, form):
    write_adapter(tmp_path, base, NAMES, form)
    assert_same_model(gpt2.load(tmp_path), gpt2.load(merged))


def test_an_adapter_of_a_bare_model_has_no_transformer_in_its_names(base, adapter, merged):
    tensors = load_file(adapter / "adapter_model.safetensors")
    bare = {name.replace("model.transformer.", "model."): t for name, t in tensors.items()}
    save_file(bare, adapter / "adapter_model.safetensors")
    assert_same_model(gpt2.load(adapter), gpt2.load(merged))


def test_adapter_model_bin_is_read_as_safetensors_are(adapter, merged):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, adapter / "adapter_model.bin")
    assert_same_model(gpt2.load(adapter), gpt2.load(merged))


def test_a_token_table_that_the_adapter_brings_whole_takes_the_place_of_the_base(base, adapter):
    file = adapter / "adapter_model.safetensors"
    table = load_file(base / "model.safetensors")["transformer.wte.weight"] + 1
    save_file(load_file(file) | {"base_model.model.transformer.wte.weight": table}, file)
    model = gpt2.load(adapter)
    np.testing.assert_array_equal(model.wte.embedding[...], table)
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once_after_the_sum(adapter, tmp_path, dtype):
    """Of W and of B A alone, each rounded, the sum would often differ in its last bit."""
    exact = state_of(gpt2.load(adapter, param_dtype="float32"))
    for path, value in state_of(gpt2.load(adapter, dtype=dtype)).items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, exact[path].astype(dtype), err_msg=path)


def test_a_base_in_half_precision_keeps_the_digits_of_the_adapter(base, tmp_path):
    """In float32 the merged weights are those of the base, which are bfloat16, plus B A in full."""
    half = tmp_path / "half"
    gpt2.save(gpt2.load(base, dtype="bfloat16"), half)
    wide = tmp_path / "wide"
    gpt2.save(gpt2.load(half, dtype="float32"), wide)
    write_adapter(tmp_path / "adapter", base, NAMES, lora_alpha=1.37)
    models = []
    for folder in (half, wide):
        edit_adapter(tmp_path / "adapter", base_model_name_or_path=str(folder))
        models.append(gpt2.load(tmp_path / "adapter", param_dtype="float32"))
    assert_same_model(*models)


def test_on_a_mesh_each_device_gets_its_part_of_the_merged_matrix(adapter):
    script = f"""
        import jax, numpy as np, gpt2
        from flax import nnx
        mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
        expected = nnx.state(gpt2.load({str(adapter)!r}))
        state = nnx.state(gpt2.load({str(adapter)!r}, mesh=mesh))
        jax.tree.map(np.testing.assert_array_equal, state, expected)
        kernel = state["h"][1]["mlp"]["c_fc"]["kernel"][...]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"}
    environment |= {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------- the base's own files


def edit_adapter(folder, **changes):
    """Changes entries of adapter_config.json; None takes one out."""
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize("name, here", [("base", "."), ("./base", "work"), ("../base", "adapter")])
def test_a_relative_base_is_looked_up_from_here_then_beside_the_adapter(
    base, adapter, merged, tmp_path, monkeypatch, name, here
):
    """A name that could be one on the Hub is no folder beside the adapter."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "work").mkdir()
    edit_adapter(adapter, base_model_name_or_path=name)
    monkeypatch.chdir(tmp_path / here)
    assert_same_model(gpt2.load(adapter), gpt2.load(merged))


def test_tokenizer_and_stop_ids_are_the_adapters_or_else_those_of_the_base(base, adapter, tmp_path):
    chat_base = tmp_path / "base"
    shutil.copytree(base, chat_base)
    (chat_base / "generation_config.json").write_text(json.dumps({"eos_token_id": [8]}))
    edit_adapter(adapter, base_model_name_or_path=str(chat_base))
    config = gpt2.read_config(adapter)
    assert config == gpt2.read_config(base)
    assert gpt2.tokenizer(adapter).encode("a b") == gpt2.tokenizer(base).encode("a b")
    assert gpt2.read_stop_ids(adapter, config) == [8]

    own = byte_tokenizer()
    own.add_tokens(["a b"])
    own.save(str(adapter / "tokenizer.json"))
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    assert gpt2.tokenizer(adapter).encode("a b") == [256]
    assert gpt2.read_stop_ids(adapter, config) == [7]


def test_a_chat_has_the_template_of_the_adapter_or_else_of_the_base(base, adapter, tmp_path):
    chat_base = tmp_path / "base"
    shutil.copytree(base, chat_base)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "base"}
    (chat_base / "tokenizer_config.json").write_text(json.dumps(about))
    edit_adapter(adapter, base_model_name_or_path=str(chat_base))
    for template in ("base", "own"):
        folder = gpt2.tokenizer_folder(adapter)
        chat = sample.ChatTokenizer(gpt2.tokenizer(adapter).backend, folder, None)
        assert chat.decode(chat.encode("hello")) == template
        shutil.copy(base / "tokenizer.json", adapter)
        about["chat_template"] = "own"
        (adapter / "tokenizer_config.json").write_text(json.dumps(about))


# ---------------------------------------------------------------------------------- what is refused


def refusal(folder) -> str:
    """The one line of `load`; read_config, which comes before any download, need not fail."""
    with pytest.raises(gpt2.InputError) as error:
        gpt2.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("peft_type", "IA3"),
        ("bias", "lora_only"),
        ("modules_to_save", ["wte"]),
        ("use_dora", True),
        ("lora_bias", True),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [5]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name_before_anything_is_read(adapter, key, value):
    edit_adapter(adapter, **{key: value, "base_model_name_or_path": "no/such-base"})
    assert f"adapter_config.json: {key} is {value!r}" in refusal(adapter)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"base_model_name_or_path": None}, ["has no base_model_name_or_path"]),
        ({"base_model_name_or_path": 3}, ["has no base_model_name_or_path"]),
        ({"base_model_name_or_path": "/gone/model"}, ["its base is missing", "/gone/model"]),
        ({"revision": [5]}, ["revision is [5]"]),
        ({"r": 0}, ["rank 0", NAMES[0]]),
        ({"r": None}, ["rank None"]),
        ({"r": 3}, ["do not fit rank 3"]),
        ({"lora_alpha": None}, ["lora_alpha None"]),
        ({"lora_alpha": "16"}, ["lora_alpha '16'"]),
        ({"rank_pattern": {"c_fc": 0}}, ["rank 0", NAMES[1]]),
        ({"rank_pattern": [1]}, ["rank_pattern is [1], not a JSON object"]),
        ({"alpha_pattern": {"(": 1}}, ["alpha_pattern has '('", "not a regular expression"]),
    ],
)
def test_an_adapter_config_that_lacks_or_garbles_a_value_is_refused(adapter, changes, parts):
    edit_adapter(adapter, **changes)
    for part in parts:
        assert part in refusal(adapter)


@pytest.mark.parametrize(
    "content, part", [("{", "is damaged"), ("[]", "not a JSON object"), ("", "it is empty")]
)
def test_a_damaged_adapter_config_is_refused(adapter, content, part):
    (adapter / "adapter_config.json").write_text(content)
    assert f"{adapter / 'adapter_config.json'}" in refusal(adapter) and part in refusal(adapter)


def test_an_adapter_file_that_is_missing_or_cut_off_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    for length in (1000, 100, 5):
        file.write_bytes(data[:length])
        assert f"{file} is damaged or cut short" in refusal(adapter)
    file.unlink()
    assert "no adapter_model.safetensors or adapter_model.bin" in refusal(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"PK")
    assert "adapter_model.bin is damaged or cut short" in refusal(adapter)


@pytest.mark.parametrize(
    "name, part",
    [
        ("base_model.model.transformer.h.9.mlp.c_fc.lora_A.weight", "only lora_A"),
        ("base_model.model.transformer.wte.lora_embedding_A", "wte.lora_embedding_A"),
        (f"base_model.model.{NAMES[0]}.lora_magnitude_vector", "c_proj.lora_magnitude_vector"),
        (f"base_model.model.{NAMES[0]}.lora_A.second.weight", "c_proj.lora_A.second.weight"),
    ],
)
def test_a_tensor_that_belongs_nowhere_is_named(adapter, name, part):
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {name: np.ones((RANK, 32), np.float32)}, file)
    assert part in refusal(adapter)


def test_an_adapter_of_another_model_is_refused(base, adapter, tmp_path):
    small = write_checkpoint(tmp_path / "small", n_embd=16)
    edit_adapter(adapter, base_model_name_or_path=str(small))
    assert "do not fit rank 4 and a matrix" in refusal(adapter)
    shallow = write_checkpoint(tmp_path / "shallow", n_layer=1)
    edit_adapter(adapter, base_model_name_or_path=str(shallow))
    assert "has no place, such as transformer.h.1.mlp.c_fc.weight" in refusal(adapter)


def test_a_file_without_adapters_is_refused(adapter):
    save_file({}, adapter / "adapter_model.safetensors")
    assert "has no adapters" in refusal(adapter)


def test_an_adapter_of_an_adapter_is_refused(base, adapter, tmp_path):
    write_adapter(tmp_path / "second", base, NAMES, base_model_name_or_path=str(adapter))
    assert f"{adapter}, which is an adapter, too: merge that one first" in refusal(
        tmp_path / "second"
    )
    edit_adapter(adapter, base_model_name_or_path=str(adapter))
    assert "which is an adapter, too" in refusal(adapter)


def test_the_programs_say_it_in_one_line(adapter, refused):
    edit_adapter(adapter, base_model_name_or_path="/gone/model")
    assert f"{adapter} is an adapter, and its base is missing" in refused("--weights", adapter)
    edit_adapter(adapter, use_dora=True)
    assert "use_dora is True" in refused("--weights", adapter)


# -------------------------------------------------------------------------------------- in programs


def run(program, *options, cwd):
    """Runs a program in another working directory than the project's -> its standard output."""
    command = [sys.executable, str(ROOT / program), *map(str, options), "--device", "cpu"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sample_writes_the_text_of_the_merged_checkpoint(adapter, merged, tmp_path):
    options = ["--prompt", "abc", "--temperature", 0, "--max-new-tokens", 20]
    texts = [
        run("sample.py", "--weights", folder, *options, cwd=tmp_path)
        for folder in ("adapter", merged)  # the model is found by the base's config.json
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 10


@pytest.mark.wide
def test_bench_measures_an_adapter_and_shows_a_merged_copy_to_others(adapter, tmp_path):
    options = ["--weights", adapter, "--runs", 1, "--new-tokens", 8]
    stdout = run("bench.py", "--task", "decode,validate", *options, cwd=tmp_path)
    assert "| decode" in stdout
    assert re.search(r"greedy tokens +\| +8 \| of 8 the same", stdout)


def test_the_stop_ids_of_the_base_stay_with_what_is_trained_from_its_adapter(
    base, adapter, tmp_path
):
    """Even if the adapter has a tokenizer of its own."""
    chat_base = tmp_path / "base"
    shutil.copytree(base, chat_base)
    (chat_base / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    edit_adapter(adapter, base_model_name_or_path=str(chat_base))
    shutil.copy(base / "tokenizer.json", adapter)

    args = Namespace(out=tmp_path / "out", merge=False, save_dtype="float32", prune=None)
    args.out.mkdir()
    data = Namespace(tokenizer_folder=gpt2.tokenizer_folder(adapter), template=None)
    assert data.tokenizer_folder == adapter
    run = Namespace(args=args, data=data, model_file=gpt2, adapters={})
    train.write_model(run, gpt2.load(adapter))
    assert gpt2.read_stop_ids(args.out, gpt2.read_config(args.out)) == [7, 8]
    assert_same_model(gpt2.load(args.out), gpt2.load(adapter))
