"""GGUF files: they give the model, tokenizer and stop ids of the checkpoint they were made from."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers import families
from helpers.reference import MATERIAL, ROOT, Case, assert_same_model, write_random
from helpers.small import SIZES_FOR_GGUF
from safetensors.numpy import load_file, save_file
from test_sentencepiece import PUBLISHED, texts_without_special_tokens
from test_tokenizer import TEXTS, long_texts
from tokenizers import Tokenizer

import gpt2
import llama
import mistral
import opt
import sample

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from helpers import gguf_files  # noqa: E402
from helpers.gguf_files import write_gguf  # noqa: E402

SIZES = {
    **SIZES_FOR_GGUF,
    "vocab_size": 80,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
THETA = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA_31 = {"rope_theta": 500000.0, **dict(llama.LLAMA31["rope_scaling"])}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"sliding_window": 16}
CONFIGS = {  # name -> (family, class in transformers, what its config has beside SIZES)
    "gpt2": (
        families.GPT2,
        transformers.GPT2Config,
        {"n_inner": 96, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "llama": (families.LLAMA, transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "llama with biases": (
        families.LLAMA,
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {**THETA, "rope_theta": 5e5}},
    ),
    "llama, linear": (
        families.LLAMA,
        transformers.LlamaConfig,
        {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}},
    ),
    "llama 3.1": (
        families.LLAMA,
        transformers.LlamaConfig,
        {"max_position_embeddings": 16384, "rope_parameters": LLAMA_31},
    ),
    "smollm3": (families.LLAMA, transformers.SmolLM3Config, {"num_hidden_layers": 5}),
    "granite": (
        families.LLAMA,
        transformers.GraniteConfig,
        {
            "embedding_multiplier": 12,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.05,
            "logits_scaling": 8,
            "tie_word_embeddings": False,
        },
    ),
    "mistral": (families.MISTRAL, transformers.MistralConfig, {"sliding_window": None}),
    "mixtral": (
        families.MISTRAL,
        transformers.MixtralConfig,
        {"num_local_experts": 4, "sliding_window": None, "tie_word_embeddings": False},
    ),
    "gemma": (families.GEMMA, transformers.GemmaConfig, {}),
    "gemma2": (
        families.GEMMA,
        transformers.Gemma2Config,
        {**WINDOW, "query_pre_attn_scalar": 32, "final_logit_softcapping": 20.0},
    ),
    "gemma3": (
        families.GEMMA,
        transformers.Gemma3TextConfig,
        {**WINDOW, "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
    ),
    "gemma3, linear": (
        families.GEMMA,
        transformers.Gemma3TextConfig,
        {
            **WINDOW,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "llama, yarn": (families.LLAMA, transformers.LlamaConfig, {"rope_parameters": YARN}),
    "qwen2": (families.QWEN, transformers.Qwen2Config, {}),
    "qwen3": (families.QWEN, transformers.Qwen3Config, {"tie_word_embeddings": False}),
    "qwen3, yarn": (families.QWEN, transformers.Qwen3Config, {"rope_parameters": YARN}),
    "qwen3_moe": (
        families.QWEN,
        transformers.Qwen3MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
}
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
IDS = [("tokenizer.ggml.bos_token_id", 1), ("tokenizer.ggml.eos_token_id", 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(name of a config) -> (family, its folder with random weights); the same one every time."""
    made = {}

    def make(name):
        if name not in made:
            family, config_class, changes = CONFIGS[name]
            sizes = SIZES | changes
            if name == "gpt2":
                names = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
                names |= {"hidden_size": "n_embd", "max_position_embeddings": "n_positions"}
                wanted = [*names, "n_inner", "vocab_size", "bos_token_id", "eos_token_id"]
                sizes = {names.get(key, key): sizes[key] for key in wanted}
            folder = tmp_path_factory.mktemp("checkpoint")
            made[name] = family, write_random(family, config_class(**sizes), folder)
        return made[name]

    return make


