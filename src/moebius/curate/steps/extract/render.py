"""Blocks as text: plain, with code verbatim, or with markdown's markers where asked for."""

from moebius.curate.steps.extract.blocks import Block

_TIGHT = {"item", "row"}


def text_of(blocks: list[Block], markdown: bool) -> str:
    """The text of blocks, a blank line between them but for items and rows that follow another."""
    parts: list[str] = []
    for i, block in enumerate(blocks):
        if i:
            tight = block.kind in _TIGHT and blocks[i - 1].kind == block.kind
            parts.append("\n" if tight else "\n\n")
        parts.append(_marked(block) if markdown else block.text)
    return "".join(parts)


def _marked(block: Block) -> str:
    if block.kind == "heading":
        return f"{'#' * block.level} {block.text}"
    if block.kind == "item":
        return "- " + block.text.replace("\n", "\n  ")
    if block.kind == "row":
        return "| " + block.text.replace("\t", " | ") + " |"
    if block.kind == "code":
        fence = "```" if "```" not in block.text else "~~~~"
        return f"{fence}\n{block.text}\n{fence}"
    return block.text
