"""Writes GGUF files from small checkpoints of transformers, as llama.cpp's converter does."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KINDS = {  # model_type -> architecture
    "gpt2": "gpt2",
    "llama": "llama",
    "smollm3": "smollm3",
    "granite": "granite",
    "mistral": "llama",
    "mixtral": "llama",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
LLAMA_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_2_MODULES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT2_MODULES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(folder, file, kind="F16", *, tokenizer=None, metadata=(), one_by_one=False) -> Path:
    """Writes the checkpoint in a folder as a GGUF file.

    kind: of the matrices; vectors are in F32. tokenizer: a function that adds one to the writer.
    metadata: further (key, value) pairs. one_by_one: experts are not stacked, as in old files.
    """
    values = json.loads(Path(folder, "config.json").read_text())
    architecture = KINDS[values["model_type"]]
    writer = gguf.GGUFWriter(file, architecture)
    add_config(writer, values)
    if tokenizer is not None:
        tokenizer(writer)
    for key, value in metadata:
        add_value(writer, key, value)

    tensors = load_file(Path(folder, "model.safetensors"))
    for name, tensor in converted(tensors, values, one_by_one).items():
        wanted = gguf.GGMLQuantizationType[kind]
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        if tensor.ndim == 1 or "gate_inp" in name or "position" in name:
            wanted = gguf.GGMLQuantizationType.F32
        elif tensor.shape[-1] % block:
            wanted = gguf.GGMLQuantizationType.F16
        data = gguf.quants.quantize(np.ascontiguousarray(tensor), wanted)
        writer.add_tensor(name, data, raw_dtype=wanted)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(file)


def add_value(writer, key: str, value) -> None:
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def add_config(writer, values: dict) -> None:
    """The metadata of a model, from its config.json."""
    if values["model_type"] == "gpt2":
        writer.add_context_length(values["n_positions"])
        writer.add_embedding_length(values["n_embd"])
        writer.add_feed_forward_length(values["n_inner"] or 4 * values["n_embd"])
        writer.add_block_count(values["n_layer"])
        writer.add_head_count(values["n_head"])
        writer.add_layer_norm_eps(values["layer_norm_epsilon"])
        return

    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_vocab_size(values["vocab_size"])
    D, H = values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim") or D // H
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    add_rope(writer, values)
    if "attention_multiplier" in values:
        writer.add_embedding_scale(values["embedding_multiplier"])
        writer.add_residual_scale(values["residual_multiplier"])
        writer.add_attention_scale(values["attention_multiplier"])
        writer.add_logit_scale(values["logits_scaling"])
    if values["model_type"] == "mixtral":
        writer.add_expert_count(values["num_local_experts"])
        writer.add_expert_used_count(values["num_experts_per_tok"])
    if values["model_type"] == "qwen3_moe":
        writer.add_expert_count(values.get("num_experts") or values["num_local_experts"])
        writer.add_expert_used_count(values["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(values["moe_intermediate_size"])
    if values["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(values["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(values["final_logit_softcapping"])
    if values["model_type"] in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(values["sliding_window"])


def rope_of(values: dict) -> dict:
    """RoPE's parameters; in a Gemma 3, those of the layers with full attention."""
    if "rope_parameters" not in values:  # as the model files write config.json
        scaling = values.get("rope_scaling") or {"rope_type": "default"}
        return {"rope_theta": values["rope_theta"], **scaling}
    rope = values["rope_parameters"]
    return rope.get("full_attention", rope)


def add_rope(writer, values: dict) -> None:
    rope = rope_of(values)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def converted(tensors: dict, values: dict, one_by_one: bool) -> dict:
    """The tensors of a checkpoint under llama.cpp's names and in its layouts."""
    kind = values["model_type"]
    modules = GPT2_MODULES if kind == "gpt2" else LLAMA_MODULES
    if kind in ("gemma2", "gemma3_text"):
        modules = modules | GEMMA_2_MODULES

    found = {}
    stacks = {}  # name -> the experts' matrices
    for name, tensor in tensors.items():
        tensor = tensor.astype(np.float32)
        prefix, module, end = re.fullmatch(
            r"(?:.+\.(?:layers|h)\.(\d+)\.)?(.+)\.(\w+)", name
        ).groups()
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if module == "lm_head" and values.get("tie_word_embeddings", kind == "gpt2"):
            continue
        module = modules[re.sub(r"\.\d+\.", ".", module)]
        name = f"{module}.{end}" if prefix is None else f"blk.{prefix}.{module}.{end}"

        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(module)
        if KINDS[kind] in ("llama", "smollm3", "granite") and heads:
            tensor = permute(tensor, values[heads])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if kind == "gpt2" and module in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
            tensor = tensor.T
        if expert is None:
            found[name] = tensor
        elif one_by_one:
            found[name.replace("_exps", f".{expert[1]}")] = tensor
        else:
            stacks.setdefault(name, {})[int(expert[1])] = tensor

    for name, matrices in stacks.items():
        found[name] = np.stack([matrices[expert] for expert in sorted(matrices)])
    if kind == "llama" and rope_of(values)["rope_type"] == "llama3":
        found["rope_freqs.weight"] = llama3_divisors(rope_of(values), values["head_dim"])
    return found


def permute(tensor, heads: int):
    """Rows of q_proj or k_proj: the two halves of each head, one from each in turn."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def llama3_divisors(rope: dict, head_dim: int):
    """What each frequency of RoPE is divided by."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if turns > high:
            divisors.append(1)
        elif turns < low:
            divisors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def byte_level(backend, pre="gpt-2", **ids):
    """What writes a byte-level tokenizer of the package tokenizers; ids: bos=, eos= and others."""

    def write(writer):
        described = json.loads(backend.to_str())
        special = {token["id"]: token for token in described["added_tokens"]}
        by_id = {id: text for text, id in backend.get_vocab().items()}
        types = []
        for id in range(len(by_id)):
            kind = NORMAL
            if id in special:
                kind = CONTROL if special[id]["special"] else USER_DEFINED
            types.append(kind)
        merges = [" ".join(pair) for pair in described["model"]["merges"]]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([by_id[id] for id in range(len(by_id))])
        writer.add_token_types(types)
        writer.add_array("tokenizer.ggml.merges", merges)
        add_ids(writer, ids)

    return write


def sentencepiece(file, added=(), **ids):
    """What writes a SentencePiece tokenizer.model; added: further tokens as (text, type)."""

    def write(writer):
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(str(file))
        tokens, scores, types = [], [], []
        for id in range(model.vocab_size()):
            kind = NORMAL
            if model.is_unknown(id):
                kind = UNKNOWN
            elif model.is_control(id):
                kind = CONTROL
            elif model.is_unused(id):
                kind = UNUSED
            elif model.is_byte(id):
                kind = BYTE
            tokens.append(model.id_to_piece(id))
            scores.append(model.get_score(id))
            types.append(kind)
        for text, kind in added:
            tokens.append(text)
            scores.append(-1000.0)
            types.append(kind)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        add_ids(writer, {"bos": 1, "eos": 2, "unknown": 0, **ids})

    return write


def add_ids(writer, ids: dict) -> None:
    for role, id in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", id)
