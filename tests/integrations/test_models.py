"""patch over the models of tests/model_list.py, and over other families: equal to unpatched, or told as left."""

import copy
import importlib.util

import pytest
import torch
from host_models import check_equal, check_life, prepare_timm
from model_list import (
    GQA,
    HEADS,
    IMAGE,
    MODELS,
    SEQ2SEQ,
    SPECIAL,
    TEXT,
    VOCAB,
    WAVE,
    WIDTH,
    call,
    decoder_cases,
    hf,
    ids,
    image_cases,
    noise,
    result,
    rows,
    translation_cases,
    wave_cases,
)

prepare_timm()
pytest.importorskip("transformers")

import xformer_fast  # noqa: E402

INFORMER = {
    "prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": WIDTH,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "distil": False, "sampling_factor": 1,
}  # fmt: skip


def informer_cases():
    """Of the queries, attention is computed for those that tell most, by scores with keys drawn at random."""
    inputs = {
        "past_values": noise(3, 14), "past_time_features": noise(3, 14, 1), "past_observed_mask": torch.ones(3, 14),
        "future_values": noise(3, 4), "future_time_features": noise(3, 4, 1),
    }  # fmt: skip

    def run(model):
        torch.manual_seed(5)
        return result(model(**inputs))

    return {"time series": run}


