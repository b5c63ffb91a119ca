"""The thread that owns the model: it reads prompts and writes texts, many at once, for whoever hands in jobs."""

import io
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rmkv_cli.errors import UserError
from rmkv_cli.generation import (
    Batch,
    Decoder,
    Prompt,
    SamplingConfig,
    Text,
    read_by_segments,
    require_positions,
    text_pieces,
)
from rmkv_cli.model import RMKV
from rmkv_cli.serving.choice import Choice, Said
from rmkv_cli.serving.errors import ApiError
from rmkv_cli.serving.limits import Limits
from rmkv_cli.serving.metrics import Metrics
from rmkv_cli.tokenizer import Piece, Special, Tokenizer

SHORT = 1 << 13  # characters that are tokenized at once


@dataclass(frozen=True)
class Done:
    """A job is done, having read and written so many tokens."""

    read: int
    written: int


Event = Said | Done | Exception
"""What a job tells: its pieces, then either that it is done or why it is not."""


@dataclass(frozen=True)
class Writing:
    """What is written after a prompt: a text for each config."""

    configs: Sequence[SamplingConfig]
    max_tokens: int
    stop: Sequence[str]
    ends: Collection[Special]
    scores: int | None
    """How many of the likeliest tokens are told with each; None: no score."""
    remembered: Callable[[str], Sequence[Piece]]
    """The pieces that a text is, once it is read like a prompt."""


@dataclass(eq=False, repr=False)  # a prompt is shown in no message
class Job:
    """A prompt to read, after an earlier reading or as a document's beginning, and what to write after it, if anything.

    `send` is called from the engine's thread with each event. `keep`, too: once, at the end, with all that was read and
    written, or with None if the job came to nothing.
    """

    pieces: Sequence[Piece]
    send: Callable[[Event], None]
    seconds: float
    """Time until it is given up."""
    after: Prompt | None = None
    writing: Writing | None = None
    keep: Callable[[Prompt | None], None] | None = None
    first: int = 0
    """The number of the first text."""
    cancelled: bool = False
    """Set by whoever no longer wants it, at any time, from any thread."""
    begun: float = field(default_factory=time.monotonic)
    prompt: Prompt | None = None
    """What was read, once it was."""
    texts: list[Choice] = field(default_factory=list)

    @property
    def lanes(self) -> int:
        """How many it takes; one also where it only reads."""
        return len(self.writing.configs) if self.writing else 1

    @property
    def written(self) -> bool:
        """Whether all its texts have ended; it may still have them read, to be kept."""
        return bool(self.texts) and all(text.stop_reason for text in self.texts)


