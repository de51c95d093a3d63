"""Small checkpoints with random weights, for tests of the programs."""

import json
import shutil
from pathlib import Path

import jax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import gpt2

# Of a Llama, Mistral or Gemma: rows of 64 and 96 weights, as quantized GGUF has blocks of 32.
SIZES_FOR_GGUF = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, as train.py's --tokens bytes has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_checkpoint(folder, **sizes) -> Path:
    """A GPT-2 over bytes, with weights large enough that greedy text is not one letter."""
    sizes = {
        "vocab_size": 256,
        "n_positions": 256,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.3,
        **sizes,
    }
    gpt2.save(gpt2.Model(gpt2.Config(**sizes), rngs=nnx.Rngs(jax.random.key(0))), folder)
    byte_tokenizer().save(str(Path(folder, "tokenizer.json")))
    return Path(folder)


def complaint(stderr: str) -> str:
    """The one line of train.py's standard error that is no note of what it does, `reading ...`."""
    [line] = [line for line in stderr.splitlines() if not line.endswith(" ...")]
    assert line.startswith("train.py: ")
    return line


def edit_config(folder, **changes):
    """Changes some entries of a checkpoint's config.json."""
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def take_away(folder):
    """As after a mistyped name."""
    shutil.rmtree(folder)


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def lose_a_shard(folder):
    """The first of two is there, and the index names both."""
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    index = {"weight_map": {"a": first, "b": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_tensors(folder):
    """The config has a block more than the file."""
    edit_config(folder, n_layer=3)


def break_config(folder):
    (folder / "config.json").write_text("{not json")


# What may be wrong with a checkpoint, and what a program then says.
DAMAGES = [
    (take_away, "no such folder, and not a name on the Hub"),
    (cut_weights, "model.safetensors is damaged or cut short"),
    (lose_a_shard, "has no model-00002-of-00002.safetensors"),
    (lose_tensors, "lacks 12 tensors, such as transformer.h.2."),
    (break_config, "config.json is damaged"),
]
