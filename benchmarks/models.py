"""Whole models before and after `xformer_fast.patch`, beside the ceiling that Amdahl's law sets.

    python -m benchmarks.models --out benchmarks/results       # every case, about ten minutes of two cores
    python -m benchmarks.models --quick                        # what `make bench` runs
    python -m benchmarks.models --case bert_512 --dtype float32 --mode fwd

One model with random weights is run in turn, interleaved, as its host runs it in each of its own settings (eager,
sdpa), patched, and patched with attention taken out: the kernels' calls give back the value they were given, and in a
training step pass the gradient on to query, key and value, so that everything but attention itself stays. The time of
that is the floor, and `ceiling` the speed-up that attention at no cost would bring over the host's fastest setting.

A training step is forward and backward, without dropout and without an optimiser. A result outside the rule gets no
speed: in float32 the output may differ by 1e-4 of its largest entry and each gradient by 2e-3 of its own; in bfloat16
both may be twice as far from the float32 model as the host's are, plus 1%. A half-precision model whose host takes
longer than --longest for one call is left out: torch has no fast products of those types for every CPU. Many cases have
fewer layers than the model they are named after: every layer costs the same, and the row says how many there are.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from tqdm import tqdm

import xformer_fast

from . import measure
from .op import DTYPES
from .run import OURS, csv_path, listed, quiet

COLUMNS = [
    "date", "commit", "device", "cpu", "threads", "python", "torch", "xformer_fast", "library",
    "case", "input", "layers", "dtype", "mode", "peer", "status", "reason", "attention_modules",
    "output_error", "gradient_error", "ms", "p20_ms", "p80_ms", "rounds", "vs_host", "host", "ceiling", "of_ceiling",
    "peak_memory_mib",
]  # fmt: skip
FLOOR = "without attention"
MODES = ("fwd", "both")
OUTPUT_LIMIT, GRADIENT_LIMIT = 1e-4, 2e-3

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """`build` gives a model and the arguments of a call; `hosts` are the settings that its host could run it in."""

    name: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    input: str
    layers: str
    hosts: tuple[str, ...] = ("sdpa",)
    library: str = "transformers"
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = ("float32",)
    parts: tuple[str, ...] = ("full",)  # of the benchmark that it belongs to


# Cases


def _ids(batch: int, length: int, vocab: int = 1000) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(10, vocab, (batch, length), generator=torch.Generator().manual_seed(1))}


def _pixels(batch: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))}


def _hf(kind: str, inputs: dict[str, Tensor], **config) -> Callable:
    def build():
        import transformers

        cls = getattr(transformers, kind)
        return cls(cls.config_class(**config)), inputs | ({"use_cache": False} if "use_cache" in config else {})

    return build


def _timm(name: str, batch: int, size: int) -> Callable:
    def build():
        if not timm_is_there():
            raise ModuleNotFoundError("timm is not installed")
        import timm

        return timm.create_model(name, pretrained=False), {"x": _pixels(batch, size)["pixel_values"]}

    return build


def timm_is_there() -> bool:
    """timm may lie in a folder apart (see the Makefile), beside a torchvision without kernels for this torch."""
    apart = pathlib.Path(__file__).resolve().parent.parent / ".venv" / "timm"
    if apart.is_dir() and str(apart) not in sys.path:
        sys.path.append(str(apart))
    if importlib.util.find_spec("timm") is None:
        return False
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _KEPT.append(torch.library.Library("torchvision", "DEF"))
        for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                       "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):  # fmt: skip
            _KEPT[-1].define(schema)
    except ModuleNotFoundError:
        pass
    return True


_KEPT: list[torch.library.Library] = []  # a library's operators go with it

_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_GPT2 = {
    "n_embd": 768, "n_head": 12, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
_BLOOM = {"hidden_size": 1024, "n_head": 16, "vocab_size": 1000, "use_cache": False}
_LLAMA = {
    "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 2816,
    "vocab_size": 1000, "use_cache": False,
}  # fmt: skip
_T5 = {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 2048, "vocab_size": 1000, "dropout_rate": 0.0}
_HOSTS = ("sdpa", "eager")
_TWO = ("float32", "bfloat16")
_QUICK = {"parts": ("quick",)}


def _bert(layers: int, length: int = 512) -> Callable:
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": length}
    return _hf("BertModel", _ids(1, length), **_BASE, **sizes, vocab_size=1000)


def _gpt2(layers: int) -> Callable:
    return _hf("GPT2Model", _ids(1, 1024), n_layer=layers, **_GPT2)


CASES = (
    Case("bert_512", _bert(2), "1x512", "2 of 12", _HOSTS, dtypes=_TWO),
    Case("gpt2_1024", _gpt2(2), "1x1024", "2 of 12", _HOSTS, dtypes=_TWO),
    Case("bert_512_1layer", _bert(1), "1x512", "1 of 12", **_QUICK),
    Case("gpt2_1024_1layer", _gpt2(1), "1x1024", "1 of 12", **_QUICK),
    Case("swin_t_224", _timm("swin_tiny_patch4_window7_224", 2, 224), "2x3x224x224", "all", ("own", "fused"), "timm",
         parts=("quick", "full")),
    Case("swinv2_t_256", _timm("swinv2_tiny_window8_256", 1, 256), "1x3x256x256", "all", ("own",), "timm"),
    Case("maxvit_t_224", _timm("maxvit_tiny_tf_224", 1, 224), "1x3x224x224", "all", ("own",), "timm"),
    Case("t5_encoder_1024", _hf("T5EncoderModel", _ids(1, 1024), num_layers=1, **_T5), "1x1024", "1 of 12", _HOSTS),
    Case("llama_1024", _hf("LlamaModel", _ids(1, 1024), num_hidden_layers=1, **_LLAMA), "1x1024", "1 of 24"),
    Case("bloom_2048", _hf("BloomModel", _ids(1, 2048), n_layer=1, **_BLOOM), "1x2048", "1 of 24", ("own",)),
    Case("vit_1024px", _hf("ViTModel", _pixels(1, 1024), num_hidden_layers=1, image_size=1024, **_BASE),
         "1x3x1024x1024", "1 of 12"),
    Case("bert_4096", _bert(1, 4096), "1x4096", "1 of 12"),
)  # fmt: skip


# The ways to run a model


@contextlib.contextmanager
def hosted(model: nn.Module, setting: str) -> Iterator[None]:
    """The model as its host runs it: "own" leaves it as it is, "fused" switches timm's sdpa on."""
    if setting in ("sdpa", "eager"):
        before = model.config._attn_implementation
        model.set_attn_implementation(setting)
        try:
            yield
        finally:
            model.set_attn_implementation(before)
    elif setting == "fused":
        modules = [m for m in model.modules() if hasattr(m, "fused_attn")]
        before = [m.fused_attn for m in modules]
        for module in modules:
            module.fused_attn = True
        try:
            yield
        finally:
            for module, value in zip(modules, before, strict=True):
                module.fused_attn = value
    else:
        yield


