"""The law of the floors, read from the imports; and what importing the library does not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Bottom up. A name is a file of jax_refusal/ or a folder with all its files; `__init__` is what
# `import jax_refusal` offers, and lies beside `api`. A new file has to be given a floor here.
FLOORS = (
    {"edits", "sites", "config", "fields", "files", "messages", "sharding"},
    {"models"},
    {"families"},
    {"checkpoints"},
    {"data"},
    {"runtime"},
    {"study", "evals"},
    {"report", "plan", "api", "__init__"},
    {"run"},
    {"organism"},
    {"launch"},
)
ALLOWED = {  # foreign package -> the places that may import it; None is everywhere
    "torch": ("launch.bench",),
    "transformers": ("jax_refusal.data.", "launch.bench"),
}
NOT_AT_IMPORT = ("transformers", "torch", "gguf", "tokenizers", "safetensors", "huggingface_hub")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of jax_refusal and launch."""
    found = {}
    for package in ("jax_refusal", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str) -> Iterator[tuple[str, int, bool]]:
    """What a module imports, wherever in the file, for types alone too: (dotted name, line, whether
    it happens when the module is imported)."""

    def walk(node: ast.AST, now: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, now) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}:{child.lineno}: a relative import"
                assert child.module is not None
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    yield inner if inner in modules() else child.module, child.lineno, now
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, now and not inside and not _for_types(child))

    yield from walk(ast.parse(modules()[name].read_text(encoding="utf-8")), True)


def _for_types(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`, whose imports count for the law and happen never."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def floor(name: str) -> int:
    package, _, rest = name.partition(".")
    own = "launch" if package == "launch" else rest.split(".")[0] or "__init__"
    for level, names in enumerate(FLOORS):
        if own in names:
            return level
    raise AssertionError(f"{name} has no floor: add {own!r} to FLOORS and to CONTRIBUTING.md.")


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name: str) -> None:
    upward = [
        f"line {line}: {imported}"
        for imported, line, _ in imports(name)
        if imported in modules() and floor(imported) > floor(name)
    ]
    assert not upward, f"{name} imports from a higher floor: {upward}"


def test_no_circle() -> None:
    """No file imports itself by way of others, inside a floor either."""
    graph = {
        name: {imported for imported, _, _ in imports(name) if imported in modules()}
        for name in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", modules())
def test_foreign_imports(name: str) -> None:
    """torch only in benchmarks; transformers in data/ and models/ (and benchmarks), when needed."""
    for imported, line, now in imports(name):
        package = imported.split(".")[0]
        place = f"{name}, line {line}: {imported}"
        allowed = ALLOWED.get(package)
        assert allowed is None or name.startswith(allowed), f"{place} is not allowed here"
        benchmark = name.startswith("launch.bench")
        assert benchmark or not (now and package in NOT_AT_IMPORT), f"{place} outside a function"


LONGEST = 60  # lines of a function of models/


@pytest.mark.parametrize("name", [name for name in modules() if ".models." in name])
def test_functions_of_models_are_short(name: str) -> None:
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    lines = {n.name: (n.end_lineno or n.lineno) - n.lineno + 1 for n in functions}
    long = {function: count for function, count in lines.items() if count > LONGEST}
    assert not long, f"{name} has functions of more than {LONGEST} lines: {long}"


def test_contributing_states_the_floors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.split("## The law of the floors")[1].split("```")[1]
    stated = [{name.strip() for name in level.split(",")} for level in block.split("→")]
    assert stated == [names - {"__init__"} for names in FLOORS]


IMPORT = """
import sys, time
import jax
start = time.process_time()
import jax_refusal
seconds = time.process_time() - start
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was started"
heavy = {"transformers", "torch", "gguf", "tokenizers", "safetensors", "matplotlib", "scipy.stats"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
for name in jax_refusal.__all__:
    getattr(jax_refusal, name)
print(seconds)
"""


def test_import_is_light() -> None:
    """Starts no device, loads none of the heavy packages, takes well under two seconds of CPU."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5  # seconds of this process beyond `import jax`
