# SPDX-License-Identifier: MIT-0
"""The text of a comment or a docstring as Markdown.

What is indented, or has columns, is a sketch and stays monospaced. Names of code, flags and files
become code, and link to where they are defined.
"""

import re
from collections.abc import Callable

BULLET = re.compile(r"([·-]) +(?=\S)")
SPECIAL = re.compile(r"([\\*_\[\]<>$~^#|{}`])")
BOXES = re.compile("[─│┌┐└┘├┤┬┴┼╭╮╰╯▏█░▒▓]")
EMPHASIS = re.compile(r"(?<![\w*])\*(\w[\w ]*\w)\*(?![\w*])")
URL = re.compile(r"https?://[^\s)>\]]+[^\s)>\].,;:]")
CODE = re.compile(
    r"`[^`]+`"
    r"|--[a-z][a-z0-9-]*(?![\w-])"  # a flag
    r"|\b(?:torch|dist|nn|F|np)\.[A-Za-z_][\w.]*\w"
    r"|\b[\w/]*\w\.(?:py|md|ipynb|json)\b"
    r"|\b[A-Za-z]\w*\(\)"
    r"|\b[A-Za-z][A-Za-z0-9]*_\w+|(?<!\w)_\w+"
    r"|\b[A-Z][a-z]+[A-Z]\w*|\b[A-Z]{2,}[a-z]+[A-Z]\w*"
)
WORDS_LIKE_NAMES = {"LayerNorm", "BatchNorm", "PyTorch", "DeepSpeech", "DeepSeek", "LatentMoE"}
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
CHAPTER = re.compile(r"\b[Cc]hapter (\d+)(?:, (?:section|part) (\d(?:\.\d)?))?(?![\d.]*\d)")

CITES = ("Paper: ", "Papers: ", "Sources: ")  # what these begin goes on in indented lines
CITED = re.compile(r"\d{4}\.\d{4,5}(, section [\d.]+)?[;.]?$")

Link = Callable[[str], str | None]  # a name or a chapter to a link in Markdown, or to none


def markdown(lines: list[str], link: Link) -> str:
    """Paragraphs, lists and sketches of a comment.

    Args: link("copy_to_tp") and link("chapter 2, section 1.5") are links in Markdown, or None.
    """
    parts: list[str] = []
    for block in joined(blocks(lines)):
        if is_sketch(block):
            parts.append(sketch(block))
        elif BULLET.match(block[0]):
            items = (inline(" ".join(item), link) for item in bullets(block))
            parts.append("\n".join(f"- {item}" for item in items))
        elif block[0].startswith(CITES):
            parts.append("\\\n".join(inline(cited, link) for cited in citations(block)))
        else:
            parts.append(paragraph(" ".join(line.strip() for line in block), link))
    return "\n\n".join(parts) + "\n" if parts else ""


def paragraph(text: str, link: Link) -> str:
    """What begins like a list or a heading of Markdown does not become one."""
    return re.sub(r"^(\d+)([.)])(?= )|^([-+=]+)(?= |$)", r"\1\3\\\2", inline(text, link))


def blocks(lines: list[str]) -> list[list[str]]:
    """Lines between blank lines; a sketch that follows a paragraph directly is one by itself."""
    found: list[list[str]] = []
    before = ""
    for line in lines:
        indented = line.startswith("    ")
        starts = not before.strip() or (
            indented != before.startswith("    ") and not in_item(found)
        )
        if line.strip() and starts:
            found.append([])
        if line.strip():
            found[-1].append(line)
        before = line
    return found


def in_item(found: list[list[str]]) -> bool:
    return bool(found) and bool(BULLET.match(found[-1][0]) or found[-1][0].startswith(CITES))


def is_sketch(block: list[str]) -> bool:
    return block[0].startswith("  ") and not BULLET.match(block[0].strip())


def joined(found: list[list[str]]) -> list[list[str]]:
    """Sketches that only a blank line parts are one; so are the items of a list."""
    result: list[list[str]] = []
    for block in found:
        if result and is_sketch(block) and is_sketch(result[-1]):
            result[-1] += ["", *block]
        elif result and BULLET.match(block[0]) and BULLET.match(result[-1][0]):
            result[-1] += block
        else:
            result.append(list(block))
    return result


def sketch(block: list[str]) -> str:
    margin = min(len(line) - len(line.lstrip()) for line in block if line)
    text = "\n".join(line[margin:] for line in block)
    kind = "sketch boxes" if BOXES.search(text) else "sketch"
    return f"```{{code-block}} text\n:class: {kind}\n\n{text}\n```"


def bullets(block: list[str]) -> list[list[str]]:
    items: list[list[str]] = []
    for line in block:
        if match := BULLET.match(line):
            items.append([line[match.end() :]])
        else:
            items[-1].append(line.strip())
    return items


def citations(block: list[str]) -> list[str]:
    """The lines that one paper needs are one; where a line ends in a paper's number it is cited."""
    found = [""]
    for line in block:
        found[-1] += f" {line.strip()}"
        if CITED.search(line):
            found.append("")
    return [text.strip() for text in found if text]


def inline(text: str, link: Link) -> str:
    """One line of prose: code, links and emphasis; all else is escaped."""
    result = ""
    rest = 0
    pattern = re.compile("|".join(p.pattern for p in (URL, CODE, ARXIV, CHAPTER, EMPHASIS)))
    for match in pattern.finditer(text):
        result += escaped(text[rest : match.start()]) + converted(match[0], link)
        rest = match.end()
    return result + escaped(text[rest:])


def converted(found: str, link: Link) -> str:
    if URL.fullmatch(found):
        return f"<{found}>"
    if arxiv := ARXIV.fullmatch(found):
        return f"[{found}](https://arxiv.org/abs/{arxiv[1]})"
    if CHAPTER.fullmatch(found):
        return link(found) or found
    if emphasis := EMPHASIS.fullmatch(found):
        return f"*{emphasis[1]}*"
    if found in WORDS_LIKE_NAMES:
        return found
    name = found.strip("`")
    return link(name) or f"`{name}`"


def escaped(text: str) -> str:
    return SPECIAL.sub(r"\\\1", text)
