"""Blocks that roll a map, cut it into windows and put it together, followed: equal to what they compute themselves."""

import copy
import itertools
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from host_models import check_equal, disturb
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import xformer_fast
from xformer_fast.integrations import follow_windows
from xformer_fast.integrations.follow import Trace, following
from xformer_fast.integrations.follow_windows import masks_followed
from xformer_fast.integrations.map_layout import layout_of

DIM = 12


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call that reaches the op."""
    seen = []

    def window_attention(query, key, value, window, **options):
        seen.append({"window": window, "query": query} | options)
        return xformer_fast.window_attention(query, key, value, window, **options)

    monkeypatch.setattr(follow_windows, "window_attention", window_attention)
    monkeypatch.setattr(follow_windows, "_SEEN", set())
    return seen


def cut(x, window, grid):
    """(B, H, W, C) -> (B * windows, *window, C)"""
    batch, height, width, channels = x.shape
    a, b = window
    if grid:
        x = x.view(batch, a, height // a, b, width // b, channels).permute(0, 2, 4, 1, 3, 5)
    else:
        x = x.view(batch, height // a, a, width // b, b, channels).permute(0, 1, 3, 2, 4, 5)
    return x.contiguous().view(-1, a, b, channels)


def join(windows, window, size, grid):
    (height, width), (a, b), channels = size, window, windows.shape[-1]
    x = windows.view(-1, height // a, width // b, a, b, channels)
    x = x.permute((0, 3, 1, 4, 2, 5) if grid else (0, 1, 3, 2, 4, 5))
    return x.contiguous().view(-1, height, width, channels)


def region_mask(size, window, shift):
    """Swin's, (windows, N, N), of 0 and -100."""
    image = torch.zeros(1, *size, 1)
    pieces = [
        [slice(0, -w), slice(-w, -s or None), slice(-s or n, None)] for n, w, s in zip(size, window, shift, strict=True)
    ]
    for count, (rows, columns) in enumerate(itertools.product(*pieces)):
        image[:, rows, columns] = count
    parts = cut(image, window, False).flatten(1)
    apart = parts[:, None] - parts[:, :, None]
    return apart.masked_fill(apart != 0, -100.0)


class Block(nn.Module):
    """attend: one of the ways below, a method of the block on windows (B * windows, N, C)."""

    def __init__(self, window, shift=(0, 0), grid=False, heads=3, attend="sdpa", mask=None):
        super().__init__()
        self.window, self.shift, self.grid, self.heads, self.mask = window, shift, grid, heads, mask
        tokens = window[0] * window[1]
        self.qkv, self.proj, self.norm = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.LayerNorm(DIM)
        self.bias = nn.Parameter(torch.zeros(heads, tokens, tokens))
        self.logit_scale = nn.Parameter(torch.zeros(heads, 1, 1))
        self.places = nn.Parameter(torch.zeros(tokens, DIM))
        self.gain = nn.Parameter(torch.ones(DIM))
        self.attend = getattr(self, attend)
        disturb(self)

    def __deepcopy__(self, memo):  # a bound method would lead back to the original
        twin = copy.copy(self)
        twin._parameters = copy.deepcopy(self._parameters, memo)
        twin._modules = copy.deepcopy(self._modules, memo)
        twin.attend = getattr(twin, self.attend.__name__)
        return twin

    def split(self, x):
        """q, k and v, (B * windows, heads, N, D), out of a packed projection."""
        return self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x):
        return self.proj(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1))

    def masked(self, mask):
        """bias and mask as one, (B * windows, heads, N, N)."""
        windows, n = mask.shape[:2]
        mask = mask.view(1, windows, 1, n, n).expand(self.rows // windows, -1, self.heads, -1, -1)
        return self.bias.unsqueeze(0) + mask.reshape(-1, self.heads, n, n)

    def sdpa(self, x, mask):
        added = self.bias.unsqueeze(0) if mask is None else self.masked(mask)
        return self.merge(F.scaled_dot_product_attention(*self.split(x), attn_mask=added, dropout_p=0.0))

    def by_hand(self, x, mask):
        q, k, v = self.split(self.norm(x) * self.gain)
        return self.weigh((q * 0.6) @ k.transpose(-2, -1), v, mask)

    def cosine(self, x, mask):
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x).view(*x.shape[:2], self.heads, -1).chunk(3, dim=3))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return self.weigh(scores * self.logit_scale.clamp(max=4.6).exp(), v, mask)

    def weigh(self, scores, v, mask):
        scores = scores + self.bias.unsqueeze(0)
        if mask is not None:
            scores = scores.view(-1, mask.shape[0], *scores.shape[1:]) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, *scores.shape[2:])
        return self.merge(scores.softmax(dim=-1) @ v)

    def with_places(self, x, mask):
        """Tokens that know their place in the window: no longer alike."""
        return self.sdpa(x + self.places, mask)

    def own_biases(self, x, mask):
        """A bias that differs from window to window."""
        added = self.bias * torch.linspace(0, 1, x.shape[0])[:, None, None, None]
        return self.merge(F.scaled_dot_product_attention(*self.split(x), attn_mask=added))

    def forward(self, x):
        rolled = torch.roll(x, shifts=(-self.shift[0], -self.shift[1]), dims=(1, 2)) if any(self.shift) else x
        height, width = (-n % w for n, w in zip(x.shape[1:3], self.window, strict=True))
        rolled = F.pad(rolled, (0, 0, 0, width, 0, height))
        size = rolled.shape[1:3]
        windows = cut(rolled, self.window, self.grid)
        self.rows = windows.shape[0]
        mask = self.mask
        if mask is None and any(self.shift):
            mask = region_mask(size, self.window, self.shift)
        out = self.attend(windows.view(self.rows, -1, DIM), mask)
        out = join(out.view(-1, *self.window, DIM), self.window, size, self.grid)
        out = out[:, : x.shape[1], : x.shape[2], :].contiguous()
        return torch.roll(out, shifts=self.shift, dims=(1, 2)) if any(self.shift) else out


