"""Continues a text with any of the model files, on any device.

    python sample.py                                     # the bundled tiny GPT-2; needs no network
    python sample.py --model gpt2 --prompt "Hello, I am" # openai-community/gpt2 from the Hub
    python sample.py --model gpt2 --weights my/folder    # a checkpoint in Hugging Face's format
    python sample.py --model llama --weights HuggingFaceTB/SmolLM2-135M-Instruct --chat
    python sample.py --prompt "The king is dead." --attention attention.html   # what sees what
    python sample.py --prompt "The king is dead." --score          # how likely each token is
    python sample.py --ui                                # a chat page, and OpenAI's protocol
    python sample.py --list                              # what there is, and how large it is

The text goes to standard output while it is generated; all else goes to standard error.
"""

import argparse
import asyncio
import base64
import codecs
import contextlib
import errno
import fnmatch
import hashlib
import hmac
import importlib
import ipaddress
import json
import math
import os
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import jax
import numpy as np
from flax import nnx

HERE = Path(__file__).resolve().parent
INSTRUCT = HERE / "tiny" / "llama-instruct"  # for --chat and --ui, where no model is named
TOKENIZERS = ("tokenizer.json", "merges.txt", "tokenizer.model")  # a checkpoint has one of these
CONTINUATION = 200  # new tokens by default
ANSWER = 1000  # the same with --chat


def main():
    """From the command line to the last line on standard error."""
    args = parse_command_line()
    if sys.stdout is None:
        fail("standard output is closed")
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every character
    if args.list:
        print_presets()
        return

    listener = open_listener(args.host, args.port) if args.ui else None
    prompts = None if args.ui else read_prompts(args)
    model_file = importlib.import_module(args.model or model_of(args.weights, args.revision))
    devices = pick_devices(args.device, args.parallel)
    if args.compile_cache != "off":
        keep_compiled_programs(args.compile_cache)

    with explained(model_file.InputError, "{}"):
        if args.weights == str(INSTRUCT):
            say_what_is_better("--ui" if args.ui else "--chat")
        folder = find_checkpoint(model_file, args.weights, args.revision)
        check_family(model_file, folder)
        config = model_file.read_config(folder)
        tokenizer = model_file.tokenizer(folder)
        stop_ids = model_file.read_stop_ids(folder, config) + special_ids(tokenizer, args.stop)
        if args.chat and not args.ui:
            chat_folder = model_file.tokenizer_folder(folder)
            tokenizer = ChatTokenizer(
                tokenizer.backend, chat_folder, args.system, think=not args.no_think
            )
        draft = find_draft(args.draft, tokenizer, config)
        model, mesh = load_model(model_file, folder, config, devices, prompts, args)
        args.draft = load_draft(draft, model, mesh, args)

        if args.attention is not None:
            draw_attention(model_file, model, tokenizer, prompts, args)
        elif args.score or args.choices:
            write_scores(model_file, model, tokenizer, prompts, args)
        elif args.ui:
            serve(model_file, model, mesh, folder, tokenizer, stop_ids, listener, args)
        elif prompts is None:
            converse(model_file, model, mesh, tokenizer, stop_ids, args)
        else:
            write_texts(model_file, model, mesh, tokenizer, stop_ids, prompts, args)


# -------------------------------------------- Prompts ---------------------------------------------


def read_prompts(args) -> list[str] | None:
    """The prompts: from --prompt and --prompt-file, or else from standard input, or else a default.

    A prompt that is - stands for standard input. None stands for a conversation on the terminal.
    """
    prompts = list(args.prompt)
    if prompts.count("-") > 1:
        fail("--prompt - reads all of standard input: give it once")
    if "-" in prompts:
        prompts[prompts.index("-")] = "".join(read_standard_input())
    for file in args.prompt_file:
        with explained((OSError, UnicodeDecodeError), f"--prompt-file {file} cannot be read: {{}}"):
            prompts.append(Path(file).read_bytes().decode("utf-8"))  # keeps \r\n as it is

    if args.chat and not prompts and sys.stdin and sys.stdin.isatty():
        check_conversation(args)
        return None
    if not prompts and sys.stdin and not os.isatty(0):
        prompts = read_standard_input()

    if args.chat and not prompts:
        fail("--chat needs a terminal to converse on, or a --prompt")
    if "" in prompts:
        fail("an empty prompt: give at least one character, or leave --prompt out")
    if args.attention is not None and len(prompts) > 1:
        fail(f"--attention draws one text, not {len(prompts)}: give one --prompt")
    if not prompts:
        prompts = ["ROMEO:\n" if args.weights == "tiny" else "Once upon a time"]
    return prompts


def read_standard_input() -> list[str]:
    """Reads what is piped in, as one prompt. An empty input is no prompt."""
    with explained(OSError, "standard input cannot be read: {}"):
        ready, _, _ = select.select([0], [], [], 1)
        if not ready:
            print("reading the prompt from standard input ...", file=sys.stderr)
        with open(0, "rb", closefd=False) as stream:
            data = stream.read()
    with explained(UnicodeDecodeError, "standard input is not UTF-8 text: {}"):
        text = data.decode("utf-8")
    return [text] if text else []


def check_conversation(args):
    """Exits where an option makes no sense in a conversation on the terminal."""
    splits_rows = re.match("pmap|data|fsdp", args.parallel)
    if args.attention is not None:
        fail("--attention draws one text: with --chat, give a --prompt")
    if args.num_samples > 1 or splits_rows or args.json or args.no_stream or args.profile:
        fail(
            "a conversation is one text, shown as it is made: leave --num-samples, --json, "
            "--no-stream, --profile and all --parallel but tensor out, or give a --prompt"
        )


# ------------------------------------------ Checkpoints -------------------------------------------


def print_presets():
    """Prints a table of the published checkpoints that each model file names."""
    print(f"{'--model':9}{'--weights':36}{'parameters':>14}{'download':>11}")
    for name in MODELS:
        for hub_id, preset in importlib.import_module(name).PRESETS.items():
            note = "  gated: accept its terms" if preset.gated else ""
            size = f"{preset.download_GB:>8.2f} GB"
            print(f"{name:9}{hub_id:36}{preset.parameters:>14,}{size}{note}")

        for folder in sorted((HERE / "tiny").glob(f"{name}*")):
            size = sum(file.stat().st_size for file in folder.glob("*"))
            label = "tiny" if folder.name == name else f"tiny/{folder.name}"
            print(f"{name:9}{label + ' (bundled)':36}{'':14}{size / 1e6:>8.2f} MB")


def say_what_is_better(flag: str):
    """Says that the bundled model to chat with is tiny, and names a real one."""
    print(
        "This is a tiny model that comes with the project; it knows next to nothing. A real one, "
        f"0.3 GB from the Hub:\n    python sample.py {flag} --weights "
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        file=sys.stderr,
    )


def find_checkpoint(model_file, name: str | None, revision: str | None) -> Path:
    """The folder of a checkpoint, or its GGUF file: bundled, given, or of the Hub.

    It is downloaded if need be.

    name: what --weights says; None for the first preset of the model file.
    """
    default = next(iter(model_file.PRESETS))
    if name is None:
        name = default
    if name == "tiny":
        size = model_file.PRESETS[default].download_GB
        print(
            f"This is the tiny model that comes with the project. The real one, {size} GB from "
            f"the Hub:\n    python sample.py --model {model_file.__name__}",
            file=sys.stderr,
        )
        return HERE / "tiny" / model_file.__name__

    if os.path.exists(name) or model_file.is_gguf(Path(name)):
        return model_file.fetch(name)
    return find_cached(model_file, name, revision) or download(model_file, name, revision)


def find_cached(model_file, name: str, revision: str | None) -> Path | None:
    """The cached folder of a Hub id, or None if files are missing. Needs no network."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            name, allow_patterns=model_file.DOWNLOADS, local_files_only=True, revision=revision
        )
        folder = Path(folder)
        is_adapter = model_file.is_adapter(folder)
        formats = model_file.ADAPTER_FORMATS if is_adapter else model_file.FORMATS
        model_file.read_tensors(folder, formats)
    except (errors.HFValidationError, errors.LocalEntryNotFoundError, model_file.InputError):
        return None  # never downloaded, or a download was cut short

    if is_adapter:
        return folder  # its base may have the config and the tokenizer
    has_config = (folder / "config.json").exists()
    has_tokenizer = any((folder / file).exists() for file in TOKENIZERS)
    return folder if has_config and has_tokenizer else None


def download(model_file, name: str, revision: str | None) -> Path:
    """Downloads a checkpoint from the Hub into its cache, and says how large it is."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=3)
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        fail(model_file.why_no_download(error, name, revision))

    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    patterns = wanted_patterns(model_file, sizes)
    files = {file for pattern in patterns for file in fnmatch.filter(sizes, pattern)}
    size = sum(sizes[file] for file in files) / 1e6
    print(f"downloading {name}: {size:,.2f} MB in {len(files)} files", file=sys.stderr)
    return model_file.fetch(name, revision)


def wanted_patterns(model_file, names) -> list[str]:
    """Patterns of the files to download from a repository: config, tokenizer and weights.

    Many repositories have their weights in several formats. Only the first one that the model file
    can read is downloaded.
    """
    is_adapter = "adapter_config.json" in names
    for whole in model_file.ADAPTER_FORMATS if is_adapter else model_file.FORMATS:
        pattern = whole.replace(".", "*.") + "*"  # also shards and their index
        if fnmatch.filter(names, pattern):
            return [*model_file.DOWNLOADS, pattern]
    return model_file.DOWNLOADS


# ------------------------------------ The model on its devices ------------------------------------


def keep_compiled_programs(folder):
    """Lets JAX store compiled programs in a folder, and reuse the ones of earlier runs."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def load_model(model_file, folder, config, devices: list, prompts: list[str] | None, args):
    """Loads the weights onto the devices -> (model, mesh)."""
    heads = config.num_attention_heads

    parallel = args.parallel
    if parallel in ("no", "auto"):
        rows = 1 if prompts is None else len(prompts) * args.num_samples
        base = model_file.base_of(folder)
        files = [base] if model_file.is_gguf(base) else base.iterdir()
        size = sum(file.stat().st_size for file in files if file.is_file())
        parallel = choose_parallel(devices, heads, size, rows)
    mesh = make_mesh(parallel, devices, heads)
    jax.set_mesh(None if "pmap" in mesh.shape else mesh)  # the routing of experts reads it

    dtype = args.dtype
    if dtype is None:
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    return load_weights(model_file, folder, jax.numpy.dtype(dtype), mesh, args), mesh


def load_weights(model_file, folder, dtype, mesh, args):
    """The model in a folder, quantized as the command line or the folder says."""
    quantize = args.quantize
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if quantize is None and dtype == "bfloat16" and on_cpu:
        # The same weights, in a form that a CPU widens faster.
        quantize = model_file.read_quantization(folder) or "bfloat16"
    model = model_file.load(folder, dtype=dtype, mesh=mesh, quantize=quantize)
    if args.cache_dtype is not None:
        model.cache_dtype = jax.numpy.dtype(args.cache_dtype)
    return model


def precision(model_file, model) -> str:
    """The type that a model computes in, and that of its weights where it differs."""
    held = model_file.quantized_as(model)
    if held in (None, model.dtype.name):
        return model.dtype.name
    return f"{model.dtype.name}, weights in {held}"


def find_draft(name: str | None, tokenizer, config):
    """The model file and the folder of a smaller model that --draft names; None if it names none.

    Exits where its vocabulary is not the one of the tokenizer, or where the model (config) does not
    compute several tokens at once as it does one after another.
    """
    if name is not None and ("rope_type", "dynamic") in getattr(config, "rope_scaling", ()):
        fail(
            "--draft does not work with dynamic RoPE scaling, where the angles of a token depend "
            "on how long the text is so far: leave it out"
        )
    if name in (None, "ngram"):
        return None
    model_file = importlib.import_module(model_of(name))
    folder = find_checkpoint(model_file, name, None)
    vocabulary = tokenizer.backend.get_vocab()
    difference = compare_vocabularies(vocabulary, model_file.tokenizer(folder).backend.get_vocab())
    if difference:
        fail(f"--draft {name} has another vocabulary than the model: {difference}")
    return model_file, folder


def load_draft(found, model, mesh, args):
    """What guesses tokens, or None without --draft. found: a smaller model, by `find_draft`."""
    if found is None:
        return LookUp() if args.draft == "ngram" else None
    model_file, folder = found
    heads = model_file.read_config(folder).num_attention_heads
    tensor = mesh.shape.get("tensor", 1)
    if heads % tensor != 0:
        fail(f"--draft {args.draft}: its {heads} heads cannot be split over tensor:{tensor}")
    draft = load_weights(model_file, folder, model.dtype, mesh, args)
    return DraftModel(model_file, draft, mesh)


def compare_vocabularies(one: dict[str, int], other: dict[str, int]) -> str:
    """How the vocabulary of a draft differs from the one of the model; empty if it does not."""
    if len(one) != len(other):
        return f"{len(other)} tokens and not {len(one)}"
    texts = {number: text for text, number in other.items()}
    for text, number in one.items():
        if texts.get(number) != text:
            return f"token {number} is {texts.get(number)!r} and not {text!r}"
    return ""


def choose_parallel(devices: list, heads: int, size: int, rows: int) -> str:
    """What --parallel auto stands for: data, or tensor if the weights do not fit one device.

    size: of the weights in bytes. rows: the batch size.
    """
    if size > memory_of(devices[0]):
        most = max(n for n in range(1, len(devices) + 1) if heads % n == 0)
        parallel = f"tensor:{most}"
        why = f"{size / 1e9:.1f} GB do not fit one"
    else:
        parallel = f"data:{min(rows, len(devices))}"
        why = f"{rows} texts"

    if len(devices) > 1:
        print(f"--parallel {parallel} of {len(devices)} devices: {why}", file=sys.stderr)
    return parallel


def special_ids(tokenizer, stops: list[str]) -> list[int]:
    """The ids of the stop strings that are special tokens: no text shows those."""
    found = []
    for stop in stops:
        ids = tokenizer.backend.encode(stop, add_special_tokens=False).ids
        if len(ids) == 1 and tokenizer.decode(ids) == "":
            found += ids
    return found


# --------------------------------------------- Texts ----------------------------------------------


def write_texts(model_file, model, mesh, tokenizer, stop_ids, prompts, args):
    """Continues each prompt --num-samples times and writes the texts; then how fast that was."""
    texts = []
    for prompt in prompts:
        for _ in range(args.num_samples):
            texts.append(Text(tokenizer, prompt, args.stop))
    prompt_ids = [text.prompt_ids for text in texts]
    limit = args.max_new_tokens or (ANSWER if args.chat else CONTINUATION)
    keep = kept_tokens(tokenizer, model.config)
    if args.chat and not model_file.has_unbounded_context(model.config):
        model_file.check_prompts(model.config, prompt_ids, 1, keep=None)  # no question is cut

    timing = Timing()
    writer = Writer(texts, args)
    try:
        for new in generate(model_file, model, mesh, prompt_ids, limit, keep, timing, args):
            if args.profile:
                record_memory(args.profile, mesh.devices.flat[0], timing)
            for text, tokens in zip(texts, new, strict=True):
                text.add(tokens, stop_ids, limit)
            writer.write(timing)
            if not writer.waiting:
                break
    except KeyboardInterrupt:
        writer.write_ended(timing)
        raise

    say_if_cut(model_file, model.config, texts)
    seen = [model_file.shift_context(model.config, ids, keep) for ids in prompt_ids]
    print(summary(model_file, model, mesh, seen, timing), file=sys.stderr)
    if args.profile:
        stop_profile(args.profile)


def is_utf8() -> bool:
    """Whether standard output takes every character."""
    return codecs.lookup(sys.stdout.encoding).name == "utf-8"


def streams(args) -> bool:
    """Whether texts are shown while they are generated."""
    return not (args.no_stream or args.json)


def kept_tokens(tokenizer, config) -> int:
    """How many tokens at the beginning of a text stay where it outgrows the context.

    A begin token, which some models cannot do without; in a chat all that comes before the words of
    the user, the system message included.
    """
    if isinstance(tokenizer, ChatTokenizer):
        beginning = tokenizer.beginning()
    else:
        beginning = tokenizer.encode("")
    return min(len(beginning), config.max_position_embeddings // 4)


def say_if_cut(model_file, config, texts: list["Text"]):
    """Says where a text outgrew the context, so that the model no longer saw all of it."""
    context = config.max_position_embeddings
    longest = max(len(text.prompt_ids) + len(text.ids) for text in texts)
    if longest > context and not model_file.has_unbounded_context(config):
        print(
            f"longer than the context of {context} tokens: wherever it was full, the model went on "
            f"from the last {context // 2} tokens",
            file=sys.stderr,
        )


class Text:
    """A prompt and its completion, token by token.

    prompt: a text, or the messages of a chat. stops: the stop strings. prompt_ids: the prompt's
    tokens, where they are known.
    """

    def __init__(self, tokenizer, prompt, stops, prompt_ids=None):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.stops = stops
        self.prompt_ids = prompt_ids or tokenizer.encode(prompt)
        self.ids = []  # the new tokens
        self.completion = ""  # their text, as far as it can be shown
        self.reason = None  # why it is complete: "stop" or "length"; None while it grows
        self.begin = len(tokenizer.decode(self.prompt_ids))  # of the completion, in the whole text

    def add(self, tokens, stop_ids, limit: int):
        """Appends new tokens, up to a stop id, a stop string or the limit of tokens."""
        for token in tokens:
            if self.reason is None:
                self.add_token(int(token), stop_ids, limit)

    def add_token(self, token: int, stop_ids, limit: int):
        """Appends a token and brings the completion up to date."""
        if token in stop_ids:
            self.reason = "stop"
        else:
            self.ids.append(token)
            if len(self.ids) == limit:
                self.reason = "length"

        # Decoded with the prompt, because a token's text may depend on the tokens before it.
        ids = self.prompt_ids + self.ids
        if self.reason is None:
            ids = settled_ids(self.tokenizer.backend, ids)
        whole = self.tokenizer.decode(ids)[self.begin :]
        text = cut_at_stop(whole, self.stops)
        if len(text) < len(whole):
            self.reason = "stop"
        if self.reason is None:
            text = hold_back(text, self.stops)

        self.completion = text

    def record(self, timing) -> dict:
        """The text as --json prints it."""
        speed = None
        if timing.steps > 0:
            speed = round(timing.steps / timing.decode, 2)
        return {
            "prompt": self.prompt,
            "completion": self.completion,
            "finish_reason": self.reason,
            "prompt_ids": self.prompt_ids,
            "completion_ids": self.ids,
            "time_to_first_token_s": round(timing.prefill, 4),
            "decode_tokens_per_s": speed,
        }


def settled_ids(backend, ids: list[int]) -> list[int]:
    """The ids without single bytes at their end, whose text depends on the bytes that follow.

    Bytes in a row that are not UTF-8 together are decoded as U+FFFD, all of them, even those that
    would be a character alone.
    """
    end = len(ids)
    while end > 0 and (backend.id_to_token(ids[end - 1]) or "").startswith("<0x"):
        end -= 1
    return ids[:end]


def cut_at_stop(text: str, stops: list[str]) -> str:
    """The text before the first stop string, or all of it if there is none."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))]


