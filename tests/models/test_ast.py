"""AST against transformers' of the same weights."""

import pytest
import torch
from hosts import HEADS, WIDTH, assert_near, transformers_model

pytest.importorskip("transformers")

from xformer_fast.models import AST


@torch.no_grad()
def test_logits():
    host = transformers_model(
        "ASTForAudioClassification", hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=48, max_length=60, num_mel_bins=32, patch_size=8, frequency_stride=6, time_stride=7,
        num_labels=5,
    )  # fmt: skip
    model = AST.from_transformers(host).eval()
    spectrogram = torch.randn(3, 60, 32, generator=torch.Generator().manual_seed(1))
    assert_near(model(spectrogram), host(spectrogram).logits)