def dequantized(folder, to, kind):
    """A copy of a checkpoint whose weights are what its GGUF file of this kind can hold."""
    shutil.copytree(folder, to)
    values = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if values.get("tie_word_embeddings", True):
        tensors.pop("lm_head.weight", None)
    for name, tensor in tensors.items():
        conv1d = ".c_" in name and tensor.ndim == 2
        if conv1d:
            tensor = tensor.T
        if tensor.ndim == 2 and "wpe" not in name and ".gate." not in name:
            wanted = gguf.GGMLQuantizationType[kind]
            quantized = gguf.quants.quantize(np.ascontiguousarray(tensor), wanted)
            tensor = gguf.quants.dequantize(quantized, wanted)
        if tensor.ndim == 1 and values["model_type"].startswith("gemma"):
            tensor = (tensor + 1) - 1  # it is rounded
        tensors[name] = np.ascontiguousarray(tensor.T if conv1d else tensor)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


# ------------------------------------------------------------------------------------ the weights


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_the_model_is_that_of_the_dequantized_checkpoint(checkpoint, name, kind, tmp_path):
    family, folder = checkpoint(name)
    file = write_gguf(folder, tmp_path / "model.gguf", kind, metadata=IDS)
    expected = family.module.load(dequantized(folder, tmp_path / "folder", kind))
    assert_same_model(family.module.load(file), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_numbers_is_widened_as_by_the_package(checkpoint, kind, tmp_path):
    _, folder = checkpoint("llama")
    file = write_gguf(folder, tmp_path / "model.gguf", kind, metadata=IDS)
    expected = llama.load(dequantized(folder, tmp_path / "folder", kind))
    assert_same_model(llama.load(file), expected)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "smollm3", "granite", "mixtral", "gemma3", "qwen3_moe"]
)
def test_the_logits_are_those_of_transformers_on_the_same_weights(checkpoint, name, tmp_path):
    family, folder = checkpoint(name)
    file = write_gguf(folder, tmp_path / "model.gguf", "Q4_0", metadata=IDS)
    case = Case(family, dequantized(folder, tmp_path / "folder", "Q4_0"))
    case.kept["model"] = family.module.load(file)
    case.assert_close("stream")


def test_a_file_says_which_layers_of_a_gemma_3_attend_to_all_tokens(checkpoint, tmp_path):
    """Each sixth where it does not, as in the published ones."""
    family, folder = checkpoint("gemma3")
    for period, expected in [(None, "SSSSSFS"), (3, "SSFSSFS")]:
        pattern = ("gemma3.attention.sliding_window_pattern", period)
        metadata = [*IDS, *([pattern] if period else [])]
        file = write_gguf(folder, tmp_path / "model.gguf", "F32", metadata=metadata)
        kinds = family.module.read_config(file).layer_types
        assert "".join(kind[0].upper() for kind in kinds) == expected


def test_experts_may_lie_one_by_one_as_in_old_files(checkpoint, tmp_path):
    _, folder = checkpoint("mixtral")
    file = write_gguf(folder, tmp_path / "stacked.gguf", "Q8_0")
    old = write_gguf(folder, tmp_path / "old.gguf", "Q8_0", one_by_one=True)
    assert_same_model(mistral.load(old), mistral.load(file))


def test_weights_can_be_held_in_int8(checkpoint, tmp_path):
    _, folder = checkpoint("llama")
    file = write_gguf(folder, tmp_path / "model.gguf", "Q4_0", metadata=IDS)
    expected = llama.load(dequantized(folder, tmp_path / "folder", "Q4_0"), quantize="int8")
    model = llama.load(file, quantize="int8")
    assert llama.quantized_as(model) == "int8"
    assert_same_model(model, expected)


