"""The transformer layer: small modules over the fused ops, of which every family in `xformer_fast.models` is made.

    x ──┬───────────────────────────────────────────┐            TransformerLayer = two or three Residuals:
        └─ norm ─ branch ─ dropout ─ · layer scale ─ + ── x'         mixer           Attention, or any module
                                                                     cross           Attention to a memory
    Residual, pre-norm; post-norm has its norm behind the +          feed_forward    FeedForward, or any module

A family is a choice of parts. `Attention` projects to heads and hands them to one of the `mixers`: softmax, linear,
window, ... Pooling, a convolution, anything that maps x to its own shape can stand in its place. x is tokens (B, S, C)
or a map (B, H, W, C). Positions are either added to x, or options of the op (`Positions.options()`), which every layer
hands down: `layer(x, causal=True, key_lengths=lengths, **positions.options())`. Masks, windows, sinks go the same way.

To generate, `Stack.new_cache` makes a `Cache`; `stack(x, cache=cache)` then takes only the new tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache
from .mixers import MIXERS, LinearState, pad_to_multiple
from .positions import T5Bias, alibi_slopes, sinusoids
from .rope import Rope, rope_frequencies, rope_tables


class Attention(nn.Module):
    """Projections to heads, a mixer, and the projection back; to itself, or across to a memory.

    Args:
        dim: channels of x. num_heads: of the query; num_kv_heads: of key and value where fewer (GQA).
        head_dim: dim / num_heads by default. memory_dim: channels of the memory where not dim.
        bias, out_bias: of the projections of query, key and value, and of the one back (default: as bias).
        mixer: "softmax", "linear", "window", "neighborhood", "relative" (see `mixers`), a module like these, or a class
            of such modules.
        mixer_options: arguments of the named mixer, or of the class, `backend` among them.

    `attention.prefix = Prefix(...)` puts learned keys and values before every sequence. The projections `query`, `key`,
    `value`, `out` are modules that can be replaced, by LoRA's or by CvT's convolutions.

    >>> import torch
    >>> from xformer_fast.layers import Attention
    >>> tokens, image = torch.randn(2, 10, 64), torch.randn(2, 14, 14, 64)
    >>> Attention(64, 4, num_kv_heads=2)(tokens, causal=True).shape
    torch.Size([2, 10, 64])
    >>> Attention(64, 4, mixer="window", window_size=7, shift=3)(image).shape
    torch.Size([2, 14, 14, 64])
    >>> Attention(64, 4)(tokens, image).shape  # tokens look at an image
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        memory_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        mixer: str | nn.Module | Callable[..., nn.Module] = "softmax",
        **mixer_options,
    ):
        super().__init__()
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads unless head_dim is given, got {dim} and {num_heads}")
        if isinstance(mixer, str) and mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, a module or a class, got {mixer!r}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_dim or dim // num_heads
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(dim, width, bias=bias)
        self.key = nn.Linear(memory_dim or dim, kv_width, bias=bias)
        self.value = nn.Linear(memory_dim or dim, kv_width, bias=bias)
        self.out = nn.Linear(width, dim, bias=bias if out_bias is None else out_bias)
        make = MIXERS[mixer] if isinstance(mixer, str) else mixer
        self.mixer = make if isinstance(make, nn.Module) else make(num_heads, self.head_dim, **mixer_options)
        self.prefix: Prefix | None = None

    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        position: Tensor | None = None,
        memory_position: Tensor | None = None,
        cache: "LayerCache | None" = None,
        **options,
    ) -> Tensor:
        """x (B, *space, C) -> the same shape.

        memory: what key and value are made of, (B, *space, C), or both made before by `keys_values`; None: x itself.
        position, memory_position: added where queries and keys are made, not to values (DETR, SAM).
        cache: of a causal layer that generates; x is then the new tokens. options: the mixer's; None is no option.
        """
        options = _given(**options)
        space, placed = x.shape[1:-1], x if position is None else x + position
        windows = getattr(self.mixer, "window_size", None)
        if windows is not None:
            x, placed = pad_to_multiple(x, windows), pad_to_multiple(placed, windows)
        query = self._heads(self.query(placed))
        if memory is None:
            key, value = self._heads(self.key(placed)), self._heads(self.value(x))
        else:
            key, value = memory if isinstance(memory, tuple) else self.keys_values(memory, memory_position)
        if cache is not None:
            out = self._decode(query, key, value, cache, options)
        else:
            if self.prefix is not None:
                key, value, options = self.prefix(key, value, options)
            out = self.mixer(query, key, value, **options)
        if windows is not None:
            out = out[(slice(None), *(slice(side) for side in space))]
        return self.out(out.flatten(-2))

    def keys_values(self, memory: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The keys and values (B, *space, Hkv, D) of a memory, to hand to `forward` again and again."""
        key = self.key(memory if position is None else memory + position)
        return self._heads(key), self._heads(self.value(memory))

    def new_cache(self, batch: int, capacity: int) -> "LayerCache":
        extra = 0 if self.prefix is None else self.prefix.key.shape[0]
        keys = self.mixer.new_cache(batch, self.num_kv_heads, self.head_dim, capacity + extra, next(self.parameters()))
        return LayerCache(keys)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _decode(self, query, key, value, cache: "LayerCache", options: dict) -> Tensor:
        if self.prefix is not None and not cache.has_prefix:
            keys, values = self.prefix.expanded(query.shape[0])
            nothing = query.new_zeros(query.shape[0], keys.shape[1], *query.shape[2:])
            self.mixer.decode(nothing, keys, values, cache.keys, **(options | {"key_lengths": None}))
            cache.has_prefix = True
        return self.mixer.decode(query, key, value, cache.keys, **options)


class Prefix(nn.Module):
    """Keys and values, learned, that stand before every sequence: Li and Liang, "Prefix-Tuning" (2021).

    They go straight into the op, as `length` tokens before the first one: causal queries all see them. key, value:
    (length, num_kv_heads, head_dim).

    >>> from xformer_fast.layers import Attention, Prefix
    >>> attention = Attention(64, 4).requires_grad_(False)
    >>> attention.prefix = Prefix(16, attention.num_kv_heads, attention.head_dim)
    """

    def __init__(self, length: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.key = nn.Parameter(torch.randn(length, num_kv_heads, head_dim))
        self.value = nn.Parameter(torch.randn(length, num_kv_heads, head_dim))

    def expanded(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.key.expand(batch, -1, -1, -1), self.value.expand(batch, -1, -1, -1)

    def forward(self, key: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, dict]:
        """Keys, values and the mixer's options, with the prefix before them."""
        length, key, value = self.key.shape[0], key.flatten(1, -3), value.flatten(1, -3)
        options = _lengthened(options, length, key.shape[1])
        first = self.expanded(key.shape[0])
        key, value = (torch.cat((f.to(x.dtype), x), 1) for f, x in zip(first, (key, value), strict=True))
        return key, value, options


def _lengthened(options: dict, length: int, keys: int, *, queries: bool = False) -> dict:
    """A mixer's options where `length` more keys, or keys and queries, stand before the `keys` that there are."""
    if options.get("key_lengths") is not None:
        options = options | {"key_lengths": options["key_lengths"] + length}
    mask = options.get("mask")
    if mask is not None and mask.shape[-1] == keys:
        before = (length, 0, length, 0) if queries and mask.shape[-2:] == (keys, keys) else (length, 0)
        options = options | {"mask": F.pad(mask, before, value=mask.dtype == torch.bool)}
    return options


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
GATED = {"reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}


class FeedForward(nn.Module):
    """down(act(up(x))), or gated, down(act(gate(x)) · up(x)): Shazeer, "GLU Variants Improve Transformer" (2020).

    activation: "relu", "gelu", "gelu_tanh", "silu"; gated "reglu", "geglu", "geglu_tanh", "swiglu".
    """

    def __init__(self, dim: int, hidden: int, activation: str = "gelu", *, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        if activation not in ACTIVATIONS | GATED:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS | GATED)}, got {activation!r}")
        self.activation = GATED.get(activation, activation)
        self.gate = nn.Linear(dim, hidden, bias=bias) if activation in GATED else None
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(self.dropout(hidden))


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def make_norm(norm: str | Callable[[int], nn.Module] | None, dim: int, eps: float = 1e-5) -> nn.Module:
    """A norm of `dim` channels: "layer", "rms", a function of dim, or None for none."""
    if norm is None:
        return nn.Identity()
    if callable(norm):
        return norm(dim)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, a function of dim, or None, got {norm!r}")
    return NORMS[norm](dim, eps=eps)


class Residual(nn.Module):
    """x + branch(norm(x)), or norm(x + branch(x)) without norm_first, as in the original Transformer.

    Args:
        branch: any module that maps (B, *space, dim) to the same shape; `forward` hands its other arguments to it.
        norm, norm_eps: see `make_norm`.
        weight: of the branch in the sum (Conformer's half steps).
        layer_scale: first value of a learned factor a channel: Touvron et al., "CaiT" (2021). None: no factor.
        dropout: of the branch. drop_path: how often a sample skips the branch in training (stochastic depth).
    """

    def __init__(
        self, dim: int, branch: nn.Module, *, norm="layer", norm_eps: float = 1e-5, norm_first: bool = True,
        weight: float = 1.0, layer_scale: float | None = None, dropout: float = 0.0, drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.norm, self.branch = make_norm(norm, dim, norm_eps), branch
        self.norm_first, self.weight = norm_first, weight
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.dropout, self.drop_path = nn.Dropout(dropout), drop_path

    def forward(self, x: Tensor, *args, **options) -> Tensor:
        y = self.dropout(self.branch(self.norm(x) if self.norm_first else x, *args, **options))
        if self.layer_scale is not None:
            y = y * self.layer_scale
        if self.training:
            y = drop_samples(y, self.drop_path)
        x = x + (y if self.weight == 1 else y * self.weight)
        return x if self.norm_first else self.norm(x)


def drop_samples(y: Tensor, rate: float) -> Tensor:
    """Zeros in place of whole samples of a branch, at a rate; the others grow by 1 / (1 - rate)."""
    if rate == 0:
        return y
    kept = torch.rand(y.shape[0], *[1] * (y.dim() - 1), device=y.device) >= rate
    return y * kept / (1 - rate)


class TransformerLayer(nn.Module):
    """Mixes places, then channels: Residual(mixer), Residual(cross) for a decoder, Residual(feed_forward).

    Args:
        dim: channels. mixer, feed_forward: modules that map x to its own shape, `Attention` and `FeedForward` mostly.
        cross: an `Attention` to the memory, or None.
        residual: arguments of every `Residual`: norm, norm_first, dropout, layer_scale, drop_path, ...

    >>> import torch
    >>> from xformer_fast.layers import Attention, FeedForward, TransformerLayer
    >>> layer = TransformerLayer(64, Attention(64, 4), FeedForward(64, 256, "swiglu"), norm="rms")
    >>> layer(torch.randn(2, 10, 64), causal=True).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self, dim: int, mixer: nn.Module, feed_forward: nn.Module, *, cross: nn.Module | None = None, **residual
    ):
        super().__init__()
        self.mixer = Residual(dim, mixer, **residual)
        self.cross = None if cross is None else Residual(dim, cross, **residual)
        self.feed_forward = Residual(dim, feed_forward, **residual)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, *, memory_lengths=None, memory_mask=None, position=None,
        memory_position=None, cache: "LayerCache | None" = None, **options,
    ) -> Tensor:  # fmt: skip
        """x (B, *space, C) -> the same shape.

        memory, memory_lengths, memory_mask: what `cross` attends to, its lengths (B,), and its mask.
        position, memory_position: see `Attention`. cache: see `Stack.new_cache`. options: of the mixer.
        """
        x = self.mixer(x, **_given(position=position, cache=cache), **options)
        if self.cross is not None:
            if cache is not None and cache.memory is None:
                cache.memory = self.cross.branch.keys_values(memory, memory_position)
            given = _given(position=position, memory_position=memory_position)
            given |= _given(key_lengths=memory_lengths, mask=memory_mask)
            x = self.cross(x, memory if cache is None else cache.memory, **given)
        return self.feed_forward(x)


def _given(**options) -> dict:
    return {name: value for name, value in options.items() if value is not None}


class Stack(nn.ModuleList):
    """`TransformerLayer`s one after another: `stack(x, memory, cache=cache, **options)`.

    `stack.prompt`, an nn.Parameter (1, P, C), puts P learned tokens before every sequence, which are not in the result:
    Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning" (2021). With (depth, P, C) each layer has
    its own in their place: Jia et al., "Visual Prompt Tuning" (2022), deep. x is then (B, S, C), without `position`.
    """

    def __init__(self, layers: Iterable[nn.Module] = ()):
        super().__init__(layers)
        self.register_parameter("prompt", None)

    def forward(self, x: Tensor, *args, cache: "Cache | None" = None, **options) -> Tensor:
        tokens, lengths, prompted = x.shape[1], options.get("key_lengths"), 0
        if self.prompt is not None and (x.dim() != 3 or "position" in options):
            raise ValueError(f"a prompt stands before tokens (B, S, C) without `position`, x has {x.dim()} axes")
        if self.prompt is not None and not (cache is not None and cache.has_prompt):
            prompted = self.prompt.shape[1]
            x, options = torch.cat((self._prompt(x, 0), x), 1), _lengthened(options, prompted, tokens, queries=True)
        for i, layer in enumerate(self):
            if prompted and 0 < i < len(self.prompt):
                x = torch.cat((self._prompt(x, i), x[:, prompted:]), 1)
            x = layer(x, *args, **_given(cache=None if cache is None else cache.layers[i]), **options)
        if cache is not None:
            cache.lengths = cache.lengths + (tokens if lengths is None else lengths)
            cache.has_prompt = self.prompt is not None
        return x[:, prompted:]

    def _prompt(self, x: Tensor, layer: int) -> Tensor:
        return self.prompt[layer].to(x.dtype).expand(x.shape[0], -1, -1)

    def new_cache(self, batch: int, capacity: int) -> "Cache":
        """An empty cache for `batch` sequences of at most `capacity` tokens."""
        capacity += 0 if self.prompt is None else self.prompt.shape[1]
        layers = [layer.mixer.branch.new_cache(batch, capacity) for layer in self]
        return Cache(layers, torch.zeros(batch, dtype=torch.int64, device=next(self.parameters()).device))


# ---- what a stack keeps while it generates


@dataclass
class LayerCache:
    """One layer's past: keys and values of its own tokens, and those of the memory, made once."""

    keys: KVCache | LinearState
    memory: tuple[Tensor, Tensor] | None = None
    has_prefix: bool = False


@dataclass
class Cache:
    """A stack's past. lengths: (B,) int64, the tokens of each sequence so far, where the next one stands."""

    layers: list[LayerCache]
    lengths: Tensor
    has_prompt: bool = False

    def reorder(self, rows: Tensor):
        """Row b becomes what row rows[b] was, as beams want it. rows: (B,) int64."""
        self.lengths = self.lengths[rows]
        for layer in self.layers:
            layer.keys.reorder(rows)
            if layer.memory is not None:
                layer.memory = tuple(x[rows] for x in layer.memory)


# ---- positions


class Positions(nn.Module):
    """How tokens know their places: added to x (`forward`), or told to the op (`options`). This one: not at all.

    Tables (`tables`, registered as buffers) move with the module, but keep float32 when it becomes half. A module that
    was built on the meta device makes them anew where it gets memory.
    """

    def register_tables(self):
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """What is computed from the arguments alone."""
        return {}

    def forward(self, x: Tensor, start: Tensor | int = 0) -> Tensor:
        """x (B, S, C), whose first tokens stand at `start`, one number or (B,)."""
        return x

    def options(self) -> dict:
        return {}

    def _apply(self, fn, recurse=True):
        tables = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        devices = {name: getattr(self, name).device for name in tables}
        if any(table.is_meta and devices[name].type != "meta" for name, table in tables.items()):
            with torch.device("cpu"):
                tables = self.tables()
        for name, table in tables.items():
            setattr(self, name, table.to(devices[name]))
        return self


def _places(x: Tensor, start: Tensor | int) -> Tensor:
    offsets = torch.arange(x.shape[1], device=x.device)
    return offsets + (start[:, None] if isinstance(start, Tensor) else start)


class SinusoidalPositions(Positions):
    """Adds `sinusoids` of the places, counted from `first`; halves: in tensor2tensor's and fairseq's form."""

    def __init__(self, dim: int, *, halves: bool = False, first: int = 0):
        super().__init__()
        self.dim, self.halves, self.first = dim, halves, first

    def forward(self, x: Tensor, start: Tensor | int = 0) -> Tensor:
        return x + sinusoids(_places(x, start) + self.first, self.dim, halves=self.halves).to(x.dtype)


class LearnedPositions(Positions):
    """Adds a learned vector a place, for places below max_length."""

    def __init__(self, max_length: int, dim: int):
        super().__init__()
        self.table = nn.Embedding(max_length, dim)

    def forward(self, x: Tensor, start: Tensor | int = 0) -> Tensor:
        end = x.shape[1] + (start if isinstance(start, int) else 0)
        if end > self.table.num_embeddings:
            raise ValueError(f"{end} tokens: positions were learned for {self.table.num_embeddings}")
        return x + self.table(_places(x, start))


class RotaryPositions(Positions):
    """RoPE: queries and keys turn with their place, inside the op. scaling: see `rope_frequencies`."""

    def __init__(self, head_dim: int, max_length: int, *, base=10000.0, scaling=None, interleaved=False):
        super().__init__()
        self.head_dim, self.max_length = head_dim, max_length
        self.base, self.scaling, self.interleaved = base, scaling, interleaved
        self.register_tables()

    def tables(self) -> dict[str, Tensor]:
        inv_freq, factor = rope_frequencies(
            self.head_dim, base=self.base, scaling=self.scaling, max_position_embeddings=self.max_length
        )
        cos, sin = rope_tables(inv_freq, self.max_length, factor=factor)
        return {"cos": cos, "sin": sin}

    def options(self) -> dict:
        return {"rope": Rope(self.cos, self.sin, interleaved=self.interleaved)}


class AlibiPositions(Positions):
    """ALiBi: scores fall with the distance, at a slope a head."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.register_tables()

    def tables(self) -> dict[str, Tensor]:
        return {"slopes": alibi_slopes(self.num_heads)}

    def options(self) -> dict:
        return {"alibi_slopes": self.slopes}


class T5Positions(Positions):
    """T5's learned bias of the distance, in buckets, one table for all layers. bidirectional: for encoders."""

    def __init__(self, num_heads: int, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.table = nn.Embedding(num_buckets, num_heads)
        self.bidirectional, self.max_distance = bidirectional, max_distance

    def options(self) -> dict:
        bias = T5Bias(self.table.weight, bidirectional=self.bidirectional, max_distance=self.max_distance)
        return {"relative_bias": bias}


def make_positions(
    positions: str | Positions, *, dim: int, num_heads: int, max_length: int, bidirectional: bool, head_dim=None
) -> Positions:
    """Positions by their name: none, sinusoidal, learned, rope, alibi or t5. A `Positions` is returned as it is."""
    if isinstance(positions, Positions):
        return positions
    makers = {
        "none": Positions,
        "sinusoidal": lambda: SinusoidalPositions(dim),
        "learned": lambda: LearnedPositions(max_length, dim),
        "rope": lambda: RotaryPositions(head_dim or dim // num_heads, max_length),
        "alibi": lambda: AlibiPositions(num_heads),
        "t5": lambda: T5Positions(num_heads, bidirectional=bidirectional),
    }
    if positions not in makers:
        raise ValueError(f"positions must be one of {', '.join(makers)} or a Positions, got {positions!r}")
    return makers[positions]()


def init_weights(module: nn.Module, std: float = 0.02):
    """Normal weights and zero biases, as in GPT, BERT and ViT: `model.apply(init_weights)`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
