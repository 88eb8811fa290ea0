"""What a fit reads of a table of runs, where the table leaves it open."""

import pandas as pd

PER = 6.0  # FLOPs per parameter and token, of C = 6 N D


def with_tokens(table: pd.DataFrame, size: str) -> pd.DataFrame:
    """Return the table itself, or with D = C / 6N if it has N and C without tokens."""
    sizes = table.get("parameters", table.get(f"parameters_{size}"))
    if "tokens" in table or "flops" not in table or sizes is None:
        return table
    return table.assign(tokens=table["flops"] / PER / sizes)
