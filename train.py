"""Trains any of the model files on text: from scratch, or on from a checkpoint, whole or with LoRA.

    python train.py                                          # a small GPT-2 on Python's own source
    python train.py --data shakespeare --tokens char --out runs/char         # nanoGPT's example
    python train.py --model llama --weights HuggingFaceTB/SmolLM2-135M --lora 8 --data 'my/*.txt'
    python sample.py --model gpt2 --weights runs/mine        # what has it learned?

The end of the text, a tenth at most, is not trained on: the loss on it, the validation loss, tells
how well the model predicts what it has not seen. Ctrl-C stops a run, and the same command with
--resume goes on from there, on a CPU bit for bit. The finished folder is a checkpoint as Hugging
Face has them, or an adapter as PEFT has.
"""

import argparse
import contextlib
import glob
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import timeit
import zlib
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pooch
import tiktoken
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.multihost_utils import process_allgather
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

AXIS, JOIN = r"(data|fsdp|tensor)(:[1-9]\d*)?", 300  # of --parallel; seconds to wait for hosts
HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax-one-file-models"
MODELS = [name for name in ("gpt2", "opt", "llama", "gemma", "mistral")
          if (HERE / f"{name}.py").exists()]

# --------------------------------------------------------------------------------- the command line
FLAGS = {  # name: (default, what it says). A type has no default; of a tuple it is the first.
    "text": {
        "--data": (str, "text, .jsonl, nanoGPT's .bin or shakespeare (default: Python's source)"),
        "--dataset": (str, "NAME[:SUBSET] on the Hub, its train split; needs the package datasets"),
        "--tokens": (str, "bpe (learned from the text; the default), char, bytes or gpt2"),
        "--vocab-size": (1024, "how many pieces bpe learns, the 256 bytes included")},
    "model": {
        "--model": ("gpt2", f"model file: {', '.join(MODELS)}"),
        "--weights": (str, "folder or Hub id to go on from (default: from scratch, with:)"),
        "--layers": (4, "blocks, one after the other"),
        "--heads": (4, "attention heads of a block"),
        "--width": (128, "length of a token's vector"),
        "--block": (64, "tokens seen at once; from scratch, the model's context"),
        "--dropout": (0.0, "share of the activations that each step leaves out (gpt2, opt)"),
        "--experts": (0, "MLPs of a block, of which a token takes two (mistral); 0: one for all"),
        "--lora": (0, "rank of what is trained beside each matrix, instead of all weights; 0: off"),
        "--lora-targets": (r".*\.(c_attn|c_proj|c_fc|\w+_proj|fc[12])", "paths of these matrices"),
        "--merge": (False, "write LoRA's result as a whole checkpoint, not as an adapter")},
    "training": {
        "--steps": (2000, "updates of the weights"),
        "--batch": (12, "rows of --block tokens in a step"),
        "--accumulate": (1, "parts of a batch that follow each other, to save memory"),
        "--optimizer": (("adamw", "lion", "adafactor", "muon"), "lion wants a tenth of --lr"),
        "--lr": (float, "highest learning rate (default: 3e-3; of --weights 3e-5, of LoRA 3e-4)"),
        "--schedule": (("cosine", "linear", "wsd"), "how it falls; wsd: in the last fifth alone"),
        "--min-lr": (float, "what it falls to (default: a tenth of the highest)"),
        "--warmup": (int, "steps in which it rises first (default: a twentieth of all)"),
        "--weight-decay": (0.1, "of matrices only"),
        "--beta1": (0.9, "share of the mean of gradients that each step keeps"),
        "--beta2": (0.99, "the same of the mean of squared gradients (lion: of gradients)"),
        "--clip": (1.0, "longest gradient, all of it taken as one vector"),
        "--ema": (0.0, "evaluate and write a running mean of the weights that keeps this share"),
        "--seed": (0, "of the first weights, the rows and dropout")},
    "output": {
        "--out": (Path, "folder for the model and its checkpoints (default: runs/MODEL)"),
        "--resume": (False, "go on from the newest checkpoint in --out"),
        "--eval-every": (250, "steps between estimates of the validation loss"),
        "--save-every": (500, "steps between checkpoints; 0: only the model at the end"),
        "--keep": (2, "how many of the last checkpoints stay, beside the best"),
        "--save-dtype": (("float32", "bfloat16", "float16"), "of the finished model's weights"),
        "--prompt": (str, "show at each estimate how the model goes on after this"),
        "--profile": (Path, "folder for a trace of five steps, for Perfetto or xprof")},
    "machine": {
        "--device": (str, "cpu, gpu or tpu; gpu:1 is the second GPU (default: the best there is)"),
        "--parallel": ("auto", "over devices: pmap, data, fsdp, tensor, data:2,tensor:4 or no"),
        "--multihost": (str, "ADDRESS:PORT,HOSTS,HOST: of the first, how many, this one; or auto"),
        "--dtype": (("auto", "float32", "bfloat16", "float16"), "computed in; auto: by the device"),
        "--remat": (False, "save memory: compute each block again for its gradient")}}
def check(fits, message):
    """Ends with exit code 2 and a line that says what is wrong and what to do, unless it fits."""
    if not fits:
        print("train.py: " + " ".join(str(message).split()), file=sys.stderr)
        sys.exit(2)
@contextlib.contextmanager
def explained(errors, message: str):
    """Makes such errors that line, with what they say for {}."""
    try:
        yield
    except errors as error:
        check(False, message.replace("{}", str(error)))
