"""T5, 1.0 and 1.1, against transformers' of the same weights."""

import pytest
import torch
from hosts import HEADS, VOCAB, WIDTH, assert_near, padding, random_tokens, transformers_model

pytest.importorskip("transformers")

from xformer_fast.generation import generate
from xformer_fast.models import T5

CONFIGS = {"1.0": {}, "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}}


def make(version, decoder_depth=2):
    host = transformers_model(
        "T5ForConditionalGeneration", d_model=WIDTH, d_kv=12, d_ff=48, num_layers=2, num_decoder_layers=decoder_depth,
        num_heads=HEADS, vocab_size=VOCAB, relative_attention_max_distance=20, relative_attention_num_buckets=8,
        decoder_start_token_id=0, **CONFIGS[version],
    )  # fmt: skip
    if version == "1.1":  # transformers ties the head all the same until weights are loaded
        host.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH))
    return host


@torch.no_grad()
@pytest.mark.parametrize("version", CONFIGS)
def test_logits(version):
    host = make(version, decoder_depth=3)
    model = T5.from_transformers(host).eval()
    source, target, lengths = random_tokens(3, 30), random_tokens(3, 9, seed=2), [30, 7, 19]
    theirs = host(source, attention_mask=padding(lengths, 30), decoder_input_ids=target).logits
    assert_near(model(source, target, source_lengths=torch.tensor(lengths)), theirs)
    assert_near(model(source, target), host(source, decoder_input_ids=target).logits)


def test_greedy_tokens_and_beam_search():
    host = make("1.1")
    model, source, lengths = T5.from_transformers(host).eval(), random_tokens(3, 20), [20, 5, 11]
    memory = model.encode(source, lengths=torch.tensor(lengths))
    start = torch.zeros(3, 1, dtype=torch.int64)
    options = {"attention_mask": padding(lengths, 20), "do_sample": False}
    theirs = host.generate(source, max_new_tokens=24, **options)
    ours = generate(model, start, max_new_tokens=24, memory=memory, memory_lengths=torch.tensor(lengths))
    assert torch.equal(ours, theirs[:, 1:])
    theirs = host.generate(source, max_new_tokens=10, num_beams=3, **options)
    ours = generate(model, start, max_new_tokens=10, beams=3, memory=memory, memory_lengths=torch.tensor(lengths))
    assert torch.equal(ours, theirs[:, 1:])
