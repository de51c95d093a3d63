"""Trains any of the model files from scratch on text files, and writes a checkpoint to use.

    python train.py                                     # a small GPT-2 on Python's own source text
    python train.py --data a.txt b.txt --out runs/mine  # on your text: the files, read as one
    python sample.py --model gpt2 --weights runs/mine   # what has it learned?

The last tenth of the text is not trained on: it is the validation text, and the loss on it tells
how well the model predicts what it has not seen. Ctrl-C stops a run, and the same command with
--resume goes on from there. The finished folder is a checkpoint in Hugging Face's format.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import statistics
import sys
import sysconfig
import tempfile
import time
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
from flax import nnx
from safetensors import SafetensorError
from tokenizers import decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
def gpt2_sizes(args) -> dict:
    """The sizes on the command line, as the config.json of a GPT-2 names them."""
    return {"n_layer": args.layers, "n_head": args.heads, "n_embd": args.width,
            "n_positions": args.block, "embd_pdrop": args.dropout, "attn_pdrop": args.dropout,
            "resid_pdrop": args.dropout}

def other_sizes(args, **more) -> dict:
    """And as those of the others do; a gated MLP is narrower, so that it has as many weights."""
    return {"num_hidden_layers": args.layers, "num_attention_heads": args.heads,
            "hidden_size": args.width, "max_position_embeddings": args.block,
            "num_key_value_heads": args.heads, "head_dim": args.width // args.heads,
            "intermediate_size": -(-8 * args.width // 3 // 32) * 32, "tie_word_embeddings": True,
            **more}

SIZES = {
    "gpt2": gpt2_sizes,
    "opt": lambda args: other_sizes(args, ffn_dim=4 * args.width, dropout=args.dropout),
    "llama": other_sizes,
    "gemma": lambda args: other_sizes(args, num_key_value_heads=1,
                                      sliding_window=-(-args.block // 2),
                                      sliding_window_pattern=min(args.layers, 6),
                                      query_pre_attn_scalar=args.width // args.heads),
    "mistral": lambda args: other_sizes(args, model_type="mixtral" if args.experts else "mistral",
                                        num_local_experts=args.experts),
}
MODELS = [name for name in SIZES if (HERE / f"{name}.py").exists()]

# --------------------------------------------------------------------------------- the command line

def fail(message):
    """One line that says what is wrong and what to do; exit code 2."""
    print("train.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)

def arguments():
    """The command line, read and checked as far as that needs neither the text nor a device."""
    parser = argparse.ArgumentParser(
        prog="train.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="The defaults take two or three minutes on a laptop's CPU.")
    parser.error = fail

    def number(flag, default, about):
        group.add_argument(flag, type=type(default), default=default, help=f"{about} (default: "
                           "%(default)s)", metavar="N" if isinstance(default, int) else "X")

    group = parser.add_argument_group("text")
    group.add_argument("--data", nargs="+", metavar="FILE",
                       help="UTF-8 text (default: the source text of Python's standard library)")
    group.add_argument("--tokens", choices=["char", "bytes", "bpe", "gpt2"], default="bpe",
                       help="a token is a character, a byte, a piece learned from the text (byte-"
                       "level BPE), or one of GPT-2's 50257 pieces (default: %(default)s)")
    number("--vocab-size", 1024, "how many pieces bpe learns, the 256 bytes included")
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="gpt2", metavar="NAME",
                       help=f"model file: {', '.join(MODELS)} (default: %(default)s)")
    number("--layers", 4, "blocks, one after the other")
    number("--heads", 4, "attention heads of a block")
    number("--width", 128, "length of a token's vector")
    number("--block", 64, "the context: tokens that are seen at once")
    number("--dropout", 0.0, "share of the activations that each step leaves out (gpt2, opt)")
    number("--experts", 0, "MLPs of a block, of which a token takes two (mistral); 0: one for all")
    group = parser.add_argument_group("training")
    number("--steps", 2000, "updates of the weights")
    number("--batch", 12, "rows of --block tokens in a step")
    number("--lr", 3e-3, "highest learning rate")
    group.add_argument("--min-lr", type=float, metavar="X",
                       help="what it falls to, along a cosine (default: a tenth of the highest)")
    group.add_argument("--warmup", type=int, metavar="N",
                       help="steps in which it rises first (default: a twentieth of all)")
    number("--weight-decay", 0.1, "AdamW's, of matrices only")
    number("--beta2", 0.99, "AdamW's: how long it remembers squared gradients")
    number("--clip", 1.0, "longest gradient, all of it taken as one vector")
    number("--seed", 0, "of the first weights, the rows and dropout")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="FOLDER",
                       help="for the model and its checkpoints (default: runs/NAME)")
    group.add_argument("--resume", action="store_true",
                       help="go on from the newest checkpoint in --out")
    number("--eval-every", 250, "steps between estimates of the validation loss")
    number("--save-every", 500, "steps between checkpoints; 0: only the model at the end")
    group.add_argument("--save-dtype", choices=["float32", "bfloat16"], default="float32",
                       help="of the finished model's weights (default: %(default)s)")
    group.add_argument("--profile", type=Path, metavar="DIR",
                       help="write a trace of five steps into DIR, for Perfetto or xprof")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", metavar="KIND[:N]",
                       help="cpu, gpu or tpu; gpu:1 is the second GPU (default: the best there is)")
    group.add_argument("--parallel", choices=["pmap"],
                       help="split each batch over all devices of the kind (default: one device)")
    group.add_argument("--dtype", choices=["float32", "bfloat16"],
                       help="computed in, with float32 weights (default: float32 on a CPU, "
                       "bfloat16 elsewhere)")
    group.add_argument("--remat", action="store_true",
                       help="save memory: compute each block again in the backward pass")
    args = parser.parse_args()
    args.out = args.out or Path("runs", args.model)
    args.min_lr = args.lr / 10 if args.min_lr is None else args.min_lr
    args.warmup = args.steps // 20 if args.warmup is None else args.warmup
    folder = (args.profile or HERE).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    positive = ["layers", "heads", "width", "block", "steps", "batch", "eval_every"]
    for fits, rule in [
        (args.model in MODELS, f"no model file for {args.model!r}; there are: {', '.join(MODELS)}"),
        *[(vars(args)[name] >= 1, f"--{name.replace('_', '-')} must be 1 or more")
          for name in positive],
        (args.seed >= 0 and args.save_every >= 0, "--seed and --save-every must be 0 or more"),
        (args.width % args.heads == 0, f"--width {args.width} does not split into --heads "
         f"{args.heads}: choose a multiple of it"),
        (args.vocab_size >= 256, "--vocab-size must be 256 or more: there are 256 bytes"),
        (0 <= args.dropout < 1, "--dropout must be from 0 to below 1"),
        (not args.dropout or args.model in ("gpt2", "opt"), f"{args.model}.py has no --dropout"),
        (args.experts == 0 or (args.experts >= 2 and args.model == "mistral"),
         "--experts must be 2 or more, and of --model mistral"),
        (0 <= args.min_lr <= args.lr and args.lr > 0, "--min-lr must be from 0 to --lr"),
        (0 <= args.warmup < args.steps, "--warmup must be from 0 to below --steps"),
        (0 <= args.beta2 < 1, "--beta2 must be from 0 to below 1"),
        (args.weight_decay >= 0 and args.clip > 0,
         "--weight-decay must be 0 or more, and --clip above 0"),
        (not args.out.exists() or args.out.is_dir(), f"--out {args.out} is a file: name a folder"),
        (not args.profile or os.access(f"{there}/.", os.W_OK),
         f"--profile {args.profile} cannot be written: name a folder that can"),
    ]:
        if not fits:
            fail(rule)
    stored = any(path.name.isdigit() for path in args.out.glob("checkpoints/*"))
    if args.resume and not stored:
        fail(f"{args.out} has no checkpoints: leave --resume out to begin")
    if not args.resume and (stored or (args.out / "model.safetensors").exists()):
        fail(f"{args.out} holds a run already: add --resume to go on, or choose another --out")
    return args

# ------------------------------------------------------------------------------------------ devices

def pick_devices(name: str | None, parallel: str | None) -> list:
    """The devices to train on: those that --device and --parallel ask for."""
    kind, _, index = (name or "").partition(":")
    if not re.fullmatch(r"((cpu|gpu|tpu)(:\d+)?)?", name or ""):
        fail(f"--device {name}: it must be cpu, gpu or tpu, or a numbered one such as gpu:1")
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")  # or a GPU is started, and its memory taken
    try:
        devices = jax.devices(kind or None)
    except RuntimeError:
        fail(f"--device {name}: JAX finds no {kind} here; it has {jax.default_backend()}")
    if index and int(index) >= len(devices):
        fail(f"--device {name}: there are {len(devices)} of this kind, counted from 0")
    return devices if parallel and not index else [devices[int(index or 0)]]

def measure_peak(devices: list, dtype) -> float:
    """FLOP/s that the devices reach in the product of two large square matrices."""
    n = 2048 if devices[0].platform == "cpu" else 8192
    a, seconds = jnp.ones((n, n), dtype), []
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    for _ in range(3):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return len(devices) * 2 * n**3 / statistics.median(seconds)

# -------------------------------------------------------------------------------------------- text

def read_text(files: list[str] | None) -> str:
    """The files' text, one after the other; the source text of the standard library without any."""
    if not files:
        library, skip = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages"}
        skip |= {"test", "tests", "idle_test"}
        files = sorted(file for file in library.rglob("*.py")
                       if not skip & set(file.relative_to(library).parts))
    texts = []
    for file in files:
        try:  # bytes, as reading text would turn \r\n into \n
            texts.append(Path(file).read_bytes().decode())
        except OSError as error:
            fail(f"--data {file}: {error.strerror}: name text files")
        except UnicodeDecodeError as error:
            fail(f"--data {file} is not UTF-8 text (byte {error.start}): convert it first")
    return "".join(texts)

