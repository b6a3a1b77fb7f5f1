"""Laying examples into rows of one length."""

import bisect

import numpy as np


def cut(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts long documents into pieces of `seq_len` tokens and a rest.

    Args:
      starts, lengths: [N] int64, where each document begins and how long it is, in tokens.
      seq_len: T.

    Returns:
      starts, lengths: [P] int64 of the pieces, in order.
    """
    counts = -(-lengths // seq_len)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = within * seq_len
    return np.repeat(starts, counts) + offsets, np.minimum(np.repeat(lengths, counts) - offsets, seq_len)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns items to bins: from the longest item down, each to the fullest bin with room, else to a new one.

    At most 11/9 of the least number of bins, and a few (Johnson et al. 1974, "Worst-case performance bounds
    for simple one-dimensional packing algorithms"). All items of one length are placed at once: a bin that
    is the tightest fit for one stays so until it is too full for another. So the loop runs O(capacity log
    capacity) times, whatever the number of items.

    Args:
      lengths: [N] int, each in 1..capacity.
      capacity: of a bin.

    Returns:
      [N] int64, the bin of each item, numbered by the first item in it.
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(-lengths, return_counts=True)
    bin_of = np.zeros(len(lengths), np.int64)
    rooms: list[int] = []  # sorted: how much room the open bins have
    with_room: dict[int, list[np.ndarray]] = {}  # room -> groups of bins that have just this
    n_bins = 0

    def put(room: int, bins: np.ndarray) -> None:
        if room and len(bins):
            if room not in with_room:
                bisect.insort(rooms, room)
                with_room[room] = []
            with_room[room].append(bins)

    ends = np.cumsum(counts)
    for length, start, end in zip((-distinct).tolist(), ends - counts, ends, strict=True):
        items = order[start:end]
        while len(items):
            i = bisect.bisect_left(rooms, length)
            if i < len(rooms):
                room = rooms[i]
                bins = with_room[room].pop()
                if not with_room[room]:
                    del with_room[room], rooms[i]
            else:
                room = capacity
                opened = -(-len(items) // (capacity // length))
                bins = np.arange(n_bins, n_bins + opened)
                n_bins += opened
            each = room // length
            placed = min(len(items), each * len(bins))
            bin_of[items[:placed]] = np.repeat(bins, each)[:placed]
            items = items[placed:]
            filled, left = divmod(placed, each)
            put(room - each * length, bins[:filled])
            if left:
                put(room - left * length, bins[filled : filled + 1])
                filled += 1
            put(room, bins[filled:])
    _, first, renumbered = np.unique(bin_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[renumbered]


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """[N] int64, the bin of each item: the last one where it has room, else a new one. Items stay in their order.

    Args:
      lengths: [N] int, each in 1..capacity.
      capacity: of a bin.
    """
    bins, number, room = [], -1, 0
    for length in lengths.tolist():
        if length > room:
            number, room = number + 1, capacity
        room -= length
        bins.append(number)
    return np.array(bins, np.int64)


def rows_of(
    lengths: np.ndarray, seq_len: int, pack: bool = True, in_order: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Lays segments into rows, so that they take few; or each into its own.

    Args:
      lengths: [S] int64, each in 1..seq_len.
      seq_len: T.
      pack: several segments may share a row.
      in_order: rows hold the segments in their order, and may be more.

    Returns:
      order: [S] int64, the segments row by row.
      splits: [R + 1] int64, row r holds order[splits[r] : splits[r + 1]].
    """
    fit = next_fit if in_order else best_fit_decreasing
    row = fit(lengths, seq_len) if pack else np.arange(len(lengths))
    return np.argsort(row, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64)
