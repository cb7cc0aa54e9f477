"""The parts of `layers.py`: caches, prefixes, windows, positions, residuals, and modules that take a mixer's place."""

import math

import pytest
import torch
import torch.nn.functional as F
from marks import needs_kernels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import xformer_fast
from xformer_fast import layers, mixers
from xformer_fast.layers import Attention, FeedForward, Prefix, Residual, Stack, TransformerLayer
from xformer_fast.models import GPT
from xformer_fast.positions import sinusoids

DIM, HEADS = 64, 4


def tokens(batch=2, length=10, dim=DIM, seed=0):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def image(height=10, width=13):
    return torch.randn(2, height, width, DIM, generator=torch.Generator().manual_seed(0))


def positions_of(name):
    return layers.make_positions(name, dim=DIM, num_heads=HEADS, max_length=64, bidirectional=False)


def decoder(mixer, prefix=0):
    torch.manual_seed(0)
    stack = Stack(
        TransformerLayer(
            DIM,
            Attention(DIM, HEADS, num_kv_heads=2, mixer=mixer),
            FeedForward(DIM, 128, "swiglu"),
            cross=Attention(DIM, HEADS),
            norm="rms",
        )
        for _ in range(2)
    )
    for layer in stack if prefix else ():
        layer.mixer.branch.prefix = Prefix(prefix, 2, DIM // HEADS)
    return stack


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize(
    ("mixer", "name"),
    [("softmax", n) for n in ("none", "sinusoidal", "learned", "rope", "alibi", "t5")]
    + [("linear", n) for n in ("none", "sinusoidal", "learned")],
)
def test_cached_equals_whole(mixer, name, prefix):
    """Prompts of two lengths, then a token each, then the rows change places and take three tokens at once."""
    positions, stack, x, memory = positions_of(name), decoder(mixer, prefix), tokens(), tokens(length=7, seed=1)
    options, lengths = {"causal": True, **positions.options()}, torch.tensor([7, 3])
    whole = stack(positions(x), memory, memory_lengths=lengths, **options)
    cache = stack.new_cache(2, 16)

    def step(x, memory, lengths, **given):
        return stack(positions(x, cache.lengths), memory, memory_lengths=lengths, cache=cache, **options, **given)

    prompt = step(x[:, :4], memory, lengths, key_lengths=torch.tensor([4, 2]))
    torch.testing.assert_close(prompt[0], whole[0, :4])
    torch.testing.assert_close(prompt[1, :2], whole[1, :2])
    out = step(torch.stack([x[0, 4:5], x[1, 2:3]]), memory, lengths)
    torch.testing.assert_close(out, torch.stack([whole[0, 4:5], whole[1, 2:3]]))
    cache.reorder(torch.tensor([1, 0]))
    out = step(torch.stack([x[1, 3:6], x[0, 5:8]]), memory.flip(0), lengths.flip(0))
    torch.testing.assert_close(out, torch.stack([whole[1, 3:6], whole[0, 5:8]]))
    assert cache.lengths.tolist() == [6, 8]


@pytest.mark.parametrize("mixer", ["softmax", "linear"])
def test_rows_change_places_before_the_first_token(mixer):
    cache = decoder(mixer).new_cache(2, 16)
    cache.reorder(torch.tensor([1, 0]))
    assert cache.lengths.tolist() == [0, 0]


CONSTANTS = {  # mixer: (op, one value of each constant that is not its default, shape of the places)
    "softmax": ("attention", {"scale": 0.3, "softcap": 2.0, "window": (2, 1)}, (10,)),
    "linear": ("linear_attention", {"feature_map": "relu", "normalize": False, "scale": 0.3}, (10,)),
    "window": ("window_attention", {"window_size": 4, "shift": 1, "partition": "window", "scale": 0.3}, (8, 4)),
    "neighborhood": ("neighborhood_attention", {"kernel_size": 3, "dilation": 2, "causal": True, "scale": 0.3}, (8, 6)),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CONSTANTS)
def test_each_constant_of_a_mixer_reaches_the_op(name, monkeypatch):
    op, constants, space = CONSTANTS[name]
    seen, run = {}, getattr(mixers, op)

    def spy(*tensors, **options):
        seen.update(options)
        return run(*tensors, **options)

    monkeypatch.setattr(mixers, op, spy)
    mixer = mixers.MIXERS[name](HEADS, 16, **constants, backend="reference").eval()
    assert mixer(*torch.randn(3, 2, *space, HEADS, 16).unbind()).shape == (2, *space, HEADS, 16)
    sizes = "window_size", "kernel_size"  # given in place, not by name
    assert {n: seen[n] for n in constants if n not in sizes} == {n: v for n, v in constants.items() if n not in sizes}
    assert seen["backend"] == "reference"


@torch.no_grad()
@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_a_mixer_decodes_with_its_constants(name):
    torch.manual_seed(0)
    mixer = mixers.MIXERS[name](HEADS, 16, **CONSTANTS[name][1] | ({"window": (2, 0)} if name == "softmax" else {}))
    query, key, value = torch.randn(3, 2, 7, HEADS, 16)
    cache = mixer.new_cache(2, HEADS, 16, 8, query)
    out = [mixer.decode(*(x[:, tokens] for x in (query, key, value)), cache) for tokens in (slice(0, 5), slice(5, 7))]
    torch.testing.assert_close(torch.cat(out, 1), mixer(query, key, value, causal=True))


@pytest.mark.parametrize("options", ["plain", "lengths", "mask", "bias", "cross"])
def test_prefix_is_keys_and_values_before_the_rest(options):
    torch.manual_seed(0)
    attention, x = Attention(DIM, HEADS, num_kv_heads=2), tokens()
    attention.prefix = Prefix(3, 2, DIM // HEADS)
    keep = torch.rand(2, 1, 10, 10) < 0.7
    memory = tokens(length=10, seed=1) if options == "cross" else x
    given, spelled = {
        "plain": ({"causal": True}, {"causal": True}),
        "lengths": ({"key_lengths": torch.tensor([10, 4])}, {"key_lengths": torch.tensor([13, 7])}),
        "mask": ({"mask": keep}, {"mask": F.pad(keep, (3, 0), value=True)}),
        "bias": ({"mask": keep.float()}, {"mask": F.pad(keep.float(), (3, 0))}),
        "cross": ({}, {}),
    }[options]
    out = attention(x, memory if options == "cross" else None, **given)
    query, key, value = (
        f(y).unflatten(-1, (-1, 16)).transpose(1, 2)
        for f, y in ((attention.query, x), (attention.key, memory), (attention.value, memory))
    )
    key, value = (
        torch.cat((first.transpose(0, 1).expand(2, -1, -1, -1), x), 2)
        for first, x in ((attention.prefix.key, key), (attention.prefix.value, value))
    )
    expected = xformer_fast.attention(query, key, value, **spelled)
    torch.testing.assert_close(out, attention.out(expected.transpose(1, 2).flatten(2)))
    out.sum().backward()
    assert attention.prefix.key.grad.abs().sum() > 0 and attention.prefix.value.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("options", [{"shift": 3}, {"partition": "grid"}, {"cosine": True, "relative_bias": False}])
def test_windows_pad_maps_before_the_projection(options):
    torch.manual_seed(0)
    attention, x = Attention(DIM, HEADS, mixer="window", window_size=7, **options), image()
    position = torch.randn(10, 13, DIM)
    placed, padded = F.pad(x + position, (0, 0, 0, 1, 0, 4)), F.pad(x, (0, 0, 0, 1, 0, 4))
    query, key, value = (
        f(y).unflatten(-1, (HEADS, -1))
        for f, y in ((attention.query, placed), (attention.key, placed), (attention.value, padded))
    )
    mixer, cosine = attention.mixer, options.get("cosine")
    expected = xformer_fast.window_attention(
        query, key, value, 7, shift=options.get("shift", 0), partition=options.get("partition", "window"),
        relative_bias_table=mixer.relative_bias_table,
        logit_scale=torch.full((HEADS,), 10.0) if cosine else None,
    )  # fmt: skip
    torch.testing.assert_close(attention(x, position=position), attention.out(expected.flatten(3))[:, :10, :13])


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "x"), [(5, image()), ((7,), tokens())])
def test_neighborhoods(kernel, x):
    attention = Attention(DIM, HEADS, num_kv_heads=2, mixer="neighborhood", kernel_size=kernel, causal=True)
    query, key, value = (f(x).unflatten(-1, (-1, 16)) for f in (attention.query, attention.key, attention.value))
    expected = xformer_fast.neighborhood_attention(
        query, key, value, kernel, causal=True, relative_bias_table=attention.mixer.relative_bias_table
    )
    torch.testing.assert_close(attention(x, key_lengths=None), attention.out(expected.flatten(-2)))


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "linear"])
def test_maps_are_tokens(mixer):
    attention, x = Attention(DIM, HEADS, mixer=mixer), image()
    torch.testing.assert_close(attention(x).flatten(1, 2), attention(x.flatten(1, 2)))
    queries = tokens()
    torch.testing.assert_close(attention(queries, x), attention(queries, x.flatten(1, 2)))


