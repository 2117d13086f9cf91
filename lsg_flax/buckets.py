"""Lengths that rows are padded to, so that a few compilations serve all texts."""

SHORTEST_BUCKET = 512


def default_buckets(limit: int, *shorter: int) -> tuple[int, ...]:
    """Lengths worth a compilation, up to `limit`: the `shorter` ones, powers of two from 512, and
    `limit` itself."""
    lengths = [*shorter, SHORTEST_BUCKET]
    while lengths[-1] < limit:
        lengths.append(2 * lengths[-1])
    return (*(length for length in lengths if length < limit), limit)
