"""Small models of every transformer family, made of `xformer_fast.layers`, one file a family."""

from .ast import AST
from .bert import BERT
from .branchformer import Branchformer
from .conformer import Conformer
from .convnext import ConvNeXt
from .cvt import CvT
from .detr import DETR
from .gpt import GPT
from .llama import LLaMA
from .mae import MAE
from .maskgit import MaskGIT
from .maxvit import MaxViT
from .metaformer import MetaFormer
from .replknet import RepLKNet
from .sam import SAM
from .speech_transformer import SpeechTransformer
from .swin import Swin
from .t5 import T5
from .transformer import Transformer
from .vit import ViT

__all__ = [
    "AST", "BERT", "DETR", "GPT", "MAE", "SAM", "T5", "Branchformer", "Conformer", "ConvNeXt", "CvT", "LLaMA",
    "MaskGIT", "MaxViT", "MetaFormer", "RepLKNet", "SpeechTransformer", "Swin", "Transformer", "ViT",
]  # fmt: skip
