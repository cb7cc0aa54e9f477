"""The benchmark cases under pytest-benchmark, and tests of the benchmark itself.

pytest benchmarks                          # tiny versions: does every case run, and is it right?
pytest benchmarks --benchmark-cases=quick  # the quick cases at full size, timed
pytest benchmarks --benchmark-cases=all
"""

from __future__ import annotations

import csv
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from xformer_fast import reference, testing

from . import generation, measure, plot
from .attention import AttentionCase
from .cases import OPS, select, sweep_cases
from .check import Truth, worst
from .naive import keep_mask
from .neighborhood_attention import NeighborhoodCase
from .op import DTYPES
from .peers import SDPA, Naive, Peer, Prepared, SDPAChunks, XformerFast
from .run import ABOVE, COLUMNS, Cell, CsvSink, Settings, bench, failures, format_rows, peers_of


def tiny(case: AttentionCase) -> AttentionCase:
    """The same options at a size that takes no time."""
    seqlen_q, seqlen_k = min(case.seqlen_q, 40), min(case.seqlen_k, 40 if case.seqlen_q > 1 else 64)
    window = (15, 0) if case.window else None
    heads = case.heads // case.heads_kv * min(case.heads_kv, 2)
    return dataclasses.replace(
        case, batch=min(case.batch, 3), heads=heads, heads_kv=min(case.heads_kv, 2), window=window,
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=min(case.head_dim, 16),
    )  # fmt: skip


def chosen_cases(config) -> list[AttentionCase]:
    size = config.getoption("--benchmark-cases")
    if size == "tiny":
        unique = {dataclasses.replace(tiny(case), name="", quick=False): case for case in select("attention")}
        return [tiny(case) for case in unique.values()]
    return select("attention", quick=size == "quick")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", chosen_cases(metafunc.config), ids=lambda case: case.name)