@torch.no_grad()
def test_positions_join_queries_and_keys_alone():
    """As in DETR: added to what is projected to queries and keys, in both attentions of a layer, and not to values."""
    torch.manual_seed(0)
    layer = TransformerLayer(
        DIM, Attention(DIM, HEADS), FeedForward(DIM, 128), cross=Attention(DIM, HEADS), norm_first=False
    )
    x, memory, position, memory_position = tokens(), tokens(length=7, seed=1), tokens(seed=2), tokens(1, 7, seed=3)

    def attend(attention, query, key, value):
        query, key, value = (
            f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for f, y in ((attention.query, query), (attention.key, key), (attention.value, value))
        )
        return attention.out(xformer_fast.attention(query, key, value).transpose(1, 2).flatten(2))

    y = layer.mixer.norm(x + attend(layer.mixer.branch, x + position, x + position, x))
    y = layer.cross.norm(y + attend(layer.cross.branch, y + position, memory + memory_position, memory))
    y = layer.feed_forward(y)
    torch.testing.assert_close(layer(x, memory, position=position, memory_position=memory_position), y)


class Pooling(nn.Module):
    """PoolFormer's mixer: Yu et al., "MetaFormer is Actually What You Need for Vision" (2022)."""

    def forward(self, x):
        return (F.avg_pool2d(x.movedim(-1, 1), 3, 1, 1, count_include_pad=False) - x.movedim(-1, 1)).movedim(1, -1)