def hold_back(text: str, stops: list[str]) -> str:
    """The text without its end, where the next tokens may change that.

    An incomplete character is held back, and the beginning of a stop string.
    """
    text = text.rstrip("\ufffd")
    held = 0
    for stop in stops:
        for n in range(1, len(stop)):
            if text.endswith(stop[:n]):
                held = max(held, n)
    return text[: len(text) - held]


class Writer:
    """Writes texts to standard output, one after the other.

    The first streams while the others wait. Samples of a prompt have no order: those that have
    ended come next.
    """

    def __init__(self, texts: list[Text], args):
        self.args = args
        self.waiting = list(texts)  # those that are not written to their end
        self.written = 0  # characters of the first of them

    def write(self, timing):
        """Writes what is new: a streamed text as far as it goes, any other when it is complete."""
        while self.waiting:
            if self.written == 0 and self.args.num_samples > 1:
                self.waiting.sort(key=lambda text: text.reason is None)  # stable: the ended first
            text = self.waiting[0]
            if not (streams(self.args) or text.reason):
                break
            self.write_text(text, timing)
            if text.reason is None:
                break
            self.finish_text()

    def write_text(self, text: Text, timing):
        """Writes a text, or what is new of it."""
        if self.args.json:
            print(json.dumps(text.record(timing), ensure_ascii=not is_utf8()), flush=True)
        else:
            self.write_new(text)

    def finish_text(self):
        """Goes on to the next text, below a line."""
        self.waiting.pop(0)
        self.written = 0
        if self.waiting and not self.args.json:
            print("-" * 40, flush=True)

    def write_ended(self, timing):
        """Writes the texts that have ended, and leaves out the others."""
        ended = [text for text in self.waiting if text.reason is not None]
        if self.written > 0 and self.waiting[0] not in ended:
            print()
            self.written = 0
            if ended:
                print("-" * 40)
        self.waiting = ended
        while self.waiting:
            self.write_text(self.waiting[0], timing)
            self.finish_text()

    def write_new(self, text: Text):
        """Writes the new characters of a text; in a chat, of the answer alone."""
        whole = text.completion.lstrip() if self.args.chat else text.prompt + text.completion
        end = "\n" if text.reason else ""
        print(whole[self.written :], end=end, flush=True)
        self.written = len(whole)


def summary(model_file, model, mesh, prompt_ids: list[list[int]], timing) -> str:
    """A line with the devices, the dtype and the speed. prompt_ids: what the model saw of them."""
    seen = sum(map(len, prompt_ids))
    line = (
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {precision(model_file, model)}: "
        f"compiled in {timing.compile:.1f} s, first token after {timing.prefill:.2f} s "
        f"(prefill {seen / timing.prefill:,.0f} tokens/s)"
    )
    if timing.checks > 0:
        accepted = timing.accepted / timing.checks
        line += f", draft: {accepted:.1f} of {timing.guessed / timing.checks:.1f} tokens accepted"
        line += " a step"
    if timing.steps > 0:
        decode = len(prompt_ids) * timing.steps / timing.decode
        line += f", then {decode:,.{1 if decode < 100 else 0}f} tokens/s"
    return line


# ------------------------------------------- Generation -------------------------------------------


@dataclass
class Timing:
    """How long the parts of a generation took, in seconds."""

    compile: float = 0.0
    begin: float = 0.0  # when the prefill began, on the clock of time.perf_counter
    prefill: float = 0.0  # the time to the first token
    decode: float = 0.0  # all calls of decode
    steps: float = 0  # tokens that decode made in each row; with a draft, on average
    checks: int = 0  # how often guesses for a row were checked
    guessed: int = 0  # tokens in them
    accepted: int = 0  # those that were right

    def add_first(self, start: float, seconds: float):
        """Counts the first token after a prefill: a text that outgrows the context has several."""
        if self.begin == 0:
            self.begin = start
            self.prefill = seconds
        else:
            self.decode += seconds
            self.steps += 1


def generate(model_file, model, mesh, prompts, limit: int, keep: int, timing, args):
    """Autoregressive generation for a batch of B prompts: yields the new tokens as they come.

    The same as the model file's generate_stream, but over the devices of a mesh, with as many
    tokens at a time as let the text flow, and with its time in `timing`. With a draft the rows get
    different numbers of tokens at a time.
    """
    config = model.config
    model_file.check_prompts(config, prompts, limit, keep)
    programs = Programs(model, mesh, args.top_k, timing)
    row_key = partial(jax.random.fold_in, random_key(args.seed))
    keys = [row_key(row) for row in range(len(prompts))]
    visible = [list(prompt) for prompt in prompts]  # of each text, what the model sees
    dropped = [0] * len(prompts)  # of each text, how many tokens it no longer sees

    left = limit
    while left > 0:
        # Where the context is full, a row goes on from its last tokens. Then all rows are prefilled
        # again, each with what it sees.
        for row, ids in enumerate(visible):
            visible[row] = model_file.shift_context(config, ids, keep)
            dropped[row] += len(ids) - len(visible[row])
        row_keys = list(map(model_file.key_after_shift, keys, dropped))

        # The cache is as long as the context from then on: few lengths are few programs to compile.
        n = model_file.tokens_until_full(config, visible, left, keep)
        size = n
        if max(dropped) > 0:
            context = config.max_position_embeddings
            size = model_file.tokens_until_full(config, visible, context, keep)

        if args.draft is None:
            rows = place(model_file, model, mesh, visible, row_keys, size)
            parts = fill_context(model_file, programs, rows, n, timing, args)
        else:
            parts = speculate_rows(model_file, programs, visible, row_keys, n, size, timing, args)
        for new in parts:
            new = new[: len(prompts)]
            for row, tokens in enumerate(new):
                visible[row] += map(int, tokens)
            yield new
        left -= n


def fill_context(model_file, programs, rows: "Rows", limit: int, timing, args):
    """Prefill, then decode: yields new tokens [B, n] of all rows, `limit` of each row."""
    sampling = sampling_options(args)
    keys = rows.keys
    cache, token = first_tokens(model_file, programs, rows, timing, args)
    yield np.array(token).reshape(-1, 1)

    # The others. Their program is compiled only now, so that the first token is shown early.
    if limit > 1:
        decode = programs.program(model_file.decode, cache, token, keys, shared=[sampling, 1])
    steps = 1 if streams(args) else model_file.STEPS
    left = limit - 1
    while left > 0:
        steps = min(steps, left)
        start = time.perf_counter()
        cache, new = decode(cache, token, keys, sampling, steps)
        new = np.asarray(new)  # waits for the devices
        seconds = time.perf_counter() - start
        timing.decode += seconds
        timing.steps += steps
        left -= steps

        token = new[..., steps - 1]
        new = new.reshape(-1, model_file.STEPS)[:, :steps]
        model_file.check_tokens(new)
        yield new

        # As many steps as take a tenth of a second, so that the text flows.
        if streams(args):
            steps = max(1, min(model_file.STEPS, int(0.1 * steps / seconds)))


def first_tokens(model_file, programs, rows: "Rows", timing, args):
    """Prefill: (a cache with a row for each text, the first new token of each)."""
    sampling = sampling_options(args)
    if args.profile and timing.begin == 0:
        # Both programs are compiled before the trace begins, so that it shows only what runs.
        batch = rows.tokens, rows.positions, rows.prefill_keys
        programs.program(model_file.prefill, rows.cache, *batch, shared=[sampling])
        batch = rows.last, rows.keys
        cache = rows.spread(rows.cache)
        programs.program(model_file.decode, cache, *batch, shared=[sampling, 1])
        start_profile(args.profile)

    start = time.perf_counter()
    compiled = timing.compile
    cache, token = read_rows(model_file, programs, rows, sampling)
    model_file.check_tokens(np.asarray(token))  # waits for the devices
    timing.add_first(start, time.perf_counter() - start - (timing.compile - compiled))
    return cache, token


def read_rows(model_file, programs, rows: "Rows", sampling: dict):
    """The same without its time."""
    cache = rows.cache
    batch = rows.tokens, rows.positions, rows.prefill_keys
    prefill = programs.program(model_file.prefill, cache, *batch, shared=[sampling])
    cache, token = prefill(cache, *batch, sampling)

    # Texts that are the same have been read together, up to their last tokens.
    if rows.shared:
        cache = rows.spread(cache)
        batch = rows.last, rows.keys
        decode = programs.program(model_file.decode, cache, *batch, shared=[sampling, 1])
        cache, token = decode(cache, *batch, sampling, 1)
        token = token[..., 0]
    return cache, token


def sampling_options(args) -> dict:
    """The sampling options that are inputs of the compiled programs. None: off."""
    penalty = args.repetition_penalty
    return {
        "temperature": args.temperature or None,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": None if penalty == 1 else penalty,
    }


@dataclass
class Rows:
    """A batch of B texts on the devices. With pmap, each array has a leading axis of devices.

    Texts that are the same are prefilled once, but for their last token: then there are fewer rows
    in cache, tokens, positions and prefill_keys, and `spread` makes B rows of them.
    """

    mesh: jax.sharding.Mesh
    cache: tuple  # empty
    tokens: jax.Array
    positions: jax.Array
    prefill_keys: jax.Array
    keys: jax.Array  # [B]
    last: jax.Array  # [B], the last token of each text
    same_as: np.ndarray | None  # [B], the row of the cache that is the beginning of each text

    @property
    def shared(self) -> bool:
        """Whether some texts are the same."""
        return self.same_as is not None

    def spread(self, cache):
        """A cache with a row for each of the B texts."""
        if not self.shared:
            return cache

        def take(x):
            if "pmap" not in self.mesh.shape:
                return x[self.same_as]
            rows = x.reshape(-1, *x.shape[2:])[self.same_as]
            return rows.reshape(len(x), -1, *rows.shape[1:])

        def spread(cache):
            layers = [(take(k), take(v), *other) for k, v, *other in cache.layers]
            tokens = take(cache.tokens)
            positions = take(cache.positions)
            return cache._replace(layers=tuple(layers), tokens=tokens, positions=positions)

        if self.mesh.size == 1:
            return spread(cache)  # without a program for it to compile
        shardings = shardings_of(self.mesh, jax.eval_shape(spread, cache))
        return jax.jit(spread, out_shardings=shardings)(cache)


def place(
    model_file, model, mesh, texts: list[list[int]], keys: list, size: int, use_ring=True
) -> Rows:
    """Puts a batch of texts on the devices, with a cache that has room for `size` more tokens."""
    # All devices along the axis tensor share their rows; each such group gets as many rows. The
    # last one is repeated where they do not divide.
    groups = mesh.size // mesh.shape.get("tensor", 1)

    def padded(rows: list) -> list:
        return rows + rows[-1:] * (-len(rows) % groups)

    # Each different text once, if that is less to compute.
    texts = padded([tuple(text) for text in texts])
    keys = padded(keys)
    different = list(dict.fromkeys(texts))
    same_as = None
    prefilled = texts
    if len(padded(different)) < len(texts):
        same_as = np.array([different.index(text) for text in texts])
        prefilled = padded(different)

    tokens, positions, length = model_file.batch_prompts(model.config, prefilled, size)
    if same_as is not None:
        tokens = tokens[:, :-1]
        positions = positions[:, :-1]
    prefill_keys = jax.numpy.stack(keys[: len(prefilled)])
    last = np.array([text[-1] for text in texts])
    batch = [tokens, positions, prefill_keys, jax.numpy.stack(keys), last]
    batch = put_rows(mesh, batch)

    cache = empty_cache(model_file, model, mesh, len(prefilled), length, use_ring)
    return Rows(mesh, cache, *batch, same_as)


def put_rows(mesh, batch: list) -> list:
    """Puts arrays on the devices, each with its rows."""
    if "pmap" in mesh.shape:
        batch = [x.reshape(mesh.size, -1, *x.shape[1:]) for x in batch]
    return jax.device_put(batch, shardings_of(mesh, batch))


