"""One small model of every family, with inputs and a loss: what `test_families.py` holds all of them to."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hosts import VOCAB, random_tokens
from torch import Tensor

from xformer_fast import models

SMALL = {"dim": 32, "depth": 2, "num_heads": 4}
LENGTHS = torch.tensor([11, 11, 4, 7])


@dataclass
class Family:
    """make(**choices) builds a model, inputs(length) its arguments, loss(outputs) a number that training lowers.

    mixers: other choices of a mixer that make sense, with whatever else they ask for.
    """

    make: Callable
    inputs: Callable[[int], tuple[tuple, dict]]
    loss: Callable[..., Tensor]
    mixers: dict[str, dict] = field(default_factory=dict)

    def run(self, model, length: int = 11) -> tuple[Tensor, ...]:
        """The outputs for inputs of a length, at least 11, that of the longest row."""
        args, options = self.inputs(length)
        dtype = next(model.parameters()).dtype
        out = model(*(x.to(dtype) if x.is_floating_point() else x for x in args), **options)
        return out if isinstance(out, tuple) else (out,)


def tokens(length, seed=1):
    return random_tokens(4, length, seed=seed)


def features(length):
    return torch.randn(4, 4 * length, 16, generator=torch.Generator().manual_seed(length))


def next_tokens(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens(logits.shape[1])[:, 1:].flatten())


def same_tokens(logits):
    return F.cross_entropy(logits.flatten(0, 1), tokens(logits.shape[1]).flatten())


def bert_losses(masked, follows):
    return same_tokens(masked) + F.cross_entropy(follows, torch.tensor([0, 1, 1, 0]))


def ctc(logits):
    log_probs = logits.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probs, tokens(3), LENGTHS.clamp(max=logits.shape[1]), torch.tensor([3, 3, 2, 3]))


LINEAR = {"linear": {"mixer": "linear"}}
LOCAL = {"window": {"window": (3, 0)}}
FAMILIES = {
    "transformer": Family(
        lambda **choices: models.Transformer(VOCAB, hidden=48, **SMALL | choices),
        lambda n: ((tokens(n, seed=2), tokens(n)), {"source_lengths": LENGTHS}),
        next_tokens,
        LINEAR,
    ),
    "bert": Family(
        lambda **choices: models.BERT(VOCAB, **SMALL | choices),
        lambda n: ((tokens(n, seed=2),), {"lengths": LENGTHS}),
        bert_losses,
        LINEAR | LOCAL,
    ),
    "gpt": Family(
        lambda **choices: models.GPT(VOCAB, **SMALL | choices),
        lambda n: ((tokens(n),), {"lengths": LENGTHS}),
        next_tokens,
        LINEAR | LOCAL,
    ),
    "llama": Family(
        lambda **choices: models.LLaMA(VOCAB, hidden=48, **{"num_kv_heads": 2} | SMALL | choices),
        lambda n: ((tokens(n),), {"lengths": LENGTHS}),
        next_tokens,
        {"linear": {"mixer": "linear", "positions": "sinusoidal"}} | LOCAL,
    ),
    "t5": Family(
        lambda **choices: models.T5(VOCAB, hidden=48, activation="geglu_tanh", **SMALL | choices),
        lambda n: ((tokens(n, seed=2), tokens(n)), {"source_lengths": LENGTHS}),
        next_tokens,
    ),
    "speech_transformer": Family(
        lambda **choices: models.SpeechTransformer(16, VOCAB, hidden=48, **SMALL | {"decoder_depth": 2} | choices),
        lambda n: ((features(n), tokens(n)), {"lengths": 4 * LENGTHS}),
        next_tokens,
        LINEAR,
    ),
    "ast": Family(
        lambda **choices: models.AST(5, mel_bins=32, frames=60, **SMALL | choices),
        lambda n: ((features(30).view(4, 60, 32),), {}),
        lambda logits: F.cross_entropy(logits, torch.tensor([0, 1, 2, 4])),
        LINEAR | {"neighborhood": {"mixer": "neighborhood", "kernel_size": (5,)}},
    ),
    "conformer": Family(
        lambda **choices: models.Conformer(16, VOCAB, hidden=48, kernel=5, **SMALL | choices),
        lambda n: ((features(n),), {"lengths": 4 * LENGTHS}),
        ctc,
        {"rope": {"positions": "rope"}, "linear": {"mixer": "linear", "positions": "sinusoidal"}},
    ),
    "branchformer": Family(
        lambda **choices: models.Branchformer(16, VOCAB, hidden=48, kernel=5, **SMALL | choices),
        lambda n: ((features(n),), {"lengths": 4 * LENGTHS}),
        ctc,
        {"rope": {"positions": "rope"}, "linear": {"mixer": "linear", "positions": "sinusoidal"}},
    ),
}
CASES = [(name, "own") for name in FAMILIES] + [(name, mixer) for name, f in FAMILIES.items() for mixer in f.mixers]


def make(name: str, mixer: str = "own", **choices):
    """A model of a family, in eval mode, with every parameter off its initial value."""
    torch.manual_seed(0)
    model = FAMILIES[name].make(**FAMILIES[name].mixers.get(mixer, {}), **choices).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
