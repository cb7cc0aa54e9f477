"""Hugging Face transformers: an attention function and a mask function, both registered as "xformer_fast".

transformers builds one mask a forward pass (`create_causal_mask` and its sisters call the mask function), hands it
through the model's own code as `attention_mask`, and calls the attention function in every layer. Its `sdpa_mask`
spells padding, causality and windows out as a (B, 1, Sq, Sk) tensor; ours keeps the structure, so that the kernel
skips what the mask hides. What the attention function gets is one of

* None, from models that ask for no mask, in a static cache's prefill, and for one query that sees every key: nothing is
  hidden, except the future where the module is causal (`is_causal`, else `module.is_causal`) and there is more than one
  query. Queries then start at key 0 (top-left). This is sdpa's rule, too.
* a bool or float mask: the whole truth, as it stands. `is_causal` and `sliding_window` are not looked at, since a model
  that builds a mask itself, or is given one by its user, has put everything in.
* an integer tensor: a structured mask of ours. Its shape and dtype say what it means, never an attribute, a subclass
  or the module, whose `is_causal` may be wrong. It is (B, rule, 1, n), expanded without memory along `rule`:
    - rule (the size): 1 hides no position; 2 is causal; 2w + 1 is causal over the last w keys; 2w + 2 reaches distance
      w both ways. Positions are bottom-right: the last query meets the last key, as it does after any cache.
    - int16, n keys: all of them count. Keys from n on, a static cache's unused end, are cut off.
    - uint8, n keys: the same, but key j counts only where it is not 0.
    - int32, n = 1: key_lengths, for padding on the right alone.
    - int64, n = sequences + 1: cu_seqlens of packed sequences, over the rows laid end to end.

Shapes and dtypes survive slicing along keys, moves between devices, checkpointing, torch.compile(fullgraph=True); an
integer mask that meets code which does not know it fails there instead of attending to too much. A dense mask is left
to `sdpa_mask` for mask functions other than transformers' own plain ones, where the caller refuses structure
(`allow_is_causal_skip=False`: the model will compute with the mask, or decodes with a static cache, where the mask is
one row), for chunked attention, and under torch.compile for packed sequences and a static cache's prefill.

Models whose own code computes with masks (attention beside AttentionInterface, masks that grow by a piece) get those of
their own implementation, `eager_mask` or `sdpa_mask`, under a name of its own: see `_MASKS`.

Not done: head masks, sparse indices, continuous batching's paged cache. They raise, as does any option that is not
known to be harmless. Attention weights are never formed: asked for them (`output_attentions`), models return what they
return with "sdpa", which forms none either, and a warning tells.
"""

import copy
import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

from ..ops.attention import attention, varlen_attention
from . import PatchReport
from .banded import is_banded
from .common import add_mask, hide, no_kernel, original
from .follow import Followed, Trace, real, takes_all, tell_once
from .follow_attention import Rule, Sum, sdpa
from .followed import scorers

NAME = "xformer_fast"
FOLLOWED = "xformer_fast_followed"  # the implementation of models that compute their scores themselves: masks alone
_MASKS = {"": None, "_float_masks": eager_mask, "_bool_masks": sdpa_mask}  # what a name ends in -> a host's masks
_RECORD = "_xformer_fast_patch"
_DTYPES = (torch.int16, torch.uint8, torch.int32, torch.int64)

