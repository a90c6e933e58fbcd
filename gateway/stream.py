"""Hop 8, one stream: chunks in → frames out, in order and each once. Pure.

Chunks come from two places, the shard's channel and the job's log, and may come twice, or not at
all (pub/sub keeps nothing). ``next_index`` is what the client lacks; everything before it is a
repeat, and a chunk behind it means that the log has to be read.
"""

from __future__ import annotations

from gateway.frames import end_frame, restarted_frame, token_frame, token_prefix, with_epoch
from openlora.protocol.events import Chunk, End


class TokenStream:
    """Where one client is in one job's tokens.

    Attributes:
        next_index: index of the next token to send.
        epoch: the newest claim that is known; 0 while none is.
        token_epoch: claim by which the token sent last was made; 0 where that is not known.
        end: how the job ended; set once the last frame has been made.
    """

    __slots__ = (
        "_prefix",
        "_told_epoch",
        "end",
        "epoch",
        "job_id",
        "next_index",
        "request_id",
        "token_epoch",
    )

    def __init__(
        self, request_id: str, job_id: str, next_index: int = 0, token_epoch: int = 0
    ) -> None:
        self.request_id = request_id
        self.job_id = job_id
        self.next_index = next_index
        self.epoch = self.token_epoch = token_epoch if next_index else 0
        self.end: End | None = None
        self._told_epoch = 0
        self._prefix = token_prefix(request_id, job_id)

    def feed(self, chunk: Chunk, frames: list[str]) -> bool:
        """Appends what a published ``chunk`` adds; False where the log must be read first.

        That is so behind a gap, and where another claim took over in mid-stream: if the log was
        lost and begun anew in between, the same indices mean other tokens. An end that an older
        claim logged was not refused: Redis lost the newer one.
        """
        index = self.next_index
        if (
            chunk.first_index == index
            and chunk.epoch == self._told_epoch == self.epoch
            and chunk.end is None
            and len(chunk.tokens) == 1
        ):
            # Nearly every chunk: ``_take`` would do no more, since the claim that was told is also
            # that of the token sent last.
            frames.append(token_frame(self._prefix, index, chunk.tokens[0]))
            self.next_index = index + 1
            return True
        if chunk.epoch != self.epoch:
            if chunk.epoch < self.epoch:
                return chunk.end is None or self.end is not None
            if chunk.restarted:
                self.restart(frames)
            elif self.next_index > 0:
                return False
        if chunk.first_index > self.next_index:
            return False
        self._take(chunk, frames)
        return True

    def meet_log(self, epoch: int, chunks: tuple[Chunk, ...], frames: list[str]) -> None:
        """Looks at a whole log before its chunks are fed: does it hold what the client has seen?

        ``epoch``: the job's newest claim. As long as that is not above the last one known, what
        the log lacks was lost by Redis and will come again from the worker that has it. Behind a
        later claim, or an end, the token sent last must be there, by the claim it came with. Where
        that is not known, as behind a resume, the log must not have been begun anew, and tells it.
        """
        if self.next_index == 0:
            return
        if self.token_epoch == 0:
            is_other = not chunks or chunks[0].restarted
            self.token_epoch = _epoch_at(self.next_index - 1, chunks) or 0
        else:
            is_settled = epoch > self.epoch or (bool(chunks) and chunks[-1].end is not None)
            is_other = is_settled and _epoch_at(self.next_index - 1, chunks) != self.token_epoch
        if is_other:
            self.restart(frames)
            self.epoch = epoch

    def feed_logged(self, chunk: Chunk, frames: list[str]) -> None:
        """Takes a chunk read from the log, in the log's order.

        An older claim's, behind the token sent last, does not follow it: Redis lost that token, and
        with it the newer claim for a while. Which of the two goes on, the next claim will tell.
        """
        if self.token_epoch <= chunk.epoch and chunk.first_index <= self.next_index:
            self._take(chunk, frames)

    def _take(self, chunk: Chunk, frames: list[str]) -> None:
        index = self.next_index
        tokens = chunk.tokens
        if chunk.first_index != index:
            tokens = tokens[index - chunk.first_index :]
        if chunk.epoch > self.epoch:
            self.epoch = chunk.epoch
        if tokens:
            self.token_epoch = chunk.epoch
        prefix = self._prefix
        first = len(frames)
        for token in tokens:
            frames.append(token_frame(prefix, index, token))
            index += 1
        self.next_index = index
        if tokens and chunk.epoch != self._told_epoch:
            # With it a resume is safe, whatever Redis and its worker lost meanwhile.
            self._told_epoch = chunk.epoch
            frames[first] = with_epoch(frames[first], chunk.epoch)
        if chunk.end is not None and self.end is None:
            self.end = chunk.end
            frames.append(end_frame(self.request_id, self.job_id, chunk.end))

    def restart(self, frames: list[str]) -> None:
        """From index 0 again: what the client has seen is not what the log holds."""
        if self.next_index > 0:
            frames.append(restarted_frame(self.request_id, self.job_id))
            self.next_index = self.token_epoch = self._told_epoch = 0


def _epoch_at(index: int, chunks: tuple[Chunk, ...]) -> int | None:
    """The claim by which a log got the token at ``index``; None where it does not hold it."""
    for chunk in reversed(chunks):
        if chunk.first_index <= index < chunk.first_index + len(chunk.tokens):
            return chunk.epoch
    return None