def empty_cache(model_file, model, mesh, rows: int, length: int, use_ring: bool):
    """A cache of `length` slots on the devices; use_ring as in `new_cache`."""
    groups = mesh.size // mesh.shape.get("tensor", 1)

    def make():
        if "pmap" not in mesh.shape:
            return new_cache(model_file, model, rows, length, use_ring)
        cache = new_cache(model_file, model, rows // groups, length, use_ring)
        return jax.tree.map(lambda x: jax.numpy.stack([x] * groups), cache)

    # Of several devices, none may have room for the whole cache: each makes its own part.
    if mesh.size > 1:
        return jax.jit(make, out_shardings=shardings_of(mesh, jax.eval_shape(make)))()
    return make()


def new_cache(model_file, model, rows: int, length: int, use_ring: bool):
    """A model file's cache. use_ring: with sliding windows, in ring buffers.

    No token can be taken back out of a ring: it has replaced another.
    """
    options = {}
    if not use_ring and hasattr(model_file, "ring_contents"):
        options["use_ring"] = False
    return model_file.init_cache(model.config, rows, length, model.cache_dtype, **options)


def shardings_of(mesh, arrays):
    """How arrays are split over the devices of a mesh: a sharding for each.

    Rows are the first dimension; they are split over all axes but tensor. KV heads are the third of
    the four dimensions of keys and values; they are split over tensor. A dimension that does not
    divide is not split.
    """
    tensor = mesh.shape.get("tensor", 1)
    row_axes = tuple(axis for axis in mesh.shape if axis != "tensor")

    def sharding(x):
        axes = [None] * x.ndim
        if x.ndim > 0 and x.shape[0] % (mesh.size // tensor) == 0:
            axes[0] = row_axes
        if x.ndim == 4 and tensor > 1 and x.shape[2] % tensor == 0:
            axes[2] = "tensor"
        return jax.NamedSharding(mesh, jax.P(*axes))

    return jax.tree.map(sharding, arrays)


class Programs:
    """Compiles the programs of a model for a mesh, and adds up the time in `timing`.

    Each is compiled once for inputs of the same shapes.
    """

    def __init__(self, model, mesh, top_k: int | None, timing):
        self.model = model
        self.graphdef, self.state = nnx.split(model)
        self.mesh = mesh
        self.top_k = top_k
        self.timing = timing
        self.compiled = {}  # (function, types of its inputs) -> its program

    def program(self, function, cache, *batch, shared: list):
        """A model file's prefill or decode, compiled for inputs of these shapes.

        batch: the inputs with rows. shared: inputs that are the same on all devices. The program
        takes cache, *batch, *shared. The cache is donated: its memory is used for the new one.
        """
        name = (function, str(jax.tree.map(np.shape, [cache, batch, shared])))
        if name in self.compiled:
            return self.compiled[name]

        start = time.perf_counter()
        function = partial(function, self.graphdef, top_k=self.top_k)
        inputs = (self.state, cache, *batch, *shared)

        if "pmap" in self.mesh.shape:
            axes = (None, 0, *[0] * len(batch), *[None] * len(shared))
            devices = [*self.mesh.devices.flat]
            program = jax.pmap(function, in_axes=axes, devices=devices, donate_argnums=1)
        else:
            out = (shardings_of(self.mesh, cache), None)
            program = jax.jit(function, out_shardings=out, donate_argnums=1)

        compiled = program.lower(*inputs).compile()
        self.timing.compile += time.perf_counter() - start
        self.compiled[name] = partial(compiled, self.state)
        return self.compiled[name]


# -------------------------------------- Speculative decoding --------------------------------------

WIDTHS = (4, 8, 16)  # tokens in a pass that checks guesses: each width is a program to compile
SPARE = 128  # slots of the cache for the holes in several rows
LONGEST = 16  # tokens of an n-gram to look up, at most
SHORTEST = 2  # and at least
REST = 32  # tokens without guesses after wrong ones, at most; no more than `decode` makes in a call


def speculate(decoder: "Decoder", draft, texts: list[list[int]], limit: int, timing, args):
    """Speculative decoding: yields new tokens of each row as they come, `limit` of each row.

    A draft guesses the tokens that follow, and the model checks all of them in one forward pass,
    which takes little longer than the one for a single token where the time goes into reading the
    weights (Leviathan et al. 2023). In the paper a guess is accepted at random, so that the
    distribution stays the model's. Here the random numbers of a token depend only on the row's key
    and the token's position, so `verify` can sample at each position what plain decoding would
    sample there. Guesses are kept up to the first that differs, and the model's own token takes its
    place. So the text is the one without a draft, token for token, greedy or sampled, up to
    rounding of the logits.

    A draft model samples with the same keys: the same Gumbel noise is added to its logits. Where
    the two distributions are alike, so are the samples.

    texts: the tokens of each row so far, to which the new ones are appended. The decoder has read
    all but the last one of each.
    """
    ends = [len(ids) + limit for ids in texts]
    steps = 1 if streams(args) else REST
    while True:
        left = [end - len(ids) for end, ids in zip(ends, texts, strict=True)]
        if max(left) == 0:
            return
        start = time.perf_counter()
        compiled = timing.compile

        # No guess may reach beyond the limit, where the context may end.
        most = [max(0, min(n, draft.width) - 1) for n in left]
        guesses = draft.guess(texts, most)
        if any(guesses):
            new = check_guesses(decoder, texts, guesses, left, draft.width)
            draft.learn(texts, guesses, new)
            count_guesses(timing, guesses, new)
        else:
            wanted = min(steps, draft.pause_left(texts), *(n for n in left if n > 0))
            new = go_on(decoder, texts, left, wanted)

        for ids, tokens in zip(texts, new, strict=True):
            ids += tokens
        seconds = time.perf_counter() - start - (timing.compile - compiled)
        timing.decode += seconds
        timing.steps += sum(map(len, new)) / len(new)
        yield new
        if streams(args) and not any(guesses):
            steps = max(1, min(REST, int(0.1 * wanted / seconds)))  # so that the text flows


def check_guesses(decoder, texts, guesses, left: list[int], width: int) -> list[list[int]]:
    """The new tokens of each row: the guesses that are right, and the token after them.

    guesses: of each row, perhaps none. left: how many tokens each row may still get; where it is 0,
    the row is done.
    """
    # Padding on the right, at position -1. All of a row that is done is padding.
    tokens = np.zeros((len(texts), width), int)
    positions = np.full((len(texts), width), -1)
    for row, (ids, guess) in enumerate(zip(texts, guesses, strict=True)):
        if left[row] > 0:
            n = 1 + len(guess)
            tokens[row, :n] = [ids[-1], *guess]
            positions[row, :n] = len(ids) - 1 + np.arange(n)

    made = decoder.verify(tokens, positions).tolist()
    new = []
    for row, guess in enumerate(guesses):
        n = 0 if left[row] == 0 else 1 + count_shared(guess, made[row])
        new.append(made[row][:n])

    decoder.roll_back(width, [len(tokens) for tokens in new])
    return new


def go_on(decoder, texts, left: list[int], steps: int) -> list[list[int]]:
    """The new tokens of each row without guesses: `steps`, or none where it is done."""
    made = decoder.decode(np.array([ids[-1] for ids in texts]), steps).tolist()
    new = [tokens if n > 0 else [] for tokens, n in zip(made, left, strict=True)]
    decoder.check_tokens(np.concatenate(new))
    if not all(new):
        decoder.roll_back(steps, [len(tokens) for tokens in new])
    return new


def count_guesses(timing, guesses, new):
    """Adds up how many guesses there were, and how many of them were right."""
    for guess, tokens in zip(guesses, new, strict=True):
        if guess:
            timing.checks += 1
            timing.guessed += len(guess)
            timing.accepted += len(tokens) - 1


class Decoder:
    """A model, and the KV cache of the B texts that it has read, from which it can take tokens.

    run_verify(cache, tokens, positions) and run_decode(cache, token, steps) are the programs of its
    model file, and check_tokens is the function there.
    """

    def __init__(self, cache, run_verify, run_decode, check_tokens):
        self.cache = cache
        self.run_verify = run_verify
        self.run_decode = run_decode
        self.check_tokens = check_tokens

    def verify(self, tokens, positions) -> np.ndarray:
        """Reads tokens [B, T], and samples the token after each of them [B, T]."""
        self.make_room(tokens.shape[1])
        self.cache, new = self.run_verify(self.cache, tokens, positions)
        new = np.asarray(new).reshape(tokens.shape)
        self.check_tokens(new[positions >= 0])
        return new

    def decode(self, last, steps: int) -> np.ndarray:
        """Reads the last tokens [B] and all but one of the new ones, which are [B, steps]."""
        self.make_room(steps)
        self.cache, new = self.run_decode(self.cache, last, steps)
        return np.asarray(new).reshape(len(last), -1)[:, :steps]

    def roll_back(self, written: int, kept: list[int]):
        """Each row keeps the first kept[row] of the newest `written` slots."""
        self.cache = roll_back(self.cache, written, kept)

    def make_room(self, slots: int):
        """Closes the holes in the cache, if it has too few empty slots."""
        length = self.cache.positions.shape[-1]
        if np.max(self.cache.filled) + slots > length:
            shardings = jax.tree.map(lambda x: x.sharding, self.cache)
            close = jax.jit(close_holes, donate_argnums=0, out_shardings=shardings)
            self.cache = close(self.cache)


def roll_back(cache, written: int, kept: list[int]):
    """Takes tokens out of a cache: a row keeps the first kept[row] of its newest `written` slots.

    Only its position makes a slot count; -1 hides it. Where rows keep different numbers, all but
    the longest get holes.
    """
    positions = np.array(cache.positions)  # [B, S]; with pmap all have an axis of devices before it
    kept = np.reshape(kept, positions.shape[:-1])
    begin = np.asarray(cache.filled) - written
    end = begin[..., None] + kept
    positions[np.arange(positions.shape[-1]) >= end[..., None]] = -1

    filled = (begin + kept.max(axis=-1)).astype(cache.filled.dtype)
    return cache._replace(
        positions=jax.device_put(positions, cache.positions.sharding),
        filled=jax.device_put(filled, cache.filled.sharding),
    )


def close_holes(cache):
    """The same cache with the tokens of each row in its first slots."""
    order = jax.numpy.argsort(cache.positions < 0, axis=-1, stable=True)

    def moved(x):
        return jax.numpy.take_along_axis(x, order, axis=-1)

    def moved_layer(x):  # [B, S, K, Dh]
        return jax.numpy.take_along_axis(x, order[..., None, None], axis=-3)

    layers = [(moved_layer(k), moved_layer(v), *other) for k, v, *other in cache.layers]
    positions = moved(cache.positions)
    filled = (positions >= 0).sum(axis=-1).max(axis=-1).astype(cache.filled.dtype)
    return cache._replace(
        layers=tuple(layers), tokens=moved(cache.tokens), positions=positions, filled=filled
    )


def speculate_rows(model_file, programs, texts, keys: list, limit: int, size: int, timing, args):
    """What `fill_context` does, with a draft: yields a list of new tokens for each row."""
    room = size + WIDTHS[-1] + (SPARE if len(texts) > 1 else 0)
    rows = place(model_file, programs.model, programs.mesh, texts, keys, room, use_ring=False)
    cache, token = first_tokens(model_file, programs, rows, timing, args)
    first = np.asarray(token).reshape(-1, 1).tolist()

    # A row for each that `place` makes: where the devices need more, the last one is repeated.
    texts = [list(ids) for ids in texts]
    texts += texts[-1:] * (len(first) - len(texts))
    yield first
    if limit == 1:
        return

    start = time.perf_counter()
    compiled = timing.compile
    args.draft.begin(texts, keys, room, timing, args)
    timing.decode += time.perf_counter() - start - (timing.compile - compiled)

    texts = [ids + tokens for ids, tokens in zip(texts, first, strict=True)]
    decoder = decoder_of_rows(model_file, programs, rows, cache, args)
    yield from speculate(decoder, args.draft, texts, limit - 1, timing, args)


def decoder_of_rows(model_file, programs, rows, cache, args) -> Decoder:
    """The decoder of a batch that has been read."""
    sampling = sampling_options(args)
    found = {}  # (function, width) -> its program

    def run(function, width, cache, batch, shared):
        batch = [*put_rows(programs.mesh, batch), rows.keys]
        if (function, width) not in found:
            found[function, width] = programs.program(function, cache, *batch, shared=shared)
        return found[function, width](cache, *batch, *shared)

    def verify(cache, tokens, positions):
        width = tokens.shape[1]
        return run(model_file.verify, width, cache, [tokens, positions], [sampling])

    def decode(cache, last, steps):
        return run(model_file.decode, 1, cache, [last], [sampling, steps])

    return Decoder(cache, verify, decode, model_file.check_tokens)


def share_right(guesses, new) -> float:
    """The share of the guesses that are right. new: each row's new tokens, the model's own last."""
    right = sum(len(tokens) - 1 for guess, tokens in zip(guesses, new, strict=True) if guess)
    return right / sum(map(len, guesses))


def next_width(width: int, right: float) -> int:
    """How many tokens to check next: more if all guesses were right, fewer if most were wrong."""
    place = WIDTHS.index(width)
    if right == 1:
        place = min(place + 1, len(WIDTHS) - 1)
    elif right < 0.5:
        place = max(place - 1, 0)
    return WIDTHS[place]


class LookUp:
    """A draft that looks up the end of a text in the text itself: prompt lookup (Saxena 2023).

    Where guesses are wrong it rests for a while, and each time for longer, so that a text that does
    not repeat itself takes little longer than without a draft.
    """

    def __init__(self):
        self.width = WIDTHS[-1]
        self.pause = 1  # tokens of each row in the next rest
        self.resume = 0  # the rest is over where the texts have so many tokens, all together

    def begin(self, texts, keys, size, timing, args):
        """A batch of texts begins."""
        self.resume = 0

    def guess(self, texts: list[list[int]], most: list[int]) -> list[list[int]]:
        """Up to `most` guesses for each row."""
        if self.pause_left(texts) > 0:
            return [[] for _ in texts]
        guesses = [look_up(ids, n) for ids, n in zip(texts, most, strict=True)]
        if not any(guesses):
            self.rest(texts, REST // 2)
        return guesses

    def learn(self, texts, guesses, new):
        """Takes note of how many guesses were right. texts: as they were for `guess`."""
        right = share_right(guesses, new)
        if right >= 0.5:
            self.pause = 1
        elif self.width == WIDTHS[0]:
            self.rest(texts, REST)
        self.width = next_width(self.width, right)

    def rest(self, texts, longest: int):
        """Makes no guesses for a while, `longest` tokens of each row at most."""
        self.pause = min(self.pause, longest)
        self.resume = sum(map(len, texts)) + self.pause * len(texts)
        self.pause *= 2

    def pause_left(self, texts) -> int:
        """How many tokens of each row are made before the next guess."""
        return max(0, math.ceil((self.resume - sum(map(len, texts))) / len(texts)))

    def recall(self, ids, limit, key, args):
        """A text of a conversation begins."""
        self.resume = 0

    def remember(self, ids):
        """There is nothing to keep of a conversation."""

    def forget(self):
        """As above."""


def look_up(ids: list[int], n: int) -> list[int]:
    """Guesses n tokens: those that followed where the end of the text has occurred before.

    That is the place before which most tokens are the same, up to LONGEST; of several, the last
    one. There is no guess where fewer than SHORTEST are the same. The copy may run into itself: a
    text that has begun to repeat itself goes on so.
    """
    text = np.array(ids)
    ends = np.flatnonzero(text[:-1] == text[-1])  # where the last token stands before
    length = 1
    while length < min(LONGEST, len(ids) - 1):
        longer = ends[(ends >= length) & (text[ends - length] == text[-1 - length])]
        if len(longer) == 0:
            break
        ends = longer
        length += 1
    if len(ends) == 0 or length < SHORTEST:
        return []

    copy = list(ids)
    for i in range(n):
        copy.append(copy[ends[-1] + 1 + i])
    return copy[len(ids) :]


class DraftModel:
    """A draft by a smaller model with the same vocabulary and the same random keys.

    Where a text exceeds its own context, there are no guesses.
    """

    def __init__(self, model_file, model, mesh):
        self.model_file = model_file
        self.model = model
        self.mesh = mesh
        self.width = WIDTHS[0]
        self.programs = None
        self.decoder = None
        self.written = 0  # tokens that the last guesses took in the cache
        self.memory = Memory()  # of a conversation

    def begin(self, texts, keys, size, timing, args):
        """Reads a batch of texts; size as for `place`."""
        self.decoder = None
        if self.is_full(texts, 0):
            return
        if self.programs is None:
            self.programs = Programs(self.model, self.mesh, args.top_k, timing)
        rows = place(self.model_file, self.model, self.mesh, texts, keys, size, use_ring=False)
        cache, _ = read_rows(self.model_file, self.programs, rows, sampling_options(args))
        self.decoder = decoder_of_rows(self.model_file, self.programs, rows, cache, args)

    def is_full(self, texts, more: int) -> bool:
        """Whether the context has no room for so many tokens more."""
        config = self.model.config
        end = max(map(len, texts)) + more
        unbounded = self.model_file.has_unbounded_context(config)
        return end > config.max_position_embeddings and not unbounded

    def guess(self, texts: list[list[int]], most: list[int]) -> list[list[int]]:
        """Up to `most` guesses for each row."""
        n = max(most)
        if self.decoder is None or n == 0 or self.is_full(texts, n):
            return [[] for _ in texts]

        # One token more than there are guesses, so that it reads the last guess, too.
        self.written = n + 1
        made = self.decoder.decode(np.array([ids[-1] for ids in texts]), self.written)
        return [tokens[:count] for tokens, count in zip(made.tolist(), most, strict=True)]

    def learn(self, texts, guesses, new):
        """Takes back the guesses that were wrong. texts: as they were for `guess`."""
        self.decoder.roll_back(self.written, [len(tokens) for tokens in new])
        self.width = next_width(self.width, share_right(guesses, new))

    def pause_left(self, texts) -> int:
        """How many tokens of each row are made before the next guess, where there is none now."""
        return REST

    def recall(self, ids, limit, key, args):
        """Reads what is new of a conversation."""
        self.decoder = None
        if not self.is_full([ids], 0):
            memory = self.memory
            self.decoder, _ = recall(self.model_file, self.model, memory, ids, limit, key, args)

    def remember(self, ids):
        """Keeps the cache for the next answer. ids: the text so far."""
        if self.decoder is not None:
            self.memory.store(self.decoder, ids)

    def forget(self):
        """Its cache may be lost."""
        self.memory = Memory()


# -------------------------------------------- Profile ---------------------------------------------


def start_profile(folder: Path):
    """Starts a trace of the programs that run."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.profiler.start_trace(folder)


def record_memory(folder: Path, device, timing):
    """Appends the memory in use to memory.jsonl. A CPU does not count it, and leaves no file."""
    stats = device.memory_stats()
    if not stats:
        return

    line = {
        "seconds": time.perf_counter() - timing.begin,
        "bytes_in_use": stats["bytes_in_use"],
        "peak_bytes_in_use": stats["peak_bytes_in_use"],
    }
    mode = "w" if timing.steps == 0 else "a"  # the file of an older run is replaced
    with open(folder / "memory.jsonl", mode) as file:
        print(json.dumps(line), file=file)


def stop_profile(folder: Path):
    """Writes the trace and says how to look at it."""
    jax.profiler.stop_trace()
    print(f"a trace is in {folder}: look at it with `xprof {folder}`", file=sys.stderr)


# ---------------------------------------------- Chat ----------------------------------------------


class ChatError(ValueError):
    """A conversation that a chat template does not take; the message says why."""


class ChatTokenizer:
    """The tokenizer of a checkpoint, with its chat template and perhaps a system message.

    think: False switches off the thinking of models whose template has a switch for it.
    """

    def __init__(self, backend, folder: Path, system: str | None, think: bool = True):
        # Otherwise transformers says that PyTorch is missing.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # Half a second, which only chats have to wait.
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        for file in folder.glob("chat_template*"):
            if not file.exists():
                fail(f"{file} is a link to a file that is gone: download it again")

        # transformers is here for its template alone; the ids are those of every other text.
        any_file = importlib.import_module(MODELS[0])
        unreadable = (ValueError, OSError, TypeError, AttributeError, KeyError)
        with explained(unreadable, f"the chat template of {folder} cannot be read: {{}}"):
            if any_file.is_gguf(folder):
                settings = any_file.gguf_chat_settings(folder)
                self.templates = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
            else:
                # Code that came with the folder is not run, nor does transformers ask whether to.
                self.templates = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
        self.backend = backend
        self.folder = folder
        self.system = system

        named = self.templates.chat_template
        if not named:
            fail(
                f"{folder} has no chat template, so it was not tuned to answer: "
                "leave --chat out, or try HuggingFaceTB/SmolLM2-135M-Instruct, or --chat alone"
            )
        if isinstance(named, dict) and "default" not in named:
            fail(f"{folder} has the chat templates {', '.join(named)}, but none called default")

        self.options = {}
        if not think:
            # The name that Qwen3 has given it; others, such as SmolLM3, took it over.
            self.options = {"enable_thinking": False}
            template = named["default"] if isinstance(named, dict) else named
            if "enable_thinking" not in template:
                fail(
                    f"the chat template of {folder} has no switch for thinking "
                    "(enable_thinking): leave --no-think out"
                )

    def encode(self, messages: str | list[dict]) -> list[int]:
        """The token ids of a conversation, up to where the next answer begins.

        A message is {"role": "user" or "assistant", "content": its text}. A text stands for a
        single message of the user.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        with explained(ChatError, "{}"):
            return self.encode_messages(messages)

    def encode_messages(self, messages: list[dict]) -> list[int]:
        """The same for messages as they are. ChatError: the template does not take them."""
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        # A template is a small program: it may refuse a conversation, or fail.
        failed = (TemplateSyntaxError, TypeError, ValueError, AttributeError, LookupError)
        failed += (ArithmeticError, RuntimeError)
        try:
            text = self.templates.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.options
            )
        except failed as error:
            raise ChatError(f"the chat template of {self.folder} fails: {error}") from error
        except TemplateError as error:
            refusal = f"the chat template of {self.folder} does not take this: {error}"
            if self.system is None:
                refusal += " (if it wants a system message: --system TEXT)"
            raise ChatError(refusal) from error

        ids = self.backend.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ChatError(f"the chat template of {self.folder} makes no text of the messages")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.backend.decode(ids)

    def beginning(self) -> list[int]:
        """The token ids before the first words of the user, the system message included."""
        ids = self.encode("a")
        return ids[: count_shared(ids, self.encode("b"))]


@dataclass
class Memory:
    """The KV cache of a conversation, and the tokens whose keys and values it holds."""

    ids: list[int] = field(default_factory=list)
    cache: tuple | None = None
    length: int = 0  # slots of the cache

    def store(self, decoder: Decoder, text: list[int]):
        """Takes the cache of a decoder that has read the text, or all but its last tokens."""
        self.cache = decoder.cache
        self.ids = text[: int((np.asarray(self.cache.positions) >= 0).sum())]


COMMANDS = """\
/clear        forget the messages so far
/system TEXT  the system message of the conversation; without TEXT, none
/undo         take back the last message and its answer
/save FILE    write the conversation into a new .jsonl, which train.py --data reads
/help         show this
Ctrl-C stops an answer, Ctrl-D ends the conversation."""


def converse(model_file, model, mesh, tokenizer, stop_ids, args):
    """Reads messages from the terminal and writes the answers, until Ctrl-D."""
    sys.stdin.reconfigure(errors="replace")
    print(
        f"{mesh.devices.flat[0].device_kind}, {precision(model_file, model)}; "
        "Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists the commands",
        file=sys.stderr,
    )
    context = model.config.max_position_embeddings
    limit = args.max_new_tokens or ANSWER
    memory = Memory()
    messages = []
    while True:
        message = read_message()
        if message is None:
            print()
            return
        if message.startswith("/"):
            obey(message, messages, tokenizer)
            continue
        if not message.strip():
            continue

        messages.append({"role": "user", "content": message})
        first, text = fit_context(model_file, model.config, tokenizer, messages, limit, args)
        if len(text.prompt_ids) >= context and not model_file.has_unbounded_context(model.config):
            messages.pop()
            print(
                f"no room in the context of {context}: say less, /undo, or /clear", file=sys.stderr
            )
            continue
        if first > 0:
            messages = messages[first:]
            turns = "the oldest turn is" if first == 2 else f"the {first // 2} oldest turns are"
            print(f"the context of {context} tokens is full: {turns} forgotten", file=sys.stderr)

        write_answer(model_file, model, memory, text, stop_ids, limit, args)
        messages.append({"role": "assistant", "content": text.completion.strip()})


def read_message() -> str | None:
    """A line from the terminal; None where Ctrl-D ends the conversation.

    Ctrl-C drops what is typed. At an empty prompt, a second one in a row ends the program.
    """
    import readline  # the arrow keys then work in `input`, and bring earlier lines back

    warned = False
    while True:
        try:
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            if warned and not readline.get_line_buffer():
                raise
            print()
            warned = not readline.get_line_buffer()
            if warned:
                print("Ctrl-C again ends the conversation, as Ctrl-D does", file=sys.stderr)


def obey(line: str, messages: list[dict], tokenizer):
    """Follows a command, which is a line that begins with /. It may change the messages."""
    command, _, text = line.strip().partition(" ")
    text = text.strip()
    answer = f"there is no {command}: /help lists the commands, and Ctrl-D ends the conversation"
    if command == "/help":
        answer = COMMANDS
    elif command == "/clear":
        messages.clear()
        answer = "the messages are forgotten"
    elif command == "/undo":
        answer = undo(messages)
    elif command == "/system":
        answer = change_system(tokenizer, text)
    elif command == "/save":
        answer = save_conversation(messages, tokenizer.system, text)
    if answer:
        print(answer, file=sys.stderr)


def undo(messages: list[dict]) -> str:
    """Takes back the last message and its answer; says which."""
    if not messages:
        return "there is no message to take back"
    message = messages[-2]["content"]
    del messages[-2:]
    return f"taken back: {message}"


def change_system(tokenizer, text: str) -> str | None:
    """Sets the system message, unless the chat template refuses it; an empty text removes it."""
    earlier = tokenizer.system
    tokenizer.system = text or None
    try:
        tokenizer.encode("Hello")
    except SystemExit:  # `fail` has said why; the conversation goes on
        tokenizer.system = earlier
        return None
    if text:
        return f"the system message: {text}"
    return "there was no system message" if earlier is None else f"removed: {earlier}"


def save_conversation(messages: list[dict], system: str | None, name: str) -> str:
    """Writes a conversation as a line of a new .jsonl; says where, or why not."""
    if not messages:
        return "there is nothing to save yet"
    try:
        file = Path(name).expanduser()
    except RuntimeError:
        return f"{name}: there is no home folder of that user"
    if file.suffix != ".jsonl":
        return "/save FILE: its name must end in .jsonl, so that train.py --data reads it"

    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    try:
        with file.open("x", encoding="utf-8") as stream:
            print(line, file=stream)
    except FileExistsError:
        return f"{file} exists: choose another name"
    except OSError as error:
        return f"{file} cannot be written: {error.strerror}"
    return f"{file}: {len(messages)} messages"


def fit_context(model_file, config, tokenizer, messages: list[dict], limit: int, args):
    """How many of the oldest messages have to go, and the others as a text with room for an answer.

    A question and its answer go together. The system message stays.
    """
    context = config.max_position_embeddings
    room = min(limit, context // 4)
    first = 0
    text = Text(tokenizer, messages, args.stop)
    while len(text.prompt_ids) + room > context and first + 1 < len(messages):
        if model_file.has_unbounded_context(config):
            break
        first += 2
        text = Text(tokenizer, messages[first:], args.stop)
    return first, text


def write_answer(model_file, model, memory, text, stop_ids, limit, args):
    """Writes an answer while it is generated. Ctrl-C stops it."""
    keep = kept_tokens(text.tokenizer, model.config)
    written = 0
    try:
        draft = args.draft
        for new in answer(model_file, model, memory, text.prompt_ids, limit, keep, args, draft):
            text.add(new, stop_ids, limit)
            shown = text.completion.lstrip()  # some templates leave a blank to the model
            print(shown[written:], end="", flush=True)
            written = len(shown)
            if text.reason:
                break
    except KeyboardInterrupt:
        memory.length = 0  # the cache may have been donated to a step that did not finish
        if draft is not None:
            draft.forget()
    print()
    say_if_cut(model_file, model.config, [text])


def answer(
    model_file, model, memory: Memory, ids: list[int], limit: int, keep: int, args, draft=None
):
    """Yields up to `limit` tokens after ids, each as an array [1]; with a draft, also more [n]."""
    config = model.config
    key = jax.random.fold_in(random_key(args.seed), 0)  # as the first row of a batch has
    visible = ids  # what the model sees of the text
    left = limit
    dropped = 0
    while left > 0:
        # Where the context is full, the model goes on from the last tokens.
        begin = model_file.shift_context(config, visible, keep)
        dropped += len(visible) - len(begin)
        n = model_file.tokens_until_full(config, [begin], left, keep)
        shifted_key = model_file.key_after_shift(key, dropped)
        visible = list(begin)
        if draft is None:
            parts = fill_memory(model_file, model, memory, begin, n, shifted_key, args)
        else:
            parts = speculate_text(model_file, model, memory, begin, n, shifted_key, args, draft)
        for new in parts:
            visible += new.tolist()
            yield new
        left -= n


def fill_memory(model_file, model, memory: Memory, ids: list[int], limit: int, key, args):
    """Yields up to `limit` tokens after ids, which have room for them in the context.

    Computes only those of ids that the memory does not hold. It starts anew if the cache is too
    short, or if ids begin differently: some templates drop parts of earlier answers.
    """
    graphdef, state = nnx.split(model)
    options = {"keys": key[None], "sampling": sampling_options(args), "top_k": args.top_k}
    prefill = partial(model_file.prefill, graphdef, state, **options)
    decode = partial(model_file.decode, graphdef, state, **options)

    token = read_text(model_file, model, memory, ids, limit, prefill)
    for _ in range(limit):
        model_file.check_tokens(np.asarray(token))
        yield np.asarray(token)
        memory.ids += token.tolist()
        memory.cache, token = decode(memory.cache, token, steps=1)
        token = token[:, 0]


def read_text(model_file, model, memory: Memory, ids, room: int, prefill, use_ring=True):
    """Has the memory hold ids and room for more tokens: returns the token after them [1]."""
    end = len(ids) + room
    known = len(memory.ids)
    if end > memory.length or known >= len(ids) or memory.ids != ids[:known]:
        known = 0
        memory.cache = None  # frees its memory before the new one is made
        memory.length = max(1024, 2 ** (end - 1).bit_length())  # few lengths, so few programs
        memory.cache = new_cache(model_file, model, 1, memory.length, use_ring)

    # In pieces of few different lengths, because each length is another program to compile.
    for T in (512, 64, 8, 1):
        while len(ids) - known >= T:
            piece = np.array([ids[known : known + T]])
            memory.cache, token = prefill(memory.cache, piece, None)
            known += T
    memory.ids = list(ids)
    return token


def speculate_text(model_file, model, memory, ids: list[int], limit: int, key, args, draft):
    """What `fill_memory` does, with a draft: yields several tokens at a time, as an array [n]."""
    decoder, token = recall(model_file, model, memory, ids, limit, key, args)
    yield token
    draft.recall(ids, limit, key, args)

    text = [*ids, *token.tolist()]
    for [new] in speculate(decoder, draft, [text], limit - 1, Timing(), args):
        memory.store(decoder, text)
        draft.remember(text)
        yield np.array(new)


def recall(model_file, model, memory: Memory, ids: list[int], limit: int, key, args):
    """Reads a text into a memory: (a decoder of its cache, the next token [1]).

    Keeps what the text begins with, and takes back the rest of the memory.
    """
    graphdef, state = nnx.split(model)
    options = {"keys": key[None], "sampling": sampling_options(args), "top_k": args.top_k}
    prefill = partial(model_file.prefill, graphdef, state, **options)
    verify = partial(model_file.verify, graphdef, state, **options)

    def decode(cache, last, steps):
        return model_file.decode(graphdef, state, cache, last, steps=steps, **options)

    room = limit + WIDTHS[-1]
    if len(ids) + room <= memory.length:
        known = min(count_shared(memory.ids, ids), len(ids) - 1)
        memory.cache = roll_back(memory.cache, len(memory.ids) - known, [0])
        memory.ids = ids[:known]
    token = np.asarray(read_text(model_file, model, memory, ids, room, prefill, use_ring=False))
    model_file.check_tokens(token)
    return Decoder(memory.cache, verify, decode, model_file.check_tokens), token


# --------------------------------------------- Scores ---------------------------------------------

SCORED_AT_ONCE = 64  # tokens whose logits are in memory at the same time


def write_scores(model_file, model, tokenizer, prompts: list[str], args):
    """Writes how likely each token of a text is, or how likely each of --choices goes on with it.

    A table for each text, or a line of JSON.
    """
    for i, prompt in enumerate(prompts):
        if args.choices:
            record = score_choices(model_file, model, tokenizer, prompt, args.choices)
            table = choices_table(record)
        else:
            record = score_text(model_file, model, tokenizer, prompt)
            table = score_table(record)

        if args.json:
            print(json.dumps(record, ensure_ascii=not is_utf8()), flush=True)
        else:
            if i > 0:
                print("-" * 40)
            print(table, flush=True)


def score_text(model_file, model, tokenizer, text: str) -> dict:
    """The log-probability of each token of a text, given those before it, and its perplexity.

    The first token has none before it, and no score; often it is a token that begins every text.
    """
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        fail("--score needs a text of two tokens or more: the first one has no score")
    check_scored_length(len(ids), model.config)

    graphdef, state = nnx.split(model)
    x, _ = run_hidden(graphdef, state, np.array([ids]))
    log_probs, ranks, _, _ = score_in_pieces(graphdef, state, x[0], ids, 1)
    model_file.check_tokens(ranks)
    log_probs = log_probs.astype(np.float64)  # for the sums

    # The bytes that were scored: all, or all but those of a first token that has a text.
    first = tokenizer.decode(ids[:1])
    scored = len(tokenizer.decode(ids).encode()) - len(first.encode())
    mean = float(log_probs.mean())
    bits = -float(log_probs.sum()) / math.log(2)
    return {
        "prompt": text,
        "ids": ids,
        "tokens": token_texts(tokenizer, ids),
        "log_probs": [None, *log_probs.tolist()],
        "ranks": [None, *ranks.tolist()],
        "scored_tokens": len(log_probs),
        "mean_log_prob": mean,
        "perplexity": math.exp(-mean),
        "bits_per_byte": bits / scored if scored > 0 else None,
    }


@partial(jax.jit, static_argnames="graphdef")
def run_hidden(graphdef, state, tokens, positions=None, cache=None):
    """The model without its head: tokens [B, T] -> (x [B, T, D], cache)."""
    return nnx.merge(graphdef, state).hidden(tokens, positions, cache)


@partial(jax.jit, static_argnames=("graphdef", "top"))
def score_tokens(graphdef, state, x, places, tokens, top):
    """How likely n tokens of a text are: x [T, D], their places [n] in it, and the tokens [n].

    -> (log-probabilities [n], ranks [n], those of the likeliest tokens there [n, top], their ids).
    A score comes from the vector of the token before. The likeliest token has rank 1. Where a logit
    is NaN, the rank is -1.
    """
    logits = nnx.merge(graphdef, state).head(x[places - 1])
    log_probs = jax.nn.log_softmax(logits)  # [n, V]
    chosen = jax.numpy.take_along_axis(log_probs, tokens[:, None], axis=-1)  # [n, 1]
    ranks = 1 + (log_probs > chosen).sum(axis=-1)
    ranks = jax.numpy.where(jax.numpy.isnan(chosen[:, 0]), -1, ranks)
    best, best_ids = jax.lax.top_k(log_probs, top)
    return chosen[:, 0], ranks, best, best_ids


def score_in_pieces(graphdef, state, x, ids, begin: int, top: int = 1) -> list:
    """`score_tokens` for ids[begin:] of a text: the logits of a few of them exist at a time."""
    places = np.arange(begin, len(ids))
    missing = -len(places) % SCORED_AT_ONCE
    places = np.pad(places, (0, missing), mode="edge")  # all pieces are as long: one program
    tokens = np.array(ids)[places]

    pieces = []
    for first in range(0, len(places), SCORED_AT_ONCE):
        piece = slice(first, first + SCORED_AT_ONCE)
        pieces.append(score_tokens(graphdef, state, x, places[piece], tokens[piece], top))
    columns = zip(*pieces, strict=True)
    return [np.concatenate(column)[: len(ids) - begin] for column in columns]


def check_scored_length(tokens: int, config):
    """Exits where a text is longer than the context."""
    context = config.max_position_embeddings
    if tokens > context:
        fail(
            f"{tokens} tokens do not fit the context length of {context}: score a shorter text, or "
            "its parts as prompts of their own"
        )


def score_choices(model_file, model, tokenizer, prompt: str, choices: list[str]) -> dict:
    """The log-probability of each continuation of a prompt, the likeliest first.

    A prompt and a continuation are encoded together, as one text. The continuation begins where the
    ids part from those of the prompt alone. That may be before its first letter: where a prompt
    ends in a blank, the token " Paris" takes the blank along.
    """
    prompt_ids = tokenizer.encode(prompt)
    texts = [tokenizer.encode(prompt + choice) for choice in choices]
    begins = [count_shared(prompt_ids, ids) for ids in texts]
    check_scored_length(max(map(len, texts)), model.config)
    if min(begins) == 0:
        fail(
            f"--choices: the first token of {prompt!r} changes with what follows, and no token "
            "remains before the continuation: give a longer prompt"
        )

    for choice, ids, begin in zip(choices, texts, begins, strict=True):
        if begin == len(ids):
            fail(f"--choices: {choice!r} adds no token to {prompt!r}: give another continuation")

    found = []
    scores = score_continuations(model_file, model, texts, min(begins))
    for choice, ids, begin, log_probs in zip(choices, texts, begins, scores, strict=True):
        log_probs = log_probs[begin - min(begins) :]
        found.append(
            {
                "choice": choice,
                "ids": ids[begin:],
                "log_probs": log_probs.tolist(),
                "log_prob": float(log_probs.sum()),
                "mean_log_prob": float(log_probs.mean()),
            }
        )
    found.sort(key=lambda choice: choice["log_prob"], reverse=True)
    return {"prompt": prompt, "prompt_ids": prompt_ids, "choices": found}


def count_shared(one: list[int], other: list[int]) -> int:
    """How many ids two texts begin with alike."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def score_continuations(model_file, model, texts: list[list[int]], shared: int) -> list:
    """The log-probabilities of each text's tokens from `shared` on; before it all are the same.

    What they share is computed once, and its KV cache repeated for each: the rest is a batch. With
    dynamic RoPE beyond the trained length, the cache keeps the angles of the shorter text.
    """
    graphdef, state = nnx.split(model)
    length = max(map(len, texts))
    cache = model_file.init_cache(model.config, 1, length, model.cache_dtype)
    before, cache = run_hidden(graphdef, state, np.array([texts[0][:shared]]), None, cache)
    cache = jax.tree.map(partial(repeat_row, times=len(texts)), cache)

    # Padding is on the right here, where no token attends to it.
    tokens = np.zeros((len(texts), length - shared), int)
    positions = np.full(tokens.shape, -1)
    for row, ids in enumerate(texts):
        n = len(ids) - shared
        tokens[row, :n] = ids[shared:]
        positions[row, :n] = np.arange(shared, len(ids))
    x, _ = run_hidden(graphdef, state, tokens, positions, cache)

    # The vector of the last shared token stands before those of each continuation.
    found = []
    for row, ids in enumerate(texts):
        row_x = jax.numpy.concatenate([before[0, -1:], x[row]])
        log_probs, ranks, _, _ = score_in_pieces(graphdef, state, row_x, ids[shared - 1 :], 1)
        model_file.check_tokens(ranks)
        found.append(log_probs.astype(np.float64))  # for the sums
    return found


def repeat_row(x, times: int):
    """An array of a KV cache of one row [1, ...], for as many rows. A single number stays."""
    return jax.numpy.repeat(x, times, axis=0) if x.ndim > 1 else x


def score_table(record: dict) -> str:
    """A table with a line for each token of a text, and a line with its perplexity."""
    lines = [f"{'id':>7}{'log-probability':>17}{'probability':>13}{'rank':>7}  token"]
    columns = [record["ids"], record["log_probs"], record["ranks"], record["tokens"]]
    for id, log_prob, rank, token in zip(*columns, strict=True):
        score = f"{'-':>17}{'-':>13}{'-':>7}"
        if log_prob is not None:
            score = f"{log_prob:>17.4f}{math.exp(log_prob):>13.3g}{rank:>7}"
        lines.append(f"{id:>7}{score}  {quoted(token)}")

    end = (
        f"{record['scored_tokens']} scored: mean log-probability {record['mean_log_prob']:.4f}, "
        f"perplexity {record['perplexity']:.4f}"
    )
    if record["bits_per_byte"] is not None:
        end += f", {record['bits_per_byte']:.4f} bits per byte"
    return "\n".join([*lines, end])


def choices_table(record: dict) -> str:
    """A table with a line for each continuation of a prompt, the likeliest first."""
    lines = [
        f"after {quoted(record['prompt'])}:",
        f"{'log-probability':>15}{'per token':>11}{'tokens':>8}  continuation",
    ]
    for choice in record["choices"]:
        lines.append(
            f"{choice['log_prob']:>15.4f}{choice['mean_log_prob']:>11.4f}"
            f"{len(choice['ids']):>8}  {quoted(choice['choice'])}"
        )
    return "\n".join(lines)


def quoted(text: str) -> str:
    """A text on one line, with its blanks visible."""
    return json.dumps(text, ensure_ascii=not is_utf8())


# ------------------------------------------- Attention --------------------------------------------

PICTURE_TOKENS = 512  # the longest text that has room in a picture
# What stands for the characters that cannot be seen: \u240d for a carriage return, for example.
SHOWN = {code: chr(0x2400 + code) for code in range(32)} | str.maketrans("\n\t ", "↵⇥·")


def draw_attention(model_file, model, tokenizer, prompts: list[str], args):
    """Draws what each token of the prompt attends to, into the file of --attention.

    A .npz holds the numbers instead: `weights` [layers, H, T, T], `ids` and `tokens` [T].
    """
    [prompt] = prompts
    ids = tokenizer.encode(prompt)
    file = args.attention
    kind = file.suffix.lower()
    if kind != ".npz" and len(ids) > PICTURE_TOKENS:
        fail(
            f"{len(ids)} tokens: a picture has room for {PICTURE_TOKENS}; give a shorter prompt, "
            "or an --attention that ends in .npz, for the numbers alone"
        )

    weights = attention_weights(model_file, model, ids)
    labels = token_labels(tokenizer, ids)
    failure = f"--attention {file} cannot be written: {{}}"
    with explained(OSError, failure), replacement(file) as stream:
        if kind == ".npz":
            np.savez_compressed(stream, weights=weights, ids=np.array(ids), tokens=np.array(labels))
        elif kind == ".html":
            stream.write(attention_page(weights, labels).encode("utf-8"))
        else:
            save_picture(attention_picture(weights, labels), stream)
    layers, heads = weights.shape[:2]
    print(f"{file}: {layers} layers of {heads} heads, {len(ids)} tokens", file=sys.stderr)


@contextlib.contextmanager
def replacement(file: Path):
    """A stream to write a new file to, which takes the place of an older one when it is whole."""
    part = file.with_name(f"{file.name}.part")
    try:
        with open(part, "wb") as stream:
            yield stream
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def attention_weights(model_file, model, ids: list[int]) -> np.ndarray:
    """What each of T tokens attends to in each layer and head: [layers, H, T, T], in float32.

    [layer, head, i, j] is the weight of token j for token i. Those for one i add up to 1.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, tokens):
        with watched_attention(model_file) as seen:
            nnx.merge(graphdef, state).hidden(tokens)
        return jax.numpy.stack(seen)[:, 0]

    return np.asarray(run(state, np.array([ids])))


@contextlib.contextmanager
def watched_attention(model_file):
    """Within it, each call of the model file's `attend` appends its weights to a list.

    Each layer calls the one `attend` of its file, so that nothing but that function is replaced,
    and only for a while.
    """
    attend = model_file.attend
    seen = []

    def watched(q, k, v, *positions, **options):
        seen.append(weights_of(attend, q, k, *positions, **options))
        return attend(q, k, v, *positions, **options)

    model_file.attend = watched
    try:
        yield seen
    finally:
        model_file.attend = attend


def weights_of(attend, q, k, *positions, **options):
    """The weights of a call of `attend`, whatever its mask, window or soft-cap: [B, H, T, S].

    q [B, T, H, Dh], k [B, S, K, Dh]. What `attend` returns is a weighted mean of the values. If
    the values are the rows of an identity matrix, it is the weights themselves. A value has Dh
    numbers, so the weights of Dh keys are read at a time.
    """
    S, Dh = k.shape[1], k.shape[3]

    def columns_from(begin):
        rows = jax.numpy.arange(S) - begin
        identity = jax.nn.one_hot(rows, Dh, dtype="float32")  # row begin + i has its 1 in column i
        values = jax.numpy.broadcast_to(identity[:, None], k.shape)
        return attend(q, k, values, *positions, **options)

    # A loop on the device: written out, it would take XLA a minute to compile for a long text.
    columns = jax.lax.map(columns_from, jax.numpy.arange(0, S, Dh))  # [pieces, B, T, H, Dh]
    weights = jax.numpy.concatenate(columns, axis=-1)[..., :S]
    return weights.swapaxes(1, 2)


def token_labels(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, with its blanks visible."""
    return [text.translate(SHOWN) for text in token_texts(tokenizer, ids)]


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token. One without a text of its own has its name in the vocabulary.

    Decoded with the tokens before it, as its text may depend on them. Where a character has several
    tokens, the last one has its text, and the others are "�".
    """
    texts = []
    for i, token in enumerate(ids):
        begin = max(0, i - 8)  # more than the tokens of a character
        before = tokenizer.decode(ids[begin:i]).rstrip("\ufffd")
        text = tokenizer.decode(ids[begin : i + 1])[len(before) :]
        if text.endswith("\ufffd"):  # a part of a character
            text = "\ufffd"
        if not text:  # a special token
            text = tokenizer.backend.id_to_token(token) or str(token)
        texts.append(text)
    return texts


def attention_page(weights, labels: list[str]) -> str:
    """The picture as a web page, in one file that needs no network; hovering shows a weight.

    No token sees a later one, so the page has only the rows' beginnings, up to the diagonal.
    """
    layers, heads, T, _ = weights.shape
    rows, columns = np.tril_indices(T)
    numbers = np.ceil(weights[:, :, rows, columns] * 65535)  # 0 only where a token is hidden
    data = {
        "tokens": labels,
        "layers": layers,
        "heads": heads,
        "weights": base64.b64encode(numbers.astype("<u2").tobytes()).decode("ascii"),
    }
    # In a script, "</script" would end it, and "<!--" may hide its end.
    text = json.dumps(data).replace("<", "\\u003c")
    template = (HERE / "docs" / "attention.html").read_text(encoding="utf-8")
    return template.replace('{"tokens": []}', text)


def attention_picture(weights, labels: list[str]):
    """A figure with a map for each layer and head. Tokens attend along rows, to columns."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    layers, heads, T, _ = weights.shape
    colours = ScalarMappable(PowerNorm(0.5, 0, 1), "Blues")  # the root, so that small ones show
    maps = colours.to_rgba(weights, bytes=True)  # [layers, H, T, T, RGBA]
    maps[weights == 0] = (230, 230, 235, 255)  # hidden by the mask
    gap = 1 + T // 12
    step = T + gap

    # A map has room for all labels, unless there are so many heads that the picture would be wide.
    per_label = 0.13  # inches
    side = min(max(1.2, per_label * T), max(1.2, 40 / heads))
    font = max(10, 3 * side)  # of the names, in points: they grow with the maps
    size = (side * heads + 0.2 * font, side * layers + 0.15 * font)
    figure = Figure(size, layout="constrained", dpi=min(110, 6000 / max(size)))

    axes = figure.subplots()
    axes.imshow(tiled(maps, gap), interpolation="nearest")
    for edge in axes.spines.values():
        edge.set_visible(False)
    ticks = np.arange(0, T, math.ceil(per_label * T / side))
    shown = [labels[i] for i in ticks]
    style = {"fontsize": 7, "parse_math": False}
    axes.set_xticks(np.add.outer(step * np.arange(heads), ticks).ravel())
    axes.set_xticklabels(shown * heads, rotation=90, **style)
    axes.set_yticks(np.add.outer(step * np.arange(layers), ticks).ravel())
    axes.set_yticklabels(shown * layers, **style)

    name_maps(axes, layers, heads, T, gap, font)
    bar = {"ticks": [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1], "shrink": min(1, 4 / size[1])}
    bar = figure.colorbar(colours, ax=axes, **bar)
    bar.set_label("attention weight", fontsize=font)
    bar.ax.tick_params(labelsize=font)
    return figure


def name_maps(axes, layers: int, heads: int, T: int, gap: int, font: float):
    """Writes the number of each head over its column, and that of each layer beside its row."""
    step = T + gap
    middle = (T - 1) / 2
    for head in range(heads):
        style = {"ha": "center", "va": "bottom", "fontsize": font}
        axes.text(step * head + middle, -0.5 - gap / 2, f"head {head}", **style)
    for layer in range(layers):
        style = {"ha": "left", "va": "center", "rotation": 270, "fontsize": font}
        axes.text(step * heads - 0.5, step * layer + middle, f"layer {layer}", **style)
    axes.set_xlabel("the token that is attended to (key)", fontsize=font)
    axes.set_ylabel("the token that attends (query)", fontsize=font)


def tiled(maps, gap: int) -> np.ndarray:
    """All maps in one image, with white gaps: a panel for each of many heads would take minutes.

    maps [layers, H, T, T, RGBA] -> [height, width, RGBA]
    """
    layers, heads, T = maps.shape[:3]
    step = T + gap
    image = np.full((layers, step, heads, step, 4), 255, dtype="uint8")
    image[:, :T, :, :T] = maps.transpose(0, 2, 1, 3, 4)
    return image.reshape(layers * step, heads * step, 4)[:-gap, :-gap]


def save_picture(figure, file):
    """Writes a figure to a path or a stream, and says so where its font lacks characters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.2)
    if any("missing from font" in str(warning.message) for warning in caught):
        print("the picture's font lacks some characters: a .html shows them", file=sys.stderr)


# ----------------------------- The server: one thread owns the model ------------------------------

MOST_ROWS = 8  # texts in one batch, at most
GATHERING = 0.02  # seconds to wait for another row of the next batch
KEPT_PROGRAMS = 8  # values of top_k whose programs are kept


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, under the names of the command line. The rows of a batch share it."""

    temperature: float
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float

    # A server streams, and writes neither a profile nor JSON lines.
    profile = None
    no_stream = False
    json = False


@dataclass(eq=False)
class Choice:
    """A text that is generated for a request: one of its choices."""

    call: "Call"
    index: int  # of the choice
    text: Text
    number: int  # among the choices of the same prompt
    limit: int  # new tokens, at most
    every: float  # new tokens after which a part is sent
    shown: int = 0  # tokens that were sent

    def is_wanted(self) -> bool:
        """Whether there is a reason to go on with it."""
        return self.text.reason is None and not self.call.dropped


class Engine:
    """Owns the model. Its one thread runs the rows that wait, as batches of the same sampling."""

    def __init__(self, model_file, model, mesh, tokenizer):
        self.model_file = model_file
        self.model = model
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.programs = {}  # by top_k, which is compiled into them
        self.memory = Memory()
        self.waiting = []  # rows
        self.lock = threading.Lock()
        self.thread = ThreadPoolExecutor(1, initializer=jax.set_mesh, initargs=[mesh])

    def submit(self, rows: list[Choice]):
        """Has rows generated; their parts are sent to their calls."""
        with self.lock:
            self.waiting += rows
        for _ in rows:  # as many batches at most: where rows share one, the rest find nothing to do
            self.thread.submit(self.run_next).add_done_callback(show_bug)

    def run_next(self):
        """Runs the row that waits longest, and those that can share its batch.

        Whatever goes wrong ends these rows, and not the server.
        """
        self.gather()
        rows = self.next_rows()
        problem = "a fault of the server; its terminal shows where"
        try:
            self.run(rows)
        except (self.model_file.InputError, jax.errors.JaxRuntimeError) as error:
            problem = str(error)
            print(f"a request failed: {problem}", file=sys.stderr, flush=True)
        finally:
            for row in rows:
                if row.is_wanted():
                    row.call.send(ApiError(500, problem))

    def gather(self):
        """Waits while more rows come: requests that are sent together arrive one by one."""
        count = 0
        while count < len(self.waiting) < MOST_ROWS:
            count = len(self.waiting)
            time.sleep(GATHERING)

    def next_rows(self) -> list[Choice]:
        """Takes the next batch from the rows that wait."""
        rows = []
        others = []
        with self.lock:
            for row in self.waiting:
                if not row.is_wanted():
                    continue
                if self.can_share([*rows, row]):
                    rows.append(row)
                else:
                    others.append(row)
            self.waiting = others
        return rows

    def can_share(self, rows: list[Choice]) -> bool:
        """Whether rows can be one batch: all go on up to the largest of their limits."""
        longest = max(len(row.text.prompt_ids) for row in rows)
        limit = max(row.limit for row in rows)
        fits = longest + limit <= self.model.config.max_position_embeddings
        return fits and len(rows) <= MOST_ROWS and len({row.call.sampling for row in rows}) == 1

    def run(self, rows: list[Choice]):
        """Generates rows until each has ended, or its client is gone."""
        for new in self.generate(rows):
            for row, tokens in zip(rows, new, strict=True):
                if row.is_wanted():
                    row.text.add(tokens, row.call.stop_ids, row.limit)
                    self.send_part(row)
            if not any(row.is_wanted() for row in rows):
                break

    def generate(self, rows: list[Choice]):
        """Yields the new tokens of rows as they come, each time [B, n]."""
        if not rows:
            return
        sampling = rows[0].call.sampling
        limit = max(row.limit for row in rows)

        # A conversation that runs alone finds the KV cache of its earlier messages.
        if len(rows) == 1 and rows[0].call.is_chat and rows[0].number == 0:
            yield from self.generate_chat(rows[0], limit)
            return

        # Few numbers of rows and few lengths, so few programs. Short texts fill up the batch, each
        # of another length, as `place` computes equal ones once.
        missing = 2 ** (len(rows) - 1).bit_length() - len(rows)
        prompts = [row.text.prompt_ids for row in rows]
        keys = [jax.random.fold_in(random_key(row.call.seed), row.number) for row in rows]
        for length in range(1, missing + 1):
            prompts.append([0] * length)
            keys.append(keys[0])
        tokens, _, _ = self.model_file.batch_prompts(self.model.config, prompts, 1)
        T = tokens.shape[1]
        size = 2 ** (T + limit - 1).bit_length() - T

        timing = Timing()
        programs = self.programs_of(sampling.top_k, timing)
        batch = place(self.model_file, self.model, self.mesh, prompts, keys, size)
        for new in fill_context(self.model_file, programs, batch, limit, timing, sampling):
            yield new[: len(rows)]

    def generate_chat(self, row: Choice, limit: int):
        """The same for the only row of a chat."""
        args = argparse.Namespace(**vars(row.call.sampling), seed=row.call.seed)
        ids = row.text.prompt_ids
        try:
            for token in answer(self.model_file, self.model, self.memory, ids, limit, 0, args):
                yield token[None]
        except Exception:
            self.memory = Memory()  # its cache may have been donated to the step that failed
            raise

    def programs_of(self, top_k: int | None, timing):
        """The programs for a top_k, which keep what they have compiled."""
        if top_k not in self.programs:
            if len(self.programs) == KEPT_PROGRAMS:
                self.programs.clear()
            self.programs[top_k] = Programs(self.model, self.mesh, top_k, timing)
        self.programs[top_k].timing = timing
        return self.programs[top_k]

    def send_part(self, row: Choice):
        """Sends what is new of a row to its call, once it is enough."""
        text = row.text
        if text.reason is None and len(text.ids) - row.shown < row.every:
            return

        logprobs = []
        shown = len(text.ids)
        if row.call.top is not None:
            shown = self.count_shown(row)
            logprobs = self.logprobs(row, shown)
        row.shown = shown
        shown_text = text.completion
        if row.call.is_chat:
            shown_text = shown_text.lstrip()  # some templates leave a blank to the model
        row.call.send(Part(row.index, shown_text, text.reason, len(text.ids), logprobs))

    def count_shown(self, row: Choice) -> int:
        """How many of a row's tokens are in the text so far: not those held back, or cut off."""
        text = row.text
        end = len(text.completion)
        for count in range(row.shown, len(text.ids)):
            begins, ends = self.offset(text, count), self.offset(text, count + 1)
            cut = ends > end
            if text.reason is not None:
                cut = cut and begins >= end  # the last token may be cut within
            if cut:
                return count
        return len(text.ids)

    def offset(self, text: Text, count: int) -> int:
        """Where the token after `count` new ones begins in the completion."""
        return len(self.tokenizer.decode(text.prompt_ids + text.ids[:count])) - text.begin

    def logprobs(self, row: Choice, end: int) -> list["Logprob"]:
        """The log-probabilities of new tokens that were not sent yet, up to number `end`.

        They are the model's: before the temperature, and before any token is left out.
        """
        text = row.text
        ids = text.prompt_ids + text.ids[:end]
        begin = len(text.prompt_ids) + row.shown
        if begin == len(ids):
            return []
        own, _, best, best_ids = self.score(ids, begin)

        found = []
        for i in range(begin, len(ids)):
            before = ids[i - 1]
            top = []
            for other, logprob in zip(best_ids[i - begin], best[i - begin], strict=True):
                top.append((piece_of(self.tokenizer, before, int(other)), float(logprob)))
            piece = piece_of(self.tokenizer, before, ids[i])
            offset = self.offset(text, i - len(text.prompt_ids))
            found.append(Logprob(piece, float(own[i - begin]), top[: row.call.top], offset))
        return found

    def score(self, ids: list[int], begin: int) -> list:
        """The scores of ids[begin:], and of the likeliest tokens in their places.

        One forward pass, without cache.
        """
        config = self.model.config
        graphdef, state = nnx.split(self.model)

        # Padded on the right, where no token sees it: few lengths, so few programs.
        T = min(config.max_position_embeddings, max(64, 2 ** (len(ids) - 1).bit_length()))
        x, _ = run_hidden(graphdef, state, np.array([ids + [0] * (T - len(ids))]))
        top = min(TOP_LOGPROBS, config.vocab_size)
        return score_in_pieces(graphdef, state, x[0], ids, begin, top)


def show_bug(done):
    """Shows the exception of a task that should have none."""
    if done.exception() is not None:
        traceback.print_exception(done.exception())


TOP_LOGPROBS = 20  # alternatives to a token, at most


def piece_of(tokenizer, before: int, token: int) -> str:
    """The text of a token after another one. One without a text has its name in the vocabulary."""
    text = tokenizer.decode([before, token])
    text = text[len(tokenizer.decode([before])) :]
    if not text or "\ufffd" in text:  # a special token, or a part of a character
        text = tokenizer.backend.id_to_token(token) or str(token)
    return text


# ------------------------------- The server: requests and responses -------------------------------

MOST_BYTES = 2**20  # of a request
MOST_SECONDS = 20  # for a request to arrive
MOST_CHOICES = 128  # of a request
MOST_WAITING = 512  # texts
MOST_STOPS = 16  # stop strings
MOST_STOP = 200  # characters of each
COMPLETION = 16  # new tokens of /v1/completions, where max_tokens is not given

# The numbers that a request may have: the lowest, the highest, and whether they are whole.
NUMBERS = {
    "temperature": (0, 100, False),
    "top_p": (1e-6, 1, False),
    "top_k": (1, 2**31 - 1, True),
    "min_p": (0, 1, False),
    "repetition_penalty": (0.01, 100, False),
    "max_tokens": (1, 2**31 - 1, True),
    "max_completion_tokens": (1, 2**31 - 1, True),
    "n": (1, MOST_CHOICES, True),
    "seed": (-(2**63), 2**63 - 1, True),
    "top_logprobs": (0, TOP_LOGPROBS, True),
    "logprobs": (0, TOP_LOGPROBS, True),  # of /v1/completions; a chat has true or false
}
# What the protocol has and this server has not: only the values that change nothing are taken.
NEUTRAL = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "user": None,  # anything
    "metadata": None,
    "store": None,
    "service_tier": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
}
FIELDS = {"model", "messages", "prompt", "stop", "stream", "stream_options", *NUMBERS, *NEUTRAL}


class ApiError(Exception):
    """A request that gets no answer: an HTTP status, a message, and which field is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code=None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def record(self) -> dict:
        """The error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Logprob:
    """A token and its log-probability, and those of others in its place."""

    token: str
    logprob: float
    top: list  # of (token, log-probability), the likeliest first
    offset: int  # in the text of the choice

    def record(self) -> dict:
        """As a chat has it."""
        top = [{"token": token, "logprob": x, "bytes": bytes_of(token)} for token, x in self.top]
        own = {"token": self.token, "logprob": self.logprob, "bytes": bytes_of(self.token)}
        return {**own, "top_logprobs": top}


def bytes_of(text: str) -> list[int]:
    """The bytes of a text, as OpenAI's protocol has them beside it."""
    return list(text.encode("utf-8"))


@dataclass(frozen=True)
class Part:
    """What the engine's thread says of a row."""

    index: int
    text: str  # the completion so far
    reason: str | None  # why it has ended; None: it goes on
    tokens: int  # new ones so far
    logprobs: list  # of the tokens since the last part


class Call:
    """A request for texts: what it asks for, and the parts that come from the engine."""

    def __init__(self, service, body: dict, is_chat: bool, loop):
        self.is_chat = is_chat
        self.loop = loop
        self.parts = asyncio.Queue()
        self.dropped = False  # whether the client is gone
        self.id = ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(16)
        self.created = int(time.time())
        self.model = service.name

        check_fields_of(body, service, is_chat)
        self.stream = read_switch(body, "stream")
        self.counts = read_switch(read_field(body, "stream_options", dict, {}), "include_usage")
        self.sampling = read_sampling(body)
        self.seed = read_number(body, "seed", secrets.randbits(63)) % 2**63
        self.top = read_logprobs(body, is_chat)
        stops = read_stops(body)
        codec = service.chat_codec if is_chat else service.codec
        self.stop_ids = service.stop_ids + special_ids(codec, stops)

        # Logprobs cost a forward pass each time.
        every = 1 if self.top is None else 32
        if not self.stream:
            every = math.inf
        config = service.engine.model.config
        prompts = read_messages(body) if is_chat else read_prompts_of(body)
        n = read_number(body, "n", 1)
        if len(prompts) * n > MOST_CHOICES:
            raise ApiError(400, f"{MOST_CHOICES} choices at most in one request", "n")
        self.rows = []
        for prompt in prompts:
            ids = encode_prompt(codec, prompt, config)
            limit = min(read_limit(body, is_chat), config.max_position_embeddings - len(ids))
            for number in range(n):
                text = Text(codec, prompt, stops, ids)
                self.rows.append(Choice(self, len(self.rows), text, number, limit, every))

    def send(self, part):
        """Hands over a Part, or an ApiError; called by the engine's thread."""
        self.loop.call_soon_threadsafe(self.parts.put_nowait, part)

    def drop(self):
        """Has the engine stop, as nobody waits any more."""
        self.dropped = True
        self.parts.put_nowait(ApiError(499, "the client is gone"))

    async def arriving(self):
        """Yields the parts of all rows, up to the last part of each. ApiError: it fails."""
        running = len(self.rows)
        while running > 0:
            part = await self.parts.get()
            if isinstance(part, ApiError):
                raise part
            if part.reason is not None:
                running -= 1
            yield part

    def usage(self, last: dict) -> dict:
        """The counts of tokens. last: index -> the last part of each row."""
        prompts = sum(len(row.text.prompt_ids) for row in self.rows if row.number == 0)
        new = sum(part.tokens for part in last.values())
        return {
            "prompt_tokens": prompts,
            "completion_tokens": new,
            "total_tokens": prompts + new,
        }

    def head(self, chunk: bool) -> dict:
        """What each response begins with. chunk: whether it is a part of a stream."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def logprobs(self, found: list[Logprob]) -> dict | None:
        """Logprobs in the form of the protocol; None if they were not asked for."""
        if self.top is None:
            return None
        if self.is_chat:
            return {"content": [logprob.record() for logprob in found]}
        return {
            "tokens": [logprob.token for logprob in found],
            "token_logprobs": [logprob.logprob for logprob in found],
            "top_logprobs": [dict(logprob.top) for logprob in found] if self.top > 0 else None,
            "text_offset": [logprob.offset for logprob in found],
        }

    async def whole(self) -> dict:
        """The response that is not streamed."""
        last = {}
        async for part in self.arriving():
            last[part.index] = part

        choices = []
        for index, part in sorted(last.items()):
            choice = {"index": index, "finish_reason": part.reason}
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": part.text}
            else:
                choice["text"] = part.text
            choice["logprobs"] = self.logprobs(part.logprobs)
            choices.append(choice)
        return {**self.head(chunk=False), "choices": choices, "usage": self.usage(last)}

    async def chunks(self):
        """Yields the responses of a stream, each the JSON of a server-sent event."""
        last = {}
        try:
            async for part in self.arriving():
                first = part.index not in last
                sent = "" if first else last[part.index].text
                last[part.index] = part
                choice = self.choice(part, part.text[len(sent) :], first)
                yield {**self.head(chunk=True), "choices": [choice]}
        except ApiError as error:
            yield error.record()
            return
        if self.counts:
            yield {**self.head(chunk=True), "choices": [], "usage": self.usage(last)}

    def choice(self, part: Part, new: str, first: bool) -> dict:
        """A choice as a part of a stream has it. new: its new text."""
        choice = {"index": part.index, "finish_reason": part.reason}
        if self.is_chat:
            choice["delta"] = {"content": new}
            if first:
                choice["delta"]["role"] = "assistant"
        else:
            choice["text"] = new
        choice["logprobs"] = self.logprobs(part.logprobs)
        return choice


def check_fields_of(body: dict, service, is_chat: bool):
    """ApiError: a field that is not known, or a value of it that would be ignored."""
    if body.get("model") is None:
        raise ApiError(400, f"name the model: {service.name}", "model")
    if body["model"] != service.name:
        message = f"there is no model {body['model']!r:.100} here, only {service.name}"
        raise ApiError(404, message, "model", "model_not_found")
    for name, value in body.items():
        if name not in FIELDS or name == ("prompt" if is_chat else "messages"):
            raise ApiError(400, f"{name[:100]!r} is not a field of this protocol", name[:100])
        neutral = NEUTRAL.get(name)
        if neutral is not None and value is not None and value not in neutral:
            raise ApiError(400, f"{name} is not supported: leave it out", name)


def read_field(body: dict, name: str, kind, default):
    """A field of a type; the default where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        wanted = "true or false" if kind is bool else "an object"
        raise ApiError(400, f"{name} must be {wanted}", name)
    return value


def read_switch(body: dict, name: str) -> bool:
    return read_field(body, name, bool, False)


def read_number(body: dict, name: str, default):
    """A number within its bounds, which NUMBERS has."""
    value = body.get(name)
    if value is None:
        return default
    lowest, highest, whole = NUMBERS[name]
    kinds = int if whole else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and lowest <= value <= highest
    if not fits:
        kind = "a whole number" if whole else "a number"
        raise ApiError(400, f"{name} must be {kind} from {lowest} to {highest}", name)
    return value


def read_sampling(body: dict) -> Sampling:
    """How tokens are drawn. Values that change nothing are off, so that requests share batches."""
    top_p = read_number(body, "top_p", None)
    min_p = read_number(body, "min_p", None)
    return Sampling(
        temperature=float(read_number(body, "temperature", 1)),
        top_p=None if top_p == 1 else top_p,
        top_k=read_number(body, "top_k", None),
        min_p=None if min_p == 0 else min_p,
        repetition_penalty=float(read_number(body, "repetition_penalty", 1)),
    )


def read_logprobs(body: dict, is_chat: bool) -> int | None:
    """How many alternatives to send with each token; None: no logprobs."""
    if is_chat:
        wanted = read_switch(body, "logprobs")
        top = read_number(body, "top_logprobs", 0)
        if top > 0 and not wanted:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return top if wanted else None
    if "top_logprobs" in body:
        raise ApiError(400, "here logprobs is the number of alternatives", "top_logprobs")
    return read_number(body, "logprobs", None)


def read_stops(body: dict) -> list[str]:
    """The stop strings: of one, of a list, or of nothing."""
    stops = body.get("stop")
    if stops is None:
        return []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise ApiError(400, f"stop must be a text, or a list of {MOST_STOPS} at most", "stop")
    for stop in stops:
        check_text(stop, "stop")
        if not 0 < len(stop) <= MOST_STOP:
            raise ApiError(400, f"a stop string has 1 to {MOST_STOP} characters", "stop")
    return stops


def check_text(text, name: str):
    """ApiError: it is no text, or one that no UTF-8 stands for."""
    if not isinstance(text, str):
        raise ApiError(400, f"{name} must be a text", name)
    if re.search("[\ud800-\udfff]", text):
        raise ApiError(400, f"{name} has half of a character (a surrogate)", name)


def read_prompts_of(body: dict) -> list:
    """The prompts of /v1/completions: texts, or lists of token ids."""
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if prompts and all(isinstance(token, int) for token in prompts):
        prompts = [prompts]
    if not 0 < len(prompts) <= MOST_CHOICES:
        raise ApiError(400, f"prompt must be 1 to {MOST_CHOICES} texts", "prompt")
    for prompt in prompts:
        if not isinstance(prompt, list):
            check_text(prompt, "prompt")
    return prompts


def read_messages(body: dict) -> list[list[dict]]:
    """The messages of a chat, as the only prompt, in the form that chat templates take."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages must be a list of at least one", "messages")
    messages = []
    for message in given:
        if not isinstance(message, dict):
            raise ApiError(400, "a message must be an object", "messages")
        role = message.get("role")
        if role == "developer":
            role = "system"  # its name in models before o1
        if role not in ("system", "user", "assistant"):
            raise ApiError(400, "a role must be system, user or assistant", "messages")
        messages.append({"role": role, "content": read_content(message.get("content"))})
    return [messages]


def read_content(content) -> str:
    """The text of a message, which may be given in parts."""
    parts = content
    if not isinstance(content, list):
        parts = [{"type": "text", "text": content}]
    text = ""
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise ApiError(400, "a content must be a text, or parts of type text", "messages")
        check_text(part["text"], "messages")
        text += part["text"]
    return text


def encode_prompt(codec, prompt, config) -> list[int]:
    """The token ids of a prompt, which may be such ids. ApiError: they cannot be continued."""
    ids = prompt
    if isinstance(codec, ChatTokenizer):
        try:
            ids = codec.encode_messages(prompt)
        except ChatError as error:
            raise ApiError(400, str(error), "messages") from error
    elif isinstance(prompt, str):
        ids = codec.encode(prompt)

    context = config.max_position_embeddings
    if not ids:
        raise ApiError(400, "the prompt has no tokens", "prompt")
    if not all(type(token) is int and 0 <= token < config.vocab_size for token in ids):
        raise ApiError(400, f"a token id must be from 0 to {config.vocab_size - 1}", "prompt")
    if len(ids) >= context:
        message = f"{len(ids)} tokens leave no room in the context length of {context}"
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    return ids


def read_limit(body: dict, is_chat: bool) -> int:
    """The most new tokens of a text. The context length may end it before that."""
    limit = read_number(body, "max_tokens", ANSWER if is_chat else COMPLETION)
    return read_number(body, "max_completion_tokens", limit)


def parse_body(data: bytes) -> dict:
    """The object of a request's JSON."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


async def read_body(request) -> bytes:
    """The body of a request, within the limits of its size and time."""
    from starlette.requests import ClientDisconnect

    data = bytearray()
    try:
        async with asyncio.timeout(MOST_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise ApiError(413, f"a request has {MOST_BYTES:,} bytes at most")
    except TimeoutError:
        raise ApiError(408, f"the request took longer than {MOST_SECONDS} s") from None
    except ClientDisconnect:
        raise ApiError(499, "the client is gone") from None
    return bytes(data)


# --------------------------------- The server: addresses and page ---------------------------------

KEPT_ANSWERS = 64  # whose attention can be looked at
PICTURE_BYTES = 24e6  # of the weights on a page of attention


def serve(model_file, model, mesh, folder, tokenizer, stop_ids, listener, args):
    """Serves the page and OpenAI's protocol, until Ctrl-C."""
    import uvicorn

    engine = Engine(model_file, model, mesh, tokenizer)
    chat_codec = None
    codec_folder = model_file.tokenizer_folder(folder)
    if args.chat or has_chat_template(model_file, codec_folder):
        chat_codec = ChatTokenizer(tokenizer.backend, codec_folder, None, think=not args.no_think)
    service = Service(engine, tokenizer, chat_codec, stop_ids, args)

    config = uvicorn.Config(
        Gate(make_app(service), args.api_key, args.host),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=512,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    kind = "chat" if chat_codec else "plain completion, as there is no chat template"
    print(
        f"{service.name} on {service.device}: {kind}\n"
        f"the page:          http://{shown}:{port}\n"
        f"OpenAI's protocol: http://{shown}:{port}/v1\n"
        "The first answers are slower, as programs are compiled; Ctrl-C stops the server",
        file=sys.stderr,
        flush=True,
    )
    # In a thread, so that Ctrl-C reaches this one, and ends all at once.
    sockets = {"sockets": [listener]}
    server = threading.Thread(target=uvicorn.Server(config).run, kwargs=sockets, daemon=True)
    server.start()
    server.join()


def has_chat_template(model_file, folder: Path) -> bool:
    """Whether a checkpoint was tuned to answer, as far as its files say."""
    if model_file.is_gguf(folder):
        return bool(model_file.gguf_chat_settings(folder)["chat_template"])
    settings = model_file.read_json_if_any(folder / "tokenizer_config.json")
    return any(folder.glob("chat_template*")) or bool(settings.get("chat_template"))


def open_listener(host: str, port: int):
    """The socket that the server listens on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    advice = "stop what uses the port or give another, or an address of this machine as --host"
    refused = (OSError, TypeError)  # TypeError: no host can have such a name
    with explained(refused, f"--host {host} --port {port}: {{}}; {advice}"):
        return socket.create_server((host, port), family=family, backlog=256)


class Service:
    """What the addresses of the server answer."""

    def __init__(self, engine: Engine, codec, chat_codec, stop_ids, args):
        model = engine.model
        self.engine = engine
        self.codec = codec
        self.chat_codec = chat_codec  # None: the model was not tuned to answer
        self.stop_ids = stop_ids
        self.name = args.weights or next(iter(engine.model_file.PRESETS))
        if self.name == "tiny":
            self.name = f"tiny/{engine.model_file.__name__}"
        if self.name == str(INSTRUCT):
            self.name = f"tiny/{INSTRUCT.name}"
        self.created = int(time.time())
        device = engine.mesh.devices.flat[0].device_kind
        self.device = f"{device}, {precision(engine.model_file, model)}"
        self.answers = {}  # id of a response -> token ids of its first choice

        cache = partial(engine.model_file.init_cache, model.config, 1, 1, model.cache_dtype)
        maps = len(jax.eval_shape(cache).layers) * model.config.num_attention_heads
        self.picture_tokens = min(PICTURE_TOKENS, int((PICTURE_BYTES / 2 / maps) ** 0.5))
        self.html = self.fill_page(args)

    def fill_page(self, args) -> str:
        """The page, with what it has to know."""
        data = {
            "model": self.name,
            "device": self.device,
            "context": self.engine.model.config.max_position_embeddings,
            "chat": self.chat_codec is not None,
            "key": args.api_key is not None,
            "picture": self.picture_tokens,
            "system": args.system or "",
            "max_tokens": args.max_new_tokens or (ANSWER if self.chat_codec else CONTINUATION),
            "seed": args.seed or None,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty,
        }
        # In a script, "</script" would end it, and "<!--" may hide its end.
        text = json.dumps(data).replace("<", "\\u003c")
        template = (HERE / "docs" / "chat.html").read_text(encoding="utf-8")
        return template.replace('{"model": null}', text)

    async def page(self, request):
        return html_response(self.html)

    async def models(self, request):
        """The list of models, or the one of the path."""
        own = {"id": self.name, "object": "model", "created": self.created, "owned_by": "user"}
        name = request.path_params.get("name")
        if name is None:
            return json_response({"object": "list", "data": [own]})
        if name != self.name:
            raise ApiError(404, f"there is no model {name!r:.100} here", "model", "model_not_found")
        return json_response(own)

    async def chat(self, request):
        if self.chat_codec is None:
            raise ApiError(400, f"{self.name} has no chat template: use /v1/completions")
        return await self.respond(request, is_chat=True)

    async def completions(self, request):
        return await self.respond(request, is_chat=False)

    async def respond(self, request, is_chat: bool):
        """The response to a request for texts. Where its client goes away, generation stops."""
        body = parse_body(await read_body(request))
        if len(self.engine.waiting) > MOST_WAITING:
            raise ApiError(429, "too many requests are waiting: try again later")
        # In another thread, as long texts take their time to be cut into tokens.
        loop = asyncio.get_running_loop()
        call = await asyncio.to_thread(Call, self, body, is_chat, loop)
        self.keep_answer(call)
        self.engine.submit(call.rows)
        if call.stream:
            return EventStream(call)

        watch = asyncio.create_task(drop_when_gone(request, call))
        try:
            return json_response(await call.whole())
        finally:
            watch.cancel()

    def keep_answer(self, call: Call):
        """Keeps the last answers, for a picture of their attention."""
        self.answers[call.id] = call.rows[0].text
        if len(self.answers) > KEPT_ANSWERS:
            del self.answers[next(iter(self.answers))]

    async def attention(self, request):
        """The page of --attention for an answer. Its id is known only to who received it."""
        text = self.answers.get(request.path_params["id"])
        if text is None:
            raise ApiError(404, f"only the last {KEPT_ANSWERS} answers have a picture")
        ids = text.prompt_ids + text.ids
        if len(ids) > self.picture_tokens:
            most = self.picture_tokens
            raise ApiError(400, f"{len(ids)} tokens: a picture has room for {most}")
        drawn = self.engine.thread.submit(self.draw, ids)
        return html_response(await asyncio.wrap_future(drawn))

    def draw(self, ids: list[int]) -> str:
        """Runs in the engine's thread."""
        weights = attention_weights(self.engine.model_file, self.engine.model, ids)
        return attention_page(weights, token_labels(self.codec, ids))


class EventStream:
    """A response that is streamed as server-sent events. Where the client goes, the call ends."""

    def __init__(self, call: Call):
        self.call = call

    async def __call__(self, scope, receive, send):
        from starlette.responses import StreamingResponse

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        stream = StreamingResponse(self.lines(), media_type="text/event-stream", headers=headers)
        try:
            await stream(scope, receive, send)
        finally:
            self.call.dropped = True

    async def lines(self):
        async for chunk in self.call.chunks():
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"


async def drop_when_gone(request, call: Call):
    """Waits until the client of a request has gone, and drops its call."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    call.drop()


def json_response(value: dict, status: int = 200):
    from starlette.responses import Response

    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    # Of ASCII alone: the name of a field may hold half of a character, which is not UTF-8.
    return Response(json.dumps(value), status, headers, media_type="application/json")


def html_response(html: str):
    """A page that runs its own scripts and no others, and asks this server alone."""
    from starlette.responses import HTMLResponse

    hashes = []
    for script in re.findall(r"<script>(.*?)</script>", html, re.DOTALL):
        digest = hashlib.sha256(script.encode("utf-8")).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode('ascii')}'")
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(html, headers=headers)


def make_app(service: Service):
    """The addresses of the server. Every error has OpenAI's form."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    async def refuse(request, error):
        return json_response(error.record(), error.status)

    async def not_found(request, error):
        shown = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return json_response(ApiError(error.status_code, shown).record(), error.status_code)

    routes = [
        Route("/", service.page),
        Route("/attention/{id}", service.attention),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completions, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={ApiError: refuse, HTTPException: not_found})


class Gate:
    """Lets requests in: those with the key, or without a key those that no other site sent."""

    def __init__(self, app, key: str | None, host: str):
        self.app = app
        self.key = key
        self.host = host

    async def __call__(self, scope, receive, send):
        from starlette.datastructures import Headers

        headers = Headers(scope=scope)
        error = self.wrong_key(headers, scope["path"]) if self.key else self.wrong_site(headers)
        app = self.app
        if error is not None:
            app = json_response(error.record(), error.status)
        await app(scope, receive, send)

    def wrong_key(self, headers, path: str) -> ApiError | None:
        """Compared in constant time, so that the time of an answer says nothing of the key."""
        if not path.startswith("/v1/"):
            return None  # the page itself holds nothing that is secret
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.encode("utf-8"), self.key.encode("utf-8"))
        if is_right and scheme.lower() == "bearer":
            return None
        return ApiError(401, "a wrong API key, or none", code="invalid_api_key")

    def wrong_site(self, headers) -> ApiError | None:
        """Another site's page may send requests here, and may give its own name this address."""
        host = headers.get("host", "")
        name = host_in(f"//{host}")
        if not (is_address(name) or name in ("localhost", self.host.lower())):
            return ApiError(403, f"this server is not called {name[:100]!r}")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return ApiError(403, f"requests from {origin[:100]!r} are not answered")
        return None


def host_in(address: str) -> str:
    """The name of the host in an address, without its port; empty if it has none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether it is an IP address, and not a name that stands for one."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# ---------------- Errors and devices: the same in sample.py, train.py and bench.py ----------------

# model_type in a config.json -> the model file that reads it
KINDS = {
    "gpt2": "gpt2",
    "opt": "opt",
    "llama": "llama",
    "smollm3": "llama",
    "granite": "llama",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma3_text": "gemma",
    "mistral": "mistral",
    "mixtral": "mistral",
    "ministral": "mistral",
    "ministral3": "mistral",
    "mistral3": "mistral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen",
}
MODELS = [name for name in dict.fromkeys(KINDS.values()) if (HERE / f"{name}.py").exists()]

AXIS = r"(data|fsdp|tensor)(:[1-9]\d*)?"
PARALLEL = rf"no|auto|pmap|{AXIS}(,{AXIS})*"  # what --parallel takes


def fail(message) -> NoReturn:
    """Exits with code 2 after one line that says what is wrong and what to do."""
    one_line = " ".join(str(message).split())
    print(f"{Path(__file__).name}: {one_line}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def explained(errors, message: str):
    """Turns these exceptions into `fail(message)`; {} in the message is the exception's text."""
    try:
        yield
    except errors as error:
        fail(message.replace("{}", str(error)))


def run_program(main) -> NoReturn:
    """Runs `main` and exits with the code that it returns. What is no bug has no traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    if sys.stderr is None:  # it is closed, and `print` would take standard output instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.unraisablehook = hear_again
    try:
        try:
            code = main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:  # nobody reads on, as under `| head`
        code = 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"{Path(__file__).name}: {error}: make room", file=sys.stderr, flush=True)
        code = 2
    os._exit(code)  # at once: the usual clean-up can crash under a computation that still runs


def hear_again(lost):
    """Sends Ctrl-C again, a moment later, where its exception is lost; shows other lost exceptions.

    Python drops what a callback of the garbage collector raises, such as the one that JAX has.
    """
    if isinstance(lost.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(lost)


def not_empty(text: str) -> str:
    """A type of argparse: a shell variable that is not set would mean the default."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a folder or a Hub id, or leave it out")
    return text


def model_of(weights: str, revision: str | None = None) -> str:
    """The model file that reads a checkpoint, by its model_type."""
    any_file = importlib.import_module(MODELS[0])
    with explained(any_file.InputError, "{}"):
        folder = any_file.base_of(any_file.fetch(weights, revision, weights=False), weights=False)
        kind = any_file.read_kind(folder)
    if not isinstance(kind, str):
        fail(f"{folder} has no model_type: name --model, one of {', '.join(MODELS)}")
    if kind not in KINDS:
        fail(f"{weights} is of model_type {kind!r}; {', '.join(KINDS)} are supported")
    return KINDS[kind]


def check_family(model_file, folder: Path):
    """Exits where another model file than --model reads a checkpoint."""
    base = model_file.base_of(folder, weights=False)
    kind = str(model_file.read_kind(base))
    reader = KINDS.get(kind, model_file.__name__)
    if reader != model_file.__name__:
        fail(f"{folder} is a {kind!r}, which {reader}.py reads: --model {reader}")


def pick_devices(name: str | None, parallel: str) -> list:
    """The devices of --device: all of that kind, or one if it is numbered or --parallel is no.

    The first of them on this host becomes JAX's default.
    """
    if not re.fullmatch(r"((cpu|gpu|tpu)(:\d+)?)?", name or ""):
        fail(f"--device {name}: it must be cpu, gpu or tpu, or a numbered one such as gpu:1")
    kind, _, index = (name or "").partition(":")

    # Without this, JAX would start a GPU too and take its memory.
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")

    missing = f"--device {name}: JAX finds no such device; leave it out"
    with explained(RuntimeError, missing if name else "JAX finds no device: {}"):
        devices = jax.devices(kind or None)
    number = int(index or 0)
    if number >= len(devices):
        fail(f"--device {name}: there are {len(devices)}, counted from 0")
    if index or parallel == "no":
        devices = [devices[number]]

    own = next(device for device in devices if device.process_index == jax.process_index())
    jax.config.update("jax_default_device", own)
    return devices


def random_key(seed: int):
    """A random key for a seed; jax.random.key itself uses only the low 32 bits."""
    key = jax.random.key(seed % 2**32)
    if seed >= 2**32:
        key = jax.random.fold_in(key, seed // 2**32)
    return key


def memory_of(device) -> float:
    """The bytes that a device has; infinite where it does not say, as a CPU does not."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", math.inf)


def make_mesh(parallel: str, devices: list, heads: int) -> jax.sharding.Mesh:
    """Arranges the devices along the axes of --parallel, such as data:2,tensor:4.

    An axis without a number takes the devices that the others leave.
    """
    axes = {}
    for part in parallel.split(","):
        axis, _, number = part.partition(":")
        axes[axis] = int(number or 0)
    if list(axes.values()).count(0) > 1:
        fail(f"--parallel {parallel}: say how many along all axes but one, as in data:2,tensor")
    taken = math.prod(number for number in axes.values() if number > 0)
    for axis, number in axes.items():
        axes[axis] = number or len(devices) // taken

    count = math.prod(axes.values())
    if not 0 < count <= len(devices):
        needed = max(count, taken)
        fail(f"--parallel {parallel} needs {needed} devices, and there are {len(devices)}")
    if count < len(devices) and jax.process_count() > 1:
        fail(f"--parallel {parallel} leaves devices out: of several hosts all must take part")
    tensor = axes.get("tensor", 1)
    if heads % tensor != 0:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        fail(f"--parallel: {heads} heads split over tensor: {fits}, not over {tensor}")

    return jax.sharding.Mesh(np.reshape(devices[:count], [*axes.values()]), [*axes])


# ---------------------------------------- The command line ----------------------------------------


def parse_command_line() -> argparse.Namespace:
    """Reads the command line, and checks what can be checked without a model."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        usage="python sample.py [--model NAME] [--weights WEIGHTS] [options] [TEXT ...]",
    )
    parser.error = fail
    add_model_flags(parser)
    add_text_flags(parser)
    add_chat_flags(parser)
    add_sampling_flags(parser)
    add_machine_flags(parser)
    add_output_flags(parser)
    add_server_flags(parser)

    args = parser.parse_intermixed_args()  # texts may stand anywhere
    args.prompt += args.texts
    check_text_flags(args)
    check_sampling_flags(args)
    check_machine_flags(args)
    if args.attention is not None:
        check_attention_flags(args)
    if args.score or args.choices:
        check_score_flags(args)
    check_server_flags(args)
    args.prompt = [as_utf8(text, "--prompt") for text in args.prompt]
    args.stop = [as_utf8(text, "--stop") for text in args.stop]
    args.choices = [as_utf8(text, "--choices") for text in args.choices]
    if args.system is not None:
        args.system = as_utf8(args.system, "--system")
    if (args.chat or args.ui) and args.model is None and args.weights is None:
        args.model = "llama"
        args.weights = str(INSTRUCT)
    if args.model is None and args.weights in (None, "tiny"):
        args.model = "gpt2"
        args.weights = "tiny"
    return args


def add_model_flags(parser):
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, help="model file (default: as config.json says)")
    model.add_argument(
        "--weights",
        type=not_empty,
        metavar="WEIGHTS",
        help="'tiny' (bundled), a Hub id, a folder or a GGUF file (default: the first preset of "
        "--model; without --model a tiny GPT-2, and with --chat a tiny Llama that answers)",
    )
    model.add_argument("--revision", help="branch, tag or commit of a Hub id")
    model.add_argument(
        "--list", action="store_true", help="print the published checkpoints and stop"
    )