_HARMLESS = frozenset(  # what models hand down with their other keyword arguments
    {
        "cache_position", "deterministic", "input_ids", "inputs_embeds", "labels", "layer_idx",
        "logits_to_keep", "max_seqlen", "mm_token_type_ids", "num_items_in_batch", "output_hidden_states",
        "output_router_logits", "past_key_values", "position_embeddings", "position_ids", "return_dict",
        "seq_idx", "token_type_ids", "use_cache",
    }
).union(vars(GenerationConfig())) - {"output_attentions"}  # fmt: skip
_REFUSED = {
    "head_mask": "heads cannot be masked",
    "indices": "sparse attention to chosen keys is not supported",
    "block_indices": "sparse attention to chosen blocks is not supported",
    "sinks": "sinks that differ from query to query are not supported",
    "cache": "continuous batching's paged cache is not supported",
}
_REFUSED_AT_ONCE = ("indices", "block_indices", "sinks")  # modules that hand these down are left as they are


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    backend: str | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function: query (B, Hq, Sq, D), key and value (B, Hkv, Sk, D or Dv) -> (B, Sq, Hq, Dv), no weights.

    sliding_window counts keys, the query's own included, as FlashAttention's callers do; it matters only where no mask
    is given and the module is causal. s_aux: (Hq,) attention sinks. position_bias: added to the scores, with gradient.
    With cu_seq_lens_* the rows hold packed sequences, laid end to end.
    """
    if kwargs.pop("output_attentions", None) and not torch.compiler.is_compiling():
        tell_once("output_attentions: attention weights are never formed; unpatch, and use 'eager', to see them")
    for name, given in kwargs.items():
        if name not in _HARMLESS and given is not None and given is not False:
            raise TypeError(f"xformer_fast attention: {name}: {_REFUSED.get(name, 'this option is not known to it')}")
    if isinstance(query, Followed) or isinstance(attention_mask, Sum):  # windows of a map: follow_windows.py
        if any(x is not None for x in (softcap, s_aux, position_bias, cu_seq_lens_q)):
            query, key, value, attention_mask = map(real, (query, key, value, attention_mask))
        else:
            out = sdpa(query, key, value, attention_mask, dropout, scale=scaling)
            return out.transpose(1, 2).contiguous(), None
    if query.shape[0] != key.shape[0]:  # learned queries that all rows share
        query = query.expand(key.shape[0], -1, -1, -1)
    options = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout, "backend": backend}
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)

    call = {"query": query, "key": key, "value": value, "mask": None, "key_lengths": None}
    call |= {"causal": False, "window": None}
    if attention_mask is None:
        call["causal"] = "top_left" if is_causal and query.shape[2] > 1 else False
        if is_causal and sliding_window is not None:
            call["window"] = (sliding_window - 1, -1)
    elif attention_mask.dtype == torch.bool or attention_mask.dtype.is_floating_point:
        call["mask"] = attention_mask
    else:
        _unpack(attention_mask, call)
        if attention_mask.dtype == torch.int64 and cu_seq_lens_q is None:
            cu_seq_lens_q = cu_seq_lens_k = attention_mask[0, 0, 0]

    if cu_seq_lens_q is not None and call["mask"] is None:
        if call["key_lengths"] is not None or position_bias is not None:
            other = "padding" if position_bias is None else "position_bias"
            raise ValueError(f"xformer_fast attention: {other} cannot stand beside packed sequences (cu_seq_lens_q)")
        causal = bool(is_causal) if attention_mask is None else call["causal"]
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return _packed(query, key, value, lengths, causal=causal, window=call["window"], **options), None
    if cu_seq_lens_q is not None:
        call["mask"] = hide(call["mask"], _same_sequence(cu_seq_lens_q, cu_seq_lens_k, query, key))
    if isinstance(position_bias, Rule):  # distance.py
        position_bias.apply(call)
    elif getattr(module, "adds_zeros", False):
        pass
    elif position_bias is not None:
        position_bias = position_bias[..., : call["key"].shape[2]]
        call["mask"] = position_bias if call["mask"] is None else hide(position_bias, call["mask"])
    out = attention(**call, **options)
    return out.transpose(1, 2).contiguous(), None


def _packed(query, key, value, lengths, **options) -> Tensor:
    cu_q, cu_k, max_q, max_k = lengths
    max_q = int(torch.diff(cu_q).max()) if max_q is None else max_q
    max_k = int(torch.diff(cu_k).max()) if max_k is None else max_k
    batch = query.shape[0]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen_attention(query, key, value, cu_q.int(), cu_k.int(), int(max_q), int(max_k), **options)
    return out.unflatten(0, (batch, -1))


def _same_sequence(cu_q: Tensor, cu_k: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """(Sq, Sk), True where query and key stand in the same packed sequence of the one row."""
    of_query = torch.bucketize(torch.arange(query.shape[2], device=cu_q.device), cu_q[1:], right=True)
    of_key = torch.bucketize(torch.arange(key.shape[2], device=cu_k.device), cu_k[1:], right=True)
    return of_query[:, None] == of_key


# Structured masks


def _encode(content: Tensor, causal: bool, window: int | None) -> Tensor:
    """content (B or 1, n) -> (B or 1, rule, 1, n), as the head of this file says."""
    rule = 2 if causal else 1
    if window is not None:
        rule = 2 * window + (1 if causal else 2)
    return content[:, None, None, :].expand(-1, rule, -1, -1)


def _decode(mask: Tensor) -> tuple[bool, tuple[int, int] | None, Tensor]:
    """-> causal, the kernel's window, content (B or 1, n); int32 content is (B or 1,)."""
    if mask.dim() != 4 or mask.shape[2] != 1 or mask.dtype not in _DTYPES:
        raise TypeError(
            f"xformer_fast attention: attention_mask is {mask.dtype} {tuple(mask.shape)}: neither bool or float nor a "
            "structured mask of its own, so the model has computed with its mask"
        )
    if mask.dtype == torch.int32 and mask.shape[3] != 1:
        raise ValueError(f"xformer_fast attention: an int32 mask must be (B, rule, 1, 1), got {tuple(mask.shape)}")
    rule, content = mask.shape[1], mask[:, 0, 0, :]
    if mask.dtype in (torch.int32, torch.int64):
        content = content[:, 0] if mask.dtype == torch.int32 else content[0]
    if rule <= 2:
        return rule == 2, None, content
    width = (rule - 1) // 2
    return (True, (width - 1, -1), content) if rule % 2 else (False, (width, width), content)


