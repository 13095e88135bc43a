"""Compile templates so that expensive operations are handed to the sandbox's context."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame

SHORT = 64  # list items or characters whose comparison is not charged

_NAMES = {
    "add": "add", "subtract": "subtract", "str_join": "join", "concat": "concat", "text": "text", "plain": "plain",
    "counted": "counted", "contains": "contains", "within": "within",
}  # fmt: skip
"""Methods of the context, by the names under which compiled templates call them."""


class BoundedCompiler(CodeGenerator):
    """jinja2's compiler, with operations that may be slow or build large values handed to the context."""

    def write_commons(self) -> None:
        super().write_commons()
        for name, method in _NAMES.items():
            self.writeline(f"{name} = context.{method}")

    def visit_Add(self, node: nodes.Add, frame: Frame) -> None:  # type: ignore[override]  # noqa: N802
        if "+" in getattr(self.environment, "intercepted_binops", ()):
            super().visit_Add(node, frame)
            return
        self._call("add", node, frame)

    def visit_Sub(self, node: nodes.Sub, frame: Frame) -> None:  # type: ignore[override]  # noqa: N802
        self._call("subtract", node, frame)

    def _call(self, name: str, node: nodes.BinExpr, frame: Frame) -> None:
        self.write(f"{name}(")
        self.visit(node.left, frame)
        self.write(", ")
        self.visit(node.right, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        op = node.ops[0]
        if len(node.ops) == 1 and op.op in ("in", "notin") and not _is_short(op.expr):
            self.write("contains(" if op.op == "in" else "(not contains(")
            self.visit(node.expr, frame)
            self.write(", ")
            self.visit(op.expr, frame)
            self.write(")" if op.op == "in" else "))")
            return
        is_cheap = len(node.ops) == 1 and (isinstance(node.expr, nodes.Const) or _is_short(op.expr))
        self.write("(")
        self._visit_operand(node.expr, frame, is_cheap)
        for op in node.ops:
            self.write(f" {_OPERATORS[op.op]} ")
            self._visit_operand(op.expr, frame, is_cheap, "within" if op.op in ("in", "notin") else "plain")
        self.write(")")

    def _visit_operand(self, node: nodes.Expr, frame: Frame, is_cheap: bool, check: str = "plain") -> None:
        if is_cheap or isinstance(node, nodes.Const):
            self.visit(node, frame)
            return
        self.write(f"{check}(")
        self.visit(node, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        is_slice = isinstance(node.arg, nodes.Slice)
        if is_slice:
            self.write("counted(")
        super().visit_Getitem(node, frame)
        if is_slice:
            self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("{")
        for place, item in enumerate(node.items):
            if place:
                self.write(", ")
            self._visit_operand(item.key, frame, is_cheap=False)  # keys are hashed
            self.write(": ")
            self.visit(item.value, frame)
        self.write("}")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
            return
        self.write("text(")
        if finalize.src is not None:
            self.write(finalize.src)


def _is_short(node: nodes.Expr) -> bool:
    """Whether a node is a constant or a short list, so that comparing it with another value is cheap."""
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return len(node.items) <= SHORT and all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)


_OPERATORS = {
    "eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in",
}  # fmt: skip
