"""Parameter-efficient tuning: what is added computes what its formula says, and nothing else learns."""

import copy

import pytest
import torch
from host_models import disturb
from torch import nn

import xformer_fast
from xformer_fast import reference
from xformer_fast.generation import generate
from xformer_fast.layers import Attention, Prefix
from xformer_fast.models import BERT, GPT, T5, LLaMA, MetaFormer, Swin
from xformer_fast.testing import check_close
from xformer_fast.tuning import (
    add_adapters,
    add_lora,
    add_prefixes,
    add_prompts,
    freeze,
    merge_lora,
    trainable_share,
    tuned_state,
)

VOCAB = 60
SMALL = {"dim": 32, "depth": 2, "num_heads": 4}
METHODS = {
    "lora": lambda model: add_lora(model, rank=3, targets=["query", "value", "down"]),
    "adapters": lambda model: add_adapters(model, width=5),
    "parallel adapters": lambda model: add_adapters(model, width=5, parallel=True),
    "prefixes": lambda model: add_prefixes(model, 5),
    "prompts": lambda model: add_prompts(model, 5),
    "deep prompts": lambda model: add_prompts(model, 5, deep=True),
}
ADD_NOTHING_YET = ("lora", "adapters", "parallel adapters")


def gpt(**options):
    torch.manual_seed(0)
    return disturb(GPT(VOCAB, **SMALL, **options)).eval()


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def added(model, method):
    """The model, frozen and tuned by random parameters."""
    torch.manual_seed(3)
    freeze(model)
    METHODS[method](model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def run(model, inputs):
    out = model(inputs)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("method", METHODS)
def test_only_what_was_added_learns(method):
    model = added(gpt(), method)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and not any(torch.equal(before[name], torch.zeros_like(before[name])) for name in learning)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    for _ in range(2):
        nn.functional.cross_entropy(model(tokens(3, 9)).flatten(0, 1), tokens(3, 9).flatten()).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learning), name
        assert torch.equal(parameter, before[name]) != (name in learning), name
    assert 0 < trainable_share(model) < 0.5


@pytest.mark.parametrize("method", ADD_NOTHING_YET)
def test_the_model_is_what_it_was_at_first(method):
    model = gpt()
    before = model(tokens(2, 9))
    freeze(model)
    METHODS[method](model)
    assert torch.equal(model(tokens(2, 9)), before)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_tuned_part_is_stored(method):
    model = added(gpt(), method)
    state = tuned_state(model)
    assert set(state) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    other = gpt()
    freeze(other)
    METHODS[method](other)
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and not set(missing) & set(state)
    assert torch.equal(model(tokens(2, 9)), other(tokens(2, 9)))


@pytest.mark.parametrize("family", [GPT, BERT, LLaMA])
def test_lora_merged_equals_unmerged(family):
    torch.manual_seed(0)
    model = added(disturb(family(VOCAB, **SMALL, hidden=48)).eval(), "lora")
    names = set(dict(family(VOCAB, **SMALL, hidden=48).named_parameters()))
    inputs = tokens(2, 9)
    unmerged, truth = run(model, inputs), run(copy.deepcopy(model).double(), inputs)
    plain = run(disturb(family(VOCAB, **SMALL, hidden=48)).eval(), inputs)
    merge_lora(model)
    assert set(dict(model.named_parameters())) == names
    check_close(run(model, inputs), truth, unmerged, "merged")
    assert (plain - unmerged).abs().max() > 0.1


@pytest.mark.filterwarnings("error")
def test_lora_again():
    """In other layers, or once what was there is merged; in the same layers it would be lost."""
    model, inputs = added(gpt(), "lora"), tokens(2, 9)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.branch\.query has LoRA already"):
        add_lora(model, targets=["out", "query"])
    once = model(inputs)
    add_lora(model, rank=2, targets=["out"])
    assert sum("lora_" in name for name, p in model.named_parameters() if p.requires_grad) == 2 * 4 * 2
    assert torch.equal(model(inputs), once)
    merge_lora(model)
    assert set(model.state_dict()) == set(gpt().state_dict()) and not hasattr(model, "peft_config")
    merged = model(inputs)
    METHODS["lora"](model)
    assert torch.equal(model(inputs), merged)


def test_methods_combine_and_keep_what_learns():
    model = gpt()
    freeze(model, but=["norm", "head.weight"])
    add_adapters(model, width=3, targets=["query", "out", "down"])
    add_adapters(model, width=3, parallel=True)
    add_lora(model, rank=2, targets=["query.base", "value"])
    add_prefixes(model, 4)
    add_prompts(model, 3)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in ("embed.weight", "layers.0.mixer.norm.weight", "layers.1.mixer.branch.prefix.key", "layers.prompt"):
        assert part in learning
    assert sum("lora_" in name for name in learning) == 2 * 2 * 2
    assert sum(".adapter." in name for name in learning) == 2 * 4 * 4
    assert not any(name.endswith(("positions.table.weight", "query.base.base_layer.weight")) for name in learning)
    merge_lora(model)
    assert model(tokens(2, 9)).shape == (2, 9, VOCAB)