def _unpack(mask: Tensor, call: dict):
    """A structured mask, packed sequences apart, into the arguments of a call of `attention`."""
    call["causal"], call["window"], content = _decode(mask)
    if content.dtype == torch.int32:
        call["key_lengths"] = content.expand(call["query"].shape[0])
    elif content.dtype != torch.int64:
        keys = content.shape[1]
        call["key"], call["value"] = call["key"][:, :, :keys], call["value"][:, :, :keys]
        if content.dtype == torch.uint8:
            add_mask(call, content.bool()[:, None, None, :])


def structured_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config=None,
    **kwargs,
) -> Tensor | None:
    """The mask function: transformers' arguments, the masks that the head of this file lists."""
    plain = allow_is_causal_skip or allow_is_bidirectional_skip
    rule = _rule(mask_function, local_size, allow_is_causal_skip, config) if plain else None
    if rule is not None and not (isinstance(q_offset, Tensor) and is_tracing(q_offset)):
        causal, window = rule
        first = int(q_offset) - kv_offset  # where the first query stands among the keys at hand
        keys = first + q_length if causal or window is not None else kv_length
        if first >= 0 and keys <= kv_length if causal else keys == kv_length:
            padding = attention_mask
            if padding is not None:
                missing = kv_offset + keys - padding.shape[1]  # keys that it says nothing about do not count
                padding = nn.functional.pad(padding, (0, missing)) if missing > 0 else padding
                padding = padding[:, kv_offset : kv_offset + keys].to(torch.bool)
            return _structured(padding, causal, window, q_length, keys, kv_length, device)
    if not plain and attention_mask is None and not is_tracing():
        packed = _packed_sequences(mask_function)
        if packed is not None:
            return packed
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        device=device, config=config, **kwargs,
    )  # fmt: skip


def _structured(padding, causal: bool, window: int | None, q_length, keys, kv_length, device) -> Tensor | None:
    """padding (B, keys) or None; the queries stand at the last q_length of the first `keys` keys out of kv_length."""
    lengths = None
    if not is_tracing(padding):
        if padding is not None:
            lengths = padding.sum(-1, dtype=torch.int32)
            right = padding == (torch.arange(keys, device=padding.device) < lengths[:, None])
            complete, right = torch.stack((padding.all(), right.all())).tolist()
            padding = None if complete else padding
            lengths = lengths if right and not complete and keys == kv_length else None
        if window is not None and window >= keys:
            window = None
    if q_length == 1 and window is None:
        causal = False  # the one query stands at the last of `keys`
        if padding is None and keys == kv_length:
            return None
    if padding is None and window is None and causal and q_length == keys < kv_length:
        return None  # a static cache's prefill: `generate` asks for masks ahead; seeing None, a model makes its own
    if lengths is not None:
        content = lengths[:, None]
    elif padding is None:
        content = torch.zeros(1, 1, dtype=torch.int16, device=device).expand(1, keys)
    elif causal or window is not None or keys < kv_length:
        content = padding.to(torch.uint8)
    else:
        return padding[:, None, None, :]
    return _encode(content, causal, window)


