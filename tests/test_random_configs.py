"""Random config.json files: each model is that of transformers, or is refused with an InputError.

40 for each family, drawn from a seed over all keys that transformers reads: in old and new
spellings, null or left out, with values that no published checkpoint has. One number alone:

    python -m pytest -n 0 -m slow tests/test_random_configs.py -k "gemma and 17"
"""

import contextlib
import json
import random
from functools import partial

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from helpers.families import FAMILIES
from helpers.reference import assert_same_model, write_random
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.slow

CONFIGS = 40  # for each family,
EQUAL = 25  # of which at least so many are supported
DRAWS = 20  # at most, until transformers accepts a config
LENGTHS = (5, 17, 40)  # of the prompts
NEW = 32  # greedy tokens
CONTEXT = LENGTHS[-1] + NEW
TOLERANCE = 1e-4  # of the largest logit, which counts as 1 if it is smaller

# ---------------------------------------- What is drawn from --------------------------------------

ABSENT = object()  # instead of a value: the key is left out
ACTIVATIONS = [
    *("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh", "sigmoid"),
    *("gelu_fast", "gelu_accurate", "gelu_python_tanh", "quick_gelu", "relu2", "relu6", "mish"),
]
SUPPORTED_ACTIVATIONS = {  # by family; the first is the default
    "gpt2": ["gelu_new", "gelu", "gelu_pytorch_tanh", "relu", "silu"],
    "opt": ["relu", "gelu"],
    "llama": ["silu"],
    "gemma": ["gelu_pytorch_tanh", "gelu"],
    "mistral": ["silu"],
    "qwen": ["silu"],
}
ACTIVATION_KEYS = {  # by model_type, where it is not hidden_act
    "gpt2": "activation_function",
    "opt": "activation_function",
    "gemma2": "hidden_activation",
    "gemma3_text": "hidden_activation",
}
SUPPORTED_ROPE = {
    "llama": ["default", "linear", "dynamic", "llama3", "yarn"],
    "gemma": ["default", "linear"],
    "mistral": ["default", "yarn"],
    "qwen": ["default", "yarn"],
}
OTHER_ROPE = ["linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


def mostly(rng, usual, others):
    """One of the usual values in 9 of 10 cases, else one of the others."""
    return rng.choice(others if rng.random() < 0.1 else usual)


def drawn(rng, **choices) -> dict:
    """A key with one of its values for each of `choices`; without the key where that is ABSENT."""
    values = {key: rng.choice(options) for key, options in choices.items()}
    return {key: value for key, value in values.items() if value is not ABSENT}


def activation(rng, family):
    """The name of an activation, or ABSENT."""
    return mostly(rng, [ABSENT, *SUPPORTED_ACTIVATIONS[family]], ACTIVATIONS)


def what_all_have(rng) -> dict:
    """Keys of every family; the logits depend on the first three."""
    return drawn(
        rng,
        vocab_size=[61, 97, 130],
        tie_word_embeddings=[ABSENT, True, False],
        is_causal=[mostly(rng, [ABSENT, ABSENT, True], [False, False, True])],
        bos_token_id=[ABSENT, None, 0, 3],
        eos_token_id=[ABSENT, None, 0, [1, 2]],
        pad_token_id=[ABSENT, ABSENT, None, 5],
        torch_dtype=[ABSENT, "float32", "bfloat16"],
        use_cache=[ABSENT, True, False],
    )


def head_width(rng, heads, widths=range(2, 65, 2)) -> int:
    """A width of so many heads that together are 16 to 64 wide."""
    return rng.choice([width for width in widths if 16 <= width * heads <= 64])


# -------------------------------------------- Families --------------------------------------------


def random_gpt2(rng) -> dict:
    """A GPT-2; without n_head it has 12 heads."""
    heads = rng.choice([1, 2, 3, 5, 8, 12])
    values = what_all_have(rng) | drawn(
        rng,
        model_type=["gpt2"],
        n_embd=[heads * head_width(rng, heads, range(1, 65))],
        n_head=[ABSENT if heads == 12 else heads],
        n_layer=[1, 2, 3],
        n_positions=[ABSENT, CONTEXT, 100],
        n_inner=[ABSENT, None, 24, 77],
        activation_function=[activation(rng, "gpt2")],
        layer_norm_epsilon=[ABSENT, 1e-5, 1e-3, 0.1],
        initializer_range=[ABSENT, 0.04, 0.06],
        resid_pdrop=[ABSENT, 0.1, 0],
        scale_attn_weights=[ABSENT, True, False],
        scale_attn_by_inverse_layer_idx=[ABSENT, True, False],
        reorder_and_upcast_attn=[ABSENT, True, False],
        add_cross_attention=[mostly(rng, [ABSENT, False], [True])],
    )
    # transformers reads these keys by the names that other families have for them, too.
    other_names = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
    }
    name = rng.choice([None] * 20 + list(other_names))
    if name in values:
        values[other_names[name]] = values.pop(name)
    return values


