"""torch.nn.MultiheadAttention and nn.Transformer, patched against unpatched."""

import itertools

import pytest
import torch
from host_models import check_autocast, check_close, check_equal, check_life, disturb, twins
from torch import nn

import xformer_fast
from xformer_fast.integrations import torch_mha

WIDTH, HEADS, BATCH, LEN_Q, LEN_K = 24, 4, 3, 7, 11


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    """The options of every call that reaches the op."""
    seen = []

    def attention(query, key, value, **options):
        seen.append(options)
        return xformer_fast.attention(query, key, value, **options)

    monkeypatch.setattr(torch_mha, "attention", attention)
    return seen


def build(**options):
    torch.manual_seed(0)
    return disturb(nn.MultiheadAttention(WIDTH, HEADS, **options))


def inputs(batch_first, kind="cross", kdim=WIDTH, vdim=WIDTH):
    torch.manual_seed(1)

    def rows(length, width):
        return torch.randn((BATCH, length, width) if batch_first else (length, BATCH, width))

    query = rows(LEN_Q, WIDTH)
    if kind == "self":
        return query, query, query
    key = rows(LEN_K, kdim)
    return query, key, key if kind == "memory" else rows(LEN_K, vdim)


def masks(attn, padding, len_q, len_k, batch=BATCH, dtype=torch.bool):
    """Both in torch's sense: True hides; every query keeps a key."""
    generator = torch.Generator().manual_seed(3)
    given = {}
    if attn is not None:
        shape = (len_q, len_k) if attn == "2d" else (batch * HEADS, len_q, len_k)
        given["attn_mask"] = torch.rand(shape, generator=generator) < 0.4
        given["attn_mask"][..., 0] = False
    if padding:
        given["key_padding_mask"] = torch.arange(len_k) >= torch.tensor([len_k, 3, 5])[:batch, None]
    if dtype != torch.bool:
        for name, mask in given.items():
            noise = torch.randn(mask.shape, generator=generator) if name == "attn_mask" else torch.zeros(mask.shape)
            given[name] = noise.masked_fill(mask, float("-inf"))
    return given


def run_on(arguments, **options):
    return lambda model: model(*arguments, need_weights=False, **options)[0]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
        {"kdim": 10, "vdim": 14},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_outputs_and_gradients(options, kind, batch_first, calls):
    if "kdim" in options and kind != "cross":
        pytest.skip("key and value differ in width")
    reference, patched = twins(build(batch_first=batch_first, **options), 1)
    arguments = inputs(batch_first, kind, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    len_k = LEN_Q if kind == "self" else LEN_K
    for attn, padding, dtype in itertools.product((None, "2d", "3d"), (False, True), (torch.bool, torch.float32)):
        check_equal(reference, patched, run_on(arguments, **masks(attn, padding, LEN_Q, len_k, dtype=dtype)))
    assert len(calls) == 12


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_causal_hint(extra, padding, calls):
    reference, patched = twins(build(batch_first=True, add_zero_attn=extra), 1)
    causal = nn.Transformer.generate_square_subsequent_mask(LEN_Q)
    given = masks(None, padding, LEN_Q, LEN_Q, dtype=torch.float32)
    check_equal(reference, patched, run_on(inputs(True, "self"), attn_mask=causal, is_causal=True, **given))
    assert calls[0]["causal"] == ("top_left" if not (extra and padding) else False)
    for model in (reference, patched):
        with pytest.raises(RuntimeError, match="attn_mask"):
            model(*inputs(True, "self"), need_weights=False, is_causal=True)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_of_two_kinds():
    reference, patched = twins(build(batch_first=True), 1)
    floats, bools = (masks("2d", True, LEN_Q, LEN_K, dtype=dtype) for dtype in (torch.float32, torch.bool))
    check_equal(reference, patched, run_on(inputs(True), **floats | {"key_padding_mask": bools["key_padding_mask"]}))
    check_equal(reference, patched, run_on(inputs(True), **bools | {"key_padding_mask": floats["key_padding_mask"]}))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_unbatched(kind, batch_first):
    reference, patched = twins(build(batch_first=batch_first, add_bias_kv=True), 1)
    query, key, value = (x[0] for x in inputs(True, kind))
    arguments = (query, query, query) if kind == "self" else (query, key, value)
    for attn, padding in itertools.product((None, "2d", "3d"), (False, True)):
        given = masks(attn, padding, LEN_Q, len(arguments[1]), batch=1)
        if padding:
            given["key_padding_mask"] = given["key_padding_mask"][0]
        check_equal(reference, patched, run_on(arguments, **given))


@pytest.mark.parametrize("average", [False, True])
def test_weights_come_from_torch(average, calls):
    reference, patched = twins(build(batch_first=True).eval(), 1)
    arguments = inputs(True, "self")
    with torch.no_grad():
        expected = reference(*arguments, average_attn_weights=average)
        out = patched(*arguments, average_attn_weights=average)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True)) and not calls


