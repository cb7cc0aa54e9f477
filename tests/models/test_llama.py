"""LLaMA against transformers' of the same weights: grouped heads, scaled RoPE, tied or not."""

import pytest
import torch
from hosts import HEADS, VOCAB, WIDTH, assert_near, padding, random_tokens, transformers_model

pytest.importorskip("transformers")

from xformer_fast.generation import generate
from xformer_fast.models import LLaMA

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "plain": {},
    "gqa, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama3": {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True, "rope_parameters": LLAMA3},
}


def make(config):
    return transformers_model(
        "LlamaForCausalLM", hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=48,
        vocab_size=VOCAB, max_position_embeddings=128, **config,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_logits(config):
    host = make(CONFIGS[config])
    model = LLaMA.from_transformers(host).eval()
    tokens, lengths = random_tokens(3, 50), [50, 7, 29]
    assert_near(model(tokens), host(tokens).logits)
    theirs = host(tokens, attention_mask=padding(lengths, 50)).logits
    assert_near(model(tokens, lengths=torch.tensor(lengths)), theirs, lengths)
    assert (model.head.weight is model.embed.weight) == (config == "gqa, tied")


def test_greedy_tokens():
    """Prompts of different lengths at once: each as transformers goes on with it alone."""
    host = make(CONFIGS["gqa, tied"])
    model, tokens, lengths = LLaMA.from_transformers(host).eval(), random_tokens(3, 20), [20, 1, 11]
    ours = generate(model, tokens, lengths=torch.tensor(lengths), max_new_tokens=12)
    for row, length in enumerate(lengths):
        theirs = host.generate(tokens[row : row + 1, :length], max_new_tokens=12, do_sample=False)
        assert torch.equal(ours[row], theirs[0, length:])
