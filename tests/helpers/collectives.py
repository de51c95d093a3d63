"""Run by test_parallel.py, in a process that has 4 devices, with the name of a model and a number
of experts. For each way to split it this prints the largest error of the loss and its gradients
against one device, and the arrays that each layer makes travel in the compiled program.
"""

import importlib
import json
import re
import sys
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train

MESHES = {
    "data": {"data": 4},
    "fsdp": {"fsdp": 4},
    "tensor": {"tensor": 4},
    "data,tensor": {"data": 2, "tensor": 2},
    "fsdp,tensor": {"fsdp": 2, "tensor": 2},
}
COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(compiled) -> Counter:
    """How many arrays travel by each kind of operation; XLA may merge several into one."""
    found = Counter()
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            result = line[: match.start()].split(" = ", 1)[1]
            found[match[1]] += len(re.findall(r"\w+\[", result))
    return found


# ruff: noqa: B023  (the functions in the loops are used there)
def main(name, experts):
    module, found = importlib.import_module(name), {mode: {} for mode in MESHES}
    tokens = np.random.default_rng(0).integers(384, size=(8, 33))

    def mean_loss(build_model, params, tokens):
        return train.token_losses(build_model(params, nnx.State({})), train.next_tokens(tokens))[
            0
        ].mean()

    for layers in (1, 2):
        args = Namespace(layers=layers, heads=4, width=64, block=32, experts=int(experts))
        config = train.new_config(args, module, 384, None)
        graphdef, params = nnx.split(module.Model(config, rngs=nnx.Rngs(0)))
        plain = jax.device_get(
            jax.jit(
                jax.value_and_grad(
                    partial(mean_loss, lambda params, _: nnx.merge(graphdef, params))
                )
            )(params, tokens)
        )
        for mode, axes in MESHES.items():
            mesh = jax.sharding.Mesh(np.reshape(jax.devices(), [*axes.values()]), [*axes])
            where = nnx.state(nnx.eval_shape(lambda: module.Model(config, rngs=nnx.Rngs(0))))
            for path, param, *_ in module.named_parameters(where):
                param.set_value(module.sharding(mesh, config, path, param.shape))
            split = jax.device_put(params, where)
            jax.set_mesh(mesh)
            build_model = train.make_build_model(mesh, graphdef, jnp.float32, split, nnx.State({}))
            rows = tuple(axis for axis in axes if axis != "tensor")
            own = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(rows)))
            program = (
                jax.jit(
                    jax.value_and_grad(partial(mean_loss, build_model)), out_shardings=(None, where)
                )
                .lower(split, own)
                .compile()
            )
            errors = jax.tree.map(
                lambda a, b: float(np.abs(a - b).max()), jax.device_get(program(split, own)), plain
            )
            before, count = found[mode].get("all", Counter()), collectives(program)
            found[mode] = {
                "error": max(jax.tree.leaves(errors)),
                "all": count,
                "layer": {kind: n - before[kind] for kind, n in count.items() if n != before[kind]},
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