def test_only_one_tensor_at_a_time_is_widened(checkpoint, tmp_path, monkeypatch):
    """Nothing is read before it is asked for."""
    _, folder = checkpoint("llama")
    file = write_gguf(folder, tmp_path / "model.gguf", "Q8_0")
    widened = []
    dequantize = gguf.quants.dequantize

    def watched(data, kind):
        widened.append(data.size)
        return dequantize(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", watched)
    stored = llama.stored_tensors(file)
    assert max(widened) <= 34  # a block, to see whether the package knows the kind
    widened.clear()
    stored["model.layers.1.mlp.up_proj.weight"]()
    assert widened == [96 * 64 // 32 * 34]


def test_a_saved_folder_holds_the_same_model(checkpoint, tmp_path):
    _, folder = checkpoint("gemma2")
    file = write_gguf(folder, tmp_path / "model.gguf", "Q8_0", metadata=IDS)
    module = families.GEMMA.module
    model = module.load(file)
    module.save(model, tmp_path / "saved")
    assert_same_model(module.load(tmp_path / "saved"), model)


# ------------------------------------------------------------------------------------- the config


def test_a_mistral_without_experts_is_read_by_llama_py_too(checkpoint, tmp_path):
    _, folder = checkpoint("mistral")
    file = write_gguf(folder, tmp_path / "model.gguf", "F16", metadata=IDS)
    tokens = jnp.arange(24)[None]
    np.testing.assert_allclose(
        llama.load(file)(tokens), mistral.load(file)(tokens), rtol=1e-5, atol=1e-5
    )  # each file rounds RoPE's frequencies in its own way


def test_the_config_of_a_smollm3_and_of_a_granite_is_that_of_the_folder(checkpoint, tmp_path):
    """llama.cpp's files do not say which layers of a SmolLM3 have no RoPE; it goes by the kind."""
    for name in ("smollm3", "granite"):
        _, folder = checkpoint(name)
        file = write_gguf(folder, tmp_path / f"{name}.gguf", "F16", metadata=IDS)
        assert llama.read_config(file) == llama.read_config(folder)


def test_a_granite_lacks_a_multiplier_where_llama_cpp_has_its_own(checkpoint, tmp_path):
    """Its scores are then divided by the square root of a head's width, as in a Llama."""
    _, folder = checkpoint("llama")
    values = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(json.dumps(values | {"model_type": "granite"}))
    file = write_gguf(tmp_path / "folder", tmp_path / "model.gguf", "F16", metadata=IDS)
    config = llama.read_config(file)
    assert config.attention_multiplier == config.head_dim**-0.5
    assert config.embedding_multiplier == config.residual_multiplier == config.logits_scaling == 1


def test_a_granite_without_rope_is_refused(checkpoint, tmp_path):
    """llama.cpp's switch for it; files of Granite 4 have it."""
    _, folder = checkpoint("granite")
    metadata = [("granite.rope.scaling.finetuned", False)]
    file = write_gguf(folder, tmp_path / "model.gguf", "F16", metadata=metadata)
    with pytest.raises(llama.InputError, match=r"scaling\.finetuned is False"):
        llama.read_config(file)


def test_the_models_of_27b_scale_scores_by_the_share_of_a_head(checkpoint, tmp_path):
    """llama.cpp's files do not say it; it goes by the number of layers."""
    family, folder = checkpoint("gemma2")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 46
    config.layer_types = None
    config = type(config).from_dict(config.to_dict())
    write_random(family, config, tmp_path / "deep")
    file = write_gguf(tmp_path / "deep", tmp_path / "model.gguf", "F16")
    assert family.module.read_config(file).query_pre_attn_scalar == 64 / 4


def test_a_gemma_3_without_a_window_attends_to_all(checkpoint, tmp_path, monkeypatch):
    family, folder = checkpoint("gemma3")
    monkeypatch.setattr(gguf.GGUFWriter, "add_sliding_window", lambda *_: None)
    file = write_gguf(folder, tmp_path / "model.gguf", "F16")
    assert set(family.module.read_config(file).layer_types) == {"full_attention"}


def test_rope_that_no_published_llama_has_is_refused(checkpoint, tmp_path, monkeypatch):
    _, folder = checkpoint("llama 3.1")
    divisors = gguf_files.llama3_divisors

    def other_bands(rope, head_dim):
        return divisors({**rope, "low_freq_factor": 2.0}, head_dim)

    monkeypatch.setattr(gguf_files, "llama3_divisors", other_bands)
    file = write_gguf(folder, tmp_path / "model.gguf", "F16")
    with pytest.raises(llama.InputError, match="scales RoPE in a way"):
        llama.load(file)


def test_the_stop_ids_are_eos_and_the_end_of_a_turn(checkpoint, tmp_path):
    _, folder = checkpoint("llama")
    file = write_gguf(folder, tmp_path / "a.gguf", "F16", metadata=IDS)
    assert llama.read_stop_ids(file, llama.read_config(file)) == [2]
    turns = [*IDS, ("tokenizer.ggml.eot_token_id", 7)]
    file = write_gguf(folder, tmp_path / "b.gguf", "F16", metadata=turns)
    assert llama.read_stop_ids(file, llama.read_config(file)) == [2, 7]


# ---------------------------------------------------------------------------------- the tokenizer


def bundled(name):
    return Tokenizer.from_file(str(ROOT / "tiny" / name / "tokenizer.json"))


@pytest.mark.parametrize("published", PUBLISHED)
def test_a_sentencepiece_tokenizer_gives_the_published_ids(checkpoint, published, tmp_path):
    module, source = PUBLISHED[published]
    if not (MATERIAL / source).exists():
        pytest.skip(f"the tokenizer of {published} is not at hand")
    _, folder = checkpoint("llama")
    made = gguf_files.sentencepiece(MATERIAL / source)
    file = write_gguf(folder, tmp_path / "model.gguf", "F16", tokenizer=made)

    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(MATERIAL / source, old / "tokenizer.model")
    reference = module.tokenizer(old)
    codec = module.tokenizer(file)
    for text in texts_without_special_tokens():
        ids = reference.encode(text)
        assert codec.encode(text) == ids, text[:60]
        assert codec.decode(ids) == text
    assert codec.encode("</s>")[-1] == 2  # as the text of a special token in a tokenizer.json


def test_the_tokenizer_of_gpt2_gives_the_published_ids(checkpoint, tmp_path):
    source = MATERIAL / "gpt2-tokenizer"
    if not source.exists():
        pytest.skip("the tokenizer of GPT-2 is not at hand")
    shutil.copy(source / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(source / "vocab.bpe", tmp_path / "merges.txt")
    reference = gpt2.tokenizer(tmp_path)
    _, folder = checkpoint("gpt2")
    made = gguf_files.byte_level(reference.backend, bos=50256, eos=50256)
    file = write_gguf(folder, tmp_path / "model.gguf", "F16", tokenizer=made)
    codec = gpt2.tokenizer(file)
    for text in [*TEXTS, *long_texts(), "One text.<|endoftext|>Another"]:
        ids = reference.encode(text)
        assert codec.encode(text) == ids, text[:60]
        assert codec.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "in 2026 DON'T", ["in", "Ġ2026", "ĠDON", "'", "T"]),
        ("smollm", "in 2026 DON'T", ["in", "Ġ", "2", "0", "2", "6", "ĠDON", "'", "T"]),
        ("refact", "in 2026 DON'T", ["in", "Ġ", "2", "0", "2", "6", "ĠDON", "'", "T"]),
        ("llama-bpe", "in 2026 DON'T", ["in", "Ġ", "202", "6", "ĠDON", "'T"]),
        ("smaug-bpe", "in 2026 DON'T", ["in", "Ġ", "202", "6", "ĠDON", "'T"]),
        ("tekken", "in 2026 DON'T", ["in", "Ġ", "2", "0", "2", "6", "ĠDON", "'T"]),
    ],
)
def test_a_text_is_cut_into_words_as_the_file_says(checkpoint, pre, text, words, tmp_path):
    _, folder = checkpoint("llama")
    made = gguf_files.byte_level(bundled("llama"), pre, bos=1)
    file = write_gguf(folder, tmp_path / "model.gguf", "F16", tokenizer=made)
    codec = llama.tokenizer(file)
    cut = codec.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in cut] == words
    begin = [1] if pre == "llama-bpe" else []  # Llama 3's files do not say that it has one
    ids = codec.encode(text)
    assert ids[: len(begin)] == begin
    assert codec.decode(ids[len(begin) :]) == text


