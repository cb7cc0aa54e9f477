"""What the tests of the families share: random models of other libraries, and closeness to them."""

import host_models
import torch

WIDTH, HEADS, VOCAB = 32, 4, 99


def transformers_model(name, **config):
    """A random model in eval mode, its config cut down by `config`; the weights are large enough to matter."""
    import transformers

    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = host_models.disturb(cls(cls.config_class(**config))).eval()
    if model.can_generate():
        model.generation_config.eos_token_id = config.get("eos_token_id")
    return model


def random_tokens(*shape, vocab=VOCAB, seed=1):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths, longest):
    """An attention_mask (B, longest)."""
    return (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


def assert_near(ours, theirs, lengths=None):
    """Within 1e-4 of the largest number; of padded rows, the first lengths[b] alone."""
    if lengths is not None:
        ours, theirs = (torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
