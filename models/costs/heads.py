"""How many heads each of the ranks has that divide a row (parallel/sequence.py)."""


def copies(num_heads: int, num_kv_heads: int, ranks: int) -> int:
    """Return how often each key and value head is sent, so that each of `ranks` that divide the
    heads has those that its own query heads share, and as many queries for each."""
    group = num_heads // num_kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and num_kv_heads * n % ranks == 0)