@pytest.mark.parametrize("add", [True, False])
def test_a_text_begins_and_ends_as_the_file_says(checkpoint, add, tmp_path):
    _, folder = checkpoint("llama")
    flags = [(f"tokenizer.ggml.add_{role}_token", add) for role in ("bos", "eos")]
    made = gguf_files.byte_level(bundled("llama"), "llama-bpe", bos=5, eos=6)
    file = write_gguf(folder, tmp_path / "m.gguf", "F16", tokenizer=made, metadata=flags)
    plain = bundled("llama").encode("To be").ids
    assert llama.tokenizer(file).encode("To be") == ([5, *plain, 6] if add else plain)


def test_added_tokens_are_not_cut(checkpoint, tmp_path):
    """A special one has no text; blanks that Gemma's file spells out are a token of their own."""
    source = MATERIAL / "llama2-tokenizer" / "tokenizer.model"
    if not source.exists():
        pytest.skip("the tokenizer of Llama 2 is not at hand")
    _, folder = checkpoint("llama")
    added = [("<|im_end|>", gguf_files.CONTROL), ("     ", gguf_files.USER_DEFINED)]
    added += [("[PAD1]", gguf_files.UNUSED)]
    made = gguf_files.sentencepiece(source, added)
    no_blank = [("tokenizer.ggml.add_space_prefix", False)]
    file = write_gguf(folder, tmp_path / "m.gguf", "F16", tokenizer=made, metadata=no_blank)
    codec = llama.tokenizer(file)
    ids = codec.encode("a<|im_end|>     a[PAD1]")
    assert ids[:5] == [1, 29874, 32000, 32001, 29874]
    assert codec.decode(ids) == "a     a[PAD1]"