def byte_letters() -> dict[int, str]:
    """The visible character that stands for each byte in a byte-level vocabulary, as in GPT-2's."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(others)}

def make_tokenizer(kind: str, train_text: str, text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """A tokenizer of one of the four kinds of --tokens; each gives `text` back as it was."""
    letters = byte_letters()
    if kind == "char":  # BPE without merges; later it drops characters that are not in this text
        letters = enumerate(sorted(set(text)))
        codec = tokenizers.Tokenizer(models.BPE({letter: id for id, letter in letters}, []))
        codec.decoder = decoders.Fuse()
        return codec
    vocab, merges = {letter: byte for byte, letter in letters.items()}, []
    if kind == "gpt2":
        import tiktoken

        try:
            encoding = tiktoken.get_encoding("gpt2")
        except OSError:
            fail("tiktoken cannot download GPT-2's vocabulary: run once with a network, "
                 "TIKTOKEN_CACHE_DIR naming a folder that keeps it, or choose other --tokens")
        ranks = encoding._mergeable_ranks  # bytes of a token -> id; the lowest id is merged first
        vocab = {"".join(letters[byte] for byte in token): id for token, id in ranks.items()}
        for token in sorted(ranks, key=ranks.get):
            word = "".join(letters[byte] for byte in token)
            merges += [(word[:i], word[i:]) for i in range(1, len(word))
                       if word[:i] in vocab and word[i:] in vocab]
    codec = tokenizers.Tokenizer(models.BPE(vocab, merges))
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=kind != "bytes")
    codec.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        codec.add_special_tokens(["<|endoftext|>"])
    if kind == "bpe":
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        codec.train_from_iterator(pieces(train_text), trainer)
    return codec

def pieces(text: str) -> list[str]:
    """The lines, each with the newline before it: no token of the four kinds crosses these cuts."""
    return re.split(r"(?<=\S)(?=\n)", text)

def encode(codec: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """The text's token ids, in the smallest integers that hold them."""
    lines, ids = pieces(text), []
    for i in range(0, len(lines), 10_000):  # so that little beside the ids is in memory
        batch = codec.encode_batch_fast(lines[i : i + 10_000])
        ids.append(np.concatenate([np.array(line.ids, np.uint32) for line in batch]))
    ids = np.concatenate(ids)
    return ids.astype(np.uint16) if codec.get_vocab_size() <= 2**16 else ids

