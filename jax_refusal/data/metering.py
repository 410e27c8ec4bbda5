"""Where a chat template is stopped to pay: steps and scales put into its syntax tree.

jinja compiles a template to Python. Its sandbox is asked about operators and calls; of loops,
macros, comparisons, literals and slices nothing hears. So two filters that no template can name are
put there, which rendering.py defines.
"""

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

STEP = 100  # units of a budget, for a step of Python's
STEPPED, WEIGHED = " step", " weigh"


class Metering(NodeTransformer):
    """Puts STEPPED into each turn of a loop, macro or block, and WEIGHED around each value that an
    operation works on without a filter, a method or an intercepted operator."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:
            step = _paid(STEPPED, nodes.Const(_work([node.test])), node.lineno)
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        return self._with_steps(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._with_steps(node)

    visit_CallBlock = visit_Block = visit_Macro  # of these the body alone is of interest

    def _with_steps(self, node: Any) -> nodes.Node:
        step = _paid(STEPPED, nodes.Const(_work(node.body)), node.lineno)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_weighed(part) for part in node.nodes]
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        node.items = [_weighed(item) for item in node.items]
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if node.ctx == "load":
            node.items = [_weighed(item) for item in node.items]
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key, node.value = _weighed(node.key), _weighed(node.value)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _weighed(node.node)
        else:  # which is hashed
            node.arg = _weighed(node.arg)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        # Two values that are equal at most as far as a constant goes cost nothing.
        if len(sides) == 2 and node.ops[0].op in ("eq", "ne") and any(map(_fixed, sides)):
            return node
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node


def _work(body: list[Any]) -> int:
    """What one turn of a loop or a macro takes, but for what is paid for elsewhere."""
    cost = STEP
    for node in body:
        for part in (node, *node.find_all(nodes.Node)):
            cost += STEP // 10
            cost += len(part.data) if isinstance(part, nodes.TemplateData) else 0
            cost += len(str(part.value)) if isinstance(part, nodes.Const) else 0
    return cost


def _fixed(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) or (
        isinstance(node, nodes.List | nodes.Tuple) and all(map(_fixed, node.items))
    )


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if _fixed(node) else _paid(WEIGHED, node, node.lineno)


def _paid(name: str, node: nodes.Expr, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line)
