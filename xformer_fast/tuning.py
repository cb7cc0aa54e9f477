"""Parameter-efficient tuning: a model is frozen, and few parameters are added that learn in its place.

    freeze(model, but=("head",))                  what is added below, and what `but` names, is all that learns
    add_lora(model, rank=8)                       W + B A in chosen linear layers, by peft;  merge_lora(model)
    add_adapters(model, width=32)                 small MLPs behind, or beside, the branches of every layer
    add_prefixes(model, length=16)                keys and values before every sequence, straight into the op
    add_prompts(model, length=16, deep=True)      tokens before every sequence; in a ViT: visual prompt tuning

All change the model in place and may be combined. Prefixes and prompts are made for `xformer_fast.layers`; LoRA and
adapters go around any module, in models of other libraries too, before `xformer_fast.patch` or after it. A patched
model of transformers gets its prefixes and prompts from peft itself (`PrefixTuningConfig`, `PromptTuningConfig`).

    share = trainable_share(model)                of all parameters, those that learn
    torch.save(tuned_state(model), path)          a file of these alone: model.load_state_dict(..., strict=False)
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from .layers import Attention, Prefix, Stack
from .mixers import LinearMixer, SoftmaxMixer


def freeze(model: nn.Module, *, but: Collection[str] = ()) -> None:
    """No parameter of `model` learns but those in modules, or of names, that end with one of `but`.

    >>> from xformer_fast.models import GPT
    >>> from xformer_fast.tuning import freeze
    >>> model = GPT(100, dim=64, depth=2, num_heads=4)
    >>> freeze(model, but=["norm"])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad][:2]
    ['layers.0.mixer.norm.weight', 'layers.0.mixer.norm.bias']
    """
    model.requires_grad_(False)
    for name in _named(model, but):
        model.get_submodule(name).requires_grad_(True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if _ends(name, but):
            parameter.requires_grad_(True)


def trainable_share(model: nn.Module) -> float:
    """How much of the model's parameters learn, 0 to 1; those shared by two modules count once."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, learns in counts if learns) / sum(n for n, _ in counts)


def tuned_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of `model.state_dict()` that learns."""
    learns = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name in learns}


# ---- LoRA


def add_lora(
    model: nn.Module, *, rank: int = 8, alpha: float | None = None, targets: Collection[str] = ("query", "value"),
    dropout: float = 0.0,
) -> None:  # fmt: skip
    """W x becomes W x + (alpha / rank) · B A x: Hu et al., "LoRA" (2021). By peft, which has to be installed.

    targets: linear layers, by the end of their names; W is frozen. alpha: 2 · rank by default. B starts at zero, so the
    model is what it was. Without dropout, `merge_lora` makes of it the plain model that it computes.

    >>> import torch
    >>> from xformer_fast.models import LLaMA
    >>> from xformer_fast.tuning import add_lora, freeze, merge_lora
    >>> model = LLaMA(100, dim=64, depth=2, num_heads=4, hidden=128)
    >>> freeze(model)
    >>> add_lora(model, rank=4, targets=["query", "value", "down"])
    >>> logits = model(torch.randint(100, (2, 12)))
    >>> merge_lora(model)
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = _named(model, targets)
    if not names:
        raise ValueError(f"no module of the model has a name that ends with one of {', '.join(targets)}")
    if there := _lora_layers(model).keys() & set(names):
        raise ValueError(f"{min(there)} has LoRA already: merge_lora comes first, or other targets")
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=list(targets), lora_dropout=dropout
    )
    known = hasattr(model, "peft_config")
    inject_adapter_in_model(config, model)  # freezes what is not its own
    if not known:
        del model.peft_config  # peft's note, which would mean something to transformers, and to the next call
    targeted = {id(layer.weight) for layer in _lora_layers(model).values()}
    for parameter in learning:
        parameter.requires_grad_(id(parameter) not in targeted)


def merge_lora(model: nn.Module) -> None:
    """Adds B A to the weights and puts the plain linear layers back: no cost is left, the model computes the same."""
    for name, layer in _lora_layers(model).items():
        layer.merge(safe_merge=True)
        _put(model, name, layer.get_base_layer())


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


# ---- adapters