def random_batch(tokens, batch: int, block: int, seed: int, step: int):
    """The rows of one step [B, T + 1]; they follow from seed and step, so nothing is stored."""
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - block, size=(batch, 1))
    return tokens[starts + np.arange(block + 1)].astype(np.int32)

def windows(tokens, batch: int, block: int):
    """All tokens as batches [N, B, T + 1] in which each token but the first is a target once.

    Each row begins with the last token of the row before. -1 fills up the last batch.
    """
    rows = batch * -(-(len(tokens) - 1) // (batch * block))
    padded = np.full(rows * block + 1, -1, np.int32)
    padded[: len(tokens)] = tokens
    starts = np.arange(0, rows * block, block).reshape(-1, batch, 1)
    return padded[starts + np.arange(block + 1)]

# ----------------------------------------------------------------------------------------- learning

def token_losses(model, tokens, rngs=None):
    """Cross-entropy of each next token: tokens [B, T + 1] -> (float32 [B, T], the model's cache).
    Where a target is -1, it is 0."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x, cache = model.hidden(jnp.maximum(inputs, 0), rngs=rngs)  # [B, T, D]
    losses = optax.softmax_cross_entropy_with_integer_labels(model.head(x), targets)
    return jnp.where(targets >= 0, losses, 0), cache

def matrices(params):
    """Which parameters weight decay shrinks: biases and norms stay free."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)

def make_optimizer(args) -> tuple:
    """AdamW behind a clipped gradient -> (optimizer, its learning rate as a function of the step).

    The rate rises linearly and falls along half a cosine; Loshchilov & Hutter 2017 and 2019.
    """
    rate = optax.warmup_cosine_decay_schedule(
        args.lr / (args.warmup + 1), args.lr, args.warmup, args.steps, args.min_lr)
    adamw = optax.adamw(rate, b2=args.beta2, weight_decay=args.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(args.clip), adamw), rate

def train_step(graphdef, optimizer, balance, axis, params, opt_state, tokens, key, step):
    """Learns from tokens [B, T + 1] -> (params, opt_state, mean loss before the change).

    balance: what is added to the loss for experts, a function of the cache, or None. axis: the name
    under which pmap counts the devices; each has its own rows. None: one device.
    """
    key = jax.random.fold_in(key, step)  # dropout is another in each step and on each device
    if axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))

    def mean_loss(params):
        rngs = nnx.Rngs(dropout=key)
        losses, cache = token_losses(nnx.merge(graphdef, params), tokens, rngs)
        return losses.mean() + (balance(cache) if balance else 0), losses.mean()

    (_, loss), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
    if axis is not None:
        loss, gradients = jax.lax.pmean((loss, gradients), axis)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