# ------------------------------------------------------------------------------------ the programs


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """A file that can be read."""
    _, folder = checkpoint("llama")
    file = tmp_path_factory.mktemp("whole") / "model.gguf"
    made = gguf_files.byte_level(bundled("llama"), bos=1, eos=2)
    return write_gguf(folder, file, "Q8_0", tokenizer=made)


@pytest.fixture
def chatty(tmp_path):
    """tiny/llama-instruct as a GGUF file, with its chat template."""
    folder = ROOT / "tiny" / "llama-instruct"
    template = (folder / "chat_template.jinja").read_text()
    end = bundled("llama-instruct").token_to_id("<|endoftext|>")
    made = gguf_files.byte_level(bundled("llama-instruct"), bos=end, eos=end)
    return write_gguf(
        folder,
        tmp_path / "chat.gguf",
        "F32",
        tokenizer=made,
        metadata=[("tokenizer.chat_template", template)],
    )


def run_sample(monkeypatch, capsys, *options):
    """What sample.py prints."""
    command = ["sample.py", "--compile-cache", "off", *map(str, options)]
    monkeypatch.setattr(sys, "argv", command)
    sample.main()
    jax.config.update("jax_default_device", None)
    return capsys.readouterr().out


def test_sample_py_continues_a_text(chatty, monkeypatch, capsys):
    options = ["the capital of", "--temperature", 0, "--max-new-tokens", 10, "--weights"]
    expected = run_sample(monkeypatch, capsys, *options, ROOT / "tiny" / "llama-instruct")
    assert run_sample(monkeypatch, capsys, *options, chatty) == expected
    assert run_sample(monkeypatch, capsys, *options, chatty.parent) == expected


def test_a_chat_follows_the_template_in_the_file(chatty):
    made = [
        sample.ChatTokenizer(llama.tokenizer(source).backend, source, None)
        for source in (chatty, ROOT / "tiny" / "llama-instruct")
    ]
    ids, expected = [codec.encode("What is the capital of France?") for codec in made]
    assert ids == expected
    assert sample.has_chat_template(llama, chatty)


def test_a_file_without_a_template_is_no_chat(whole, refused):
    assert "model.gguf has no chat template" in refused("Hello", "--weights", whole, "--chat")


# ---------------------------------------------------------------------------- what cannot be read


@pytest.fixture
def rewritten(checkpoint, tmp_path):
    """Writes the file again, with something changed."""

    def write(**options):
        _, folder = checkpoint("llama")
        made = gguf_files.byte_level(bundled("llama"), options.pop("pre", "gpt-2"))
        return write_gguf(folder, tmp_path / "model.gguf", tokenizer=made, **options)

    return write


