"""What is done after the first ranking: re-ranking, query expansion, database-side augmentation, score normalisation.

Vectors are L2-normalised, scores their inner products; all of it works a chunk of the database at a time.
"""
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch

from timm_multigrain.files import counted
from timm_multigrain.layers import l2_normalize

from .exact import Array, SimilarityChunks, as_vectors, nearest, shards_of

TOP = 400  # images of the first ranking that are refined
NEIGHBOURS = 3
TRUSTED = 0.5  # share of them whose nearest one has to be the same by either half of the descriptor
SAMPLE = 2000  # images that a background is taken from
AUGMENTED = 1024  # vectors at a time


class Background(NamedTuple):
    """What photographs of a collection have in common.

    Attributes:
        mean: (D,) mean of their vectors.
        spread: Root mean square cosine of two of them about the mean: what chance makes of a similarity.
    """
    mean: torch.Tensor
    spread: float

    @classmethod
    def of(cls, vectors: Array) -> 'Background':
        """The background of a sample, (n, D) L2-normalised; some 2000 rows do."""
        vectors = as_vectors(vectors, 'vectors')
        mean = vectors.mean(0)
        squares = (unit := l2_normalize(vectors - mean)).matmul(unit.T).square()
        pairs = len(vectors) * (len(vectors) - 1)
        return cls(mean, float((squares.sum() - squares.trace()) / max(1, pairs)) ** 0.5)


def rerank_candidates(
        query: torch.Tensor,
        candidates: torch.Tensor,
        background: Background,
        k: int | Literal['auto'] = 'auto',
) -> tuple[torch.Tensor, float]:
    """Scores of the nearest images of a query, after these have refined each other and the query.

    As in `Global features are all you need for image retrieval and reranking`, Shao et al. 2023, each image becomes the
    weighted sum of itself and its k nearest among them, then the query that of itself and its k nearest of the refined
    ones. All of that is about the mean of the collection, which is put back afterwards: sums of vectors that have a
    mean in common would lie nearer to every query than those that nothing was added to. A neighbour of cosine c, about
    the mean, weighs (c - spread) / (1 - spread), and nothing below the spread.

    Wrong neighbours poison. 'auto' takes k = 3, and leaves the scores as they are where neighbours are a matter of
    chance: where less than half of the images have the same nearest one by the even and by the odd channels.

    Args:
        query: (D,), L2-normalised.
        candidates: (M, D), the first of its ranking, L2-normalised; the query itself is not to be among them where
            results are measured.
        background: Of the collection.
        k: Neighbours, whatever they are, or 'auto'.

    Returns:
        Scores (M,), at most 1, and the share of images with the same nearest one by either half.
    """
    check_neighbours(k)
    if len(candidates) < 2:
        return candidates @ query, 1.
    unit, lengths = _about(candidates, background.mean)
    similarity, even = unit @ unit.T, unit[:, ::2] @ unit[:, ::2].T
    agreement = float((_nearest_of(even) == _nearest_of(similarity - even)).float().mean())
    if k == 'auto' and agreement < TRUSTED:
        return candidates @ query, agreement
    number = min(NEIGHBOURS if k == 'auto' else k, len(candidates) - 1)
    refined = _refine(unit, similarity.fill_diagonal_(-1), unit, number, background.spread)
    query, length = _about(query[None], background.mean)
    query = _refine(query, query @ refined.T, refined, number, background.spread)
    refined, query = (l2_normalize(background.mean + size * x) for x, size in ((refined, lengths), (query, length)))
    return refined @ query[0], agreement


def chosen(agreements: list[float], k: int | Literal['auto']) -> str:
    """A sentence on what `rerank_candidates` has done with some queries."""
    done = sum(k != 'auto' or agreement >= TRUSTED for agreement in agreements)
    shares = '-'.join(dict.fromkeys(f'{100 * share:.0f}' for share in (min(agreements), max(agreements))))
    queries = counted(len(agreements), 'query')
    return (f'Re-ranked by {NEIGHBOURS if k == "auto" else k} neighbours: {done} of {queries}; '
            f'halves of the descriptor agree on the nearest image for {shares} %'
            + f', {100 * TRUSTED:.0f} % are needed' * (k == 'auto') + '.')