def eval_step(graphdef, axis, params, tokens):
    """The losses of all targets in tokens [B, T + 1], summed up; without dropout."""
    total = token_losses(nnx.merge(graphdef, params), tokens)[0].sum()
    return total if axis is None else jax.lax.psum(total, axis)

def compile_steps(graphdef, optimizer, balance, parallel, devices):
    """(train_step, eval_step) as programs that take the params first; train_step overwrites them.

    pmap keeps a copy of the params on each device and gives each its part of the rows: tokens
    [devices, B / devices, T + 1]. All else, and every result, is the same on all devices.
    """
    axis = "devices" if parallel == "pmap" else None
    train = partial(train_step, graphdef, optimizer, balance, axis)
    evaluate = partial(eval_step, graphdef, axis)
    if axis is None:
        return jax.jit(train, donate_argnums=(0, 1)), jax.jit(evaluate)
    options = {"axis_name": axis, "out_axes": None, "devices": devices}
    train = jax.pmap(train, in_axes=(None, None, 0, None, None), donate_argnums=(0, 1), **options)
    return train, jax.pmap(evaluate, in_axes=(None, 0), **options)

def mean_eval_loss(evaluate, params, batches) -> float:
    """Mean loss over all targets of the batches of `windows`."""
    total = sum(float(evaluate(params, tokens)) for tokens in batches)
    return total / np.count_nonzero(batches[..., 1:] >= 0)

