"""GPT against transformers' GPT-2 of the same weights."""

import pytest
import torch
from hosts import HEADS, VOCAB, WIDTH, assert_near, padding, random_tokens, transformers_model

pytest.importorskip("transformers")

from xformer_fast.generation import generate
from xformer_fast.models import GPT


@pytest.fixture(scope="module")
def host():
    return transformers_model("GPT2LMHeadModel", n_embd=WIDTH, n_layer=2, n_head=HEADS, vocab_size=VOCAB, n_inner=80)


@torch.no_grad()
def test_logits(host):
    model = GPT.from_transformers(host).eval()
    tokens = random_tokens(3, 13)
    assert_near(model(tokens), host(tokens).logits)
    lengths = [13, 7, 10]
    theirs = host(tokens, attention_mask=padding(lengths, 13)).logits
    assert_near(model(tokens, lengths=torch.tensor(lengths)), theirs, lengths)


def test_greedy_tokens(host):
    model, tokens = GPT.from_transformers(host).eval(), random_tokens(3, 20)
    theirs = host.generate(tokens, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, tokens, max_new_tokens=12), theirs[:, 20:])


@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_beam_search(host, length_penalty):
    model, tokens = GPT.from_transformers(host).eval(), random_tokens(6, 5)
    likely = generate(model, tokens, max_new_tokens=12).flatten().mode().values.item()
    for eos in (None, likely, 40):
        theirs = host.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, num_beams=4,
            eos_token_id=eos, pad_token_id=eos or 0, length_penalty=length_penalty,
        )  # fmt: skip
        ours = generate(model, tokens, max_new_tokens=12, beams=4, eos=eos, length_penalty=length_penalty)
        assert torch.equal(ours, theirs[:, 5:])


def test_another_activation_is_refused():
    host = transformers_model("GPT2LMHeadModel", n_embd=8, n_layer=1, n_head=1, activation_function="relu")
    with pytest.raises(ValueError, match="activation_function='relu'"):
        GPT.from_transformers(host)