class Depthwise(nn.Conv2d):
    """ConvNeXt's and RepLKNet's."""

    def __init__(self, dim, kernel):
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


@pytest.mark.parametrize("mixer", [Pooling(), Depthwise(DIM, 7), nn.Identity()])
def test_any_module_mixes(mixer):
    layer = TransformerLayer(DIM, mixer, FeedForward(DIM, 128), layer_scale=0.5)
    x = image()
    y = x + 0.5 * mixer(layer.mixer.norm(x))
    torch.testing.assert_close(layer(x), y + 0.5 * layer.feed_forward.branch(layer.feed_forward.norm(y)))


def test_residual():
    x, branch = tokens(), nn.Linear(DIM, DIM)
    norm = nn.LayerNorm(DIM, eps=1e-3)
    torch.testing.assert_close(Residual(DIM, branch, norm_eps=1e-3)(x), x + branch(norm(x)))
    torch.testing.assert_close(Residual(DIM, branch, norm_eps=1e-3, norm_first=False)(x), norm(x + branch(x)))
    torch.testing.assert_close(Residual(DIM, branch, norm=None, weight=0.5)(x), x + 0.5 * branch(x))
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(Residual(DIM, branch, norm="rms", norm_eps=1e-3)(x), x + branch(rms))
    group = Residual(DIM, branch, norm=lambda dim: nn.Tanh())
    torch.testing.assert_close(group(x), x + branch(x.tanh()))


def test_drop_path_drops_whole_samples():
    torch.manual_seed(0)
    x, branch = tokens(2000, 2, 4), nn.Identity()
    residual = Residual(4, branch, norm=None, drop_path=0.25)
    ratio = (residual(x) / x).flatten(1)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5)
    kept = ratio[:, 0] > 1.5
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 + 1 / 0.75))
    assert abs(kept.float().mean() - 0.75) < 0.04
    torch.testing.assert_close(residual.eval()(x), 2 * x)


@torch.no_grad()
def test_dropout_is_for_training():
    layer = TransformerLayer(
        DIM, Attention(DIM, HEADS, attention_dropout=0.5), FeedForward(DIM, 128, dropout=0.5), dropout=0.5
    )
    assert not torch.equal(layer(tokens()), layer(tokens()))
    assert torch.equal(layer.eval()(tokens()), layer(tokens()))
    attention = Attention(DIM, HEADS, attention_dropout=0.5)
    assert not torch.equal(attention(tokens()), attention(tokens()))


