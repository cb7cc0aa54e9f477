"""Conformer's layers against transformers' Wav2Vec2-Conformer block of the same weights; padding."""

import pytest
import torch
from hosts import HEADS, VOCAB, WIDTH, assert_near, transformers_model

from xformer_fast.models import Branchformer, Conformer


@torch.no_grad()
def test_layers():
    pytest.importorskip("transformers")
    host = transformers_model(
        "Wav2Vec2ConformerModel", hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=48, conv_depthwise_kernel_size=7, hidden_act="swish", conv_dim=(8,), conv_stride=(2,),
        conv_kernel=(3,), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
    ).encoder  # fmt: skip
    for layer in host.layers:
        layer.conv_module.batch_norm.running_mean.normal_()
        layer.conv_module.batch_norm.running_var.uniform_(0.5, 2)
    model = Conformer(16, VOCAB, dim=WIDTH, depth=2, num_heads=HEADS, hidden=48, kernel=7).eval()
    model.load_transformers(host)
    x = torch.randn(3, 23, WIDTH, generator=torch.Generator().manual_seed(1))
    theirs = x
    for layer in host.layers:
        theirs = layer(theirs, relative_position_embeddings=host.embed_positions(x))
    assert_near(model.layers(x), theirs)
    with pytest.raises(ValueError, match=r"differ in layers\.2\.first"):
        Conformer(16, VOCAB, dim=WIDTH, depth=3, num_heads=HEADS, hidden=48, kernel=7).load_transformers(host)


@torch.no_grad()
@pytest.mark.parametrize("family", [Conformer, Branchformer])
@pytest.mark.parametrize("positions", ["relative", "rope"])
def test_padding_changes_nothing(family, positions):
    torch.manual_seed(0)
    model = family(16, VOCAB, dim=WIDTH, depth=2, num_heads=HEADS, hidden=48, kernel=7, positions=positions).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    features, lengths = torch.randn(3, 61, 16), torch.tensor([61, 17, 42])
    out = model(features, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(features[row : row + 1, :length])[0]
        assert alone.shape[0] == model.frontend.lengths(lengths)[row]
        assert_near(out[row, : alone.shape[0]], alone)
