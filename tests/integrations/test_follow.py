"""Attention in code that computes its scores itself: the spellings that are followed, and what happens to others."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from host_models import check_autocast, check_equal
from model_list import MODELS, ids, result
from torch import nn

pytest.importorskip("transformers")

from transformers import BlipTextConfig, BlipTextModel, masking_utils

import xformer_fast
from xformer_fast.integrations import banded, follow_attention
from xformer_fast.integrations import transformers as integration
from xformer_fast.integrations.distance import Distances
from xformer_fast.integrations.follow import following

BATCH, HEADS, LEN_Q, LEN_K, DIM = 2, 3, 5, 7, 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call that reaches the op."""
    seen = []

    def attention(**options):
        seen.append(options)
        return xformer_fast.attention(**options)

    monkeypatch.setattr(follow_attention, "attention", attention)
    return seen


def draw():
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, HEADS, LEN_Q, DIM), (BATCH, HEADS, LEN_K, DIM), (BATCH, HEADS, LEN_K, DIM)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def bias(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)


def keep(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[..., 0] = True
    return mask


# Code of hosts: (q, k, v, a bias or a mask) -> output


def plain(q, k, v, _):
    return (q @ k.transpose(-2, -1) / math.sqrt(DIM)).softmax(dim=-1) @ v


def half_scaled(q, k, v, _):
    scores = torch.matmul(q * DIM**-0.25, k.mT * DIM**-0.25)
    return torch.matmul(nn.Softmax(dim=-1)(scores), v)


def in_float32(q, k, v, added):
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + added
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=False), v).transpose(1, 2).contiguous().transpose(1, 2)


def one_axis(q, k, v, added):
    """Batch and heads as one, as Bloom has them."""
    q, k, v = (x.reshape(BATCH * HEADS, -1, DIM) for x in (q, k, v))
    rows = added.expand(BATCH, HEADS, 1, LEN_K).reshape(BATCH * HEADS, 1, LEN_K)
    scores = rows.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=1.0, alpha=0.4)
    scores = scores.view(BATCH, HEADS, LEN_Q, LEN_K) + keep(LEN_Q, LEN_K).logical_not() * -1e30
    weights = F.softmax(scores.float(), dim=-1).type_as(scores).view(BATCH * HEADS, LEN_Q, -1)
    return torch.bmm(weights, v).view(BATCH, HEADS, LEN_Q, DIM)


def filled(q, k, v, mask):
    scores = (q @ k.transpose(-2, -1)).masked_fill(~mask, torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1) @ v


def chosen(q, k, v, mask):
    lowest = torch.full([], torch.finfo(q.dtype).min)
    scores = torch.where(mask, q @ k.transpose(-2, -1), lowest).where(mask, -1e30)
    return scores.softmax(-1) @ v


def letters(q, k, v, added):
    scores = torch.einsum("bhlk,bhtk->bhlt", [q, k]) * 0.7
    return torch.einsum("bhlt,bhtv->bhlv", [(scores - added).softmax(-1), v])


def sequence_first(q, k, v, added):
    """(S, B, H, D), heads behind: XLNet's."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    scores = (torch.einsum("ibnd,jbnd->bnij", q + 0.1, k) + added + 0) * 0.6
    weights = F.dropout(F.softmax(scores, dim=3), 0.0)
    return torch.einsum("bnij,jbnd->ibnd", weights, v).permute(1, 2, 0, 3)


def cosine(q, k, v, scale):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale.exp()
    return scores.softmax(-1) @ v


def two_products(q, k, v, added):
    scores = q @ k.transpose(-2, -1) * 0.5 + added
    return nn.Softmax(dim=-1)(scores + (q[..., :2] @ k[..., :2].transpose(-2, -1)) / 3).type(v.dtype) @ v


def bounded(q, k, v, added):
    """XGLM's."""
    scores = q @ k.transpose(-2, -1) + added
    scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).view(BATCH * HEADS, LEN_Q, LEN_K)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(BATCH, HEADS, LEN_Q, DIM)


def filled_twice(q, k, v, mask):
    """FastSpeech2Conformer's: the weights, too."""
    mask = mask.eq(0)
    scores = (q @ k.transpose(-2, -1)).masked_fill(mask, torch.finfo(q.dtype).min)
    return scores.softmax(-1).masked_fill(mask, 0.0) @ v


