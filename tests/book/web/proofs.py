# SPDX-License-Identifier: MIT-0
"""Which tests prove a public function, and which planted bugs take its safeguards away.

Read from the code: a test belongs to a function that it names, by itself or, where no test does so,
through a helper of the same file.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import lift
import shared_blocks

from web import sources

Name = tuple[str, str]  # a script's stem and a name in it: ("megatron_tp", "copy_to_tp")
Modules = dict[str, str]  # what a file calls a script: {"tp": "megatron_tp"}
Imported = dict[str, Name]  # what it calls a name of a script


@dataclass(frozen=True)
class Test:
    """A test; symptom and seen_in where it is a planted bug."""

    path: Path
    name: str
    symptom: str = ""
    seen_in: str | None = None

    @property
    def title(self) -> str:
        return self.name.removeprefix("test_").replace("_", " ")

    @property
    def label(self) -> str:
        return f"{self.path.stem}-{self.name}"

    @property
    def is_bug(self) -> bool:
        return bool(self.symptom)


@dataclass
class TestFile:
    """The tests of one file, and what each of its functions names."""

    path: Path
    tests: list[Test]
    names: dict[str, set[Name]]  # by function of this file: what it names itself
    helpers: dict[str, set[str]]  # by function: the functions of this file that it uses


def test_files(root: Path = shared_blocks.ROOT) -> list[Path]:
    return sorted((root / "tests").glob("test_[0-9][0-9]_*.py"))


def scripts(root: Path = shared_blocks.ROOT) -> list[Path]:
    """Every chapter, tool and table file."""
    return [*shared_blocks.chapters(root), *shared_blocks.tools(root), *shared_blocks.tables(root)]


@lru_cache
def read(path: Path, stems: frozenset[str]) -> TestFile:
    """Args: stems of the scripts that tests may import."""
    tree = ast.parse(path.read_text("utf-8"))
    modules, imported = imports(tree, stems)
    found = TestFile(path, [], {}, {})
    texts = constants(tree)
    functions = [node for node in tree.body if isinstance(node, lift.Definable)]
    known = {node.name for node in functions}
    for node in functions:
        if node.name.startswith("test_"):
            found.tests.append(Test(path, node.name, **planted_bug(node, texts)))
        found.names[node.name] = set(named(node, modules, imported))
        used = {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}
        found.helpers[node.name] = used & known - {node.name}
    return found


def imports(tree: ast.Module, stems: Iterable[str]) -> tuple[Modules, Imported]:
    """What stands for a script in this file, and what for a name of one."""
    modules: Modules = {}
    names: Imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in stems:
                    modules[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module in stems:
            for alias in node.names:
                names[alias.asname or alias.name] = node.module, alias.name
    return modules, names


def constants(tree: ast.Module) -> dict[str, str]:
    """Texts that have a name at the top of a file, such as the address that links begin with."""
    return {
        ast.unparse(node.targets[0]): node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(getattr(node.value, "value", None), str)
    }


def planted_bug(node: ast.AST, texts: dict[str, str]) -> dict:
    """The arguments of its marker, or none."""
    for decorator in getattr(node, "decorator_list", []):
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("planted_bug"):
            return {item.arg: value_of(item.value, texts) for item in decorator.keywords}
    return {}


def value_of(node: ast.expr, texts: dict[str, str]) -> str | None:
    """None, or a text: f"{TE}/3281" too."""
    return eval(ast.unparse(node), {"__builtins__": {}}, texts)


def named(node: ast.AST, modules: Modules, imported: Imported) -> Iterable[Name]:
    """`tp.GPT`, a name that was imported, and plant(tp, "GPT", ...)."""
    for item in ast.walk(node):
        if isinstance(item, ast.Attribute) and isinstance(item.value, ast.Name):
            if item.value.id in modules:
                yield modules[item.value.id], item.attr
        elif isinstance(item, ast.Name) and item.id in imported:
            yield imported[item.id]
        elif isinstance(item, ast.Call) and len(item.args) > 1:
            owner, attribute = item.args[:2]
            is_name = isinstance(attribute, ast.Constant) and isinstance(attribute.value, str)
            if isinstance(owner, ast.Name) and owner.id in modules and is_name:
                yield modules[owner.id], attribute.value


def through_helpers(file: TestFile, name: str) -> set[Name]:
    """What a test names, and what the helpers name that it uses, and theirs."""
    seen = {name}
    waiting = [name]
    found: set[Name] = set()
    while waiting:
        function = waiting.pop()
        found |= file.names[function]
        new = file.helpers[function] - seen
        seen |= new
        waiting += new
    return found


def proofs(root: Path = shared_blocks.ROOT) -> dict[Name, list[Test]]:
    """By script and name: its tests in their order, planted bugs among them.

    A test of a carried copy is a test of the block's home.
    """
    paths = {path.stem: path for path in scripts(root)}
    direct: dict[Name, list[Test]] = {}
    through: dict[Name, list[Test]] = {}
    for path in test_files(root):
        file = read(path, frozenset(paths))
        for test in file.tests:
            for name in at_home(file.names[test.name], paths):
                direct.setdefault(name, []).append(test)
            for name in at_home(through_helpers(file, test.name), paths):
                through.setdefault(name, []).append(test)
    return through | direct


def at_home(names: set[Name], paths: dict[str, Path]) -> set[Name]:
    found = set()
    for stem, name in names:
        home = sources.home_of(paths[stem]).get(name)
        if home is not None:
            found.add((home.stem, name))
    return found


def users(path: Path, name: str, tested: dict[Name, list[Test]]) -> list[str]:
    """The nearest names of the same script that use `name` and that a test names."""
    seen = {name}
    nearest = {name}
    while nearest:
        nearest = {
            user
            for definition in lift.read(path).definitions
            if definition.uses & nearest
            for user in definition.names - seen
        }
        seen |= nearest
        if found := sorted(user for user in nearest if (path.stem, user) in tested):
            return found
    return []


def planted_bugs(root: Path = shared_blocks.ROOT) -> list[Test]:
    stems = frozenset(path.stem for path in scripts(root))
    return [test for path in test_files(root) for test in read(path, stems).tests if test.is_bug]
