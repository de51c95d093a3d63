"""What needs packages that the tests' own would bring along, for an environment without those.

    pip install -r requirements.txt && python tests/helpers/requirements_alone.py

Makes a small random Llama that has a SentencePiece model and a chat template and nothing else to
read its text with, and lets sample.py continue a text with it, and answer one.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import sentencepiece
from flax import nnx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import llama  # noqa: E402

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)


def write_checkpoint(folder: Path) -> None:
    """config.json, model.safetensors, tokenizer.model and the template; no tokenizer.json."""
    model_prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=ROOT / "README.md",
        model_prefix=model_prefix,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = llama.Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        head_dim=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llama.save(llama.Model(config, rngs=nnx.Rngs(jax.random.key(0))), folder)


def main() -> None:
    """Fails where a command does, or writes to standard error what a user need not know."""
    for package in ("torch", "pytest"):
        if importlib.util.find_spec(package):
            sys.exit(f"{package} is installed: this is for an environment without it")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        for options in ([], ["--chat"]):
            command = [
                sys.executable,
                "sample.py",
                "--model",
                "llama",
                "--weights",
                folder,
                "--prompt",
                "The model files",
                "--max-new-tokens",
                "20",
                *options,
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            print(done.stdout, done.stderr)
            lines = done.stderr.splitlines()
            assert done.returncode == 0 and len(lines) == 1 and "tokens/s" in lines[0]
            assert done.stdout.startswith("The model files") == (options == [])


if __name__ == "__main__":
    main()