class FollowedBlock(Block):
    forward = following(Block.forward, None, lambda: True, follow_windows.WholeMap)


def compare(size=(6, 8), batch=2, told=False, **options):
    """told: tokens are moved, and a warning says so."""
    model = Block(**options)
    followed = copy.deepcopy(model)
    followed.__class__ = FollowedBlock
    followed.attend = getattr(followed, model.attend.__name__)
    x = torch.randn(batch, *size, DIM, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if told else "error")
        check_equal(model, followed, lambda model: model(x))


@pytest.mark.parametrize("attend", ["sdpa", "by_hand", "cosine"])
@pytest.mark.parametrize(
    "options",
    [
        {"window": (3, 4)},
        {"window": (3, 4), "shift": (1, 2)},
        {"window": (3, 2), "shift": (0, 1)},
        {"window": (2, 2), "shift": (1, 1), "batch": 1, "heads": 1},
        {"window": (6, 2)},
        {"window": (1, 4)},
        {"window": (3, 2), "grid": True},
        {"window": (3, 8), "grid": True, "batch": 1},
    ],
    ids=str,
)
def test_windows(options, attend, calls):
    compare(attend=attend, **options)
    assert len(calls) == 1 and calls[0]["window"] == options["window"]
    assert calls[0].get("shift", (0, 0)) == options.get("shift", (0, 0))
    assert calls[0]["partition"] == ("grid" if options.get("grid") else "window")
    assert calls[0]["query"].shape == (
        options.get("batch", 2),
        6,
        8,
        options.get("heads", 3),
        DIM // options.get("heads", 3),
    )
    assert ("logit_scale" in calls[0]) == (attend == "cosine")


class NormedBlock(Block):
    def forward(self, x):
        return super().forward(self.norm(x))


class FollowedNormedBlock(NormedBlock):
    forward = following(NormedBlock.forward, None, lambda: True, follow_windows.WholeMap)


