"""A training run that is killed again and again, started by test_training.py: python killed_run.py FOLDER KILLS SEED.

Every life of the run is a fork of this process, which imports torch once and never starts a thread. A life is ended by
SIGKILL at a random moment, or kills itself at a chosen point of writing a checkpoint. Prints `lives steps-lost`.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from xformer_fast.models import GPT
from xformer_fast.training import Checkpoint

STEPS, BATCH, LENGTH, VOCAB = 24, 2, 12, 50


def train(path: Path, weights: Path, steps_seen: Path | None = None) -> None:
    """The whole run, or what is left of it after the checkpoint at `path`."""
    torch.manual_seed(0)
    model = GPT(VOCAB, dim=16, depth=2, num_heads=2, max_length=LENGTH, dropout=0.2, attention_dropout=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    data = torch.Generator().manual_seed(1)
    checkpoint = Checkpoint(path, model=model, optimizer=optimizer, schedule=schedule, data=data)
    saved = checkpoint.load()
    losses = saved.get("losses", [])
    for step in range(saved.get("step", 0), STEPS):
        tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=data)
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if steps_seen is not None:
            with steps_seen.open("a") as file:
                file.write(".")
        checkpoint.save(step=step + 1, losses=losses)
    torch.save({"model": model.state_dict(), "losses": losses}, weights)


def kill_in_save(point: str, count: int) -> None:
    """Makes this process kill itself at the count-th time that a save comes to `point`."""
    left = count

    def dies(before: bool, function):
        def wrapped(*args):
            nonlocal left
            left -= 1
            if not before:
                result = function(*args)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args) if before else result

        return wrapped

    if point == "half written":
        save = torch.save

        def torn(state, file):
            nonlocal left
            left -= 1
            save(state, file)
            if left == 0:
                file.flush()
                file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = torn
    elif point == "before replacing":
        os.replace = dies(True, os.replace)
    elif point == "after replacing":
        os.replace = dies(False, os.replace)


def life(path, weights, seen, point=None, count=0) -> int:
    pid = os.fork()
    if pid == 0:
        if point is not None:
            kill_in_save(point, count)
        train(path, weights, seen)
        os._exit(0)
    return pid


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    train(folder / "whole.pt", folder / "expected.pt")
    draw = random.Random(seed)
    points = ["half written", "before replacing", "after replacing", None, None]
    start = time.monotonic()
    pid = life(folder / "timed.pt", folder / "timed_weights.pt", None)
    os.waitpid(pid, 0)
    whole = time.monotonic() - start
    path, weights, seen = folder / "killed.pt", folder / "weights.pt", folder / "seen"
    lives = 0
    for turn in range(kills):
        point = points[turn % len(points)]
        pid = life(path, weights, seen, point, draw.randint(1, 4))
        if point is None:
            time.sleep(draw.uniform(0, whole / 4))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        lives += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if weights.exists():
            break
    if not weights.exists():
        os.waitpid(life(path, weights, seen), 0)
    print(lives, len(seen.read_text()) - STEPS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