# -------------------------------------------------------------------------------------- checkpoints

# What must be the same when a run goes on, or it would be another run.
SETTINGS = ["model", "tokens", "layers", "heads", "width", "block", "dropout", "experts", "steps",
            "batch", "lr", "min_lr", "warmup", "weight_decay", "beta2", "clip", "seed"]

@contextmanager
def writing(out):
    """Turns an error while `out` is written to into one line for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fail(f"{out}: {error}: make room or choose another --out; earlier checkpoints remain")

def open_checkpoints(out: Path) -> ocp.CheckpointManager:
    """The last two states of a run, in out/checkpoints; each is there whole or not at all."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with writing(out):
        return ocp.CheckpointManager((out / "checkpoints").absolute(), options=options)

def save_checkpoint(checkpoints, step: int, state, settings: dict):
    """Stores the state after `step` steps, unless that is there."""
    if step in checkpoints.all_steps():
        return
    need = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    free = shutil.disk_usage(checkpoints.directory).free / 1e6
    with writing(checkpoints.directory.parent):
        if free < 1.2 * need:  # asked first, as Orbax fails with pages of tracebacks
            raise OSError(f"a checkpoint takes {need:.0f} MB, and {free:.0f} are free")
        checkpoints.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings)))
        checkpoints.wait_until_finished()  # the next step overwrites the arrays

def restore_checkpoint(checkpoints, state, settings: dict):
    """The newest checkpoint -> (step, state), in the shapes and on the devices of `state`."""
    step = checkpoints.latest_step()
    form = ocp.args.Composite(settings=ocp.args.JsonRestore())
    stored = checkpoints.restore(step, args=form).settings
    other = [f"--{name.replace('_', '-')} {stored[name]}" for name in settings
             if stored[name] != settings[name]]
    if other:
        fail(f"the run in {checkpoints.directory.parent} has {', '.join(other)}: resume with "
             "that, or begin in another --out")
    form = ocp.args.Composite(state=ocp.args.StandardRestore(state))
    return step, tuple(checkpoints.restore(step, args=form).state)