class _Taken(torch.autograd.Function):
    """The value in place of attention's output; its gradient goes to query, key and value as if they were one."""

    @staticmethod
    def forward(ctx, query, key, value, axis):
        ctx.shapes, ctx.axis = [x.shape for x in (query, key, value)], axis
        rows = query.shape[axis]
        if value.shape[axis] != rows:
            value = value.index_select(axis, torch.arange(rows, device=value.device) % value.shape[axis])
        heads = query.shape[1] // value.shape[1] if axis == 2 else 1
        return value.repeat_interleave(heads, 1) if heads > 1 else value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        grads = []
        for shape in ctx.shapes:
            mine = grad
            if ctx.axis == 2 and shape[1] != grad.shape[1]:
                mine = grad[:, : shape[1]]
            grads.append(mine if mine.shape == shape else grad.new_zeros(shape))
        return *grads, None


def _taken_attention(query, key, value, **_):
    return _Taken.apply(query, key, value, 2)


def _taken_sdpa(query, key, value, *_, **__):
    return _Taken.apply(query, key, value, query.dim() - 2)


def _taken_windows(query, key, value, *_, **__):
    return _Taken.apply(query, key, value, 1)


@contextlib.contextmanager
def taken_out() -> Iterator[None]:
    """Where patched models call attention, they are given back the value."""
    from xformer_fast import integrations, ops  # noqa: F401
    from xformer_fast.integrations import banded, follow_attention, follow_windows, torch_mha

    places = [
        (follow_attention, "attention", _taken_attention),
        (follow_attention, "scaled_dot_product_attention", _taken_sdpa),
        (follow_windows, "window_attention", _taken_windows),
        (torch_mha, "attention", _taken_attention),
        (banded, "attention", _taken_attention),
        (ops.attention, "scaled_dot_product_attention", _taken_sdpa),
    ]
    if "transformers" in sys.modules:
        from xformer_fast.integrations import transformers

        places.append((transformers, "attention", _taken_attention))
    with contextlib.ExitStack() as stack:
        for module, name, stand_in in places:
            stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


