"""`generate` against generation without a cache, an exhaustive search, and the distributions it draws from."""

import itertools

import pytest
import torch
from hosts import VOCAB, random_tokens
from torch import nn

from xformer_fast.generation import generate
from xformer_fast.models import GPT, T5, Transformer


def gpt(vocab=VOCAB, **choices):
    torch.manual_seed(0)
    model = GPT(vocab, dim=32, depth=2, num_heads=4, max_length=64, **choices).eval()
    nn.init.normal_(model.embed.weight)
    model.head.weight = nn.Parameter(torch.randn(vocab, 32))  # a tied head of random weights repeats its input
    return model


@torch.no_grad()
def without_cache(decode, tokens, count):
    start = tokens.shape[1]
    for _ in range(count):
        tokens = torch.cat((tokens, decode(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[:, start:]


@pytest.mark.parametrize(
    "choices",
    [{"positions": name} for name in ("none", "sinusoidal", "learned", "rope", "alibi", "t5")]
    + [{"mixer": "linear"}, {"window": (4, 0)}, {"num_kv_heads": 2, "positions": "rope"}],
    ids=str,
)
def test_greedy_equals_generation_without_cache(choices):
    model, tokens = gpt(**choices), random_tokens(3, 20)
    out = generate(model, tokens, max_new_tokens=10)
    assert torch.equal(out, without_cache(model, tokens, 10))
    assert out.unique().numel() > 5
    ragged = generate(model, tokens, lengths=torch.tensor([20, 1, 9]), max_new_tokens=10)
    assert torch.equal(ragged[0], out[0])
    for row, length in ((1, 1), (2, 9)):
        assert torch.equal(ragged[row : row + 1], without_cache(model, tokens[row : row + 1, :length], 10))


@torch.no_grad()
@pytest.mark.parametrize("family", [Transformer, T5])
def test_encoder_decoders(family):
    torch.manual_seed(0)
    model = family(VOCAB, dim=32, depth=2, num_heads=4, hidden=48).eval()
    nn.init.normal_(model.embed.weight, std=4 if family is T5 else 1)
    model.head.weight = nn.Parameter(torch.randn(VOCAB, 32))
    lengths, start = torch.tensor([12, 5, 8]), torch.zeros(3, 1, dtype=torch.int64)
    memory = model.encode(random_tokens(3, 12), lengths=lengths)
    context = {"memory": memory, "memory_lengths": lengths}
    expected = without_cache(lambda tokens: model.decode(tokens, **context), start, 10)
    assert torch.equal(generate(model, start, max_new_tokens=10, **context), expected)
    assert expected.unique().numel() > 5


def test_ended_rows_stay_ended():
    model, tokens = gpt(), random_tokens(3, 5)
    free = generate(model, tokens, max_new_tokens=12)
    eos = free[0, 4].item()
    out = generate(model, tokens, max_new_tokens=12, eos=eos)
    for row, ended in zip(free, out, strict=True):
        places = (row == eos).nonzero()[:, 0].tolist()
        length = places[0] + 1 if places else 12
        assert torch.equal(ended[:length], row[:length][: len(ended)]) and (ended[length:] == eos).all()
    alone = generate(model, tokens[:1], max_new_tokens=12, eos=eos)
    assert alone.shape == (1, (free[0] == eos).nonzero()[0, 0] + 1)


class Fixed(nn.Module):
    """A model whose next token never depends on those before: log probabilities by step, (steps, vocab)."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def new_cache(self, batch, capacity):
        return _Steps()

    def forward(self, tokens, *, lengths=None, cache=None):
        cache.made += 1
        return self.logits[cache.made - 1].expand(*tokens.shape, -1)


class _Steps:
    made = 0

    def reorder(self, rows):
        pass


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 6),
        ({"top_k": 0}, 6),
        ({"top_k": 9}, 6),
        ({"top_k": 3}, 3),
        ({"top_p": 0.75}, 3),
        ({"top_k": 4, "top_p": 0.4}, 1),
    ],
)
def test_sampling_draws_from_the_distribution(options, kept):
    weights = torch.tensor([0.05, 0.4, 0.02, 0.25, 0.2, 0.08])
    model, temperature = Fixed(weights.log()[None] * 0.5), 0.5
    out = generate(
        model, torch.zeros(4000, 1, dtype=torch.int64), max_new_tokens=1, temperature=temperature,
        generator=torch.Generator().manual_seed(0), **options,
    )[:, 0]  # fmt: skip
    expected = torch.where(weights >= weights.sort(descending=True).values[kept - 1], weights, 0)
    found = torch.bincount(out, minlength=6) / 4000
    assert (found[expected == 0] == 0).all()
    assert (found - expected / expected.sum()).abs().max() < 0.04  # five standard deviations of 4000 draws


def test_beams_find_the_likeliest_sequence():
    """As many beams as there are prefixes search everything: the best of all sequences, ended or not."""
    vocab, steps, eos = 5, 3, 2
    model = gpt(vocab)
    prompt = torch.tensor([[1, 3], [4, 0]])
    for length_penalty in (0.0, 1.0, 2.0):
        out = generate(model, prompt, max_new_tokens=steps, beams=vocab**2, eos=eos, length_penalty=length_penalty)
        for row, found in zip(prompt, out, strict=True):
            best, sequence = max(
                (score(model, row, sequence) / len(sequence) ** length_penalty, sequence)
                for sequence in sequences(vocab, steps, eos)
            )
            assert found.tolist()[: len(sequence)] == sequence, (length_penalty, best)
            assert all(token == eos for token in found.tolist()[len(sequence) :])


def sequences(vocab, steps, eos):
    for sequence in itertools.product(range(vocab), repeat=steps):
        end = sequence.index(eos) + 1 if eos in sequence else steps
        if all(token == eos for token in sequence[end:]):
            yield list(sequence[:end])


@torch.no_grad()
def score(model, prompt, sequence):
    tokens = torch.cat((prompt, torch.tensor(sequence)))
    log_probs = model(tokens[None])[0].log_softmax(-1)
    return log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(sequence)[:, None]).sum().item()


def test_errors():
    model, tokens = gpt(), random_tokens(2, 5)
    for wrong, words in (
        ({"max_new_tokens": 0}, "max_new_tokens and beams must be at least 1, got 0 and 1"),
        ({"max_new_tokens": 3, "beams": 2, "temperature": 1.0}, "beams are searched at temperature 0"),
        ({"max_new_tokens": 3, "temperature": 1.0, "top_k": -1}, "top_k must be at least 1, or None or 0 .* got -1"),
        ({"max_new_tokens": 3, "temperature": 1.0, "top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"max_new_tokens": 3, "temperature": 1.0, "top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(model, tokens, **wrong)
    with pytest.raises(ValueError, match="tokens must be"):
        generate(model, tokens[:, :0], max_new_tokens=3)