MORE = {
    "phi3": hf("Phi-3", "Phi3Model", GQA),
    "opt": hf("OPT", "OPTModel", TEXT | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "falcon": hf("Falcon", "FalconModel", TEXT),
    "falcon_alibi": hf("Falcon with ALiBi", "FalconModel", TEXT | {"alibi": True}),
    "albert": hf("ALBERT", "AlbertModel", TEXT | {"embedding_size": 16}, 1),
    "electra": hf("ELECTRA", "ElectraModel", TEXT | {"embedding_size": 16}),
    "xlnet": hf(
        "XLNet", "XLNetModel",
        {"d_model": WIDTH, "n_layer": 2, "n_head": HEADS, "d_inner": 48, "vocab_size": VOCAB},
    ),
    "deberta": hf("DeBERTa-V2", "DebertaV2Model", TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "mpnet": hf("MPNet", "MPNetModel", TEXT),
    "gpt_neo": hf(
        "GPT-Neo", "GPTNeoModel",
        {"hidden_size": WIDTH, "num_layers": 2, "num_heads": HEADS, "vocab_size": VOCAB, "window_size": 4,
         "attention_types": [[["global", "local"], 1]]},
    ),
    "esm": hf("ESM", "EsmModel", TEXT | {"position_embedding_type": "rotary"}),
    "siglip": hf("SigLIP", "SiglipVisionModel", IMAGE, 3, lambda: image_cases((20, 20))),
    "beit_shared": hf(
        "BEiT, shared bias", "BeitModel", IMAGE | {"use_shared_relative_position_bias": True},
        cases=lambda: image_cases((20, 20)),
    ),
    "wav2vec2": hf("Wav2Vec2", "Wav2Vec2Model", WAVE | {"do_stable_layer_norm": True}, cases=wave_cases),
    "hubert": hf("HuBERT", "HubertModel", WAVE, cases=wave_cases),
}  # fmt: skip
VITS = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "ffn_dim": 48, "vocab_size": VOCAB,
    "flow_size": 16, "window_size": 4, "layerdrop": 0.0, "upsample_initial_channel": 16,
}  # fmt: skip


def vits_cases():
    def run(model):
        inputs = ids(padding="right")
        mask = inputs["attention_mask"]
        out = model.text_encoder(**inputs, padding_mask=mask[..., None].float()).last_hidden_state
        return out[mask.bool()]

    return {"right padding": run}


def vilt_cases():
    run = call(**ids(padding="right"), pixel_values=noise(3, 3, 20, 20))

    def seeded(model):
        torch.manual_seed(5)  # patches are drawn
        return run(model)

    return {"pixels": seeded}


def boxes():
    inputs = ids(padding="right")
    return {
        "right padding": call(**inputs, bbox=torch.arange(4).expand(3, 13, 4) + inputs["input_ids"][..., None] % 40)
    }


def bros_cases():
    inputs = ids(padding="right")
    return {"right padding": call(**inputs, bbox=noise(3, 13, 8).sigmoid())}


def blip_cases():
    """As the decoder that captions, and as an encoder that looks at a picture."""
    picture = {"encoder_hidden_states": noise(3, 5, WIDTH), "encoder_attention_mask": rows(5, (5, 3, 4)).long()}
    return {
        "causal": call(**ids(padding="right"), is_decoder=True, **picture),
        "both ways": call(**ids(padding="right"), **picture),
    }


BIG_BIRD = SEQ2SEQ | {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64}
MORE |= {
    "bigbird_pegasus": hf(
        "BigBird-Pegasus", "BigBirdPegasusForConditionalGeneration", BIG_BIRD | {"attention_type": "original_full"}, 6,
        translation_cases,
    ),
    "deepseek_v4": hf(
        "DeepSeek-V4", "DeepseekV4ForCausalLM",
        TEXT | SPECIAL | {
            "moe_intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8, "q_lora_rank": 16, "hc_mult": 2,
            "num_experts_per_tok": 2, "n_routed_experts": 4, "sliding_window": 6, "o_groups": 2, "o_lora_rank": 8,
            "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "mlp_layer_types": ["moe", "moe"],
            "layer_types": ["sliding_attention", "compressed_sparse_attention"], "partial_rotary_factor": 0.5,
        },
    ),
    "vilt": hf(
        "ViLT", "ViltModel", IMAGE | {"vocab_size": VOCAB, "max_position_embeddings": 64},
        cases=vilt_cases,
    ),
    "blip_text": hf(
        "BLIP text", "BlipTextModel", TEXT | {"encoder_hidden_size": WIDTH, "projection_dim": 8}, 4, blip_cases
    ),
    "lilt": hf(
        "LiLT", "LiltModel",
        TEXT | {"hidden_size": 48, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 64}, cases=boxes,
    ),
    "bros": hf("BROS", "BrosModel", TEXT | {"hidden_size": 64}, cases=bros_cases),
    "imagegpt": hf(
        "ImageGPT", "ImageGPTModel",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 64},
        cases=lambda: {"odd length": call(input_ids=ids()["input_ids"])},
    ),
    "squeezebert": hf("SqueezeBERT", "SqueezeBertModel", TEXT | {"embedding_size": WIDTH}),
    "xglm": hf(
        "XGLM", "XGLMForCausalLM",
        {"d_model": WIDTH, "num_layers": 2, "attention_heads": HEADS, "ffn_dim": 48, "vocab_size": VOCAB,
         "max_position_embeddings": 64} | SPECIAL,
        cases=decoder_cases,
    ),
    "nystromformer": hf(
        "Nystromformer", "NystromformerModel",
        TEXT | {"num_landmarks": 12, "segment_means_seq_len": 12, "conv_kernel_size": 3},
        cases=lambda: {"segments": call(input_ids=ids(12)["input_ids"])},
    ),
    "vits": hf("VITS", "VitsModel", VITS, cases=vits_cases),
    "informer": hf("Informer", "InformerModel", INFORMER, 6, informer_cases),
}  # fmt: skip
TIMM = importlib.util.find_spec("timm") is not None


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_outputs_and_gradients(name, proof):
    listed = (MODELS | MORE)[name]
    if listed.library == "timm" and not TIMM:
        pytest.skip("timm is not installed")
    model = listed.build()
    patched = copy.deepcopy(model)
    report = xformer_fast.patch(patched)
    assert report.count == listed.count and not report.skipped, str(report)
    cases = listed.cases()
    errors = [check_equal(model, patched, run) for run in cases.values()]
    if name in MODELS:
        proof(listed.library, listed.label, report.count, cases, errors)
    check_life(model, patched, next(iter(cases.values())))
