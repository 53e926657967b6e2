"""Fails where train_graceful.py has grown: its lines, its longest function, how dense it is.

scripts/size.py LINES
"""

import ast
import sys
from pathlib import Path

LONGEST_FUNCTION = 45
# Per 100 lines that are neither blank nor a comment.
PAIRS, ONE_LINE_IFS = 2.0, 2.5

limit = int(sys.argv[1])
text = (Path(__file__).resolve().parent.parent / "train_graceful.py").read_text()
nodes = list(ast.walk(ast.parse(text)))
lines = text.splitlines()
code = sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
longest = max(functions, key=lambda one: one.end_lineno - one.lineno)
assignments = (node for node in nodes if isinstance(node, ast.Assign))
pairs = sum(
    isinstance(one.targets[0], ast.Tuple) and isinstance(one.value, ast.Tuple)
    for one in assignments
)
figures = {
    "lines": (len(lines), limit),
    f"lines of its longest function, {longest.name}": (
        longest.end_lineno - longest.lineno + 1,
        LONGEST_FUNCTION,
    ),
    "tuple assignments in 100 lines": (100 * pairs / code, PAIRS),
    "one-line ifs in 100 lines": (
        100 * sum(isinstance(one, ast.IfExp) for one in nodes) / code,
        ONE_LINE_IFS,
    ),
}
for what, (value, most) in figures.items():
    print(f"train_graceful.py: {value:,.4g} {what} (at most {most:,.4g})")
sys.exit(any(value > most for value, most in figures.values()))
