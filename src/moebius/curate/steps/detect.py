"""Label pages that hold code or reasoning, for Llama 3's code and reasoning classes (its 3.1.1).

Llama 3 labels pages with two trained classifiers; these are counted markers that need no model:
the share of lines with the shape of code, and the weight per 100 words of formulas, of TeX and of
words of deduction. Scores `code` and `reasoning` are kept, with a label `content`: `code`,
`reasoning` or `text`. Nothing is dropped unless `keep` names labels.
"""

import dataclasses
import re

from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide, Decision, Filter

LABELS = ("code", "reasoning", "text")
# Matched at the start of a stripped line.
_CODE_START = re.compile(
    r"(?:(?:async )?def \w+\(|class \w+.{0,80}[:{]$|import [\w.]+(?: as \w+)?;?$|import \{"
    r"|from [\w.]+ import |@\w[\w.]*(?:\(.{0,200})?$|(?:if|elif|while|for|with|except)\b.{1,120}:$"
    r"|(?:else|try|finally):$|return\b[^.]{0,120}[\w)\]};]$|raise \w+|assert \S|yield \S|pass$"
    r"|(?:public|private|protected|static|const|let|var|func|function|fn|struct|enum|namespace"
    r"|using|typedef|extern|package|impl|trait|template|void|int|char|bool|double) ?[\w<(*&]"
    r".{0,160}[;{},()]$|#(?:include|define|ifdef|ifndef|endif|pragma|!)|//|/\*|\*/"
    r"|<\/?[a-z][\w-]{0,20}[ >/]|<!--|>>> |\.\.\. |\$ [a-z]|(?:sudo|pip|git|npm|cd|apt-get) [\w./-]"
    r"|(?:SELECT|INSERT INTO|CREATE TABLE|UPDATE|DELETE FROM) |[)}\]]+[;,]?$"
    r"|['\"][^'\"]{1,80}['\"] ?: ?\S"
    r"|[A-Za-z_][\w.\[\]'\"]{0,60}(?:, [\w.]{1,40}){0,4}(?:: [\w\[\], .|]{1,60})?"
    r" (?:[-+*/|&]|<<|>>)?:?= [^\d\s])"
)
_CODE_END = ("{", "}", "};", "},", ") {", "(", "([", "({", "= [", "\\", "=>", "->", "*/")
_CODE_WITHIN = re.compile(
    r"[\w\])]\.[a-z_]\w*\(|[a-z_]\(\)|[a-z_]\([\w\"'][^ (]{0,40}[,)]|->|=>|::|&&|\|\||\+="
    r"|[\w\])\"'] ?[=!]==? ?[\w(\"'\[-]|[a-z_]=[A-Za-z_\"'\[({]"
)
_CODE_MARKS = frozenset("()[]{}=")
_FORMULA = re.compile(
    r"\\(?:frac|sum|int|sqrt|begin|left|mathbb|mathrm|cdot|times|alpha|infty|leq?|geq?|in|to|text)"
    r"(?![a-z])|\$(?=[^$\n]{0,100}[\\^_{])[^$\n]{1,200}\$|\$[A-Za-z]\$|\\[(\[]|<<[^<>\n]{1,80}>>"
    r"|[\w)\]] ?[=\u2264\u2265\u2260\u2248] ?[-\w($\\]|\w [<>] \w"
    r"|\d ?[+*\u00d7\u00f7^] ?\$?\d|[\u2200-\u22ff\u21d2]"
)
_DEDUCTION = re.compile(
    r"\b(?:therefore|hence|thus|implies|implying|theorem|lemma|corollary|proof|q\.e\.d|suppose"
    r"|assume|assuming|it follows that|we (?:have|get|obtain|conclude|know)|if and only if"
    r"|such that|equation|calculate[ds]?|in total|step \d|por lo tanto|demostraci\u00f3n|teorema"
    r"|donc|th\u00e9or\u00e8me|beweis|satz)\b|\u56e0\u6b64|\u6240\u4ee5|\u5b9a\u7406|\u8bc1\u660e",
    re.IGNORECASE,
)
_DEDUCTION_WEIGHT = 0.5


def code_share(text: str) -> float:
    """The share of lines with text that have the shape of code."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return sum(map(_is_code, lines)) / len(lines) if lines else 0.0


def _is_code(line: str) -> bool:
    # Code has short lines; prose in a long line may quote any of this.
    if len(line) > 400:
        return False
    if line.endswith(_CODE_END) or _CODE_START.match(line):
        return True
    if line.endswith(";") and not _CODE_MARKS.isdisjoint(line):
        return True
    return len(_CODE_WITHIN.findall(line)) * 12 > len(line.split())


def reasoning_weight(text: str) -> float:
    """Formulas, and words of deduction by half, per 100 words."""
    num_words = max(len(text.split()), len(text) // 12, 1)
    weight = len(_FORMULA.findall(text)) + _DEDUCTION_WEIGHT * len(_DEDUCTION.findall(text))
    return 100.0 * weight / num_words


@dataclasses.dataclass(frozen=True)
class Detect(Filter):
    """Code goes before reasoning where both are above their least scores.

    `keep` names the labels that pass; all where it is empty.
    """

    min_code: float = 0.3
    min_reasoning: float = 3.0
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [label for label in self.keep if label not in LABELS]
        if unknown:
            raise ValueError(f"detect keeps {', '.join(LABELS)}; there is no {unknown[0]!r}")

    def build(self) -> Decide:
        return self._decide

    def _decide(self, document: Document) -> Decision:
        code, reasoning = code_share(document.text), reasoning_weight(document.text)
        label = "text"
        if code >= self.min_code:
            label = "code"
        elif reasoning >= self.min_reasoning:
            label = "reasoning"
        if self.keep and label not in self.keep:
            return Dropped("content of another class", label)
        scored = document.with_score("code", code).with_score("reasoning", reasoning)
        return scored.with_label("content", label)
