"""The models that patch is proved on: each one small and random, and the inputs that its outputs and gradients are held
to, patched against unpatched. Read by tests/integrations/test_models.py, which also writes the table of them.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from host_models import disturb
from torch import Tensor, nn

WIDTH, HEADS, VOCAB, PAD = 32, 4, 99, 0
LENGTHS = (13, 7, 10)

BASE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 48}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
TEXT = BASE | {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": PAD}
GQA = TEXT | SPECIAL | {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = GQA | {"sliding_window": 6}
IMAGE = BASE | {"image_size": 20, "patch_size": 4}
SEQ2SEQ = SPECIAL | {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS, "vocab_size": VOCAB,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {
    "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS, "vocab_size": VOCAB,
    "pad_token_id": PAD, "decoder_start_token_id": PAD, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12, "dropout_rate": 0.0,
}  # fmt: skip
WAVE = TEXT | {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "apply_spec_augment": False,
}  # fmt: skip
SAM = BASE | {
    "mlp_dim": 48, "output_channels": 8, "image_size": 32, "patch_size": 4, "window_size": 3,
    "global_attn_indexes": [1], "num_pos_feats": 8,
}  # fmt: skip
WINDOWS = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2,
}  # fmt: skip
CVT = {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}

TIMM_VIT = {"img_size": 20, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
TIMM_SWIN = {
    "img_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4),
    "num_classes": 5, "strict_img_size": False,
}  # fmt: skip


# Inputs


def rows(length, lengths) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def ids(length=13, padding=None, lengths=LENGTHS) -> dict[str, Tensor]:
    """input_ids and attention_mask of three rows."""
    mask = rows(length, lengths if padding else (length,) * 3)
    mask = mask.flip(1) if padding == "left" else mask
    tokens = torch.randint(3, VOCAB, (3, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def noise(*shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Cases: functions of a model that give a tensor


def result(outputs, mask=None) -> Tensor:
    """The first tensor that a model is made for; of text, only what is no padding."""
    names = ("logits", "logits_per_image", "last_hidden_state")
    out = outputs[next(name for name in names if name in outputs)]
    return out if mask is None or mask.shape != out.shape[:2] else out[mask.bool()]


def call(**inputs) -> Callable[[nn.Module], Tensor]:
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return lambda model: result(model(**inputs), mask)


def encoder_cases() -> dict:
    return {
        "odd length": call(input_ids=ids()["input_ids"]),
        "right padding": call(**ids(padding="right")),
        "left padding": call(**ids(padding="left")),
    }


def global_cases() -> dict:
    """Beside an encoder's: tokens that see all and are seen by all, not the same number in each row."""
    chosen = torch.zeros(3, 13, dtype=torch.long)
    chosen[[0, 0, 1], [0, 9, 4]] = 1
    padded = ids(padding="right")
    return encoder_cases() | {"global tokens": call(**padded, global_attention_mask=chosen * padded["attention_mask"])}


def decoder_cases() -> dict:
    return encoder_cases() | {"cache": continued(ids(padding="left"))}


def translation_cases(source=None) -> dict:
    """Cross attention: source and target padded, and the target in two pieces, by a cache."""

    def target(padding):
        return {f"decoder_{name}": x for name, x in ids(9, padding, (9, 4, 6)).items()}

    if source is not None:  # not text
        return {
            "cross attention": call(**source, **target(None)),
            "padded target": call(**source, **target("right")),
            "cache": continued(target(None), source),
        }
    return {
        "cross attention": call(**ids(), **target(None)),
        "right padding": call(**ids(padding="right"), **target("right")),
        "left padding": call(**ids(padding="left"), **target("left")),
        "cache": continued(target(None), ids(padding="right")),
    }


def continued(inputs: dict[str, Tensor], source: dict[str, Tensor] | None = None) -> Callable[[nn.Module], Tensor]:
    """The text in two pieces, the second behind the first one's cache."""
    (name_ids, tokens), (name_mask, mask) = inputs.items()
    cut = tokens.shape[1] - 4

    def run(model):
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        first = model(**{name_ids: tokens[:, :cut], name_mask: mask[:, :cut]}, use_cache=True, **(source or {}))
        second = model(**{name_ids: tokens[:, cut:], name_mask: mask, name: first[name]}, **(source or {}))
        return torch.cat((result(first), result(second)), 1)[mask.bool()]

    return run