def arguments():
    """The command line, read and checked as far as that needs neither the text nor a device."""
    parser = argparse.ArgumentParser(
        prog="train.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.error = partial(check, False)
    for title, flags in FLAGS.items():
        add = parser.add_argument_group(title).add_argument
        for flag, (default, about) in flags.items():
            known = {"default": default, "help": f"{about} (default: %(default)s)"}
            if default is False:
                add(flag, action="store_true", help=about)
            elif isinstance(default, tuple):
                add(flag, choices=default, **known | {"default": default[0]})
            elif isinstance(default, type):
                add(flag, type=default, help=about, nargs="+" if flag == "--data" else None)
            else:
                add(flag, type=type(default), **known)
    args = parser.parse_args()
    args.data, args.out = args.data or [], args.out or Path("runs", args.model)
    local = HERE / "tiny" / args.model if args.weights == "tiny" else Path(args.weights or "")
    args.weights = str(local.resolve()) if args.weights and local.is_dir() else args.weights
    rate = 3e-4 if args.lora else 3e-5 if args.weights else 3e-3
    args.lr = rate if args.lr is None else args.lr
    args.min_lr = args.lr / 10 if args.min_lr is None else args.min_lr
    args.warmup = args.steps // 20 if args.warmup is None else args.warmup
    bins = any(file.endswith(".bin") for x in args.data for file in (glob.glob(x) or [x]))
    kinds = ["its own"] if args.weights else ["gpt2"] if bins else ["bpe", "char", "bytes", "gpt2"]
    args.tokens = args.tokens or kinds[0]
    stored = any(path.name.isdigit() for path in args.out.glob("checkpoints/*"))
    least = {1: "layers heads width block steps batch accumulate eval_every keep",
             256: "vocab_size", 0: "seed save_every lora weight_decay min_lr warmup"}
    modes, axes = rf"no|auto|pmap|{AXIS}(,{AXIS})*", re.findall("[a-z]+", args.parallel)
    for fits, rule in [
        (args.model in MODELS, f"no model file for {args.model!r}; there are: {', '.join(MODELS)}"),
        *[(vars(args)[name] >= n, f"--{name.replace('_', '-')} must be {n} or more")
          for n, names in least.items() for name in names.split()],
        *[(0 <= vars(args)[x] < 1, f"--{x}: 0 to below 1") for x in
          ("dropout", "beta1", "beta2", "ema")],
        (args.tokens in kinds, f"--tokens {args.tokens}: it must be {' or '.join(kinds)} here"),
        (args.width % max(1, args.heads) == 0, "--width must be a multiple of --heads"),
        (not args.dropout or args.model in ("gpt2", "opt"), f"{args.model}.py has no --dropout"),
        (not args.experts or args.model == "mistral", "--experts are of --model mistral"),
        (args.experts != 1, "--experts must be 0, or 2 or more"),
        (not args.lora or args.weights, "--lora adds to trained weights: name them with --weights"),
        (not args.merge or args.lora, "--merge is for --lora"),
        (re.fullmatch(modes, args.parallel) and len(set(axes)) == len(axes),
         "--parallel: pmap, or like fsdp or data:2,tensor:4"),
        (not args.multihost or (args.parallel != "no" and ":" not in (args.device or "")),
         "--multihost takes all devices: leave --parallel no and the number of --device out"),
        (not args.multihost or not (args.parallel == "pmap" or args.prompt),
         "--parallel pmap and --prompt are for one host"),
        (re.fullmatch(r"auto|[^,]+:\d+,\d+,\d+", args.multihost or "auto"),
         "--multihost must be auto, or like 10.0.0.1:1234,2,0"),
        (not args.dataset or find_spec("datasets"), "--dataset needs: pip install datasets"),
        (args.warmup < args.steps, "--warmup must be below --steps"),
        (not args.profile or args.steps > 14, "--profile traces five steps after ten: --steps 15"),
        (args.clip > 0 < args.lr >= args.min_lr, "--lr, --clip: above 0; --min-lr: at most --lr"),
        ((args.dtype, args.model) != ("float16", "gemma"), "gemma.py leaves the range of float16"),
        (not args.out.exists() or args.out.is_dir(), f"--out {args.out} is a file: name a folder"),
        (stored or not args.resume, f"{args.out} has no checkpoints: leave --resume out to begin"),
        (args.resume or not (stored or any(args.out.glob("*.safetensors"))),
         f"{args.out} holds a run already: add --resume to go on, or choose another --out")]:
        check(fits, rule)
    return args

# ------------------------------------------------------------------------------------------ devices
def meet(address: str, hosts: int, host: int):
    """Waits for all hosts at the address of the first, which tells the others who is missing. JAX
    would end the process without a word about it."""
    (name, port), end, came, missing = address.rsplit(":", 1), time.monotonic() + JOIN, {}, [0]
    check(host < hosts, f"--multihost: there is no host {host} of {hosts}, counted from 0")
    if host == 0:
        with socket.create_server(("", int(port))) as server, contextlib.suppress(TimeoutError):
            while len(came) < hosts - 1:
                server.settimeout(max(0.01, end - time.monotonic()))
                link, _ = server.accept()
                came[int(link.recv(99))] = link
        missing = [i for i in range(1, hosts) if i not in came]
        for link in came.values():
            link.sendall(json.dumps(missing).encode())
    while host and missing == [0] and time.monotonic() < end:  # the first is, until it has answered
        with contextlib.suppress(OSError, ValueError), socket.create_connection(
                (name, port), 1) as link:
            link.settimeout(JOIN)
            link.sendall(str(host).encode())
            missing = json.loads(link.recv(9999))
        time.sleep(0.2)
    check(not missing, f"--multihost {address}: {missing} of {hosts} did not come in {JOIN} s")
def join_hosts(where: str):
    """Joins the other hosts of --multihost; only the first goes on to print."""
    known = ([kind(x) for kind, x in zip((str, int, int), where.split(","), strict=True)]
             if where != "auto" else [])
    known and meet(*known)
    with explained(ValueError, f"--multihost {where}: {{}}"):
        jax.distributed.initialize(*known)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
def pick_devices(name: str, parallel: str) -> list:
    """The devices of --device; a single one if it is numbered, or --parallel is no."""
    check(re.fullmatch(r"((cpu|gpu|tpu)(:\d+)?)?", name), f"--device {name}: it must be cpu, gpu, "
          "tpu, or a numbered one such as gpu:1")
    kind, _, index = name.partition(":")
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")  # or a GPU is started, and its memory taken
    with explained(RuntimeError, f"--device {name}: JAX does not find it; leave it out"):
        devices = jax.devices(kind or None)
    check(int(index or 0) < (n := len(devices)), f"--device {name}: there are {n}, counted from 0")
    return [devices[int(index or 0)]] if parallel == "no" or index else devices
def make_mesh(parallel: str, devices: list, heads: int, need) -> jax.sharding.Mesh:
    """The devices along the axes of --parallel. An axis without a number takes what is left; auto
    is data, or tensor where the `need()` bytes of the training state do not fit one device."""
    if parallel in ("no", "auto"):
        own = next(device for device in devices if device.process_index == jax.process_index())
        parallel, room = "data", (own.memory_stats() or {}).get("bytes_limit", np.inf)
        if len(devices) > 1:
            most = max(n for n in range(1, len(devices) + 1) if heads % n == 0)
            parallel, why = (f"tensor:{most}", "more") if need() > room else ("data", "less")
            print(f"--parallel {parallel}: the state takes {why} than the memory of one device")
    axes = {name: int(n or 0) for name, _, n in (x.partition(":") for x in parallel.split(","))}
    left = len(devices) // math.prod(n for n in axes.values() if n)
    axes = {name: n or left for name, n in axes.items()}
    check(0 < (count := math.prod(axes.values())) <= len(devices), f"--parallel {parallel}: there "
          f"are {len(devices)} devices; say how many along all axes but one, and no more")
    check(count == len(devices) or jax.process_count() == 1,
          f"--parallel {parallel} leaves devices out: of several hosts all must take part")
    n, fit = axes.get("tensor", 1), [n for n in range(2, heads + 1) if heads % n == 0]
    check(n == 1 or n in fit, f"--parallel: {heads} heads split over tensor: {fit}, not over {n}")
    return jax.sharding.Mesh(np.reshape(devices[:count], [*axes.values()]), [*axes])
def place(mesh, parts: int, shape, read):
    """Rows [(parts,) n, rows, T + 1] on the devices: a group for each, or for each set of them that
    shares a model by tensor. Each host reads those of its own: read(slices) -> their tokens."""
    axes = tuple(axis for axis in mesh.shape if axis != "tensor")
    spec = jax.P(*[None] * parts, axes)
    return jax.make_array_from_callback(shape, jax.NamedSharding(mesh, spec), read)
def measure_peak(devices: list, dtype) -> float:
    """FLOP/s that the devices reach in the product of two large square matrices."""
    n = 2048 if devices[0].platform == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    seconds = timeit.repeat(lambda: (a @ a).block_until_ready(), number=1, repeat=4)
    return len(devices) * 2 * n**3 / np.median(seconds[1:])  # the first one compiles too

# --------------------------------------------------------------------------------------------- text
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
END, WIDTH = "<|endoftext|>", ["u4", "u2"]  # bytes of a token id: two, as nanoGPT's, if they do
def find_files(names: list[str]) -> list[Path]:
    """The files that --data names, in that order; without any, Python's own but for its tests."""
    library, files = Path(os.__file__).parent, []
    for name in names:
        found = [Path(file) for file in sorted(glob.glob(name, recursive=True)) or [name]]
        found = [file for file in found if file.is_file()]
        if not found and name == "shakespeare":
            with explained((OSError, ValueError), f"--data {name}: {{}}; name a file of yours"):
                found = [Path(pooch.retrieve(*SHAKESPEARE, "tinyshakespeare.txt", CACHE))]
        check(found, f"--data {name}: no such file: name text, .jsonl, .bin or shakespeare")
        files += found
    return files or sorted(file for file in library.rglob("*.py") if not re.search(
        "(site|dist)-packages|/(idle_)?tests?/", str(file.relative_to(library.parent))))
def texts_in(file: Path) -> list[str]:
    """The texts of a file: all of it, or those in the lines of a .jsonl."""
    with explained(OSError, f"--data {file}: {{}}: name files that can be read"), explained(
            UnicodeDecodeError, f"--data {file} is not UTF-8 text: {{}}: convert it first"):
        text, texts = file.read_bytes().decode(), []  # as reading text would turn \r\n into \n
    for i, line in enumerate(text.split("\n") if file.suffix == ".jsonl" else [], 1):
        with explained((ValueError, KeyError, TypeError, AttributeError),
                       f'--data {file}, line {i}: it must be like {{"text": "..."}}'):
            texts += [json.loads(line)["text"].encode().decode()] if line.strip() else []
    return texts if file.suffix == ".jsonl" else [text]
def pieces(texts):
    """Yields (piece of a text, does the text end with it); no token of ours crosses a cut."""
    for text in texts:
        found = re.findall(r"(?s).{16384}.*?\S(?=\n)|.+", text) or [""]
        yield from ((piece, i == len(found)) for i, piece in enumerate(found, 1))
def write_tokenizer(folder: Path, kind: str, vocab_size: int, texts):
    """Writes a tokenizer of a kind of --tokens, which gives a text back as it was; where there are
    several, with a token that ends one. bpe learns its pieces from the first nine tenths."""
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    alphabet, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []  # char, bytes: no merges
    if kind == "gpt2":
        from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges
        with explained(OSError, "GPT-2's vocabulary cannot be downloaded: run once online, with a "
                       "folder in TIKTOKEN_CACHE_DIR, or choose other --tokens"):
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks  # bytes -> id
        letters = bytes_to_unicode()
        alphabet = ["".join(map(letters.get, x)) for x in sorted(ranks, key=ranks.get)]
        merges = generate_merges({x: i for i, x in enumerate(alphabet)}, None)
    elif kind == "char":  # later it drops what is not in this text
        alphabet = sorted(set().union(*texts))
    codec = Tokenizer(models.BPE({x: i for i, x in enumerate(alphabet)}, merges))
    codec.decoder = decoders.Fuse() if kind == "char" else decoders.ByteLevel()
    if kind != "char":
        codec.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=kind != "bytes")
    if kind == "bpe":
        learned = "".join(texts)[: int(0.9 * sum(map(len, texts)))]
        codec.train_from_iterator((x for x, _ in pieces([learned])), trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet))
    if kind == "gpt2" or len(texts) > 1:
        codec.add_special_tokens([END])
        about |= {"bos_token": END, "eos_token": END}
    (folder / "tokenizer.json").write_text(codec.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
def vocabulary(folder, written: Path) -> tuple:
    """(size, token that ends a text or None) of the checkpoint in a folder, or what was written."""
    if folder:
        config = json.loads((folder / "config.json").read_text())
        config |= config.get("text_config", {})  # of Gemma 3 with pictures
        return config["vocab_size"], next(iter(np.ravel(config.get("eos_token_id"))), None)
    codec = Tokenizer.from_file(f"{written}/tokenizer.json")
    return codec.get_vocab_size(), codec.token_to_id(END)
def write_tokens(part: Path, module, folder: Path, V: int, end: int | None, texts):
    """Writes tokens.bin, the tokens of all texts, each between what begins and what ends a text."""
    codec, file, fresh = module.tokenizer(folder), folder / "tokenizer.json", True
    fast = Tokenizer.from_file(str(file)) if file.exists() else None  # so that all cores encode
    fast and (fast.no_truncation(), fast.no_padding())  # which a tokenizer.json may ask for
    todo, begin, after = pieces(texts), codec.encode(""), [] if end is None else [end]
    bar = tqdm(desc="tokens", unit_scale=True, disable=None, total=sum(map(len, texts)))
    with bar, open(part / "tokens.bin", "wb") as out:
        while batch := list(itertools.islice(todo, 1000)):
            parts = [text for text, _ in batch]
            rows = ([row.ids for row in fast.encode_batch_fast(parts, add_special_tokens=False)]
                    if fast else [codec.encode(text)[len(begin) :] for text in parts])
            for (text, ends), ids in zip(batch, rows, strict=True):
                np.array(begin * fresh + ids + after * ends, WIDTH[V <= 2**16]).tofile(out)
                fresh = ends
                bar.update(len(text))
def prepare(args, module, folder) -> tuple:
    """The text's tokens, encoded once and kept in the cache folder -> (those to train on, those to
    validate on, the folder of their tokenizer)."""
    files = find_files(args.data) if args.data or not args.dataset else []
    binary = [file for file in files if file.suffix == ".bin"]
    check(not binary or (binary == files and len(files) < 3 and not args.dataset),
          "--data: a .bin stands alone, or before the one to validate on")
    texts = [text for file in files if not binary for text in texts_in(file)]
    if args.dataset:
        from datasets import load_dataset
        errors = ValueError, OSError, KeyError, RuntimeError
        with explained(errors, f"--dataset {args.dataset}: {{}}"):
            texts += load_dataset(*args.dataset.split(":"), split="train")["text"]
        check(all(isinstance(x, str) for x in texts), f"--dataset {args.dataset}: not all is text")
    read = [Path(__file__), Path(module.__file__), *(folder.iterdir() if folder else ())]
    about = [args.tokens, args.vocab_size, folder, *(file.read_bytes() for file in read if
                                                     re.search("(py|json|txt|model)$", file.name))]
    digest = hashlib.sha256("\0".join(map(str, [*about, *texts])).encode())
    cached = CACHE / "tokens" / digest.hexdigest()[:16]
    with writing(cached):
        cached.parent.mkdir(parents=True, exist_ok=True)
        if not cached.exists():  # all of it is there, or nothing
            with tempfile.TemporaryDirectory(dir=cached.parent, ignore_cleanup_errors=True) as part:
                if not folder:
                    write_tokenizer(Path(part), args.tokens, args.vocab_size, texts)
                V, end = vocabulary(folder, part)
                if not binary:
                    write_tokens(Path(part), module, folder or Path(part), V, end, texts)
                cached.exists() or Path(part).rename(cached)  # of another run, meanwhile
    V, _ = vocabulary(folder, cached)
    kind, found = WIDTH[V <= 2**16], []
    for file in binary or [cached / "tokens.bin"]:
        size = file.stat().st_size
        check(size % np.dtype(kind).itemsize == 0, f"--data {file} ends in the middle of a token")
        found.append(np.memmap(file, kind, "r") if size else np.zeros(0, int))
    cut = max(int(0.9 * len(found[0])), len(found[0]) - 2**20)
    train, val = found if len(found) > 1 else np.split(found[0], [cut])
    check(min(len(train), len(val)) > args.block, f"--block {args.block} is longer than the text: "
          f"{len(train)} tokens to train on, {len(val)} to validate on; shorten it, or give more")
    top = max(train.max(), val.max())
    check(top < V, f"the text has token {top}, the model has {V}: encode it for this model")
    return train, val, folder or cached
@lru_cache(maxsize=2)
def shuffled(length: int, block: int, seed: int, epoch: int):
    """Where an epoch's rows begin: the text is cut at another place each time, and shuffled."""
    rng, rows = np.random.default_rng((seed, epoch)), max(1, (length - 1) // block - 1)
    return rng.integers(length - rows * block) + block * rng.permutation(rows)
def rows_of(tokens, numbers, block: int, seed: int):
    """The rows [..., T + 1] of a run that have these numbers [...], counted from its begin."""
    rows = len(shuffled(len(tokens), block, seed, 0))
    starts = [shuffled(len(tokens), block, seed, i // rows)[i % rows] for i in numbers.flat]
    found = np.stack([tokens[start : start + block + 1] for start in starts]).astype(np.int32)
    return found.reshape(*numbers.shape, -1)
def windows(tokens, batch: int, block: int):
    """All tokens as batches [N, B, T + 1]: each but the first is a target once; -1 fills up."""
    rows = batch * -(-(len(tokens) - 1) // (batch * block))
    padded = np.pad(tokens.astype(int), (0, rows * block + 1 - len(tokens)), constant_values=-1)
    return padded[np.arange(0, rows * block, block).reshape(-1, batch, 1) + np.arange(block + 1)]

# ----------------------------------------------------------------------------------------- learning
LOGITS = 2**28  # as many at once, 1 GiB of them; more are made in parts, and again for the gradient
def token_losses(model, tokens, rngs=None):
    """Cross-entropy of each next token: tokens [B, T + 1] -> (float32 [B, T], whether the token was
    the likeliest [B, T], the model's cache). Both are 0 where the target is -1."""
    def of_token(x, target):  # [D], an id
        logits = model.head(x)  # [V]
        label = logits[jnp.maximum(target, 0)]
        return (jnp.where(target < 0, 0, jax.nn.logsumexp(logits) - label),
                (target >= 0) & (label >= logits.max()))
    x, cache = model.hidden(jnp.maximum(tokens[:, :-1], 0), rngs=rngs)  # [B, T, D]
    of_column, targets = jax.vmap(of_token), tokens[:, 1:]
    most = max(1, LOGITS // (len(tokens) * model.config.vocab_size))  # columns [B] at once
    if targets.shape[1] <= most:
        return *jax.vmap(of_column)(x, targets), cache
    found = jax.lax.map(jax.checkpoint(lambda column: of_column(*column)),
                        (x.swapaxes(0, 1), targets.T), batch_size=most)
    return *(each.T for each in found), cache
def make_optimizer(args) -> tuple:
    """(--optimizer behind a clipped gradient, its learning rate by the step); matrices decay."""
    steps, lr, low = args.steps - args.warmup, args.lr, args.min_lr
    level = steps - args.steps // 5 if args.schedule == "wsd" else 0
    fall = (optax.cosine_decay_schedule(lr, steps, low / lr) if args.schedule == "cosine" else
            optax.linear_schedule(lr, low, steps - level, level))
    rise = optax.linear_schedule(lr / (args.warmup + 1), lr, args.warmup)
    rate = optax.join_schedules([rise, fall], [args.warmup])
    mask, decay = partial(jax.tree.map, lambda p: p.ndim >= 2), args.weight_decay
    kernels = partial(jax.tree.map_with_path, lambda path, p: (  # a table of vectors is no matrix
        optax.contrib.MuonDimensionNumbers() if p.ndim == 2 and "kernel" in str(path) else None))
    plain, factored = {"weight_decay": decay, "mask": mask}, lambda step: decay * rate(step)
    optimizer = {
        "adamw": partial(optax.adamw, b1=args.beta1, b2=args.beta2, **plain),
        "lion": partial(optax.lion, b1=args.beta1, b2=args.beta2, **plain),
        "adafactor": partial(optax.adafactor, weight_decay_rate=factored, weight_decay_mask=mask),
        "muon": partial(optax.contrib.muon, beta=args.beta1, adam_b2=args.beta2,
                        weight_decay=decay, weight_decay_mask=mask, consistent_rms=0.2,
                        muon_weight_dimension_numbers=kernels)}[args.optimizer](rate)
    return optax.chain(optax.clip_by_global_norm(args.clip), optimizer), jax.jit(rate)
def first_state(args, optimizer, params, mesh) -> dict:
    """All that a step changes. scale: of the loss, or small gradients would be 0 in float16."""
    state = {"step": jnp.zeros((), int), "params": params, "optimizer": optimizer.init(params),
             **({"ema": jax.tree.map(jnp.copy, params)} if args.ema else {}),
             **({"scale": jnp.array(2.0**15)} if args.dtype == "float16" else {})}
    on_all = jax.NamedSharding(mesh, jax.P())  # but what is split as its parameter is
    return jax.tree.map(lambda x: x if isinstance(x.sharding, jax.NamedSharding)
                        else jax.device_put(x, on_all), state)
def train_step(merge, again, optimizer, balance, ema, axis, state, frozen, tokens, key):
    """Learns from tokens [parts, ..., T + 1], part by part -> (state, {mean loss, share of right
    guesses, norm of the gradient}). merge: (params, frozen) -> model. again: changes what the loss
    keeps for the gradient. balance: what is added to the loss for experts, a function of the cache,
    or None. axis: pmap's devices, each with its own rows, or None. In float16 a step whose gradient
    is not finite changes nothing but the scale: Micikevicius et al. 2018."""
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])  # [parts, B, T + 1]
    key = jax.random.fold_in(key, state["step"])  # dropout is another in each step and on each
    key = key if axis is None else jax.random.fold_in(key, jax.lax.axis_index(axis))  # device
    # pmap's devices add up here; without an axis the program is for all rows, and XLA does so.
    add_up = (lambda x: x) if axis is None else partial(jax.lax.psum, axis_name=axis)
    count, shares = add_up(jnp.sum(tokens[..., 1:] >= 0)), add_up(len(tokens))
    params, scale, keys = state["params"], state.get("scale", 1), jax.random.split(key, len(tokens))
    def mean_loss(params, rows, key):
        losses, right, cache = token_losses(merge(params, frozen), rows, nnx.Rngs(dropout=key))
        if balance and axis:  # of the choices on all devices, as it is no sum of theirs
            cache = cache._replace(layers=jax.lax.pmean(cache.layers, axis))
        loss, more = losses.sum() / count, balance(cache) / shares if balance else 0
        return scale * (loss + more), {"loss": loss, "accuracy": right.sum() / count}
    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None
    gradient = jax.value_and_grad(again(mean_loss), has_aux=True)
    total = gradient(params, tokens[0], keys[0])
    total = jax.lax.scan(add, total, (tokens[1:], keys[1:]))[0] if len(tokens) > 1 else total
    (_, found), gradients = add_up(total)
    gradients = jax.tree.map(lambda g: g / scale, gradients) if "scale" in state else gradients
    norm = optax.tree.norm(gradients)
    updates, changed = optimizer.update(gradients, state["optimizer"], params)
    new = state | {"params": optax.apply_updates(params, updates), "optimizer": changed}
    if "ema" in state:
        new["ema"] = optax.incremental_update(new["params"], state["ema"], 1 - ema)
    if "scale" in state:
        finite, later = jnp.isfinite(norm) | (scale < 1), state["step"] % 1000 == 999
        new, norm = jax.tree.map(partial(jnp.where, finite), (new, norm), (state, 0.0))
        new["scale"] = scale * jnp.where(finite, 1.0 + later, 0.5)
    return new | {"step": state["step"] + 1}, found | {"norm": norm}
def eval_step(merge, axis, params, frozen, tokens):
    """The losses of all targets in tokens [..., T + 1], and how many were the likeliest: sums."""
    losses, right, _ = token_losses(merge(params, frozen), tokens.reshape(-1, tokens.shape[-1]))
    found = losses.sum(), right.sum()
    return found if axis is None else jax.lax.psum(found, axis)
def merge_on(mesh, graphdef, dtype, params, frozen):
    """The function that makes a model of such params and frozen parts inside of a program. What is
    split along the axis fsdp is made whole, in `dtype`, on each device, where a block needs it."""
    spread = jax.tree.map(lambda p: p.sharding, (params, frozen))
    def gather(p, sharding):
        if "fsdp" not in sharding.spec:
            return p
        spec = jax.P(*(None if axis == "fsdp" else axis for axis in sharding.spec))
        p = jax.lax.with_sharding_constraint(p.astype(dtype), jax.NamedSharding(mesh, spec))
        return checkpoint_name(p, "gathered")
    return lambda *parts: nnx.merge(graphdef, *jax.tree.map(gather, parts, spread))
def compile_steps(merge, optimizer, balance, ema, mesh, state):
    """(train_step, eval_step) as programs; the first overwrites the state; tokens as of `place`.
    pmap runs the program on each device, with sums over all of them where they are written; else
    one program is for all, and XLA splits it as state and rows are."""
    axis = "pmap" if "pmap" in mesh.shape else None
    # What FSDP gathered for the loss is dropped, and gathered again for the gradient.
    kept = jax.checkpoint_policies.save_anything_except_these_names("gathered")
    again = partial(jax.checkpoint, policy=kept) if "fsdp" in mesh.shape else lambda f: f
    train = partial(train_step, merge, again, optimizer, balance, ema, axis)
    evaluate = partial(eval_step, merge, axis)
    if axis:
        how = {"axis_name": axis, "out_axes": None, "devices": [*mesh.devices.flat]}
        train = jax.pmap(train, in_axes=(None, None, 1, None), donate_argnums=0, **how)
        return train, jax.pmap(evaluate, in_axes=(None, None, 0), **how)
    stays = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train, donate_argnums=0, out_shardings=(stays, None)), jax.jit(evaluate)
def mean_eval(evaluate, mesh, params, frozen, batches) -> tuple:
    """Mean loss and share of right guesses over all targets of the batches of `windows`."""
    found = [jax.device_get(evaluate(params, frozen, place(
        mesh, 0, batch.shape, batch.__getitem__))) for batch in batches]
    return tuple(np.sum(found, axis=0) / np.count_nonzero(batches[..., 1:] >= 0))

# --------------------------------------------------------------------------------------------- LoRA
def adapters_in(model) -> dict:
    """{path: (the module that holds it, its name there, the layer)} of all linear layers."""
    return {(*path, name): (holder, name, layer) for path, holder in nnx.iter_modules(model)
            for name, layer in vars(holder).items() if isinstance(layer, nnx.Linear | nnx.LoRA)}
def add_adapters(module, model, args) -> dict:
    """Puts A B of rank --lora beside each matrix whose path fits, A random and B zero (Hu et al.
    2021), without a change to the model file -> {path: the matrix's name in a checkpoint}."""
    rngs, found = nnx.Rngs(args.seed), {}
    names = {path: name for path, _, name, _ in module.named_parameters(nnx.state(model))}
    for path, (holder, name, layer) in adapters_in(model).items():
        dotted = ".".join(map(str, path))
        as_array = name in ("lm_head", "w1", "w2", "w3")  # their files read these without a call
        if re.fullmatch(args.lora_targets, dotted) and not as_array:
            found[path] = names[f"{dotted}.kernel"].removesuffix(".weight")
            setattr(holder, name, nnx.LoRA(layer.in_features, args.lora, layer.out_features,
                                           base_module=layer, dtype=layer.dtype, rngs=rngs))
    return found
def merge_adapters(model, paths):
    """Adds each product to its matrix, so that the model is one of its file again."""
    found = adapters_in(model)
    for holder, name, lora in map(found.get, paths):
        kernel = lora.base_module.kernel
        kernel.set_value(kernel[...] + lora.lora_a[...] @ lora.lora_b[...])  # float32
        setattr(holder, name, lora.base_module)
def write_adapters(folder: Path, args, model, names: dict):
    """Writes them as PEFT does; names: as from `add_adapters`."""
    found = adapters_in(model)
    tensors = {f"base_model.model.{name}.lora_{letter}.weight": np.ascontiguousarray(np.asarray(
        getattr(found[path][-1], f"lora_{letter.lower()}")[...], args.save_dtype).T)
        for path, name in names.items() for letter in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": args.weights,
        "r": args.lora, "lora_alpha": args.lora, "target_modules": sorted(names.values()),
        "fan_in_fan_out": args.model == "gpt2", "inference_mode": True}, indent=2) + "\n")

# -------------------------------------------------------------------------------------- checkpoints
SETTINGS = [  # must be the same when a run goes on
    flag[2:].replace("-", "_") for title in ("text", "model", "training")
    for flag in FLAGS[title] if flag not in ("--data", "--accumulate", "--merge")] + ["dtype"]
def writing(out):
    """For what is written to `out`, where there may be no room."""
    return explained((OSError, SafetensorError), f"{out}: {{}}: make room or choose another --out; "
                     "earlier checkpoints remain")
def open_checkpoints(out: Path, keep: int) -> ocp.CheckpointManager:
    """The last states of a run and the best one, in out/checkpoints; each whole or not at all."""
    policies, loss = ocp.checkpoint_managers, lambda metrics: metrics["val_loss"]
    kept = policies.AnyPreservationPolicy([policies.LatestN(keep), policies.BestN(
        get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)])
    with writing(out):
        return ocp.CheckpointManager((out / "checkpoints").absolute(), options=(
            ocp.CheckpointManagerOptions(preservation_policy=kept, best_fn=loss, best_mode="min")))
def save_checkpoint(checkpoints, state, settings: dict, val_loss: float | None):
    """Begins to store the state; it is written while the training goes on."""
    step, need = int(state["step"]), sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    with writing(checkpoints.directory.parent):
        checkpoints.wait_until_finished()  # of the one before
        if 1.2 * need > (free := shutil.disk_usage(checkpoints.directory).free / 1e6):
            raise OSError(f"a checkpoint takes {need:.0f} MB, and {free:.0f} are free")
        if jax.default_backend() == "cpu":  # where Orbax would read what the next step overwrites
            state = jax.tree.map(jnp.copy, state)
        checkpoints.save(step, metrics=val_loss and {"val_loss": val_loss}, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings)))