def add_text_flags(parser):
    text = parser.add_argument_group("text")
    text.add_argument(
        "texts", nargs="*", metavar="TEXT", help="a text to continue, as with --prompt"
    )
    text.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text to continue; may be repeated; - is standard input",
    )
    text.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file with a text to continue; may be repeated. Without any prompt, standard input "
        "is one if it is piped",
    )
    text.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="completions of each prompt (default: 1)",
    )
    text.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"length of a completion (default: {CONTINUATION}, or {ANSWER} with --chat)",
    )
    text.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop string: end before this text; may be repeated",
    )


def add_chat_flags(parser):
    chat = parser.add_argument_group("chat")
    chat.add_argument(
        "--chat",
        action="store_true",
        help="let a model that was tuned for it answer: prompts, or messages on the terminal "
        "(Ctrl-C stops an answer, Ctrl-D ends the conversation)",
    )
    chat.add_argument(
        "--system", metavar="TEXT", help="with --chat: the system message of the conversation"
    )
    chat.add_argument(
        "--no-think",
        action="store_true",
        help="with --chat: answer at once, where a model (Qwen3, SmolLM3) would think first",
    )


def add_sampling_flags(parser):
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="0: greedy, always the likeliest token (default: %(default)s)",
    )
    sampling.add_argument(
        "--top-k", type=int, metavar="N", help="draw only from the N likeliest tokens"
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="nucleus sampling: draw only from the likeliest tokens, of probability X together",
    )
    sampling.add_argument(
        "--min-p",
        type=float,
        metavar="X",
        help="draw only from tokens at least X times as likely as the likeliest",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that occurred become less likely (default: %(default)s)",
    )
    sampling.add_argument(
        "--seed", type=int, default=0, help="same seed, same text (default: %(default)s)"
    )