# ---- prefixes


def by_concatenation(layer: Attention, prefix: Prefix | None, x, memory=None, **options):
    """The layer by the reference formula, the prefix concatenated to keys and values by hand."""
    query = layer.query(x).unflatten(-1, (-1, layer.head_dim))
    key, value = layer.keys_values(x if memory is None else memory)
    if prefix is not None:
        key, value = (
            torch.cat((first.expand(x.shape[0], -1, -1, -1), rest), 1)
            for first, rest in ((prefix.key, key), (prefix.value, value))
        )
    out = reference.attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options)
    return layer.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", ["causal", "key_lengths", "mask", "cross"])
def test_prefix_equals_concatenation(options):
    torch.manual_seed(0)
    length, layer, x = 7, Attention(32, 4, num_kv_heads=2), torch.randn(3, 11, 32)
    memory = torch.randn(3, 6, 32) if options == "cross" else None
    given = {
        "causal": {"causal": True}, "key_lengths": {"key_lengths": torch.tensor([11, 4, 8])}, "cross": {},
        "mask": {"mask": torch.rand(3, 1, 11, 11) > 0.4},
    }[options]  # fmt: skip
    meant = dict(given)  # with the prefix before the keys, spelled out
    if options == "key_lengths":
        meant["key_lengths"] = given["key_lengths"] + length
    if options == "mask":
        meant["mask"] = torch.cat((torch.ones(3, 1, 11, length, dtype=torch.bool), given["mask"]), -1)
    layer.prefix = Prefix(length, 2, 8)
    double = copy.deepcopy(layer).double()
    wide = None if memory is None else memory.double()
    results = layer(x, memory, **given)
    naive = by_concatenation(layer, layer.prefix, x, memory, **meant)
    truth = by_concatenation(double, double.prefix, x.double(), wide, **meant)
    check_close(results, truth, naive, "output")
    assert (by_concatenation(layer, None, x, memory, **given) - naive).abs().max() > 0.1
    upstream = torch.randn_like(results)
    prefixes = (layer.prefix.key, layer.prefix.value)
    got, plain = (torch.autograd.grad(out, prefixes, upstream) for out in (results, naive))
    exact = torch.autograd.grad(truth, (double.prefix.key, double.prefix.value), upstream.double())
    for name, *three in zip(("key", "value"), got, exact, plain, strict=True):
        check_close(*three, f"gradient of the prefix's {name}")


def test_a_number_of_keys_a_layer():
    model = gpt()
    add_prefixes(model, [6, 0])
    assert model.layers[0].mixer.branch.prefix.key.shape == (6, 4, 8) and model.layers[1].mixer.branch.prefix is None
    t5 = T5(VOCAB, **SMALL, hidden=48)
    add_prefixes(t5, [1, 2, 3, 4, 5, 6])  # encoder, then self and cross of each decoder layer
    assert t5.decoder[1].cross.branch.prefix.key.shape[0] == 6
    assert t5(tokens(2, 7), tokens(2, 5)).shape == (2, 5, VOCAB)
    with pytest.raises(ValueError, match="length must be a number or 6"):
        add_prefixes(t5, [1, 2])
    with pytest.raises(ValueError, match="SoftmaxMixer does not let every query see all keys"):
        add_prefixes(gpt(window=(3, 0)), 4)


