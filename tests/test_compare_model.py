"""`xformer-fast compare MODEL`, and the benchmark of whole models that it is made of, on tiny models."""

import csv
import textwrap

import pytest
import torch
from model_list import MODELS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import compare_model, models, plot  # noqa: E402
from xformer_fast import cli  # noqa: E402
from xformer_fast.integrations import transformers as integration  # noqa: E402

TINY = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=32,vocab_size=50"
FACTORY = """
    import torch

    def encoder():
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return layer, {"src": torch.randn(2, 5, 16)}

    def linear():
        return torch.nn.Linear(3, 3), {"input": torch.randn(2, 3)}

    def number():
        return 3
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "compared_factories.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.syspath_prepend(tmp_path)
    return "compared_factories"


def compare(tmp_path, model, *options):
    """Exit status and the rows of the CSV."""
    out = tmp_path / "compare.csv"
    status = cli.main(["compare", model, "--seconds", "0", "--out", str(out), *options])
    if not out.exists():
        return status, []
    with out.open(newline="") as file:
        return status, list(csv.DictReader(file))


def test_a_model_by_name(tmp_path, capsys):
    status, rows = compare(tmp_path, "bert", "--config", TINY, "--length", "9", "--dtype", "float32")
    assert status == 0
    cells = {(row["mode"], row["peer"]): row for row in rows}
    assert cells.keys() == {
        (mode, peer) for mode in ("fwd", "both") for peer in ("sdpa", "eager", "xformer_fast", models.FLOOR)
    }
    for (mode, peer), row in cells.items():
        assert row["status"] == "ok" and float(row["ms"]) > 0 and (row["case"], row["input"]) == ("bert", "1x9")
        if peer == "xformer_fast":
            assert row["attention_modules"] == "1" and float(row["output_error"]) <= 1e-4 and row["peak_memory_mib"]
            assert mode == "fwd" or float(row["gradient_error"]) <= 2e-3
    assert "encoder.layer.0.attention.self  replaced" in capsys.readouterr().out
    assert compare(tmp_path, "bert", "--config", TINY, "--dtype", "float32", "--mode", "fwd")[1][:8] == rows  # added
    drawn = plot.draw([tmp_path / "compare.csv"], tmp_path)
    assert [path.name for path in drawn] == ["models.png"]


def test_half_is_judged_by_the_float32_model(tmp_path):
    status, rows = compare(
        tmp_path, "gpt2", "--config", "n_layer=1,n_embd=32,n_head=2,vocab_size=50", "--dtype", "bfloat16"
    )
    errors = {row["peer"]: float(row["output_error"]) for row in rows if row["mode"] == "fwd" and row["output_error"]}
    assert status == 0 and errors["sdpa"] > 1e-4 and 0 < errors["xformer_fast"] <= 2 * errors["sdpa"] + 1e-2


def test_a_folder(tmp_path, monkeypatch):
    """Class and weights are those that were saved; an image's size is the config's; without weights they are random."""
    saved = MODELS["vit"].build()
    saved.save_pretrained(tmp_path / "saved")
    loaded, _, library = compare_model.load(str(tmp_path / "saved"), {})
    assert type(loaded) is type(saved) and library == "transformers"
    for ours, theirs in zip(loaded.state_dict().values(), saved.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    (tmp_path / "saved" / "model.safetensors").unlink()
    status, rows = compare(tmp_path, str(tmp_path / "saved"), "--dtype", "float32", "--mode", "fwd", "--batch", "2")
    assert status == 0 and rows[0]["input"] == "2x3x20x20"


def test_a_function(tmp_path, factories):
    status, rows = compare(tmp_path, f"{factories}:encoder", "--dtype", "float32")
    assert status == 0 and {row["peer"] for row in rows} == {"own", "xformer_fast", models.FLOOR}
    assert all(row["library"] == "own" and row["input"] == "2x5x16" for row in rows)


def test_encoder_and_decoder(tmp_path):
    config = "d_model=32,d_kv=16,num_heads=2,num_layers=1,d_ff=32,vocab_size=50"
    status, rows = compare(tmp_path, "t5", "--config", config, "--length", "7", "--dtype", "float32", "--mode", "fwd")
    assert status == 0 and rows[0]["input"] == "1x7 1x7"


@pytest.mark.parametrize(
    "model, told",
    [
        ("no_such_model", "model type of transformers"),
        ("no_such_module:f", "No module named"),
        ("{factories}:missing", "missing"),
        ("{factories}:number", "torch.nn.Module"),
        ("wav2vec2", "neither tokens nor images"),
    ],
)
def test_what_is_no_model_is_told(model, told, tmp_path, factories, capsys):
    config = ["--config", TINY] if model == "wav2vec2" else []
    assert compare(tmp_path, model.format(factories=factories), *config) == (2, [])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "model, options, told",
    [
        ("bert", ["--config", "a b"], "must be NAME=VALUE,..., got 'a b'"),
        ("bert", ["--config", "a=b()"], "must be NAME=VALUE,..., got 'a=b()'"),
        ("bert", ["--config", "hidden_size=banana"], "bert cannot be made with hidden_size=banana"),
        ("bert", ["--config", TINY, "--length", "600"], "BertModel fails on inputs of 1x600"),
        ("bert", ["--length", "-3"], "must be at least 1, got -3"),
        ("bert", ["--batch", "0"], "must be at least 1, got 0"),
        ("bert", ["--seconds", "nan"], "got nan"),
        ("bert", ["--backend", "foo"], "no backend 'foo' of attention; there are"),
        ("bert", ["--out", "/dev/null/compare.csv"], "/dev/null"),
        ("math:pi", [], "math:pi must name a function without arguments"),
        ("math:sqrt", [], "math:sqrt must name a function without arguments"),
        (".math:f", [], ".math:f must name a function"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(model, options, told, tmp_path, capsys):
    try:
        status, rows = compare(tmp_path, model, *options)
    except SystemExit as left:  # argparse's way
        status, rows = left.code, []
    errors = capsys.readouterr().err
    assert (status, rows) == (2, []) and told in errors.splitlines()[-1] and "Traceback" not in errors


def test_a_model_without_attention(tmp_path, factories, capsys):
    assert compare(tmp_path, f"{factories}:linear") == (1, [])
    assert "holds no attention" in capsys.readouterr().out


def test_a_wrong_result_gets_no_speed(tmp_path, monkeypatch):
    right = integration.attention
    monkeypatch.setattr(integration, "attention", lambda *args, **options: right(*args, **options) * 2)
    status, rows = compare(tmp_path, "bert", "--config", TINY, "--dtype", "float32", "--mode", "fwd")
    (ours,) = (row for row in rows if row["peer"] == "xformer_fast")
    assert status == 1 and ours["status"] == "wrong" and not ours["ms"] and "allowed" in ours["reason"]


def test_overrides():
    assert compare_model.overrides("a=1,b=[2,3],c=gelu,d='x y'") == {"a": 1, "b": [2, 3], "c": "gelu", "d": "x y"}
    for wrong in ("1", "a=1,**b", "a=f(1)", "a="):
        with pytest.raises((ValueError, SyntaxError, compare_model.argparse.ArgumentTypeError)):
            compare_model.overrides(wrong)


class Calls(TorchDispatchMode):
    """Counts the operators of ours."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace.startswith("xformer_fast")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bloom", "swin", "swinv2", "longformer", "sam_vision", "detr"])