@pytest.mark.parametrize("share", [0, 1e-4, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_a_file_that_is_cut_short_is_one_line(whole, share, tmp_path, refused):
    data = whole.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    assert "cut short" in refused("a", "--weights", tmp_path / "cut.gguf")


@pytest.mark.filterwarnings("ignore:invalid value")  # of scales that are damaged
def test_a_damaged_file_is_an_input_error_or_loads(whole, tmp_path):
    """Any byte before the data may be wrong; none makes the reader hang or fail otherwise."""
    data = whole.read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, 15000, 3):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            llama.load(tmp_path / "damaged.gguf")
            llama.tokenizer(tmp_path / "damaged.gguf")
        except llama.InputError:
            refusals += 1
    assert refusals > 50


def test_what_is_no_gguf_file_is_refused(tmp_path, refused):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    line = refused("a", "--weights", tmp_path / "a.gguf")
    assert "(GGUF magic invalid): download it again" in line
    (tmp_path / "b.gguf").write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(100))
    line = refused("a", "--weights", tmp_path / "b.gguf")
    assert "file appears to be version 1 which we cannot handle" in line
    assert "there is no file" in refused("a", "--weights", tmp_path / "c.gguf")


def test_another_architecture_is_refused(whole, tmp_path, refused):
    (tmp_path / "a.gguf").write_bytes(whole.read_bytes().replace(b"\0llama", b"\0gecko", 0))
    other = whole.read_bytes().replace(b"llama", b"gecko")
    (tmp_path / "a.gguf").write_bytes(other)
    assert "is of model_type 'gecko'" in refused("a", "--weights", tmp_path / "a.gguf")
    assert "is of the architecture 'gecko'" in refused(
        "a", "--model", "llama", "--weights", tmp_path / "a.gguf"
    )
    assert "llama.py reads: --model llama" in refused("a", "--model", "gpt2", "--weights", whole)


def test_opt_py_reads_none(whole):
    with pytest.raises(opt.InputError, match="has no such model"):
        opt.load(whole)


def test_a_kind_of_numbers_that_the_package_cannot_widen_is_refused(whole, tmp_path, refused):
    """Of the one kind that it has a name for, and of one that it does not know at all."""
    data = whole.read_bytes()
    at = data.index(b"blk.0.attn_k.weight") + len("blk.0.attn_k.weight") + 4 + 16
    assert data[at] == gguf.GGMLQuantizationType.Q8_0
    for kind, said in [
        (gguf.GGMLQuantizationType.I32, "blk.0.attn_k.weight is of kind I32, which"),
        (99, "99) is not a valid GGMLQuantizationType"),
    ]:
        (tmp_path / "a.gguf").write_bytes(data[:at] + bytes([kind]) + data[at + 1 :])
        line = refused("a", "--weights", tmp_path / "a.gguf")
        assert said in line


def test_rope_scaling_of_another_kind_is_refused(rewritten, refused):
    longrope = [("llama.rope.scaling.type", "longrope"), ("llama.rope.scaling.factor", 2.0)]
    line = refused("a", "--weights", rewritten(metadata=longrope))
    assert "model.gguf: its metadata: rope_type is 'longrope', but llama.py supports only" in line


def test_a_part_of_a_file_is_refused(rewritten, refused):
    file = rewritten(metadata=[("split.count", 3)])
    assert "is one of 3 parts" in refused("a", "--weights", file)


def test_a_tokenizer_of_another_kind_is_refused(rewritten, refused):
    file = rewritten(pre="gpt-9")
    assert "cuts a text into words as 'gpt-9' does" in refused("a", "--weights", file)


def test_a_folder_with_several_files_is_refused(whole, tmp_path, refused):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(whole, tmp_path / name)
    assert "holds 2 GGUF files: name one of a.gguf, b.gguf" in refused("a", "--weights", tmp_path)


def test_without_the_package_a_line_says_what_to_install(whole, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused("a", "--weights", whole)
