"""Measures any of the model files: speed and memory, beside the machine's limits and beside others.

    python bench.py                                      # the bundled tiny GPT-2; no network
    python bench.py --model gpt2 --task prefill,decode,load,start --vs transformers,ctranslate2
    python bench.py --model llama --preset meta-llama/Llama-2-7b-hf  # random weights of that size
    python bench.py --model opt --weights FOLDER --task validate     # the same as transformers?

Each task has a process of its own; speed is measured in turn with what the machine can do: products
and reads. A figure is the median of --runs runs, with the lowest and the highest; --out keeps all.
"""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import timeit
from functools import cached_property, lru_cache, partial, partialmethod
from importlib import import_module, metadata, util
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

MODES = r"auto|pmap|data|fsdp|tensor|(data|fsdp|tensor):[1-9]\d*(,(data|fsdp|tensor):[1-9]\d*)*"
HERE = Path(__file__).resolve().parent
MODELS = [n for n in ("gpt2", "opt", "llama", "gemma", "mistral") if (HERE / f"{n}.py").exists()]

# ----------------------------------------------------------------------------- measuring and theory
def fail(message):
    """One line that says what is wrong and what to do; exit code 2."""
    print("bench.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)
def in_turn(calls: dict, runs: int, warm=1) -> dict:
    """Seconds that each call takes, `runs` times after `warm` ones. One run of each, then the next:
    a machine that becomes slower does so for all. A call must wait for its result."""
    seconds = {name: [] for name in calls}
    for name, call in [*calls.items()] * (warm + runs):
        seconds[name].append(timeit.timeit(call, number=1))
    return {name: found[warm:] for name, found in seconds.items()}
def limits_of(dtype) -> tuple:
    """({unit: (how much a call does, the call)}, the bytes they hold) for what a device reaches:
    FLOP/s in products of two square matrices, B/s in sums over an array that fits no cache."""
    n, size = (2048, 2**30) if jax.default_backend() == "cpu" else (8192, 2**32)
    matrix, numbers = jnp.ones((n, n), dtype), jnp.ones(size // 4, jnp.float32)
    return {"FLOP/s": (2 * n**3, lambda: jnp.matmul(matrix, matrix).block_until_ready()),
            "B/s": (size, lambda: jnp.sum(numbers).block_until_ready())}, matrix.nbytes + size
def resident_memory() -> int:
    """The bytes of this process that were in the machine's memory at most."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
def peak_memory() -> int:
    """The bytes that the device held at most; a CPU holds what the process does."""
    stats = jax.config.jax_default_device.memory_stats()
    return stats["peak_bytes_in_use"] if stats else resident_memory()
def record(args, metric, who, values, unit, **more):
    """Writes a figure as a line of JSON, for the process that started this one."""
    with open(Path(args.scratch, "records"), "a") as file:
        print(json.dumps({
            "metric": metric, "who": who, "value": np.median(values), "low": min(values),
            "high": max(values), "runs": len(values), "unit": unit, "model": args.model,
            "weights": args.preset if args.weights == "random" else args.weights,
            "device": jax.config.jax_default_device.device_kind, **more}), file=file)
def skeleton(module, config, **options):
    """(graphdef, state) of a model of which only the shapes are there."""
    rngs = SimpleNamespace(params=partial(jax.random.key, 0))  # nothing is drawn
    return nnx.split(nnx.eval_shape(lambda: module.Model(config, rngs=rngs, **options)))
@lru_cache(1)  # a plan asks for several numbers of chips
def costs(module, config, B: int, T: int, dtype):
    """Operations and bytes of B rows of T tokens, from the shapes alone. For each token a weight of
    a matrix takes part in 2 operations, and attention adds 2 products of H * Dh in each layer for
    each token seen. Of E experts, k of them a token's, N tokens read E (1 - (1 - k / E)^N)."""
    E, chosen = (getattr(config, f"num_{name}", 1) for name in ("local_experts", "experts_per_tok"))
    size, head, kernels = 0, 0, [0, 0]  # kernels: those of all tokens, those of experts
    for path, p in nnx.to_flat_state(skeleton(module, config)[1]):
        size += p.size
        if path[-1] == "kernel" and path[0] != "lm_head":
            kernels["experts" in path] += p.size
        elif path[0] in ("wte", "embed_tokens", "lm_head"):  # in this order: an own head replaces
            head = p.size  # the table as what makes the logits
    layers = jax.eval_shape(lambda: module.init_cache(config, 1, T, dtype)).layers
    look = 4 * len(layers) * config.num_attention_heads * layers[0][0].shape[-1]  # a token seen
    shared, experts, used = *kernels, kernels[0] + kernels[1] * chosen / E
    def read(N):  # bytes of weights, for N tokens
        return jnp.dtype(dtype).itemsize * (shared + head + experts * (1 - (1 - chosen / E) ** N))
    cache = B * sum(2 * k.size * k.dtype.itemsize for k, *_ in layers)
    return SimpleNamespace(
        size=size, weights=read(B), cache=cache, depth=len(layers),
        prefill=B * (2 * used * T + look * T * T + 2 * head), prefill_bytes=read(B * T),
        decode=B * (2 * (used + head) + look * T), decode_bytes=read(B) + cache,
        train=3 * B * T * (2 * (used + head) + look * T), train_bytes=3 * read(B * T))

# ----------------------------------------------------------------------------------------- subjects
def random_model(module, config, dtype, param_dtype, mesh=None, **options):
    """A model with normal(0.02) weights, drawn on the device, each in the type it is stored in."""
    graphdef, state = skeleton(module, config, dtype=dtype, param_dtype=param_dtype, **options)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    for i, (path, param, *_) in enumerate(module.named_parameters(state)):
        drawn = (jnp.ones(param.shape, param.dtype) if path.endswith("scale") else
                 0.02 * draw(jax.random.key(i), param.shape, param.dtype))
        where = mesh and module.sharding(mesh, config, path, param.shape)
        param.set_value(jax.device_put(drawn, where))
    return nnx.merge(graphdef, state)
def make_meshes(parallel, need) -> list:
    """Of 1, 2 and 4 devices, if there are so many; or of one and what data:2,tensor:4 asks for.
    auto is data, or where `need` bytes fit no single device, which is then left out, tensor."""
    room = (jax.config.jax_default_device.memory_stats() or {}).get("bytes_limit", np.inf)
    if parallel == "auto":
        parallel, why = ("tensor", "more") if need > room else ("data", "less")
        print(f"--parallel {parallel}: the state takes {why} than the memory of one device")
    axes = {name: int(n or 0) for name, _, n in (x.partition(":") for x in parallel.split(","))}
    shapes = [(1,) * len(axes), (*axes.values(),)] if all(axes.values()) else [(1,), (2,), (4,)]
    return [jax.sharding.Mesh(np.reshape(jax.devices()[: math.prod(shape)], shape), [*axes])
            for shape in shapes[need > room :] if math.prod(shape) <= jax.device_count()]
class Ours:
    """This project's side of a comparison; devices along a mesh's axis tensor share their rows."""
    def __init__(self, args, dtype, mesh=None):
        self.args, self.dtype, self.module = args, dtype, import_module(args.model)
        self.mesh, (self.axes, self.size) = mesh, (mesh.shape, mesh.size) if mesh else ({}, 1)
        self.count = math.prod(n for axis, n in self.axes.items() if axis != "tensor")
        self.name = ",".join(f"{axis}:{n}" for axis, n in self.axes.items()) or "ours"
        self.module.LONG = 1 if args.chunked else self.module.LONG
        self.config = find_config(args)
    model = cached_property(lambda self: self.read(self.dtype))
    def read(self, param_dtype):
        """The model of --weights, with its parameters in that type."""
        how = {"dtype": self.dtype, "param_dtype": param_dtype, "remat": self.args.remat,
               "mesh": self.mesh}
        if self.args.weights == "random":
            return random_model(self.module, find_config(self.args), **how)
        return self.module.load(folder_of(self.args), **how)
    def generate(self, prompts, n):
        """n tokens after each prompt."""
        module, model, args, key = self.module, self.model, self.args, jax.random.key(0)
        if not self.mesh:
            return partial(module.generate, model, prompts, n, key=key, top_k=args.top_k or None,
                           temperature=args.temperature or 0, top_p=args.top_p)
        tokens, positions, S = module.batch_prompts(self.config, prompts, n)
        graphdef, state = nnx.split(model)
        how = {"top_k": args.top_k or None, "sampling": {
            "temperature": args.temperature or None, "top_p": args.top_p, "min_p": None,
            "repetition_penalty": None}}
        prefill, decode = (partial(f, graphdef, **how) for f in (module.prefill, module.decode))
        def run(state, tokens, positions, keys):  # what `generate` does, as one program
            cache = module.init_cache(self.config, len(tokens), S, model.dtype)
            cache, token = prefill(state, cache, tokens, positions, keys)
            new = token[:, None]
            while steps := min(module.STEPS, n - new.shape[1]):
                cache, more = decode(state, cache, new[:, -1], keys, steps=steps)
                new = jnp.concatenate([new, more[:, :steps]], axis=1)
            return new
        rows = self.place(tokens, positions, jax.random.split(key, len(prompts)))
        run = self.compiled(run, (state, *rows), (None, 0, 0, 0), 0)
        return lambda: np.asarray(run(state, *rows)).reshape(-1, n).tolist()
    def compiled(self, function, inputs, axes, out, donate=()):
        """A function's program for such inputs, under the mesh; axes, out: of devices, for pmap."""
        wrap = partial(jax.pmap, axis_name="pmap", in_axes=axes, out_axes=out, devices=[
            *self.mesh.devices.flat]) if "pmap" in self.axes else jax.jit
        with jax.set_mesh(None if "pmap" in self.axes else self.mesh):
            return wrap(function, donate_argnums=donate).lower(*inputs).compile()
    def place(self, *rows):
        """Arrays of rows, split over all axes but tensor; pmap wants a leading axis of devices."""
        if "pmap" in self.axes:
            rows = [x.reshape(self.count, -1, *x.shape[1:]) for x in rows]
        spec = jax.P(tuple(axis for axis in self.axes if axis != "tensor"))
        return [jax.device_put(x, self.mesh and jax.NamedSharding(self.mesh, spec)) for x in rows]
    prefill = partialmethod(generate, n=1)
    def train(self, rows):
        """A step of AdamW on rows of T + 1 tokens; weights and optimizer in float32."""
        graphdef, params = nnx.split(self.read("float32"))
        [tokens], pmap = self.place(np.array(rows)), "pmap" in self.axes
        spread = jax.tree.map(lambda p: p.sharding, params)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
        def whole(p, where):  # what FSDP split is gathered where it is used
            spec = jax.P(*(axis if axis == "tensor" else None for axis in where.spec))
            return jax.lax.with_sharding_constraint(p, jax.NamedSharding(self.mesh, spec))
        def mean_loss(params, tokens):
            params = jax.tree.map(whole, params, spread) if "fsdp" in self.axes else params
            model, parts = nnx.merge(graphdef, params), self.args.loss_parts
            rows = model.hidden(tokens[:, :-1])[0], tokens[:, 1:]  # [B, T, D], [B, T]
            def losses(of):
                return optax.softmax_cross_entropy_with_integer_labels(model.head(of[0]), of[1])
            return (losses(rows) if parts == 1 else jax.lax.map(jax.checkpoint(losses), [
                x.swapaxes(0, 1) for x in rows], batch_size=-(-rows[1].shape[1] // parts))).mean()
        def step(params, opt_state, tokens):  # in parts, of which the gradients are added up
            def add(total, part):
                return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(params, part)), 0
            parts = tokens.reshape(-1, self.args.accumulate, tokens.shape[-1]).swapaxes(0, 1)
            total = jax.value_and_grad(mean_loss)(params, parts[0])
            total = jax.lax.scan(add, total, parts[1:])[0] if len(parts) > 1 else total
            loss, gradients = jax.tree.map(lambda x: x / len(parts), total)
            if pmap:
                loss, gradients = jax.lax.pmean((loss, gradients), "pmap")
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            params = optax.apply_updates(params, updates)
            stay = jax.lax.with_sharding_constraint if self.mesh and not pmap else lambda p, _: p
            return stay(params, spread), opt_state, loss
        held = [params, optimizer.init(params)]
        step = self.compiled(step, (*held, tokens), (None, None, 0), None, donate=(0, 1))
        def run():
            held[0], held[1], loss = step(*held, tokens)
            return loss.item()
        return run
class Transformers:
    """Hugging Face's transformers on PyTorch, on the same weights; eager, or compiled."""
    def __init__(self, args, dtype, folder, compiled=False):
        import torch
        from transformers import AutoModelForCausalLM
        self.args, self.compiled, self.torch = args, compiled, torch
        torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does
        self.name, self.device = "transformers" + "-compile" * compiled, args.torch
        self.dtype = getattr(torch, dtype)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).to(self.device)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.model.generation_config.eos_token_id = None  # nothing ends a text before n tokens
    def prefill(self, prompts):
        """The likeliest token after each prompt, and a cache for what would follow."""
        ids = self.torch.tensor(prompts, device=self.device)
        call = partial(self.forward, ids, use_cache=True, logits_to_keep=1)
        return self.torch.no_grad()(lambda: call().logits.argmax(-1).tolist())
    def generate(self, prompts, n):
        """n tokens after each prompt; shorter ones are padded on the left."""
        T, args = max(map(len, prompts)), self.args
        rows = self.torch.tensor([[-1] * (T - len(p)) + p for p in prompts], device=self.device)
        how = {"max_new_tokens": n, "pad_token_id": 0, "do_sample": bool(args.temperature),
               "temperature": args.temperature or 1.0, "top_k": args.top_k or 0,
               "top_p": args.top_p or 1.0, "cache_implementation": "static" * self.compiled or None}
        return lambda: self.model.generate(
            rows.clamp(0), attention_mask=(rows >= 0).long(), **how).tolist()
    def train(self, rows):
        """A step of AdamW, as ours: without dropout, in half precision with float32 weights."""
        torch, model, ids = self.torch, self.model.float(), self.torch.tensor(rows).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        def run():
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.forward(ids[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()
        return run
class CTranslate2:
    """OpenNMT's CTranslate2, on the same weights, which its own converter writes."""
    name = "ctranslate2"
    def __init__(self, args, dtype, folder):
        import ctranslate2
        self.args, self.kept = args, tempfile.TemporaryDirectory()
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        converter.convert(self.kept.name, quantization=dtype, force=True)
        self.vocabulary = json.loads(Path(self.kept.name, "vocabulary.json").read_text())
        config = Path(self.kept.name, "config.json")  # has null for tokens that a model has not
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.vocabulary[0])
        config.write_text(json.dumps(json.loads(config.read_text()) | names))
        self.generator = ctranslate2.Generator(self.kept.name, args.torch, compute_type=dtype,
                                               intra_threads=os.cpu_count())
    def generate(self, prompts, n):
        """n tokens after each prompt."""
        args, words = self.args, [[self.vocabulary[token] for token in row] for row in prompts]
        how = {"max_length": n, "min_length": n, "include_prompt_in_result": False, "end_token": [],
               "sampling_topk": (args.top_k or 0) if args.temperature else 1,
               "sampling_topp": args.top_p or 1, "sampling_temperature": args.temperature or 1}
        return partial(self.generator.generate_batch, words, **how)
    prefill = partialmethod(generate, n=1)
PEERS = {"transformers": Transformers, "ctranslate2": CTranslate2,
         "transformers-compile": partial(Transformers, compiled=True)}

# -------------------------------------------------------------------------------------------- tasks
def some_prompts(args, config, B, T):
    """B prompts of T random tokens; with --ragged each is an eighth of T shorter than the last."""
    rng = np.random.default_rng(0)
    lengths = [max(1, T - (i % 8) * T // 8) if args.ragged else T for i in range(B)]
    return [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
def compare(args, metric, values: dict, unit, shape, **theory):
    """Records what each subject reached, and of each pair of runs how ours compares."""
    for who, found in values.items():
        record(args, metric, who, found, unit, **shape, **theory)
        theory = {}  # the first is ours
    for who in [*values][1:] if "ours" in values else []:
        ratios = [a / b for a, b in zip(values["ours"], values[who], strict=True)]
        record(args, metric, f"ours / {who}", ratios, "times", **shape)
FORMULAS = {
    "prefill": "share = (2 N T + 4 L H Dh T^2 + 2 V D) B operations / time / limit",
    "train": "share = 3 (2 (N + V D) + 4 L H Dh T) B T operations / time / limit",
    "decode": "share = bytes of weights and of the cache as it is on average / time / limit"}
def measure_speed(args, dtype, task):
    """Tokens/s of prompts, new tokens (n take the time of n + 1 less the least of 1) or steps."""
    ours, n, decode = Ours(args, dtype), args.new_tokens, task == "decode"
    a_weight = 16 if task == "train" else jnp.dtype(dtype).itemsize  # with its gradient and moments
    need = a_weight * costs(ours.module, ours.config, 1, 1, dtype).size
    meshes = make_meshes(args.parallel, need) if args.parallel else []
    everyone = [Ours(args, dtype, mesh) for mesh in meshes] or [ours]
    everyone += [PEERS[name](args, dtype, folder_of(args, dtype)) for name in args.vs]
    ours, how = everyone[0], {"dtype": dtype, "how": " + ".join(args.techniques)}
    limits, held = limits_of(dtype)
    for B, T in itertools.product(args.batch, args.length):
        prompts = {one.name: some_prompts(args, ours.config, B * getattr(one, "count", 1),
                                          T + (task == "train")) for one in everyone}
        if decode:
            calls = {(one.name, m): one.generate(prompts[one.name], m)
                     for one in everyone for m in (1, n + 1)}
        else:
            calls = {one.name: getattr(one, task)(prompts[one.name]) for one in everyone
                     if hasattr(one, task)}
        seconds = in_turn(calls | {unit: call for unit, (_, call) in limits.items()}, args.runs)
        reached = {unit: amount / np.median(seconds.pop(unit))
                   for unit, (amount, _) in limits.items()}
        if args.profile:
            with jax.profiler.trace(args.profile):
                in_turn({who: call for who, call in calls.items() if ours.name in who}, 1, warm=0)
        if decode:
            seconds = {one.name: [(s - min(seconds[one.name, 1])) / n
                                  for s in seconds[one.name, n + 1]] for one in everyone}
        theory = vars(costs(ours.module, ours.config, B * ours.count, T + n // 2 * decode, dtype))
        limit, of = ("B/s", "the sum") if decode else ("FLOP/s", "the product")
        middle = ours.size * np.median(seconds[ours.name])
        shape = {"batch": B, "length": T, **how}
        tokens = {who: [len(prompts[who]) * (1 if decode else T) / s for s in times]
                  for who, times in seconds.items()}
        compare(args, task, tokens, "tokens/s", shape, formula=FORMULAS[task], limits=reached,
                share=theory["decode_bytes" if decode else task] / middle / reached[limit],
                of=f"{reached[limit] / 1e9:,.1f} G{limit} of {of}", flops=theory[task] / middle,
                intensity=theory[task] / theory[task + "_bytes"])
        for one in everyone[1:] if args.parallel else []:
            both = zip(tokens[one.name], tokens[ours.name], strict=True)
            ratios = [x / y * ours.size / one.size for x, y in both]
            record(args, f"{task}, scaling", one.name, ratios, "of linear", **shape)
        if task == "prefill" and B == 1:
            record(args, "first token", ours.name, seconds[ours.name], "s", **shape)
        if task == "train":
            record(args, "rows", ours.name, [x / T for x in tokens[ours.name]], "rows/s", **shape)
    if len(everyone) == 1:
        memory = (peak_memory() - held) / 1e9
        record(args, f"memory of {task}", ours.name, [memory], "GB at most", **how)
def bench_compile(args, dtype):
    """Seconds that a first run takes longer than a second: both programs are compiled or read."""
    ours, [B, *_], [T, *_] = Ours(args, dtype), args.batch, args.length
    run = ours.generate(some_prompts(args, ours.config, B, T), 2)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    found = {"compile, cold": [], "compile, from the cache": []}
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            jax.config.update("jax_compilation_cache_dir", folder)
            for seconds in found.values():
                compilation_cache.reset_cache()
                jax.clear_caches()
                seconds.append(np.subtract(*in_turn({"": run}, 2, warm=0)[""]))  # first - second
    for metric, seconds in found.items():
        record(args, metric, "ours", seconds, "s", batch=B, length=T, dtype=dtype)
STARTING = """
from transformers import AutoModelForCausalLM, AutoTokenizer
codec = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype={dtype!r}).to({device!r})
ids = codec({prompt!r}, return_tensors="pt").input_ids.to({device!r})
print(codec.decode(model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)[0]))
"""
def run_apart(*program) -> str:
    """Runs a Python program in a process of its own -> what it printed."""
    done = subprocess.run([sys.executable, *map(str, program)], text=True, capture_output=True,
                          stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
def bench_load(args, dtype):
    """Seconds from a folder to a token, without imports, with a warm compile cache; and memory."""
    if args.once:  # in one of the processes that the lines below start
        jax.config.update("jax_compilation_cache_dir", args.scratch)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        kind = {"ours": Ours}.get(args.once) or partial(PEERS[args.once], folder=folder_of(args))
        if args.once != "ours":
            from transformers import AutoModelForCausalLM  # noqa: F401  (not to be timed)
        start = timeit.default_timer()
        kind(args, dtype).prefill([[1] * 8])()
        return print(timeit.default_timer() - start, resident_memory() / 1e9)
    folder, who = folder_of(args), ["ours", *set(args.vs) & {"transformers"}]
    found = {name: [] for name in who}
    for name in (args.runs + 1) * who:
        again = [*sys.argv[1:], "--weights", folder, "--once", name]
        found[name].append([float(word) for word in run_apart(__file__, *again).split()])
    for i, (metric, unit) in enumerate([("load", "s"), ("resident memory of load", "GB at most")]):
        compare(args, metric, {name: [run[i] for run in runs[1:]] for name, runs in found.items()},
                unit, {"dtype": dtype})
def bench_start(args, dtype):
    """Seconds of the whole process that writes 32 tokens, with a warm compile cache."""
    words = {"folder": str(folder_of(args)), "prompt": "ROMEO:", "dtype": dtype,
             "device": args.torch}
    calls = {"ours": partial(
        run_apart, HERE / "sample.py", "--model", args.model, "--weights", words["folder"],
        "--prompt", words["prompt"], "--max-new-tokens", 32, "--temperature", 0, "--dtype",
        dtype, "--compile-cache", args.scratch, *["--device", args.device] * bool(args.device))}
    if "transformers" in args.vs:
        calls["transformers"] = partial(run_apart, "-c", STARTING.format(**words))
    seconds = in_turn(calls, args.runs)
    compare(args, "start", seconds, "s", {"dtype": dtype})
def both_models(args, dtype):
    """(ours, transformers', our tokenizer, the text of --text) of a checkpoint."""
    ours, text = Ours(args, dtype), Path(args.text).read_text() if args.text else __doc__
    if args.dataset:
        from datasets import load_dataset
        text = "\n\n".join(load_dataset(*args.dataset.split(":"), split="test")["text"])
    theirs = Transformers(args, dtype, folder_of(args))
    return ours, theirs, ours.module.tokenizer(folder_of(args)), text
def continuations(ours, theirs, prompt, n, temperature):
    """n tokens after a prompt, as each of the two draws them."""
    ours.args.temperature = theirs.args.temperature = temperature
    theirs.torch.manual_seed(0)
    return {one.name: one.generate([prompt], n)()[0][-n:] for one in (ours, theirs)}
def bench_validate(args, dtype):
    """Ours against transformers: tokens, the stream after each block, logits, greedy tokens."""
    from transformers import AutoTokenizer
    ours, theirs, codec, text = both_models(args, dtype)
    ids, expected = (tokens.encode(text) for tokens in (
        codec, AutoTokenizer.from_pretrained(folder_of(args))))
    record(args, "tokens of the text", "same ids", [float(ids == expected)], f"of {len(ids)}")
    ids = ids[: min(256, ours.config.max_position_embeddings - args.new_tokens)]
    stream, call = [], ours.module.Block.__call__
    def kept(*inputs):
        stream.append(call(*inputs))
        return stream[-1]
    ours.module.Block.__call__ = kept
    logits = ours.model(jnp.array([ids]))
    with theirs.torch.no_grad():
        rows = theirs.torch.tensor([ids], device=theirs.device)
        out = theirs.model(rows, output_hidden_states=True)
    layers = zip(stream[:-1], out.hidden_states[1:-1], strict=True)  # the last of theirs is normed
    named = [(f"after block {i}", a, b) for i, ((a, _), b) in enumerate(layers)]
    for name, a, b in [*named, ("logits", logits, out.logits)]:
        a, b = np.asarray(a, np.float64), b.double().cpu().numpy()
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        record(args, name, "difference", [np.abs(a - b).max()], "at most", dtype=dtype,
               of=f"numbers up to {np.abs(b).max():.3g}, cosine {cosine:.9f}")
    new = continuations(ours, theirs, ids[:32], args.new_tokens, 0.0)
    pairs = enumerate(zip(*new.values(), strict=True))
    agreed = next((i for i, (a, b) in pairs if a != b), args.new_tokens)
    record(args, "greedy tokens", "same until", [agreed], f"of {args.new_tokens}", dtype=dtype)
def bench_eval(args, dtype):
    """Mean loss and perplexity of a text: in windows of up to 1,024 tokens, each of which begins
    half a window before the end of the last and counts the tokens that the last did not have."""
    ours, theirs, codec, text = both_models(args, dtype)
    ids, C = codec.encode(text), min(1024, ours.config.max_position_embeddings)
    graphdef, state = nnx.split(ours.model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens)[0, :-1])
    losses_of = optax.softmax_cross_entropy_with_integer_labels
    total, counted = {"ours": 0.0, "transformers": 0.0}, 1
    while counted < len(ids):
        start = max(0, counted - C // 2)
        window = ids[start : start + C]
        fresh = slice(counted - start - 1, len(window) - 1)
        padded = np.array([window + [0] * (C - len(window))])  # one length for all: one program
        losses = losses_of(forward(state, padded), padded[0, 1:])
        total["ours"] += losses[fresh].sum().item()
        with theirs.torch.no_grad():
            tokens = theirs.torch.tensor(window, device=theirs.device)
            logits = theirs.model(tokens[None]).logits[0, :-1].float()
            losses = theirs.torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total["transformers"] += float(losses[fresh].sum())
        counted = start + len(window)
    for who, loss in total.items():
        loss /= len(ids) - 1
        record(args, "loss", who, [loss], "nats a token", dtype=dtype)
        record(args, "perplexity", who, [np.exp(loss)], f"of {len(ids) - 1} tokens", dtype=dtype)
def bench_compare(args, dtype):
    """Greedy and sampled texts of both side by side, and how much each repeats itself."""
    ours, theirs, codec, text = both_models(args, dtype)
    prompt = codec.encode(text if args.text else "Once upon a time")[:64]
    for how, temperature in [("greedy", 0.0), ("sampled", 1.0)]:
        both = continuations(ours, theirs, prompt, args.new_tokens, temperature)
        for who, new in both.items():
            print(f"--- {how}, {who}\n{codec.decode(prompt + new)}", flush=True)
            for n in range(1, min(4, len(new) + 1)):
                grams = list(zip(*(new[i:] for i in range(n)), strict=False))
                record(args, f"{how}: distinct-{n}", who, [len(set(grams)) / len(grams)],
                       f"of runs of {n}")
            repeated = sum(token in new[max(0, i - 16) : i] for i, token in enumerate(new))
            record(args, f"{how}: repetition", who, [repeated / len(new)], "seen in the 16 before")
CHIPS = {  # data sheets: bfloat16 FLOP/s, memory bytes/s, bytes of memory, bytes/s to other chips
    "a100": (312e12, 2.039e12, 80e9, 300e9), "h100": (989e12, 3.35e12, 80e9, 450e9),
    "h200": (989e12, 4.8e12, 141e9, 450e9), "v5e": (197e12, 0.819e12, 16e9, 200e9),
    "v5p": (459e12, 2.765e12, 95e9, 600e9), "v6e": (918e12, 1.64e12, 32e9, 448e9)}
def bench_plan(args, dtype):
    """What a preset needs at least on N chips, from its config alone. Training is FSDP: bfloat16
    weights are gathered twice, gradients scattered once, float32 state stays split, of blocks the
    input is kept. Decoding is tensor parallel. Scaling is of data parallelism, whose float32 sums
    of gradients wait for the products."""
    config, (flops, bandwidth, memory, link) = find_config(args), CHIPS[args.kind]
    width = getattr(config, "n_embd", 0) or config.hidden_size
    for B, T, N in itertools.product(args.batch, args.length, args.chips):
        c = costs(import_module(args.model), config, B, T, "bfloat16")
        times = {"products": 4 / 3 * c.train / N / flops, "links": 6 * c.size * (N - 1) / N / link,
                 "memory": 28 * c.size / N / bandwidth}
        shape = {"batch": B, "length": T, "chips": f"{N} {args.kind}"}
        for what, held, seconds, tokens, of in [
            ("train", (16 * c.size + 2 * c.depth * width * T * B) / N, max(times.values()), B * T,
             max(times, key=times.get)),
            ("decode", (2 * c.size + c.cache) / N, c.decode_bytes / N / bandwidth, B, "memory")]:
            record(args, f"{what}: memory", args.preset, [held / 1e9], "GB a chip", **shape,
                   of="does not fit" if held > memory else f"fits {memory / 1e9:.0f} GB")
            record(args, f"{what}: step", args.preset, [1e3 * seconds], "ms", **shape,
                   of=f"held by the {of}")
            record(args, f"{what}: speed", args.preset, [tokens / seconds], "tokens/s", **shape)
        work, sums = c.train / N / flops, 8 * c.size * (N - 1) / N / link
        record(args, "train: scaling", args.preset, [work / (work + sums)], "of linear", **shape,
               of=f"{1e3 * work:.3g} ms of products, {1e3 * sums:.3g} of sums")
TASKS = {task: partial(measure_speed, task=task) for task in FORMULAS} | {
    name[6:]: task for name, task in globals().items() if name.startswith("bench_")}
def write_table(records: list[dict]):
    """The records as a Markdown table, and the formulas behind the shares of the limits."""
    number = lambda x: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"  # noqa: E731
    rows = [["figure", "who", "of", "median", "spread", "unit", "share of the limit"]]
    for found in records:
        shape = [f"{found[key]}{name}" for key, name in [
            ("batch", " x"), ("length", " tokens,"), ("dtype", ""), ("chips", ""), ("how", "")]
            if found.get(key)]
        share = f"{found['share']:.0%} of " if "share" in found else ""
        rows.append([found["metric"], found["who"], " ".join(shape).strip(","), number(
            found["value"]), f"{number(found['low'])} - {number(found['high'])}" * (
                found["runs"] > 1), found["unit"], share + found.get("of", "")])
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    rows.insert(1, ["-" * width for width in widths])
    print("\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows))
    for metric, formula in {r["metric"]: r["formula"] for r in records if "formula" in r}.items():
        print(f"{metric}: {formula}")
def draw(records: list[dict], file: Path):
    """The roofline, operations/s over operations a byte, with a point for each of our figures."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(8, 5)).subplots()
    for found in records:
        axes.loglog(found["intensity"], found["flops"], "o", label=f"{found['metric']}, "
                    f"{found['batch']} x {found['length']} tokens, {found['dtype']}")
    for dtype, found in {found["dtype"]: found for found in records}.items():
        product, read = found["limits"]["FLOP/s"], found["limits"]["B/s"]
        ends = [0.1, product / read, 1000]
        axes.loglog(ends, [min(product, read * x) for x in ends], label=f"limits, {dtype}")
    axes.set(xlabel="operations for each byte of weights and cache", ylabel="operations/s",
             title=f"{found['weights']} on {found['device']}")
    axes.legend(fontsize=7)
    axes.figure.savefig(file, dpi=120, bbox_inches="tight")

# --------------------------------------------------------------------------------- the command line
def folder_of(args, dtype="float32") -> Path:
    """The folder of --weights; for random ones, one that is written now."""
    module = import_module(args.model)
    if args.weights != "random":
        return HERE / "tiny" / args.model if args.weights == "tiny" else module.fetch(args.weights)
    folder = Path(args.scratch, dtype)
    if not folder.exists():
        module.save(random_model(module, find_config(args), dtype, dtype), folder)
    return folder
def find_config(args):
    """The config of --weights, or of --preset where they are random."""
    module, random = import_module(args.model), args.weights == "random"
    name = args.preset if random else args.weights
    if name in module.PRESETS and (random or args.task == ["plan"]):
        return module.PRESETS[name].config
    file = (Path(name) if random else folder_of(args)) / "config.json"
    return module.Config.from_hf(json.loads(file.read_text()))
def arguments():
    """The command line, read and checked."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add, words = fail, parser.add_argument, lambda text: text.split(",")
    numbers = lambda text: list(map(int, text.split(",")))  # noqa: E731
    add("--model", choices=MODELS, help="which file (default: gpt2)")
    add("--weights", help="tiny, random, a Hub id or a folder (default: as in sample.py)")
    add("--preset", metavar="ID", help="of this size, with random weights; or what is planned for")
    add("--task", type=words, metavar="TASK,...", default=["prefill", "decode", "train"],
        help=f"of {', '.join(TASKS)} (default: prefill,decode,train)")
    add("--suite", choices=["cpu", "gpu", "tpu"], help="record the figures for such a machine")
    add("--batch", type=numbers, default=[1], metavar="N,...", help="rows (default: 1)")
    add("--length", type=numbers, default=[32], metavar="N,...", help="tokens (default: 32)")
    for name, default, about in [
        ("--new-tokens", 64, "after a prompt"), ("--runs", 5, "of which the median counts"),
        ("--accumulate", 1, "parts of a batch in training"),
        ("--loss-parts", 1, "parts in which training makes the logits"),
        ("--limit", 600, "seconds that a task may take")]:
        add(name, type=int, default=default, metavar="N", help=f"{about} (default: {default})")
    add("--ragged", action="store_true", help="prompts of different lengths, for decode")
    add("--remat", action="store_true", help="train with blocks computed again for the gradient")
    add("--chunked", action="store_true", help="attend in chunks of keys, whatever the length")
    for name, kind in [("--temperature", float), ("--top-k", int), ("--top-p", float)]:
        add(name, type=kind, metavar="X", help="as in sample.py (default: greedy)")
    add("--vs", type=words, default=[], metavar="NAME,...", help=f"of {', '.join(PEERS)}")
    add("--text", metavar="FILE", help="for validate, eval and compare")
    add("--dataset", metavar="NAME[:SUBSET]", help="its test split, through the package datasets")
    add("--chips", type=numbers, default=[8, 64, 512], metavar="N,...", help="for plan (8,64,512)")
    add("--kind", choices=CHIPS, default="h100", help="for plan (default: h100)")
    add("--dtype", type=words, default=[""], metavar="DTYPE,...", help="default: as in sample.py")
    add("--device", metavar="DEVICE", help="cpu, gpu, tpu, or one of several as in gpu:1")
    add("--parallel", metavar="MODE", help="pmap, data, fsdp, tensor or auto: on 1, 2, 4 devices; "
        "or data:2,tensor:2 beside one; --batch rows on each (for tensor, on all)")
    add("--profile", metavar="DIR", help="trace a run of each of our figures for xprof or Perfetto")
    add("--out", type=Path, metavar="FOLDER", help="for results.jsonl and roofline.png")
    add("--scratch", help=argparse.SUPPRESS)  # in the process of a task: for its records
    add("--once", help=argparse.SUPPRESS)  # in the process of a single load: of whom
    args = parser.parse_args()
    args.every = args.task == ["plan"] and not (args.model or args.preset)
    presets = import_module(args.model or "gpt2").PRESETS
    args.given = args.weights or ("random" if args.preset else "")
    args.weights = args.given or (next(iter(presets)) if args.model else "tiny")
    args.model, args.preset = args.model or "gpt2", args.preset or next(iter(presets))
    args.techniques = [name for name in ("ragged", "remat", "chunked") if vars(args)[name]]
    args.techniques += [f"{name} {n}" for name in ("accumulate", "loss_parts")
                        if (n := vars(args)[name]) > 1]
    for fits, rule in [
        ({*args.task} <= TASKS.keys(), f"--task must be of {', '.join(TASKS)}"),
        ({*args.vs} <= PEERS.keys(), f"--vs must be of {', '.join(PEERS)}"),
        ({*args.dtype} <= {"", "float32", "bfloat16", "float16"}, "--dtype: see --help"),
        (args.preset in presets or Path(args.preset, "config.json").exists(),
         f"--preset must be of {', '.join(presets)}, or a folder with a config.json"),
        (not args.text or (Path(args.text).is_file() and Path(args.text).stat().st_size > 9),
         f"--text {args.text}: there is no such file, or next to nothing in it"),
        (min(*args.batch, *args.length, *args.chips, args.new_tokens, args.runs, args.accumulate,
             args.loss_parts, args.top_k or 1) >= 1, "numbers of all kinds must be 1 or more"),
        (not args.ragged or args.task == ["decode"], "--ragged is for --task decode"),
        (not args.vs or not args.parallel, "--vs compares on one device: leave --parallel out"),
        (re.fullmatch(MODES, args.parallel or "data"), "--parallel must be one of those in --help"),
        (not np.mod(args.batch, max(1, args.accumulate)).any(), "--accumulate must divide --batch"),
        ({*args.techniques} <= {"ragged"} or (args.task == ["train"] and not args.vs),
         "--remat, --chunked, --accumulate, --loss-parts: for --task train, without --vs"),
        (not args.out or not args.out.is_file(), f"--out {args.out} is a file: name a folder"),
        (args.weights != "random" or {"validate", "eval", "compare", "start", "ctranslate2"}
         .isdisjoint({*args.task, *args.vs}), "random weights have no tokenizer: name --weights"),
        *[(util.find_spec(name), f"that needs {name}: pip install {name}") for name, used in [
            ("torch", {"transformers", "transformers-compile", "validate", "eval", "compare"}
             & {*args.task, *args.vs}), ("datasets", args.dataset),
            ("ctranslate2", "ctranslate2" in args.vs)] if used]]:
        fits or fail(rule)
    return args
def measure(args):
    """A single task, in a process of its own."""
    kind, _, index = (args.device or "").partition(":")
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")  # leaves a GPU's memory alone
    try:
        jax.config.update("jax_default_device", jax.devices(kind or None)[int(index or 0)])
    except (RuntimeError, ValueError, IndexError):
        fail(f"there is no device {args.device}; JAX finds {', '.join(map(str, jax.devices()))}")
    args.torch = "cuda" if jax.default_backend() == "gpu" else "cpu"  # PyTorch's name of it
    [task], [dtype] = args.task, args.dtype
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    more = {"prefill": 1, "compile": 2, "decode": args.new_tokens + 1}.get(task, 0)
    try:
        if (need := max(args.length) + more) > (C := find_config(args).max_position_embeddings):
            fail(f"{need} tokens do not fit the context of {C}: choose another --length")
        TASKS[task](args, dtype)
    except (OSError, UnicodeDecodeError, import_module(args.model).InputError) as error:
        fail(error)  # of the Hub, of a file, or of a text that is too long
def main(args) -> int:
    """Starts a process for each task, collects what they print -> the exit code."""
    parts = [["--task", task, "--dtype", dtype] for task in args.task for dtype in args.dtype]
    if args.every:  # the largest model of each file
        parts = []
        for name in MODELS:
            presets = import_module(name).PRESETS
            largest = max(presets, key=lambda x: presets[x].parameters)
            parts.append(["--model", name, "--preset", largest])
    if args.suite:
        lines = (HERE / f"benchmarks/{args.suite}.txt").read_text().splitlines()
        parts = [["--weights", args.given or "random", "--dtype", dtype, *shlex.split(line)]
                 for line in lines for dtype in args.dtype]
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
                   "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # others need memory of a GPU too
    records, code = [], 0
    for part in parts:
        limit = int(part[part.index("--limit") + 1]) if "--limit" in part else args.limit
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, *sys.argv[1:], *part, "--scratch", scratch]
            try:
                print(f"bench.py: {' '.join(part)}", file=sys.stderr)
                code = max(code, abs(subprocess.run(command, timeout=limit).returncode))
            except subprocess.TimeoutExpired:
                print(f"bench.py: given up after {limit} s", file=sys.stderr)
                code = max(code, 1)
            except KeyboardInterrupt:  # the parts that ended are shown
                code = 130
                parts.clear()
            if (file := Path(scratch, "records")).exists():
                records += map(json.loads, file.read_text().splitlines())
    write_table(records)
    if args.out and records:
        cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text() + "model name: ?")
        about = {name: metadata.version(name) for name in ("jax", "torch", *PEERS)
                 if util.find_spec(name)} | {"cpu": f"{os.cpu_count()} x {cpu[1]}"}
        about |= {"command": shlex.join(["bench.py", *sys.argv[1:]])}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.jsonl").write_text("\n".join(map(json.dumps, [about, *records])))
        if points := [found for found in records if "intensity" in found]:
            draw(points, args.out / "roofline.png")
    return code

if __name__ == "__main__":
    args = arguments()
    sys.exit(measure(args) if args.scratch else main(args))
