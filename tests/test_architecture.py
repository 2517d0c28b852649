"""The rooms of the package, and a few of its laws, read off the source, which is not run.

The checks are functions of a package directory; the tests at the end plant faults in a made-up
package and see them found.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

import gkdjax
import gkdjax.models
import gkdjax.teachers

PACKAGE = pathlib.Path(__file__).parents[1] / "gkdjax"

# A room imports only from rooms to its left; rooms of one place not from each other. A room is a
# folder or a file at the top of the package. "" is the package's own __init__.py.
ORDER = (
    ("utils", "losses"),
    ("types", "config"),
    ("parallel", "report"),
    ("models",),
    ("data",),
    ("teachers",),
    ("rollout", "evaluation"),
    ("train",),
    ("tools", "benchmarks", "main", ""),
)


DEEPEST = {"gkdjax.train.loop": 12}  # module -> most modules in a chain of imports below it
MOST_NAMES = 15  # at the top of the package, beside __init__.py, __main__.py and what is no Python


# Imports against the order that are still there: (importer, imported). May only shrink.
KNOWN: set[tuple[str, str]] = set()

# flax.nnx breaks with some jax releases; the others are oracles or would run foreign code.
FORBIDDEN = ("flax.nnx", "torch", "trl", "peft", "vllm", "pickle", "cloudpickle", "dill", "joblib")
FORBIDDEN_TRUE = ("allow_pickle", "trust_remote_code")
LOSSES_MAY_IMPORT = {"jax", "chex", "gkdjax"}  # beside the standard library
MOST_LINES = 500

# ("file.py", "source of the call") of each x.get(key, default) that is not a hidden default.
GET_WITH_DEFAULT: set[tuple[str, str]] = {
    # A type's name for an error message.
    ("config/parse.py", "{dict: 'dict'}.get(hint, getattr(hint, '__name__', str(hint)))"),
    # An unset environment variable and an empty one are the same.
    ("main.py", "os.environ.get('XLA_FLAGS', '')"),
    # A column that a row need not have.
    ("tools/make_quickstart/task.py", "row.get('prefix_messages', ())"),
}


def modules(package: pathlib.Path) -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every file; a folder's __init__.py has the folder's name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(
            file.read_text(), str(file)
        )
    return found


def imported_names(name: str, tree: ast.Module, is_folder: bool) -> set[str]:
    """Everything that a module imports, anywhere in it: `from a import b` gives "a.b"."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")
                above = above[: len(above) - node.level + is_folder]
                base = ".".join([*above, *filter(None, [base])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "flax.nnx":
            names.add("flax.nnx")
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            # importlib.import_module("...") and __import__("...")
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {n for n in names if isinstance(n, str)}


def import_graph(package: pathlib.Path) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports."""
    trees = modules(package)
    folders = {name for name in trees if any(other.startswith(name + ".") for other in trees)}
    graph = {}
    for name, tree in trees.items():
        edges = set()
        for imported in imported_names(name, tree, name in folders or "." not in name):
            if imported.split(".")[0] != package.name:
                continue
            while imported not in trees and "." in imported:  # a name inside a module
                imported = imported.rpartition(".")[0]
            edges.add(imported)
        graph[name] = edges - {name}
    return graph


def room_of(name: str) -> str:
    """gkdjax.data.views -> data; "" for the package itself."""
    return "".join(name.split(".")[1:2])


def layout_errors(
    package: pathlib.Path,
    order: tuple[tuple[str, ...], ...],
    known: set[tuple[str, str]] = frozenset(),
) -> list[str]:
    """One line for each file without a room, import from the right, stale entry, and circle."""
    graph = import_graph(package)
    place = {room: number for number, rooms in enumerate(order) for room in rooms}
    errors = [f"{name} is in no room" for name in graph if room_of(name) not in place]
    found = set()
    for name, edges in graph.items():
        for other in sorted(edges):
            here, there = room_of(name), room_of(other)
            if {here, there} <= place.keys() and here != there and place[there] >= place[here]:
                found.add((name, other))
    errors += [
        f"{name} imports {other}, which is not to its left" for name, other in sorted(found - known)
    ]
    errors += [
        f"{name} no longer imports {other}: take it from KNOWN"
        for name, other in sorted(known - found)
    ]
    circle = first_cycle(graph)
    return errors + ([f"circle: {' -> '.join(circle)}"] if circle else [])


def names_at_the_top(package: pathlib.Path) -> set[str]:
    """What can be imported from the package: its folders and files of Python."""
    files = {file.stem for file in package.glob("*.py") if not file.stem.startswith("__")}
    return files | {folder.name for folder in package.iterdir() if list(folder.glob("*.py"))}


def first_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        found = next(filter(None, map(visit, sorted(graph[name]))), None)
        path.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, graph)), None)


def longest_chain(graph: dict[str, set[str]], start: str) -> list[str]:
    """The longest way of imports down from a module, which is its first."""
    found: dict[str, list[str]] = {}

    def below(name):
        if name not in found:
            found[name] = [name, *max(map(below, sorted(graph[name])), key=len, default=[])]
        return found[name]

    return below(start)


def teacher_errors(package: pathlib.Path) -> list[str]:
    """One line for each question what kind of teacher it is, outside of the rooms that know."""
    errors = []
    for file in sorted(package.rglob("*.py")):
        where = file.relative_to(package)
        if where.parts[0] in ("teachers", "config"):
            continue
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if asks_what_teacher(node):
                errors.append(f"{where}:{node.lineno} asks what kind of teacher it is")
    return errors


def asks_what_teacher(node: ast.AST) -> bool:
    """isinstance(x, SomeTeacher), SERVERS, or a comparison of a .backend."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        return any(ast.unparse(n).endswith("Teacher") for n in ast.walk(node.args[1]))
    if isinstance(node, ast.Compare):
        sides = [ast.unparse(side).split(".")[-1] for side in (node.left, *node.comparators)]
        return "backend" in sides
    names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
    return "SERVERS" in names or getattr(node, "attr", getattr(node, "id", "")) == "SERVERS"


def law_errors(package: pathlib.Path, get_allowed: set[tuple[str, str]]) -> list[str]:
    """One line for each forbidden import or argument, default in a .get, and file too long."""
    errors = []
    for file in sorted(package.rglob("*.py")):
        where = str(file.relative_to(package))
        source = file.read_text()
        tree = ast.parse(source, str(file))
        for name in sorted(imported_names("", tree, False)):
            if any(f"{name}.".startswith(f"{bad}.") for bad in FORBIDDEN):
                errors.append(f"{where} imports {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                errors += [f"{where}:{node.lineno} {e}" for e in call_errors(node, where)]
        lines = source.count("\n")
        if lines >= MOST_LINES:
            errors.append(f"{where} has {lines} lines, the limit is {MOST_LINES}")
    return [e for e in errors if not any(is_about(e, *allowed) for allowed in get_allowed)]


def is_about(error: str, where: str, call: str) -> bool:
    return error.startswith(f"{where}:") and f" hides {call}:" in error


def call_errors(node: ast.Call, where: str) -> list[str]:
    errors = [
        f"sets {keyword.arg}"
        for keyword in node.keywords
        if keyword.arg in FORBIDDEN_TRUE and ast.unparse(keyword.value) != "False"
    ]
    called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    has_default = len(node.args) == 2 or any(k.arg == "default" for k in node.keywords)
    if called in ("get", "getenv") and has_default:
        errors.append(f"hides {ast.unparse(node)}: a default belongs into config.py")
    return errors


def test_a_room_imports_only_from_rooms_to_its_left():
    assert layout_errors(PACKAGE, ORDER, KNOWN) == []


def test_few_files_stand_below_the_loop():
    graph = import_graph(PACKAGE)
    for name, most in DEEPEST.items():
        chain = longest_chain(graph, name)
        assert len(chain) - 1 <= most, " -> ".join(chain)


def test_few_names_stand_at_the_top():
    assert len(names_at_the_top(PACKAGE)) <= MOST_NAMES


def test_laws():
    assert law_errors(PACKAGE, GET_WITH_DEFAULT) == []


def test_only_two_rooms_know_kinds_of_teachers():
    assert teacher_errors(PACKAGE) == []


def test_the_package_and_its_rooms_load_nothing_before_it_is_asked_for():
    probe = "import sys, gkdjax, gkdjax.models, gkdjax.teachers\n"
    probe += "sys.exit(bool({'jax', 'transformers', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=PACKAGE.parent)


def test_the_public_names_are_there():
    assert gkdjax.run.__module__ == "gkdjax.train.run"
    assert gkdjax.models.load_pretrained.__module__ == "gkdjax.models.hf.load"
    for name in gkdjax.teachers.__all__:
        assert getattr(gkdjax.teachers, name).__name__ == name
    for package in (gkdjax, gkdjax.models, gkdjax.teachers):
        with pytest.raises(AttributeError, match="nobody"):
            _ = package.nobody


def test_losses_need_jax_and_chex_only():
    for file in (PACKAGE / "losses").rglob("*.py"):
        names = imported_names("gkdjax.losses.x", ast.parse(file.read_text()), False)
        outside = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
        assert outside <= LOSSES_MAY_IMPORT, file
        assert all(n.startswith("gkdjax.losses") for n in names if n.startswith("gkdjax")), file


def test_the_allow_list_holds_nothing_stale():
    without = law_errors(PACKAGE, set())
    for where, call in GET_WITH_DEFAULT:
        assert any(is_about(error, where, call) for error in without), (where, call)


PLANTED = (("ground", "cellar"), ("middle",), ("roof", ""))


def plant(tmp_path: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    """A package "house" with these sources beside empty ones for the rest of it."""
    for name, source in ({"__init__": "", "ground": "", "roof": ""} | files).items():
        file = tmp_path / "house" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path / "house"


def test_a_sound_package_passes(tmp_path):
    files = {
        "roof": "import os\nfrom house import ground\nfrom house.middle import a\n",
        "middle/__init__": "",
        "middle/a": "from house.ground import x\nfrom . import b\n",
        "middle/b": "from .. import ground\n",
    }
    house = plant(tmp_path, files)
    assert layout_errors(house, PLANTED) == []
    assert names_at_the_top(house) == {"ground", "middle", "roof"}
    chain = ["house.roof", "house.middle.a", "house.middle.b", "house", "house.ground"]
    assert longest_chain(import_graph(house), "house.roof") in (chain, chain[:3] + chain[4:])
    assert law_errors(house, set()) == []


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"ground": "import house.roof"}, "house.ground imports house.roof, which"),
        ({"ground": "from house import roof"}, "house.ground imports house.roof, which"),
        ({"ground": "from . import roof"}, "house.ground imports house.roof, which"),
        (
            {"ground": "def f():\n    from house.middle import a", "middle/a": ""},
            "house.ground imports house.middle.a, which",
        ),
        (
            {"ground": "import importlib\nimportlib.import_module('house.roof')"},
            "house.ground imports house.roof, which",
        ),
        ({"middle/a": "from house.roof import thing"}, "house.middle.a imports house.roof, which"),
        (
            {"ground": "from house.cellar import thing", "cellar": ""},
            "house.ground imports house.cellar, which",
        ),
        (
            {"middle/a": "from house.middle import b", "middle/b": "from .a import x"},
            "circle: house.middle.a -> house.middle.b -> house.middle.a",
        ),
        ({"shed": ""}, "house.shed is in no room"),
    ],
)
def test_a_planted_layout_fault_is_found(tmp_path, files, wanted):
    errors = layout_errors(plant(tmp_path, {"middle/__init__": ""} | files), PLANTED)
    assert any(error.startswith(wanted) for error in errors), errors