def test_the_ceiling_is_all_but_attention(name):
    """Without attention no operator of ours runs, the output keeps its shape, and the same parameters get gradients."""
    listed = MODELS[name]
    model, run = listed.build(), next(iter(listed.cases().values()))

    def gradients(way):
        with way, Calls() as calls:
            model.zero_grad()
            out = run(model)
            out.sum().backward()
        return out.shape, calls.count, {n for n, p in model.named_parameters() if p.grad is not None}

    shape, count, got = gradients(models.xformer_fast.patched(model))
    assert count > 0
    floor_shape, floor_count, floor_got = gradients(models.without_attention(model, None))
    assert (floor_shape, floor_count) == (shape, 0)
    assert floor_got <= got and {n for n in got - floor_got if not _of_a_bias(n)} == set()


def _of_a_bias(name):
    """Tables of relative positions are read by attention alone."""
    return any(
        part in name for part in ("relative", "rel_pos", "logit_scale", "cpb", "continuous_position_bias", "_global")
    )


def test_every_case_names_a_part_and_modes():
    assert {case.name for case in models.select(quick=True)} == {"bert_512_1layer", "gpt2_1024_1layer", "swin_t_224"}
    assert {"bert_512", "gpt2_1024", "vit_1024px", "bert_4096", "bloom_2048"} <= {c.name for c in models.select()}
    assert isinstance(models.select("bert_512")[0], models.Case)
    with pytest.raises(ValueError, match="bert_512"):
        models.select("no_such_case")


def test_half_precision_that_takes_too_long_is_left_out():
    build = lambda: (nn.Linear(4, 4), {"input": torch.randn(2, 4)})  # noqa: E731
    case = models.Case("linear", build, "2x4", "1", ("own",), dtypes=("float32", "bfloat16"))
    rows = models.bench([case], seconds=0, longest=0.0, memory=False, show=False)
    half = [row for row in rows if row["dtype"] == "bfloat16"]
    assert {(row["mode"], row["status"]) for row in rows if row not in half} == {("fwd", "ok"), ("both", "ok")}
    assert [row["mode"] for row in half] == list(models.MODES) and not models.failures(half)
    assert all(row["status"] == "skipped" and "--longest 0" in row["reason"] for row in half)
    assert all(models.line([row]) for row in half)
    assert {row["status"] for row in models.bench([case], seconds=0, memory=False, show=False)} == {"ok"}


def test_the_host_gets_its_setting_back():
    model = MODELS["bert"].build()
    before = model.config._attn_implementation
    with models.hosted(model, "eager"):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == before
    assert compare_model.settings(model) == ("sdpa", "eager") and compare_model.settings(nn.Linear(2, 2)) == ("own",)