def add_machine_flags(parser):
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 on a CPU, else bfloat16",
    )
    machine.add_argument(
        "--quantize",
        choices=["int8", "int4"],
        help="hold the weights in 8 or 4 bits: less memory, and more tokens a second on a CPU",
    )
    machine.add_argument(
        "--cache-dtype",
        choices=["float32", "bfloat16", "float16", "int8"],
        help="of the KV cache (default: as --dtype); int8: a quarter of float32's memory",
    )
    machine.add_argument(
        "--device", metavar="DEVICE", help="cpu, gpu, tpu, or one of several as in gpu:1"
    )
    machine.add_argument(
        "--draft",
        type=not_empty,
        metavar="DRAFT",
        help="speculative decoding, the same text in less time: a draft guesses tokens, and the "
        "model checks several at once. 'ngram' looks them up in the text so far; a folder or Hub "
        "id is a smaller model with the same vocabulary",
    )
    machine.add_argument(
        "--parallel",
        default="auto",
        metavar="MODE",
        help="over several devices: pmap, data, fsdp, tensor, data:2,tensor:4 or no (default: "
        "data, or tensor if the weights do not fit one device)",
    )
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine.add_argument(
        "--compile-cache",
        default=caches / "jax-one-file-models",
        metavar="DIR",
        help="keeps compiled programs for the next run; or 'off' (default: %(default)s)",
    )


