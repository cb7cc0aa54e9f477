"""`KVCache`: the keys and values of one attention layer while it generates, contiguous or paged."""

import torch
from torch import Tensor

from . import reference
from .ops.attention import attention
from .ops.decode_attention import checked, decode_attention
from .positions import DistanceBias

_FEW_TOKENS = 16  # a longer prompt of an empty cache goes through attention


def _fits_a_prompt(options: dict) -> bool:
    """Whether `attention` understands the options as `decode_attention` does."""
    rope = options.get("rope")
    return not isinstance(options.get("relative_bias"), DistanceBias) and (rope is None or rope.query_positions is None)


class KVCache:
    """Keys and values of up to `batch` sequences, each with a length of its own, for `decode_attention`.

    Contiguous (the default): every sequence has room for `capacity` keys. Paged (`page_size`): sequences take pages
    from a pool of `num_pages` as they grow, and give them back when they are freed (Kwon et al., "PagedAttention",
    2023).

    Args:
        batch: rows, the most sequences at a time. All are in use at first, and empty.
        num_kv_heads, head_dim: of the layer; head_dim_v where values differ.
        capacity: the most keys of a sequence.
        page_size: keys a page; None for a contiguous cache.
        num_pages: of the pool; by default enough for every row to fill its capacity.
        dtype, device: of keys and values: float32, bfloat16 or float16.

    Lengths live twice, as `lengths` (batch,) int32 on the device and as Python ints, so that nothing waits for a GPU.

    >>> import torch, xformer_fast
    >>> cache = xformer_fast.KVCache(2, 4, 64, 128, page_size=16)
    >>> prompt = torch.randn(2, 8, 10, 64), torch.randn(2, 4, 10, 64), torch.randn(2, 4, 10, 64)
    >>> out = cache.attend(*prompt)
    >>> out = cache.attend(*(t[:, :, :1] for t in prompt))  # one more token of each sequence
    >>> cache.length(0), cache.lengths.tolist(), cache.free_pages
    (11, [11, 11], 14)
    >>> cache.free(0); cache.free_pages
    15
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        head_dim_v: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device="cpu",
    ):
        for name, number in (("batch", batch), ("num_kv_heads", num_kv_heads), ("capacity", capacity)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        if page_size is None and num_pages is not None:
            raise ValueError("num_pages is for a paged cache: give page_size too")
        if page_size is not None and page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.capacity, self.page_size = capacity, page_size
        rows, row_keys = batch, capacity
        if page_size is not None:
            self._pages_a_row = -(-capacity // page_size)
            rows, row_keys = batch * self._pages_a_row if num_pages is None else num_pages, page_size
            self._pages: list[list[int]] = [[] for _ in range(batch)]
            self._free = list(range(rows))[::-1]
            self.block_table = torch.zeros(batch, self._pages_a_row, dtype=torch.int32, device=device)
        else:  # a row is one page: any of them can be chosen without a copy
            self.block_table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        self.key = torch.zeros(rows, num_kv_heads, row_keys, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros(rows, num_kv_heads, row_keys, head_dim_v or head_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._lengths = [0] * batch
        self._unused: list[int] = []

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free) if self.page_size is not None else 0

    def length(self, row: int) -> int:
        """The number of keys of a sequence."""
        return self._lengths[row]

    def add(self) -> int:
        """Takes an unused row for a new, empty sequence."""
        if not self._unused:
            raise ValueError(f"all {len(self._lengths)} rows are in use: free one first")
        return self._unused.pop()

    def free(self, row: int):
        """Ends the sequence of a row: its pages go back to the pool, the row can be added anew."""
        self._check_rows([row])
        self.truncate(row, 0)
        self._unused.append(row)

    def truncate(self, row: int, length: int):
        """Forgets the keys of a sequence past `length`, as after rejected speculative tokens."""
        self._check_rows([row])
        if not 0 <= length <= self._lengths[row]:
            raise ValueError(f"length must lie in 0..{self._lengths[row]}, the keys of row {row}, got {length}")
        self._lengths[row] = length
        self.lengths[row] = length
        if self.page_size is not None:
            kept = -(-length // self.page_size)
            self._free += self._pages[row][kept:][::-1]
            del self._pages[row][kept:]

    def reorder(self, rows: Tensor):
        """Every row b becomes a copy of row rows[b], as the beams of a search do. rows: (batch,) int64.

        A row that is not in use stays empty, whatever it names. Contiguous caches alone: rows of a paged one would have
        to share pages.
        """
        if self.page_size is not None:
            raise ValueError("a paged cache cannot be reordered: its rows share no pages")
        if rows.shape != self.lengths.shape:
            raise ValueError(f"rows must name one of {len(self._lengths)} rows each, got shape {tuple(rows.shape)}")
        sources = rows.tolist()
        self._check_used([source for row, source in enumerate(sources) if row not in self._unused])
        if self._unused:
            sources = [row if row in self._unused else source for row, source in enumerate(sources)]
            rows = torch.tensor(sources, device=rows.device)
        keys = max(self._lengths)
        for kept in (self.key, self.value):
            kept[:, :, :keys] = kept[rows, :, :keys]
        self.lengths = self.lengths[rows]
        self._lengths = [self._lengths[row] for row in sources]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        rows: list[int] | None = None,
        backend: str | None = None,
        **options,
    ):
        """Appends key and value (B, Hkv, T, D) and attends from query (B, Hq, T, D), causally: one layer's step.

        rows: the cache rows of the B sequences; all that are in use, in order, by default. options: those of
        `decode_attention` (window, rope, alibi_slopes, relative_bias, sinks, scale, softcap, return_lse). Under
        autocast, too, all is computed and returned in the cache's dtype.
        """
        rows = [row for row in range(len(self._lengths)) if row not in self._unused] if rows is None else list(rows)
        self._check_rows(rows)
        if query.dim() != 4 or query.shape[0] != len(rows):
            raise ValueError(f"query must be (B, Hq, T, D) with B = {len(rows)} rows, got {tuple(query.shape)}")
        tokens = query.shape[2]
        self._reserve(rows, tokens)
        every = len(rows) == len(self._lengths) and rows == sorted(rows)
        chosen = slice(None) if every else torch.tensor(rows, dtype=torch.long, device=self.lengths.device)
        lengths, table = self.lengths[chosen], self.block_table[chosen]
        if every and self.page_size is None:
            table = None
        if tokens > _FEW_TOKENS and not any(self._lengths[row] for row in rows) and _fits_a_prompt(options):
            checked(query, self.key, self.value, lengths, key, value, table, **options)
            query, key, value = (t.to(self.key.dtype) for t in (query, key, value))
            with torch.autocast(query.device.type, enabled=False):  # computed in the cache's dtype, as decoding is
                out = attention(query, key, value, causal=True, backend=backend, **options)
            if (rope := options.get("rope")) is not None:
                _, key = rope.rotate_tokens(query, key, lengths)
            reference.kv_cache_append(self.key, self.value, key, value, lengths, table)
        else:
            caches = self.key, self.value, lengths
            new = {"new_key": key, "new_value": value, "block_table": table}
            out = decode_attention(query, *caches, **new, backend=backend, **options)
        self.lengths[chosen] += tokens
        for row in rows:
            self._lengths[row] += tokens
        return out

    def _check_rows(self, rows: list[int]):
        if len(set(rows)) != len(rows):
            raise ValueError(f"rows must differ from each other, got {rows}")
        self._check_used(rows)

    def _check_used(self, rows: list[int]):
        for row in rows:
            if not 0 <= row < len(self._lengths) or row in self._unused:
                raise ValueError(f"row {row} is not in use: rows in 0..{len(self._lengths) - 1} are, once added")

    def _reserve(self, rows: list[int], tokens: int):
        for row in rows:
            if self._lengths[row] + tokens > self.capacity:
                raise ValueError(
                    f"row {row} holds {self._lengths[row]} keys: {tokens} more exceed its capacity, {self.capacity}"
                )
        if self.page_size is None:
            return
        wanted = {r: -(-(self._lengths[r] + tokens) // self.page_size) - len(self._pages[r]) for r in rows}
        if sum(wanted.values()) > len(self._free):
            raise ValueError(f"the pool has {len(self._free)} free pages, this step needs {sum(wanted.values())}")
        for row, count in wanted.items():
            if count == 0:
                continue
            pages = [self._free.pop() for _ in range(count)]
            first = len(self._pages[row])
            self._pages[row] += pages
            self.block_table[row, first : first + count] = torch.tensor(pages, dtype=torch.int32)
