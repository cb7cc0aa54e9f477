"""patch over the model families of transformers: each one small, random, patched against unpatched, or told as left."""

import copy

import pytest
import torch
from host_models import check_close, check_equal, disturb

transformers = pytest.importorskip("transformers")

import xformer_fast  # noqa: E402

WIDTH, HEADS, VOCAB = 32, 4, 99
BASE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 48}
TEXT = BASE | {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
GQA = TEXT | SPECIAL | {"num_key_value_heads": 2, "head_dim": 8}
IMAGE = BASE | {"image_size": 20, "patch_size": 4}
SEQ2SEQ = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
WAVE = TEXT | {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "apply_spec_augment": False,
}  # fmt: skip
CLIP = {"text_config": TEXT | SPECIAL, "vision_config": IMAGE, "projection_dim": 8}
AST = BASE | {"patch_size": 4, "frequency_stride": 3, "time_stride": 3, "max_length": 24, "num_mel_bins": 16}
SAM = BASE | {
    "mlp_dim": 48, "output_channels": 8, "image_size": 32, "patch_size": 4, "window_size": 3,
    "global_attn_indexes": [1], "num_pos_feats": 8,
}  # fmt: skip
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
CVT = {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}
SHARED_BIAS = {"use_shared_relative_position_bias": True}


def text(padding=True):
    torch.manual_seed(1)
    mask = torch.arange(13) < torch.tensor([13, 7, 10])[:, None]
    ids = torch.randint(3, VOCAB, (3, 13)).masked_fill(~mask, 0)
    return {"input_ids": ids, "attention_mask": mask.long()} if padding else {"input_ids": ids}


def image(size=20, batch=2):
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def sound(length=400):
    torch.manual_seed(1)
    mask = (torch.arange(length) < torch.tensor([length, length - 150])[:, None]).long()
    return {"input_values": torch.randn(2, length), "attention_mask": mask}


def detr():
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], out_features=["stage1"])
    return SEQ2SEQ | {"num_queries": 5, "backbone_config": backbone}


PATCHED = {  # class, config, inputs, attention modules
    "qwen3": ("Qwen3ForCausalLM", GQA, text, 2),
    "gemma3": ("Gemma3ForCausalLM", GQA | {"sliding_window": 6, "query_pre_attn_scalar": 8}, text, 2),
    "phi3": ("Phi3Model", GQA, text, 2),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT, text, 2),
    "opt": ("OPTModel", TEXT | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}, text, 2),
    "falcon": ("FalconModel", TEXT, text, 2),
    "falcon_alibi": ("FalconModel", TEXT | {"alibi": True}, text, 2),
    "albert": ("AlbertModel", TEXT | {"embedding_size": 16}, text, 1),
    "electra": ("ElectraModel", TEXT | {"embedding_size": 16}, text, 2),
    "deit": ("DeiTModel", IMAGE, image, 2),
    "dinov2": ("Dinov2Model", IMAGE, image, 2),
    "mae": ("ViTMAEModel", IMAGE | {"mask_ratio": 0.5}, lambda: image() | {"noise": torch.rand(2, 25)}, 2),
    "beit": ("BeitModel", IMAGE | {"use_relative_position_bias": True}, image, 2),
    "beit_shared": ("BeitModel", IMAGE | SHARED_BIAS, image, 2),
    "siglip": ("SiglipVisionModel", IMAGE, image, 3),
    "clip": ("CLIPModel", CLIP, lambda: text() | image(batch=3), 4),
    "detr": ("DetrModel", detr, lambda: image(64), 6),
    "sam_vision": ("SamVisionModel", SAM, lambda: image(32), 2),
    "swin": ("SwinModel", WINDOWS, lambda: image(32), 2),
    "ast": ("ASTModel", AST, lambda: {"input_values": torch.randn(2, 24, 16)}, 2),
    "wav2vec2": ("Wav2Vec2Model", WAVE | {"do_stable_layer_norm": True}, sound, 2),
    "wav2vec2_conformer": ("Wav2Vec2ConformerModel", WAVE, sound, 2),
    "hubert": ("HubertModel", WAVE, sound, 2),
}
ITSELF = "computes its attention itself"
LEFT = {  # class, config, the reason
    "swinv2": ("Swinv2Model", WINDOWS, ITSELF),
    "cvt": ("CvtModel", CVT, ITSELF),
    "bloom": ("BloomModel", {"hidden_size": WIDTH, "n_layer": 1, "n_head": HEADS, "vocab_size": VOCAB}, ITSELF),
    "mpt": ("MptModel", {"d_model": WIDTH, "n_layers": 1, "n_heads": HEADS, "vocab_size": VOCAB}, ITSELF),
    "longformer": ("LongformerModel", TEXT | {"attention_window": 4}, ITSELF),
    "deberta": ("DebertaV2Model", TEXT, ITSELF),
    "speech2text": ("Speech2TextModel", SEQ2SEQ | {"vocab_size": VOCAB}, "does not go through AttentionInterface"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind, config):
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    return disturb(cls(cls.config_class(**(config() if callable(config) else config)))).eval()


def output(outputs, inputs):
    """The first tensor; of text, only what is not padding."""
    names = ("logits", "logits_per_image", "last_hidden_state")
    out = outputs[next(name for name in names if name in outputs)]
    mask = inputs.get("attention_mask")
    return out[mask.bool()] if mask is not None and mask.shape == out.shape[:2] else out


@pytest.mark.parametrize("name", PATCHED)
def test_outputs_and_gradients(name):
    kind, config, inputs, count = PATCHED[name]
    model, given = build(kind, config), inputs()
    patched = copy.deepcopy(model)
    report = xformer_fast.patch(patched)
    assert report.count == count and not report.skipped, str(report)
    check_equal(model, patched, lambda model: output(model(**given), given))
    xformer_fast.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in model.modules()]
    check_close(model, patched, lambda model: output(model(**given), given), 0)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_told(name):
    kind, config, reason = LEFT[name]
    model = build(kind, config)
    report = xformer_fast.patch(model)
    assert report.count == 0 and report.skipped and all(reason in why for why in report.skipped.values()), str(report)