def add_output_flags(parser):
    output = parser.add_argument_group("output")
    output.add_argument(
        "--no-stream", action="store_true", help="print a text only when it is complete"
    )
    output.add_argument("--json", action="store_true", help="print a line of JSON for each text")
    output.add_argument(
        "--score",
        action="store_true",
        help="print how likely each token of the prompt is, and the prompt's perplexity, instead "
        "of continuing it",
    )
    output.add_argument(
        "--choices",
        action="append",
        default=[],
        metavar="TEXT",
        help="rank this continuation of the prompt by its log-probability; repeat it for each",
    )
    output.add_argument(
        "--attention",
        metavar="FILE",
        type=Path,
        help="draw what each token of the prompt attends to, by layer and head, instead of "
        "continuing it: a .png, a .html to explore, or the numbers as a .npz",
    )
    output.add_argument(
        "--profile", metavar="DIR", type=Path, help="write a trace of the generation into DIR"
    )


def add_server_flags(parser):
    server = parser.add_argument_group("server")
    server.add_argument(
        "--ui",
        action="store_true",
        help="serve a chat page and OpenAI's protocol (/v1). The sampling options given here are "
        "where the page begins",
    )
    server.add_argument(
        "--host", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)"
    )
    server.add_argument("--port", type=int, metavar="N", help="(default: 8000; 0: any free one)")
    server.add_argument("--api-key", metavar="KEY", help="answer only requests that have this key")
    server.add_argument(
        "--no-auth", action="store_true", help="serve other machines, too, without a key"
    )