@torch.no_grad()
def test_feed_forwards():
    x, erf = tokens(), torch.special.erf
    functions = {
        "relu": lambda x: x.clamp(min=0),
        "gelu": lambda x: x * 0.5 * (1 + erf(x / 2**0.5)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "silu": lambda x: x / (1 + torch.exp(-x)),
    }
    for name, function in functions.items():
        layer = FeedForward(DIM, 128, name)
        torch.testing.assert_close(layer(x), layer.down(function(layer.up(x))))
    for name, plain in {"reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}.items():
        layer = FeedForward(DIM, 128, name, bias=False)
        torch.testing.assert_close(layer(x), layer.down(functions[plain](layer.gate(x)) * layer.up(x)))
        assert layer.up.bias is None


@torch.no_grad()
def test_positions():
    x, starts = torch.zeros(2, 3, 8), torch.tensor([0, 5])
    table = sinusoids(torch.arange(8), 8)
    torch.testing.assert_close(table[:, 0::2], (torch.arange(8)[:, None] * 10000.0 ** (-torch.arange(4) / 4)).sin())
    sinusoidal = layers.SinusoidalPositions(8)
    torch.testing.assert_close(sinusoidal(x, starts), torch.stack((table[:3], table[5:8])))
    torch.testing.assert_close(sinusoidal(x, 2), table[2:5].expand(2, -1, -1))
    torch.testing.assert_close(layers.SinusoidalPositions(8, first=2)(x), table[2:5].expand(2, -1, -1))
    halves = sinusoids(torch.arange(3), 8, halves=True)
    torch.testing.assert_close(halves[2, 4:], (2 * 10000.0 ** (-torch.arange(4) / 3)).cos())
    learned = layers.LearnedPositions(8, 8)
    torch.testing.assert_close(learned(x, starts), torch.stack((learned.table.weight[:3], learned.table.weight[5:])))
    assert layers.Positions()(x) is x and layers.Positions().options() == {}
    with pytest.raises(ValueError, match="9 tokens: positions were learned for 8"):
        learned(torch.zeros(1, 9, 8))


@torch.no_grad()
def test_tables_stay_exact_in_half_models():
    for name, key, table in (("rope", "rope", "cos"), ("alibi", "alibi_slopes", None)):
        positions, whole = positions_of(name), positions_of(name)
        ours, theirs = (p.options()[key] for p in (positions.bfloat16(), whole))
        ours, theirs = (x if table is None else getattr(x, table) for x in (ours, theirs))
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
        assert not positions.state_dict()


@pytest.mark.parametrize("name", ["rope", "alibi"])
def test_tables_of_a_model_built_without_memory(name):
    def build():
        return GPT(11, dim=32, depth=1, num_heads=2, max_length=20, positions=name)

    made = build().eval()
    with torch.device("meta"):
        empty = build().eval()
    assert all(table.is_meta for table in empty.half().float().positions.buffers())
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(made.state_dict())
    tables = dict(made.positions.named_buffers())
    assert tables and tables.keys() == dict(empty.positions.named_buffers()).keys()
    for key, table in empty.positions.named_buffers():
        assert table.dtype == torch.float32 and torch.equal(table, tables[key])
    tokens = torch.arange(9)[None]
    assert torch.equal(empty(tokens), made(tokens))


def test_autocast_and_half():
    layer, x = decoder("softmax"), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, tokens(seed=1), causal=True)
    out.float().sum().backward()
    assert layer[0].mixer.branch.query.weight.grad.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads unless head_dim is given, got 64 and 5"):
        Attention(64, 5)
    assert Attention(64, 5, head_dim=8)(tokens()).shape == (2, 10, 64)
    with pytest.raises(ValueError, match=r"mixer must be one of softmax, .*, a module or a class, got 'quadratic'"):
        Attention(64, 4, mixer="quadratic")
    with pytest.raises(ValueError, match=r"activation must be one of relu, .* got 'elu'"):
        FeedForward(64, 64, "elu")
    with pytest.raises(ValueError, match="norm must be one of layer, rms, a function of dim, or None, got 'batch'"):
        Residual(64, nn.Identity(), norm="batch")
    with pytest.raises(ValueError, match=r"positions must be one of none, .* or a Positions, got 'absolute'"):
        positions_of("absolute")
    with pytest.raises(TypeError, match="unexpected keyword argument 'window_size'"):
        Attention(64, 4, window_size=7)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rope'"):
        Attention(64, 4, mixer="linear")(tokens(), **positions_of("rope").options())
    with pytest.raises(xformer_fast.BackendUnavailable):
        Attention(64, 4, backend="triton")(tokens())


class Operators(TorchDispatchMode):
    """The package's operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "xformer_fast":
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("softmax", {}),
        ("linear", {}),
        ("relative", {}),
        ("window", {"window_size": 5}),
        ("neighborhood", {"kernel_size": 5}),
    ],
)
def test_every_mixer_hands_its_backend_to_the_op(mixer, options):
    """backend="reference" calls no operator of the package, "cpu" one."""
    x = image(10, 10) if options else tokens()
    for backend, count in (("reference", 0), ("cpu", 1)):
        attention = Attention(DIM, HEADS, mixer=mixer, backend=backend, **options)
        with Operators() as operators:
            attention(x)
        assert len(operators.names) == count, operators.names