def test_a_known_import_passes_until_it_is_gone(tmp_path):
    known = {("house.ground", "house.roof")}
    assert layout_errors(plant(tmp_path, {"ground": "import house.roof"}), PLANTED, known) == []
    (error,) = layout_errors(plant(tmp_path, {"ground": ""}), PLANTED, known)
    assert error == "house.ground no longer imports house.roof: take it from KNOWN"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("from flax import nnx", "imports flax.nnx"),
        ("import flax.nnx as n", "imports flax.nnx"),
        ("import flax\nflax.nnx.Module", "imports flax.nnx"),
        ("def f():\n    import torch.nn", "imports torch.nn"),
        ("from peft import LoraConfig", "imports peft.LoraConfig"),
        ("import pickle", "imports pickle"),
        ("d.get('key', 3)", "hides d.get('key', 3)"),
        ("os.environ.get('KEY', default='x')", "hides os.environ.get('KEY', default='x')"),
        ("os.getenv('KEY', 'x')", "hides os.getenv('KEY', 'x')"),
        ("np.load(f, allow_pickle=True)", "sets allow_pickle"),
        ("f(trust_remote_code=flag)", "sets trust_remote_code"),
        ("\n" * MOST_LINES, f"has {MOST_LINES} lines"),
    ],
)
def test_a_planted_breach_of_a_law_is_found(tmp_path, source, wanted):
    (error,) = law_errors(plant(tmp_path, {"roof": source}), set())
    assert error.startswith("roof.py")
    assert wanted in error


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(t, LocalTeacher)",
        "isinstance(t, (int, server.ServerTeacher))",
        "isinstance(t, A | Teacher)",
        "from house.config.checks import SERVERS",
        "checks.SERVERS",
        "if config.teacher.backend == 'flax': pass",
        "'vllm' != backend",
        "c.backend in names",
    ],
)
def test_a_planted_question_about_a_teacher_is_found(tmp_path, source):
    (error,) = teacher_errors(plant(tmp_path, {"roof": source}))
    assert error == "roof.py:1 asks what kind of teacher it is"
    fine = "isinstance(t, Hooks)\nx.backend = 'flax'\ncheck(x.backend)\nbackend_key == 'backend'\n"
    assert teacher_errors(plant(tmp_path, {"teachers/a": source, "roof": fine})) == []


def test_what_only_looks_like_a_breach_passes(tmp_path):
    source = (
        "d.get('key')\nrequests.get(url, timeout=3)\nimport torchless\n"
        "np.load(f, allow_pickle=False)\nimport flax.linen\n"
    )
    assert law_errors(plant(tmp_path, {"roof": source}), set()) == []


def test_an_allowed_get_passes_in_its_file_only(tmp_path):
    house = plant(tmp_path, {"roof": "d.get('key', 3)", "ground": "d.get('key', 3)"})
    (error,) = law_errors(house, {("roof.py", "d.get('key', 3)")})
    assert error.startswith("ground.py")
