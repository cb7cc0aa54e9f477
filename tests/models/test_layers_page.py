"""The code on docs/layers.md runs, from top to bottom, and shows every family there is."""

import re
from pathlib import Path

import torch

from xformer_fast import models
from xformer_fast.generation import generate

PAGE = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()


def test_code_runs():
    torch.manual_seed(0)
    shared = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "layers.md", "exec"), shared)
    assert shared["likely"].shape == (2, 5) or (shared["likely"] == 2).any()
    assert shared["out"].shape == shared["image"].shape
    model, tokens = shared["TakingTurns"](100).eval(), torch.randint(100, (2, 150))
    out = generate(model, tokens, max_new_tokens=3)
    assert torch.equal(out[:, -1], model(torch.cat((tokens, out[:, :-1]), 1))[:, -1].argmax(-1))
    captioner, captions = shared["captioner"], shared["captions"]
    written = torch.cat((shared["start"], captions[:, :-1]), 1)
    assert torch.equal(captions, captioner.decode(written, captioner.encode(shared["images"])).argmax(-1))


def test_every_family_has_a_row():
    for name in models.__all__:
        assert f"| `{name}` |" in PAGE and re.search(rf"^model = {name}\(", PAGE, re.MULTILINE), name
