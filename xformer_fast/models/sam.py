"""SAM: an image encoder of windows with decomposed relative positions, and a decoder in which prompts become masks.

Kirillov et al., "Segment Anything" (2023). The encoder is that of Li et al., "Exploring Plain Vision Transformer
Backbones for Object Detection" (2022): most layers see windows, some the whole map. In the decoder, tokens look at the
image and the image at the tokens.
"""

import math

import torch
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import ChannelsFirst, PatchEmbedding, perceptron
from ..layers import Attention, FeedForward, Residual, Stack, TransformerLayer, init_weights
from ..ops.attention import attention as fused_attention

NAMES = (
    {  # of a SamModel
        "shared_image_embedding.positional_embedding": "prompts.places.frequencies",
        "prompt_encoder.shared_embedding.positional_embedding": None,  # the same
        "prompt_encoder.point_embed.*.weight": "prompts.kinds.*",
        "prompt_encoder.not_a_point_embed.weight": "prompts.no_point",
        "prompt_encoder.no_mask_embed.weight": "prompts.no_mask",
        "vision_encoder.pos_embed": "encoder.places",
        "vision_encoder.layers.*.attn.rel_pos_h": "encoder.layers.*.mixer.branch.mixer.rows",
        "vision_encoder.layers.*.attn.rel_pos_w": "encoder.layers.*.mixer.branch.mixer.columns",
        "vision_encoder.layers.*.attn.qkv.*": tuple(
            f"encoder.layers.*.mixer.branch.{part}.*" for part in ("query", "key", "value")
        ),
        "mask_decoder.iou_token.weight": "decoder.score_token",
        "mask_decoder.mask_tokens.weight": "decoder.mask_tokens",
    }
    | {
        f"{theirs}.*": f"{ours}.*"
        for theirs, ours in {
            "vision_encoder.patch_embed.projection": "encoder.patches.projection",
            "vision_encoder.layers.*.layer_norm1": "encoder.layers.*.mixer.norm",
            "vision_encoder.layers.*.attn.proj": "encoder.layers.*.mixer.branch.out",
            "vision_encoder.layers.*.layer_norm2": "encoder.layers.*.feed_forward.norm",
            "vision_encoder.layers.*.mlp.lin1": "encoder.layers.*.feed_forward.branch.up",
            "vision_encoder.layers.*.mlp.lin2": "encoder.layers.*.feed_forward.branch.down",
            "vision_encoder.neck.conv1": "encoder.neck.0.0",
            "vision_encoder.neck.layer_norm1": "encoder.neck.1",
            "vision_encoder.neck.conv2": "encoder.neck.2.0",
            "vision_encoder.neck.layer_norm2": "encoder.neck.3",
            "prompt_encoder.mask_embed.conv1": "prompts.masks.0.0",
            "prompt_encoder.mask_embed.layer_norm1": "prompts.masks.1",
            "prompt_encoder.mask_embed.conv2": "prompts.masks.3.0",
            "prompt_encoder.mask_embed.layer_norm2": "prompts.masks.4",
            "prompt_encoder.mask_embed.conv3": "prompts.masks.6.0",
            "mask_decoder.transformer.layers.*.layer_norm1": "decoder.layers.*.tokens_to_tokens.norm",
            "mask_decoder.transformer.layers.*.layer_norm2": "decoder.layers.*.tokens_to_image.norm",
            "mask_decoder.transformer.layers.*.mlp.lin1": "decoder.layers.*.feed_forward.branch.up",
            "mask_decoder.transformer.layers.*.mlp.lin2": "decoder.layers.*.feed_forward.branch.down",
            "mask_decoder.transformer.layers.*.layer_norm3": "decoder.layers.*.feed_forward.norm",
            "mask_decoder.transformer.layers.*.layer_norm4": "decoder.layers.*.image_to_tokens.norm",
            "mask_decoder.transformer.layer_norm_final_attn": "decoder.last.norm",
            "mask_decoder.upscale_conv1": "decoder.upscale.0.0",
            "mask_decoder.upscale_layer_norm": "decoder.upscale.1",
            "mask_decoder.upscale_conv2": "decoder.upscale.3.0",
        }.items()
    }
    | {
        f"mask_decoder.transformer.{theirs}.{part}.*": f"decoder.{ours}.branch.{name}.*"
        for theirs, ours in {
            "layers.*.self_attn": "layers.*.tokens_to_tokens",
            "layers.*.cross_attn_token_to_image": "layers.*.tokens_to_image",
            "layers.*.cross_attn_image_to_token": "layers.*.image_to_tokens",
            "final_attn_token_to_image": "last",
        }.items()
        for part, name in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}.items()
    }
    | {
        f"mask_decoder.{theirs}.{part}.*": f"decoder.{ours}.{place}.*"
        for theirs, ours in {"output_hypernetworks_mlps.*": "mask_heads.*", "iou_prediction_head": "score_head"}.items()
        for part, place in {"proj_in": 0, "layers.0": 2, "proj_out": 4}.items()
    }
)


