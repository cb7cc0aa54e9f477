"""Small models of every transformer family, made of `xformer_fast.layers`, one file a family."""

from .bert import BERT
from .gpt import GPT
from .llama import LLaMA
from .t5 import T5
from .transformer import Transformer

__all__ = ["BERT", "GPT", "T5", "LLaMA", "Transformer"]
