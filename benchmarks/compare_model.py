"""One model before and after `xformer_fast.patch`: are outputs and gradients equal, how fast is it, what does it take?

    xformer-fast compare bert --length 512                                # transformers: a model type, random weights
    xformer-fast compare llama --config num_hidden_layers=2,hidden_size=512,num_key_value_heads=8
    xformer-fast compare path/to/folder                                   # ... or what `save_pretrained` wrote
    xformer-fast compare vit_tiny_patch16_224 --batch 8                   # a model of timm
    xformer-fast compare my_package.my_module:make_model                  # a function of yours

A function is called without arguments and gives a model, or (model, arguments of a call as a dict). Where it gives the
model alone, and for all others, inputs are made: tokens for `input_ids`, noise for images.

What is run, checked and timed is what benchmarks/models.py says. The rows are added to a CSV.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import xformer_fast

from . import models
from .run import check_backends, check_writable, count, csv_path, listed, quiet

Loaded = tuple[nn.Module, dict[str, Any] | None, str]  # model, its inputs if they came with it, library


def overrides(text: str) -> dict[str, Any]:
    """From "a=1,b=[2,3],c=gelu": {"a": 1, "b": [2, 3], "c": "gelu"}."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise ValueError
        return {
            word.arg: word.value.id if isinstance(word.value, ast.Name) else ast.literal_eval(word.value)
            for word in call.keywords
        }
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE,..., got {text!r}") from None


def load(name: str, config: dict[str, Any]) -> Loaded:
    """The model that a name stands for; ValueError where there is none."""
    folder = pathlib.Path(name)
    if folder.is_dir():
        return _built(name, config, lambda: _from_folder(folder, config)), None, "transformers"
    if ":" in name:
        return *_from_function(name), "own"
    import transformers

    if name in transformers.CONFIG_MAPPING:
        kind = transformers.CONFIG_MAPPING[name]
        make = lambda: transformers.AutoModel.from_config(kind(**config))  # noqa: E731
        return _built(name, config, make), None, "transformers"
    if models.timm_is_there():
        import timm

        if timm.is_model(name):
            return _built(name, config, lambda: timm.create_model(name, pretrained=False, **config)), None, "timm"
    raise ValueError(
        f"no model {name!r}: not a folder, not module:function, not a model type of transformers (bert, gpt2, llama, "
        "t5, vit, ...) and not a model of timm" + ("" if models.timm_is_there() else ", which is not installed")
    )


def _built(name: str, config: dict[str, Any], make: Callable[[], nn.Module]) -> nn.Module:
    """What make gives; ValueError where it fails, for that is the config's doing."""
    torch.manual_seed(0)
    try:
        return make()
    except Exception as error:
        given = f" with {', '.join(f'{n}={v}' for n, v in config.items())}" if config else ""
        raise ValueError(f"{name} cannot be made{given}: {_line(error)}") from error


def _from_folder(folder: pathlib.Path, overrides: dict[str, Any]) -> nn.Module:
    """With its weights, if they are there."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **overrides)
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    cls = next((cls for cls in named if cls is not None), transformers.AutoModel)
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return cls.from_pretrained(folder, config=config, local_files_only=True)
    return cls(config) if cls is not transformers.AutoModel else cls.from_config(config)


def _from_function(name: str) -> tuple[nn.Module, dict[str, Any] | None]:
    module, _, function = name.partition(":")
    if (here := str(pathlib.Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module), function)
        inspect.signature(factory).bind()
    except (ModuleNotFoundError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must name a function without arguments: {error}") from error
    made = factory()
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module) or not isinstance(inputs, dict | None):
        raise ValueError(f"{name} must give a torch.nn.Module, or one and a dict of its arguments")
    return model, inputs


def make_inputs(model: nn.Module, library: str, batch: int, length: int) -> dict[str, Any]:
    """Tokens or images, as the model asks for them."""
    generator = torch.Generator().manual_seed(1)
    if library == "timm":
        return {"x": torch.randn(batch, *model.pretrained_cfg["input_size"], generator=generator)}
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return {name: torch.randn(batch, getattr(config, "num_channels", 3), *sides, generator=generator)}
    if name == "input_ids" and hasattr(config, "vocab_size"):
        inputs = {name: torch.randint(config.vocab_size, (batch, length), generator=generator)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs[name]
        return inputs
    raise ValueError(
        f"{type(model).__name__} takes neither tokens nor images of a known size: name a function that gives "
        "(model, arguments of a call)"
    )


def settings(model: nn.Module) -> tuple[str, ...]:
    """The ways in which its host could run the model."""
    if hasattr(model, "set_attn_implementation"):
        return tuple(name for name in ("sdpa", "eager") if _takes(model, name)) or ("own",)
    return ("own", "fused") if any(hasattr(module, "fused_attn") for module in model.modules()) else ("own",)


def _takes(model: nn.Module, setting: str) -> bool:
    try:
        with models.hosted(model, setting):
            return model.config._attn_implementation == setting
    except ValueError:
        return False


@torch.no_grad()
def _try(model: nn.Module, inputs: dict[str, Any], device: str) -> None:
    """ValueError where a model does not take the inputs made for it: it has no positions for so many tokens."""
    model.to(device).eval()
    try:
        model(**{name: x.to(device) for name, x in inputs.items()})
    except Exception as error:
        raise ValueError(f"{type(model).__name__} fails on inputs of {shapes(inputs)}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def shapes(inputs: dict[str, Any]) -> str:
    return " ".join("x".join(map(str, x.shape)) for x in inputs.values() if isinstance(x, Tensor))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of a model")
    group.add_argument("--config", type=overrides, default={}, metavar="NAME=VALUE,...", help="changes to its config")
    group.add_argument("--batch", type=count, default=1)
    group.add_argument("--length", type=count, default=512, help="tokens (default 512)")
    group.add_argument("--mode", type=listed(models.MODES), default=models.MODES, metavar="fwd,both",
                       help="forward, training step (forward and backward); default: both of them")  # fmt: skip
    group.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-results/compare.csv"),
                       metavar="CSV", help="where rows are added (default bench-results/compare.csv)")  # fmt: skip


def execute(args: argparse.Namespace) -> int:
    quiet()
    try:
        check_backends([args.backend] if args.backend else ())
        out = csv_path(args.out, "compare", args.device)
        check_writable(out)
        model, inputs, library = load(args.model, args.config)
        if inputs is None:
            inputs = make_inputs(model, library, args.batch, args.length)
            _try(model, inputs, args.device)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    with xformer_fast.patched(model, backend=args.backend) as report:
        print(report)
    if not report.count:
        return 1
    if library == "own" and hasattr(model, "set_attn_implementation"):
        library = "transformers"
    case = models.Case(args.model, lambda: (model, inputs), shapes(inputs), "all", settings(model), library, args.mode)
    print(f"\n{models.HEAD}")
    start = time.monotonic()
    with contextlib.closing(models.ModelsCsv(out, append=True)) as sink:
        rows = models.bench(
            [case], dtypes=args.dtype, modes=args.mode, device=args.device, seconds=args.seconds, backend=args.backend,
            on_rows=sink,
        )  # fmt: skip
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s -> {out}")
    return 1 if models.failures(rows) else 0
