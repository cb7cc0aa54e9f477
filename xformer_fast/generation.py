"""`generate`: tokens one by one from any decoder here, through its KV cache: greedy, sampled, or by beam search.

A model takes part if it has `new_cache(batch, capacity)` and maps (tokens, lengths=, cache=) to logits: an
encoder-decoder by its `decode`, which is handed the memory with each call, a decoder by its call.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    lengths: Tensor | None = None,
    eos: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    **context,
) -> Tensor:
    """The tokens after a prompt, (B, at most max_new_tokens) int64; what stands behind a row's eos is eos.

    Args:
        model: in eval mode, see above.
        tokens: (B, S) prompts, S at least 1, padded behind where `lengths` (B,) says so. An encoder-decoder's is the
            token that every target begins with.
        eos: ends a sequence, and the call once all have it.
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / temperature), of the top_k
            likeliest (None or 0: of all), of the fewest that hold top_p, in (0, 1], of the probability: Holtzman et
            al., "The Curious Case of Neural Text Degeneration" (2020).
        beams: keep so many sequences and return the likeliest, its log probability divided by its new tokens to the
            power length_penalty, as transformers does with early_stopping=False.
        context: handed to the model at each call: memory, memory_lengths. Tensors have a row a prompt.

    >>> import torch
    >>> from xformer_fast.generation import generate
    >>> from xformer_fast.models import GPT, T5
    >>> generate(GPT(100, dim=64, depth=2, num_heads=4).eval(), torch.randint(100, (2, 9)), max_new_tokens=5).shape
    torch.Size([2, 5])
    >>> t5 = T5(100, dim=64, depth=2, num_heads=4, hidden=128).eval()
    >>> memory = t5.encode(torch.randint(100, (2, 9)))
    >>> generate(t5, torch.zeros(2, 1, dtype=torch.int64), max_new_tokens=5, beams=3, memory=memory).shape
    torch.Size([2, 5])
    """
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be (B, S) with S at least 1, got {tuple(tokens.shape)}")
    if max_new_tokens < 1 or beams < 1:
        raise ValueError(f"max_new_tokens and beams must be at least 1, got {max_new_tokens} and {beams}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be at least 1, or None or 0 for no limit, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if beams > 1 and temperature > 0:
        raise ValueError("beams are searched at temperature 0: drawing tokens is for beams=1")
    step = _Step(model, tokens, lengths, max_new_tokens, beams, context)
    if beams > 1:
        return _search(step, tokens.shape[0], max_new_tokens, beams, -1 if eos is None else eos, length_penalty)
    made, ended = [], torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        token = _choose(step.logits, temperature, top_k, top_p, generator)
        if eos is not None:
            token = token.masked_fill(ended, eos)
            ended = ended | (token == eos)
        made.append(token)
        if (eos is not None and ended.all()) or len(made) == max_new_tokens:
            break
        step.advance(token)
    return torch.stack(made, 1)


class _Step:
    """A model between two tokens: its cache, and the logits (B · beams, vocab_size) of the next token."""

    def __init__(self, model, tokens, lengths, max_new_tokens: int, beams: int, context: dict):
        def repeat(x):
            return x.repeat_interleave(beams, 0) if isinstance(x, Tensor) and beams > 1 else x

        self.decode = getattr(model, "decode", model)
        self.context = {name: repeat(value) for name, value in context.items()}
        tokens, lengths = repeat(tokens), repeat(lengths)
        batch, longest = tokens.shape
        self.cache = model.new_cache(batch, longest + max_new_tokens)
        logits = self.decode(tokens, lengths=lengths, cache=self.cache, **self.context)
        last = longest - 1 if lengths is None else lengths - 1
        self.logits = logits[torch.arange(batch, device=tokens.device), last].float()

    def advance(self, token: Tensor, rows: Tensor | None = None):
        """Row b goes on with token[b], from what row rows[b] was."""
        if rows is not None:
            self.cache.reorder(rows)
        self.logits = self.decode(token[:, None], cache=self.cache, **self.context)[:, -1].float()


def _choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator) -> Tensor:
    if temperature <= 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)
    if top_k:
        logits[:, top_k:] = float("-inf")
    weights = logits.softmax(-1)
    weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(weights, 1, generator=generator))[:, 0]


def _search(step: _Step, batch: int, steps: int, beams: int, eos: int, length_penalty: float) -> Tensor:
    """Beam search. A beam that ends leaves the race and is remembered if it is among the best ended ones."""
    never, device = float("-inf"), step.logits.device
    first_rows = torch.arange(batch, device=device)[:, None] * beams
    running = torch.full((batch, beams, steps), eos, device=device)
    scores = torch.full((batch, beams), never, device=device)
    scores[:, 0] = 0.0  # all beams are the same at first
    best, best_scores = running.clone(), torch.full((batch, beams), never, device=device)
    open_ = torch.ones(batch, 1, dtype=torch.bool, device=device)
    for made in range(1, steps + 1):
        log_probs = step.logits.log_softmax(-1).unflatten(0, (batch, beams)) + scores[..., None]
        vocab_size = log_probs.shape[-1]
        scores, places = log_probs.flatten(1).topk(min(2 * beams, beams * vocab_size))  # enough, if half of them end
        beam, token = places // vocab_size, places % vocab_size
        candidates = running.gather(1, beam[..., None].expand(-1, -1, steps))
        candidates[:, :, made - 1] = token
        ends = (token == eos) | (made == steps)

        ended = (scores / made**length_penalty).masked_fill(~(ends & open_), never)
        ended[:, beams:] = never
        best_scores, keep = torch.cat((best_scores, ended), 1).topk(beams)
        best = torch.cat((best, candidates), 1).gather(1, keep[..., None].expand(-1, -1, steps))

        scores, keep = scores.masked_fill(ends, never).topk(beams)
        open_ = open_ & (scores[:, :1] / made**length_penalty > best_scores[:, -1:])
        if made == steps or not open_.any():
            break
        running = candidates.gather(1, keep[..., None].expand(-1, -1, steps))
        step.advance(running[:, :, made - 1].flatten(), (first_rows + beam.gather(1, keep)).flatten())
    longest = ((best[:, 0] != eos).sum(1) + 1).clamp(max=steps).max()
    return best[:, 0, :longest]