def random_opt(rng) -> dict:
    """An OPT; without num_attention_heads it has 12."""
    heads = rng.choice([1, 2, 3, 5, 8, 12])
    return what_all_have(rng) | drawn(
        rng,
        model_type=["opt"],
        hidden_size=[heads * head_width(rng, heads, range(1, 65))],
        num_attention_heads=[ABSENT if heads == 12 else heads],
        num_hidden_layers=[1, 2, 3],
        ffn_dim=[24, 77, 128],
        max_position_embeddings=[ABSENT, CONTEXT, 100],
        word_embed_proj_dim=[ABSENT, None, 16, 27],
        do_layer_norm_before=[ABSENT, True, False],
        _remove_final_layer_norm=[ABSENT, True, False],
        layer_norm_elementwise_affine=[ABSENT, True, False],
        enable_bias=[ABSENT, True, False],
        activation_function=[activation(rng, "opt")],
        init_std=[ABSENT, 0.04, 0.06],
        dropout=[ABSENT, 0.0, 0.1],
        attention_dropout=[ABSENT, 0.0, 0.1],
        layerdrop=[ABSENT, 0.0, 0.1],
    )


def rotary_sizes(rng, default_heads, default_kv_heads) -> dict:
    """The sizes that families with RoPE share; the two defaults are those of absent keys."""
    heads = rng.choice([1, 2, 3, 4, 6, 8, 16, default_heads])
    left_out = heads == default_heads and rng.random() < 0.5
    kv_heads = [n for n in range(1, heads + 1) if heads % n == 0]
    if default_kv_heads in (None, *kv_heads):
        kv_heads += [ABSENT, ABSENT]
    if default_kv_heads is None:
        kv_heads.append(None)
    return drawn(
        rng,
        hidden_size=[heads * head_width(rng, heads)],
        intermediate_size=[20, 48, 77],
        num_hidden_layers=[1, 2, 3],
        num_attention_heads=[ABSENT if left_out else heads],
        num_key_value_heads=kv_heads,
        max_position_embeddings=[ABSENT, CONTEXT, 100, 256],
        rms_norm_eps=[ABSENT, 1e-6, 1e-3, 0.1],
        initializer_range=[ABSENT, 0.04, 0.06],
    )