@torch.no_grad()
@pytest.mark.parametrize("attend", ["sdpa", "by_hand", "cosine"])
@pytest.mark.parametrize(
    ("options", "kind", "size", "ways"),  # "mode": it was on; "fused": window_attention was reached
    [
        ({"window": (3, 4)}, FollowedBlock, (6, 8), ["mode fused", "fused", "fused"]),
        ({"window": (3, 2), "grid": True}, FollowedBlock, (6, 8), ["mode fused", "fused", "fused"]),
        ({"window": (3, 4), "shift": (1, 2)}, FollowedBlock, (6, 8), ["mode fused", "fused", "fused"]),
        ({"window": (3, 4), "shift": (1, 2), "mask": torch.zeros(4, 12, 12)}, FollowedBlock, (6, 8), ["mode"] * 3),
        ({"window": (6, 8)}, FollowedBlock, (6, 8), ["mode", "", ""]),
        ({"window": (3, 4)}, FollowedBlock, (5, 8), ["mode fused", "mode fused", "mode fused"]),  # padded first
        ({"window": (3, 4)}, FollowedNormedBlock, (6, 8), ["mode fused", "mode fused", "mode fused"]),
    ],
    ids=range(7),
)
def test_calls_after_the_first(options, kind, size, ways, attend, calls):
    if options["window"] == size and attend == "sdpa":  # a call of torch's sdpa, which the mode takes over
        ways = ["mode"] * 3
    model = Block(attend=attend, **options)
    model.__class__ = NormedBlock if kind is FollowedNormedBlock else Block
    followed = copy.deepcopy(model)
    followed.__class__ = kind
    followed.attend = types.MethodType(masks_followed(getattr(kind, attend)), followed)
    modes = []
    followed.qkv.register_forward_pre_hook(lambda *_: modes.append(torch._C._len_torch_function_stack()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for way in ways:
            x = torch.randn(2, *size, DIM)
            modes.clear(), calls.clear()
            assert (followed(x) - model(x)).abs().max() <= 1e-5
            assert (len(calls), modes) == ("fused" in way, ["mode" in way])
        for height in (6, 12) if model.mask is None else (6,):  # another shape is another matter
            for x in torch.randn(3, 1, height, 8, DIM):
                assert (followed(x) - model(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("attend", ["sdpa", "by_hand", "cosine", "with_places"])
@pytest.mark.parametrize(
    "options",
    [{"window": (3, 4)}, {"window": (3, 4), "shift": (1, 2)}, {"window": (3, 2), "grid": True}, {"window": (6, 8)}],
)
def test_a_first_call_that_is_checkpointed(options, attend):
    """What is computed again, in the second call, is what the first one computed."""
    model = Block(attend=attend, **options)
    followed = copy.deepcopy(model)
    followed.__class__ = FollowedBlock
    followed.attend = types.MethodType(masks_followed(getattr(FollowedBlock, attend)), followed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            check_equal(model, followed, lambda model: checkpoint(model, torch.ones(2, 6, 8, DIM), use_reentrant=False))


@torch.no_grad()
def test_what_else_is_done_to_the_map_is_done():
    """A method that writes to its argument, once it is known that all begins with that."""

    class Writing(Block):
        def forward(self, x):
            x.mul_(2)
            x += 1
            copy = x.clone()
            copy += x.permute(0, 3, 1, 2).mean((2, 3))[:, None, None]
            return super().forward(x) + F.relu(copy, inplace=True) * x.square()

    class FollowedWriting(Writing):
        forward = following(Writing.forward, None, lambda: True, follow_windows.WholeMap)

    model = Writing((3, 4), (1, 2))
    followed = copy.deepcopy(model)
    followed.__class__ = FollowedWriting
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            x = torch.randn(2, 6, 8, DIM)
            y = x.clone()
            torch.testing.assert_close(followed(x), model(y), rtol=1e-5, atol=1e-5)
            assert torch.equal(x, y)


@pytest.mark.parametrize("attend", ["sdpa", "by_hand", "cosine"])
def test_one_window_is_no_map(attend, calls):
    compare(window=(6, 8), attend=attend)
    assert not calls


@pytest.mark.parametrize("attend", ["sdpa", "by_hand", "cosine"])
@pytest.mark.parametrize("size", [(5, 8), (6, 7), (5, 5)])
def test_padding_after_the_roll_is_the_hosts(size, attend, calls):
    compare(size, window=(3, 4), shift=(1, 2), attend=attend, told=True)
    assert not calls
    compare(size, window=(3, 4), attend=attend)  # without a roll the padded map is cut as any
    assert len(calls) == 1


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
@pytest.mark.parametrize("attend", ["with_places", "own_biases"])
def test_tokens_that_are_not_alike_are_moved(attend, shift, calls):
    mask = None if attend == "with_places" else torch.zeros(4, 12, 12)
    compare(window=(3, 4), shift=shift, attend=attend, mask=mask, told=True)
    assert not calls


@pytest.mark.parametrize("attend", ["sdpa", "by_hand"])
def test_another_mask_is_not_believed(attend, calls):
    mask = region_mask((6, 8), (3, 4), (1, 2))
    for wrong in (mask / 200, mask.flip(0), torch.zeros_like(mask)):
        compare(window=(3, 4), shift=(1, 2), attend=attend, mask=wrong, told=True)
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bias_of_the_masks_shape(compiled, calls):
    """As many heads as windows, and no gradient to tell them apart."""
    model = Block((3, 4), (1, 2), heads=4, attend="sdpa", mask=region_mask((6, 8), (3, 4), (1, 2)))
    followed = copy.deepcopy(model)
    followed.__class__ = FollowedBlock
    x = torch.randn(2, 6, 8, DIM)
    run = torch.compile(followed, backend="eager", fullgraph=True) if compiled else followed
    assert (run(x) - model(x)).abs().max() <= 1e-5
    assert len(calls) == (not compiled)


def test_dropout_of_weights_is_the_hosts(calls):
    class Dropping(FollowedBlock):
        def sdpa(self, x, mask):
            return self.merge(F.scaled_dot_product_attention(*self.split(x), dropout_p=0.5))

    block, x = Dropping((3, 4)), torch.randn(1, 6, 8, DIM)
    with pytest.warns(UserWarning, match="Dropping: "):
        first = block(x)
    assert not torch.equal(first, block(x)) and not calls


def test_the_map_is_read_where_it_lies(calls):
    """q, k and v are views of the packed projection, whose tokens are those of the map in order."""
    block, x = FollowedBlock((3, 4), (1, 2)), torch.randn(2, 6, 8, DIM)
    block(x)
    query = calls[0]["query"]
    assert torch.equal(query.flatten(3), block.qkv(x)[..., :DIM]) and query.stride()[2] == 3 * DIM


def moved(sizes=(2, 4, 6, 3), window=(2, 3), shift=(1, 1)):
    x = torch.randn(sizes)
    trace = Trace(None, True)
    view = (sizes[0], sizes[1] // window[0], window[0], sizes[2] // window[1], window[1], sizes[3])
    rolled = torch.roll(x, [-s for s in shift], (1, 2)) if any(shift) else x
    stand_in = follow_windows.Moved(trace, x, layout_of(tuple(sizes), shift))
    return stand_in.view(view), rolled.view(view)


REARRANGED = {
    "permute": lambda x: x.permute(0, 1, 3, 2, 4, 5),
    "transpose": lambda x: x.transpose(2, 3).transpose(-1, 0),
    "flatten": lambda x: x.transpose(2, 3).flatten(3, 4).flatten(0, 2),
    "view": lambda x: x.transpose(2, 3).contiguous().view(-1, 6, 3),
    "linear": lambda x: F.linear(x, torch.arange(12.0).view(4, 3)).transpose(2, 3).unflatten(-1, (2, 2)).unbind(-2)[1],
    "select": lambda x: x.permute(5, 0, 1, 2, 3, 4)[1],
    "chunk": lambda x: F.linear(x, torch.arange(12.0).view(4, 3)).chunk(2, -1)[0].double(),
    "scaled": lambda x: (x * torch.arange(3.0) + torch.ones(1, 3)) / 2,
    "both": lambda x: x * 2 + x.relu(),
    "token by token": lambda x: x + torch.arange(2.0)[:, None, None, None],
    "reduced": lambda x: x.sum(-1),
    "cut otherwise": lambda x: x.reshape(2, 4, -1),
}


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
@pytest.mark.parametrize("name", REARRANGED)
def test_what_a_host_sees(name, shift):
    stand_in, tensor = moved(shift=shift)
    ours, theirs = REARRANGED[name](stand_in), REARRANGED[name](tensor)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.equal(ours if isinstance(ours, torch.Tensor) else ours.real(), theirs)


@torch.no_grad()
def test_sizes_that_are_symbols():
    block, x = FollowedBlock((3, 4)), torch.randn(2, 6, 8, DIM)
    graph = make_fx(block, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    assert "window_attention_cpu" in graph.code and torch.equal(graph(x), block(x))


def test_an_error_leaves_no_mode_behind(calls):
    class Wrong(FollowedBlock):
        def sdpa(self, x, mask):
            return F.linear(x, torch.zeros(3, DIM + 1))

    x = torch.randn(2, 6, 8, DIM)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Wrong((3, 4))(x)
    assert torch._C._len_torch_function_stack() == 0
    compare(window=(3, 4))
    assert len(calls) == 1


def test_windows_run_where_they_have_a_kernel():
    weight = torch.zeros(1)
    assert all(follow_windows.windows_run(weight, backend) for backend in ("cpu", "reference", None))
    assert not follow_windows.windows_run(weight, "triton")
