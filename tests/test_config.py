"""Config.from_hf: what a config.json means, key by key, as transformers reads it."""

import importlib
import json
import re

import pytest
import torch
import transformers
from helpers.families.gemma import GEMMA3
from helpers.families.rotary import SMALL

import gemma
import llama
import mistral
import qwen
import sample

KINDS = {
    "gpt2": ("gpt2", transformers.GPT2Config),
    "opt": ("opt", transformers.OPTConfig),
    "llama": ("llama", transformers.LlamaConfig),
    "smollm3": ("llama", transformers.SmolLM3Config),
    "granite": ("llama", transformers.GraniteConfig),
    "gemma": ("gemma", transformers.GemmaConfig),
    "gemma2": ("gemma", transformers.Gemma2Config),
    "gemma3_text": ("gemma", transformers.Gemma3TextConfig),
    "mistral": ("mistral", transformers.MistralConfig),
    "mixtral": ("mistral", transformers.MixtralConfig),
    "ministral": ("mistral", transformers.MinistralConfig),
    "ministral3": ("mistral", transformers.Ministral3Config),
    "qwen2": ("qwen", transformers.Qwen2Config),
    "qwen3": ("qwen", transformers.Qwen3Config),
    "qwen3_moe": ("qwen", transformers.Qwen3MoeConfig),
}
# Kept apart from the reference: OPT was trained from normal(0.006), as its paper says, and this is
# for training from scratch alone.
OUR_OWN = {"opt": {"init_std"}}