def test_mask_gradient():
    reference, patched = twins(build(batch_first=True), 1)
    bias = torch.randn(BATCH * HEADS, LEN_Q, LEN_K)
    grads = []
    for model in (reference, patched):
        leaf = bias.clone().requires_grad_()
        model(*inputs(True), need_weights=False, attn_mask=leaf)[0].square().sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(*grads, rtol=0, atol=2e-3 * float(grads[0].abs().max()))


def test_rows_without_keys_give_zeros():
    patched = twins(build(batch_first=True), 1)[1]
    mask = torch.zeros(LEN_Q, LEN_K, dtype=torch.bool)
    mask[2] = True
    out = patched(*inputs(True), need_weights=False, attn_mask=mask)[0]
    assert torch.isfinite(out).all() and torch.allclose(out[:, 2], patched.out_proj.bias.expand(BATCH, -1))


def test_dropout_only_in_training(calls):
    patched = twins(build(batch_first=True, dropout=0.5), 1)[1]
    run = run_on(inputs(True))
    first, second = run(patched), run(patched)
    assert not torch.equal(first, second)
    patched.eval()
    assert torch.equal(run(patched), run(patched))
    assert [call["dropout_p"] for call in calls] == [0.5, 0.5, 0.0, 0.0]


def layer(kind=nn.TransformerEncoderLayer, **options):
    torch.manual_seed(0)
    options = {"dim_feedforward": 40, "dropout": 0.0, "batch_first": True} | options
    return disturb(kind(WIDTH, HEADS, **options))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_do_not_take_the_fast_path(norm_first, padding, calls):
    reference, patched = twins(layer(norm_first=norm_first).eval(), 1)
    src = inputs(True, "self")[0]
    given = {"src_key_padding_mask": masks(None, True, LEN_Q, LEN_Q)["key_padding_mask"]} if padding else {}
    check_close(reference, patched, lambda model: model(src, **given))
    assert len(calls) == 1
    check_equal(reference.train(), patched.train(), lambda model: model(src, **given))
    check_life(reference, patched, lambda model: model(src, **given))


def test_encoders_do_not_nest(calls):
    encoder = nn.TransformerEncoder(layer(), 2).eval()
    reference, patched = twins(encoder, 2)
    src, hidden = inputs(True, "self")[0], masks(None, True, LEN_Q, LEN_Q)["key_padding_mask"]
    check_close(reference, patched, lambda model: model(src, src_key_padding_mask=hidden)[~hidden])
    check_close(reference, patched, lambda model: model(src, nn.Transformer.generate_square_subsequent_mask(LEN_Q)))
    assert len(calls) == 4 and calls[0]["mask"].shape == (BATCH, 1, 1, LEN_Q)
    assert calls[2]["causal"] == "top_left" and calls[2]["mask"] is None
    check_life(reference, patched, lambda model: model(src, src_key_padding_mask=hidden)[~hidden])
    assert reference.use_nested_tensor and not patched.use_nested_tensor


