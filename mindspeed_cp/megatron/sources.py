"""Find code in Megatron's sources that reads the sequence axis: classes and functions that must be in the census."""

import ast

GROUPS = ("cp_group", "cp_size", "cp_rank", "context_parallel")
# Names for groups over which checkpoints are written and gradients are summed; they do not count.
SAVING = ("dp_cp_group", "with_context_parallel")


def reading(source: str) -> dict[str, str]:
    """name -> the first sign, for each top-level class and function of a module that reads the sequence axis.

    Signs are a context-parallel group, size or rank under any name, or positions made from the length of a tensor.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            sign = next((sign for part in ast.walk(node) if (sign := _sign(part))), "")
            if sign:
                found[node.name] = sign
    return found


def _sign(node: ast.AST) -> str:
    """The sign that a node reads the sequence axis, "" if there is none."""
    if isinstance(node, ast.Call) and _counts_places(node):
        return ast.unparse(node)
    named = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg"}.get(type(node))
    name = getattr(node, named) if named else None
    if not name or any(word in name for word in SAVING):
        return ""
    return name if any(group in name for group in GROUPS) or (named == "attr" and name == "cp") else ""


def _counts_places(call: ast.Call) -> bool:
    """Whether a call is ``arange`` over the length of a tensor."""
    if not (isinstance(call.func, ast.Attribute) and call.func.attr == "arange" and call.args):
        return False
    length = ast.unparse(call.args[0] if len(call.args) == 1 else call.args[1])
    return any(word in length for word in ("seq", ".size(", ".shape"))
