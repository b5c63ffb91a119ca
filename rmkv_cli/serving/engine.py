"""Run jobs in the thread that owns the models: prefill prompts and decode texts in batches."""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rmkv_cli.generation import (
    Batch,
    Decoder,
    Prompt,
    read_by_segments,
    require_positions,
)
from rmkv_cli.model import RMKV
from rmkv_cli.serving.choice import Choice
from rmkv_cli.serving.errors import ApiError, as_api_error
from rmkv_cli.serving.jobs import Done, Event, Job
from rmkv_cli.serving.limits import Limits
from rmkv_cli.serving.metrics import Metrics
from rmkv_cli.tokenizer import Piece, Token, Tokenizer, require_unicode

SHORT, LONGEST = 1 << 13, 1 << 16  # characters tokenized at once: usual and greatest number; other jobs wait meanwhile

Reading = tuple[Job, Iterator[None]]


class Engine:
    """A thread that runs jobs: it reads prompts in turns and generates as many texts at once as there are lanes.

    Texts of one model share its decoding steps. All models have the same shape and tokenizer.

    The engine reads one segment of one prompt between two decoding steps. First segments of prompts go first; later
    segments take turns. A long prompt therefore slows other jobs down but does not block them. Jobs get lanes in the
    order in which their prompts were finished. An error ends only its own job.

    Use it in a `with` statement: entering starts the thread; leaving ends it and all jobs.
    """

    def __init__(self, models: Mapping[str, RMKV], tokenizer: Tokenizer, limits: Limits, metrics: Metrics) -> None:
        self._models, self._tokenizer, self._limits, self._metrics = models, tokenizer, limits, metrics
        self._batches = {name: Batch(Decoder(model.eval(), limits.lanes)) for name, model in models.items()}
        self._changed = threading.Condition()
        self._submitted: list[Job] = []  # not yet moved to `_jobs`
        self._texts = 0  # of all jobs that have not ended
        self._jobs: list[Job] = []  # jobs that have not ended; only the engine's thread touches this and what follows
        self._new: deque[Reading] = deque()  # nothing has been read yet
        self._reading: deque[Reading] = deque()
        self._ready: deque[Job] = deque()  # prompts are read; waiting for lanes
        self._last: float | None = None  # deadline of all jobs, once the engine shuts down
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.lanes.set(limits.lanes)

    def __enter__(self) -> None:
        """Start the thread."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """End all jobs now, then the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def open(self) -> bool:
        """Whether the engine accepts jobs."""
        return self._last is None and not self._closed

    def submit(self, jobs: Sequence[Job]) -> None:
        """Accept all of the jobs, or none.

        Raises:
            ApiError: 429: the queue is full; 503: the engine is shutting down.
        """
        lanes, queue = self._limits.lanes, self._limits.queue
        wanted = sum(job.lanes for job in jobs)
        with self._changed:
            if not self.open:
                raise _shutting_down()
            if self._texts + wanted > lanes + queue:
                raise ApiError(
                    429, f"all {lanes} lanes are in use and {queue} texts are queued; try again later", "queue_full"
                )
            self._texts += wanted
            self._submitted.extend(jobs)
            self._changed.notify()

    def shut(self, seconds: float) -> None:
        """Accept no more jobs; running ones have this many seconds to finish. Safe to call from a signal handler."""
        self._last = time.monotonic() + seconds

    def _run(self) -> None:
        try:
            while self._wait():
                self._round()
        except Exception:  # no single job is to blame, and the next job would fail as well
            traceback.print_exc()
        finally:  # leave no client waiting
            with self._changed:
                self._closed = True
            self._take_in()
            for batch in self._batches.values():
                batch.texts.clear()  # the decoder may be broken, so `_end` must not use it
            for job in list(self._jobs):
                self._end(job, _shutting_down())

    def _wait(self) -> bool:
        """Wait until there is work; return False once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._submitted or self._jobs)
            return not self._closed

    def _round(self) -> None:
        self._take_in()
        self._give_up()
        self._read_on()
        while self._ready and self._busy() + self._ready[0].lanes <= self._limits.lanes:
            job = self._ready.popleft()
            with self._fault_of(job):
                self._write(job)
        for batch in self._batches.values():
            if batch.texts:
                self._write_on(batch)
        self._report()

    def _busy(self) -> int:
        """Return the number of lanes in use."""
        return sum(len(batch.texts) for batch in self._batches.values())

    def _take_in(self) -> None:
        with self._changed:
            jobs, self._submitted = self._submitted, []
        self._jobs += jobs
        self._new += ((job, self._begin(job)) for job in jobs)

    def _give_up(self) -> None:
        """End jobs that were cancelled or have exceeded their time."""
        now = time.monotonic()
        for job in list(self._jobs):
            if (
                job.cancelled and not job.written
            ):  # a client with the whole answer may disconnect; the answer is still kept
                self._end(job, ApiError(499, "the client disconnected"))
            elif self._last is not None and (now > self._last or job in self._ready):
                self._end(job, _shutting_down())
            elif now - job.begun > job.seconds:
                self._end(job, ApiError(504, f"took longer than this server's limit of {job.seconds:g} s", "timeout"))

    def _report(self) -> None:
        busy = self._busy()
        self._metrics.busy.set(busy)
        self._metrics.queue.set(self._texts - busy)

    @contextmanager
    def _fault_of(self, job: Job) -> Iterator[None]:
        """End the job if an exception is raised."""
        try:
            yield
        except Exception as error:
            if as_api_error(error).status >= 500:
                traceback.print_exc()
            self._end(job, error)

    def _read_on(self) -> None:
        """Read a segment of the job whose turn it is; queue the rest for the job's next turn."""
        if not (line := self._new or self._reading):
            return
        job, work = line.popleft()
        with self._fault_of(job), suppress(StopIteration):
            next(work)
            self._reading.append((job, work))

    def _begin(self, job: Job) -> Iterator[None]:
        """Read the prompt, a segment at a time; then queue the job for lanes."""
        job.prompt = prompt = yield from self._read(job, job.pieces, job.after)
        if job.writing is None:
            self._end(job, Done(prompt.tokens, 0), prompt)
            return
        require_positions(self._models[job.model], prompt.state, job.writing.max_tokens - 1)
        self._ready.append(job)

    def _write(self, job: Job) -> None:
        """Start generating the texts of a job whose prompt has been read."""
        assert job.prompt is not None
        assert job.writing is not None
        writing = job.writing
        for i, config in enumerate(writing.configs):
            how = job.prompt, config, writing.max_tokens, writing.stop, None, writing.scores, writing.answer
            job.texts.append(Choice(job.first + i, self._tokenizer, *how))
        self._metrics.first.observe(time.monotonic() - job.begun)
        self._send(job, {text: self._batches[job.model].add(text) for text in job.texts})

    def _write_on(self, batch: Batch) -> None:
        """Generate one more token of each text of a model."""
        try:
            pieces = dict(batch.step())
        except Exception as error:  # all texts share the model's step
            traceback.print_exc()
            of_batch = [job for job in self._jobs if self._batches[job.model] is batch]
            writing = [job for job in of_batch if job.texts and not job.written]
            try:
                batch.clear()
            finally:
                for job in writing:
                    self._end(job, error)
            return
        for job in list(self._jobs):
            if new := {text: pieces[text] for text in job.texts if text in pieces}:
                with self._fault_of(job):
                    self._send(job, new)

    def _send(self, job: Job, pieces: Mapping[Choice, str]) -> None:
        """Send new pieces of a job's texts; if all texts have ended, end the job, or queue its text for reading."""
        for text, piece in pieces.items():
            if text.fault is not None:
                raise text.fault
            self._metrics.written.inc(text.stop_reason != "end")
            job.send(text.said(piece))
        if job.written and job.keep is None:
            self._end(job, self._done(job))
        elif job.written:
            self._reading.append((job, self._keep(job)))

    def _keep(self, job: Job) -> Iterator[None]:
        """Read the answer as the client received it: without a stop string, and including its last token."""
        assert job.writing is not None
        kept = yield from self._read(job, job.writing.remembered(job.texts[0].text), job.prompt)
        self._end(job, self._done(job), kept)

    def _read(self, job: Job, pieces: Iterable[Piece], after: Prompt | None) -> Generator[None, None, Prompt]:
        model = self._models[job.model]
        return read_by_segments(model, self._tokenizer, _short(pieces, self._tokenizer), after, self._metrics.read.inc)

    def _done(self, job: Job) -> Done:
        assert job.prompt is not None
        return Done(job.prompt.tokens, sum(len(text.ids) for text in job.texts))

    def _end(self, job: Job, event: Event, kept: Prompt | None = None) -> None:
        """Remove a job from wherever it is and send its last event; do nothing if the job has already ended.

        If keeping the reading fails, the last event is that error.
        """
        if job not in self._jobs:
            return
        self._jobs.remove(job)
        self._new, self._reading = (
            deque(entry for entry in line if entry[0] is not job) for line in (self._new, self._reading)
        )
        if job in self._ready:
            self._ready.remove(job)
        texts, keep = job.texts, job.keep
        # Release the states now: they are large, and objects that refer to the job may be collected late.
        job.pieces, job.after, job.prompt, job.texts, job.keep = (), None, None, [], None
        try:
            for text in texts:
                if text in self._batches[job.model].texts:
                    self._batches[job.model].remove(text)
                text.fault = None  # its traceback refers to the text; the cycle would keep both alive
        finally:
            with self._changed:
                self._texts -= job.lanes
            self._report()
            job.send(_kept(keep, kept, event))


def _kept(keep: Callable[[Prompt | None], None] | None, kept: Prompt | None, event: Event) -> Event:
    """Pass the reading to `keep`; return the job's last event, which is the error if `keep` fails."""
    try:
        if keep is not None:
            keep(kept)
    except Exception as error:
        traceback.print_exc()
        return error
    return event


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", "shutting_down")


def _short(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Split text into pieces that are quick to tokenize, without changing its tokens."""
    for piece in pieces:
        if isinstance(piece, Token):
            yield piece
        else:
            require_unicode(piece)  # check here, where the character's position is known
            yield from tokenizer.parts([piece], SHORT, LONGEST)
