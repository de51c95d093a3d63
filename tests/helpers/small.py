"""Small checkpoints with random weights, for tests of the programs."""

import json
from pathlib import Path

import jax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import gpt2


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


def edit_config(folder, **changes):
    """Changes some entries of a checkpoint's config.json."""
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