def write_model(out: Path, module, model, codec: tokenizers.Tokenizer, end: str | None):
    """Writes the finished folder, which the model file and transformers read."""
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
             "bos_token": end, "eos_token": end}
    with writing(out), tempfile.TemporaryDirectory(dir=out) as part:
        Path(part, "tokenizer.json").write_text(codec.to_str(pretty=True), encoding="utf-8")
        Path(part, "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
        module.save(model, part)
        for file in Path(part).iterdir():  # all is written, or none is replaced
            file.chmod(0o644)  # safetensors writes for the owner alone
            file.replace(out / file.name)

# -------------------------------------------------------------------------------------- the program

EVAL_BATCHES = 20  # of an estimate during the run; at the end all of the text counts

def traced_steps(first: int, last: int) -> range:
    """Five of the steps from `first` to before `last`: the eleventh and those after it or, where
    there are not as many, the second and those after it. The first one is mostly compiling."""
    start = first + (10 if last - first >= 15 else 1)
    return range(start, min(start + 5, last))

def note_memory(device, folder: Path, seconds: float):
    """Adds a line to memory.jsonl: what the device holds, if it counts that. A CPU does not."""
    if stats := device.memory_stats():
        used = {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use")}
        with open(folder / "memory.jsonl", "a") as file:
            print(json.dumps({"seconds": seconds, **used}), file=file)

def main(args) -> int:
    """Trains as the arguments say -> the exit code."""
    module = importlib.import_module(args.model)
    devices = pick_devices(args.device, args.parallel)
    jax.config.update("jax_default_device", devices[0])
    if args.batch % len(devices):
        fail(f"--batch {args.batch} does not split over {len(devices)} devices: choose a multiple")
    on_cpu = devices[0].platform == "cpu"
    dtype = jnp.dtype(args.dtype or ("float32" if on_cpu else "bfloat16"))

    text = read_text(args.data)
    cut = int(0.9 * len(text))
    if cut < 1:
        fail("--data has next to no text: name files with more")
    codec = make_tokenizer(args.tokens, text[:cut], text, args.vocab_size)
    train_tokens, val_tokens = encode(codec, text[:cut]), encode(codec, text[cut:])
    if min(len(train_tokens), len(val_tokens)) <= args.block:
        fail(f"--block {args.block} is longer than the text: {len(train_tokens)} tokens to train "
             f"on and {len(val_tokens)} to validate; shorten it, or give more --data")
    val_bytes = len(text[cut:].encode())
    shape = (len(devices), -1, args.block + 1) if args.parallel else (args.batch, args.block + 1)
    val_batches = windows(val_tokens, args.batch, args.block)
    val_batches = val_batches.reshape(len(val_batches), *shape)
    some_batches = val_batches[:: -(-len(val_batches) // EVAL_BATCHES)]

    vocab_size, end = codec.get_vocab_size(), "<|endoftext|>" if args.tokens == "gpt2" else None
    end_id = end and codec.token_to_id(end)
    config = module.Config.from_hf({
        **SIZES[args.model](args), "vocab_size": vocab_size, "bos_token_id": end_id,
        "eos_token_id": end_id,
        "padded_vocab_size": -(-vocab_size // 128) * 128})  # even is faster, on GPUs above all

    def balance_loss(cache):
        return config.router_aux_loss_coef * module.balance_loss(cache)

    balance = balance_loss if args.experts else None
    model = module.Model(config, rngs=nnx.Rngs(args.seed), dtype=dtype, remat=args.remat)
    graphdef, params = nnx.split(model)
    optimizer, rate = make_optimizer(args)
    opt_state, step = optimizer.init(params), 0
    train, evaluate = compile_steps(graphdef, optimizer, balance, args.parallel, devices)

    # For each token, a weight of a matrix takes part in 2 operations forward and 4 backward, and
    # attention adds its two products. An embedding is looked up, and counts only as the head.
    sizes = {jax.tree_util.keystr(path): p.size for path, p in jax.tree.leaves_with_path(params)}
    N = sum(size * (2 / args.experts if "experts" in path else 1) for path, size in sizes.items()
            if "kernel" in path)
    N = round(N + vocab_size * args.width)  # all heads are the token table
    flops, peak = 6 * N + 12 * args.layers * args.width * args.block, measure_peak(devices, dtype)
    print(f"model  {args.model}.py, {sum(sizes.values()):,} parameters, in {dtype.name} on "
          f"{len(devices)} x {devices[0].device_kind}\n"
          f"text   {len(train_tokens):,} tokens to train on, {len(val_tokens):,} to validate; "
          f"{vocab_size:,} different ones, {val_bytes / len(val_tokens):.2f} bytes each\n"
          f"MFU    (6 N + 12 L D T) x tokens/s / peak; N {N:,} weights in matrices, L "
          f"{args.layers}, D {args.width}, T {args.block}; peak, measured: {peak / 1e9:,.0f} "
          f"GFLOP/s", flush=True)

    settings = {name: vars(args)[name] for name in SETTINGS}
    settings["data"] = f"with checksum {zlib.crc32(train_tokens)}"
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)  # now, and not when all is trained
    checkpoints = open_checkpoints(args.out) if args.save_every or args.resume else None
    if args.resume:
        step, (params, opt_state) = restore_checkpoint(checkpoints, (params, opt_state), settings)
    traced = traced_steps(step, args.steps) if args.profile else range(0)
    if args.profile and not traced:
        fail("--profile takes two steps or more: the first one is mostly compiling")
    stop = []

    def interrupt(*_):
        stop.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it at once

    signal.signal(signal.SIGINT, interrupt)
    key, losses = jax.random.key(args.seed), []
    val_loss = mean_eval_loss(evaluate, params, some_batches)
    first, seconds, mark = step, 0.0, 0.0
    while step < args.steps and not stop:
        if step in traced[:1]:
            jax.block_until_ready(params)  # or the trace would begin with the steps before
            args.profile.mkdir(parents=True, exist_ok=True)
            (args.profile / "memory.jsonl").unlink(missing_ok=True)  # an older run's
            jax.profiler.start_trace(args.profile)
            begin = time.perf_counter()
        tokens = random_batch(train_tokens, args.batch, args.block, args.seed, step).reshape(shape)
        params, opt_state, loss = train(params, opt_state, tokens, key, step)
        losses.append(loss)
        if step in traced:
            note_memory(devices[0], args.profile, time.perf_counter() - begin)
            if stop or step == traced[-1]:
                loss.block_until_ready()
                end = time.perf_counter()
                jax.profiler.stop_trace()
                mark += time.perf_counter() - end  # writing it is no part of a step
                print(f"a trace of steps {traced[0] + 1} to {step + 1} is in {args.profile}: open "
                      "its newest .trace.json.gz on ui.perfetto.dev, or run "
                      f"`xprof {args.profile}`", file=sys.stderr)
        step += 1
        if on_cpu and len(devices) > 1:
            loss.block_until_ready()  # CPU devices share cores, and lock up with steps in flight
        eval_due = step % args.eval_every == 0 or step == args.steps
        save_due = args.save_every and step % args.save_every == 0
        if not (eval_due or save_due or step % 10 == 0 or step == first + 1):
            continue  # without waiting for the device
        losses = [float(loss) for loss in losses]  # waits for it
        if step > first + 1:  # the first step is mostly compiling
            seconds += time.perf_counter() - mark
        steps_s = (step - first - 1) / seconds if seconds else 0.0
        if eval_due:
            val_loss = mean_eval_loss(evaluate, params, some_batches)
        if eval_due or sys.stderr.isatty():
            tokens_s = steps_s * args.batch * args.block
            left = (args.steps - step) / steps_s if steps_s else 0.0
            print(f"step {step:>6}/{args.steps}  train {np.mean(losses):.4f}  val {val_loss:.4f}  "
                  f"lr {rate(step - 1):.2e}  {tokens_s:>9,.0f} tokens/s  MFU "
                  f"{flops * tokens_s / peak:5.1%}  {left // 60:3.0f}:{left % 60:02.0f} left",
                  end="\n" if eval_due else "\r", file=sys.stderr, flush=True)
        if eval_due:
            losses = []
        if save_due:
            save_checkpoint(checkpoints, step, (params, opt_state), settings)
        mark = time.perf_counter()

    if step < args.steps:
        checkpoints = checkpoints or open_checkpoints(args.out)
        save_checkpoint(checkpoints, step, (params, opt_state), settings)
        print(f"stopped after step {step}: the same command with --resume goes on from there",
              file=sys.stderr)
        return 130
    if checkpoints:
        save_checkpoint(checkpoints, step, (params, opt_state), settings)
    loss = mean_eval_loss(evaluate, params, val_batches)
    print(f"validation loss: {loss:.4f} a token, over all of the text")
    stored = jax.tree.map(lambda p: p.astype(args.save_dtype), params)
    write_model(args.out, module, nnx.merge(graphdef, stored), codec, end)
    graphdef, params = nnx.split(module.load(args.out, dtype=dtype, param_dtype=jnp.float32))
    _, evaluate = compile_steps(graphdef, optimizer, balance, args.parallel, devices)
    loss = mean_eval_loss(evaluate, params, val_batches)
    bits = loss / np.log(2) * (len(val_tokens) - 1) / val_bytes
    print(f"validation loss of the stored form, in {args.save_dtype}: {loss:.4f} a token, or "
          f"{bits:.3f} bits a byte\nfinished: {args.out}")
    return 0

if __name__ == "__main__":
    try:
        sys.exit(main(arguments()))
    except KeyboardInterrupt:
        sys.exit(130)
