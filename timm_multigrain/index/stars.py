"""Groups of copies from pairs of copies, without chains.

Joining whatever is connected lets a chain of small differences tie together pictures that have nothing in common, and
in a large collection everything ends in one group. Here a group is a star (star clustering, Aslam, Pelekhov and Rus
2004): a centre, and pictures that each form a pair with the centre itself. Two pictures of a group are thus at most
twice the angle of the threshold apart. The picture with most partners becomes a centre first, takes all its partners
that are still free, and so on; among equals the first in the given order. A picture is in one group at most.
"""
import numpy as np

from .near import NearPairs

__all__ = ['star_groups']


def star_groups(pairs: NearPairs, order: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Groups of two or more rows.

    Args:
        pairs: Pairs of rows.
        order: (N,) place of every row; decides between rows with equally many partners, and the order within a group.

    Returns:
        (rows, scores) of each group: the centre first, with a score of 1, then the others by falling score. Groups are
        in the order of their centres.
    """
    starts = np.concatenate([pairs.first, pairs.second])
    ends = np.concatenate([pairs.second, pairs.first])
    scores = np.concatenate([pairs.scores, pairs.scores])
    by_start = np.argsort(starts, kind='stable')
    starts, ends, scores = starts[by_start], ends[by_start], scores[by_start]
    rows, first, degrees = np.unique(starts, return_index=True, return_counts=True)
    free = np.zeros(len(order), bool)
    free[rows] = True
    groups = []
    for i in np.lexsort([order[rows], -degrees]):
        centre, part = rows[i], slice(first[i], first[i] + degrees[i])
        partners = ends[part]
        usable = free[partners]
        if not free[centre] or not usable.any():
            continue
        partners, values = partners[usable], scores[part][usable]
        free[partners] = free[centre] = False
        ranking = np.lexsort([order[partners], -values])
        groups.append((np.concatenate([[centre], partners[ranking]]), np.concatenate([[1], values[ranking]])))
    return sorted(groups, key=lambda group: order[group[0][0]])
