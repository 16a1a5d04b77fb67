"""The ways to int8 that people use, as functions that take a model and return a quantised one."""

import pytest
from torch import nn
from torch.ao.quantization import quantize_dynamic

try:
    from torchao import quantization as torchao
except ImportError:  # it has versions for new ones of PyTorch alone
    torchao = None

needs_torchao = pytest.mark.skipif(torchao is None, reason="needs torchao")


def dynamic(model):
    """PyTorch's own: one scale for all of a weight, and one for all activations of a call."""
    return quantize_dynamic(model, {nn.Linear})


def weights_alone(model):
    """torchao's: weights a row of each matrix; products in float32."""
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def dynamic_a_token(model):
    """torchao's: weights a row, activations a token."""
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


WAYS = {"dynamic": dynamic, "weights alone": weights_alone, "dynamic a token": dynamic_a_token}


def in_ways(*names):
    """Run a test with each of the named ways as `quantise`, where its library is installed."""
    marks = {name: () if name == "dynamic" else needs_torchao for name in names}
    params = [pytest.param(WAYS[name], marks=mark, id=name) for name, mark in marks.items()]
    return pytest.mark.parametrize("quantise", params)


ways = in_ways(*WAYS)
