"""MAE: an encoder sees a quarter of an image's patches, a small decoder paints the others.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022). Both are pre-norm, with fixed 2-D sinusoids.
"""

import torch
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import PatchEmbedding
from ..layers import Attention, FeedForward, Stack, TransformerLayer, init_weights
from ..positions import sinusoids

NAMES = {  # of a ViTMAEForPreTraining
    "vit.embeddings.cls_token": "class_token",
    "vit.embeddings.position_embeddings": "places",
    "vit.embeddings.patch_embeddings.projection.*": "patches.projection.*",
    "vit.layernorm.*": "norm.*",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_places",
    "decoder.decoder_embed.*": "decoder_embed.*",
    "decoder.decoder_norm.*": "decoder_norm.*",
    "decoder.decoder_pred.*": "head.*",
} | {
    f"{host}.*.{theirs}.*": f"{stack}.*.{ours}.*"
    for host, stack in (("vit.layers", "encoder"), ("decoder.decoder_layers", "decoder"))
    for theirs, ours in {
        "layernorm_before": "mixer.norm",
        "attention.q_proj": "mixer.branch.query",
        "attention.k_proj": "mixer.branch.key",
        "attention.v_proj": "mixer.branch.value",
        "attention.o_proj": "mixer.branch.out",
        "layernorm_after": "feed_forward.norm",
        "mlp.fc1": "feed_forward.branch.up",
        "mlp.fc2": "feed_forward.branch.down",
    }.items()
}


def map_sinusoids(height: int, width: int, dim: int) -> Tensor:
    """(1 + height * width, dim): zeros for the class token, then half of the channels for column and row each."""
    rows, columns = (sinusoids(torch.arange(side), dim // 2) for side in (height, width))
    places = torch.cat((columns.expand(height, -1, -1), rows[:, None].expand(-1, width, -1)), -1)
    return torch.cat((torch.zeros(1, dim), places.flatten(0, 1)))


class MAE(nn.Module):
    """image (B, channels, *image_size) -> pixels (B, patches, patch * patch * channels), hidden (B, patches) bool.

    mask_ratio: how many of the patches are hidden from the encoder. attention: arguments of every `Attention`: mixer,
    backend, ... To train: `reconstruction_loss`. `encode(image, mask_ratio=0)` gives the features of whole images.

    >>> import torch
    >>> from xformer_fast.models import MAE
    >>> from xformer_fast.models.mae import reconstruction_loss
    >>> model = MAE(image_size=64, dim=64, depth=2, num_heads=4, decoder_dim=32, decoder_depth=1, decoder_heads=4)
    >>> image = torch.randn(2, 3, 64, 64)
    >>> pixels, hidden = model(image)
    >>> pixels.shape, hidden.sum(1), reconstruction_loss(pixels, hidden, image).shape
    (torch.Size([2, 16, 768]), tensor([12, 12]), torch.Size([]))
    """

    def __init__(
        self, *, image_size: int | tuple[int, int] = 224, patch: int = 16, channels: int = 3, dim: int = 768,
        depth: int = 12, num_heads: int = 12, hidden: int | None = None, decoder_dim: int = 512, decoder_depth: int = 8,
        decoder_heads: int = 16, decoder_hidden: int | None = None, mask_ratio: float = 0.75, norm_eps=1e-12,
        dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()

        def layers(dim: int, depth: int, num_heads: int, hidden: int | None) -> Stack:
            return Stack(
                TransformerLayer(
                    dim,
                    Attention(dim, num_heads, **attention),
                    FeedForward(dim, hidden or 4 * dim, "gelu"),
                    norm_eps=norm_eps,
                    dropout=dropout,
                )
                for _ in range(depth)
            )

        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.mask_ratio = mask_ratio
        space = self.image_size[0] // patch, self.image_size[1] // patch
        self.patches = PatchEmbedding(channels, dim, patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.register_buffer("places", map_sinusoids(*space, dim))
        self.register_buffer("decoder_places", map_sinusoids(*space, decoder_dim))
        self.encoder, self.norm = layers(dim, depth, num_heads, hidden), nn.LayerNorm(dim, eps=norm_eps)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.decoder = layers(decoder_dim, decoder_depth, decoder_heads, decoder_hidden)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=norm_eps)
        self.head = nn.Linear(decoder_dim, patch * patch * channels)
        self.apply(init_weights)

    def encode(
        self, image: Tensor, *, mask_ratio: float | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, 1 + kept, dim) of the class token and the patches that are not hidden, and which they are, (B, kept).

        noise: (B, patches) random numbers, the largest of which hide their patches; drawn if None.
        """
        if image.shape[2:] != self.image_size:
            raise ValueError(f"image must be (B, channels, *{self.image_size}), got shape {tuple(image.shape)}")
        x = self.patches(image).flatten(1, 2) + self.places[1:]
        if noise is None:
            noise = torch.rand(x.shape[:2], device=x.device)
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        kept = noise.argsort(1)[:, : int(x.shape[1] * (1 - ratio))]
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        first = (self.class_token + self.places[:1]).expand(x.shape[0], -1, -1)
        return self.norm(self.encoder(torch.cat((first, x), 1))), kept

    def decode(self, x: Tensor, kept: Tensor) -> Tensor:
        """The pixels of all patches out of what `encode` gives."""
        x = self.decoder_embed(x)
        places = self.mask_token.expand(x.shape[0], self.decoder_places.shape[0] - 1, -1).to(x.dtype)
        places = places.scatter(1, kept[..., None].expand(-1, -1, x.shape[2]), x[:, 1:])
        x = self.decoder(torch.cat((x[:, :1], places), 1) + self.decoder_places)
        return self.head(self.decoder_norm(x)[:, 1:])

    def forward(self, image: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, kept = self.encode(image, noise=noise)
        pixels = self.decode(x, kept)
        hidden = torch.ones(pixels.shape[:2], dtype=torch.bool, device=x.device).scatter(1, kept, False)
        return pixels, hidden

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "MAE":
        """The weights of a transformers ViTMAEForPreTraining."""
        c = host.config
        expect(c, hidden_act="gelu")
        model = cls(
            image_size=c.image_size, patch=c.patch_size, channels=c.num_channels, dim=c.hidden_size,
            depth=c.num_hidden_layers, num_heads=c.num_attention_heads, hidden=c.intermediate_size,
            decoder_dim=c.decoder_hidden_size, decoder_depth=c.decoder_num_hidden_layers,
            decoder_heads=c.decoder_num_attention_heads, decoder_hidden=c.decoder_intermediate_size,
            mask_ratio=c.mask_ratio, norm_eps=c.layer_norm_eps, bias=c.qkv_bias, out_bias=True, **choices,
        )  # fmt: skip
        state = renamed(host.state_dict(), NAMES)
        model.load_state_dict({name: x[0] if name.endswith("places") else x for name, x in state.items()})
        return model


def reconstruction_loss(pixels: Tensor, hidden: Tensor, image: Tensor, *, normalize: bool = False) -> Tensor:
    """The mean squared error of the hidden patches' pixels.

    pixels (B, patches, patch * patch * channels) and hidden (B, patches) are a `MAE`'s. normalize: each patch of the
    image is brought to mean 0 and variance 1 first (section 3, "Reconstruction target").
    """
    patch = round((pixels.shape[2] / image.shape[1]) ** 0.5)
    target = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, channels, H', patch, W', patch)
    target = target.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (pixels - target).square().mean(-1)[hidden].mean()