def meaning(kind, values):
    """The fields of Config for a config.json."""
    name, _ = KINDS[kind]
    config = importlib.import_module(name).Config.from_hf(values)
    fields = {key: getattr(config, key) for key in config.__dataclass_fields__}
    if kind == "opt":  # null means the same
        fields["word_embed_proj_dim"] = fields["word_embed_proj_dim"] or config.hidden_size
    return fields


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_left_out_means_what_transformers_takes_it_for(kind):
    """Each key alone, and all of them: a config.json of a model_type and nothing else."""
    _, config_class = KINDS[kind]
    reference = config_class().to_dict()
    expected = meaning(kind, reference)
    for keys in [*([key] for key in reference), reference]:
        left = {key: value for key, value in reference.items() if key not in keys}
        found = meaning(kind, {**left, "model_type": kind})
        unlike = {key for key in expected if found[key] != expected[key]}
        assert unlike <= OUR_OWN.get(kind, set()), keys


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("module", [llama, mistral, qwen])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"original_max_position_embeddings": 0}, "must be above 0"),
        ({"original_max_position_embeddings": "32"}, "is '32', not a number"),
        ({"beta_fast": -1}, "beta_fast of RoPE is -1, but must not be below 0"),
        ({"attention_factor": "1"}, "attention_factor of RoPE is '1', not a number"),
        ({"mscale": "1"}, "mscale of RoPE is '1', not a number"),
        ({"factor": float("inf")}, "factor of RoPE is inf, not a number"),
        ({"full_attention": {"rope_theta": 100}}, "full_attention of RoPE is"),
    ],
)
def test_yarn_with_an_odd_value_is_refused_before_it_is_computed_with(module, change, said):
    with pytest.raises(module.InputError, match=re.escape(said)) as error:
        module.Config.from_hf({"rope_scaling": YARN | change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("types", [None, ["full_attention", "sliding_attention"]])
def test_layer_types_mean_nothing_in_a_qwen_with_experts(types):
    """All its layers have the window, or none, as in the reference."""
    values = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "layer_types": types}
    assert set(qwen.Config.from_hf(values).layer_types) == {"full_attention"}
    values |= {"use_sliding_window": True, "sliding_window": 5}
    config = qwen.Config.from_hf(values)
    assert set(config.layer_types) == {"sliding_attention"}
    assert qwen.Config.from_hf(config.to_hf()) == config


def test_small_takes_further_fields_of_experts():
    sizes = {"layers": 1, "heads": 2, "width": 32, "context": 16, "experts": 8}
    for module in (mistral, qwen):
        assert module.Config.small(**sizes).num_experts_per_tok == 2
        assert module.Config.small(**sizes, num_experts_per_tok=4).num_experts_per_tok == 4


@pytest.mark.parametrize("experts", [0, None, 1])
def test_a_dense_qwen_may_say_anything_of_experts(experts):
    plain = qwen.Config.from_hf({"model_type": "qwen3"})
    assert qwen.Config.from_hf({"model_type": "qwen3", "num_experts": experts}) == plain


def rope_of_llama(scaling, **values):
    config = llama.Config.from_hf({"rope_scaling": scaling, **values})
    return dict(config.rope_scaling)


BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_rope_type_wins_where_an_older_type_disagrees():
    scaling = {"type": "dynamic", "rope_type": "linear", "factor": 2.0}
    assert rope_of_llama(scaling)["rope_type"] == "linear"
    with pytest.raises(mistral.InputError, match="rope_type is 'longrope'"):
        mistral.Config.from_hf({"rope_scaling": {"type": "default", "rope_type": "longrope"}})


def test_rope_scaling_wins_over_rope_parameters():
    """Files that were saved by several versions of transformers have both."""
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    rope = rope_of_llama({"type": "linear", "factor": 2.0}, rope_parameters=parameters)
    reference = transformers.LlamaConfig(
        rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=parameters
    )
    assert rope["factor"] == reference.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_scaled_rope_multiplies_the_context_length(kind):
    """transformers takes max_position_embeddings for the length before scaling, as vLLM does.

    Vicuna 16k has 4096 and a factor of 4. Dynamic frequencies of transformers show it: they change
    beyond max_position_embeddings.
    """
    scaling = {"rope_type": kind, "factor": 4.0}
    config = llama.Config.from_hf({"max_position_embeddings": 4096, "rope_scaling": scaling})
    assert config.max_position_embeddings == 16384
    assert config.to_hf()["max_position_embeddings"] == 4096
    assert llama.Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("first", [0, 1, 2, 3, 28])
def test_windows_of_a_qwen2_begin_at_the_layer_that_its_config_names(first):
    """Published files have max_window_layers; layer_types came later."""
    values = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5}
    values |= {"model_type": "qwen2", "max_window_layers": first}
    config = qwen.Config.from_hf(values)
    assert config.layer_types == tuple(transformers.Qwen2Config(**values).layer_types)
    switched_off = qwen.Config.from_hf({**values, "use_sliding_window": False})
    assert switched_off.sliding_window is None
    assert set(switched_off.layer_types) == {"full_attention"}


