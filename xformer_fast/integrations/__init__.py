"""`patch`, `unpatch`, `patched`: a model's attention onto `xformer_fast.attention` and back; one path a host library.

A path is a file here with `patch_model(model, backend, report)` and `unpatch_model(model)`. It is imported only when
the library that it imports already is: a model of a library that nobody imported cannot exist.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

HOSTS = {  # file -> library; in this order: distance.py goes on where transformers.py ends
    "transformers": "transformers", "distance": "transformers", "banded": "transformers", "sdpa_callers": "torch",
    "followed": "torch", "torch_mha": "torch",
}  # fmt: skip


@dataclass
class PatchReport:
    """What `patch` did: `replaced`, names of modules, and `skipped`, name -> why; `str()` is a table of both.

    Of those that were replaced, `followed` names the ones that compute their scores themselves: whether that code can
    be followed shows at the first call. Where it cannot, a warning says why, and it runs as it was written.
    """

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    followed: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.replaced)

    def __str__(self) -> str:
        lines = [f"{self.count} attention modules replaced, {len(self.skipped)} left as they were"]
        width = max((len(name) for name in (*self.replaced, *self.skipped)), default=0)
        how = dict.fromkeys(self.followed, " if its code can be followed: the first call tells")
        lines += [f"  {name:<{width}}  replaced{how.get(name, '')}" for name in self.replaced]
        lines += [f"  {name or '(model)':<{width}}  left: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def patch(model: nn.Module, *, backend: str | None = None) -> PatchReport:
    """Runs the attention of `model` on `xformer_fast.attention`; parameters, names and state_dict stay as they are.

    Anywhere inside `model` are switched: models of transformers that go through its `AttentionInterface` (results stay
    those of the "sdpa" implementation, or "eager" where sdpa lacks an option); modules of timm and transformers that
    call scaled_dot_product_attention or compute their scores themselves, and blocks of theirs that cut maps into
    windows; torch.nn.MultiheadAttention, in nn.Transformer and its layers too. `backend` holds for this model alone;
    None takes the default of each call. Where that default would be `reference` on a GPU a module is left as it was.
    Patching again, say with another backend, is fine. A model of transformers gets configs of its own, copies that it
    keeps after `unpatch`: others that were made from the same config object are left alone. If it is wrapped (peft),
    patch the wrapper, whose `config` then stays the model's.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        BackendUnavailable, ValueError: `backend` cannot run here, or is not one.

    >>> import xformer_fast
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    >>> model = BertModel(BertConfig(**sizes))
    >>> xformer_fast.patch(model).replaced
    ['encoder.layer.0.attention.self', 'encoder.layer.1.attention.self']
    >>> xformer_fast.unpatch(model)
    """
    _check(model)
    report = PatchReport()
    for host in _hosts():
        host.patch_model(model, backend, report)
    replaced, around = {*report.replaced}, {above for name in report.replaced for above in _above(name)}
    for name in [*report.skipped]:  # told by one host, replaced by another: the same module, one inside it or around it
        if name in replaced or name in around or not replaced.isdisjoint(_above(name)):
            del report.skipped[name]
    if not report.replaced and not report.skipped:
        report.skipped[""] = "holds no attention that is known as one of transformers, timm or torch.nn"
    return report


def unpatch(model: nn.Module) -> None:
    """Gives `model` the attention back that it had before `patch`; nothing happens to a model that was not patched.

    >>> import torch, xformer_fast
    >>> xformer_fast.unpatch(torch.nn.Linear(2, 2))
    """
    _check(model)
    for host in _hosts():
        host.unpatch_model(model)


@contextmanager
def patched(model: nn.Module, *, backend: str | None = None) -> Iterator[PatchReport]:
    """`patch` for the length of a with-block, then `unpatch`, also of what was patched before.

    >>> import torch, xformer_fast
    >>> layer, x = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True), torch.randn(2, 5, 32)
    >>> with xformer_fast.patched(layer) as report:
    ...     print(report.replaced, layer(x).shape)
    ['self_attn'] torch.Size([2, 5, 32])
    """
    report = patch(model, backend=backend)
    try:
        yield report
    finally:
        unpatch(model)


def register_transformers() -> None:
    """Makes `attn_implementation="xformer_fast"` known to transformers; `patch` does this itself.

    >>> import xformer_fast
    >>> xformer_fast.register_transformers()
    """
    importlib.import_module(".transformers", __name__).register()


def _above(name: str) -> set[str]:
    """The names of the modules that a module lies in."""
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(len(parts))}


def _check(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _hosts():
    return [importlib.import_module(f".{file}", __name__) for file, library in HOSTS.items() if library in sys.modules]
