"""Continues a text with any of the model files, on any device.

    python sample.py                                     # the bundled tiny GPT-2; needs no network
    python sample.py --model gpt2 --prompt "Hello, I am" # openai-community/gpt2 from the Hub
    python sample.py --model gpt2 --weights my/folder    # a checkpoint in Hugging Face's format
    python sample.py --model llama --weights HuggingFaceTB/SmolLM2-135M-Instruct --chat
    python sample.py --list                              # what there is, and how large it is

The text goes to standard output as it is made; what is said about it goes to standard error.
"""

import argparse
import fnmatch
import importlib
import json
import math
import os
import re
import select
import signal
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx

AXIS = r"(data|fsdp|tensor)(:[1-9]\d*)?"  # of --parallel
HERE = Path(__file__).resolve().parent
# model_type of a config.json -> the model file that reads it
KINDS = {"gpt2": "gpt2", "opt": "opt", "llama": "llama", "gemma": "gemma", "gemma2": "gemma",
         "gemma3": "gemma", "gemma3_text": "gemma", "mistral": "mistral", "mixtral": "mistral"}
MODELS = [name for name in dict.fromkeys(KINDS.values()) if (HERE / f"{name}.py").exists()]
TOKENIZERS = ("tokenizer.json", "merges.txt", "tokenizer.model")  # one of these is needed

