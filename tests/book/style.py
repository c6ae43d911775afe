# SPDX-License-Identifier: MIT-0
"""How the scripts read, in numbers, and words that the field does not use.

    make style                              every chapter, tool and table file
    make style CHAPTER=02                   that chapter's script, with each fault
    python tests/book/style.py FILE ...     these files (.py, .md, .ipynb), with each fault

A chapter's code is read, skipped (launcher, flags, data, claims, counter, command line) or carried
from another chapter. test_house.py holds every converted script to the budgets below.
"""

import argparse
import ast
import io
import json
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import shared_blocks

# Every chapter, tool and table file:
NODES = 12.0  # syntax nodes of a code line, on average
OVER_100 = 5.0  # per cent of code lines over 100 columns
FUNCTION = 45  # code lines of a function
# Chapter scripts only:
READ = 640  # code lines that a reader reads
SKIPPED = 200  # code lines that a reader skips
TOTAL = 1700  # lines
RATIO = (0.6, 1.2)  # lines of comments and docstrings for one of code
START = 160  # the line before which the technique begins
# A chapter that is assembled from others: what it carries counts nowhere.
ASSEMBLED = {"13_nemotron3"}
OWN = 450  # its code lines that are not carried, skipped or imports

SKIPPED_BLOCKS = {"launcher", "flags", "claims", "claims table", "counter"}
SKIPPED_BLOCKS |= {"text data", "precision", "groups"}
# What all chapters have word for word is no part of one chapter's own reading, at its home neither.
IN_EVERY_CHAPTER = {"config fields", "process groups", "reports"}
SKIPPED_FUNCTIONS = {"main", "flags", "claims", "config_of"}
SWITCHED_OFF = re.compile(r"#\s*(?:ruff:\s*|flake8:\s*)?noqa|#\s*fmt:\s*(?:skip|off)", re.I)
SPEECH = "token, vocabulary entry (speech has words)"

# A pattern in prose (comments, docstrings, Markdown), and what to write instead.
WORDS = [
    (r"\bdoors?\b", "operator, conjugate operators f and g"),
    (r"\bsummands?\b", "partial sum"),
    (r"\bturned\b", "transposed, reversed"),
    (r"\btable of words\b", "embedding table"),
    (r"(?<!in )(?<!own )(?<!other )\bwords?\b(?! (of|rate|error))", SPEECH),
    (r"\b(no|some|every)body\b", "name the rank or the code that does it"),
    (r"\bwho(ever)? (is|has|does|wants)\b", "name the rank or the code that does it"),
    (r"\b(eight|four)-bit numbers?\b|\bnumbers of (eight|four) bits\b", "FP8 / FP4 values"),
    (r"\bbeside\b", "compared with, next to"),
    (r"\bbehind\b|\bin front of\b", "after / before"),
    (r"\bpretend(ed)?\b", "simulated (fake process group)"),
    (r"\bfirst weights\b", "initial weights"),
    (r"\bthe way (there|back|in|out)\b", "forward / backward, entry / exit"),
    (r"\bhal(f|ves) of (a |each |the )?layers?\b", "sublayer"),
    (r"\bwhat is (whole|no|kept|divided)\b|\bwhat pads\b", "name the thing: replicated tensors"),
    (r"\b(is|are|be|stays?|remains?|held|hold|holds) whole\b", "replicated, full, unsharded"),
    (r"\bwhole (on|tensor|model|parameter|weight|state)", "replicated, full, unsharded"),
    (r"\b(rank's|own|a|each|its|equal|empty|unequal) shares?\b", "shard, sharded over"),
    (r"\bdivided over\b", "sharded over"),
    (r"\b(grouped|matrix) products?\b", "matmul, GEMM, grouped GEMM"),
    (r"\bproducts? (with|of (two|the|a) (matri|tensor))", "matmul, GEMM, grouped GEMM"),
    (r"\b(\d[\d,.]*|[A-Z]·[A-Z]|two|three|four|as many|fewer) numbers\b", "elements, values"),
    (r"\bcopier\b", "someone who copies the code"),
    (r"\bheard\b|\bunheard\b", "train / eval split"),
    (r"\bstretch(es)? of\b", "span, segment"),
    (r"\bnumber of (a|the|each) (rank|layer|expert|token|stage)\b", "index, id"),
    (r"\bFP8 units\b|\bmatrix units\b|\barithmetic units\b", "tensor cores"),
    (r"\btrips?\b|\bjourney\b|\bairborne\b|\bstations?\b", "in flight, asynchronous collective"),
    (r"\b(wide|narrow)(r|ned|n)?\b", "higher / lower precision, upcast / downcast"),
]


