"""What a module imports, read from its text."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool]]:
    """(Name of a module or of something in one, whether within a function) for each import in a module of a package."""

    def absolute(name: str, level: int) -> str:
        parts = package.split(".") if package else []
        return ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])]) if level else name

    def walk(node: ast.AST, within: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level)
            names = [base if alias.name == "*" else f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            yield from ((name, within) for name in names if name)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in (
            getattr(node.test, "id", ""),
            getattr(node.test, "attr", ""),
        ):
            for below in node.orelse:
                yield from walk(below, within)
        else:
            if isinstance(node, ast.Call) and (name := _called(node)):
                level = len(name) - len(name.lstrip("."))
                yield absolute(name.lstrip("."), level), within
            within |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for below in ast.iter_child_nodes(node):
                yield from walk(below, within)

    return walk(tree, False)


def _called(call: ast.Call) -> str:
    """The module that a call of `import_module` or `__import__` names, if it is written out."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args and name in ("import_module", "__import__") else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