@pytest.mark.parametrize("stated", [4096, 16384])
def test_yarn_extends_the_context_whichever_length_a_file_states(stated):
    """Qwen2.5 has the trained length in max_position_embeddings, Yarn-Llama-2 the scaled one."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    config = llama.Config.from_hf({"max_position_embeddings": stated, "rope_scaling": scaling})
    assert config.max_position_embeddings == 16384
    assert llama.Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("values", "original"),
    [
        ({}, 4096),
        ({"original_max_position_embeddings": 512}, 512),
    ],
)
def test_llama3_without_its_original_context_takes_that_of_the_model(values, original):
    values = {"max_position_embeddings": 4096, **values}
    rope = rope_of_llama({"rope_type": "llama3", **BANDS}, **values)
    reference = transformers.LlamaConfig(rope_scaling={"rope_type": "llama3", **BANDS}, **values)
    reference.standardize_rope_params()  # as it does again where it computes the frequencies
    expected = reference.rope_parameters["original_max_position_embeddings"]
    assert rope["original_max_position_embeddings"] == expected == original


@pytest.mark.parametrize(
    ("module", "values", "said"),
    [
        (llama, {"rope_scaling": {"rope_type": "linear"}}, "type linear lacks factor"),
        (llama, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        (llama, {"rope_scaling": {"rope_type": "yarn"}}, "type yarn lacks factor"),
        (llama, {"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        (llama, {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor of RoPE is '4'"),
        (llama, {"rope_scaling": {"rope_type": "linear", "factor": [4]}}, "factor of RoPE is"),
        (llama, {"rope_scaling": {"rope_type": "yarn", "factor": -2}}, "-2, but must be above 0"),
        (llama, {"rope_theta": 0}, "rope_theta is 0, but must be above 0"),
        (llama, {"rope_theta": float("nan")}, "rope_theta is nan, not a number"),
        (llama, {"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0, but must be"),
        (gemma, {"model_type": "gemma", "rope_theta": -1.0}, "rope_theta is -1.0, but must be"),
        (llama, {"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn"}}, "is 'qwen2'"),
        (llama, {"model_type": "granitemoe"}, "model_type is 'granitemoe'"),
        (llama, {"model_type": "granitemoehybrid"}, "model_type is 'granitemoehybrid'"),
        (
            llama,
            {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 512},
            "use_sliding_window is True",
        ),
        (
            llama,
            {"model_type": "smollm3", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is 'sliding_attention'",
        ),
        (
            llama,
            {"model_type": "smollm3", "no_rope_layers": [1, 0], "num_hidden_layers": 3},
            "no_rope_layers has 2 entries, but num_hidden_layers is 3",
        ),
        (llama, {"model_type": "smollm3", "no_rope_layers": [2] * 36}, "no_rope_layers is 2"),
        (llama, {"model_type": "smollm3", "no_rope_layer_interval": 0}, "must be 1 or more"),
        (qwen, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        (
            qwen,
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "has sliding layers, but no sliding_window",
        ),
        (qwen, {"model_type": "qwen3_moe", "num_experts": 4}, "8 is more than num_experts 4"),
        (gemma, {"model_type": "paligemma", "text_config": {"model_type": "gemma"}}, "paligemma"),
        (gemma, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (gemma, {"model_type": "gemma2", "rope_scaling": {"type": "linear"}}, "lacks factor"),
        (gemma, {"model_type": "gemma4", "rope_scaling": {"rope_type": "yarn"}}, "is 'gemma4'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(module, values, said):
    with pytest.raises(module.InputError, match=said) as error:
        module.Config.from_hf(values)
    assert "\n" not in str(error.value)


def test_multipliers_and_layers_without_rope_mean_something_in_their_model_type_alone():
    """A Llama's config.json may have such keys; transformers does not read them."""
    keys = {
        "no_rope_layers": [0] * 32,
        "no_rope_layer_interval": 2,
        "embedding_multiplier": 12,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.05,
        "logits_scaling": 8,
    }
    plain = llama.Config.from_hf({"model_type": "llama"})
    assert llama.Config.from_hf({"model_type": "llama", **keys}) == plain
    assert not keys.keys() & plain.to_hf().keys()
    smol = llama.Config.from_hf({"model_type": "smollm3", **keys, "num_hidden_layers": 32})
    assert smol.no_rope_layers == (0,) * 32 and smol.logits_scaling == 1
    granite = llama.Config.from_hf({"model_type": "granite", **keys})
    assert granite.logits_scaling == 8 and granite.no_rope_layers is None


def test_a_multiplier_that_would_not_be_saved_is_refused():
    with pytest.raises(llama.InputError, match="residual_multiplier has no meaning"):
        llama.Config.small(layers=1, heads=2, width=32, context=16, residual_multiplier=0.5)


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 9])
def test_every_so_many_layers_one_has_no_rope(interval):
    """Of a SmolLM3 whose config.json does not list them."""
    values = {"num_hidden_layers": 8, "no_rope_layer_interval": interval}
    expected = transformers.SmolLM3Config(**values).no_rope_layers
    config = llama.Config.from_hf({"model_type": "smollm3", **values})
    assert config.no_rope_layers == tuple(expected)
    assert [config.has_rope(layer) for layer in range(8)] == [x == 1 for x in expected]


