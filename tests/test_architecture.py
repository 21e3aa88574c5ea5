"""The arrows between rooms, checked on the sources themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "protocols": set(),
    "matpo": {"protocols"},
    "actors": {"protocols", "matpo"},
    "learner": {"protocols", "matpo"},
    "tool_servers": set(),
}
TORCH_ROOMS = ("matpo/objective/", "learner/trainer/", "learner/warmstart/", "actors/engines/embedded/")
TORCH_FILES = ("learner/smollm2.py", "actors/engines/sglang/sender.py")
LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def sources() -> list[Path]:
    return sorted(file for room in MAY_IMPORT for file in (ROOT / room).rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Full names of the modules a file imports at any level."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} uses a relative import"
            yield node.module or ""


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_rooms_import_only_what_the_architecture_allows() -> None:
    broken = [
        f"{name(file)} imports {module}"
        for file in sources()
        for module in imports(file)
        if (room := module.split(".")[0]) in MAY_IMPORT
        and room != (own := name(file).split("/")[0])
        and room not in MAY_IMPORT[own]
    ]
    assert broken == []


def test_tool_servers_do_not_import_each_other() -> None:
    servers = {folder.name for folder in (ROOT / "tool_servers").iterdir() if (folder / "__main__.py").is_file()}
    broken = [
        f"{name(file)} imports {module}"
        for file in sources()
        for module in imports(file)
        if (parts := module.split("."))[0] == "tool_servers"
        and parts[1] in servers
        and parts[:2] != name(file).split("/")[:2]
    ]
    assert servers == {"code", "scrape", "search"}
    assert broken == []


def test_torch_stays_in_its_rooms() -> None:
    broken = [
        name(file)
        for file in sources()
        if any(module.split(".")[0] == "torch" for module in imports(file))
        and not name(file).startswith(TORCH_ROOMS)
        and name(file) not in TORCH_FILES
    ]
    assert broken == []


def test_only_the_channel_and_its_sockets_import_zmq() -> None:
    users = {name(file) for file in sources() if any(module.split(".")[0] == "zmq" for module in imports(file))}
    assert users == {"protocols/channel.py", "protocols/sockets.py"}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = {name(file).removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in sources()}
    arrows = {module: {other for other in imports(file) if other in modules} for module, file in modules.items()}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in sorted(arrows[module] - {module}):
                walk(other, (*path, module))
            done.add(module)

    for module in sorted(modules):
        walk(module, ())


def test_package_files_are_empty() -> None:
    assert [name(f) for f in sources() if f.name == "__init__.py" and f.read_text().strip()] == []


def test_no_file_is_longer_than_the_budget() -> None:
    assert [name(f) for f in sources() if len(f.read_text().splitlines()) > LONGEST_FILE] == []


def test_no_function_is_longer_than_the_budget() -> None:
    broken = [
        f"{name(file)}:{node.lineno} {node.name} has {length} lines"
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert broken == []


def test_no_task_is_started_outside_a_task_group_and_nothing_is_pickled() -> None:
    forbidden = {"ensure_future", "recv_pyobj", "send_pyobj"}
    ownerless = re.compile(r"(asyncio|.*loop|.*loop\(\))\.create_task")
    broken = [
        f"{name(file)}:{node.lineno} calls {called}"
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ((called := ast.unparse(node.func)).split(".")[-1] in forbidden or ownerless.fullmatch(called))
    ]
    pickled = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    pickles = [name(file) for file in sources() if any(m.split(".")[0] in pickled for m in imports(file))]
    assert broken + pickles == []


def test_files_are_read_as_data_and_never_run() -> None:
    """No reader that unpickles, no `eval`, no code out of a model's folder."""
    unsafe = {"torch.load", "torch.jit.load", "np.load", "numpy.load", "yaml.load", "eval", "exec", "hub.load"}
    broken = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            by_any_name = (
                re.fullmatch(r"Auto\w+\.from_pretrained", called) and given.get("trust_remote_code") != "False"
            )
            if called in unsafe or by_any_name or given.get("trust_remote_code", "False") != "False":
                broken.append(f"{name(file)}:{node.lineno} calls {called}")
    # These run generated code, inside the sandbox.
    allowed = {"tool_servers/code/inside/worker.py", "matpo/rewards/inside/harness.py"}
    assert [found for found in broken if found.split(":")[0] not in allowed] == []
