"""Small models of every transformer family, made of `xformer_fast.layers`, one file a family."""

from .ast import AST
from .bert import BERT
from .branchformer import Branchformer
from .conformer import Conformer
from .gpt import GPT
from .llama import LLaMA
from .speech_transformer import SpeechTransformer
from .t5 import T5
from .transformer import Transformer

__all__ = ["AST", "BERT", "GPT", "T5", "Branchformer", "Conformer", "LLaMA", "SpeechTransformer", "Transformer"]
