"""Turn a recipe into a file of rows: send its requests, save the answers in a journal, filter them into rows."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rmkv_cli.config import DataRecipe
from rmkv_cli.data.synthetic.filters import Evaluation, Rejected, Repetition, parts, verify
from rmkv_cli.data.synthetic.journal import Journal, open_journal
from rmkv_cli.data.synthetic.requests import REFUSED, Answer, Request, Write, fill_in, make_requests
from rmkv_cli.errors import UserError
from rmkv_cli.files import atomic_file, require_new
from rmkv_cli.progress import plural, progress, stderr

MAX_FIRST_REFUSALS = 10
"""Number of refusals before any answer after which generation stops, because every request would be refused."""


@dataclass
class Rejections:
    """Answers that a filter rejected."""

    rows: int = 0
    first: str = ""
    """Reason of the first rejection."""


@dataclass
class Report:
    """Result of a recipe."""

    requests: int
    answered_before: int
    """Number of requests whose answers were already in the journal; they were not sent again."""
    rows: int = 0
    rejected: dict[str, Rejections] = field(default_factory=dict)
    """Rejections by filter, in the order of the first ones."""
    prompt_tokens: int = 0
    """Number of tokens that the writer read for all requests, as it reports."""
    tokens: int = 0
    """Number of tokens that the writer generated for all requests."""

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def journal_path(out: Path) -> Path:
    """Return the path of the journal beside a file of rows."""
    return out.with_name(out.name + ".journal")


def generate_data(recipe: DataRecipe, base: Path, out: Path, write: Write, identity: str) -> Report:
    """Have a recipe's requests answered, and write a row to `out` for each answer that the filters accept.

    Each answer is on disk in the journal before its request counts as answered. A later call with the same requests and
    writer does not send them again. The rows depend only on the recipe, its files and the answers, not on the order of
    the answers.

    Args:
        recipe: the requests and the filters.
        base: folder that the recipe's files are relative to.
        out: the file to create; must not exist.
        write: answers requests.
        identity: identifies the writer, because answers of one writer are not reused for another.

    Raises:
        UserError: `out` exists, a file of the recipe cannot be read, the journal is in use or damaged, or as `write`.
    """
    require_new(out)
    evaluation = Evaluation(recipe.filters, base)
    requests = make_requests(recipe, base, identity)
    if not recipe.filters.evaluation:
        stderr().print(
            "No row is checked for contamination; list the files of your evaluation sets in filters.evaluation",
            style="yellow",
        )
    with open_journal(journal_path(out)) as journal:
        unique = {request.key: request for request in requests}  # equal requests have one answer
        pending = [request for key, request in unique.items() if key not in journal.answers]
        refusals = _answer(pending, write, journal, out)
        report, rows = _rows(recipe, requests, refusals | journal.answers, evaluation)
        report.answered_before = len(unique) - len(pending)
        with atomic_file(out) as temporary:
            temporary.write_bytes(b"".join(rows))
    return report


def _answer(pending: list[Request], write: Write, journal: Journal, out: Path) -> dict[str, Answer]:
    """Have requests answered: add the answers to the journal and return the refusals."""
    refusals: dict[str, Answer] = {}
    if not pending:
        return refusals
    try:
        with progress("Generating", len(pending), "requests") as advance:

            def done(request: Request, answer: Answer) -> None:
                if answer.finish_reason != REFUSED:
                    journal.add(request.key, answer)
                else:
                    refusals[request.key] = answer
                    if len(refusals) == MAX_FIRST_REFUSALS and not journal.answers:
                        raise UserError(f"the writer refused the first {MAX_FIRST_REFUSALS} requests: {answer.text}")
                advance(1)

            write(pending, done)
    except BaseException:
        if journal.answers:
            stderr().print(
                f"{plural(len(journal.answers), 'answer')} saved in {journal_path(out)}; the same command continues "
                "without requesting them again"
            )
        raise
    return refusals


def _rows(
    recipe: DataRecipe, requests: Iterable[Request], answers: dict[str, Answer], evaluation: Evaluation
) -> tuple[Report, list[bytes]]:
    filters, repetition = recipe.filters, Repetition(recipe.filters)
    report, rows = Report(requests=recipe.count, answered_before=0), []
    for request in requests:
        answer = answers[request.key]
        report.prompt_tokens += answer.prompt_tokens
        report.tokens += answer.tokens
        try:
            filled = {**request.filled, "prompt": request.prompt} | parts(filters, answer)
            row = {column: fill_in(template, filled) for column, template in recipe.row.items()}
            verdict = verify(filters, filled)
            text = "\n".join(row.values())
            evaluation.require_absent(text)
            repetition.add(text, filled["response"])
        except Rejected as rejected:
            found = report.rejected.setdefault(rejected.filter_name, Rejections(first=str(rejected)))
            found.rows += 1
            continue
        notes = {"writer": recipe.writer.model, "seed": request.body["seed"], "license": recipe.license}
        rows.append(json.dumps(row | notes | {"verdict": verdict}, ensure_ascii=False).encode() + b"\n")
    report.rows = len(rows)
    return report, rows