def image_cases(*sizes, batch=2, **options) -> dict:
    return {f"{h}x{w} pixels": call(pixel_values=noise(batch, 3, h, w), **options) for h, w in sizes}


def interpolated_cases() -> dict:
    return image_cases((20, 20), (28, 12), interpolate_pos_encoding=True)


def wave_cases() -> dict:
    return {
        "odd length": call(input_values=noise(2, 387)),
        "padding": call(input_values=noise(2, 400), attention_mask=rows(400, (400, 250)).long()),
    }


def pixels(*sizes) -> dict:
    """Of a model that takes the images themselves."""
    return {f"{h}x{w} pixels": lambda model, h=h, w=w: model(noise(2, 3, h, w)) for h, w in sizes}


# Models


@dataclass
class Listed:
    """kind: class, or module and class; arguments: of its config, if it is a model of transformers, or its own."""

    label: str
    library: str
    kind: str
    arguments: dict | Callable[[], dict]
    count: int  # of attention modules
    cases: Callable[[], dict] = field(default=encoder_cases)
    attention: str | None = None  # the implementation that is the truth, where it is not the host's choice

    def build(self) -> nn.Module:
        """The model in eval mode, its parameters moved off their initial values."""
        arguments = self.arguments() if callable(self.arguments) else self.arguments
        where, _, name = self.kind.rpartition(":")
        cls = getattr(importlib.import_module(where or self.library), name)
        torch.manual_seed(0)
        if self.library != "transformers":
            return disturb(cls(**arguments)).eval()
        config = cls.config_class(**arguments)
        if self.attention:
            config._attn_implementation = self.attention
        return disturb(cls(config)).eval()


def hf(label, kind, arguments, count=2, cases=encoder_cases, attention=None) -> Listed:
    return Listed(label, "transformers", kind, arguments, count, cases, attention)


def timm(label, kind, arguments, count, *sizes) -> Listed:
    return Listed(label, "timm", kind, arguments, count, lambda: pixels(*sizes))


def _clip():
    text, vision = TEXT | SPECIAL, IMAGE
    return {"text_config": text, "vision_config": vision, "projection_dim": 8}


def _detr():
    import transformers

    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], out_features=["stage1"])
    options = {name: value for name, value in SEQ2SEQ.items() if name not in ("vocab_size", *SPECIAL)}
    return options | {"num_queries": 5, "backbone_config": backbone}


def _maxvit():
    from timm.models.maxxvit import MaxxVitCfg, MaxxVitTransformerCfg

    attention = MaxxVitTransformerCfg(dim_head=8, rel_pos_type="bias", window_size=(4, 4), grid_size=(4, 4))
    stages = {"embed_dim": (16, 24), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 8}
    return {"cfg": MaxxVitCfg(**stages, transformer_cfg=attention), "img_size": 64, "num_classes": 5}


