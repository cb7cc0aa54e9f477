"""Real text that every machine with Python has: the standard library's source, and its docstrings."""

from __future__ import annotations

import ast
import functools
import pathlib
import sysconfig
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 20  # every so many files are for validation alone
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data", "encodings"}


@functools.cache
def files() -> list[pathlib.Path]:
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix())
    return [path for path in found if not LEFT_OUT & set(path.relative_to(library).parts)]


@functools.cache
def source() -> tuple[Tensor, Tensor]:
    """The bytes of the library, (n,) uint8: of the files to train on, and of those held out."""
    parts = [path.read_bytes() for path in files()]
    train = b"".join(part for i, part in enumerate(parts) if i % HELD_OUT)
    held_out = b"".join(parts[::HELD_OUT])
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out))


def windows(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random pieces of the text, (batch, length) int64."""
    starts = torch.randint(len(text) - length + 1, (batch, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


@dataclass(frozen=True)
class Pair:
    """A function, as it is called, and the first paragraph of what its docstring says."""

    signature: str
    description: str
    held_out: bool


@functools.cache
def pairs() -> list[Pair]:
    """Documented functions of the library, each description once; a file is held out with all its functions."""
    found, seen = [], set()
    for i, path in enumerate(files()):
        for signature, text in _documented(path):
            description = " ".join(text.split("\n\n")[0].split())
            if signature.endswith(")") and 4 <= len(description.split()) <= 60 and description not in seen:
                seen.add(description)
                found.append(Pair(signature, description, i % 5 == 0))
    return found


@functools.cache
def docstrings() -> tuple[list[str], list[str]]:
    """Docstrings of at least 12 words: of the files to train on, and of those held out."""
    train, held_out = [], []
    for i, path in enumerate(files()):
        texts = [text for _, text in _documented(path) if len(text.split()) >= 12]
        (train if i % HELD_OUT else held_out).extend(texts)
    return train, held_out


@functools.cache
def _documented(path: pathlib.Path) -> list[tuple[str, str]]:
    """Qualified name, of a function with its arguments, and docstring of what has one in the file."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if text := ast.get_docstring(child):
                    called = "" if isinstance(child, ast.ClassDef) else f"({_arguments(child)})"
                    found.append((prefix + child.name + called, text))
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files
            visit(ast.parse(path.read_text(encoding="utf-8")), "")
    except (SyntaxError, UnicodeDecodeError):
        return []
    return found


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return ", ".join(a.arg for a in function.args.args if a.arg not in ("self", "cls"))