def _rule(mask_function: Callable, local_size: int | None, causal: bool, config) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask function of transformers' own, None for any other.

    torch.compile cannot read a closure. There the caller is believed: leave to skip a causal mask (`causal`) or a
    bidirectional one is never given where the function holds more than causality and the config's window.
    """
    if mask_function is causal_mask_function:
        return True, None
    if mask_function is bidirectional_mask_function:
        return False, None
    if torch.compiler.is_compiling():
        sliding = local_size is not None and local_size == getattr(config, "sliding_window", None)
        chunked = local_size == getattr(config, "attention_chunk_size", None)
        return (causal, local_size) if sliding and not chunked else None
    parts = _closure(mask_function).get("mask_functions", ())
    if len(parts) == 2 and "sliding_window" in (overlay := _closure(parts[0])):
        for base, name, causal in (
            (causal_mask_function, sliding_window_overlay.__name__, True),
            (bidirectional_mask_function, sliding_window_bidirectional_overlay.__name__, False),
        ):
            if parts[1] is base and parts[0].__qualname__.startswith(f"{name}."):
                return causal, overlay["sliding_window"]
    return None


def _packed_sequences(mask_function: Callable) -> Tensor | None:
    """The structured mask of a plain mask function joined (`and_masks`) with one of packed sequences, else None."""
    parts = _closure(mask_function).get("mask_functions", ())
    sequences = [c["packed_sequence_mask"] for c in map(_closure, parts) if "packed_sequence_mask" in c]
    plain = [part for part in parts if "packed_sequence_mask" not in _closure(part)]
    if len(sequences) != 1 or len(plain) != 1:
        return None
    inner = _closure(plain[0])  # up to transformers 5.23 the plain function counts positions inside a sequence
    rule = _rule(inner["mask_function"] if "position_ids" in inner else plain[0], None, False, None)
    if rule is None:
        return None
    sequence = sequences[0]
    starts = torch.ones_like(sequence, dtype=torch.bool)
    starts[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
    starts = starts.flatten().nonzero()[:, 0]
    return _encode(torch.cat((starts, starts.new_tensor([sequence.numel()])))[None], *rule)


def _closure(function: Callable) -> dict:
    """Name -> value of the outer variables that a nested function uses."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


class Mask(Rule):
    """What models that compute their scores themselves get for a mask: how to make it, theirs or a structured one."""

    def __init__(self, given: dict, hides: bool = False, structured: list | None = None):
        self.trace, self.given, self.hides = Trace(None), given, hides
        self.structured = [] if structured is None else structured  # filled when it is first asked for

    @property
    def shape(self):
        return torch.Size((self.given["batch_size"], 1, self.given["q_length"], self.given["kv_length"]))

    @property
    def dtype(self):
        return torch.bool if self.hides else self.given.get("dtype", torch.float32)

    @property
    def device(self):
        return torch.device(self.given.get("device", "cpu"))

    def compute(self):
        mask = eager_mask(**self.given)
        if mask is None:
            mask = torch.zeros(self.shape, dtype=self.given.get("dtype"), device=self.device)
        return mask.to(torch.bool) if self.hides else mask

    def on_cast(self, x, *args, **kwargs):
        """To bool: True hides, as models have it that fill scores in where it is True."""
        return Mask(self.given, self.hides or torch.bool in (*args, *kwargs.values()), self.structured)

    def on_getitem(self, x, index):
        if takes_all(index, self.shape):
            return self
        plain = self.given.get("mask_function") is bidirectional_mask_function and not self.hides
        if plain and isinstance(index, tuple) and len(index) == 4 and isinstance(index[2], int):
            row = eager_mask(**self.given | {"q_length": 1, "allow_is_bidirectional_skip": False})  # they are all alike
            return row[index[0], index[1], 0, index[3]]
        return NotImplemented

    def inverted(self):
        return Mask(self.given, False, self.structured) if self.hides else NotImplemented

    def apply(self, call: dict):
        if not self.structured:
            self.structured.append(structured_mask(**self.given))
        mask = self.structured[0]
        if mask is None:
            call["causal"] = "top_left" if self.given["q_length"] > 1 else False
        elif mask.dtype in _DTYPES and mask.dtype != torch.int64:
            _unpack(mask, call)
        else:
            add_mask(call, self.compute() if mask.dtype == torch.int64 else mask)


