"""The reference, transformers in float64, and how far from it a float32 model may be."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
# What is held against float64 is compiled as users have it, whatever conftest.py asks for.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
MATERIAL = ROOT.parent / "shared" / "material"  # real tokenizers and texts, where they are at hand


def write_random(family, config, folder, seed=0):
    """A checkpoint whose weights are random, but hide nothing.

    As initialised, matrices are so small that a wrong GELU moves the logits by 1e-5, and biases of
    0 and norms of 1 do nothing at all: so matrices are scaled by 5 and vectors get noise.
    """
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter *= 5
            else:
                parameter += 0.2 * torch.randn_like(parameter)
    hf.save_pretrained(folder)
    return folder


def read_hf(family, folder, dtype=torch.float32):
    """The reference model of a folder; attention in plain steps, so that `dtype` rules them all."""
    plain = {"attn_implementation": "eager"}
    if "num_local_experts" in json.loads((Path(folder) / "config.json").read_text()):
        plain["experts_implementation"] = "eager"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plain).eval()


def numpy(tensors):
    return {name: tensor.detach().to(torch.float64).numpy() for name, tensor in tensors.items()}


def sampling(temperature=1.0, repetition_penalty=1.0, **rest) -> dict:
    """What generate() makes of its arguments for sample()."""
    penalty = None if repetition_penalty == 1 else repetition_penalty
    return {"temperature": temperature or None, "repetition_penalty": penalty, **rest}


class Float64(TorchFunctionMode):
    """A `with` in which code that asks for float32, as many models do for norms and softmax, gets
    float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wider(x):
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wider, args), **{k: wider(x) for k, x in (kwargs or {}).items()})


def state_of(model):
    """path -> array of every parameter."""
    return {
        ".".join(map(str, keys)): param[...] for keys, param in nnx.to_flat_state(nnx.state(model))
    }


def assert_same_model(one, other):
    """Every parameter is the same, bit for bit."""
    assert one.config == other.config
    one, other = state_of(one), state_of(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value.dtype == other[path].dtype
        np.testing.assert_array_equal(value, other[path], err_msg=path)


class Case:
    """One checkpoint, and what this project and the reference make of it on the same input."""

    def __init__(self, family, folder, rows=3, length=24):
        self.family, self.folder = family, folder
        config = AutoConfig.from_pretrained(folder)
        rng = np.random.default_rng(1)
        # Without the padding token, which gets no gradient in transformers.
        ids = [token for token in range(config.vocab_size) if token != config.pad_token_id]
        self.tokens = rng.choice(ids, (rows, length))
        x = rng.normal(size=(rows, length, config.hidden_size))
        self.x = np.round(x * 256).astype(np.float32) / 256  # so that x + 100 is exact as well
        self.kept = {}

    def kept_once(self, what, make):
        if what not in self.kept:
            self.kept[what] = make()
        return self.kept[what]

    @property
    def model(self):
        return self.kept_once("model", lambda: self.family.module.load(self.folder))

    @property
    def hf64(self):
        return self.kept_once("hf64", lambda: read_hf(self.family, self.folder, torch.float64))

    @property
    def hf32(self):
        return self.kept_once("hf32", lambda: read_hf(self.family, self.folder))

    def exact(self, what):
        """The values of the reference in float64."""

        def values():
            with Float64():
                return hf_values(self, what, self.hf64)

        return self.kept_once((what, "exact"), values)

    def worst(self, what, module=None, factor=4) -> dict[str, tuple[float, float]]:
        """name -> (error, allowed error) for each quantity of `parts`, `stream` or `gradients`.

        Allowed is 4 times what float32 PyTorch is off, as another order of the same float32 steps
        may be so much less lucky; and where it is off by next to nothing, 4 roundings of the
        largest number.
        """
        exact = self.exact(what)
        rough = self.kept_once((what, "rough"), lambda: hf_values(self, what, self.hf32))
        ours = our_values(self, what, module or self.family.module)
        assert ours.keys() == exact.keys()
        result = {}
        for name, value in exact.items():
            assert ours[name].shape == value.shape
            error = np.abs(ours[name] - value).max()
            rounding = np.finfo(np.float32).eps / 2 * np.abs(value).max()
            result[name] = error, factor * max(np.abs(rough[name] - value).max(), rounding)
        return result

    def assert_close(self, what, factor=4):
        for name, (error, allowed) in self.worst(what, factor=factor).items():
            assert error <= allowed, f"{name} is off by {error:.1e}, and {allowed:.1e} is allowed"


def hf_values(case, what, hf):
    tokens = torch.tensor(case.tokens)
    if what == "parts":
        return numpy(case.family.hf_parts(hf, tokens, torch.tensor(case.x).to(hf.dtype)))
    if what == "stream":
        blocks, stream = case.family.hf_blocks(hf), {}
        hooks = [
            blocks[0].register_forward_pre_hook(
                lambda block, inputs: stream.update({"embedding": inputs[0]})
            )
        ]
        for i, block in enumerate(blocks):

            def record(block, inputs, output, i=i):
                stream[f"after block {i}"] = output

            hooks.append(block.register_forward_hook(record))
        stream["logits"] = hf(tokens).logits
        for hook in hooks:
            hook.remove()
        return numpy(stream)
    hf.zero_grad()
    logits = hf(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    return numpy(case.family.hf_names(gradients))


def our_values(case, what, module):
    model = case.model if module is case.family.module else module.load(case.folder)
    graphdef, state = nnx.split(model)
    tokens = jnp.array(case.tokens)

    @jit
    def parts(state):
        return case.family.parts(nnx.merge(graphdef, state), tokens, case.x)

    @jit
    def stream(state):
        return stream_of(module, nnx.merge(graphdef, state), tokens)

    def loss(state):
        logits = nnx.merge(graphdef, state)(tokens)[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -chosen.mean()

    if what == "gradients":
        values = {}
        for _, gradient, template, turned in module.named_parameters(jit(jax.grad(loss))(state)):
            value = np.asarray(gradient[...])
            names = module.names_of(template, gradient)
            for name, tensor in zip(names, value if len(names) > 1 else [value], strict=True):
                values[name] = tensor.T if turned else tensor
    else:
        values = {"parts": parts, "stream": stream}[what](state)
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


def stream_of(module, model, tokens):
    """What enters the first block, what leaves each one, and the logits."""
    stream, call = {}, module.Block.__call__

    def record(block, x, *rest):
        stream.setdefault("embedding", x)
        out = call(block, x, *rest)
        stream[f"after block {len(stream) - 1}"] = out[0]
        return out

    module.Block.__call__ = record
    try:
        return stream | {"logits": model(tokens)}
    finally:
        module.Block.__call__ = call


def mutated(module, mutation, folder):
    """A copy of a model file in which a fault was planted."""
    source = Path(module.__file__).read_text()
    assert source.count(mutation.text) == 1, f"the file has changed: {mutation.text!r} is not in it"
    path = Path(folder, f"mutated_{module.__name__}.py")
    path.write_text(source.replace(mutation.text, mutation.replacement))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant
