"""Which tokens of two chains stand side by side: what both begin with, and then thought by thought."""

from steer.view.side import Side


def shared(one: Side, other: Side) -> int:
    """How many tokens both begin with."""
    ours, theirs = one.ids or one.texts, other.ids or other.texts
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def aligned(one: Side, other: Side) -> list[tuple[int, int]]:
    """Tokens that stand side by side, rising on both sides, from the begin to the end: where the shared beginning
    ends, where the n-th thought after it begins on either side, and where the thinking ends."""
    same, (a, b) = shared(one, other), (one.thinking, other.thinking)
    later = ([s.start for s in side.segments if same < s.start < side.thinking[1]] for side in (one, other))
    wanted = [(same, same), (one.prompt, other.prompt), *zip(*later, strict=False), (a[1], b[1])]
    points = [(0, 0)]
    for i, j in wanted:
        if points[-1][0] < i < len(one.texts) and points[-1][1] < j < len(other.texts):
            points.append((i, j))
    return [*points, (len(one.texts), len(other.texts))]