def followed_mask(**given) -> Mask:
    """The mask function of models whose attention is followed: called as any is, by keywords.

    With a static cache `generate` asks ahead, and the model asks again with what it was given: no tensor, as is known.
    """
    known = given.get("attention_mask")
    return known if isinstance(known, Mask) else Mask(given)


# Registration and patching


def register(backend: str | None = None) -> str:
    """Registers both functions as "xformer_fast" or, for one backend, "xformer_fast_<backend>"; returns the name.

    The names that end as `_MASKS` says stand for the same attention behind a host's own masks.
    """
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("transformers is too old: its mask functions take no q_length; install 5.4 or later")
    name = NAME if backend is None else f"{NAME}_{backend}"
    forward = attention_forward if backend is None else functools.partial(attention_forward, backend=backend)
    for end, mask_function in _MASKS.items():
        AttentionInterface.register(name + end, forward)
        AttentionMaskInterface.register(name + end, mask_function or structured_mask)
    AttentionMaskInterface.register(FOLLOWED, followed_mask)
    return name


@dataclass
class Record:
    """What `patch` keeps on a model: its backend, and module name -> the implementation that its config had before.

    It lives in the model, so deep copies and pickles can be unpatched; unpickling registers the functions again.
    """

    backend: str | None
    before: dict[str, dict]

    def __setstate__(self, state):
        self.__dict__.update(state)
        register(self.backend)


def patch_model(model: nn.Module, backend: str | None, report: PatchReport):
    for name, host in _outermost(model):
        _patch_pretrained(model, name, host, backend, report)


def unpatch_model(model: nn.Module):
    for host in reversed([*model.modules()]):  # a model inside another one that is patched was patched after it
        record = vars(host).get(_RECORD)
        if record is not None:
            for name, implementations in record.before.items():
                _restore(host.get_submodule(name).config, implementations)
            del vars(host)[_RECORD]


def _patch_pretrained(root: nn.Module, path: str, host: PreTrainedModel, backend: str | None, report: PatchReport):
    attentions = {name: module for name, module in host.named_modules() if _uses_interface(module)}
    owners: dict[int, tuple[str, PreTrainedModel]] = {}  # the first model of each config, outer before inner
    for name, module in host.named_modules():
        if isinstance(module, PreTrainedModel):
            owners.setdefault(id(module.config), (name, module))
    private: dict[int, str] = {}  # the first attention module of each config that no model has
    for name, module in attentions.items():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in owners:
            private.setdefault(id(config), name)
    reasons = {name: _reason_against(owner, backend) for name, owner in owners.values()}
    for name, module in attentions.items():
        owner = _owner_of(name, owners)
        reasons[owner] = reasons[owner] or _refused(original(module))
    followed = {name for name, owner in owners.values() if _is_followed(owner, backend)}

    implementation = register(backend)
    wanted = {}
    if followed or not all(reasons.values()):
        if _RECORD not in vars(host):
            _own_configs(root, path, host)
        unpatch_model(host)
        names = (*(name for name, _ in owners.values()), *private.values())
        before = {name: _implementations(host.get_submodule(name).config) for name in names}
        setattr(host, _RECORD, Record(backend, before))
        for name, owner in owners.values():  # setting an outer model sets the inner ones too: they come after it
            if name in followed:
                _assign(owner, FOLLOWED)
            elif reasons[name]:
                _restore(owner.config, before[name])
            else:
                wanted[name] = implementation + _masks_of(owner, before[name][""])
                _assign(owner, wanted[name])
        for name in private.values():
            owner = _owner_of(name, owners)
            if owner in wanted:
                host.get_submodule(name).config._attn_implementation_internal = wanted[owner]

    prefix = f"{path}." if path else ""
    for name, module in attentions.items():
        owner = _owner_of(name, owners)
        config = getattr(module, "config", host.get_submodule(owner).config)
        if config._attn_implementation in wanted.values():
            report.replaced.append(prefix + name)
        else:
            report.skipped[prefix + name] = reasons[owner] or "its config did not take the implementation"
    for name, module in host.named_modules():
        if "Attention" in type(module).__name__ and name not in attentions:
            below = [n for n, m in module.named_modules(prefix=name) if n != name and "Attention" in type(m).__name__]
            if not below and not any(_inside(n, name) for n in attentions):
                report.skipped[prefix + name] = "computes its attention itself, not through AttentionInterface"