def restore_checkpoint(checkpoints, step: int, state, settings: dict):
    """The state after a step, in the shapes and on the devices of `state`."""
    form, folder = ocp.args.Composite, checkpoints.directory
    with explained((KeyError, ValueError, OSError),
                   f"{folder / str(step)} is damaged ({{}}): without it, --resume takes another"):
        stored = checkpoints.restore(step, args=form(settings=ocp.args.JsonRestore())).settings
        other = [f"--{name.replace('_', '-')} {stored.get(name)}" for name in settings
                 if stored.get(name) != settings[name]]
        check(not other, f"the run in {folder.parent} has {', '.join(other)}: resume with that, or "
              "begin in another --out")
        return checkpoints.restore(step, args=form(state=ocp.args.StandardRestore(state))).state
TOKENIZER = re.compile(r".*token.*json|.*jinja|vocab.json|merges.txt|.*\.model|gen.*json").fullmatch
def write_model(args, module, model, tokenizer_folder: Path, names: dict):
    """Writes the finished folder, which the model file and transformers read, or LoRA's adapter."""
    with writing(args.out), tempfile.TemporaryDirectory(dir=args.out) as part:
        for file in filter(lambda file: TOKENIZER(file.name), tokenizer_folder.iterdir()):
            shutil.copyfile(file, Path(part, file.name))
        if names and not args.merge:
            write_adapters(Path(part), args, model, names)
        else:
            merge_adapters(model, names)
            graphdef, params = nnx.split(model)
            params = jax.tree.map(lambda p: p.astype(args.save_dtype), params)
            module.save(nnx.merge(graphdef, params), part)
        for file in Path(part).iterdir():  # all is written, or none is replaced
            file.chmod(0o644)  # safetensors writes for the owner alone
            file.replace(args.out / file.name)

