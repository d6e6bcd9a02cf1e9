"""The gated delta rule (Yang et al., arXiv:2412.06464) over batches of sequences, several of which may share a state.

A head keeps a matrix, its state. Each token first lets it decay, then corrects what it answers to the token's key, and
reads it with the token's query. Within a chunk of tokens all corrections are found at once by a triangular system
(Yang et al., arXiv:2406.06484), and only chunks follow one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.delta_kernel import kernel_for, run_kernel

_LONGEST_CHUNK = 64


@dataclass(frozen=True, slots=True)
class StateSharing:
    """Which sequences of a batch start from which state.

    Attributes:
        owners: int64, shape (sequences,): for each sequence, the index of its state.
        groups: The same as runs of sequences, in their order: the indices of some states, int64 of shape (states,), and
            how many consecutive sequences start from each of them.
    """

    owners: Tensor
    groups: tuple[tuple[Tensor, int], ...]

    def read(self, queries: Tensor, states: Tensor) -> Tensor:
        """Multiply queries with the states of their sequences, without a copy of a state for each sequence.

        Args:
            queries: Shape (sequences, heads, queries, key size).
            states: Shape (states, heads, key size, value size).

        Returns:
            Shape (sequences, heads, queries, value size).
        """
        answers = []
        sizes = [len(indices) * count for indices, count in self.groups]
        for (indices, count), part in zip(self.groups, torch.split(queries, sizes), strict=True):
            # (states * count, heads, queries, size) -> (states, heads, count * queries, size), and back
            split = part.view(len(indices), count, *part.shape[1:]).transpose(1, 2)
            answer = split.flatten(2, 3) @ states.index_select(0, indices)
            answers.append(answer.view(*split.shape[:-1], -1).transpose(1, 2).flatten(0, 1))
        return torch.cat(answers)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    states: Tensor | None = None,
    sharing: StateSharing | None = None,
    final_states: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the gated delta rule without changing any input in place.

    It computes in float32, whatever the type of the inputs; only in bfloat16 on GPUs, where a kernel for that is
    installed, products are bfloat16's, and states float32. A token whose log decay and beta are 0 leaves the state as
    it is: so sequences are padded.

    Args:
        query: Shape (sequences, length, key heads, key size), not normalised.
        key: Likewise.
        value: Shape (sequences, length, value heads, value size); each key head serves as many consecutive value heads
            as there are more of them.
        log_decay: Shape (sequences, length, value heads): logarithms of what is kept of the state at each token.
        beta: Shape (sequences, length, value heads): how much of the error at a key is corrected.
        states: What sequences start from, shape (states, value heads, key size, value size); `None` is nothing.
        sharing: Which sequence starts from which of the states; `None` gives each its own, in order.
        final_states: Return the states after the last token.

    Returns:
        Shape (sequences, length, value heads, value size), in the type of `query`, and the final states in float32,
        shape (sequences, value heads, key size, value size), or `None`.
    """
    kernel = kernel_for(query, value, _by_torch)
    with torch.autocast(query.device.type, enabled=False):
        if kernel is None:
            output, last = _in_chunks(query, key, value, log_decay, beta, states, sharing, final_states)
            return output.to(query.dtype), last
        if states is not None and sharing is not None:
            states = states.index_select(0, sharing.owners)
        return run_kernel(kernel, query, key, value, log_decay, beta, states=states, final_states=final_states)


def _by_torch(inputs: list[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    """Run the rule by torch on query, key, value, log decay and beta, a state for each sequence."""
    query, key, value, log_decay, beta = inputs
    output, last = _in_chunks(query, key, value, log_decay, beta, states, None, True)
    assert last is not None
    return output, last


def _in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    states: Tensor | None,
    sharing: StateSharing | None,
    final_states: bool,
) -> tuple[Tensor, Tensor | None]:
    length, size = query.shape[1], query.shape[-1]
    chunk = _chunk_of(length)
    repeats = value.shape[2] // query.shape[2]
    # From here on, shapes are (sequences, heads, chunks, chunk, ...).
    query, key, value = (_lay_in_chunks(part, chunk) for part in (query, key, value))
    decay, beta = (_lay_in_chunks(part.unsqueeze(-1), chunk).squeeze(-1) for part in (log_decay, beta))
    # What queries and keys are divided by, and all other factors of a token, go into products that are narrower.
    query_scale, key_scale = _inverse_norm(query) * size**-0.5, _inverse_norm(key)
    similar, asked = key @ key.transpose(-1, -2), query @ key.transpose(-1, -2)
    if repeats > 1:
        query, key, query_scale, key_scale, similar, asked = (
            part.repeat_interleave(repeats, dim=1) for part in (query, key, query_scale, key_scale, similar, asked)
        )
    decay = decay.cumsum(-1)  # since the beginning of the chunk
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    between = between * key_scale.unsqueeze(-2)
    # The inverse and one product take half the time of solving for every column of the right side.
    system = similar * between * (key_scale * beta).unsqueeze(-1)
    unit = torch.eye(chunk, device=query.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True) * beta.unsqueeze(-2)
    within = asked * between * query_scale.unsqueeze(-1)
    kept = decay.exp()
    of_keys, of_queries = ((kept * scale).unsqueeze(-1) for scale in (key_scale, query_scale))
    until_end = ((decay[..., -1:] - decay).exp() * key_scale).unsqueeze(-1)
    of_state = kept[..., -1, None, None]
    outputs = []
    chunks = query.shape[2]
    for number in range(chunks):
        part = (slice(None), slice(None), number)
        written = value[part]
        if states is not None:
            written = torch.addcmul(written, of_keys[part], _read(key[part], states, sharing), value=-1)
        written = inverse[part] @ written
        output = within[part] @ written
        if states is not None:
            output = torch.addcmul(output, of_queries[part], _read(query[part], states, sharing))
        outputs.append(output)
        if final_states or number + 1 < chunks:
            added = key[part].transpose(-1, -2) @ (written * until_end[part])
            if states is not None:
                if sharing is not None:
                    states, sharing = states.index_select(0, sharing.owners), None
                added = torch.addcmul(added, states, of_state[part])
            states = added
    return torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :length].transpose(1, 2), states if final_states else None


def _read(queries: Tensor, states: Tensor, sharing: StateSharing | None) -> Tensor:
    return queries @ states if sharing is None else sharing.read(queries, states)


def _inverse_norm(states: Tensor) -> Tensor:
    """Return one over the norm of the last axis, as transformers rounds it."""
    return torch.rsqrt(torch.linalg.vector_norm(states, dim=-1).square() + 1e-6)


def _chunk_of(length: int) -> int:
    """Return how many tokens of a sequence make a chunk: short sequences are not padded to a long one."""
    return min(_LONGEST_CHUNK, max(8, -(-length // 8) * 8))


def _lay_in_chunks(states: Tensor, chunk: int) -> Tensor:
    """Turn (sequences, length, heads, size) into float32 (sequences, heads, chunks, chunk, size), padded with 0."""
    states = nn.functional.pad(states.transpose(1, 2).float(), (0, 0, 0, -states.shape[1] % chunk))
    return states.reshape(*states.shape[:2], -1, chunk, states.shape[-1])
