"""`Checkpoint`: a training run in one file, from which it goes on as if nothing had happened, bit for bit on a CPU."""

import os
import time
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """Saves a training run so that one killed at any moment, and resumed, ends with the same weights.

    Kept are the `state_dict` of every part (the state of a `torch.Generator`), torch's own random streams, from which
    dropout draws its seed, that of `attention` too, and what `save` is handed besides. A file is written beside the old
    one, flushed to the disk, and put in its place in one step: there is always a whole one. Random numbers that come
    from anywhere else (Python's, NumPy's) are not kept: draw batches from a generator that is a part.

    Args:
        path: the file; its folder is made where missing.
        every: seconds at least between two files of `save`; 0: each call writes one.
        parts: model, optimizer, schedule, ...: what has a `state_dict` and a `load_state_dict`, and generators.

    >>> import tempfile, torch
    >>> from xformer_fast.training import Checkpoint
    >>> model, data = torch.nn.Linear(2, 1), torch.Generator().manual_seed(0)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> folder = tempfile.TemporaryDirectory()
    >>> checkpoint = Checkpoint(f"{folder.name}/run.pt", model=model, optimizer=optimizer, data=data)
    >>> saved = checkpoint.load()  # {} at first, later what was saved last
    >>> losses = saved.get("losses", [])
    >>> for step in range(saved.get("step", 0), 3):
    ...     loss = model(torch.randn(8, 2, generator=data)).square().mean()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    ...     losses.append(loss.item())
    ...     checkpoint.save(step=step + 1, losses=losses)
    >>> checkpoint.load()["step"]
    3
    """

    def __init__(self, path: str | os.PathLike, *, every: float = 0.0, **parts: Any):
        for name, part in parts.items():
            if not isinstance(part, torch.Generator) and not hasattr(part, "load_state_dict"):
                raise TypeError(f"{name} must have a state_dict or be a torch.Generator, got {type(part).__name__}")
        self.path, self.every, self.parts = Path(path), every, parts
        self.written = time.monotonic()

    def load(self) -> dict[str, Any]:
        """Puts the parts and the random streams where they were at the last save; returns its values, {} if none."""
        if not self.path.exists():
            return {}
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        if saved["parts"].keys() != self.parts.keys():
            raise ValueError(f"{self.path} holds {', '.join(saved['parts'])}, this run has {', '.join(self.parts)}")
        for name, part in self.parts.items():
            put = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
            put(saved["parts"][name])
        torch.set_rng_state(saved["cpu"])
        if saved["cuda"]:
            torch.cuda.set_rng_state_all(saved["cuda"])
        return saved["values"]

    def save(self, **values: Any) -> None:
        """Writes the run as it stands, unless a file is younger than `every` seconds.

        values: numbers, strings, tensors, lists and dicts of these: what `load` is to return.
        """
        if time.monotonic() - self.written < self.every:
            return
        parts = {
            name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
            for name, part in self.parts.items()
        }
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as file:
            torch.save({"parts": parts, "cpu": torch.get_rng_state(), "cuda": cuda, "values": values}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, survives a power cut
        finally:
            os.close(folder)
        self.written = time.monotonic()
