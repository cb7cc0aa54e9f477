"""What a host may do to a map that was cut into windows, at random: the stand-in and the tensor stay equal."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from xformer_fast.integrations.follow import Trace
from xformer_fast.integrations.follow_windows import Moved
from xformer_fast.integrations.map_layout import layout_of


def cut_map(pick: random.Random):
    """A map that was rolled and cut: (its stand-in, the tensor)."""
    windows = pick.choice([(1, 2), (2, 1), (2, 3), (3, 2), (1, 1)])
    window = pick.choice([(2, 3), (3, 2), (2, 2), (1, 4)])
    height, width = (n * w for n, w in zip(windows, window, strict=True))
    shift = tuple(pick.randrange(w) for w in window) if pick.random() < 0.5 else (0, 0)
    batch, channels = pick.choice([1, 2]), pick.choice([4, 6, 12])
    x = torch.randn(batch, height, width, channels, dtype=torch.float64)
    if pick.random() < 0.5:  # windows, or a grid
        view = batch, windows[0], window[0], windows[1], window[1], channels
    else:
        view = batch, window[0], windows[0], window[1], windows[1], channels
    rolled = torch.roll(x, [-s for s in shift], (1, 2)) if any(shift) else x
    return Moved(Trace(None, True), x, layout_of(tuple(x.shape), shift)).view(view), rolled.view(view)


STEPS = (
    "permute", "transpose", "swap", "merge", "split", "contiguous", "linear", "norm", "mul", "add", "twice", "select",
    "unbind", "chunk", "cast",
)  # fmt: skip


def step(shape, pick: random.Random):
    """Something that a host may do to a tensor of this shape."""
    axes, place = len(shape), pick.randrange(len(shape))
    divisor = pick.choice([d for d in range(1, shape[place] + 1) if shape[place] % d == 0])
    choice = pick.choice(STEPS)
    if choice == "permute":
        order = pick.sample(range(axes), axes)
        return lambda x: x.permute(order) if divisor == 1 else x.permute(*order)
    if choice == "transpose":
        dims = place, pick.randrange(axes) - axes
        return lambda x: x.transpose(*dims)
    if choice == "swap":
        return lambda x: x.transpose(-1, -2)
    if choice == "merge" and place + 1 < axes:
        if divisor == 1:
            return lambda x: x.flatten(place, place + 1)
        return lambda x: x.reshape(*shape[:place], -1, *shape[place + 2 :])
    if choice == "split" and axes < 9:
        if divisor == 1:
            return lambda x: x.unflatten(place, (-1, divisor))
        return lambda x: x.reshape((*shape[:place], divisor, -1, *shape[place + 1 :]))
    if choice == "linear":
        weight, bias = torch.randn(pick.choice([1, 4, 12]), shape[-1]).double(), pick.random()
        return lambda x: F.linear(x, weight, torch.full((len(weight),), bias).double())
    if choice == "norm":
        return lambda x: F.layer_norm(x, shape[-1:])
    if choice in ("mul", "add"):
        last = shape[-pick.choice([1, 2, 3]) :]
        other = torch.randn([pick.choice([1, size, size]) for size in last]).double()
        return (lambda x: x * other) if choice == "mul" else (lambda x: other + x)
    if choice == "twice":
        return lambda x: (x + x) / 2
    if choice == "select" and axes > 2:
        return lambda x: x[divisor - 1 if shape[0] >= divisor else 0]
    if choice == "unbind" and axes > 2:
        return lambda x: x.unbind(place)[-1]
    if choice == "chunk" and divisor > 1:
        return lambda x: x.chunk(divisor, place - axes)[divisor // 2]
    if choice == "cast":
        return lambda x: x.to(torch.float64)
    return lambda x: x.contiguous()


def steps(pick: random.Random):
    """Makes steps, the first of them a packed projection and its parts, as often as not."""
    if pick.random() < 0.7:
        parts = pick.choice([(2, 3, 4), (3, 2, 4), (4, 1, 3), (2, 12)])
        weight = torch.randn(math.prod(parts), 12).double()
        yield lambda shape: lambda x: F.linear(x, weight[:, : shape[-1]])
        yield lambda shape: lambda x: x.view(*shape[:-1], *parts)
    for _ in range(8):
        yield lambda shape: step(shape, pick)


@pytest.mark.parametrize("seed", range(300))
def test_random_steps(seed):
    pick = random.Random(seed)
    torch.manual_seed(seed)
    stand_in, tensor = cut_map(pick)
    again, done = stand_in, []
    for make in steps(pick):
        done.append(make(tensor.shape))
        stand_in, tensor = done[-1](stand_in), done[-1](tensor)
        assert stand_in.shape == tensor.shape and stand_in.dtype == tensor.dtype
        if isinstance(stand_in, torch.Tensor):  # back in order, or moved as the host would
            break
    for function in done:  # once more, as it was remembered
        again = function(again)
    for ours in (stand_in, again):
        torch.testing.assert_close(ours if isinstance(ours, torch.Tensor) else ours.real(), tensor)


def test_most_steps_are_followed():
    """Else the test above would compare tensors with themselves."""
    followed = 0
    for seed in range(300):
        pick = random.Random(seed)
        stand_in, tensor = cut_map(pick)
        for make in steps(pick):
            function = make(tensor.shape)
            stand_in, tensor = function(stand_in), function(tensor)
            if isinstance(stand_in, torch.Tensor):
                break
            followed += 1
    assert followed >= 600
