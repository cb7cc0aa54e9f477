"""MaskGIT against its paper, part by part: Chang et al. (2022), section 3."""

import math

import host_models
import pytest
import torch
import torch.nn.functional as F
from hosts import HEADS, WIDTH, assert_near, random_tokens

from xformer_fast.models import MaskGIT
from xformer_fast.models.maskgit import cosine_schedule

LENGTH, CODES = 16, 40


def small(**choices):
    torch.manual_seed(0)
    model = MaskGIT(CODES, 5, length=LENGTH, dim=WIDTH, depth=2, num_heads=HEADS, hidden=48, **choices)
    return host_models.disturb(model).eval()


def norm(x, layer):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def transformer_of_the_paper(tokens, label, model):
    """A bidirectional transformer, as BERT's: every token attends to every other; learned positions, LayerNorm behind
    each residual; the codes' embedding gives their logits. The class is a token before the image's."""
    x = torch.cat((model.classes.weight[label][None], model.embed.weight[tokens])) + model.positions.table.weight
    x = norm(x, model.norm)
    for layer in model.layers:
        attention, out = layer.mixer.branch, []
        projections = attention.query, attention.key, attention.value
        query, key, value = (linear(x, projection).split(WIDTH // HEADS, 1) for projection in projections)
        for q, k, v in zip(query, key, value, strict=True):
            out.append((q @ k.T / (WIDTH // HEADS) ** 0.5).softmax(1) @ v)
        x = norm(x + linear(torch.cat(out, 1), attention.out), layer.mixer.norm)
        feed_forward = layer.feed_forward.branch
        x = norm(x + linear(gelu(linear(x, feed_forward.up)), feed_forward.down), layer.feed_forward.norm)
    x = norm(gelu(linear(x[1:], model.transform)), model.transform_norm)
    return x @ model.embed.weight[:CODES].T + model.bias


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", None])
def test_transformer_is_the_papers(backend):
    model, tokens = small(backend=backend), random_tokens(2, LENGTH, vocab=CODES + 1)
    ours = model(tokens, torch.tensor([3, 1]))
    model.double()
    theirs = [transformer_of_the_paper(row, label, model) for row, label in zip(tokens, (3, 1), strict=True)]
    assert_near(ours, torch.stack(theirs))


def masked_after(ratio, count=LENGTH):
    return math.ceil(round(math.cos(math.pi / 2 * ratio) * count, 9))


def test_cosine_schedule():
    """Section 3.3: γ(r) = cos(π r / 2), of which n = ceil(γ(r) N) follow; γ(0) = 1, γ(1) = 0."""
    for count in (1, 7, 16, 256):
        for step in range(13):
            assert cosine_schedule(step / 12, count) == masked_after(step / 12, count)
    assert [cosine_schedule(ratio, 16).item() for ratio in (0, 1 / 3, 2 / 3, 1)] == [16, 14, 8, 0]
    counts, ratios = torch.tensor([[16], [9]]), torch.tensor([[0.5], [0.25]])
    assert cosine_schedule(ratios, counts).tolist() == [[12], [9]]


def test_what_training_hides():
    """Section 3.1: r uniform in [0, 1), ceil(γ(r) N) tokens drawn uniformly; the loss is that of the hidden ones."""
    model, tokens = small(), random_tokens(4000, LENGTH, vocab=CODES)
    masked = model.hide(tokens, generator=torch.Generator().manual_seed(0))
    ratios = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    hidden = masked == CODES
    assert torch.equal(hidden.sum(1), torch.tensor([masked_after(r) for r in ratios]))
    assert torch.equal(masked[~hidden], tokens[~hidden])
    share = hidden.double().mean(0)  # of each place alike
    assert (share - share.mean()).abs().max() < 4 * 0.5 / 4000**0.5
    logits = torch.randn(4000, LENGTH, CODES, generator=torch.Generator().manual_seed(1))
    loss = model.loss(logits, masked, tokens, label_smoothing=0.0)
    each = -logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(loss, each[hidden].mean())
    logits.requires_grad_()
    model.loss(logits, masked, tokens).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, hidden)


class Oracle(MaskGIT):
    """Sure of `answer` at every place, by a logit over all others; keeps what it was asked."""

    def __init__(self, answer, sure):
        super().__init__(CODES, 5, length=LENGTH, dim=WIDTH, depth=1, num_heads=HEADS)
        self.logits, self.asked = F.one_hot(answer, CODES) * sure[..., None], []

    def forward(self, tokens, classes):
        self.asked.append(tokens)
        return self.logits


def oracle(batch=3):
    generator = torch.Generator().manual_seed(0)
    answer = torch.randint(CODES, (batch, LENGTH), generator=generator)
    doubt = 1e-6 * (1 + torch.rand(batch, LENGTH, generator=generator).argsort(1))  # 1 - probability, of each place
    sure = (CODES / doubt).log()
    return Oracle(answer, sure).eval(), answer, sure


def test_decoding_keeps_the_surest():
    """Section 3.2: predict, sample, schedule, mask. After step t of T the ceil(γ(t / T) N) least sure are masked."""
    model, answer, sure = oracle()
    out = model.generate(torch.arange(3), steps=6, temperature=0.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out, answer)
    assert len(model.asked) == 6 and (model.asked[0] == CODES).all()
    for step, tokens in enumerate(model.asked):
        least = sure.argsort(1)[:, : masked_after(step / 6)]
        assert torch.equal(tokens, answer.scatter(1, least, CODES)), step


def test_noise_changes_the_order_alone():
    model, answer, _ = oracle()
    out = model.generate(torch.arange(3), steps=6, temperature=20.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out, answer)
    counts = [masked_after(step / 6) for step in range(6)]
    assert [(tokens == CODES).sum(1).tolist() for tokens in model.asked] == [[count] * 3 for count in counts]
    noisy, (quiet, *_) = model.asked, oracle()
    quiet.generate(torch.arange(3), steps=6, temperature=0.0)
    assert any(not torch.equal(a, b) for a, b in zip(noisy, quiet.asked, strict=True))


def test_editing():
    """Section 4.3: what is given stays, the rest is made."""
    model, answer, _ = oracle(2)
    given = random_tokens(2, LENGTH, vocab=CODES)
    given[0, 4:9], given[1] = CODES, given[1]
    out = model.generate(torch.arange(2), steps=4, tokens=given)
    assert torch.equal(out, torch.where(given == CODES, answer, given))
    assert [(tokens[0] == CODES).sum().item() for tokens in model.asked] == [5, 5, 4, 2]


def test_generates():
    """Drawn from the model's own probabilities: repeatable by a generator, different without."""
    model, classes = small(), torch.arange(4) % 5
    out = [model.generate(classes, steps=3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    assert out[0].shape == (4, LENGTH) and out[0].max() < CODES
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        model.generate(classes, steps=0)
