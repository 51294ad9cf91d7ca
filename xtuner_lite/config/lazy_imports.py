"""Imports of a config page, rewritten so that nothing outside the standard library is imported."""

from __future__ import annotations

import ast
import sys

#: Name under which the page's namespace holds the function that makes a lazy object.
LAZY = "__lazy_import__"


class LazyImports(ast.NodeTransformer):
    """Replaces imports from outside the standard library by assignments of lazy objects."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        module = "." * node.level + (node.module or "")
        if not node.level and is_standard(module):
            return node
        return [
            _assign(alias.asname or alias.name, _lazy_call(module, alias.name, node.lineno), node)
            for alias in node.names
        ]

    def visit_Import(self, node: ast.Import) -> ast.AST | list[ast.AST]:
        if all(is_standard(alias.name) for alias in node.names):
            return node
        result: list[ast.AST] = []
        for alias in node.names:
            if is_standard(alias.name):
                result.append(ast.copy_location(ast.Import(names=[alias]), node))
            else:
                call = _lazy_call(alias.name, None, node.lineno, top=alias.asname is None)
                result.append(_assign(alias.asname or alias.name.split(".")[0], call, node))
        return result

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node  # a function's own imports happen when it is called

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]
    visit_Lambda = visit_FunctionDef  # type: ignore[assignment]


def _assign(name: str, value: ast.expr, node: ast.stmt) -> ast.AST:
    assignment = ast.Assign(targets=[ast.Name(id=name, ctx=ast.Store())], value=value)
    return ast.copy_location(assignment, node)


def _lazy_call(module: str, name: str | None, line: int, top: bool = False) -> ast.expr:
    arguments: list[ast.expr] = [ast.Constant(item) for item in (module, name, line, top)]
    return ast.Call(func=ast.Name(id=LAZY, ctx=ast.Load()), args=arguments, keywords=[])


def is_standard(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names