# --------------------------------------------------------------------------------- the command line
def fail(message):
    """One line that says what is wrong and what to do; exit code 2."""
    print("sample.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)
def arguments():
    """The command line, read and checked as far as that needs no model."""
    parser = argparse.ArgumentParser(
        prog="sample.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        usage="python sample.py [--model NAME] [--weights WEIGHTS] [--prompt TEXT] [options]")
    parser.error = fail
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, help="which file (default: gpt2)")
    add("--weights", metavar="WEIGHTS", help="'tiny' (bundled), a Hub id, or a folder (default: "
        "the first preset of --model; tiny if --model is not given either)")
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--list", action="store_true", help="print the published checkpoints and stop")
    add = parser.add_argument_group("text").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    add("--prompt-file", action="append", default=[], metavar="FILE", help="a file as a prompt; "
        "may be repeated. Without either, standard input is one where it is piped")
    add("--chat", action="store_true", help="let a model that was tuned for it answer: prompts, "
        "or messages on the terminal (Ctrl-C stops an answer, Ctrl-D ends the conversation)")
    add("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    add("--max-new-tokens", type=int, metavar="N", help="default: 200, or 1000 with --chat")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token")
    add("--top-k", type=int, metavar="N", help="only among the N likeliest tokens")
    add("--top-p", type=float, metavar="X", help="only among the likeliest that hold X together")
    add("--min-p", type=float, metavar="X", help="only those X times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeats less")
    add("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: by the device")
    add("--device", metavar="DEVICE", help="cpu, gpu, tpu, or one of several as in gpu:1")
    add("--parallel", default="auto", metavar="MODE", help="over devices: pmap, data, fsdp, tensor,"
        " data:2,tensor:4 or no (default: data, or tensor where the model does not fit one)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax-one-file-models"
    add("--compile-cache", default=cache, metavar="DIR", help="keeps compiled programs; or 'off'")
    add = parser.add_argument_group("output").add_argument
    add("--no-stream", action="store_true", help="print a text only when it is complete")
    add("--json", action="store_true", help="one JSON object a line for each text")
    add("--profile", metavar="DIR", type=Path, help="write a trace of the generation into DIR")
    args = parser.parse_args()
    there = next(x for x in ((args.profile or HERE) / "x").absolute().parents if x.exists())
    for name, fits, rule in [
        ("prompt", all(t.encode(errors="ignore").decode() == t for t in args.prompt), "UTF-8 text"),
        ("num-samples", args.num_samples >= 1, "1 or more"),
        ("max-new-tokens", args.max_new_tokens is None or args.max_new_tokens >= 1, "1 or more"),
        ("temperature", args.temperature >= 0, "0 (the likeliest token) or more"),
        ("top-k", args.top_k is None or args.top_k >= 1, "1 or more"),
        ("top-p", args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("min-p", args.min_p is None or 0 <= args.min_p <= 1, "from 0 to 1"),
        ("repetition-penalty", args.repetition_penalty > 0, "above 0"),
        ("stop", "" not in args.stop, "a text; leave it out to go on to --max-new-tokens"),
        ("seed", 0 <= args.seed < 2**63, "from 0 to 2^63 - 1"),
        ("parallel", re.fullmatch(f"no|auto|pmap|{AXIS}(,{AXIS})*", args.parallel),
         "pmap, or like data, tensor:2 or data:2,tensor:4"),
        ("profile", not args.profile or os.access(f"{there}/.", os.W_OK), "a writable folder"),
    ]:
        fits or fail(f"--{name} must be {rule}")
    return args
def read_prompts(args) -> list[str] | None:
    """The prompts of --prompt, --prompt-file or standard input; None: ask on the terminal."""
    prompts = list(args.prompt)
    for file in args.prompt_file:
        try:
            prompts.append(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--prompt-file {file} cannot be read: {error}")
    if args.chat and not prompts and sys.stdin and sys.stdin.isatty():
        if any([args.num_samples > 1, args.json, args.no_stream, args.profile,
                re.match("pmap|data|fsdp", args.parallel)]):
            fail("a conversation is one text, shown as it is made: leave --num-samples, --json, "
                 "--no-stream, --profile and all --parallel but tensor out, or give a --prompt")
        return None
    if not prompts and sys.stdin and not os.isatty(0):
        if not select.select([0], [], [], 1)[0]:
            print("reading the prompt from standard input ...", file=sys.stderr)
        try:
            text = open(0, "rb", closefd=False).read().decode("utf-8")  # noqa: SIM115
        except UnicodeDecodeError as error:
            fail(f"standard input is not UTF-8 text: {error}")
        prompts = [text] if text else []
    prompts or not args.chat or fail("--chat needs a terminal to converse on, or a --prompt")
    all(prompts) or fail("an empty prompt: give at least one character, or leave --prompt out")
    return prompts
def print_presets():
    """A table of the published checkpoints that each model file names."""
    print(f"{'--model':9}{'--weights':34}{'parameters':>14}{'download':>11}")
    for name in MODELS:
        for hub_id, (parameters, GB, gated, _) in importlib.import_module(name).PRESETS.items():
            gated = "  gated: accept its terms on the Hub first" if gated else ""
            print(f"{name:9}{hub_id:34}{parameters:>14,}{GB:>8.2f} GB{gated}")
        size = sum(file.stat().st_size for file in (HERE / "tiny" / name).glob("*"))
        print(f"{name:9}{'tiny (bundled)':34}{'':14}{size / 1e6:>8.2f} MB")

# --------------------------------------------------------------------------- weights and the device
def checkout(model_file, name, revision) -> Path:
    """The folder of a checkpoint: a folder, or a Hub id that is cached or is downloaded now."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import HfApi, constants, errors, snapshot_download
    try:  # what is cached whole needs no network
        folder = Path(snapshot_download(name, allow_patterns=model_file.DOWNLOADS,
                                        local_files_only=True, revision=revision))
        if model_file.stored_tensors(folder) and (folder / "config.json").exists() and any(
                (folder / file).exists() for file in TOKENIZERS):
            return folder
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        pass  # a download that was cut short is taken up again
    except errors.HFValidationError:
        fail(f"--weights {name}: no such folder, and not a name on the Hub (try --list)")
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=3)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        weights = [whole.replace(".", "*.") + "*" for whole in model_file.FORMATS]
        patterns = model_file.DOWNLOADS + [p for p in weights if fnmatch.filter(sizes, p)][:1]
        files = {file for pattern in patterns for file in fnmatch.filter(sizes, pattern)}
        size = sum(sizes[file] for file in files) / 1e6
        print(f"downloading {name}: {size:,.2f} MB in {len(files)} files", file=sys.stderr)
        return Path(snapshot_download(name, allow_patterns=patterns, revision=revision))
    except errors.GatedRepoError:
        fail(f"{name} is gated: accept its terms on {constants.ENDPOINT}/{name}, "
             "then log in with `hf auth login` or set HF_TOKEN")
    except errors.RevisionNotFoundError:
        fail(f"{name} has no revision {revision}")
    except errors.RepositoryNotFoundError:
        fail(f"there is no folder {name}, and the Hub has no model of that name (see --list); "
             "if it is private, set HF_TOKEN")
    except (errors.HTTPError, OSError) as error:
        fail(f"{name} is not complete in {constants.HF_HUB_CACHE}, and the Hub does not deliver it "
             f"({type(error).__name__}: {error}): try again online, or --weights tiny or a folder")
def check_files(model_file, folder):
    """Stops where a checkpoint is not for this model file, or a file is not what its name says."""
    from safetensors import SafetensorError, safe_open
    weights = [*folder.glob("model*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    for file in [*folder.glob("*.json"), *weights]:
        with open(file, "rb") as stream:
            start = stream.read(64).lstrip().lower()
        if start.startswith(b"version https://git-lfs"):
            fail(f"{file} is a Git LFS pointer and not the file itself: run `git lfs pull`")
        if start.startswith((b"<!doctype", b"<html")):
            fail(f"{file} is a web page and not the file itself: download it again")
        if file.suffix == ".bin" and not (zipfile.is_zipfile(file) and any(
                name.endswith("/data.pkl") for name in zipfile.ZipFile(file).namelist())):
            fail(f"{file} is damaged, or of a PyTorch before 1.6: save it anew")
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                safe_open(file, "np")
        except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
            fail(f"{file} is damaged or cut short ({error}): download it again")
    file, tokenizers = folder / "config.json", [folder / name for name in TOKENIZERS]
    file.exists() or fail(f"{folder} has no config.json: it is no checkpoint, or an incomplete one")
    kind = json.loads(file.read_text()).get("model_type")
    if KINDS.get(kind, model_file.__name__) != model_file.__name__:
        fail(f"{folder} is a {kind!r}, which {KINDS[kind]}.py reads: --model {KINDS[kind]}")
    any(file.exists() for file in tokenizers) or fail(
        f"{folder} has no tokenizer: none of {', '.join(TOKENIZERS)}")
    try:
        model_file.stored_tensors(folder)
    except FileNotFoundError as error:
        fail(f"{folder} is not complete: {error}")
def pick_devices(wanted, parallel):
    """All devices of --device's kind; a single one if it is numbered, or --parallel is no."""
    kind, _, index = (wanted or "").partition(":")
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")  # leaves a GPU's memory alone
    try:
        device = (devices := jax.devices(kind or None))[int(index or 0)]
    except (RuntimeError, ValueError, IndexError):
        found = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
        fail(f"there is no device {wanted}; this machine has {found}")
    jax.config.update("jax_default_device", device)
    return [device] if parallel == "no" or index else devices
def make_mesh(parallel, devices, heads, size, rows):
    """The devices along the axes of --parallel. An axis without a number takes what is left; auto
    is data, for so many rows, or tensor where weights of `size` bytes do not fit one device."""
    if parallel in ("no", "auto"):
        room = (devices[0].memory_stats() or {}).get("bytes_limit", size)
        most = max(n for n, _ in enumerate(devices, 1) if heads % n == 0)
        parallel = f"tensor:{most}" if size > room else f"data:{min(rows, len(devices))}"
        if len(devices) > 1:
            why = f"{rows} texts" if size <= room else f"{size / 1e9:.1f} GB do not fit one"
            print(f"--parallel {parallel} of {len(devices)} devices: {why}", file=sys.stderr)
    axes = {name: int(n or 0) for name, _, n in (x.partition(":") for x in parallel.split(","))}
    left = len(devices) // math.prod(n for n in axes.values() if n)
    axes = {name: n or left for name, n in axes.items()}
    if not 0 < (count := math.prod(axes.values())) <= len(devices):
        fail(f"--parallel {parallel} is too much for {len(devices)} devices: lower its numbers")
    n, fit = axes.get("tensor", 1), [i for i in range(1, heads + 1) if heads % i == 0]
    n in fit or fail(f"--parallel: {heads} heads split over tensor: {fit}, not over {n}")
    return jax.sharding.Mesh(np.reshape(devices[:count], [*axes.values()]), [*axes])

# --------------------------------------------------------------------------------------- generation
class Text:
    """One row as it grows: its tokens and their text. Held back are characters of which some bytes
    are missing, and what may become a stop string. prompt: a text, or in a chat its messages."""
    def __init__(self, codec, prompt, stops):
        self.codec, self.prompt, self.stops = codec, prompt, stops
        self.prompt_ids, self.ids = codec.encode(prompt), []
        self.completion, self.reason = "", None
        self.begin = len(codec.decode(self.prompt_ids))  # of the completion, in the decoded text
    def add(self, ids, stop_ids, limit):
        """Takes new tokens, up to a stop id, a stop string or the limit."""
        for token in ids:
            if self.reason:
                return
            if token in stop_ids:
                self.reason = "stop"
            else:
                self.ids.append(int(token))
            text = self.codec.decode(self.prompt_ids + self.ids)[self.begin :]
            cuts = [text.find(stop) for stop in self.stops if stop in text]
            if cuts:
                self.reason, text = "stop", text[: min(cuts)]
            elif len(self.ids) == limit:
                self.reason = "length"
            if not self.reason:
                text = text.rstrip("\ufffd")
                held = [n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])]
                text = text[: len(text) - max(held, default=0)]
            if self.reason or text.startswith(self.completion):  # bytes may hide what was shown
                self.completion = text
    def record(self, timing) -> dict:
        """What --json prints of this text."""
        speed = round(timing.steps / timing.decode, 2) if timing.steps else None
        return {"prompt": self.prompt, "completion": self.completion, "finish_reason": self.reason,
                "prompt_ids": self.prompt_ids, "completion_ids": self.ids,
                "time_to_first_token_s": round(timing.first, 4), "decode_tokens_per_s": speed}
def sampling_of(args) -> dict:
    """The options that the compiled programs take as inputs; what is None is left out of them."""
    return {"temperature": args.temperature or None, "top_p": args.top_p, "min_p": args.min_p,
            "repetition_penalty": None if args.repetition_penalty == 1 else args.repetition_penalty}
def generate(model_file, model, mesh, prompts, args, streaming, timing):
    """Yields new tokens [B, n] after B prompts (lists of ids) as they are drawn; fills in `timing`,
    with compiling apart. Rows are split over all axes of the mesh but tensor, heads of the cache
    over that one; pmap wants a leading axis of devices. Else it is the model file's generate."""
    B, limit, sampling = len(prompts), args.max_new_tokens, sampling_of(args)
    pmap, tensor = "pmap" in mesh.shape, mesh.shape.get("tensor", 1)
    n, axes = mesh.size // tensor, tuple(axis for axis in mesh.shape if axis != "tensor")
    prompts = prompts + prompts[-1:] * (-B % n)  # as many rows on each device
    tokens, positions, length = model_file.batch_prompts(model.config, prompts, limit)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(args.seed)))(np.arange(len(prompts)))
    graphdef, state = nnx.split(model)
    def empty():
        rows = len(prompts) // (n if pmap else 1)
        cache = model_file.init_cache(model.config, rows, length, model.dtype)
        return jax.tree.map(lambda x: jax.numpy.stack([x] * n), cache) if pmap else cache
    def where(x):
        """For an array whose first dimension is rows, and whose third, of four, is heads."""
        heads = "tensor" if x.ndim == 4 and tensor > 1 and x.shape[2] % tensor == 0 else None
        rows = axes if x.ndim and x.shape[0] % n == 0 else None
        return jax.NamedSharding(mesh, jax.P(*[rows, None, heads][: x.ndim]))
    split = jax.tree.map(where, jax.eval_shape(empty))
    cache = jax.jit(empty, out_shardings=split)() if mesh.size > 1 else empty()
    tokens, positions, keys = (jax.device_put(x, where(x)) for x in (
        x.reshape(n, -1, *x.shape[1:]) if pmap else x for x in (tokens, positions, keys)))
    def compiled(function, *inputs, shared):
        """The program for these inputs; the last `shared` of them are the same on all devices."""
        start, function = time.perf_counter(), partial(function, graphdef, top_k=args.top_k)
        axes = (None, *(0,) * (len(inputs) - shared - 1), *(None,) * shared)
        wrap = (partial(jax.pmap, in_axes=axes, devices=[*mesh.devices.flat]) if pmap else
                partial(jax.jit, out_shardings=(split, None)))
        program = wrap(function, donate_argnums=1).lower(*inputs).compile()
        timing.compile += time.perf_counter() - start
        return program
    compile_decode = lambda token: compiled(  # noqa: E731
        model_file.decode, state, cache, token, keys, sampling, 1, shared=2)
    inputs = (state, cache, tokens, positions, keys, sampling)
    prefill = compiled(model_file.prefill, *inputs, shared=1)
    if args.profile:  # a trace of what runs: both programs are compiled before it begins
        decode = compile_decode(tokens[..., 0])
        args.profile.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(args.profile)
    start = timing.begin = time.perf_counter()
    cache, token = prefill(*inputs)
    new = np.array(token).reshape(-1, 1)[:B]
    timing.first = time.perf_counter() - start
    yield new
    decode = decode if args.profile else compile_decode(token)
    steps = 1 if streaming else model_file.STEPS
    while timing.steps + 1 < limit:
        steps = min(steps, limit - timing.steps - 1)
        start = time.perf_counter()
        cache, new = decode(state, cache, token, keys, sampling, steps)
        new = np.asarray(new)
        token, new = new[..., steps - 1], new.reshape(-1, model_file.STEPS)[:B, :steps]
        elapsed = time.perf_counter() - start
        timing.decode, timing.steps = timing.decode + elapsed, timing.steps + steps
        if streaming:  # as many steps as take a tenth of a second, so that the text flows
            steps = max(1, min(model_file.STEPS, int(0.1 * steps / elapsed)))
        yield new