class Engine:
    """Runs jobs in a thread of its own, those that came first first, as many at once as there are lanes.

    Between two steps of the texts that are being written, one segment is read, of the job that waited longest for its
    turn: a long prompt slows others down, and does not stop them.
    """

    def __init__(self, model: RMKV, tokenizer: Tokenizer, limits: Limits, metrics: Metrics) -> None:
        self._model, self._tokenizer, self._limits, self._metrics = model.eval(), tokenizer, limits, metrics
        self._batch = Batch(Decoder(model, limits.lanes))
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._texts = 0  # of all jobs that have not ended
        self._running: list[Job] = []
        self._reading: deque[tuple[Job, Iterator[None]]] = deque()
        self._last: float | None = None  # when all must have ended, once it shuts
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.lanes.set(limits.lanes)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def open(self) -> bool:
        """Whether it takes in jobs."""
        return self._last is None and not self._closed

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take in jobs, all or none.

        Raises:
            ApiError: 429: too many wait already; 503: the engine shuts.
        """
        lanes, queue = self._limits.lanes, self._limits.queue
        wanted = sum(job.lanes for job in jobs)
        with self._changed:
            if not self.open:
                raise _shutting_down()
            if self._texts + wanted > lanes + queue:
                raise ApiError(
                    429, f"all {lanes} lanes are taken and {queue} texts wait; try again later", "queue_full"
                )
            self._texts += wanted
            self._waiting.extend(jobs)
            self._changed.notify()

    def shut(self, seconds: float) -> None:
        """Take in no more; what is running may go on for so long. Safe to call from a signal handler."""
        self._last = time.monotonic() + seconds

    def close(self) -> None:
        """End all jobs now, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._round()
                except Exception as error:  # whatever broke the step: what runs is lost, what waits goes on
                    traceback.print_exc()
                    self._batch = Batch(Decoder(self._model, self._limits.lanes))
                    for job in list(self._running):
                        self._end(job, error)
        finally:  # also if even that breaks: nobody is left waiting
            with self._changed:
                self._closed = True
            for job in [*self._running, *self._waiting]:
                self._end(job, _shutting_down())

    def _wait(self) -> bool:
        """Wait until there is work, and tell whether there is; there is none once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            return not self._closed

    def _round(self) -> None:
        self._give_up()
        self._admit()
        if self._reading:
            self._read_on(*self._reading.popleft())
        if self._batch.texts:
            owners: dict[Text, tuple[Job, Choice]] = {x: (job, x) for job in self._running for x in job.texts}
            pieces = self._batch.step()
            for text, piece in pieces:
                self._tell(*owners[text], piece)
            for job in {owners[text][0] for text, _ in pieces}:
                self._end_written(job)

    def _give_up(self) -> None:
        """End the jobs that nobody wants any more, or whose time is over."""
        now = time.monotonic()
        with self._changed:
            waiting = list(self._waiting)
        for job in [*waiting, *self._running]:
            if job.cancelled and not job.written:  # who has it all may leave; it is still kept
                self._end(job, ApiError(499, "the client left"))
            elif self._last is not None and (now > self._last or job in waiting):
                self._end(job, _shutting_down())
            elif now - job.begun > job.seconds:
                self._end(job, ApiError(504, f"took longer than the {job.seconds:g} s that a request may", "timeout"))

    def _admit(self) -> None:
        with self._changed:
            busy = sum(job.lanes for job in self._running)
            while self._waiting and busy + self._waiting[0].lanes <= self._limits.lanes:
                job = self._waiting.popleft()
                busy += job.lanes
                self._running.append(job)
                self._reading.append((job, self._begin(job)))
            self._report()

    def _report(self) -> None:
        self._metrics.queue.set(sum(job.lanes for job in self._waiting))
        self._metrics.busy.set(sum(job.lanes for job in self._running))

    def _read_on(self, job: Job, work: Iterator[None]) -> None:
        """Read the job's next segment, and put it at the end of the line if there is more to read."""
        try:
            next(work)
            self._reading.append((job, work))
        except StopIteration:
            pass
        except Exception as error:  # a fault of this job's text, or none that others share
            if not isinstance(error, UserError):
                traceback.print_exc()
            self._end(job, error)

    def _begin(self, job: Job) -> Iterator[None]:
        """Read the prompt, a segment at a time; then begin its texts."""
        job.prompt = prompt = yield from self._read(job.pieces, job.after)
        writing = job.writing
        if writing is None:
            self._end(job, Done(prompt.tokens, 0), prompt)
            return
        require_positions(self._model, prompt.state, writing.max_tokens - 1)
        for i, config in enumerate(writing.configs):
            how = prompt, config, writing.max_tokens, writing.stop, writing.ends
            text = Choice(job.first + i, writing.scores, self._tokenizer, *how)
            job.texts.append(text)
        self._metrics.first.observe(time.monotonic() - job.begun)
        for text in job.texts:
            self._tell(job, text, self._batch.add(text))
        self._end_written(job)

    def _keep(self, job: Job) -> Iterator[None]:
        """Read what was written after the prompt, as it was told: without a stop string, and to its last token."""
        assert job.writing is not None
        kept = yield from self._read(job.writing.remembered(job.texts[0].text), job.prompt)
        self._end(job, self._done(job), kept)

    def _read(self, pieces: Iterable[Piece], after: Prompt | None) -> Generator[None, None, Prompt]:
        return read_by_segments(self._model, self._tokenizer, _short(pieces), after, self._metrics.read.inc)

    def _tell(self, job: Job, text: Choice, piece: str) -> None:
        self._metrics.written.inc(text.stop_reason != "end")
        job.send(text.said(piece))

    def _end_written(self, job: Job) -> None:
        """End the job, or have its text read, if all its texts have ended."""
        if not job.written:
            return
        if job.keep is None:
            self._end(job, self._done(job))
        else:
            self._reading.append((job, self._keep(job)))

    def _done(self, job: Job) -> Done:
        assert job.prompt is not None
        return Done(job.prompt.tokens, sum(len(text.ids) for text in job.texts))

    def _end(self, job: Job, event: Event, kept: Prompt | None = None) -> None:
        """Let go of a job wherever it stands, and tell its end."""
        with self._changed:
            if job in self._running:
                self._running.remove(job)
            else:
                self._waiting.remove(job)
            self._texts -= job.lanes
            self._report()
        self._reading = deque(entry for entry in self._reading if entry[0] is not job)
        for text in job.texts:
            if text in self._batch.texts:
                self._batch.remove(text)
        # Now, since whoever still knows the job may be garbage that is collected late: states are large.
        job.pieces, job.after, job.prompt, job.texts = (), None, None, []
        if job.keep is not None:
            job.keep(kept)
        job.send(event)


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", "shutting_down")


def _short(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the same text in pieces that are tokenized quickly, cut where the tokens are cut as well."""
    for piece in pieces:
        if isinstance(piece, Special) or len(piece) <= SHORT:
            yield piece
        else:
            mark = "\ufeff" * piece.startswith("\ufeff")  # a first one would be taken for a file's byte order mark
            yield from text_pieces(io.BytesIO((mark + piece).encode("utf-8", "surrogatepass")), "the text")
