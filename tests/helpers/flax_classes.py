"""The files that transformers' former Flax classes wrote."""

import torch
from flax import serialization, traverse_util
from transformers.pytorch_utils import Conv1D


def flax_parameters(hf):
    """The parameters of a PyTorch model, by path, as transformers' former Flax classes kept them.

    A Linear and a Conv1D had a kernel, transposed; a LayerNorm had a scale, an RMSNorm a weight.
    Names, shapes and layout were compared with files that transformers 4.52.4 wrote.
    """
    kinds = {
        torch.nn.Linear: "kernel",
        Conv1D: "kernel",
        torch.nn.LayerNorm: "scale",
        torch.nn.Embedding: "embedding",
    }
    parameters = {}
    for name, parameter in hf.named_parameters():  # a tied head is left out
        path, kind = name.rsplit(".", 1)
        if kind == "weight":
            module = hf.get_submodule(path)
            kind = next((new for cls, new in kinds.items() if isinstance(module, cls)), "weight")
        value = parameter.detach().numpy()
        parameters[f"{path}.{kind}"] = value.T if kind == "kernel" else value
    return parameters


def msgpack_of(parameters) -> bytes:
    """A file of such parameters: nested dictionaries of arrays."""
    return serialization.msgpack_serialize(traverse_util.unflatten_dict(parameters, sep="."))