def as_utf8(text: str, flag: str) -> str:
    """A text of the command line. Where the terminal is not of UTF-8, Python reads it as bytes."""
    if text.isascii():
        return text
    with explained(UnicodeError, f"{flag} must be UTF-8 text"):
        if re.search("[\ud800-\udfff]", text):
            text = os.fsencode(text).decode("utf-8")
    return text


def check_text_flags(args):
    if args.num_samples < 1:
        fail("--num-samples must be 1 or more")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        fail("--max-new-tokens must be 1 or more")
    if args.system is not None and not (args.chat or args.ui):
        fail("--system is for --chat and --ui")
    if args.no_think and not (args.chat or args.ui):
        fail("--no-think is for --chat and --ui")
    if "" in args.stop:
        fail("--stop must be a text; leave it out to go on to --max-new-tokens")


def check_sampling_flags(args):
    if not args.temperature >= 0:
        fail("--temperature must be 0 (the likeliest token) or more")
    if args.top_k is not None and args.top_k < 1:
        fail("--top-k must be 1 or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        fail("--top-p must be above 0 and at most 1")
    if args.min_p is not None and not 0 <= args.min_p <= 1:
        fail("--min-p must be from 0 to 1")
    if not args.repetition_penalty > 0:
        fail("--repetition-penalty must be above 0")
    if not 0 <= args.seed < 2**63:
        fail("--seed must be from 0 to 2^63 - 1")


def check_machine_flags(args):
    if not re.fullmatch(PARALLEL, args.parallel):
        fail("--parallel must be pmap, or like data, tensor:2 or data:2,tensor:4")
    continues = not (args.score or args.choices or args.attention is not None)
    if args.draft is not None and (args.ui or not continues):
        fail("--draft is for texts that are continued, and not for --ui: leave it out")
    with explained(OSError, "--profile cannot be read: {}"):
        if args.profile is not None and not is_writable(args.profile):
            fail("--profile must be a writable folder")


def check_attention_flags(args):
    if args.attention.suffix.lower() not in (".png", ".html", ".npz"):
        fail(f"--attention {args.attention}: its name must end in .png, .html or .npz")
    folder = args.attention.absolute().parent
    with explained(OSError, "--attention cannot be written: {}"):
        has_place = folder.is_dir() and is_writable(folder) and not args.attention.is_dir()
    if not has_place:
        fail(f"--attention {args.attention}: it must be a file in a folder that can be written to")
    if args.num_samples > 1 or args.max_new_tokens or args.stop or args.json or args.profile:
        fail(
            "--attention draws the prompt and does not continue it: leave --num-samples, "
            "--max-new-tokens, --stop, --json and --profile out"
        )


def check_score_flags(args):
    if args.score and args.choices:
        fail("--score and --choices are two things: leave one out")
    if "" in args.choices:
        fail("--choices must be a text")
    if args.num_samples > 1 or args.max_new_tokens or args.stop or args.profile:
        fail(
            "--score and --choices do not continue a prompt: leave --num-samples, "
            "--max-new-tokens, --stop and --profile out"
        )
    if args.chat or args.attention is not None:
        fail("--score and --choices go with neither --chat nor --attention: leave those out")


def check_server_flags(args):
    """Checks the options of --ui, and gives the address and the port their defaults."""
    own = {"--host": args.host, "--port": args.port, "--api-key": args.api_key}
    own["--no-auth"] = args.no_auth or None
    given = [flag for flag, value in own.items() if value is not None]
    if not args.ui and given:
        fail(f"{given[0]} is for --ui")
    if not args.ui:
        return

    if args.prompt or args.prompt_file or args.stop or args.json or args.no_stream:
        fail("--ui takes its texts from the page: leave --prompt, --stop and --json out")
    if args.num_samples > 1 or args.profile or args.attention is not None:
        fail("--ui serves texts: leave --num-samples, --profile and --attention out")
    if args.score or args.choices:
        fail("--ui serves texts: leave --score and --choices out")
    if re.match("pmap|data|fsdp", args.parallel):
        fail("--ui serves one batch at a time: leave all --parallel but tensor out")
    for package in ("starlette", "uvicorn"):
        if not find_spec(package):
            fail(f"--ui needs {package}: pip install starlette uvicorn")

    args.host = args.host or "127.0.0.1"
    args.port = 8000 if args.port is None else args.port
    if not 0 <= args.port < 2**16:
        fail("--port must be from 0 to 65535")
    if args.api_key is not None and not re.fullmatch(r"[!-~]+", args.api_key):
        fail("--api-key must be of ASCII letters, digits and signs, without spaces")
    is_local = args.host == "localhost" or (
        is_address(args.host) and ipaddress.ip_address(args.host).is_loopback
    )
    if not is_local and args.api_key is None and not args.no_auth:
        fail(f"--host {args.host} lets other machines in: add --api-key KEY, or --no-auth")


def is_writable(folder: Path) -> bool:
    """Whether files can be written in a folder, or where it is yet to be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


if __name__ == "__main__":
    run_program(main)
