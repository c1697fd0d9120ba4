"""Tests of files, and what several of them need."""

import os

import torch
from torch import nn

import prunewise as pw
from tests.zoo.registry import call, flat_tensors


def factory():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 5)
    )


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pruned(make=factory, x=X, seed=0, **choice):
    torch.manual_seed(seed)
    model = make()
    plan = pw.plan_channels(model, x, budget=pw.Budget(params=0.7), importance="random", seed=seed, **choice)
    return pw.apply_plan(model, plan, x).eval(), plan


def fail_at_write(patch, stop, error):
    """Of all calls of os.replace and os.fsync from now on the `stop`-th raises `error`; those made so far, as a list."""
    made = []

    def counted(function):
        def wrapper(*args, **kwargs):
            made.append(function)
            if len(made) == stop:
                raise error
            return function(*args, **kwargs)

        return wrapper

    for name in ("replace", "fsync"):
        patch.setattr(os, name, counted(getattr(os, name)))
    return made


def same(a, b, x):
    with torch.no_grad():
        left, right = flat_tensors(call(a, x)), flat_tensors(call(b, x))
    return len(left) == len(right) and all(
        p.dtype == q.dtype and torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(left, right, strict=True)
    )