class Adapter(nn.Module):
    """expand(gelu(reduce(x))), zero at first; x (..., dim)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.reduce, self.expand = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.normal_(self.reduce.weight, std=dim**-0.5)
        nn.init.zeros_(self.reduce.bias)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(nn.functional.gelu(self.reduce(x)))


class Adapted(nn.Module):
    """A module and its adapter: y + adapter(y) of its result y or, parallel, y + adapter(x) of its argument x."""

    def __init__(self, base: nn.Module, adapter: Adapter, *, parallel: bool):
        super().__init__()
        self.base, self.adapter, self.parallel = base, adapter, parallel

    def forward(self, x: Tensor, *args, **options) -> Tensor:
        y = self.base(x, *args, **options)
        return y + self.adapter(x if self.parallel else y)


def add_adapters(
    model: nn.Module, *, width: int = 32, parallel: bool = False, targets: Collection[str] | None = None
) -> None:
    """Small MLPs of `width` hidden channels: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (2019).

    They stand behind the projections that end a branch, ("out", "down"): so behind attention and feed-forward, before
    dropout and residual. parallel: beside the whole feed-forward, ("feed_forward.branch",), as He et al., "Towards a
    Unified View of Parameter-Efficient Transfer Learning" (2022), found best. targets: other modules, by the end of
    their names, whose last linear layer gives their result (a host's "output.dense", "mlp"). Adapters start at zero, so
    the model is what it was.

    >>> from xformer_fast.models import BERT
    >>> from xformer_fast.tuning import add_adapters, freeze, trainable_share
    >>> model = BERT(100, dim=64, depth=2, num_heads=4)
    >>> freeze(model)
    >>> add_adapters(model, width=8)
    >>> round(trainable_share(model), 3)
    0.029
    """
    targets = targets or (("feed_forward.branch",) if parallel else ("out", "down"))
    names = _named(model, targets)
    if not names:
        raise ValueError(f"no module of the model has a name that ends with one of {', '.join(targets)}")
    for name in names:
        base = model.get_submodule(name)
        layers = [module for module in base.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ValueError(f"{name}: an adapter's place must hold a linear layer, {type(base).__name__} has none")
        adapter = Adapter(layers[-1].out_features, width).to(layers[-1].weight.device, layers[-1].weight.dtype)
        _put(model, name, Adapted(base, adapter, parallel=parallel))


# ---- prefixes and prompts


def add_prefixes(model: nn.Module, length: int | Sequence[int] = 16, *, std: float = 1.0) -> None:
    """`layers.Prefix` in every `Attention`: Li and Liang, "Prefix-Tuning" (2021).

    length: keys and values before each sequence, one number or one an `Attention` in the order of the model's modules,
    0 for none. std: of the first values. Attention must be among all places, by "softmax" or "linear": elsewhere a
    query does not see all keys.

    >>> import torch
    >>> from xformer_fast.models import GPT
    >>> from xformer_fast.tuning import add_prefixes, freeze
    >>> model = GPT(100, dim=64, depth=3, num_heads=4)
    >>> freeze(model)
    >>> add_prefixes(model, [32, 16, 0])
    >>> model(torch.randint(100, (2, 12))).shape
    torch.Size([2, 12, 100])
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    lengths = [length] * len(layers) if isinstance(length, int) else list(length)
    if not layers or len(lengths) != len(layers):
        raise ValueError(f"length must be a number or {len(layers)}, one an Attention of the model, got {length}")
    for (name, layer), n in zip(layers.items(), lengths, strict=True):
        if n == 0:
            continue
        mixer = layer.mixer
        if not isinstance(mixer, (SoftmaxMixer, LinearMixer)) or mixer.constants.get("window") is not None:
            raise ValueError(f"{name}: {type(mixer).__name__} does not let every query see all keys, so not a prefix")
        prefix = Prefix(n, layer.num_kv_heads, layer.head_dim)
        for parameter in prefix.parameters():
            nn.init.normal_(parameter, std=std)
        layer.prefix = prefix.to(next(layer.parameters()))


def add_prompts(model: nn.Module, length: int = 16, *, deep: bool = False, std: float = 0.02) -> None:
    """Learned tokens before the sequences of the model's first `Stack`, behind its positions: see `layers.Stack`.

    In a language model this is prompt tuning, in a ViT visual prompt tuning; deep: each layer has its own. Classes read
    from the first token, and logits of tokens, are where they were.

    >>> import torch
    >>> from xformer_fast.models import GPT
    >>> from xformer_fast.tuning import add_prompts, freeze
    >>> model = GPT(100, dim=64, depth=2, num_heads=4)
    >>> freeze(model)
    >>> add_prompts(model, 20)
    >>> model(torch.randint(100, (2, 12))).shape
    torch.Size([2, 12, 100])
    """
    stack = next((module for module in model.modules() if isinstance(module, Stack)), None)
    if stack is None:
        raise ValueError(f"{type(model).__name__} has no Stack of layers to put a prompt before")
    attention = next((module for module in stack.modules() if isinstance(module, Attention)), None)
    if attention is None:
        raise ValueError(f"the layers of {type(model).__name__} have no Attention that would see a prompt")
    width = next(module for module in attention.query.modules() if isinstance(module, nn.Linear)).in_features
    prompt = torch.randn(len(stack) if deep else 1, length, width) * std
    stack.prompt = nn.Parameter(prompt.to(next(stack.parameters())))


# ---- names


def _ends(name: str, ends: Collection[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _named(model: nn.Module, ends: Collection[str]) -> list[str]:
    return [name for name, _ in model.named_modules() if _ends(name, ends)]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
