"""Several training jobs over one frozen model in one batch: who goes together, the batch, and each job's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # a label that no loss looks at, as everywhere in PyTorch


def pack_jobs(tokens: Mapping[str, int], max_tokens: int) -> list[list[str]]:
    """Put jobs into as few batches as they fit in, with about as many tokens in each.

    Longest first, each into the batch that is emptiest so far; the number of batches grows until every one fits.

    Args:
        tokens: how many tokens a step of each job has, by name.
        max_tokens: the most that a batch may have.
    Returns: the names of each batch, in the order of ``tokens``.
    Raises: ValueError for a job that is larger than a batch, or not positive.
    Deterministic: yes.
    """
    for name, count in tokens.items():
        if not 0 < count <= max_tokens:
            raise ValueError(f"job {name!r} has {count} tokens a step; a batch has 1 to {max_tokens}")
    if not tokens:
        return []
    position = {name: i for i, name in enumerate(tokens)}
    longest_first = sorted(tokens, key=lambda name: (-tokens[name], position[name]))
    for count in range(-(-sum(tokens.values()) // max_tokens), len(tokens) + 1):
        batches: list[list[str]] = [[] for _ in range(count)]
        sizes = [0] * count
        for name in longest_first:
            emptiest = sizes.index(min(sizes))
            batches[emptiest].append(name)
            sizes[emptiest] += tokens[name]
        if max(sizes) <= max_tokens:
            break
    packed = [sorted(batch, key=position.__getitem__) for batch in batches]
    return sorted(packed, key=lambda batch: position[batch[0]])


class JobBatch(NamedTuple):
    """Sequences of several jobs, padded on the right to one length.

    input_ids, attention_mask, labels: int64 [rows, tokens]; labels are ``IGNORED`` where padding is. jobs: the job of
    each row. route: what ``bank.route`` takes, per token, with None for padding, which is the base's: an adapter's
    rows, and so its dropout, are those that it has alone.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    jobs: tuple[str, ...]
    route: list[list[str | None]]


def join_batches(batches: Mapping[str, Sequence[Tensor] | Tensor], pad_id: int = 0) -> JobBatch:
    """One batch of the sequences of several jobs.

    Args: batches: of each job, by its adapter's name: [rows, tokens], or sequences [tokens] of any lengths.
    Raises: ValueError where there is no sequence, or an empty one.
    """
    rows = [(job, sequence) for job, sequences in batches.items() for sequence in sequences]
    if not rows or any(sequence.ndim != 1 or len(sequence) == 0 for _, sequence in rows):
        raise ValueError("a batch of jobs has at least one sequence, and each at least one token")
    longest = max(len(sequence) for _, sequence in rows)
    input_ids = rows[0][1].new_full((len(rows), longest), pad_id, dtype=torch.int64)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for i, (_, sequence) in enumerate(rows):
        input_ids[i, : len(sequence)] = labels[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = 1
    route: list[list[str | None]] = [
        [job] * len(sequence) + [None] * (longest - len(sequence)) for job, sequence in rows
    ]
    return JobBatch(input_ids, mask, labels, tuple(job for job, _ in rows), route)


def losses_by_job(logits: Tensor, batch: JobBatch) -> dict[str, Tensor]:
    """Each job's next-token loss: the mean over its own tokens, as if it were alone.

    Formula: of a job, the mean of -log softmax(logits[i, t])[labels[i, t + 1]] over its rows i and their tokens t.
    Args: logits: floating [rows, tokens, vocabulary].
    Returns: 0-d tensors by job. ``backward`` is called on their sum: an adapter's gradient is that of its own job.
    """
    rows = {job: [i for i, name in enumerate(batch.jobs) if name == job] for job in dict.fromkeys(batch.jobs)}
    return {
        job: torch.nn.functional.cross_entropy(
            logits[own, :-1].flatten(0, 1).float(), batch.labels[own, 1:].flatten(), ignore_index=IGNORED
        )
        for job, own in rows.items()
    }
