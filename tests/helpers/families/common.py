"""What a family of model files is to the tests, and what several families share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch


@dataclass(frozen=True)
class Mutation:
    """A fault: `text` of the model file becomes `replacement`; seen on the config called so."""

    text: str
    replacement: str
    config: str = "plain"
    seen: tuple[str, str] = ("stream", "logits")  # where: see Case.worst


@dataclass(frozen=True)
class Family:
    module: ModuleType
    hf_config: Callable  # (sizes) -> the config of transformers
    sizes: dict  # the config that is called plain
    configs: dict[str, dict]  # what the others change in it
    parts: Callable  # (model, tokens, x) -> {name: array}
    hf_parts: Callable  # (model, tokens, x) -> {name: tensor}
    hf_blocks: Callable  # model -> its blocks
    mutations: dict[str, Mutation]
    core: str  # the config that stands for all in the core suite
    width: str  # what config.json calls D,
    depth: str  # the number of layers
    context: str  # and the longest text
    dropouts: tuple[str, ...]  # the rates of dropout in config.json
    table: str  # the module that is the token table
    matrix: str  # the path of a matrix of layer 1 that is not square
    activation: str = "activation_function"  # what config.json calls it
    halves: tuple[str, ...] = ("bfloat16", "float16")  # dtypes beside float32
    buffers: tuple[str, ...] = ()  # tensors of old files that are no parameters
    cut: dict = field(default_factory=dict)  # makes the published size small enough for a test
    hf_names: Callable = lambda gradients: gradients  # as transformers names them -> as files do

    @property
    def name(self) -> str:
        return self.module.__name__

    def config(self, name: str = "plain"):
        """The transformers config of that name."""
        return self.hf_config(**(self.sizes | self.configs[name]))


def slots(module, model, x):
    """The part of an empty cache that attention writes the keys and values of x into."""
    return module.init_cache(model.config, *x.shape[:2], x.dtype).layers[0]


def causal_bias(x, window=None):
    """x [B, T, D] -> [1, 1, T, T] to be added to scores: the lowest number where a token does not
    look, above the diagonal and a window or more below it."""
    T = x.shape[1]
    hidden = torch.ones(T, T).triu(1) + torch.ones(T, T).tril(-(window or T))
    return (hidden.to(x.dtype) * torch.finfo(x.dtype).min)[None, None]


VISIBLE = "(k_pos >= 0) & (k_pos >= first) & (k_pos <= q_pos)"

MASK_FAULTS = {
    "a token does not see itself": Mutation(VISIBLE, VISIBLE.replace("<=", "<")),
    "a token sees the next one": Mutation("(k_pos <= q_pos)", "(k_pos <= q_pos + 1)"),
}
