"""BERT with both its heads against transformers' BertForPreTraining of the same weights."""

import pytest
import torch
from hosts import HEADS, VOCAB, WIDTH, assert_near, padding, random_tokens, transformers_model

pytest.importorskip("transformers")

from xformer_fast.models import BERT


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, [13, 7, 10]])
def test_masked_tokens_and_next_sentence(lengths):
    host = transformers_model(
        "BertForPreTraining", hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=48,
        vocab_size=VOCAB,
    )  # fmt: skip
    model = BERT.from_transformers(host).eval()
    tokens, segments = random_tokens(3, 13), (torch.arange(13) > 5).long().expand(3, -1)
    mask = None if lengths is None else padding(lengths, 13)
    theirs = host(tokens, attention_mask=mask, token_type_ids=segments)
    masked, follows = model(tokens, segments, lengths=None if lengths is None else torch.tensor(lengths))
    assert_near(masked, theirs.prediction_logits, lengths)
    assert_near(follows, theirs.seq_relationship_logits)
    assert_near(model(tokens)[0], host(tokens).prediction_logits)
