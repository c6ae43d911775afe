# SPDX-License-Identifier: MIT-0
"""Docs that hold: what a public docstring must say, links that lead somewhere, commands that run."""

import ast
import re

import pytest
import shared_blocks
from test_00_copy import home, parse, public

CHAPTERS = shared_blocks.chapters()
CASES = [
    pytest.param(path, name, id=f"{path.stem}-{name}")
    for path in CHAPTERS
    for name in public(path)
    if home(path, name) == path
]

SHAPE = re.compile(r"_(?:[a-z]|[A-Za-z0-9]*[A-Z][A-Za-z0-9]*)$")  # x_BSH, logits_v, but not target_lengths
RETURNED = re.compile(r"\((?:\.\.\.|[A-Za-z0-9]{1,2}),? ?[^()]*\)|\w_[a-z0-9]*[A-Z]\w*|scalar|shape|Returns?:")


def functions_of(node: ast.FunctionDef | ast.ClassDef) -> list[ast.FunctionDef]:
    """What a user calls: the function itself, or a class's own public methods with its __init__ and forward."""
    if isinstance(node, ast.FunctionDef):
        return [node]
    own = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return [item for item in own if not item.name.startswith("_") or item.name in ("__init__", "__post_init__")]


def raises(node: ast.AST) -> set[str]:
    """The names of the exceptions that a definition raises by itself; a bare `raise` only passes one on."""
    found = [item.exc for item in ast.walk(node) if isinstance(item, ast.Raise) and item.exc is not None]
    return {(exc.func if isinstance(exc, ast.Call) else exc).id for exc in found}


@pytest.mark.parametrize("path, name", CASES)
def test_a_public_docstring_says_what_a_copier_must_know(path, name):
    """A sentence; each tensor's shape, by the suffix of its name or in words; every error; in parts 2 and 5 the source.

    A parameter whose name carries its shape (`x_BSH`) has said it. One without a suffix is mentioned in the docstring.
    """
    _, definitions, _, sections = parse(path)
    node = definitions[name]
    part = next(part for (part, _), names in sections.items() if name in names)
    doc = ast.get_docstring(node) or ""
    assert doc, f"{name} has no docstring"
    for function in functions_of(node):
        own = f"{doc}\n{ast.get_docstring(function) or ''}"
        for argument in [*function.args.args, *function.args.kwonlyargs]:
            if "Tensor" in ast.unparse(argument.annotation or ast.Constant(None)) and not SHAPE.search(argument.arg):
                assert re.search(rf"\b{argument.arg}\b", own), f"{name}: what shape has the tensor {argument.arg}?"
        if "Tensor" in ast.unparse(function.returns or ast.Constant(None)):
            assert RETURNED.search(own), f"{name}: what shape does {function.name} return?"
        for error in raises(function):
            assert error in own, f"{name}: {function.name} raises {error}, which no docstring says"
    assert part not in (2, 5) or "Source:" in doc, f"{name} stands in part {part} and names no source"
