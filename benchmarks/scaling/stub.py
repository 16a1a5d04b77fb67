"""Stub: all layers until the chain can name its layers."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch

import rd_torch


def make(encoder, numbers, norm):
    kind = type("Layers" + type(encoder).__name__, (type(encoder),), {"forward": forward})
    new = copy.copy(encoder)
    new.__class__ = kind
    new.embed_dim = encoder.embed_dim * len(numbers)
    new._numbers, new._norm, new._modules = numbers, norm, dict(encoder._modules)
    return new


def forward(self, tokens, packing, sink=None):
    rotation = self.rotation(packing.positions)
    x = self.embedded(*self.weigh(tokens, packing, rotation[0].dtype))
    found = []
    for k, layer in enumerate(self.layers, start=1):
        x = layer(x, packing, rotation, sink)
        if k in self._numbers:
            found.append(self.final_norm(x) if self._norm or k == self.num_layers else x)
    return torch.cat(found, dim=1)


def side_by_side(model, most, norm):
    from benchmarks.scaling.layers import spread

    wide, widths = {}, {}
    for name, b in model.family().items():
        numbers = spread(b.num_layers, most)
        wide[name] = make(b, numbers, norm)
        widths |= {f"{name}@{k}": b.embed_dim for k in numbers}
    stages, width = [], 0
    for s, l in pairwise(wide.values()):
        width += s.embed_dim
        q = l.embed_dim
        stages.append(rd_torch.Stage(torch.zeros(width, q), torch.zeros(q), torch.zeros(q), torch.eye(q)))
    return rd_torch.RDModel(wide, stages).eval(), widths