MODELS = {
    "bert": hf("BERT", "BertModel", TEXT),
    "roberta": hf("RoBERTa", "RobertaModel", TEXT),
    "distilbert": hf(
        "DistilBERT", "DistilBertModel",
        {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 48, "vocab_size": VOCAB},
    ),
    "modernbert": hf(
        "ModernBERT", "ModernBertModel",
        TEXT | SPECIAL | {"local_attention": 8, "global_attn_every_n_layers": 2, "reference_compile": False},
    ),
    "longformer": hf("Longformer", "LongformerModel", TEXT | {"attention_window": [4, 8]}, cases=global_cases),
    "gpt2": hf(
        "GPT-2", "GPT2LMHeadModel",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 64},
        cases=decoder_cases,
    ),
    "gpt_neox": hf("GPT-NeoX", "GPTNeoXForCausalLM", TEXT, cases=decoder_cases),
    "llama": hf("LLaMA", "LlamaForCausalLM", GQA, cases=decoder_cases),
    "mistral": hf("Mistral", "MistralForCausalLM", SLIDING, cases=decoder_cases),
    "qwen3": hf("Qwen3", "Qwen3ForCausalLM", GQA, cases=decoder_cases),
    "gemma2": hf(
        "Gemma-2", "Gemma2ForCausalLM", SLIDING | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
        cases=decoder_cases, attention="eager",
    ),
    "gemma3": hf("Gemma-3", "Gemma3ForCausalLM", SLIDING | {"query_pre_attn_scalar": 8}, cases=decoder_cases),
    "gpt_oss": hf(
        "gpt-oss", "GptOssForCausalLM", SLIDING | {"num_local_experts": 2, "num_experts_per_tok": 1},
        cases=decoder_cases, attention="eager",
    ),
    "bloom": hf(
        "Bloom", "BloomForCausalLM",
        SPECIAL | {"hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCAB}, cases=decoder_cases,
    ),
    "mpt": hf(
        "MPT", "MptForCausalLM",
        {"d_model": WIDTH, "n_layers": 2, "n_heads": HEADS, "vocab_size": VOCAB, "max_seq_len": 64},
        cases=decoder_cases,
    ),
    "t5": hf("T5", "T5ForConditionalGeneration", T5, 6, translation_cases),
    "umt5": hf("UMT5", "UMT5ForConditionalGeneration", T5, 6, translation_cases),
    "bart": hf("BART", "BartForConditionalGeneration", SEQ2SEQ, 6, translation_cases),
    "whisper": hf(
        "Whisper", "WhisperForConditionalGeneration",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}, 6,
        lambda: translation_cases({"input_features": noise(3, 8, 32)}),
    ),
    "speech2text": hf(
        "Speech2Text", "Speech2TextForConditionalGeneration",
        SEQ2SEQ | {
            "input_feat_per_channel": 8, "max_source_positions": 64, "max_target_positions": 64, "conv_channels": 16,
        }, 6,
        lambda: translation_cases({"input_features": noise(3, 33, 8), "attention_mask": rows(33, (33, 20, 9)).long()}),
    ),
    "wav2vec2_conformer": hf("Wav2Vec2-Conformer", "Wav2Vec2ConformerModel", WAVE, cases=wave_cases),
    "ast": hf(
        "AST", "ASTModel",
        BASE | {"patch_size": 4, "frequency_stride": 3, "time_stride": 3, "max_length": 24, "num_mel_bins": 16},
        cases=lambda: {"odd number of patches": call(input_values=noise(2, 24, 16))},
    ),
    "vit": hf("ViT", "ViTModel", IMAGE, cases=interpolated_cases),
    "deit": hf("DeiT", "DeiTModel", IMAGE, cases=interpolated_cases),
    "beit": hf("BEiT", "BeitModel", IMAGE | {"use_relative_position_bias": True}, cases=interpolated_cases),
    "dinov2": hf("DINOv2", "Dinov2Model", IMAGE, cases=lambda: image_cases((20, 20), (28, 12))),
    "mae": hf(
        "MAE", "ViTMAEModel", IMAGE | {"mask_ratio": 0.5}, cases=lambda: image_cases((20, 20), noise=noise(2, 25)),
    ),
    "swin": hf("Swin", "SwinModel", WINDOWS, 4, lambda: image_cases((32, 32), (36, 44))),
    "swinv2": hf("Swin-V2", "Swinv2Model", WINDOWS, 4, lambda: image_cases((32, 32), (36, 44))),
    "cvt": hf("CvT", "CvtModel", CVT, 6, lambda: image_cases((64, 64), (52, 36))),
    "sam_vision": hf("SAM vision", "SamVisionModel", SAM, 2, lambda: image_cases((32, 32))),
    "detr": hf("DETR", "DetrModel", _detr, 6, lambda: image_cases((64, 64), (40, 72))),
    "clip": hf("CLIP", "CLIPModel", _clip, 4, lambda: image_cases((20, 20), batch=3, **ids(padding="right"))),
    "timm_vit": timm("ViT", "timm.models.vision_transformer:VisionTransformer", TIMM_VIT, 2, (20, 20)),
    "timm_beit": timm("BEiT", "timm.models.beit:Beit", TIMM_VIT | {"use_rel_pos_bias": True}, 2, (20, 20)),
    "timm_swin": timm("Swin", "timm.models.swin_transformer:SwinTransformer", TIMM_SWIN, 4, (32, 32), (36, 44)),
    "timm_swinv2": timm(
        "Swin-V2", "timm.models.swin_transformer_v2:SwinTransformerV2", TIMM_SWIN, 4, (32, 32), (36, 44)
    ),
    "timm_maxvit": timm("MaxViT", "timm.models.maxxvit:MaxxVit", _maxvit, 4, (64, 64)),
}  # fmt: skip
