"""Text from HTML pages: main text without boilerplate, with code, mathematics and image texts.

As in Llama 3 (section 3.1.1): boilerplate out, content in, code and formulas as they were written,
an image's alternative text in its place, no markdown markers unless asked for. The work runs in a
child process, for HTML parsers leak, crash and can be kept busy for hours.
"""

import dataclasses
import importlib.util

from moebius.config import runtime
from moebius.curate.document import Document, Dropped, Kind
from moebius.curate.step import Decide, Decision, Filter
from moebius.curate.steps.extract.worker import Failure, Worker, child_command

_PACKAGES = ("lxml", "lxml_html_clean", "trafilatura")


@dataclasses.dataclass(frozen=True)
class Extract(Filter):
    """Raw HTML -> text. Documents without raw bytes pass as they are.

    `seconds` is the processor time a page may take (a page that waits is given up after ten times
    that), `memory` how many bytes the child process may take for it. `markdown` marks headings,
    items, rows and code. The server's charset is read from the label `charset`, where there is one.
    """

    kinds: tuple[Kind, ...] = ("web",)
    markdown: bool = False
    seconds: float = 30.0
    memory: int = 2 << 30
    # trafilatura leaks: a child is replaced after so many pages
    pages_per_child: int = runtime(1000)

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"seconds must be above 0, not {self.seconds}")
        if self.memory < 64 << 20:
            raise ValueError(f"memory must be at least {64 << 20} bytes, not {self.memory}")
        if self.pages_per_child < 1:
            raise ValueError(f"pages_per_child must be at least 1, not {self.pages_per_child}")

    def command(self) -> tuple[str, ...]:
        """The command that runs its child process."""
        return child_command(self.seconds, self.memory, self.markdown)

    def build(self) -> Decide:
        """A decision with a child process of its own. Raises ValueError without trafilatura."""
        if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
            raise ValueError("extract needs the curate extra: pip install 'moebius[curate]'")
        worker = Worker(self.command(), 10 * self.seconds, self.pages_per_child)

        def decide(document: Document) -> Decision:
            if not document.raw:
                return document
            answer = worker.ask(document.raw, document.labels.get("charset", ""))
            if isinstance(answer, Failure):
                return Dropped(answer.reason, answer.detail)
            if not answer.text.strip():
                return Dropped("no text found")
            date = document.date or answer.date
            return dataclasses.replace(document, raw=b"", date=date).with_text(
                answer.text, "extract"
            )

        return decide