@pytest.mark.parametrize("mode", ["fwd", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", [XformerFast("attention"), Naive(), SDPA()], ids=lambda peer: peer.name)
def test_attention(benchmark, case, peer, dtype, mode):
    if mode not in case.modes:
        pytest.skip("inference only")
    rows = bench(
        "attention",
        [case],
        dtypes=[dtype],
        modes=[mode],
        peers=[peer],
        settings=Settings(seconds=0, memory=False),
        show=False,
    )
    assert rows[0]["status"] == "ok", rows[0]["reason"]
    grad = mode == "both"
    inputs = OPS["attention"].inputs(case, DTYPES[dtype])
    wrt = [x.requires_grad_() for name, x in inputs.items() if grad and name in OPS["attention"].differentiable]
    prepared = peer.prepare(case, inputs)

    def step():
        with torch.set_grad_enabled(grad):
            out = prepared.call()
            if grad:
                torch.autograd.grad(out, wrt, torch.ones_like(out))

    benchmark.group = f"{case.name} {dtype} {mode}"
    benchmark(step)


class Broken(Peer):
    """A kernel that is almost right."""

    name = "xformer_fast"

    def prepare(self, case, inputs):
        return Prepared(lambda: reference.attention(**inputs) * (1 + 1e-4))


SMALL = AttentionCase("small", 2, 4, 33, 16, heads_kv=2, causal=True)


def test_a_wrong_result_gets_no_speed():
    rows = bench(
        "attention", [SMALL], dtypes=["float32"], peers=[Broken(), Naive()], settings=Settings(seconds=0), show=False
    )
    assert [row["status"] for row in rows] == ["wrong", "ok"] * 2
    assert all("ms" not in row for row in rows if row["status"] == "wrong")
    assert failures(rows) == [row for row in rows if row["peer"] == "xformer_fast"]


def test_every_peer_is_right_or_says_why():
    peers = [
        peer for peer in peers_of("attention", "cpu") if peer.name not in ("flex", "naive-compiled")
    ]  # these compile
    rows = bench(
        "attention", [SMALL], dtypes=["float32"], modes=["fwd"], peers=peers, settings=Settings(seconds=0), show=False
    )
    assert len(rows) == len(peers)
    for row in rows:
        assert row["status"] in ("ok", "skipped"), row
        assert row["status"] == "ok" or row["reason"]


def test_kept_pairs_counts_the_mask():
    for case in (SMALL, *map(tiny, select("attention")), *map(tiny, select("attention", device="cuda"))):
        inputs = OPS["attention"].inputs(case, torch.float32)
        options = {name: inputs[name] for name in ("causal", "window", "global_keys", "key_lengths") if name in inputs}
        keep = keep_mask(inputs["query"], inputs["key"], **options)
        dense = torch.ones(case.batch, 1, case.seqlen_q, case.seqlen_k, dtype=torch.bool)
        assert case.kept_pairs() == int((dense if keep is None else dense & keep).sum())


def test_checking_the_last_rows_or_by_parts_is_the_same_truth(monkeypatch):
    case = AttentionCase("biased", 2, 4, 24, 8, seqlen_k=40, causal=True, bias=True)
    op, inputs = OPS["attention"], OPS["attention"].inputs(case, torch.float64)
    whole = Truth("attention", op, case, inputs, with_grads=True)
    monkeypatch.setattr("benchmarks.check.SPLIT", 1)
    parts = Truth("attention", op, case, inputs, with_grads=True)
    for name, expected in whole.expected.items():
        torch.testing.assert_close(parts.expected[name], expected)
    monkeypatch.setattr("benchmarks.check.FULL_CHECK", op.score_elements(case) // 3)
    tail = Truth("attention", op, case, inputs, with_grads=True)
    assert tail.scope == "last 8 rows"
    wrt = [x.requires_grad_() for name, x in inputs.items() if name in op.differentiable]
    out = reference.attention(**inputs)
    grads = torch.autograd.grad(out, wrt, tail.output_gradient(out))
    results = {"out": out.detach(), **dict(zip(tail.wrt, grads, strict=True))}
    assert worst(tail.errors(results)).ok
    results["key"] = results["key"] + 1e-3
    assert worst(tail.errors(results)).tensor == "key"


def test_chunked_sdpa_is_the_window():
    case = AttentionCase("window", 2, 3, 64, 8, causal=True, window=(15, 0))
    rows = bench(
        "attention", [case], dtypes=["float32"], peers=[SDPAChunks()], settings=Settings(seconds=0), show=False
    )
    assert [row["status"] for row in rows] == ["ok", "ok"]


@pytest.mark.parametrize(
    "neighborhoods",
    [
        NeighborhoodCase("tiny", (9, 10), (3, 4), batch=2, heads=2, head_dim=8, dilation=2, bias=True),
        NeighborhoodCase("tiny", (30,), (7,), head_dim=8, dilation=3, causal=True),
        NeighborhoodCase("tiny", (4, 6, 5), (3, 3, 2), heads=1, head_dim=8, bias=True, causal=True),
    ],
    ids=lambda case: case.shape,
)
def test_neighborhoods(neighborhoods):
    """The truth over gathered neighbours is the reference's, pairs are counted as it sees them, peers are right."""
    op, case = OPS["neighborhood_attention"], neighborhoods
    options = ((option,) * len(case.space) for option in (case.dilation, case.causal))
    inputs = op.inputs(case, torch.float64)
    torch.testing.assert_close(op.call(reference, inputs), reference.neighborhood_attention(**inputs))
    seen, _ = reference.neighborhoods(case.space, case.kernel, *options, "cpu")
    assert case.kept_pairs() == case.batch * int(seen.sum())
    peers = [peer for peer in peers_of("neighborhood_attention", "cpu") if peer.name != "flex"]  # compiles
    rows = bench(
        "neighborhood_attention", [case], dtypes=["float32"], peers=peers, settings=Settings(seconds=0), show=False
    )
    assert [row["status"] for row in rows] == ["ok"] * 2 * len(peers), rows


def test_plots_are_drawn_from_the_csv_alone(tmp_path):
    path = tmp_path / "results.csv"
    sink = CsvSink(path)
    peers = [XformerFast("attention"), Naive(), SDPA()]
    for cases in ([SMALL], sweep_cases((16, 32))):
        bench("attention", cases, peers=peers, settings=Settings(seconds=0), on_rows=sink, show=False)
    maps = [NeighborhoodCase(f"map_{n}", (n, n), (3, 3), heads=1, head_dim=4) for n in (4, 8)]
    peers = peers_of("neighborhood_attention", "cpu")[:3]
    bench("neighborhood_attention", maps, peers=peers, settings=Settings(seconds=0), on_rows=sink, show=False)
    sink.close()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert all(row["device"] and row["commit"] and row["torch"] and row["date"] for row in rows)
    drawn = {p.name for p in plot.draw([path], tmp_path)}
    assert {"speedup.png", "memory.png", "time.png", "map.png"} <= drawn


def test_a_gpu_is_busy_while_the_host_launches(monkeypatch):
    """Else the time of a short call would be that of its launch."""
    steps = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            steps.append("record")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 3.0

    class Flush:
        def zero_(self):
            steps.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: steps.append("busy"))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: Flush())
    assert measure._CudaClock().measure(lambda: steps.append("call"), 2) == pytest.approx(1.5e-3)
    assert steps == ["busy", "flush", "record", "call", "call", "record"]


def test_unknown_case_names_those_there_are():
    with pytest.raises(ValueError, match="full_2048_d64"):
        select("attention", names="no_such_case")


def test_a_ceiling_is_the_highest_reading_so_far(monkeypatch):
    flops, gbps = iter([(50.0, "loop"), (90.0, "loop"), (70.0, "loop")]), iter([4.0, 3.0, 5.0])
    monkeypatch.setattr(measure, "_highest_flops", {})
    monkeypatch.setattr(measure, "_highest_gbps", {})
    monkeypatch.setattr(measure, "_cpu_flops", lambda *_: next(flops))
    monkeypatch.setattr(measure, "_bandwidth", lambda *_: next(gbps))
    seen = [measure.ceiling("cpu", dtype) for dtype in (torch.float32, torch.float16, torch.float32)]
    assert [(c.gflops, c.gbps) for c in seen] == [(50.0, 4.0), (90.0, 4.0), (90.0, 5.0)]


@pytest.mark.parametrize("rise", [1, 1e12])
def test_a_fraction_above_1_is_measured_again_and_said(rise, monkeypatch):
    readings = []

    def ceiling(device, dtype, count):
        readings.append(count)
        return measure.Ceiling(1e-6 * rise ** (len(readings) - 1), "loop", 1e-6 * rise ** (len(readings) - 1))

    monkeypatch.setattr(measure, "ceiling", ceiling)
    settings = Settings(seconds=0.01, memory=False)
    rows = bench(
        "attention", [SMALL], dtypes=["float32"], modes=["fwd"], peers=[Naive()], settings=settings, show=False
    )
    assert len(readings) == (3 if rise == 1 else 2) and readings[1] > readings[0]
    (row,) = rows
    assert row["status"] == "ok" and (row["fraction_of_ceiling"] > 1) == (rise == 1)
    assert (row.get("reason") == ABOVE) == (rise == 1) and (ABOVE in format_rows(rows)) == (rise == 1)


def test_all_peers_start_backward_from_one_gradient(monkeypatch):
    """The first call of a peer is judged, the second is what would be timed."""
    used, grad = [], torch.autograd.grad

    def spy(outputs, inputs, grad_outputs=None, **options):
        used.append(grad_outputs)
        return grad(outputs, inputs, grad_outputs, **options)

    inputs = OPS["attention"].inputs(SMALL, torch.float32)
    truth = Truth("attention", OPS["attention"], SMALL, inputs, with_grads=True)
    cell = Cell("attention", SMALL, "float32", "both", truth, Settings(seconds=0, memory=False))
    monkeypatch.setattr(torch.autograd, "grad", spy)
    for peer in (Naive(), SDPA()):
        cell._check(peer, {}).call()
    assert len(used) == 4 and torch.equal(used[1], used[3]) and not torch.equal(used[0], used[1])


def test_the_rule_is_that_of_the_tests():
    op, inputs = OPS["attention"], OPS["attention"].inputs(SMALL, torch.float32)
    truth = Truth("attention", op, SMALL, inputs, with_grads=False)
    out = reference.attention(**inputs)
    (error,) = truth.errors({"out": out})
    expected = testing.measure(out, truth.expected["out"], truth.naive["out"], dtype=torch.float32)
    assert (error.max_abs, error.limit, error.rel_rms) == (expected.largest, expected.allowed, expected.relative_rms)
    assert not worst(truth.errors({"out": out * float("nan")})).ok


@pytest.mark.parametrize("same", [True, False])
def test_generation_of_other_tokens_gets_no_speed(same, monkeypatch):
    given = iter(torch.arange(100))

    def timed(model, inputs, cache):
        return [1.0, 2.0, 3.0], torch.zeros(2) if same else next(given)[None]

    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=1))
    monkeypatch.setattr(generation, "build", lambda *_: model)
    monkeypatch.setattr(generation, "timed", timed)
    monkeypatch.setattr(generation, "xformer_fast", SimpleNamespace(patch=lambda model: 1, unpatch=lambda model: None))
    host, ours = generation.rows_of("llama", "float32", "dynamic", 2, 8)
    assert host["tokens_per_s"] > 0 and host["same_tokens"] == ours["same_tokens"] == same
    assert [ours[name] == "" for name in generation.SPEEDS] == [not same] * 5
    assert ("no speed" in generation.line(ours)) == (not same) and "tokens/s" in generation.line(host)
