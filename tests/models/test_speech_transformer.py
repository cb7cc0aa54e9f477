"""Speech-Transformer against transformers' Speech2Text of the same weights."""

import pytest
import torch
from hosts import HEADS, VOCAB, WIDTH, assert_near, padding, random_tokens, transformers_model

pytest.importorskip("transformers")

from xformer_fast.generation import generate
from xformer_fast.models import SpeechTransformer

START = 2


@pytest.fixture(scope="module")
def host():
    return transformers_model(
        "Speech2TextForConditionalGeneration", d_model=WIDTH, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48,
        vocab_size=VOCAB, conv_channels=24, input_feat_per_channel=16, decoder_start_token_id=START,
    )  # fmt: skip


@pytest.fixture(scope="module")
def features():
    return torch.randn(3, 61, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits(host, features):
    model, target, lengths = SpeechTransformer.from_transformers(host).eval(), random_tokens(3, 9), [61, 17, 40]
    assert_near(model(features, target), host(features, decoder_input_ids=target).logits)
    mask = padding(lengths, 61)
    theirs = host(features * mask[..., None], attention_mask=mask, decoder_input_ids=target).logits
    assert_near(model(features, target, lengths=torch.tensor(lengths)), theirs)


def test_greedy_tokens(host, features):
    model = SpeechTransformer.from_transformers(host).eval()
    theirs = host.generate(features, max_new_tokens=12, do_sample=False)
    ours = generate(model, torch.full((3, 1), START), max_new_tokens=12, memory=model.encode(features))
    assert torch.equal(ours, theirs[:, 1:])