# --------------------------------------------------------------------------------------------- chat
def chat_tokenizer(folder):
    """encode(messages) -> ids, up to where the answer begins, and decode(ids) -> text. A message is
    {"role": "user" or "assistant", "content": its text}; a text alone is a first message."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it says that PyTorch is missing
    from transformers import AutoTokenizer  # half a second, which only chats have to wait
    codec = AutoTokenizer.from_pretrained(folder)
    codec.chat_template or fail(f"{folder} has no chat template, so it was not tuned to answer: "
                                "leave --chat out, or try HuggingFaceTB/SmolLM2-135M-Instruct")
    def encode(messages):
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return codec.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    decode = partial(codec.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return SimpleNamespace(encode=encode, decode=decode)
def answer(model_file, model, memory, ids, limit, args):
    """Yields up to `limit` tokens after ids, each as an array of one. memory: `cache`, of `length`
    slots, holds the tokens `ids`, so that only new ones are computed; all are where it is too short
    or ids begin in another way, as where a template drops parts of earlier answers."""
    graphdef, state = nnx.split(model)
    options = {"keys": jax.random.fold_in(jax.random.key(args.seed), 0)[None],  # as a first row's
               "sampling": sampling_of(args), "top_k": args.top_k}
    prefill, decode = (partial(function, graphdef, state, **options)
                       for function in (model_file.prefill, model_file.decode))
    known, end = len(memory.ids), len(ids) + limit
    if end > memory.length or known == len(ids) or memory.ids != ids[:known]:
        known, memory.cache = 0, None  # the old one goes before the new one comes
        memory.length = max(1024, 1 << (end - 1).bit_length())  # seldom another one to compile for
        memory.cache = model_file.init_cache(model.config, 1, memory.length, model.dtype)
    for T in (512, 64, 8, 1):  # in pieces of few lengths, as each is a program to compile
        while len(ids) - known >= T:
            memory.cache, token = prefill(memory.cache, np.array([ids[known : known + T]]), None)
            known += T
    memory.ids = list(ids)
    for _ in range(limit):
        yield np.asarray(token)
        memory.ids += token.tolist()
        memory.cache, token = decode(memory.cache, token, steps=1)
        token = token[:, 0]
def converse(model_file, model, mesh, codec, stop_ids, args):
    """Reads messages from the terminal and writes the answers, until Ctrl-D."""
    import readline  # noqa: F401  (the arrow keys then work in `input`)
    sys.stdin.reconfigure(errors="replace")
    memory, messages = SimpleNamespace(ids=[], cache=None, length=0), []
    context = model.config.max_position_embeddings
    print(f"{mesh.devices.flat[0].device_kind}, {model.dtype.name}; Ctrl-C stops an answer, Ctrl-D "
          "ends the conversation", file=sys.stderr)
    while True:
        try:
            message = input("> ")
        except EOFError:
            return print()
        if not message.strip():
            continue
        messages.append({"role": "user", "content": message})
        text, written = Text(codec, messages, args.stop), 0
        limit = min(args.max_new_tokens or 1000, context - len(text.prompt_ids))
        if limit < 1:
            messages.pop()
            print(f"no room in the context of {context}: say less, or begin anew", file=sys.stderr)
            continue
        try:
            for token in answer(model_file, model, memory, text.prompt_ids, limit, args):
                text.add(token, stop_ids, limit)
                print(text.completion[written:], end="", flush=True)
                written = len(text.completion)
                if text.reason:
                    break
        except KeyboardInterrupt:
            memory.length = 0  # the cache may be donated to a step that was not finished
        print()
        messages.append({"role": "assistant", "content": text.completion})
def write_texts(model_file, model, mesh, texts, stop_ids, args):
    """Writes each text as it grows, one after the other, and in the end how long it took."""
    timing = SimpleNamespace(compile=0.0, first=0.0, decode=0.0, steps=0)
    room = model.config.max_position_embeddings - max(len(text.prompt_ids) for text in texts)
    args.max_new_tokens = args.max_new_tokens or max(1, min(1000 if args.chat else 200, room))
    shown, written = 0, 0  # texts that are out whole, and characters of the one after them
    streaming, device = not (args.no_stream or args.json), mesh.devices.flat[0]
    for new in generate(model_file, model, mesh, [text.prompt_ids for text in texts],
                        args, streaming, timing):
        if args.profile and (stats := device.memory_stats()):  # a CPU has none
            used = {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use")}
            with open(args.profile / "memory.jsonl", "a" if timing.steps else "w") as out:
                print(json.dumps({"seconds": time.perf_counter() - timing.begin, **used}), file=out)
        for text, ids in zip(texts, new, strict=True):
            text.add(ids, stop_ids, args.max_new_tokens)
        while shown < len(texts) and (streaming or texts[shown].reason):
            text = texts[shown]
            if args.json:
                print(json.dumps(text.record(timing), ensure_ascii=False), flush=True)
            else:
                whole = text.completion if args.chat else text.prompt + text.completion
                print(whole[written:], end="" if not text.reason else "\n", flush=True)
                written = len(whole)
            if not text.reason:
                break
            shown, written = shown + 1, 0
            if shown < len(texts) and not args.json:
                print("-" * 40)
        if shown == len(texts):
            break
    prompt_tokens = sum(len(text.prompt_ids) for text in texts)
    print(f"{mesh.size} x {device.device_kind}, {model.dtype.name}: compiled in "
          f"{timing.compile:.1f} s, prefill {prompt_tokens / timing.first:,.0f} tokens/s, decode "
          f"{len(texts) * timing.steps / (timing.decode or 1):,.1f} tokens/s", file=sys.stderr)

# --------------------------------------------------------------------------------------------- main
def main():
    """From the command line to the last line on standard error."""
    args = arguments()
    if args.list:
        return print_presets()
    texts = read_prompts(args)
    model_file = importlib.import_module(args.model or "gpt2")
    try:
        return run(args, model_file, texts)
    except model_file.InputError as error:
        fail(error)
def run(args, model_file, texts):
    """Loads the model, and writes each text as it grows."""
    devices = pick_devices(args.device, args.parallel)
    if args.compile_cache != "off":
        jax.config.update("jax_compilation_cache_dir", str(args.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    default = next(iter(model_file.PRESETS))
    name = args.weights or (default if args.model else "tiny")
    if name == "tiny":
        folder = HERE / "tiny" / model_file.__name__
        GB = model_file.PRESETS[default].download_GB
        print(f"This is the tiny model that comes with the project. The real one, {GB} GB from "
              f"the Hub:\n    python sample.py --model {model_file.__name__}", file=sys.stderr)
    else:
        folder = checkout(model_file, name, args.revision)
    dtype = args.dtype or ("float32" if devices[0].platform == "cpu" else "bfloat16")
    check_files(model_file, folder)
    codec = chat_tokenizer(folder) if args.chat else model_file.tokenizer(folder)
    config = model_file.Config.from_hf(json.loads((folder / "config.json").read_text()))
    size = sum(file.stat().st_size for file in folder.iterdir())
    rows = 1 if texts is None else max(1, len(texts)) * args.num_samples
    mesh = make_mesh(args.parallel, devices, config.num_attention_heads, size, rows)
    jax.set_mesh(None if "pmap" in mesh.shape else mesh)  # which a Mixtral's routing reads
    model = model_file.load(folder, dtype=jax.numpy.dtype(dtype), mesh=mesh)
    stop_ids, file = model.config.eos_token_id, folder / "generation_config.json"
    if file.exists():
        stop_ids = json.loads(file.read_text()).get("eos_token_id", stop_ids)
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
    if texts is None:
        return converse(model_file, model, mesh, codec, stop_ids, args)
    texts = texts or ["ROMEO:\n" if name == "tiny" else "Once upon a time"]
    texts = [Text(codec, text, args.stop) for text in texts for _ in range(args.num_samples)]
    write_texts(model_file, model, mesh, texts, stop_ids, args)
    if args.profile:
        jax.profiler.stop_trace()
        print(f"a trace is in {args.profile}: see it by `xprof {args.profile}`", file=sys.stderr)

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as other tools end under `| head`
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        os._exit(130)  # at once: the usual clean-up can crash under a computation that still runs
