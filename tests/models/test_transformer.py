"""The original Transformer against torch.nn.Transformer of the same weights."""

import host_models
import pytest
import torch
from hosts import HEADS, VOCAB, WIDTH, assert_near, random_tokens
from torch import nn

from xformer_fast.models import Transformer


def torch_transformer(**options):
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 48, "dropout": 0.0, "batch_first": True} | options
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 2)  # no norms behind them: the original's
    host = nn.Transformer(custom_encoder=encoder, custom_decoder=decoder, **sizes)
    return host_models.disturb(host).eval()


@torch.no_grad()
def test_layers():
    host = torch_transformer()
    model = Transformer(VOCAB, dim=WIDTH, depth=2, num_heads=HEADS, hidden=48).eval()
    model.load_torch(host)
    source, target, lengths = random_tokens(3, 13), random_tokens(3, 9, seed=2), torch.tensor([13, 7, 10])
    place = torch.arange(13)[:, None] / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH)  # section 3.5
    waves = torch.zeros(13, WIDTH)
    waves[:, 0::2], waves[:, 1::2] = place.sin(), place.cos()
    x, y = (model.embed(tokens) * WIDTH**0.5 + waves[: tokens.shape[1]] for tokens in (source, target))
    padded = torch.arange(13) >= lengths[:, None]
    out = host(
        x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(9), tgt_is_causal=True,
        src_key_padding_mask=padded, memory_key_padding_mask=padded,
    )  # fmt: skip
    assert_near(model(source, target, source_lengths=lengths), out @ model.embed.weight.T)


def test_another_model_is_refused():
    model = Transformer(VOCAB, dim=WIDTH, depth=3, num_heads=HEADS, hidden=48)
    with pytest.raises(ValueError, match=r"differ in encoder\.2"):
        model.load_torch(torch_transformer())
    with pytest.raises(KeyError, match=r"encoder\.norm\.weight"):
        model.load_torch(nn.Transformer(WIDTH, HEADS, 2, 2, 48, batch_first=True))