class DecomposedMixer(nn.Module):
    """`attention` on a map (B, H, W, heads, D), with q·rows[i - j] + q·columns[i - j] added to the score of query q.

    The decomposed relative positions of Li et al., "MViTv2" (2022). sides: of the windows, or of the map if not
    windowed.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, sides: tuple[int, int], windowed: bool, attention_dropout=0.0,
        backend=None,
    ):  # fmt: skip
        super().__init__()
        self.sides, self.attention_dropout, self.backend = sides, attention_dropout, backend
        self.window_size = sides if windowed else None  # `Attention` pads the map to multiples of it
        self.rows, self.columns = (nn.Parameter(torch.zeros(2 * side - 1, head_dim)) for side in sides)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.window_size is None and query.shape[1:3] != self.sides:
            raise ValueError(f"the map must have sides {self.sides}, got {tuple(query.shape[1:3])}")
        counts = tuple(n // side for n, side in zip(query.shape[1:3], self.sides, strict=True))
        query, key, value = (self.windows(x) for x in (query, key, value))
        steps = (torch.arange(side, device=query.device) for side in self.sides)
        rows, columns = (  # (side, side, D), of query i and key j
            table[i[:, None] - i + len(i) - 1] for table, i in zip((self.rows, self.columns), steps, strict=True)
        )
        bias = (
            torch.einsum("bijhd,ikd->bhijk", query, rows).flatten(2, 3),
            torch.einsum("bijhd,jkd->bhijk", query, columns).flatten(2, 3),
        )
        out = fused_attention(
            *(x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)), decomposed_bias=bias,
            dropout_p=self.attention_dropout if self.training else 0.0, backend=self.backend,
        )  # fmt: skip
        out = out.transpose(1, 2).unflatten(1, self.sides).unflatten(0, (-1, *counts))
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def windows(self, x: Tensor) -> Tensor:
        """(B, H, W, heads, D) -> (B * windows, *sides, heads, D)."""
        return x.unflatten(2, (-1, self.sides[1])).unflatten(1, (-1, self.sides[0])).transpose(2, 3).flatten(0, 2)


class ImageEncoder(nn.Module):
    """image (B, channels, side, side) -> (B, side / patch, side / patch, out_dim).

    global_layers: those that see the whole map; the others see windows.
    """

    def __init__(
        self, image_size: int, patch: int, channels: int, dim: int, depth: int, num_heads: int, hidden: int,
        out_dim: int, *, window_size: int, global_layers, norm_eps: float, **attention,
    ):  # fmt: skip
        super().__init__()
        self.image_size, side = image_size, image_size // patch

        def layer(windowed: bool) -> TransformerLayer:
            sides = (window_size, window_size) if windowed else (side, side)
            mixer = {"mixer": DecomposedMixer, "sides": sides, "windowed": windowed}
            attend = Attention(dim, num_heads, **mixer, **attention)
            return TransformerLayer(dim, attend, FeedForward(dim, hidden, "gelu"), norm_eps=norm_eps)

        self.patches = PatchEmbedding(channels, dim, patch)
        self.places = nn.Parameter(torch.zeros(1, side, side, dim))
        self.layers = Stack(layer(i not in global_layers) for i in range(depth))
        self.neck = nn.Sequential(
            ChannelsFirst(nn.Conv2d(dim, out_dim, 1, bias=False)), nn.LayerNorm(out_dim, eps=1e-6),
            ChannelsFirst(nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False)), nn.LayerNorm(out_dim, eps=1e-6),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        side = self.image_size
        if image.shape[2:] != (side, side):
            raise ValueError(f"image must be (B, channels, {side}, {side}), got shape {tuple(image.shape)}")
        return self.neck(self.layers(self.patches(image) + self.places))


class FourierPlaces(nn.Module):
    """Places (..., 2), x and y in [0, 1] -> sin and cos of random projections, (..., dim).

    Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions" (2020).
    """

    def __init__(self, dim: int, scale: float):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(2, dim // 2))

    def forward(self, places: Tensor) -> Tensor:
        angles = 2 * math.pi * ((2 * places - 1).to(self.frequencies.dtype) @ self.frequencies)
        return torch.cat((angles.sin(), angles.cos()), -1)

    def of_map(self, height: int, width: int) -> Tensor:
        """(height, width, dim): of the middles of a map's cells."""
        device = self.frequencies.device
        y, x = ((torch.arange(side, device=device) + 0.5) / side for side in (height, width))
        return self(torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1))