# ----------------------------------------------------------------------------------------- watching
class Metrics:
    """The rows of out/metrics.jsonl up to `step`; later ones, of a run that was cut off, go. Where
    there is a tensorboard, out/tensorboard gets them too. Of several hosts the first writes."""
    def __init__(self, out: Path, step: int):
        self.file, self.rows, self.board = out / "metrics.jsonl", [], None
        self.write = jax.process_index() == 0
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the last line may be cut off
                self.rows += [row for row in [json.loads(line)] if row["step"] <= step]
        with writing(part := out / "metrics.part"):
            if self.write:
                part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
                part.replace(self.file)  # there is no moment without the rows
        if self.write and find_spec("tensorboard"):
            self.board = importlib.import_module("tensorboard.summary").Writer(f"{out}/tensorboard")
    def add(self, rows: list):
        """Appends rows, each of which has a step."""
        self.rows += rows
        with writing(self.file), open(self.file if self.write else os.devnull, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows if self.board else []:
            for name in row.keys() - {"step"}:
                self.board.add_scalar(name, row[name], row["step"])
    def draw(self):
        """Writes out/curves.png: losses, shares of right guesses, rates and norms."""
        if not self.write:
            return
        figure, of_all = Figure((10, 6), layout="constrained"), ("lr", "norm", "loss", "accuracy")
        for axes, name in zip(figure.subplots(2, 2).flat, of_all, strict=True):
            for column in (name, f"val_{name}"):
                points = [(row["step"], row[column]) for row in self.rows if column in row]
                axes.plot(*zip(*points[:: len(points) // 4000 + 1], strict=True), label=column
                          ) if points else None
            axes.legend()
        with writing(self.file):
            figure.savefig(self.file.with_name("curves.png"))
    def trouble(self) -> str:
        """What is wrong with the last ten steps: no number, or losses far above those before."""
        last = [(x["step"], x["loss"], x["norm"]) for x in self.rows[-120:] if "loss" in x]
        for step, loss, norm in last[-10:]:
            if not np.isfinite(loss + norm):
                return f"at step {step} the loss is {loss}, the norm of its gradient {norm}"
        new, old = (np.median([x for _, x, _ in part]) for part in (last[-10:], last[:-10] or last))
        return f"the loss of ten steps to {step} is {new:.2f}, after {old:.2f}" * bool(
            len(last) >= 20 and new > 1.5 * old + 0.5)

# -------------------------------------------------------------------------------------- the program
def new_config(args, module, V: int, end):
    """The config of a model from scratch, for V token ids of which `end` ends a text."""
    sizes = {"layers": args.layers, "heads": args.heads, "width": args.width, "context": args.block}
    if args.experts:
        sizes["experts"] = args.experts
    return module.Config.small(**sizes, vocab_size=V, padded_vocab_size=module.round_up(V, 128),
                               bos_token_id=end, eos_token_id=end)
def make_model(args, module, folder, written: Path, devices: list) -> tuple:
    """The model of --weights, or one from scratch -> (model, what `add_adapters` says, mesh)."""
    options, names = {"dtype": args.dtype, "remat": args.remat}, {}
    if folder:
        config = module.Config.from_hf(json.loads((folder / "config.json").read_text()))
    else:
        config = new_config(args, module, *vocabulary(None, written))
    context = config.max_position_embeddings
    check(args.block <= context, f"--block {args.block}: the context of this model is {context}")
    def draw():
        return module.Model(config, rngs=nnx.Rngs(args.seed), **options)
    def need():  # float32: a weight, its gradient, two moments; or a frozen weight and LoRA's few
        return sum(p.size for p in jax.tree.leaves(nnx.eval_shape(draw))) * (4 if args.lora else 16)
    mesh = make_mesh(args.parallel, devices, config.num_attention_heads, need)
    jax.set_mesh(None if "pmap" in mesh.shape else mesh)  # which a Mixtral's routing reads
    if folder:
        stored = args.dtype if args.lora and not args.merge else "float32"
        model = module.load(folder, param_dtype=stored, mesh=mesh, **options)
    else:
        graphdef, where = nnx.split(nnx.eval_shape(draw))
        for path, param, *_ in module.named_parameters(where):
            param.set_value(module.sharding(mesh, config, path, param.shape))
        model = nnx.merge(graphdef, jax.jit(lambda: nnx.state(draw()), out_shardings=where)())
    for dropout in [part for _, part in nnx.iter_modules(model) if isinstance(part, nnx.Dropout)]:
        dropout.rate = args.dropout
    with explained(re.error, "--lora-targets is not a regular expression: {}"):
        names = add_adapters(module, model, args) if args.lora else {}
    check(names or not args.lora, f"--lora-targets {args.lora_targets} is the path of no matrix in "
          f"{args.model}.py")
    return model, names, mesh
def describe(args, module, model, params, train_tokens, val_tokens, devices) -> float:
    """Says what is trained on what -> the share of the devices' peak that one token/s takes."""
    config, peak, each = model.config, measure_peak(devices, args.dtype), 4 if args.lora else 6
    chosen = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
    products = "kernel" if hasattr(model, "lm_head") else "kernel|wte|embed_tokens"
    size = {str(path): p.size for path, p in jax.tree.leaves_with_path(nnx.state(model, nnx.Param))}
    N = round(sum(n * (chosen if "experts" in path else 1) for path, n in size.items()
                  if re.search(products, path)))
    layers = jax.eval_shape(lambda: module.init_cache(config, 1, 1, jnp.float32)).layers
    L, D, T = len(layers), layers[0][0].shape[-1] * config.num_attention_heads, args.block
    print(f"model  {args.model}.py, {sum(p.size for p in jax.tree.leaves(params)):,} parameters "
          f"trained, in {args.dtype} on {len(devices)} x {devices[0].device_kind}\n"
          f"text   {len(train_tokens):,} tokens to train on, {len(val_tokens):,} to validate on; "
          f"{config.vocab_size:,} kinds\nMFU    ({each} N + 12 L D T) x tokens/s / peak: N {N:,}, "
          f"L {L}, D {D}, T {T}, {peak / 1e9:,.0f} GFLOP/s", flush=True)
    return (each * N + 12 * L * D * T) / peak
def state_of(device) -> str:
    """The memory that a device uses at most and how busy it is, as far as it says so."""
    stats, busy = device.memory_stats() or {}, ""
    if device.platform == "gpu" and find_spec("pynvml"):
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.local_hardware_id)
        busy = f"  {pynvml.nvmlDeviceGetUtilizationRates(handle).gpu} % busy"
    return (f"  {stats['peak_bytes_in_use'] / 1e9:.2f} GB" if stats else "") + busy
def main(args) -> int:
    """Trains as the arguments say -> the exit code."""
    module, folder = importlib.import_module(args.model), None
    if args.multihost:
        join_hosts(args.multihost)
    devices = pick_devices(args.device or "", args.parallel)
    own = next(device for device in devices if device.process_index == jax.process_index())
    jax.config.update("jax_default_device", own)
    on_cpu = own.platform == "cpu"
    args.dtype = {"auto": "float32" if on_cpu else "bfloat16"}.get(args.dtype, args.dtype)
    with explained((OSError, module.InputError),  # OSError: of the Hub, or a folder
                   f"--weights {args.weights}: {{}}" if args.weights else "{}"):
        if args.weights:
            folder = module.fetch(args.weights)
            module.Config.from_hf(json.loads((folder / "config.json").read_text()))
        train_tokens, val_tokens, tokenizer_folder = prepare(args, module, folder)
        model, names, mesh = make_model(args, module, folder, tokenizer_folder, devices)
    devices, n = [*mesh.devices.flat], mesh.size // mesh.shape.get("tensor", 1)
    least = n * args.accumulate
    check(args.batch % least == 0, f"--batch {args.batch} does not split over {n} devices (or "
          f"groups of them) in --accumulate {args.accumulate} parts: choose a multiple of {least}")
    codec = module.tokenizer(tokenizer_folder)
    ids = codec.encode(args.prompt)[: args.block // 2] if args.prompt else []
    graphdef, params, frozen = nnx.split(model, nnx.LoRAParam if names else nnx.Param, ...)
    load_of_token = describe(args, module, model, params, train_tokens, val_tokens, devices)
    config, (optimizer, rate) = model.config, make_optimizer(args)
    balance = (lambda cache: config.router_aux_loss_coef * module.balance_loss(cache)) if getattr(
        config, "model_type", "") == "mixtral" else None
    state = first_state(args, optimizer, params, mesh)
    merge = merge_on(mesh, graphdef, args.dtype, state["params"], frozen)
    del model, params  # whose memory the first step takes for the new state
    train, evaluate = compile_steps(merge, optimizer, balance, args.ema, mesh, state)
    numbers = np.arange(args.batch).reshape(args.accumulate, n, -1)  # of a step's rows
    shape = *numbers.shape, args.block + 1
    val_batches = windows(val_tokens, args.batch // args.accumulate, args.block)
    val_batches = val_batches.reshape(-1, *shape[1:])
    some_batches = val_batches[:: -(-len(val_batches) // (20 * args.accumulate))]
    settings = {name: vars(args)[name] for name in SETTINGS}
    settings["data"] = f"with checksum {zlib.crc32(val_tokens, zlib.crc32(train_tokens))}"
    with explained(OSError, f"--profile {args.profile}: {{}}"):
        args.profile and args.profile.mkdir(parents=True, exist_ok=True)
    checkpoints, step = open_checkpoints(args.out, args.keep), 0
    if args.resume:
        step = checkpoints.latest_step()
        state = restore_checkpoint(checkpoints, step, state, settings)
    check(not args.profile or args.steps - step >= 15, "--profile traces five steps after ten, "
          f"and from step {step} on there are fewer: raise --steps")
    metrics, key, first = Metrics(args.out, step), jax.random.key(args.seed), step
    stop, waiting, seconds, mark, stopping, trouble = [], [], 0.0, 0.0, False, ""
    def interrupt(*_):
        stop.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it at once
    def learned():  # what is evaluated and written
        return state.get("ema", state["params"])
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupt)
    val_loss, _ = mean_eval(evaluate, mesh, learned(), frozen, some_batches)
    print(f"validation loss before step {step + 1}: {val_loss:.4f}", flush=True)
    while step < args.steps and not stopping:
        if args.profile and step == first + 10:
            jax.profiler.start_trace(args.profile)
        tokens = place(mesh, 1, shape, lambda at: rows_of(
            train_tokens, step * args.batch + numbers[at[:3]], args.block, args.seed))  # noqa: B023
        state, found = train(state, frozen, tokens, key)
        waiting.append(found)
        if on_cpu and mesh.size > 1:  # they share cores, and lock up with several steps in flight
            jax.block_until_ready(found)
        if args.profile and step == first + 14:
            jax.block_until_ready(found)
            jax.profiler.stop_trace()
            print(f"five steps are traced: run `xprof {args.profile}`", file=sys.stderr)
        step, stopping = step + 1, bool(stop)
        if args.multihost:  # all hosts stop, or none
            stopping = step % 10 == 0 and bool(process_allgather(np.array(stopping)).any())
        eval_due = step % args.eval_every == 0 or step == args.steps
        save_due = args.save_every and (step % args.save_every == 0 or step == args.steps)
        if not (eval_due or save_due or stopping or step % 10 == 0 or step == first + 1):
            continue  # without waiting for the device
        metrics.add([{"step": n, "lr": float(rate(n - 1)), **jax.tree.map(float, found)}
                     for n, found in enumerate(waiting, step + 1 - len(waiting))])
        waiting, now = [], timeit.default_timer()
        seconds += now - mark if step > first + 1 else 0.0  # the first step is mostly compiling
        if trouble := metrics.trouble():
            break
        if eval_due or save_due:
            val_loss, right = mean_eval(evaluate, mesh, learned(), frozen, some_batches)
            metrics.add([{"step": step, "val_loss": val_loss, "val_accuracy": right,
                          **(own.memory_stats() or {})}])  # a CPU counts none
            metrics.draw()
        if (eval_due or sys.stderr.isatty()) and jax.process_index() == 0:
            since = [x["loss"] for x in metrics.rows[-2 * args.eval_every :] if "loss" in x]
            since = since[-1 - (step - 1) % args.eval_every :]
            speed = (step - first - 1) / seconds if seconds else 0.0  # steps a second
            tokens_s, left = speed * args.batch * args.block, (args.steps - step) / (speed or 1e9)
            print(f"step {step:>6}/{args.steps}  train {np.mean(since):.4f}  val {val_loss:.4f}  "
                  f"lr {rate(step - 1):.2e}  {tokens_s:>9,.0f} tokens/s  MFU "
                  f"{load_of_token * tokens_s:5.1%}{state_of(own)}  {left // 60:3.0f}:"
                  f"{left % 60:02.0f} left", end="\n" if eval_due else "\r", file=sys.stderr,
                  flush=True)
        if eval_due and ids:
            [new] = module.generate(nnx.merge(graphdef, learned(), frozen), [ids],
                                    min(100, config.max_position_embeddings - len(ids)), key=key)
            print(f"--- step {step}: {codec.decode(ids + new)}", flush=True)
        if save_due or stopping:
            save_checkpoint(checkpoints, state, settings, val_loss if save_due else None)
        mark = timeit.default_timer()
    with contextlib.suppress(RuntimeError):  # of none: it is for Ctrl-C in the middle of a trace
        args.profile and jax.profiler.stop_trace()
    metrics.board and metrics.board.close()
    with writing(args.out):
        checkpoints.wait_until_finished()
    if trouble:
        print(f"train.py: {trouble}; newest checkpoint: of step {checkpoints.latest_step() or 0}; "
              "try a lower --lr, a longer --warmup or a smaller --clip", file=sys.stderr)
        return 1
    if step < args.steps:
        print(f"stopped after step {step}: the same command with --resume goes on from there",
              file=sys.stderr)
        return 130
    if (best := checkpoints.best_step()) not in (None, step):
        state = restore_checkpoint(checkpoints, best, state, settings)
        print(f"the validation loss was lowest at step {best}: its weights are written")
    params = jax.tree.map(lambda p: p.astype(args.save_dtype).astype(p.dtype), learned())
    loss, right = mean_eval(evaluate, mesh, params, frozen, val_batches)
    if args.multihost:  # to the memory of each host
        params, frozen = process_allgather((params, frozen), tiled=True)
    if jax.process_index() == 0:
        write_model(args, module, nnx.merge(graphdef, params, frozen), tokenizer_folder, names)
    print(f"finished: {args.out}, in {args.save_dtype}\nvalidation loss: {loss:.4f} a token over "
          f"all of the text; perplexity {np.exp(loss):.2f}, {right:.1%} of the tokens guessed")
    return 0

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(arguments()))
    os._exit(130)  # at once: what is being written is dropped
