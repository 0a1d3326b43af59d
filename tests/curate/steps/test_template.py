"""Machine-made text: what goes, by which reason, and that what people wrote stays."""

import pytest

from moebius.curate.steps.template import Template

from .peers import answers, articles, book_parts, needs_data, reason

PROSE = "\n".join(f"{word} sentence of a text says something new." for word in "ABCDEFGH")
FIELDS = ["Name: Lamp", "Colour: red", "Size: 12 cm", "Weight: 300 g", "Stock: yes", "Brand: Acme"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty text"),
        ("\n \t\n", "empty text"),
        (PROSE, ""),
        ("Dear {{ name }}, your order {{order_id}} is on its way.", "unfilled template"),
        ("<% if user %>Hello <%= user %>", "unfilled template"),
        ("Hello %s, you have %d new messages, %(count)s", "unfilled template"),
        ("Dear [insert name here], sincerely, [Your name]", "unfilled template"),
        ("In Jinja, {{ name }} stands for a value. " + "And so it goes on. " * 9, ""),
        ("He gave {1} and 5 %s of it; a 10% share, 100%", ""),
        (f"{PROSE}\nLorem ipsum is what printers use.", ""),
        ("Lorem ipsum dolor sit amet, consectetur adipiscing elit.", "filler text"),
        ("404 Not Found\nnginx", "error page"),
        ("Sorry, the page you are looking for has moved.", "error page"),
        ("You need to enable JavaScript to run this app.", "error page"),
        ("Checking your browser before accessing the site.", "error page"),
        ("example.com\nThis domain is for sale!", "error page"),
        ("Index of /pub/linux", "error page"),
        ("Access denied. " + "He wrote on about it for long, line by line. " * 20, ""),
        ("\n".join(f"Page {i} of 200" for i in range(9)), "lines alike but for digits"),
        ("\n".join(f"Page {i} of 200" for i in range(7)), ""),
        ("\n".join([PROSE, *["Refrain!"] * 8]), ""),
        ("\n".join([PROSE, *["Refrain!"] * 9]), "lines alike but for digits"),
        ("\n".join("12 " * i + "x" * (i % 3) for i in range(1, 10)), "mostly numbers"),
        ("\n".join(f"{'y' * i} = {i} * 12345" for i in range(1, 10)), ""),
        ("\n".join([*FIELDS, "And more", "to say"]), "mostly key-value lines"),
        ("\n".join([*FIELDS[:5], "And more", "to say", "here"]), ""),
        ("\n".join(["Ann: Hi", "Bob: Hello", "Ann: where to?", "Bob: out", "Cy: ok"] * 2), ""),
        ("\n".join(f"{field}. It is so." for field in [*FIELDS, *FIELDS]), ""),
    ],
)
def test_reasons(text: str, expected: str) -> None:
    assert reason(Template(), text) == expected


def test_thresholds_are_fields() -> None:
    pages = "\n".join(f"Page {i} of 200" for i in range(4))
    assert reason(Template(min_lines=4), pages) == "lines alike but for digits"
    assert reason(Template(min_lines=4, alike=5), pages) == ""
    assert reason(Template(error_words=2), "404 Not Found") == ""
    assert reason(Template(max_placeholders=1.0), "{{ a }} {{ b }}") == ""


@needs_data
def test_what_people_wrote_stays() -> None:
    texts = [*book_parts("en", 4000, 5), *book_parts("es", 4000, 5), *book_parts("zh", 1000, 9)]
    texts += answers()
    assert [reason(Template(), text) for text in texts] == [""] * len(texts)
    # One article is a meal plan, line by line the same.
    reasons = [reason(Template(), text) for text in articles()]
    assert sorted(filter(None, reasons)) == ["lines alike but for digits"]