def test_a_smollm3_may_list_more_layers_than_it_has():
    """As transformers allows; the others mean nothing."""
    values = {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [0, 1, 0, 1]}
    assert llama.Config.from_hf(values).no_rope_layers == (0, 1, 0)


def test_a_smollm3_may_name_a_window_that_it_does_not_use():
    values = {"model_type": "smollm3", "sliding_window": 512, "use_sliding_window": False}
    assert llama.Config.from_hf(values) == llama.Config.from_hf({"model_type": "smollm3"})


@pytest.mark.parametrize("which", ["whole", "text"])
@pytest.mark.parametrize("kind", ["gemma3n", "gemma4", "gemma4_unified"])
def test_gemma_3n_and_4_are_refused_by_name(kind, which, tmp_path):
    """Multimodal checkpoints, and their text models alone, as transformers writes them.

    They share names of tensors with Gemma 3, but not its architecture.
    """
    config = transformers.CONFIG_MAPPING[kind]()
    if which == "text":
        config = config.text_config
    config.save_pretrained(tmp_path)
    said = f"model_type is '{config.model_type}', but gemma.py supports only"

    with pytest.raises(gemma.InputError, match=said):
        gemma.Config.from_hf(config.to_dict())
    with pytest.raises(gemma.InputError, match=said) as error:
        gemma.load(tmp_path)
    assert "\n" not in str(error.value)
    assert config.model_type not in sample.KINDS


def test_gemma_3_caps_no_attention_scores_whatever_its_config_says():
    """So does transformers: the same weights make the same logits."""
    sizes = SMALL | GEMMA3 | {"pad_token_id": 0}
    logits = []
    for cap in (None, 0.1):
        torch.manual_seed(0)
        config = transformers.Gemma3TextConfig(**sizes, attn_logit_softcapping=cap)
        reference = transformers.Gemma3ForCausalLM(config).eval()
        logits.append(reference(torch.arange(20)[None]).logits.detach())
        assert gemma.Config.from_hf(config.to_dict()).attn_logit_softcapping is None
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_a_multimodal_gemma_3_is_read_as_its_text_model():
    text = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 3}
    expected = gemma.Config.from_hf(text)
    assert gemma.Config.from_hf({"model_type": "gemma3", "text_config": text}) == expected
    assert gemma.Config.from_hf({"model_type": "gemma3", "text_config": None}).hidden_size == 2304


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"hidden_size": 32, "rms_norm_eps": 0.5, "sliding_window": 3},
        {"use_bidirectional_attention": True},
        {"text_config": {"tie_word_embeddings": False}},
        {"text_config": {"final_logit_softcapping": 3.0}},
    ],
    ids=str,
)
def test_of_a_multimodal_gemma_3_only_text_config_describes_the_text_model(values):
    """So does transformers, which takes from outside whether the head is tied, and caps nothing."""
    plain = gemma.Config.from_hf({"model_type": "gemma3"})
    assert gemma.Config.from_hf({"model_type": "gemma3", **values}) == plain


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"is_causal": False}, "is_causal is False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized .fp8."),
    ],
)
def test_what_text_config_asks_for_and_is_not_supported_is_refused(values, said):
    with pytest.raises(gemma.InputError, match=said):
        gemma.Config.from_hf({"model_type": "gemma3", "text_config": values})


