"""patch over the models of tests/model_list.py, and over other families: equal to unpatched, or told as left."""

import copy
import importlib.util

import pytest
import torch
from host_models import check_equal, check_life, prepare_timm
from model_list import GQA, HEADS, IMAGE, MODELS, TEXT, VOCAB, WAVE, WIDTH, hf, image_cases, wave_cases

prepare_timm()
pytest.importorskip("transformers")

import xformer_fast  # noqa: E402

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
