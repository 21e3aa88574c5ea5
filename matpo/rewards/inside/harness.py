"""Runs inside the code sandbox and nowhere else: looks at generated programs and runs tests on them. Standard library
only. Its text is sent to the sandbox, followed by a call of `main`."""

from __future__ import annotations

import ast
import io
import json
import signal
import sys
from types import FrameType

Facts = dict[str, bool | int | list[str]]

TIMEOUTS = 3
"""After so many tests that took too long the others count as failed."""
LONGEST_ERROR = 200
SHOWN_ERRORS = 3


class TooLong(BaseException):
    """A test took too long. Not an Exception, so that programs do not catch it in passing."""


def parsed(source: str) -> ast.Module | None:
    """The program's tree; None if it has none."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def function(trees: list[ast.Module | None], name: str) -> ast.FunctionDef | None:
    """The last top-level function of this name."""
    nodes = [node for tree in trees if tree is not None for node in tree.body]
    found = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name]
    return found[-1] if found else None


def returns(node: ast.FunctionDef | None) -> bool:
    """Whether it gives something back."""
    return node is not None and any(isinstance(n, ast.Return) and n.value is not None for n in ast.walk(node))


def is_call(node: ast.AST | None, name: str) -> bool:
    """Whether the node itself calls the function `name`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def ignored(main: ast.FunctionDef, helper: str) -> bool:
    """Every call of the helper stands alone, or its result goes into a name that is never read."""
    calls = sum(is_call(node, helper) for node in ast.walk(main))
    alone = sum(isinstance(node, ast.Expr) and is_call(node.value, helper) for node in ast.walk(main))
    read = {n.id for n in ast.walk(main) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    unread = sum(
        isinstance(node, ast.Assign)
        and is_call(node.value, helper)
        and all(isinstance(target, ast.Name) and target.id not in read for target in node.targets)
        for node in ast.walk(main)
    )
    return calls > 0 and alone + unread == calls


def thin(main: ast.FunctionDef, helper: str) -> bool:
    """Main only returns, or names and returns, what the helper gives back."""
    body = [n for n in main.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    if len(body) == 1 and isinstance(body[0], ast.Return):
        return is_call(body[0].value, helper)
    return (
        len(body) == 2
        and isinstance(body[0], ast.Assign)
        and is_call(body[0].value, helper)
        and isinstance(body[1], ast.Return)
        and isinstance(body[1].value, ast.Name)
        and [ast.unparse(target) for target in body[0].targets] == [body[1].value.id]
    )


def late(number: int, frame: FrameType | None) -> None:
    """Ends a test that takes too long."""
    raise TooLong


def attempt(program: str, space: dict[str, object], timeout_s: float) -> str | None:
    """Run it; None when all is well, else what went wrong."""
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        exec(compile(program, "<candidate>", "exec"), space)
    except TooLong:
        return "TooLong"
    except BaseException as error:  # noqa: BLE001 - whatever a generated program raises is its failure
        return f"{type(error).__name__}: {error}".removesuffix(": ")[:LONGEST_ERROR]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def run_tests(source: str, tests: list[str], timeout_s: float) -> list[str]:
    """What went wrong in each test that failed. What the program prints is dropped."""
    signal.signal(signal.SIGALRM, late)
    space: dict[str, object] = {"__name__": "candidate"}
    wrong = attempt(source, space, timeout_s)
    if wrong is not None:
        return [f"the program itself: {wrong}"] * len(tests)
    errors: list[str] = []
    timeouts = 0
    for test in tests:
        wrong = attempt(test, space, timeout_s) if timeouts < TIMEOUTS else "not run"
        timeouts += wrong == "TooLong"
        if wrong is not None:
            errors.append(f"{test[:LONGEST_ERROR]}: {wrong}")
    return errors


def facts(programs: list[str], tests: list[str], helper: str, main: str, timeout_s: float) -> Facts:
    """The fields of `matpo.rewards.code.Facts`. Tests run only if the programs have the function they need."""
    trees, source = [parsed(program) for program in programs], "\n\n".join(programs)
    helper_node, main_node = function(trees, helper), function(trees, main)
    testable = parsed(source) is not None and (not main or main_node is not None)
    errors = run_tests(source, tests, timeout_s) if testable else list(tests)
    calls = main_node is not None and any(is_call(node, helper) for node in ast.walk(main_node))
    return {
        "parses": parsed(source) is not None,
        "helper_returns": returns(helper_node),
        "main_defined": main_node is not None,
        "main_uses_helper": calls,
        "helper_ignored": main_node is not None and ignored(main_node, helper),
        "thin": main_node is not None and thin(main_node, helper),
        "passed": len(tests) - len(errors),
        "errors": errors[:SHOWN_ERRORS],
    }


def main(mark: str, programs: list[str], tests: list[str], helper: str, entry: str, timeout_s: float) -> None:
    """Print one line: the mark, which a program under test does not know, and the facts."""
    out = sys.stdout
    sys.stdout = sys.stderr = io.StringIO()
    found = facts(programs, tests, helper, entry, timeout_s)
    sys.stdout = out
    out.write(f"\n{mark} {json.dumps(found)}\n")