def test_layer_types_make_a_mistral_a_ministral(tmp_path):
    """So Ministral 8B is published, and transformers' AutoConfig reads it so, too."""
    values = {
        "model_type": "mistral",
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "ministral"
    config = mistral.Config.from_hf(values)
    assert config.model_type == "ministral"
    assert config.layer_types == (mistral.FULL, mistral.SLIDING)
    config = mistral.Config.from_hf({**values, "layer_types": None})
    assert config.layer_types == (mistral.SLIDING,) * 2


def meaning_of_text(values):
    """The text model that transformers sees in a multimodal Mistral, and whether its head is tied;
    read as if it were alone."""
    whole = transformers.Mistral3Config(**values)
    text = whole.text_config.to_dict() | {"tie_word_embeddings": whole.tie_word_embeddings}
    if text["model_type"] == "mistral":
        text.pop("layer_types", None)  # not read in here
    return mistral.Config.from_hf(text)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"text_config": None},
        {"text_config": {}},
        {"text_config": {"hidden_size": 64, "num_hidden_layers": 3}},
        {"text_config": {"model_type": "ministral3", "num_hidden_layers": 3}},
        {"text_config": {"model_type": "mistral", "layer_types": ["full_attention"] * 32}},
        {"text_config": {"tie_word_embeddings": False}},
        {"text_config": {"rope_theta": 1e9}, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_multimodal_mistral_is_read_as_its_text_model(values):
    found = mistral.Config.from_hf({"model_type": "mistral3", **values})
    assert found == meaning_of_text(values)


MINISTRAL_3_ROPE = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": None},
        {"rope_theta": 5e5},  # ignored, as rope_parameters that are left out have one
        {"rope_scaling": {"type": "yarn", **MINISTRAL_3_ROPE}, "rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "yarn", **MINISTRAL_3_ROPE}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **MINISTRAL_3_ROPE}},
        {"rope_parameters": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 512},
    ],
    ids=str,
)
def test_rope_of_a_ministral_3_in_old_and_new_files(values):
    for key in ("rope_scaling", "rope_parameters"):
        if values.get(key):
            values = {**values, key: {**values[key], "llama_4_scaling_beta": 0.2}}
    reference = transformers.Ministral3Config(**values)
    reference.standardize_rope_params()  # as it does again where it computes the frequencies
    expected = {**reference.rope_parameters}
    config = mistral.Config.from_hf({"model_type": "ministral3", **values})
    assert config.rope_theta == expected.pop("rope_theta")
    found = dict(config.rope_scaling)
    assert found == {key: expected[key] for key in found}
    assert expected.keys() - found.keys() <= {"type", "max_position_embeddings"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}}, "is 'mistral4'"),
        ({"model_type": "mistral3", "quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"model_type": "mistral3", "text_config": {"is_causal": False}}, "is_causal is False"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "type yarn lacks factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        (
            {"model_type": "ministral3", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "a ministral3 needs yarn with llama_4_scaling_beta",
        ),
        (
            {
                "model_type": "ministral3",
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "llama_4_scaling_beta": None,
                },
            },
            "a ministral3 needs yarn with llama_4_scaling_beta",
        ),
        (
            {"model_type": "ministral3", "rope_parameters": {"llama_4_scaling_beta": 0.1}},
            "a ministral3 needs yarn with llama_4_scaling_beta",
        ),
    ],
    ids=str,
)
def test_what_mistral_py_does_not_support_is_refused_by_name(values, said):
    with pytest.raises(mistral.InputError, match=said) as error:
        mistral.Config.from_hf(values)
    assert "\n" not in str(error.value)


def test_only_a_ministral_3_scales_its_queries():
    """So it is in transformers: of a Mistral the key is ignored, and saved no more."""
    rope = {"rope_type": "yarn", **MINISTRAL_3_ROPE, "llama_4_scaling_beta": 0.1}
    config = mistral.Config.from_hf({"model_type": "mistral", "rope_parameters": rope})
    assert "llama_4_scaling_beta" not in dict(config.rope_scaling)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_vocabulary_is_ours_alone(kind):
    """Other programs write such a key, too, and transformers does not read it."""
    assert meaning(kind, {"model_type": kind, "padded_vocab_size": 300_000}) == meaning(
        kind, {"model_type": kind}
    )