def check_neighbours(k: int | Literal['auto'], qe: tuple | None = None, dba: tuple | None = None) -> None:
    """ValueError for what is not a number of neighbours, or beside other refinements."""
    if k != 'auto' and not (isinstance(k, int) and k >= 1):
        raise ValueError(f"rerank={k!r}: give a number of neighbours, 1 or more, or 'auto'.")
    if qe or dba:
        raise ValueError('rerank expands the query and augments the database: leave qe and dba out.')


class RerankedChunks:
    """Similarities as of `SimilarityChunks`, those of the first images of each query by `rerank_candidates`.

    All others come after them, in the order that they had. Memory holds the vectors of the first ones.

    Args:
        queries: (Q, D), L2-normalised.
        database: (N, D) or shards of it, L2-normalised; read several times.
        query_rows: Where queries are images of the database: their indices, (Q,). A query refines nothing, and keeps
            its own score.
        k: As of `rerank_candidates`.
        offsets: As of `SimilarityChunks`.

    Attributes:
        agreements: Of each query, see `rerank_candidates`.
    """

    def __init__(self, queries: Array, database: Array | Iterable[Array], query_rows: torch.Tensor | None = None,
                 k: int | Literal['auto'] = 'auto', offsets: torch.Tensor | None = None) -> None:
        queries = as_vectors(queries, 'queries')
        self.chunks, self.offsets = SimilarityChunks(queries, database, offsets=offsets), offsets
        self.scores, self.indices = nearest(queries, database, TOP + (query_rows is not None))
        size = sum(map(len, shards_of(database)))
        background = Background.of(_take(database, torch.arange(0, size, -(-size // SAMPLE)), queries))
        used = self.indices.unique()
        vectors, self.agreements = _take(database, used, queries), []
        for i, own in enumerate([-1] * len(queries) if query_rows is None else query_rows.tolist()):
            others = self.indices[i] != own
            places = torch.searchsorted(used, self.indices[i][others])
            self.scores[i, others], agreement = rerank_candidates(queries[i], vectors[places], background, k)
            self.agreements.append(agreement)

    def __iter__(self) -> Iterator[torch.Tensor]:
        first = self.scores if self.offsets is None else self.scores + self.offsets[:, None]
        return replaced(self.chunks, first, self.indices, lower=3)  # cosines are from -1 to 1


def replaced(chunks: Iterable[torch.Tensor], scores: torch.Tensor, indices: torch.Tensor,
             lower: float = 0) -> Iterator[torch.Tensor]:
    """Chunks of scores (Q, n) with other ones, (Q, M), at some indices, and everything else lowered."""
    start = 0
    for chunk in chunks:
        chunk -= lower
        inside = (indices >= start) & (indices < start + chunk.shape[1])
        chunk[inside.nonzero()[:, 0], indices[inside] - start] = scores[inside]
        start += chunk.shape[1]
        yield chunk


def _about(vectors: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (n, D) and lengths (n, 1) from a mean."""
    vectors = vectors - mean
    return l2_normalize(vectors), vectors.norm(dim=1, keepdim=True)


def _nearest_of(products: torch.Tensor) -> torch.Tensor:
    """Index of the vector of the largest cosine with each, not itself, from inner products (M, M)."""
    lengths = products.diagonal().clamp(min=1e-12).sqrt()
    return (products / lengths / lengths[:, None]).fill_diagonal_(-2).argmax(1)


def _refine(vectors: torch.Tensor, similarity: torch.Tensor, others: torch.Tensor, k: int,
            spread: float) -> torch.Tensor:
    """Weighted sums of vectors (n, D) and the k of the others (M, D) that are most similar by (n, M)."""
    values, indices = similarity.topk(k)
    weights = ((values - spread) / max(1 - spread, 1e-6)).clamp(min=0)
    return l2_normalize(vectors + (weights[:, None] @ others[indices])[:, 0])


def alpha_query_expansion(
        queries: Array,
        database: Array | Iterable[Array],
        k: int = 50,
        alpha: float = 3.0,
        query_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replace each query by the weighted sum of itself and its k nearest database vectors.

    `Fine-tuning CNN image retrieval with no human annotation`, Radenović et al. 2018: neighbours weigh their similarity
    to the power alpha, the query weighs 1; alpha = 0 is the average query expansion of `Total recall`, Chum et al.
    2007. Neighbours of negative similarity weigh nothing.

    Args:
        queries: (Q, D), L2-normalised.
        database: (N, D) or shards of it, L2-normalised; read twice.
        k: Neighbours, besides the query.
        alpha: Power, 0 or more.
        query_rows: Where queries are images of the database: their indices, (Q,). A query is not its own neighbour.

    Returns:
        (Q, D) float32, L2-normalised.

    Example:
        >>> queries, database = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (2, 100))
        >>> alpha_query_expansion(queries, database, k=3, alpha=3.).shape
        torch.Size([2, 8])
    """
    queries = as_vectors(queries, 'queries')
    if isinstance(database, Iterator):
        raise ValueError('The database is read twice: pass an object that can be iterated again, not a generator.')
    if not alpha >= 0:
        raise ValueError(f'alpha is {alpha}: give 0 or more.')
    if k < 1:
        raise ValueError(f'k is {k}: take at least one neighbour.')
    if query_rows is None:
        scores, indices = nearest(queries, database, k)
    else:
        rows = torch.as_tensor(query_rows, device=queries.device)
        scores, indices = nearest(queries, database, k + 1)
        own = indices == rows[:, None]
        others = own.long().argsort(dim=1, stable=True)[:, :k]  # the row itself last, and it, or the farthest, is out
        scores, indices = scores.masked_fill(own, 0).gather(1, others), indices.gather(1, others)
    weights = scores.clamp(min=0) ** alpha * (scores > 0)
    return l2_normalize(queries + _weighted_sum(weights, indices, database))


def database_augmentation(database: Array, k: int = 10, alpha: float = 3.0) -> torch.Tensor:
    """Replace each database vector by the weighted sum of itself and its k nearest other database vectors.

    `Better matching with fewer features`, Turcot and Lowe 2009, and `Three things everyone should know to
    improve object retrieval`, Arandjelović and Zisserman 2012, with the weights of `alpha_query_expansion`. It is done
    once, before any query.

    Args:
        database: (N, D), L2-normalised.
        k: Neighbours, besides the vector itself; alpha as there.

    Returns:
        (N, D) float32, L2-normalised.
    """
    database = as_vectors(database, 'database')
    augmented = torch.empty_like(database)
    for rows in torch.arange(len(database)).split(AUGMENTED):
        augmented[rows] = alpha_query_expansion(database[rows], database, k, alpha, rows)
    return augmented


def score_offsets(
        queries: Array,
        background: Array | Iterable[Array],
        weight: float = 1.0,
        first: int = 0,
        last: int = 2,
) -> torch.Tensor:
    """What to add to the scores of each query, so that a score means the same for every query.

    It is -weight times the mean similarity of each of the queries (Q, D) to its neighbours number first to last
    (0-based, both included) in a background (M, D) of images that are copies of nothing: a query that looks like
    everything loses more. `A self-supervised descriptor for image copy detection`, Pizzi et al. 2022, takes the
    defaults; the baseline of `The 2021 image similarity dataset and challenge`, Douze et al. 2021, one neighbour.

    Returns:
        (Q,) float32, as `SimilarityChunks` takes them.
    """
    scores, _ = nearest(queries, background, last + 1)
    if scores.shape[1] <= last:
        raise ValueError(f'The background has {scores.shape[1]} vectors, and neighbour {last} is asked for.')
    return -weight * scores[:, first:].mean(1)


def _take(database: Array | Iterable[Array], rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows of a database, ascending, as float32 on a device."""
    start, found = 0, []
    for shard in shards_of(database):
        inside = rows[(rows >= start) & (rows < start + len(shard))] - start
        found.append(torch.as_tensor(shard)[inside].to(like))
        start += len(shard)
    return torch.cat(found)


def _weighted_sum(weights: torch.Tensor, indices: torch.Tensor, database: Array | Iterable[Array]) -> torch.Tensor:
    """Sum over the neighbours, (Q, D)."""
    start, total = 0, 0
    for shard in shards_of(database):
        shard = torch.as_tensor(shard)
        inside = (indices >= start) & (indices < start + len(shard))
        queries, places = inside.nonzero(as_tuple=True)
        found = shard[(indices[queries, places] - start).to(shard.device)].to(weights.device, torch.float32)
        added = weights.new_zeros(len(weights), shard.shape[1])
        total = total + added.index_add_(0, queries, found * weights[queries, places, None])
        start += len(shard)
    return total