def map_of_positions(q, k, v, added):
    """MViT's: to the scores of all pairs, viewed with the axes of two maps, and written back."""
    q, k, v = q[:, :, :4], k[:, :, :6], v[:, :, :6]
    scores = (q * 0.3) @ k.transpose(-2, -1)
    rel_h, rel_w = added[..., :4, :3].unflatten(2, (2, 2)), added[..., :4, 3:5].unflatten(2, (2, 2))
    scores[:, :, 0:, 0:] = (
        scores[:, :, 0:, 0:].view(BATCH, -1, 2, 2, 3, 2) + rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)
    ).view(BATCH, -1, 4, 6)
    return scores.softmax(-1) @ v


FORMS = {  # code, its last argument, the shape of the mask that reaches the op
    "plain": (plain, None, None),
    "half_scaled": (half_scaled, None, None),
    "in_float32": (in_float32, bias(1, HEADS, LEN_Q, LEN_K), (1, HEADS, LEN_Q, LEN_K)),
    "bias of keys": (in_float32, bias(BATCH, 1, 1, LEN_K), (BATCH, 1, 1, LEN_K)),
    "one_axis": (one_axis, bias(BATCH, HEADS, 1, LEN_K), (1, BATCH * HEADS, LEN_Q, LEN_K)),
    "filled": (filled, keep(BATCH, 1, LEN_Q, LEN_K), (BATCH, 1, LEN_Q, LEN_K)),
    "filled keys": (filled, keep(LEN_K), (LEN_K,)),
    "chosen": (chosen, keep(BATCH, HEADS, 1, LEN_K), (BATCH, HEADS, 1, LEN_K)),
    "letters": (letters, bias(LEN_Q, LEN_K), (LEN_Q, LEN_K)),
    "sequence_first": (sequence_first, bias(BATCH, HEADS, LEN_Q, LEN_K), (BATCH, HEADS, LEN_Q, LEN_K)),
    "bounded": (bounded, bias(BATCH, 1, 1, LEN_K), (1, BATCH * HEADS, 1, LEN_K)),
    "filled_twice": (filled_twice, keep(BATCH, 1, 1, LEN_K), (BATCH, 1, 1, LEN_K)),
    "map_of_positions": (map_of_positions, bias(BATCH, HEADS, LEN_Q, LEN_K), None),
    "two_products": (two_products, bias(LEN_K), (LEN_K,)),
    "cosine": (cosine, bias(HEADS, 1, 1), None),
}


def run_both(code, given):
    """Outputs and gradients of code as it is, and followed."""
    results = []
    for run in (lambda _, *args: code(*args), following(lambda self, *args: code(*args), None)):
        leaves = [*draw(), given]
        if isinstance(given, torch.Tensor):
            leaves[3] = given.detach().clone().requires_grad_(given.requires_grad)
        out = run(None, *leaves)
        wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        results.append((out, *torch.autograd.grad(out, wanted, weights, allow_unused=True, materialize_grads=True)))
    return results


def check_same(results, tolerance=1e-4):
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("name", FORMS)
def test_forms(name, calls):
    code, given, mask = FORMS[name]
    check_same(run_both(code, given))
    lead = (1, BATCH * HEADS) if name in ("one_axis", "bounded") else (BATCH, HEADS)
    assert len(calls) == 1 and calls[0]["query"].shape[:2] == lead
    assert (mask if calls[0]["mask"] is None else tuple(calls[0]["mask"].shape)) == mask


def talking_heads(q, k, v, mix):
    scores = q @ k.transpose(-2, -1)
    scores = (scores.permute(0, 2, 3, 1) @ mix).permute(0, 3, 1, 2)
    return scores.softmax(-1) @ v


def over_queries(q, k, v, _):
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


def weights_used_twice(q, k, v, _):
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True).square()


def small_fill(q, k, v, mask):
    return (q @ k.transpose(-2, -1)).masked_fill(mask, -1.5).softmax(-1) @ v


def written_over(q, k, v, _):
    scores = q @ k.transpose(-2, -1)
    scores[..., 0] = 0.25
    scores.mul_(2)
    return scores.softmax(-1) @ v


def widened(q, k, v, added):
    """The bias has rows that the scores lack: the sum is larger than either."""
    return ((q[:1] @ k[:1].transpose(-2, -1)) + added).softmax(-1) @ v


def capped(q, k, v, _):
    """Scores that a number was added to: softmax alone takes no notice of it."""
    return (((q @ k.transpose(-2, -1) + 2.0) * 0.5).tanh() * 3).softmax(-1) @ v


def capped_in_float32(q, k, v, factor):
    scores = (1.5 + (q @ k.transpose(-2, -1)).float()) * factor.exp()
    return scores.view(BATCH * HEADS, LEN_Q, LEN_K).clamp(min=0.0).softmax(-1).view(BATCH, HEADS, LEN_Q, LEN_K) @ v