def _own_configs(root: nn.Module, path: str, host: PreTrainedModel):
    """Gives `host`, at `path` in `root`, copies of its configs: other models may be made from the same objects.

    Each object has one copy, for all modules of `host`, for configs that hold it, and for wrappers around `host` (as
    peft's). The model keeps them when it is unpatched, and so what was changed in them.
    """
    copies = {}
    inside = [(module, True) for module in host.modules()]
    around = [(module, False) for name, module in root.named_modules() if name != path and _inside(path, name)]
    for module, is_ours in inside + around:
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and (is_ours or id(value) in copies):
                vars(module)[key] = copy.deepcopy(value, copies)


def _outermost(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """(name, module) of each PreTrainedModel in `model` that lies in no other one."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(_inside(name, outer) for outer in found):
            found.append(name)
            yield name, module


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _uses_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(original(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _owner_of(name: str, owners: dict) -> str:
    """The name of the innermost of the models that a module lies in."""
    return max((owner for owner, _ in owners.values() if _inside(name, owner)), key=len)


@functools.cache
def _refused(cls: type) -> str | None:
    """Why the attention function could not serve the call in its forward, or None: by the keywords that it names."""
    constants = inspect.unwrap(cls.forward).__code__.co_consts
    keywords = {name for names in constants if isinstance(names, tuple) for name in names}
    return next((_REFUSED[name] for name in _REFUSED_AT_ONCE if name in keywords), None)


def _implementations(config) -> dict:
    """The implementation of a config, under "", and of those below it; None where no model has set one."""
    below = ((key, getattr(config, key, None)) for key in config.sub_configs)
    return {"": config._attn_implementation} | {key: _implementations(sub) for key, sub in below if sub is not None}


def _restore(config, implementations: dict):
    """Writes what `_implementations` read; setters check names, and know no None."""
    config._attn_implementation_internal = implementations[""]
    for key, below in implementations.items():
        sub = getattr(config, key, None) if key else None
        if sub is not None:
            _restore(sub, below)


def _assign(owner: PreTrainedModel, implementation: str):
    if owner._can_set_attn_implementation():
        owner.set_attn_implementation(implementation)
    else:  # transformers refuses: there the config's entry decides on masks alone
        owner.config._attn_implementation_internal = implementation


def _masks_of(owner: PreTrainedModel, implementation: str | None) -> str:
    """The end of the implementation's name, by the masks that a model can take; `implementation` is its own."""
    modules = [*owner.modules()]
    if not any(scorers(original(m)) or (_uses_interface(m) and _computes_with_its_mask(original(m))) for m in modules):
        return ""
    return "_float_masks" if implementation in (None, "eager") else "_bool_masks"


@functools.cache
def _computes_with_its_mask(cls: type) -> bool:
    """Does it do more with its attention_mask than cut it and hand it on?"""
    instructions = [*dis.get_instructions(inspect.unwrap(cls.forward))]
    return any(
        first.opname.startswith("LOAD_FAST")
        and first.argval == "attention_mask"
        and second.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "BINARY_OP"))
        for first, second in itertools.pairwise(instructions)
    )


def _is_followed(owner: PreTrainedModel, backend: str | None) -> bool:
    """Does it hold attention of ours, and none on AttentionInterface?"""
    if owner._can_set_attn_implementation() or no_kernel(next(owner.parameters(), None), backend) is not None:
        return False
    return any(scorers(original(module)) or is_banded(original(module)) for module in owner.modules())


def _reason_against(owner: PreTrainedModel, backend: str | None) -> str | None:
    """Why a model is left as it is, or None."""
    if not owner._can_set_attn_implementation():
        return f"{type(owner).__name__} does not go through AttentionInterface"
    if getattr(owner.config, "output_attentions", False):
        return "its config asks for output_attentions, and attention weights are never formed"
    return no_kernel(next(owner.parameters(), None), backend)