@dataclass
class Source:
    """A Python file, measured. Line numbers count from 1."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def docstrings(self) -> set[int]:
        """Lines of docstrings."""
        found: set[int] = set()
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for node in ast.walk(self.tree):
            if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
                found |= lines_of(node.body[0])
        return found

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def comments(self) -> dict[int, str]:
        """Line to the comment on it."""
        found = [token for token in self.tokens if token.type == tokenize.COMMENT]
        return {token.start[0]: token.string for token in found}

    @cached_property
    def code(self) -> set[int]:
        """Lines with code on them."""
        empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
        empty |= {tokenize.INDENT, tokenize.DEDENT}
        found: set[int] = set()
        for token in self.tokens:
            if token.type not in empty:
                found |= set(range(token.start[0], token.end[0] + 1))
        return found - self.docstrings

    @cached_property
    def functions(self) -> list[ast.FunctionDef]:
        kinds = ast.FunctionDef | ast.AsyncFunctionDef
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def length(self, function: ast.FunctionDef) -> int:
        return len(lines_of(function) & self.code)

    @cached_property
    def carried(self) -> set[int]:
        """Code lines of blocks whose home is another chapter, or that every chapter has."""
        return self._blocks(lambda r: r.kind == "carried" or r.name in IN_EVERY_CHAPTER)

    @cached_property
    def skipped(self) -> set[int]:
        """Code lines that a reader skips, carried or not."""
        found = self._blocks(lambda region: region.name in SKIPPED_BLOCKS)
        for function in self.functions:
            if function.name in SKIPPED_FUNCTIONS:
                found |= lines_of(function) & self.code
        return found

    def _blocks(self, wanted) -> set[int]:
        found: set[int] = set()
        for region in shared_blocks.parse(self.path)[0]:
            if wanted(region):
                found |= set(range(region.line, region.line + region.body.count("\n") + 1))
        return found & self.code

    @property
    def read(self) -> int:
        return len(self.code - self.carried - self.skipped)

    @cached_property
    def exempt(self) -> set[int]:
        """Lines that no budget counts: of an assembled chapter, all that is carried."""
        if self.path.parent.name not in ASSEMBLED:
            return set()
        regions = [r for r in shared_blocks.parse(self.path)[0] if r.kind == "carried"]
        spans = [range(r.line, r.line + r.body.count("\n") + 2) for r in regions]
        return set().union(*spans)

    @cached_property
    def imports(self) -> set[int]:
        """Lines of imports at the top."""
        found = [node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        return set().union(*map(lines_of, found))

    @property
    def own(self) -> int:
        """Code lines that are not carried, skipped or imports."""
        return len(self.code - self.carried - self.skipped - self.imports)

    @property
    def total(self) -> int:
        return len(self.lines) - len(self.exempt)

    @property
    def ratio(self) -> float:
        said = (self.docstrings | self.comments.keys()) - self.exempt
        return len(said) / max(1, len(self.code - self.exempt))

    @property
    def nodes(self) -> float:
        """Syntax nodes of a code line, rounded as they are printed."""
        counted = [self.tree]
        for statement in self.tree.body:
            if statement.lineno not in self.exempt:
                counted += ast.walk(statement)
        return round(len(counted) / max(1, len(self.code - self.exempt)), 1)

    @cached_property
    def long(self) -> list[int]:
        """Code lines over 100 columns."""
        return sorted(line for line in self.code if len(self.lines[line - 1]) > 100)

    @property
    def over_100(self) -> float:
        """Per cent of code lines."""
        return 100 * len(self.long) / max(1, len(self.code))

    @property
    def start(self) -> int | None:
        """The line of part 1, without what no budget counts."""
        numbered = enumerate(self.lines, 1)
        first = next((n for n, line in numbered if re.match(r"# ── 1(\.1)? ", line)), None)
        return first and first - sum(line < first for line in self.exempt)

    def densest(self) -> list[int]:
        """The five lines with the most syntax nodes."""
        nodes = Counter(getattr(node, "lineno", None) for node in ast.walk(self.tree))
        del nodes[None]
        return sorted(line for line, _ in nodes.most_common(5))


def lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, node.end_lineno + 1))


# ── Faults: line and what is wrong ────────────────────────────────────────────────────────────────

Fault = tuple[int, str]


def form(source: Source) -> Iterator[Fault]:
    """What every script must keep."""
    if source.nodes > NODES:
        densest = ", ".join(map(str, source.densest()))
        yield (
            1,
            f"{source.nodes} syntax nodes a code line, allowed {NODES}; most in lines {densest}",
        )
    if source.over_100 > OVER_100:
        where = ", ".join(map(str, source.long))
        share = f"{source.over_100:.1f} % of code lines over 100 columns"
        yield source.long[0], f"{share}, allowed {OVER_100}: {where}"
    for function in source.functions:
        if source.length(function) > FUNCTION:
            length = f"{function.name} has {source.length(function)} code lines"
            yield function.lineno, f"{length}, allowed {FUNCTION}"
    for line, comment in source.comments.items():
        if SWITCHED_OFF.search(comment):
            yield line, f"switches a check off: {comment}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            yield from assignment(node)


def assignment(node: ast.Assign | ast.AnnAssign) -> Iterator[Fault]:
    """Several values at once (but not a, b = b, a), and a lambda with a name."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    if isinstance(node.value, ast.Lambda):
        yield node.lineno, f"a lambda with a name, {ast.unparse(targets[0])}: write a function"
    for target in targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            left = sorted(ast.unparse(item) for item in target.elts)
            right = sorted(ast.unparse(item) for item in node.value.elts)
            if left != right:
                yield node.lineno, f"several values in one assignment: {ast.unparse(target)}"