def random_scaling(rng, kind, values) -> dict:
    """The keys beside its type that a kind of RoPE scaling has."""
    factor = rng.choice([4, 4.0, 4.5, 8.0])
    if kind == "default":
        return drawn(rng, factor=[mostly(rng, [ABSENT], [2.0])])  # which it does not use
    if kind == "llama3":
        bands = drawn(rng, original_max_position_embeddings=[ABSENT, 16, 64])
        return bands | {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn":
        return {"factor": factor} | drawn(
            rng,
            original_max_position_embeddings=[ABSENT, 16, 64],
            attention_factor=[ABSENT, ABSENT, None, 1.2],
            beta_fast=[ABSENT, None, 4.0],
            beta_slow=[ABSENT, None, 0.5],
            mscale=[ABSENT, 0.7, 1.5],
            mscale_all_dim=[ABSENT, 0, 1.0],
            truncate=[ABSENT, True, False],
        )
    if kind == "longrope":
        width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        factors = {name: [1.0 + i for i in range(width // 2)] for name in ("short", "long")}
        return {f"{name}_factor": factor for name, factor in factors.items()} | {"factor": factor}
    return {"factor": factor}


def random_rope(rng, family, values) -> dict:
    """The keys about RoPE, in one of their spellings: rope_theta, rope_scaling, rope_parameters."""
    kind = mostly(rng, SUPPORTED_ROPE[family], OTHER_ROPE)
    scaling = random_scaling(rng, kind, values)
    theta = drawn(rng, rope_theta=[ABSENT, 100, 5e5])
    inner_theta = drawn(rng, rope_theta=[ABSENT, 30.0, 1e6])
    nothing = rng.choice([{}, {"rope_scaling": None}, {"rope_parameters": None}])
    spellings = [
        {"rope_scaling": {"type": kind, **scaling}, **theta},
        {"rope_scaling": {"rope_type": kind, **scaling}, **theta},
        {"rope_scaling": {"rope_type": kind, "type": kind, **scaling, **inner_theta}, **theta},
        {"rope_parameters": {"rope_type": kind, **scaling, **inner_theta}, **theta},
        {
            "rope_scaling": {"rope_type": kind, **scaling},
            "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
            **theta,
        },
    ]
    rope = nothing | theta if kind == "default" and rng.random() < 0.5 else rng.choice(spellings)
    if kind == "llama3":
        rope |= drawn(rng, original_max_position_embeddings=[ABSENT, ABSENT, 32])
    # Beside linear and dynamic scaling llama.py takes this for the length before the scaling.
    if family == "llama" and kind in ("linear", "dynamic"):
        rope |= drawn(rng, max_position_embeddings=[ABSENT, 20, 100])
    return rope | drawn(rng, partial_rotary_factor=[mostly(rng, [ABSENT], [0.5])])


def random_llama(rng) -> dict:
    """A Llama, a SmolLM3 or a Granite, with keys of the other two, which it does not read."""
    kind = rng.choice(["llama", "llama", "smollm3", "granite"])
    values = what_all_have(rng) | rotary_sizes(rng, *((16, 4) if kind == "smollm3" else (32, None)))
    values |= drawn(
        rng,
        model_type=[kind],
        head_dim=[ABSENT, ABSENT, None, 6, 10, 24],
        hidden_act=[activation(rng, "llama")],
        attention_bias=[ABSENT, True, False],
        mlp_bias=[ABSENT, True, False],
        pretraining_tp=[ABSENT, 1, 2],
    )
    if kind != "granite" or rng.random() < 0.2:
        listed = [rng.choice([0, 1]) for _ in range(values["num_hidden_layers"] + 1)]
        values |= drawn(
            rng,
            no_rope_layer_interval=[ABSENT, 1, 2, 3],
            no_rope_layers=[ABSENT, ABSENT, None, listed, listed[:-1]],
        )
    if kind == "smollm3":  # not in others: transformers' KV cache alone would have such a window
        values |= drawn(
            rng,
            use_sliding_window=[ABSENT, ABSENT, False, True],
            sliding_window=[ABSENT, ABSENT, None, 5],
            layer_types=[ABSENT] * 4 + [random_layer_types(rng, values)],
        )
    if kind == "granite" or rng.random() < 0.2:
        values |= drawn(
            rng,
            embedding_multiplier=[ABSENT, 1, 12, 0.5],
            residual_multiplier=[ABSENT, 1.0, 0.22],
            attention_multiplier=[ABSENT, 0.1, 0.015625],
            logits_scaling=[ABSENT, 8, 0.5],
        )
    return values | random_rope(rng, "llama", values)


def random_mistral(rng) -> dict:
    """One of the kinds that mistral.py reads; the heads need not share the width evenly."""
    kind = rng.choice(["mistral", "mixtral", "ministral", "ministral3"])
    values = what_all_have(rng) | rotary_sizes(rng, 32, 8)
    values |= drawn(
        rng,
        model_type=[kind],
        head_dim=[ABSENT, ABSENT, None, 6, 10, 24],
        hidden_act=[activation(rng, "mistral")],
        sliding_window=[ABSENT, None, 1, 5, 16, 33, 4096],
        attention_bias=[mostly(rng, [ABSENT], [True])],  # which these do not read
    )
    if values.get("head_dim"):
        values["hidden_size"] += rng.choice([0, 1, 5])  # no multiple of the heads
    if kind == "mixtral":
        experts = rng.choice(["num_local_experts"] * 9 + ["num_experts"])  # which means the same
        values |= drawn(
            rng,
            **{experts: [ABSENT, 2, 3, 5]},
            num_experts_per_tok=[ABSENT, 1, 2, 3],
            router_jitter_noise=[ABSENT, 0.1],
            output_router_logits=[ABSENT, False],
        )
    values |= random_rope(rng, "mistral", values)
    if kind == "ministral3":
        for key in ("rope_scaling", "rope_parameters"):
            if values.get(key):
                values[key] |= drawn(rng, llama_4_scaling_beta=[0.1, 1.5])

    # With layer_types, a Mistral is read as a Ministral, of which transformers wants a head_dim.
    types = random_layer_types(rng, values)
    if kind == "ministral":
        values |= drawn(rng, layer_types=[ABSENT, None, types, types])
    elif kind == "mistral" and values.get("head_dim"):
        values |= drawn(rng, layer_types=[ABSENT] * 4 + [types])
    return values


def random_qwen(rng) -> dict:
    """A Qwen2, a Qwen3, or a Qwen3 with experts; windows count where they are switched on."""
    kind = rng.choice(["qwen2", "qwen3", "qwen3", "qwen3_moe"])
    values = what_all_have(rng) | rotary_sizes(rng, 32, 4 if kind == "qwen3_moe" else 32)
    no_width = [ABSENT] if kind == "qwen3" else [ABSENT, ABSENT, None]
    values |= drawn(
        rng,
        model_type=[kind],
        head_dim=[*no_width, 6, 10, 24],
        hidden_act=[activation(rng, "qwen")],
        attention_bias=[ABSENT, True, False],
        use_sliding_window=[ABSENT, True, True, False],
        sliding_window=[ABSENT, 1, 5, 16, 4096],
        max_window_layers=[ABSENT, 0, 1, 2],
    )
    if kind == "qwen3_moe":
        values |= drawn(
            rng,
            num_experts=[2, 3, 5],
            num_experts_per_tok=[1, 2],
            moe_intermediate_size=[20, 33],
            norm_topk_prob=[ABSENT, True, False],
            decoder_sparse_step=[ABSENT, 1, 2],
            mlp_only_layers=[ABSENT, None, [], [0]],
        )
    elif values.get("use_sliding_window"):
        values |= drawn(rng, layer_types=[ABSENT, ABSENT, None, random_layer_types(rng, values)])
    return values | random_rope(rng, "qwen", values)


def random_layer_types(rng, values) -> list[str]:
    """A kind of attention for each layer."""
    kinds = ["full_attention", "sliding_attention"]
    return [rng.choice(kinds) for _ in range(values["num_hidden_layers"])]


def random_gemma(rng) -> dict:
    """A Gemma 1, 2 or 3, with keys of the other two, which it may or may not read."""
    kind = rng.choice(["gemma", "gemma2", "gemma2", *["gemma3_text"] * 3])
    values = what_all_have(rng)
    values |= rotary_sizes(rng, *((16, 16) if kind == "gemma" else (8, 4)))
    values |= drawn(
        rng,
        model_type=[kind],
        head_dim=[ABSENT, 4, 6, 10, 24],
        hidden_act=[activation(rng, "gemma")],
        hidden_activation=[activation(rng, "gemma")],
        attention_bias=[mostly(rng, [ABSENT, False], [True])],
        use_bidirectional_attention=[ABSENT, ABSENT, None, None, False, False, True],
    )
    if kind == "gemma3_text":
        values["num_hidden_layers"] = rng.choice([1, 2, 3, 7])
    if kind != "gemma" or rng.random() < 0.2:
        values |= drawn(
            rng,
            query_pre_attn_scalar=[ABSENT, 4, 20],
            sliding_window=[ABSENT, 1, 5, 16, 33],
            sliding_window_pattern=[ABSENT, ABSENT, 1, 2, 3],
            _sliding_window_pattern=[ABSENT, ABSENT, 2],
            layer_types=[ABSENT, None, random_layer_types(rng, values)],
            attn_logit_softcapping=[ABSENT, None, 0.5, 5.0],
            final_logit_softcapping=[ABSENT, None, 0.5, 5.0],
            rope_local_base_freq=[ABSENT, 30.0, 5e4],
        )
    if kind == "gemma3_text" and rng.random() < 0.3:
        return values | {"rope_parameters": random_rope_by_layer(rng, values)}
    return values | random_rope(rng, "gemma", values)


def random_rope_by_layer(rng, values) -> dict:
    """rope_parameters of a Gemma 3: a set of them for each kind of layer, or null, or neither."""
    sets = {}
    for name in ("full_attention", "sliding_attention"):
        kind = mostly(rng, SUPPORTED_ROPE["gemma"], OTHER_ROPE)
        scaling = random_scaling(rng, kind, values) | drawn(rng, rope_theta=[ABSENT, 30.0, 1e6])
        spelling = mostly(rng, ["rope_type"], ["type"])
        sets |= drawn(rng, **{name: [{spelling: kind, **scaling}] * 4 + [None, ABSENT]})
    return sets


RANDOM = {
    "gpt2": random_gpt2,
    "opt": random_opt,
    "llama": random_llama,
    "gemma": random_gemma,
    "mistral": random_mistral,
    "qwen": random_qwen,
}

# --------------------------------------- What may be refused --------------------------------------


def other_activation(family, values) -> bool:
    """Whether a config has an activation that its model file lacks."""
    default, *others = SUPPORTED_ACTIVATIONS[family]
    key = ACTIVATION_KEYS.get(values["model_type"], "hidden_act")
    return values.get(key, default) not in (default, *others)


def other_rope(family, values) -> bool:
    """Whether a config has a kind of RoPE, for any of its layers, that its model file lacks."""
    scaling, parameters = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    sets = [scaling or parameters]
    if values["model_type"] == "gemma3_text":
        # transformers adds rope_scaling to this, so that an older "type" in it changes nothing.
        sets = [{"rope_type": "default", **scaling}]
        sets += [one for one in parameters.values() if isinstance(one, dict)]
    kinds = {one.get("rope_type", one.get("type", "default")) for one in sets}
    return not kinds <= set(SUPPORTED_ROPE[family])


def dynamic_rope_of_one_pair(values) -> bool:
    """Whether dynamic RoPE scaling would divide by Dh - 2 = 0."""
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    head_dim = values.get("head_dim")
    if head_dim is None:
        default = 16 if values["model_type"] == "smollm3" else 32
        head_dim = values["hidden_size"] // values.get("num_attention_heads", default)
    return scaling.get("rope_type", scaling.get("type")) == "dynamic" and head_dim == 2


def windows_in_a_smollm3(values) -> bool:
    """Whether a SmolLM3 has layers with sliding windows, or a config that may mean them."""
    if values["model_type"] != "smollm3":
        return False
    window = values.get("sliding_window") is not None and values.get("use_sliding_window", False)
    return window or "sliding_attention" in values.get("layer_types", [])


ALL_REFUSE = {"no causal mask": lambda values: not values.get("is_causal", True)}
REFUSED = {  # by family: a reason, and whether a config gives it; all others must be supported
    "gpt2": {
        "activation": partial(other_activation, "gpt2"),
        "cross attention": lambda values: values.get("add_cross_attention", False),
    },
    "opt": {"activation": partial(other_activation, "opt")},
    "llama": {
        "activation": partial(other_activation, "llama"),
        "RoPE": partial(other_rope, "llama"),
        "dynamic RoPE of one pair": dynamic_rope_of_one_pair,
        "sliding windows": windows_in_a_smollm3,
    },
    "gemma": {
        "activation": partial(other_activation, "gemma"),
        "RoPE": partial(other_rope, "gemma"),
        "biases": lambda values: values.get("attention_bias", False),
        "both directions": lambda values: values.get("use_bidirectional_attention", False),
    },
    "mistral": {
        "activation": partial(other_activation, "mistral"),
        "RoPE": partial(other_rope, "mistral"),
    },
    "qwen": {
        "activation": partial(other_activation, "qwen"),
        "RoPE": partial(other_rope, "qwen"),
    },
}


def reasons_to_refuse(family, values) -> list[str]:
    """What makes a config one that its model file has to refuse."""
    known = REFUSED[family] | ALL_REFUSE
    return [reason for reason, given in known.items() if given(values)]


# ------------------------------------------- The reference ----------------------------------------


def draw(family, number, folder):
    """A random config.json that transformers accepts, in a checkpoint with random weights.

    -> (its values, the reference model, the prompts, the reference's logits of each)
    """
    rng = random.Random(f"{family.name} {number}")
    for _ in range(DRAWS):
        values = RANDOM[family.name](rng)
        prompts = [[rng.randrange(values["vocab_size"]) for _ in range(n)] for n in LENGTHS]
        with contextlib.suppress(Exception):  # of transformers, for whatever reason
            write_checkpoint(family, values, folder, seed=number)
            reference = read_reference(folder)
            logits = reference_logits(reference, prompts)
            if all(np.isfinite(rows).all() for rows in logits):
                return values, reference, prompts, logits
    raise AssertionError(f"transformers accepts none of {DRAWS} configs such as {values}")


def write_checkpoint(family, values, folder, seed):
    """The weights are for what transformers makes of the values; config.json has these alone."""
    file = folder / "config.json"
    file.write_text(json.dumps(values))
    write_random(family, AutoConfig.from_pretrained(folder), folder, seed)
    file.write_text(json.dumps(values))


def read_reference(folder):
    """In float32, with attention and experts in plain steps."""
    config = AutoConfig.from_pretrained(folder)
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    if config.model_type == "mixtral":
        options["experts_implementation"] = "eager"
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def is_dynamic(reference) -> bool:
    """Whether the angles depend on the length of the text."""
    return "dynamic" in str(getattr(reference.config, "rope_parameters", None))


def padded(prompts):
    """(tokens, positions) of a batch: padding is on the left, and its position is -1."""
    tokens = np.zeros((len(prompts), max(LENGTHS)), int)
    positions = np.full(tokens.shape, -1)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :] = prompt
        positions[row, -len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


@torch.no_grad()
def reference_logits(reference, prompts) -> list[np.ndarray]:
    """[n, V] for each prompt of n tokens, from one batch.

    With dynamic RoPE each prompt is alone: transformers gives all rows the angles of the longest.
    """
    if is_dynamic(reference):
        forget_length(reference)
        return [reference(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
    tokens, positions = map(torch.tensor, padded(prompts))
    mask = (positions >= 0).long()
    positions = positions.clamp(min=0)
    logits = reference(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return [row[-len(prompt) :].numpy() for row, prompt in zip(logits, prompts, strict=True)]


@torch.no_grad()
def forget_length(reference):
    """Dynamic RoPE in transformers keeps the angles of the longest text until a short one comes."""
    reference(torch.tensor([[0]]))


@torch.no_grad()
def reference_tokens(reference, prompt):
    """(the next tokens of one prompt, greedily, the logits of each [NEW, V])."""
    if is_dynamic(reference):
        return cached_tokens(reference, prompt)
    ids, logits = list(prompt), []
    for _ in range(NEW):
        logits.append(reference(torch.tensor([ids]), use_cache=False).logits[0, -1].numpy())
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], np.stack(logits)


def cached_tokens(reference, prompt):
    """With dynamic RoPE, keys in a cache keep the angles of the length at which they were made."""
    forget_length(reference)
    reference.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    mask = torch.ones(1, len(prompt))
    out = reference.generate(
        torch.tensor([prompt]),
        attention_mask=mask,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).numpy()


# --------------------------------------------- The tests ------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
    """Each config is a program of its own, and is computed in less time than it is compiled in."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_close(found, expected):
    """Lists of [n, V]: close enough, by the largest logit of all."""
    allowed = TOLERANCE * max(1, *(np.abs(rows).max() for rows in expected))
    off = max(np.abs(ours - rows).max() for ours, rows in zip(found, expected, strict=True))
    assert off <= allowed


def our_logits(model, prompts) -> list[np.ndarray]:
    """[n, V] for each prompt of n tokens, from one batch."""
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    logits = np.asarray(forward(state, *padded(prompts)))
    return [row[-len(prompt) :] for row, prompt in zip(logits, prompts, strict=True)]


def assert_same_tokens(found, reference, prompts):
    """Up to the first place where the two best logits are as close as rounding."""
    for new, prompt in zip(found, prompts, strict=True):
        expected, logits = reference_tokens(reference, prompt)
        best = np.sort(logits, axis=-1)
        doubtful = best[:, -1] - best[:, -2] < TOLERANCE * np.maximum(1, np.abs(best).max())
        agreed = [*doubtful, True].index(True)
        assert new[:agreed] == expected[:agreed]


@pytest.mark.parametrize("number", range(CONFIGS))
def test_a_random_config_is_that_of_transformers_or_refused(family, number, tmp_path):
    module = family.module
    values, reference, prompts, expected = draw(family, number, tmp_path)
    reasons = reasons_to_refuse(family.name, values)
    print(json.dumps(values), *reasons)  # which pytest shows where the test fails
    if reasons:
        with pytest.raises(module.InputError):
            module.load(tmp_path)
        return

    model = module.load(tmp_path)
    assert_close(our_logits(model, prompts), expected)

    new = module.generate(model, prompts, NEW, key=jax.random.key(0), temperature=0)
    assert_same_tokens(new, reference, prompts)

    saved = tmp_path / "saved"
    module.save(model, saved)
    assert_same_model(module.load(saved), model)
    assert_close(reference_logits(read_reference(saved), prompts), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name, indirect=True)
def test_most_random_configs_are_supported(family, tmp_path):
    """Those that may be refused are few, so that the test above compares enough."""
    drawings = [draw(family, number, tmp_path)[0] for number in range(CONFIGS)]
    supported = [values for values in drawings if not reasons_to_refuse(family.name, values)]
    assert len(supported) >= EQUAL
