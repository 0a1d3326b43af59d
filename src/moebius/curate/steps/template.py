"""Drop text that a machine filled in: templates, error pages, tables of numbers, lists of fields.

No paper publishes these rules; the shares are chosen so that the books and worked answers of the
tests stay, and of 120 articles all but one, a meal plan. They are of lines with text, and asked of
texts of at least `min_lines`, but for two that a single line can show: placeholders nobody filled
(`{{name}}`, lorem ipsum) and short pages that only report an error (404, a domain for sale).
"""

import dataclasses
import re
from collections import Counter

from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide, Decision, Filter, Kind

# No part of these repeats without bound, so hostile text is read in linear time.
_PLACEHOLDER = re.compile(
    r"\{\{[^{}\n]{1,80}\}\}|\{%[^%\n]{1,80}%\}|<%[^%\n]{1,80}%>|\$\{[^{}\n]{1,80}\}"
    r"|%\(\w{1,40}\)[sd]|(?<!\S)%[sd](?!\w)|\[(?:insert|enter|your) [^\]\n]{1,40}\]",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"lorem ipsum|dolor sit amet|consectetur adipi|sed do eiusmod|ut labore et dolore"
    r"|quis nostrud exercitation|duis aute irure|excepteur sint occaecat"
)
_ERROR = re.compile(
    r"\b40[34] (?:error|forbidden|not found)|\berror 40[34]\b|\bpage (?:was |is |could )?not "
    r"(?:be )?found|\bpage you (?:are|were) looking for|\bpage (?:does not|doesn.t|no longer) exist"
    r"|\b50[0234] (?:internal|bad|service|gateway)|\binternal server error|\baccess denied"
    r"|\bdon.t have permission to access|\benable (?:javascript|cookies)"
    r"|\bjavascript (?:is|seems to be) (?:disabled|not enabled)|\bbrowser does not support"
    r"|\bchecking your browser|\bare (?:a human|not a robot)|\bcomplete the captcha"
    r"|\bdomain (?:name )?(?:is|may be) for sale|\bbuy this domain|\bdomain (?:is|has been) parked"
    r"|\bsite is under construction|\bindex of /|\bsession has expired|\baccount suspended"
    r"|\bwelcome to nginx|\bapache2? \w{1,20} default page|\bhttp error \d"
)
# A name, a colon, a short value that is no sentence.
_FIELD = re.compile(r"([^\W\d_][\w \-/()#.]{0,39}):\s{0,8}[^\n]{0,80}")
_DIGITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Template(Filter):
    """Lines are alike where they are equal but for their digits, and `alike` of them are.

    A line is a field where it reads `Key: value`, with more keys than a conversation has speakers;
    it is numbers where digits outnumber letters and nothing is equated.
    `max_placeholders` are placeholders per word; an error page has up to `error_words` words.
    """

    kinds: tuple[Kind, ...] = ("web", "prose")
    min_lines: int = 8
    max_alike_lines: float = 0.5
    alike: int = 3
    max_field_lines: float = 0.7
    min_keys: int = 6
    max_number_lines: float = 0.6
    max_placeholders: float = 0.05
    error_words: int = 150

    def build(self) -> Decide:
        return self._decide

    def _decide(self, document: Document) -> Decision:
        text = document.text
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        if not lines:
            return Dropped("empty text")
        return self._of_text(text) or self._of_lines(text, lines) or document

    def _of_text(self, text: str) -> Dropped | None:
        if "{" in text or "%" in text or "[" in text:
            number = len(_PLACEHOLDER.findall(text))
            if number > 1 and number > self.max_placeholders * len(text.split()):
                return Dropped("unfilled template", f"{number} placeholders")
        # Twelve characters a word: what is longer need not be divided.
        short = len(text) <= 12 * self.error_words and len(text.split()) <= self.error_words
        lower = text[:50_000].lower()
        if len(set(_FILLER.findall(lower))) > 1:
            return Dropped("filler text")
        if short and (match := _ERROR.search(lower)):
            return Dropped("error page", match.group())
        return None

    def _of_lines(self, text: str, lines: list[str]) -> Dropped | None:
        if len(lines) < self.min_lines:
            return None
        has_digits = sum(map(text.count, "0123456789")) > 0
        same = Counter(_DIGITS.sub("0", line) for line in lines) if has_digits else Counter(lines)
        alike = sum(number for number in same.values() if number >= self.alike) / len(lines)
        if alike > self.max_alike_lines:
            return Dropped("lines alike but for digits", f"{alike:.0%} of lines")
        numbers = sum(map(_is_numbers, lines)) / len(lines) if has_digits else 0.0
        if numbers > self.max_number_lines:
            return Dropped("mostly numbers", f"{numbers:.0%} of lines")
        keys = [key for key in map(_key, lines) if key]
        if len(keys) > self.max_field_lines * len(lines) and len(set(keys)) >= self.min_keys:
            return Dropped("mostly key-value lines", f"{len(keys)} of {len(lines)} lines")
        return None


def _key(line: str) -> str:
    if ":" not in line[:41] or line.endswith((".", "!", "?", '"', "\u201d")):
        return ""
    match = _FIELD.fullmatch(line)
    return match[1] if match else ""


def _is_numbers(line: str) -> bool:
    digits = sum(map(line.count, "0123456789"))
    # Below an eighth there are letters enough, or rules and dots that are not meant.
    if digits * 8 < len(line) or "=" in line:
        return False
    return digits > sum(map(str.isalpha, line))