def test_code_that_writes_to_the_output(calls):
    """Backward reads what attention returned."""

    def code(self, q, k, v, more):
        out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        out += more
        return out

    run, leaves = following(code, None), [*draw(), bias(BATCH, HEADS, LEN_Q, DIM)]
    results = [
        (out, *torch.autograd.grad(out.square().sum(), leaves)) for out in (f(None, *leaves) for f in (code, run))
    ]
    check_same(results)
    assert len(calls) == 1


OTHERS = {
    "capped": (capped, None),
    "capped_in_float32": (capped_in_float32, bias(HEADS, 1, 1)),
    "talking_heads": (talking_heads, bias(HEADS, HEADS)),
    "over_queries": (over_queries, None),
    "weights_used_twice": (weights_used_twice, None),
    "small_fill": (small_fill, keep(LEN_Q, LEN_K)),
    "written_over": (written_over, None),
    "widened": (widened, bias(BATCH, HEADS, 1, LEN_K)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_followed_runs_as_it_was_written(name, calls):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_same(run_both(*OTHERS[name]), 1e-6)
    assert len(calls) == (name == "weights_used_twice")


def test_it_is_told():
    class Mixing(nn.Module):
        forward = following(lambda self, *args: talking_heads(*args), None)

    with pytest.warns(UserWarning, match="Mixing: attention is computed as its host does, since permute"):
        Mixing()(*draw(), bias(HEADS, HEADS))


def test_code_that_cannot_be_followed_is_not_followed_again(monkeypatch):
    class Mixing(nn.Module):
        forward = following(lambda self, *args: talking_heads(*args), None)

    made = []
    scores = follow_attention.Scores

    def spy(*args, **options):
        made.append(args)
        return scores(*args, **options)

    monkeypatch.setattr(follow_attention, "Scores", spy)
    model, given, mix = Mixing(), [x.detach() for x in draw()], bias(HEADS, HEADS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = model(*given, mix)
        after_first = len(made)
        assert torch.equal(model(*given, mix), first) and len(made) == after_first > 0
        model(*(x.double() for x in given), mix.double())  # other arguments may go another way
        assert len(made) > after_first


@pytest.mark.parametrize("reentrant", [True, False])
def test_code_that_cannot_be_followed_in_checkpoints(reentrant):
    class Mixing(nn.Module):
        forward = following(lambda self, *args: talking_heads(*args), None)

    model, given = Mixing(), [*draw(), bias(HEADS, HEADS)]
    expected = torch.autograd.grad(talking_heads(*given).sum(), given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            leaves = [x.detach().clone().requires_grad_() for x in given]
            torch.utils.checkpoint.checkpoint(model, *leaves, use_reentrant=reentrant).sum().backward()
            assert all(torch.allclose(x.grad, y, atol=1e-5) for x, y in zip(leaves, expected, strict=True))


def test_other_products_are_left_alone(calls):
    def code(q, k, v, weight):
        return (q @ weight) @ (k.transpose(-2, -1) @ v)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_same(run_both(code, bias(DIM, DIM)), 1e-5)
    assert not calls


def test_weights_alone_are_returned(calls):
    """By a module that is nothing but them."""
    check_same(run_both(lambda q, k, v, _: (q @ k.transpose(-2, -1)).softmax(-1), None), 1e-6)
    check_same(run_both(lambda q, k, v, _: q @ k.transpose(-2, -1), None), 1e-6)


def test_dropout_reaches_the_op(calls):
    def code(q, k, v, _):
        return F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.5, True) @ v

    run = following(lambda self, *args: code(*args), None)
    first, second = run(None, *draw(), None), run(None, *draw(), None)
    assert not torch.equal(first, second) and [call["dropout_p"] for call in calls] == [0.5, 0.5]


def test_a_call_inside_sdpa():
    def code(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check_same(run_both(code, keep(LEN_Q, LEN_K)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype, calls):
    q, k, v = (x.detach().to(dtype) for x in draw())
    added = bias(1, HEADS, LEN_Q, LEN_K).detach().to(dtype)
    out = following(lambda self, *args: in_float32(*args), None)(None, q, k, v, added)
    truth = in_float32(*(x.float() for x in (q, k, v, added)))
    host = in_float32(q, k, v, added)
    assert out.dtype == dtype and len(calls) == 1
    assert (out - truth).abs().max() <= 2 * (host - truth).abs().max() + 1e-3


# Masks that keep their structure


def host_mask(**given):
    given = {"batch_size": 3, "q_length": 4, "kv_length": 9, "q_offset": 5} | given
    given["attention_mask"] = torch.arange(9) >= torch.tensor([0, 3, 5])[:, None]  # left padding
    return integration.followed_mask(**given), masking_utils.eager_mask(**given)


def mask_uses(mask, scores):
    return {
        "added": scores + mask,
        "added in order": mask + scores,
        "filled": scores.masked_fill(mask.to(torch.bool), torch.finfo(scores.dtype).min),
        "sliced": scores + mask[:, :, :, : scores.shape[-1]],
        "moved": scores + mask.to(scores.device, scores.dtype),
    }


@pytest.mark.parametrize("use", ["added", "added in order", "filled", "sliced", "moved"])
def test_masks_of_transformers(use, calls):
    ours, theirs = host_mask()
    q, k, v = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)

    def code(self, mask):
        return mask_uses(mask, q @ k.transpose(-1, -2))[use].softmax(-1) @ v

    expected = code(None, theirs)
    out = following(code, None)(None, ours)
    assert (out - expected).abs().max() <= 1e-5
    assert calls[-1]["causal"] is True and calls[-1]["mask"].shape == (3, 1, 1, 9)


def test_masks_of_scores_that_are_regrouped_and_computed(calls):
    """The mask was added to (B, H, Sq, Sk); then batch and heads are one axis, and the host looks at the weights."""
    ours, theirs = host_mask()
    q, k, v = torch.randn(6, 4, 8), torch.randn(6, 9, 8), torch.randn(6, 9, 8)

    def code(self, mask):
        scores = (torch.bmm(q, k.transpose(1, 2)).view(3, 2, 4, 9) + mask).view(6, 4, 9)
        weights = scores.softmax(-1)
        return torch.bmm(weights, v) + F.pad(weights, (0, 1)).sum(-1, keepdim=True) * weights[..., :8].cumsum(-1)

    out, expected = following(code, None)(None, ours), code(None, theirs)
    assert (out - expected).abs().max() <= 1e-5 and len(calls) == 1


def test_a_mask_that_meets_other_code_is_the_hosts():
    ours, theirs = host_mask()
    assert torch.equal(ours + 1, theirs + 1) and torch.equal(torch.cat((ours, ours)), torch.cat((theirs, theirs)))
    assert torch.equal(ours[:, 0], theirs[:, 0]) and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.equal(ours.to(torch.bool) & True, theirs.to(torch.bool)) and ours.ndim == 4 and ours.size(3) == 9


def spied(monkeypatch):
    """The arguments of calls that will reach the op."""
    taken = []
    for place in (follow_attention, integration):

        def attention(run=place.attention, **options):
            taken.append(options)
            return run(**options)

        monkeypatch.setattr(place, "attention", attention)
    return taken


def seen(monkeypatch, name):
    """What a patched model of the list hands to the op, for padding on the left."""
    taken = spied(monkeypatch)
    model = MODELS[name].build()
    xformer_fast.patch(model)
    MODELS[name].cases()["left padding"](model)
    return taken


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_alibi_is_not_spelled_out(name, monkeypatch):
    for call in seen(monkeypatch, name):
        assert call["causal"] is True and call["mask"].shape[2] == 1 and call["mask"].is_floating_point()


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_relative_bias_is_a_vector(name, monkeypatch):
    taken = seen(monkeypatch, name)
    assert sum(call.get("relative_bias") is not None for call in taken) == 4  # not in cross attention
    assert all(call["mask"] is None or call["mask"].shape[1:3] == (1, 1) for call in taken)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decomposed_positions_stay_apart(attention, monkeypatch):
    taken = spied(monkeypatch)
    listed = dataclasses.replace(MODELS["sam_vision"], attention=attention)
    model = listed.build()
    patched = copy.deepcopy(model)
    assert xformer_fast.patch(patched).count == 2
    check_equal(model, patched, listed.cases()["32x32 pixels"])
    assert len(taken) == 2 and all(call["mask"] is None for call in taken)
    assert [call["decomposed_bias"][0].shape[-1] for call in taken] == [3, 8]  # a window, and the whole map


def test_longformer_takes_rows_for_masks(monkeypatch):
    taken = []

    def attention(*args, run=banded.attention, **options):
        taken.append(options)
        return run(*args, **options)

    monkeypatch.setattr(banded, "attention", attention)
    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse_squares(masking_utils.sdpa_mask))
    model = MODELS["longformer"].build()
    xformer_fast.patch(model)
    with torch.no_grad():
        MODELS["longformer"].cases()["global tokens"](model)
    assert [call.get("window") for call in taken] == [(2, 2), None, (4, 4), None]
    assert taken[0]["global_keys"].tolist() == [[0, 9], [4, -1], [-1, -1]]
    assert all(call["mask"].shape[1:3] == (1, 1) for call in taken)


def test_longformer_drops_in_training_alone(monkeypatch):
    rates = []

    def attention(*args, run=banded.attention, dropout_p, **options):
        rates.append(dropout_p)
        return run(*args, dropout_p=dropout_p, **options)

    monkeypatch.setattr(banded, "attention", attention)
    model = MODELS["longformer"].build()
    for module in model.modules():
        if hasattr(module, "one_sided_attn_window_size"):
            module.dropout = 0.25
    xformer_fast.patch(model)
    call = MODELS["longformer"].cases()["global tokens"]
    with torch.no_grad():
        for training, rate in ((False, 0.0), (True, 0.25)):
            call(model.train(training))
            assert rates == [rate] * 4  # the window and the global rows of two layers
            rates.clear()


def refuse_squares(make_mask):
    def refusing(*args, **given):
        assert given["q_length"] == 1
        return make_mask(*args, **given)

    return refusing


@pytest.mark.parametrize("past", [0, 4, torch.tensor(4)])
def test_distances(past):
    module = MODELS["t5"].build().encoder.block[0].layer[0].SelfAttention
    dense = module.compute_bias(3, 9, past_seen_tokens=past)
    vector = Distances(module, 3, 9, None, past)
    i, j = torch.arange(3)[:, None], torch.arange(9)
    assert torch.equal(vector.values()[:, j - i + 2], dense[0]) and torch.equal(vector + 0, dense)
    call = {"key": torch.empty(1, 1, 6, 1)}  # a static cache's unused end was cut off
    vector.apply(call)
    assert torch.equal(call["relative_bias"].values[:, (j - i + 2)[:, :6]], dense[0, :, :, :6])


def test_a_bias_of_more_than_distance_is_left():
    model = MODELS["t5"].build()
    attention = model.encoder.block[0].layer[0].SelfAttention

    class Odd(type(attention)):
        def compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0):
            bias = super().compute_bias(query_length, key_length, device, past_seen_tokens)
            return bias + torch.arange(key_length)

    attention.__class__ = Odd
    patched = copy.deepcopy(model)
    assert xformer_fast.patch(patched).count == 6
    assert isinstance(patched.encoder.block[0].layer[0].SelfAttention.compute_bias(2, 2), torch.Tensor)
    check_equal(model, patched, MODELS["t5"].cases()["right padding"])


# Models


def twins(name, changes=()):
    model = dataclasses.replace(MODELS[name], arguments=MODELS[name].arguments | dict(changes)).build()
    patched = copy.deepcopy(model)
    xformer_fast.patch(patched)
    return model, patched, next(iter(MODELS[name].cases().values()))


@pytest.mark.parametrize("name", ["bloom", "swinv2", "t5"])
def test_autocast(name):
    check_autocast(*twins(name))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bloom", "swin", "t5"])
def test_gradient_checkpointing(name, reentrant):
    reference, patched, run = twins(name)
    for model in (reference, patched):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    check_equal(reference, patched, run)


ONE_LAYER = {
    "bloom": {"n_layer": 1}, "swinv2": {"depths": [2], "num_heads": [2]}, "t5": {"num_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_LAYER)
def test_compile(name):
    reference, patched, run = twins(name, ONE_LAYER[name])
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, out = run(reference), run(compiled)
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("implementation", ["eager", None])
def test_attention_weights_are_the_hosts(implementation):
    reference, patched, _ = twins("bloom")
    inputs = ids(padding="right")
    expected, out = (m(**inputs, output_attentions=True, use_cache=False) for m in (reference, patched))
    for theirs, ours in zip(expected.attentions, out.attentions, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(result(out), result(expected), atol=1e-5)


def test_attention_weights_that_hooks_collect_are_the_hosts():
    """BLIP's text model does not ask its layers for them."""
    config = BlipTextConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99
    )
    model = BlipTextModel(config, add_pooling_layer=False).eval()
    patched = copy.deepcopy(model)
    xformer_fast.patch(patched)
    expected, out = (m(**ids(padding="right"), output_attentions=True) for m in (model, patched))
    assert len(out.attentions) == 2
    for theirs, ours in zip(expected.attentions, out.attentions, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_masks_of_the_config():
    """The implementation that decides on masks is set while patched, not saved, and restored."""
    model = MODELS["mpt"].build()
    before = model.config._attn_implementation
    xformer_fast.patch(model)
    assert model.config._attn_implementation == integration.FOLLOWED
    xformer_fast.unpatch(model)
    assert model.config._attn_implementation == before