def transformer(**options):
    torch.manual_seed(0)
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 40, "dropout": 0.0}
    return disturb(nn.Transformer(WIDTH, HEADS, **sizes | options))


def translate(batch_first, padding):
    """A run of nn.Transformer: causal decoder, cross attention, padding on both sides."""
    tgt, src, _ = inputs(batch_first)
    source = masks(None, True, LEN_Q, LEN_K, dtype=torch.float32)["key_padding_mask"]
    target = masks(None, True, LEN_Q, LEN_Q, dtype=torch.float32)["key_padding_mask"]
    given = {"src_key_padding_mask": source, "memory_key_padding_mask": source, "tgt_key_padding_mask": target}
    causal = nn.Transformer.generate_square_subsequent_mask(LEN_Q)
    return lambda model: model(src, tgt, tgt_mask=causal, tgt_is_causal=True, **(given if padding else {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer(batch_first, training, calls, proof):
    reference, patched = twins(transformer(batch_first=batch_first).train(training), 6)
    errors = []
    for padding in (False, True):
        run = translate(batch_first, padding)
        errors.append(check_equal(reference, patched, run))
        check_close(reference, patched, run)
    proof("torch.nn", "nn.Transformer", 6, ["cross attention", "padding"], errors)
    assert len(calls) == 24
    check_life(reference, patched, run)


def test_autocast():
    src = inputs(True, "self")[0]
    check_autocast(*twins(layer(), 1), lambda model: model(src))
    half = build(batch_first=True, add_bias_kv=True)
    with torch.autocast("cpu", torch.bfloat16), xformer_fast.patched(half):
        assert run_on(inputs(True))(half).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    reference, patched = twins(nn.TransformerEncoder(layer(), 1).train(training), 1)
    compiled = torch.compile(patched, fullgraph=True, dynamic=True, backend="aot_eager")
    src, hidden = inputs(True, "self")[0], masks(None, True, LEN_Q, LEN_Q)["key_padding_mask"]

    with torch.set_grad_enabled(training):
        out, expected = (model(src, src_key_padding_mask=hidden) for model in (compiled, reference))
    torch.testing.assert_close(out[~hidden], expected[~hidden], rtol=0, atol=1e-4)
    if not training:
        return
    for result in (out, expected):
        result.square().sum().backward()
    for ours, theirs in zip(patched.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=2e-3 * float(theirs.grad.abs().max()) + 1e-4)


def test_report_and_backends(calls):
    model = transformer(batch_first=True)
    report = xformer_fast.patch(model)
    assert "decoder.layers.1.multihead_attn" in report.replaced and not report.skipped
    assert isinstance(model.encoder.layers[0].self_attn, nn.MultiheadAttention)
    assert str(model) == str(transformer(batch_first=True))
    xformer_fast.patch(model, backend="reference")
    translate(True, False)(model)
    assert {call["backend"] for call in calls} == {"reference"}
    with pytest.raises(ValueError, match="backend"):
        xformer_fast.patch(model, backend="magic")


def test_subclasses():
    class Inherits(nn.MultiheadAttention):
        pass

    class Overrides(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return query

    model = nn.ModuleDict({"a": Inherits(8, 2), "b": Overrides(8, 2)})
    report = xformer_fast.patch(model)
    assert report.replaced == ["a"] and "forward of its own" in report.skipped["b"]
    assert isinstance(model["a"], Inherits)
    xformer_fast.unpatch(model)
    assert type(model["a"]) is Inherits


def test_patched_ends_where_the_block_ends():
    model = layer()
    with pytest.raises(KeyError), xformer_fast.patched(model, backend="reference") as report:
        assert report.replaced == ["self_attn"] and type(model) is not nn.TransformerEncoderLayer
        raise KeyError
    assert type(model) is nn.TransformerEncoderLayer and type(model.self_attn) is nn.MultiheadAttention