@pytest.mark.parametrize("position", ["learned", "rope", "alibi", "t5"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_generation_sees_what_was_added(method, position):
    model = added(gpt(positions=position), method)
    prompts, lengths = tokens(3, 6), torch.tensor([6, 4, 5])
    made = generate(model, prompts, lengths=lengths, max_new_tokens=4)
    for row, length in enumerate(lengths.tolist()):
        text = prompts[row : row + 1, :length]
        for _ in range(4):
            text = torch.cat((text, model(text)[:, -1:].argmax(-1)), 1)
        assert torch.equal(made[row : row + 1], text[:, length:])


# ---- prompts


def by_hand(model, inputs, prompts, lengths):
    """A GPT's logits with prompts put before the sequence in the model's own words."""
    count = prompts.shape[1]
    x = model.positions(model.embed(inputs))
    for i, layer in enumerate(model.layers):
        if i < len(prompts):
            x = torch.cat((prompts[i].expand(len(x), -1, -1), x if i == 0 else x[:, count:]), 1)
        x = layer(x, causal=True, key_lengths=lengths + count)
    return model.head(model.norm(x[:, count:]))


@pytest.mark.parametrize("method", ["prompts", "deep prompts"])
def test_prompts_are_tokens_before_the_sequence(method):
    model, inputs, lengths = added(gpt(), method), tokens(3, 9), torch.tensor([9, 4, 6])
    got = model(inputs, lengths=lengths)
    plain = copy.deepcopy(model)
    plain.layers.prompt = None
    double = copy.deepcopy(plain).double()
    wanted = by_hand(plain, inputs, model.layers.prompt, lengths)
    truth = by_hand(double, inputs, model.layers.prompt.double(), lengths)
    inside = torch.arange(9) < lengths[:, None]
    check_close(got[inside], truth[inside], wanted[inside])
    assert (got - plain(inputs, lengths=lengths))[inside].abs().max() > 0.01


def test_prompts_and_a_mask():
    torch.manual_seed(0)
    model = disturb(BERT(VOCAB, **SMALL)).eval()
    x, keep = torch.randn(2, 9, 32), torch.rand(2, 1, 9, 9) > 0.3
    keep = keep | torch.eye(9, dtype=torch.bool)
    add_prompts(model, 4)
    wider = torch.ones(2, 1, 13, 13, dtype=torch.bool)
    wider[:, :, 4:, 4:] = keep
    got = model.layers(x, mask=keep)
    y = torch.cat((model.layers.prompt.expand(2, -1, -1), x), 1)
    for layer in model.layers:
        y = layer(y, mask=wider)
    assert torch.equal(got, y[:, 4:])


# ---- host models, patched


HOST = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
}


def host_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return disturb(transformers.BertModel(transformers.BertConfig(**HOST))).eval()


def encode(model):
    mask = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    return model(input_ids=tokens(3, 9), attention_mask=mask.long()).last_hidden_state[mask]


@pytest.mark.parametrize("first", ["patch", "tuning"])
@pytest.mark.parametrize("method", ["lora", "adapters", "peft prefixes"])
def test_host_models_before_and_after_patch(method, first):
    def tune(model):
        torch.manual_seed(3)
        freeze(model)
        if method == "lora":
            add_lora(model, rank=3)
        elif method == "adapters":
            add_adapters(model, width=5, targets=["output.dense"])
        else:
            peft = pytest.importorskip("peft")
            config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="FEATURE_EXTRACTION")
            model = peft.get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        return model.eval()

    unpatched = tune(host_model())
    patched = host_model()
    if first == "patch":
        assert xformer_fast.patch(patched).count == 2
    patched = tune(patched)
    if first == "tuning":
        assert xformer_fast.patch(patched).count == 2
    eager = copy.deepcopy(unpatched).double()
    truth, naive, got = encode(eager), encode(unpatched), encode(patched)
    check_close(got, truth, naive)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    naive.backward(upstream)
    truth.backward(upstream.double())
    for (name, ours), theirs, exact in zip(
        patched.named_parameters(), unpatched.parameters(), eager.parameters(), strict=True
    ):
        assert (ours.grad is None) == (not ours.requires_grad), name
        if ours.requires_grad:
            check_close(ours.grad, exact.grad, theirs.grad, name)
    if method == "lora":
        merge_lora(patched)
        check_close(encode(patched), truth, naive, "merged")
        assert set(patched.state_dict()) == set(host_model().state_dict())
    xformer_fast.unpatch(patched)
    check_close(encode(patched), truth, naive, "unpatched")


def test_prefixes_of_peft_are_prefixes():
    """A host with peft's prefixes, and this package's BERT of the same weights with its own."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    host = disturb(transformers.BertForPreTraining(transformers.BertConfig(**HOST))).eval()
    ours = BERT.from_transformers(host).eval()
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="FEATURE_EXTRACTION")
    tuned = peft.get_peft_model(host.bert, config).eval()
    xformer_fast.patch(tuned)
    add_prefixes(ours, 5)
    past = tuned.prompt_encoder["default"].embedding.weight.view(5, 4, 4, 8)  # length, layer and kind, heads, head_dim
    for i, layer in enumerate(ours.layers):
        layer.mixer.branch.prefix.key.data = past[:, 2 * i]
        layer.mixer.branch.prefix.value.data = past[:, 2 * i + 1]
    with torch.no_grad():  # the host counts the prefix as positions, too
        ours.positions.table.weight[:9] = ours.positions.table.weight[5:14].clone()
    theirs = encode(tuned)
    mask = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    mine = ours.encode(tokens(3, 9), lengths=torch.tensor([9, 4, 6]))[mask]
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_errors():
    with pytest.raises(ValueError, match="no module of the model has a name that ends with one of q_proj"):
        add_lora(gpt(), targets=["q_proj"])
    with pytest.raises(ValueError, match="no module of the model has a name that ends with one of mlp"):
        add_adapters(gpt(), targets=["mlp"])
    with pytest.raises(ValueError, match="positions: an adapter's place must hold a linear layer"):
        add_adapters(gpt(), targets=["positions"])
    with pytest.raises(ValueError, match="Linear has no Stack"):
        add_prompts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the layers of MetaFormer have no Attention that would see a prompt"):
        add_prompts(MetaFormer(5))
    swin = Swin(5, dim=16, depths=(1,), num_heads=(2,), window_size=4)
    add_prompts(swin, 2)
    with pytest.raises(ValueError, match=r"a prompt stands before tokens \(B, S, C\) without `position`, x has 4 axes"):
        swin(torch.randn(1, 3, 16, 16))
