"""From a recipe to a file of rows: requests, their answers in a journal, and the answers that the filters accept."""

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

SUSPICIOUS = 10
"""Refusals in a row, before any answer, that mean that every request would be refused."""


@dataclass
class Rejections:
    """What a filter rejected."""

    rows: int = 0
    first: str = ""
    """Why the first was rejected."""


@dataclass
class Report:
    """What came of a recipe."""

    requests: int
    answered_before: int
    """Requests whose answers were in the journal already; they were not sent."""
    rows: int = 0
    rejected: dict[str, Rejections] = field(default_factory=dict)
    """By filter, in the order in which they reject."""
    prompt_tokens: int = 0
    """Tokens that the writer read for all requests, as it reports."""
    tokens: int = 0
    """Tokens that it generated for all requests."""

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def journal_path(out: Path) -> Path:
    """Return the path of the journal beside a file of rows."""
    return out.with_name(out.name + ".journal")


def generate_data(recipe: DataRecipe, base: Path, out: Path, write: Write, identity: str) -> Report:
    """Have a recipe's requests answered, and write a row for each answer that the filters accept to `out`.

    Each answer is in the journal, on the disk, before its request counts as answered; a later call with the same
    requests and writer does not send them again. The rows depend on the recipe, its files and the answers alone, not
    on the order in which these come.

    Args:
        recipe: what is asked, and what is kept.
        base: folder that the recipe's files are relative to.
        out: the file to make; must not exist.
        write: has requests answered.
        identity: the writer's: answers of one are no answers of another.

    Raises:
        UserError: `out` exists; a file of the recipe cannot be read; the journal is in use or damaged; as `write` does.
    """
    require_new(out)
    evaluation = Evaluation(recipe.filters, base)
    requests = make_requests(recipe, base, identity)
    if not recipe.filters.evaluation:
        stderr().print(
            "No evaluation set is named, so no row is checked for contamination: filters.evaluation lists files",
            style="yellow",
        )
    with open_journal(journal_path(out)) as journal:
        unique = {request.key: request for request in requests}  # equal requests have one answer
        todo = [request for key, request in unique.items() if key not in journal.answers]
        before = len(unique) - len(todo)
        answers = _answers(todo, write, journal, out)
        report, rows = _rows(recipe, requests, answers | journal.answers, evaluation)
        report.answered_before = before
        with atomic_file(out) as aside:
            aside.write_bytes(b"".join(rows))
    return report


def _answers(todo: list[Request], write: Write, journal: Journal, out: Path) -> dict[str, Answer]:
    """Have requests answered; return the refusals, while the journal takes the answers."""
    refusals: dict[str, Answer] = {}
    if not todo:
        return refusals
    try:
        with progress("Generating", len(todo), "requests") as advance:

            def done(request: Request, answer: Answer) -> None:
                if answer.finish_reason != REFUSED:
                    journal.add(request.key, answer)
                else:
                    refusals[request.key] = answer
                    if len(refusals) == SUSPICIOUS and not journal.answers:
                        raise UserError(f"the writer refused the first {SUSPICIOUS} requests: {answer.text}")
                advance(1)

            write(todo, done)
    except BaseException:
        if journal.answers:
            stderr().print(
                f"{plural(len(journal.answers), 'answer')} kept in {journal_path(out)}; the same command continues "
                "without asking for them again"
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