def anatomy(source: Source) -> Iterator[Fault]:
    """What a chapter's script must keep."""
    if source.read > READ:
        yield 1, f"{source.read} code lines to read, allowed {READ}"
    skipped = len(source.skipped - source.exempt)
    if skipped > SKIPPED:
        yield 1, f"{skipped} code lines to skip, allowed {SKIPPED}"
    if source.path.parent.name in ASSEMBLED and source.own > OWN:
        yield 1, f"{source.own} code lines of its own, allowed {OWN}"
    if source.total > TOTAL:
        yield len(source.lines), f"{source.total} lines, allowed {TOTAL}"
    low, high = RATIO
    if not low <= round(source.ratio, 2) <= high:
        yield 1, f"{source.ratio:.2f} lines of comment for one of code, allowed {low} to {high}"
    if source.start is None or source.start >= START:
        yield source.start or 1, f"the technique (# ── 1 ...) begins before line {START}"
    yield from words(source.path)


def words(path: Path) -> Iterator[Fault]:
    """House words in prose; in notebooks the number of the cell stands for the line."""
    for where, text in prose(path):
        for pattern, better in WORDS:
            if better is SPEECH and "deepspeech" in str(path):
                continue
            for match in re.finditer(pattern, text, re.I):
                yield where, f"{match[0]!r}: write {better}"


def prose(path: Path) -> Iterator[tuple[int, str]]:
    if path.suffix == ".py":
        source = Source(path)
        for line in sorted(source.docstrings | source.comments.keys()):
            yield line, source.comments.get(line, source.lines[line - 1])
    elif path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            if cell["cell_type"] == "markdown":
                yield number, "".join(cell["source"])
    else:
        yield from enumerate(path.read_text("utf-8").splitlines(), 1)


def faults(path: Path, chapter: bool) -> list[str]:
    """All faults of a Python file, each with its place."""
    source = Source(path)
    found = [*form(source), *(anatomy(source) if chapter else ())]
    return [f"{path.parent.name}/{path.name}:{line}: {fault}" for line, fault in sorted(found)]


# ── The command ───────────────────────────────────────────────────────────────────────────────────

COLUMNS = (
    f"{'file':36}{'lines':>6}{'code':>6}{'read':>6}{'skip':>6}{'carried':>9}{'start':>7}"
    f"{'comment':>9}{'nodes':>7}{'>100':>6}{'prose':>7}  longest function"
)


def row(path: Path) -> str:
    source = Source(path)
    sizes = [(source.length(function), function.name) for function in source.functions]
    length, name = max(sizes, default=(0, "–"))
    return (
        f"{path.parent.name + '/' + path.name:36}{len(source.lines):>6}{len(source.code):>6}"
        f"{source.read:>6}{len(source.skipped):>6}{len(source.carried):>9}{source.start or '–':>7}"
        f"{source.ratio:>9.2f}{source.nodes:>7.1f}{source.over_100:>5.0f}%"
        f"{len(list(words(path))):>7}  {name} ({length})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="instead of all scripts; names faults")
    named = [path.resolve() for path in parser.parse_args().files]
    chapters = shared_blocks.chapters()
    scripts = named or [*chapters, *shared_blocks.tools(), *shared_blocks.tables()]
    print(COLUMNS)
    for path in scripts:
        if path.suffix == ".py":
            print(row(path))
            found = faults(path, path in chapters) if named else []
        else:
            found = [f"{path.name}:{line}: {fault}" for line, fault in words(path)]
        for fault in found:
            print(f"  {fault}")
    low, high = RATIO
    print(
        f"\nbudgets: {NODES} syntax nodes a code line, {OVER_100:.0f} % over 100 columns, ", end=""
    )
    print(
        f"functions up to {FUNCTION} code lines; in chapters {READ} to read, {SKIPPED} to skip, ",
        end="",
    )
    print(f"{TOTAL} lines, comment {low} to {high}, start before line {START}, no prose hit")


if __name__ == "__main__":
    main()
