"""One small model of every family, with inputs and a loss: what `test_families.py` holds all of them to."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hosts import VOCAB, random_tokens
from torch import Tensor

from xformer_fast import models
from xformer_fast.layers import Attention
from xformer_fast.models import detr, mae

SMALL = {"dim": 32, "depth": 2, "num_heads": 4}
LENGTHS = torch.tensor([11, 11, 4, 7])


@dataclass
class Family:
    """make(**choices) builds a model, inputs(length) its arguments, loss(outputs) a number that training lowers.

    mixers: other choices of a mixer that make sense, with whatever else they ask for. shallow: choices for the least
    depth; training: choices for training, with dropout. unused: parameters that the inputs do not ask for.
    """

    make: Callable
    inputs: Callable[[int], tuple[tuple, dict]]
    loss: Callable[..., Tensor]
    mixers: dict[str, dict] = field(default_factory=dict)
    shallow: dict = field(default_factory=lambda: {"depth": 1})
    training: dict = field(default_factory=lambda: {"dropout": 0.1, "attention_dropout": 0.1})
    unused: tuple[str, ...] = ()

    def run(self, model, length: int = 11) -> tuple[Tensor, ...]:
        """The outputs for inputs of a length, at least 11, that of the longest row; or that many images."""
        args, options = self.inputs(length)
        like = next(model.parameters())
        args = (x.to(like.device, like.dtype if x.is_floating_point() else None) for x in args)
        out = model(*args, **{name: x.to(like.device) for name, x in options.items()})
        return tuple(x.cpu() for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point())


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


def images(count, height=32, width=32):
    """Each brighter than the one before."""
    noise = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(count))
    return 0.3 * noise + torch.linspace(-1, 1, count)[:, None, None, None]


def classes(*logits):
    """Each image is of a class of its own, up to five."""
    return sum(F.cross_entropy(x, torch.arange(len(x)) * 5 // len(x)) for x in logits)


def windows(backend=None, **options):
    """A maker of mixers for the families that take any module."""
    return lambda dim: Attention(dim, dim // 8, mixer="window", window_size=4, backend=backend, **options)


def convnext(mixer=None, backend=None, **choices):
    mixer = {} if mixer is None else {"mixer": mixer(backend)}
    return models.ConvNeXt(5, **{"dims": (16, 32), "depths": (1, 2), "layer_scale": 1.0} | mixer | choices)


def replknet(backend=None, **choices):  # a convolutional network: there is nothing to choose
    return models.RepLKNet(5, **{"dims": (16, 32), "depths": (1, 2), "kernels": (9, 7), "small": 3} | choices)


def noise(count):
    return torch.rand(count, 9, generator=torch.Generator().manual_seed(0))


def reconstruction(pixels):
    ranks = noise(len(pixels)).argsort(1).argsort(1)  # two of the nine patches are shown
    return mae.reconstruction_loss(pixels, ranks >= 2, images(len(pixels), 24, 24))


def detection(logits, boxes):
    places = torch.tensor([[0.3, 0.3, 0.4, 0.2], [0.6, 0.7, 0.3, 0.5]])
    return detr.matching_loss(logits, boxes, [(torch.tensor([i % 5, 4]), places) for i in range(len(logits))])


def shown(height, width):
    """A mask of images that are padded behind and below."""
    mask = torch.ones(4, height, width, dtype=torch.bool)
    mask[1, height // 2 :], mask[2, :, width // 2 :] = False, False
    return mask


def prompts(count):
    generator = torch.Generator().manual_seed(count)
    points, corner = (48 * torch.rand(count, 2, *shape, 2, generator=generator) for shape in ((3,), ()))
    masks = torch.randn(count, 1, 24, 24, generator=generator)
    return points, torch.tensor([1, 0, -1]).expand(count, 2, 3), torch.cat((corner / 2, corner / 2 + 20), -1), masks


def segmentation(masks, scores):
    target = torch.zeros_like(masks)
    target[..., 4:12, 2:20] = 1
    return F.binary_cross_entropy_with_logits(masks, target) + scores.square().mean()


def image_tokens(count, seed=1):
    return random_tokens(count, 16, vocab=40, seed=seed)


def masked_tokens(count):
    return image_tokens(count).masked_fill(image_tokens(count, seed=2) < 24, 40)


def hidden_tokens(logits):
    hidden = masked_tokens(len(logits)) == 40
    return F.cross_entropy(logits[hidden], image_tokens(len(logits))[hidden])


LINEAR = {"linear": {"mixer": "linear"}}
LOCAL = {"window": {"window": (3, 0)}}
PYRAMID = {"depths": (2, 1)}
PATCHES = {"patches": ((7, 4, 2), (3, 2, 1))}
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
        training={"attention_dropout": 0.1},
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
        shallow={"depth": 1, "decoder_depth": 1},
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
    "vit": Family(
        lambda **choices: models.ViT(5, image_size=24, patch=8, distilled=True, **SMALL | choices),
        lambda n: ((images(n, 24, 24),), {}),
        classes,
        LINEAR | {"rope": {"positions": "rope"}},
        training={"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.1},
    ),
    "swin": Family(
        lambda **choices: models.Swin(5, **PYRAMID | {"dim": 16, "num_heads": (2, 4), "window_size": 4} | choices),
        lambda n: ((images(n, 40, 32),), {}),
        classes,
        LINEAR | {"second": {"version": 2}, "neighborhood": {"mixer": "neighborhood", "kernel_size": 3}},
        {"depths": (2, 1)},
        {"dropout": 0.1, "drop_path": 0.1},
    ),
    "maxvit": Family(
        lambda **choices: models.MaxViT(
            5, **PYRAMID | {"dims": (16, 32), "stem": 8, "head_dim": 8, "window_size": 4} | choices
        ),
        lambda n: ((images(n),), {}),
        classes,
        LINEAR,
        {"depths": (1, 1)},
        {"dropout": 0.1, "drop_path": 0.1},
    ),
    "cvt": Family(
        lambda **choices: models.CvT(5, **PYRAMID | {"dims": (16, 32), "num_heads": (1, 2)} | PATCHES | choices),
        lambda n: ((images(n, 40, 32),), {}),
        classes,
        LINEAR,
        {"depths": (1, 1)},
        {"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.1},
    ),
    "metaformer": Family(
        lambda **choices: models.MetaFormer(
            5, **PYRAMID | {"dims": (16, 32), "mixers": ("pooling", "softmax"), "head_dim": 8} | PATCHES | choices
        ),
        lambda n: ((images(n, 40, 32),), {}),
        classes,
        {"linear": {"mixers": ("identity", "linear")}, "window": {"mixers": (windows(), "window"), "window_size": 4}},
        {"depths": (1, 1)},
        {"dropout": 0.1, "drop_path": 0.1},
    ),
    "convnext": Family(
        convnext,
        lambda n: ((images(n, 40, 32),), {}),
        classes,
        {"window": {"mixer": windows}},
        {"depths": (1, 1)},
        {"dropout": 0.1, "drop_path": 0.1},
    ),
    "replknet": Family(
        replknet,
        lambda n: ((images(n, 40, 32),), {}),
        classes,
        shallow={"depths": (1, 1)},
        training={"dropout": 0.1, "drop_path": 0.1},
    ),
    "mae": Family(
        lambda **choices: models.MAE(
            image_size=24, patch=8, **SMALL | {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2} | choices
        ),
        lambda n: ((images(n, 24, 24),), {"noise": noise(n)}),
        reconstruction,
        LINEAR,
    ),
    "detr": Family(
        lambda **choices: models.DETR(
            5,
            **SMALL | {"hidden": 48, "num_queries": 4} | choices,
            backbone=detr.ResNet(stem=8, dims=(16, 32), depths=(1, 1)),
        ),
        lambda n: ((images(4, 48, n + 37), shown(48, n + 37)), {}),
        detection,
        training={"depth": 1, "dropout": 0.1, "attention_dropout": 0.1},
    ),
    "sam": Family(
        lambda **choices: models.SAM(
            image_size=48,
            patch=8,
            window_size=4,
            global_layers=(1,),
            out_dim=32,
            decoder_heads=2,
            decoder_hidden=48,
            **SMALL | choices,
        ),
        lambda n: ((images(n, 48, 48), *prompts(n)), {}),
        segmentation,
        training={"attention_dropout": 0.1},
        unused=("prompts.no_mask",),
    ),
    "maskgit": Family(
        lambda **choices: models.MaskGIT(40, 5, length=16, **SMALL | choices),
        lambda n: ((masked_tokens(n), torch.arange(n) % 5), {}),
        hidden_tokens,
        LINEAR,
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