@contextlib.contextmanager
def without_attention(model: nn.Module, backend: str | None) -> Iterator[None]:
    with xformer_fast.patched(model, backend=backend), taken_out():
        yield


# Measuring


def first_tensor(outputs: Any) -> Tensor:
    while not isinstance(outputs, Tensor):
        outputs = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]
    return outputs


@dataclass
class Result:
    output: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


def relative(x: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    return float((x.float() - truth.float()).abs().max() / truth.float().abs().max().clamp(min=max(floor, 1e-30)))


def errors(result: Result, truth: Result) -> tuple[float, float]:
    """Of the output, and the largest of a gradient; a gradient that is all but zero is judged by the others' size."""
    floor = 1e-3 * max((float(g.float().abs().max()) for g in truth.gradients.values()), default=0.0)
    gradients = [relative(result.gradients[name], g, floor) for name, g in truth.gradients.items()]
    return relative(result.output, truth.output), max(gradients, default=0.0)


class Bench:
    """One model on one input: every way to run it, checked and timed."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], hosts: tuple[str, ...], *, device: str, seconds: float,
                 backend: str | None = None, memory: bool = True, longest: float = float("inf")):  # fmt: skip
        self.model, self.inputs, self.device = model.to(device).eval(), inputs, device
        self.seconds, self.backend, self.memory, self.longest = seconds, backend, memory, longest
        ways = {name: lambda name=name: hosted(model, name) for name in hosts}
        self.ways = ways | {
            OURS: lambda: xformer_fast.patched(model, backend=backend),
            FLOOR: lambda: without_attention(model, backend),
        }
        self.hosts = hosts
        self.truth: dict[str, Result] = {}
        self.slow: dict[str, str] = {}  # dtype -> why it is left out

    def in_dtype(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.inputs = {
            name: x.to(self.device, dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
            for name, x in self.inputs.items()
        }

    def call(self, mode: str) -> Run:
        def forward():
            return first_tensor(self.model(**self.inputs))

        def step():
            self.model.zero_grad(set_to_none=True)
            out = forward()
            out.backward(self.gradient.to(out.dtype))
            return out

        return forward if mode == "fwd" else step

    def result(self, way: str, mode: str) -> Result:
        with self.ways[way](), torch.set_grad_enabled(mode != "fwd"):
            out = first_tensor(self.model(**self.inputs))
            if mode == "fwd":
                return Result(out)
            self.model.zero_grad(set_to_none=True)
            generator = torch.Generator().manual_seed(2)
            self.gradient = torch.randn(out.shape, generator=generator).to(out.device)
            out.backward(self.gradient.to(out.dtype))
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return Result(out.detach(), gradients)

    def rows(self, dtype: str, mode: str) -> list[dict[str, Any]]:
        """The rows of one dtype and mode."""
        if mode not in self.truth:
            self.in_dtype(torch.float32)
            self.truth[mode] = self.result(self.hosts[0], mode)
        truth = self.truth[mode]
        self.in_dtype(DTYPES[dtype])
        host = truth
        if dtype != "float32" and dtype not in self.slow:
            start = time.perf_counter()
            host = self.result(self.hosts[0], mode)
            if (took := time.perf_counter() - start) > self.longest:
                self.slow[dtype] = f"one call takes the host {took:.0f} s, more than --longest {self.longest:g}"
        if dtype in self.slow:
            return [{"dtype": dtype, "mode": mode, "peer": OURS, "status": "skipped", "reason": self.slow[dtype]}]
        theirs = errors(host, truth)
        rows = {}
        for way in self.ways:
            row = rows[way] = {"dtype": dtype, "mode": mode, "peer": way, "status": "ok"}
            if way == OURS:
                with self.ways[way]() as report:
                    row["attention_modules"] = report.count
            if way == FLOOR:
                try:
                    self.result(way, mode)
                except RuntimeError as error:  # the value is no stand-in for every attention: no ceiling is told
                    row |= {"status": "error", "reason": str(error).splitlines()[0]}
            else:
                output, gradient = errors(host if way == self.hosts[0] else self.result(way, mode), truth)
                row |= {"output_error": output, "gradient_error": gradient if mode != "fwd" else None}
                limits = (OUTPUT_LIMIT, GRADIENT_LIMIT)
                if dtype != "float32":
                    limits = tuple(2 * error + 1e-2 for error in theirs)
                if not (output <= limits[0] and gradient <= limits[1]):
                    row |= {"status": "wrong", "reason": f"allowed: {limits[0]:.1e} and {limits[1]:.1e}"}
        host = None
        self._time({name: row for name, row in rows.items() if row["status"] == "ok"}, mode)
        return list(rows.values())

    def _time(self, rows: dict[str, dict], mode: str) -> None:
        call, grad = self.call(mode), mode != "fwd"
        if self.memory:
            for name in rows:
                if name != FLOOR:
                    with self.ways[name](), torch.set_grad_enabled(grad):
                        self.model.zero_grad(set_to_none=True)
                        rows[name]["peak_memory_mib"] = measure.peak_memory_mib(call, self.device)
        ways = {name: self.ways[name] for name in rows}
        timings = measure.interleaved(
            dict.fromkeys(rows, call), ways, device=self.device, seconds=self.seconds, grad=grad
        )
        self.model.zero_grad(set_to_none=True)
        for name, timing in timings.items():
            rows[name] |= {"ms": timing.median_ms, "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms}
            rows[name]["rounds"] = timing.rounds
        best = min((name for name in self.hosts if name in rows), key=lambda name: rows[name]["ms"], default=None)
        if best is None:
            return
        host, floor = rows[best]["ms"], rows[FLOOR]["ms"] if FLOOR in rows else None
        for row in rows.values():
            row |= {"host": best, "vs_host": host / row["ms"]}
            if floor is not None:
                row |= {"ceiling": host / floor, "of_ceiling": floor / row["ms"]}


def bench(cases, *, dtypes=None, modes=MODES, device="cpu", seconds=5.0, deadline=float("inf"),
          backend=None, memory=True, longest=float("inf"), on_rows=None, show=True) -> list[dict]:  # fmt: skip
    """Every case in its dtypes, or in those given, and every mode; `on_rows` receives the rows of each of these as soon
    as they are there."""
    facts = measure.machine_facts(device)
    rows, left_out = [], []
    for case in tqdm(cases, unit="model", disable=not show, mininterval=0.1 if sys.stderr.isatty() else 10):
        about = facts | {"library": case.library, "case": case.name, "input": case.input, "layers": case.layers}
        wanted = [(dtype, mode) for dtype in dtypes or case.dtypes for mode in case.modes if mode in modes]
        if time.monotonic() > deadline:
            left_out.append(case.name)
            continue
        try:
            torch.manual_seed(0)
            model, inputs = case.build()
        except ModuleNotFoundError as error:
            found = [about | {"peer": OURS, "status": "skipped", "reason": str(error)}]
            rows += found
            if on_rows:
                on_rows(found)
            continue
        options = {"device": device, "seconds": seconds, "backend": backend, "memory": memory, "longest": longest}
        trial = Bench(model, inputs, case.hosts, **options)
        for dtype, mode in wanted:
            if time.monotonic() > deadline:
                left_out.append(f"{case.name} {dtype} {mode}")
                continue
            found = [about | row for row in trial.rows(dtype, mode)]
            rows += found
            if on_rows:
                on_rows(found)
            if show:
                tqdm.write(line(found), file=sys.stdout)
        del trial, model, inputs
        gc.collect()
    if left_out:
        print(f"left out, the time is up: {', '.join(left_out)}")
    return rows


HEAD = (
    f"{'model':<20}{'dtype':<10}{'mode':<6}{'before':>12}{'after':>12}{'faster':>8}{'ceiling':>9}{'reached':>9}"
    f"{'memory before, after':>24}{'errors':>18}"
)


def line(rows: list[dict[str, Any]]) -> str:
    """One dtype and mode of a model: the host's fastest setting and ours."""
    by_peer = {row["peer"]: row for row in rows}
    ours = by_peer[OURS]
    text = f"{ours['case']:<20}{ours.get('dtype', ''):<10}{ours.get('mode', ''):<6}"
    if ours["status"] != "ok" or "host" not in ours:
        wrong = next((row for row in rows if row["status"] != "ok"), ours)
        return f"{text}{wrong['peer']}: {wrong['status']}: {wrong.get('reason', '')}"
    host = by_peer[ours["host"]]
    memory = [row.get("peak_memory_mib") for row in (host, ours)]
    memory = " ".join("-" if m is None else f"{m:.0f} MiB" for m in memory)
    error = " ".join(f"{ours[k]:.0e}" for k in ("output_error", "gradient_error") if ours.get(k) is not None)
    ceiling = f"{ours['ceiling']:>8.2f}x{ours['of_ceiling']:>9.0%}" if "ceiling" in ours else f"{'-':>9}{'-':>9}"
    return f"{text}{host['ms']:>9.1f} ms{ours['ms']:>9.1f} ms{ours['vs_host']:>7.2f}x{ceiling}{memory:>24}{error:>18}"


class ModelsCsv:
    """Writes rows as they come."""

    def __init__(self, path: pathlib.Path, *, append: bool = False):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not (append and path.exists() and path.stat().st_size)
        self.file = path.open("w" if fresh else "a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="")
        if fresh:
            self.writer.writeheader()

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            given = {name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items() if x is not None}
            self.writer.writerow(given)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["peer"] == OURS and row["status"] not in ("ok", "skipped")]


def select(names: str | None = None, quick: bool = False) -> list[Case]:
    cases = [case for case in CASES if ("quick" if quick else "full") in case.parts] if names is None else []
    for name in names.split(",") if names else ():
        found = [case for case in CASES if case.name == name]
        if not found:
            raise ValueError(f"no model {name}; there are {', '.join(case.name for case in CASES)}")
        cases += found
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three small models, no memory")
    parser.add_argument("--case", default=None, metavar="NAME,...")
    parser.add_argument("--dtype", type=listed(DTYPES), default=None, metavar="T,...", help="default: as a case says")
    parser.add_argument("--mode", type=listed(MODES), default=MODES, metavar="fwd,both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", default=None, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=None, help="timing per dtype and mode (default 5; --quick 1)")
    parser.add_argument("--longest", type=float, default=10.0, help="seconds of a half-precision call (default 10)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--out", type=pathlib.Path, default=None, metavar="CSV|FOLDER")
    parser.add_argument("--append", action="store_true", help="add to the CSV instead of replacing it")
    args = parser.parse_args()
    quiet()
    try:
        cases = select(args.case, args.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    out = csv_path(args.out, "models", args.device) if args.out else None
    seconds = args.seconds if args.seconds is not None else (1.0 if args.quick else 5.0)
    print(HEAD)
    with contextlib.closing(ModelsCsv(out, append=args.append)) if out else contextlib.nullcontext() as sink:
        rows = bench(
            cases, dtypes=args.dtype, modes=args.mode, device=args.device, seconds=seconds, backend=args.backend,
            deadline=time.monotonic() + args.budget, memory=not args.quick, longest=args.longest, on_rows=sink,
        )  # fmt: skip
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
