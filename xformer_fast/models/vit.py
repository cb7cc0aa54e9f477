"""ViT: an encoder over the patches of an image, pre-norm, with a class token, learned positions and GELU.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale" (2021). distilled=True
is DeiT: Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021).
"""

import torch
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import PatchEmbedding
from ..layers import Attention, FeedForward, Stack, TransformerLayer, init_weights, make_positions

NAMES = {  # of a ViTForImageClassification or a DeiTForImageClassificationWithTeacher
    f"{host}.{theirs}": ours
    for host in ("vit", "deit")
    for theirs, ours in {
        "embeddings.cls_token": "class_token",
        "embeddings.distillation_token": "distillation_token",
        "embeddings.position_embeddings": "positions.table.weight",
        "embeddings.patch_embeddings.projection.*": "patches.projection.*",
        "layers.*.layernorm_before.*": "layers.*.mixer.norm.*",
        "layers.*.attention.q_proj.*": "layers.*.mixer.branch.query.*",
        "layers.*.attention.k_proj.*": "layers.*.mixer.branch.key.*",
        "layers.*.attention.v_proj.*": "layers.*.mixer.branch.value.*",
        "layers.*.attention.o_proj.*": "layers.*.mixer.branch.out.*",
        "layers.*.layernorm_after.*": "layers.*.feed_forward.norm.*",
        "layers.*.mlp.fc1.*": "layers.*.feed_forward.branch.up.*",
        "layers.*.mlp.fc2.*": "layers.*.feed_forward.branch.down.*",
        "layernorm.*": "norm.*",
    }.items()
} | {"classifier.*": "head.*", "cls_classifier.*": "head.*", "distillation_classifier.*": "distillation_head.*"}


class ViT(nn.Module):
    """image (B, channels, *image_size) -> logits (B, num_classes).

    distilled: a second token, and logits of a second head behind those of the first: it learns the teacher's answers,
    and the mean of both is the prediction. positions: see `layers.make_positions`. attention: arguments of every
    `Attention`: mixer, backend, ...; mixer="linear" makes the cost linear in the pixels.

    >>> import torch
    >>> from xformer_fast.models import ViT
    >>> ViT(10, image_size=(64, 96), dim=64, depth=2, num_heads=4)(torch.randn(2, 3, 64, 96)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, *, image_size: int | tuple[int, int] = 224, patch: int = 16, channels: int = 3,
        dim: int = 768, depth: int = 12, num_heads: int = 12, hidden: int | None = None, distilled: bool = False,
        positions="learned", norm_eps=1e-12, dropout=0.0, drop_path=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.patches = PatchEmbedding(channels, dim, patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.distillation_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if distilled else None
        tokens = 1 + distilled + (self.image_size[0] // patch) * (self.image_size[1] // patch)
        self.positions = make_positions(positions, dim=dim, num_heads=num_heads, max_length=tokens, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.layers = Stack(
            TransformerLayer(
                dim,
                Attention(dim, num_heads, **attention),
                FeedForward(dim, hidden or 4 * dim, "gelu"),
                norm_eps=norm_eps,
                dropout=dropout,
                drop_path=rate,
            )
            for rate in torch.linspace(0, drop_path, depth).tolist()
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, num_classes)
        self.distillation_head = nn.Linear(dim, num_classes) if distilled else None
        self.apply(init_weights)

    def encode(self, image: Tensor) -> Tensor:
        """(B, tokens, dim): the class token, the distillation token if there is one, the patches row by row."""
        if image.shape[2:] != self.image_size:
            raise ValueError(f"image must be (B, channels, *{self.image_size}), got shape {tuple(image.shape)}")
        x = self.patches(image).flatten(1, 2)
        first = [self.class_token] if self.distillation_token is None else [self.class_token, self.distillation_token]
        x = torch.cat((*(token.expand(x.shape[0], -1, -1) for token in first), x), 1)
        x = self.dropout(self.positions(x))
        return self.norm(self.layers(x, **self.positions.options()))

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.encode(image)
        if self.distillation_head is None:
            return self.head(x[:, 0])
        return self.head(x[:, 0]), self.distillation_head(x[:, 1])

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "ViT":
        """The weights of a transformers ViTForImageClassification or DeiTForImageClassificationWithTeacher."""
        c = host.config
        expect(c, hidden_act="gelu")
        model = cls(
            c.num_labels, image_size=c.image_size, patch=c.patch_size, channels=c.num_channels, dim=c.hidden_size,
            depth=c.num_hidden_layers, num_heads=c.num_attention_heads, hidden=c.intermediate_size,
            distilled=c.model_type == "deit", norm_eps=c.layer_norm_eps, bias=c.qkv_bias, out_bias=True, **choices,
        )  # fmt: skip
        state = renamed(host.state_dict(), NAMES)
        state["positions.table.weight"] = state["positions.table.weight"][0]
        model.load_state_dict(state)
        return model