class PromptEncoder(nn.Module):
    """Points and boxes become tokens (B, P, T, dim), a mask is added to the image (B, H, W, dim)."""

    def __init__(self, image_size: int, dim: int, mask_dim: int, scale: float):
        super().__init__()
        self.image_size, self.places = image_size, FourierPlaces(dim, scale)
        self.kinds = nn.ParameterList(torch.randn(1, dim) for _ in range(4))  # background, foreground, two corners
        self.no_point, self.no_mask = nn.Parameter(torch.randn(1, dim)), nn.Parameter(torch.randn(1, dim))
        self.masks = nn.Sequential(
            ChannelsFirst(nn.Conv2d(1, mask_dim // 4, 2, 2)), nn.LayerNorm(mask_dim // 4, eps=1e-6), nn.GELU(),
            ChannelsFirst(nn.Conv2d(mask_dim // 4, mask_dim, 2, 2)), nn.LayerNorm(mask_dim, eps=1e-6), nn.GELU(),
            ChannelsFirst(nn.Conv2d(mask_dim, dim, 1)),
        )  # fmt: skip

    def forward(
        self, image: Tensor, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tokens, kinds = [], torch.cat((*self.kinds, self.no_point))
        if points is not None:
            places = self.places((points + 0.5) / self.image_size)
            tokens.append(places.masked_fill((labels == -1)[..., None], 0) + kinds[labels])  # kinds[-1] is no point
            if boxes is None:
                tokens.append(self.no_point.expand(*points.shape[:2], -1, -1))
        if boxes is not None:
            tokens.append(self.places((boxes.unflatten(-1, (2, 2)) + 0.5) / self.image_size) + kinds[2:4])
        image = image + (self.no_mask if masks is None else self.masks(masks.movedim(1, -1)))
        return torch.cat(tokens, 2), image


class TwoWayLayer(nn.Module):
    """Post-norm: tokens see each other, then the image; their feed-forward; then the image sees the tokens."""

    def __init__(self, dim: int, num_heads: int, hidden: int, *, first: bool, norm_eps: float, **attention):
        super().__init__()
        self.first, half = first, dim // num_heads // 2
        residual = {"norm_first": False, "norm_eps": norm_eps}
        self.tokens_to_tokens = Residual(dim, Attention(dim, num_heads, **attention), **residual)
        self.tokens_to_image = Residual(dim, Attention(dim, num_heads, head_dim=half, **attention), **residual)
        self.feed_forward = Residual(dim, FeedForward(dim, hidden, "relu"), **residual)
        self.image_to_tokens = Residual(dim, Attention(dim, num_heads, head_dim=half, **attention), **residual)

    def forward(self, tokens: Tensor, image: Tensor, position: Tensor, map_position: Tensor) -> tuple[Tensor, Tensor]:
        own = self.tokens_to_tokens
        tokens = own.norm(own.branch(tokens)) if self.first else own(tokens, position=position)
        tokens = self.tokens_to_image(tokens, image, position=position, memory_position=map_position)
        tokens = self.feed_forward(tokens)
        return tokens, self.image_to_tokens(image, tokens, position=map_position, memory_position=position)


class MaskDecoder(nn.Module):
    """tokens (B, T, dim) and image (B, H, W, dim) -> masks (B, 1 + num_masks, 4H, 4W) and their scores.

    The first mask is for prompts that say all, the others are guesses at what an ambiguous one means.
    """

    def __init__(
        self, dim: int, depth: int, num_heads: int, hidden: int, num_masks: int, score_hidden: int, *, norm_eps: float,
        **attention,
    ):  # fmt: skip
        super().__init__()
        self.score_token = nn.Parameter(torch.randn(1, dim))
        self.mask_tokens = nn.Parameter(torch.randn(1 + num_masks, dim))
        self.layers = nn.ModuleList(
            TwoWayLayer(dim, num_heads, hidden, first=i == 0, norm_eps=norm_eps, **attention) for i in range(depth)
        )
        half = dim // num_heads // 2
        self.last = Residual(dim, Attention(dim, num_heads, head_dim=half, **attention), norm_first=False)
        self.upscale = nn.Sequential(
            ChannelsFirst(nn.ConvTranspose2d(dim, dim // 4, 2, 2)), nn.LayerNorm(dim // 4, eps=1e-6), nn.GELU(),
            ChannelsFirst(nn.ConvTranspose2d(dim // 4, dim // 8, 2, 2)), nn.GELU(),
        )  # fmt: skip
        self.mask_heads = nn.ModuleList(perceptron(dim, dim, dim, dim // 8) for _ in range(1 + num_masks))
        self.score_head = perceptron(dim, score_hidden, score_hidden, 1 + num_masks)

    def forward(self, tokens: Tensor, image: Tensor, map_position: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.cat((self.score_token, self.mask_tokens))
        position = tokens = torch.cat((own.expand(tokens.shape[0], -1, -1), tokens), 1)
        for layer in self.layers:
            tokens, image = layer(tokens, image, position, map_position)
        tokens = self.last(tokens, image, position=position, memory_position=map_position)
        weights = torch.stack([head(tokens[:, 1 + i]) for i, head in enumerate(self.mask_heads)], 1)
        return torch.einsum("bmc,bhwc->bmhw", weights, self.upscale(image)), self.score_head(tokens[:, 0])


class SAM(nn.Module):
    """image (B, channels, image_size, image_size) and prompts -> masks (B, P, masks, H / 4, W / 4) and scores.

    P prompts an image, each of any number of points, or a box, or both; what they mean is guessed in `num_masks` masks,
    logits of a quarter of the image's sides, with a score (B, P, num_masks) each. attention: arguments of every
    `Attention` of the encoder and the decoder: backend, ...

    >>> import torch
    >>> from xformer_fast.models import SAM
    >>> model = SAM(image_size=64, patch=8, dim=32, depth=2, num_heads=4, window_size=3, global_layers=(1,), out_dim=32)
    >>> image, points = torch.randn(2, 3, 64, 64), 64 * torch.rand(2, 5, 1, 2)
    >>> masks, scores = model(image, points, torch.ones(2, 5, 1, dtype=torch.int64))
    >>> masks.shape, scores.shape
    (torch.Size([2, 5, 3, 32, 32]), torch.Size([2, 5, 3]))
    """

    def __init__(
        self, *, image_size: int = 1024, patch: int = 16, channels: int = 3, dim: int = 768, depth: int = 12,
        num_heads: int = 12, hidden: int | None = None, window_size: int = 14, global_layers=(2, 5, 8, 11),
        out_dim: int = 256, decoder_depth: int = 2, decoder_heads: int = 8, decoder_hidden: int = 2048,
        mask_dim: int = 16, num_masks: int = 3, score_hidden: int = 256, place_scale: float = 1.0, norm_eps=1e-6,
        **attention,
    ):  # fmt: skip
        super().__init__()
        self.encoder = ImageEncoder(
            image_size, patch, channels, dim, depth, num_heads, hidden or 4 * dim, out_dim, window_size=window_size,
            global_layers=global_layers, norm_eps=norm_eps, **attention,
        )  # fmt: skip
        self.prompts = PromptEncoder(image_size, out_dim, mask_dim, place_scale)
        self.decoder = MaskDecoder(
            out_dim, decoder_depth, decoder_heads, decoder_hidden, num_masks, score_hidden, norm_eps=norm_eps,
            **attention,
        )  # fmt: skip
        self.apply(init_weights)

    def forward(self, image: Tensor, *prompts, **options) -> tuple[Tensor, Tensor]:
        """`decode(encode(image), ...)`: see there. For more prompts to one image, encode it once."""
        return self.decode(self.encode(image), *prompts, **options)

    def encode(self, image: Tensor) -> Tensor:
        """(B, image_size / patch, image_size / patch, out_dim)."""
        return self.encoder(image)

    def decode(
        self, image: Tensor, points: Tensor | None = None, labels: Tensor | None = None, boxes: Tensor | None = None,
        masks: Tensor | None = None, *, single: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """image: of `encode`. points: (B, P, N, 2), x and y in pixels, with labels (B, P, N): 1 is on the object, 0 is
        not, -1 no point at all. boxes: (B, P, 4), left, top, right, bottom. masks: (B, 1, H / 4, W / 4) logits, of a
        call before. single: the one mask for prompts that say all, instead of the guesses.
        """
        if points is None and boxes is None:
            raise ValueError("a prompt must have points or boxes")
        if (points is None) != (labels is None):
            raise ValueError("points and labels must be given together")
        tokens, image = self.prompts(image, points, labels, boxes, masks)
        prompts = tokens.shape[1]
        position = self.prompts.places.of_map(*image.shape[1:3])[None]
        out, scores = self.decoder(tokens.flatten(0, 1), image.repeat_interleave(prompts, 0), position)
        chosen = slice(0, 1) if single else slice(1, None)
        return tuple(x[:, chosen].unflatten(0, (-1, prompts)) for x in (out, scores))

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "SAM":
        """The weights of a transformers SamModel."""
        c, p, d = host.config.vision_config, host.config.prompt_encoder_config, host.config.mask_decoder_config
        expect(c, hidden_act="gelu", use_abs_pos=True, use_rel_pos=True, qkv_bias=True)
        expect(p, hidden_act="gelu", num_point_embeddings=4, layer_norm_eps=1e-6)
        expect(d, hidden_act="relu", attention_downsample_rate=2, iou_head_depth=3, layer_norm_eps=c.layer_norm_eps)
        model = cls(
            image_size=c.image_size, patch=c.patch_size, channels=c.num_channels, dim=c.hidden_size,
            depth=c.num_hidden_layers, num_heads=c.num_attention_heads, hidden=c.mlp_dim, window_size=c.window_size,
            global_layers=c.global_attn_indexes, out_dim=c.output_channels, decoder_depth=d.num_hidden_layers,
            decoder_heads=d.num_attention_heads, decoder_hidden=d.mlp_dim, mask_dim=p.mask_input_channels,
            num_masks=d.num_multimask_outputs, score_hidden=d.iou_head_hidden_dim, norm_eps=c.layer_norm_eps, **choices,
        )  # fmt: skip
        model.load_state_dict(renamed(host.state_dict(), NAMES))
        return model
