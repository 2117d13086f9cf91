"""Lengths that rows are padded to, so that few compilations serve all texts."""

SHORTEST_BUCKET = 512
MOST_TOKENS = 2**27  # of a process's batch; each array of ids then takes half a GiB


def default_buckets(limit: int, *shorter: int) -> tuple[int, ...]:
    """Returns the lengths in tokens to compile for, up to `limit`: the `shorter` ones, powers of
    two from 512, and `limit` itself."""
    lengths = [*shorter, SHORTEST_BUCKET]
    while lengths[-1] < limit:
        lengths.append(2 * lengths[-1])
    return (*(length for length in lengths if length < limit), limit)


def check_tokens(rows: int, longest: int, processes: int = 1) -> None:
    """Raises ValueError for a batch that is padded to more tokens than any device can hold.

    Args:
        rows: rows of a batch of all processes together.
        longest: length that they are padded to.
        processes: number of processes that share the rows.
    """
    most = MOST_TOKENS // longest * processes
    if rows > most:
        raise ValueError(
            f"batch_size={rows}, in batches padded to {longest:,} tokens a row, is more than any "
            f"device can hold; give at most batch_size={most}."
        )
