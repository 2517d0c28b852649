"""The rooms of the package and a few of its laws, read off the source, with faults planted."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Set

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
MOST_NAMES = 15  # at the top of the package
MOST_LINES = 500
# flax.nnx breaks with some jax releases; the others are oracles or would run foreign code.
FORBIDDEN = ("flax.nnx", "torch", "trl", "peft", "vllm", "pickle", "cloudpickle", "dill", "joblib")
FORBIDDEN_TRUE = ("allow_pickle", "trust_remote_code")
LOSSES_MAY_IMPORT = {"jax", "chex", "gkdjax"}  # beside the standard library
# (file, source) of each x.get(key, default) that hides no default of the config.
ALLOWED_GETS = {
    ("main.py", "os.environ.get('XLA_FLAGS', '')"),  # unset and empty are the same
    ("tools/make_quickstart/task.py", "row.get('prefix_messages', ())"),
}


# (file, source) of each write that needs none of `utils.files`.
ALLOWED_WRITES = {
    # Into a directory that appears whole or not at all.
    ("models/hf/export.py", "shutil.copyfile(file, target)"),
    (
        "models/hf/export.py",
        "path.write_text(json.dumps(fields, indent=2, sort_keys=True) + '\\n')",
    ),
    ("models/hf/peft.py", "(directory / CONFIG).write_text(json.dumps(fields, indent=2) + '\\n')"),
    ("models/hf/writer.py", "path.open('wb')"),
    (
        "parallel/multihost.py",
        "shutil.copytree(workdir, own, ignore=shutil.ignore_patterns(*_NOT_COPIED))",
    ),
    ("parallel/multihost.py", "open(os.devnull, 'w')"),
    ("train/lock.py", "path.open('xb', buffering=0)"),  # only one of several processes makes it
    ("benchmarks/harness.py", "pathlib.Path('/proc/self/clear_refs').write_text('5')"),  # a switch
    # More rows than are kept in memory.
    ("benchmarks/rows.py", "(directory / 'train.jsonl').open('w')"),
    # What other processes print, and damage on purpose.
    ("benchmarks/soak.py", "(self.out / 'teacher.log').open('a')"),
    ("benchmarks/soak.py", "(self.out / 'flipped.log').open('a')"),
    ("benchmarks/soak.py", "log.open('w')"),
    ("benchmarks/soak.py", "path.write_bytes(data)"),
    ("benchmarks/soak_job.py", "log.open('a')"),
}


def sources(package: pathlib.Path) -> dict[str, ast.Module]:
    """Path in the package -> syntax tree."""
    files = sorted(package.rglob("*.py"))
    return {str(f.relative_to(package)): ast.parse(f.read_text(), str(f)) for f in files}


def imported_names(name: str, tree: ast.Module, is_folder: bool) -> set[str]:
    """All that a module imports, anywhere in it: `from a import b` gives "a.b"."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + is_folder]
            base = [*(above if node.level else []), *filter(None, [node.module])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "flax.nnx":
            names.add("flax.nnx")
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            names |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return names


def import_graph(package: pathlib.Path) -> dict[str, set[str]]:
    """Dotted module -> the package's modules that it imports; a folder stands for its __init__."""
    trees = {}
    for path, tree in sources(package).items():
        parts = (package.name, *pathlib.PurePath(path).with_suffix("").parts)
        is_folder = parts[-1] == "__init__"
        trees[".".join(parts[: len(parts) - is_folder])] = tree, is_folder
    graph = {}
    for name, (tree, is_folder) in trees.items():
        graph[name] = set()
        for imported in imported_names(name, tree, is_folder):
            while imported not in trees and "." in imported:  # a name inside a module
                imported = imported.rpartition(".")[0]
            graph[name] |= {imported} & trees.keys() - {name}
    return graph


def room_of(name: str) -> str:
    return "".join(name.split(".")[1:2])


def layout_errors(package: pathlib.Path, order: tuple[tuple[str, ...], ...]) -> list[str]:
    """One line for each file without a room, each import not from the left, and a circle."""
    graph = import_graph(package)
    place = {room: number for number, rooms in enumerate(order) for room in rooms}
    errors = [f"{name} is in no room" for name in graph if room_of(name) not in place]
    for name, edges in graph.items():
        for other in sorted(edges):
            here, there = room_of(name), room_of(other)
            if {here, there} <= place.keys() and here != there and place[there] >= place[here]:
                errors.append(f"{name} imports {other}, which is not to its left")
    try:
        for name in graph:
            longest_chain(graph, name)
    except RecursionError:
        errors.append("imports go in a circle")
    return errors


def longest_chain(graph: dict[str, set[str]], start: str) -> list[str]:
    """The longest way of imports down from a module, which is its first."""
    found: dict[str, list[str]] = {}

    def below(name):
        if name not in found:
            found[name] = [name, *max(map(below, sorted(graph[name])), key=len, default=[])]
        return found[name]

    return below(start)


def asks_what_teacher(node: ast.AST) -> bool:
    """isinstance(x, SomeTeacher), SERVERS, or a comparison of a .backend."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        return any(ast.unparse(n).endswith("Teacher") for n in ast.walk(node.args[1]))
    if isinstance(node, ast.Compare):
        sides = [ast.unparse(side).split(".")[-1] for side in (node.left, *node.comparators)]
        return "backend" in sides
    names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
    return "SERVERS" in names or getattr(node, "attr", getattr(node, "id", "")) == "SERVERS"


def writes_a_file(call: ast.Call) -> bool:
    """Path.write_text(...), shutil.copyfile(...), open(..., "w"), but not files.write_text(...)."""
    if not isinstance(call.func, ast.Attribute | ast.Name):
        return False
    called = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if called == "open":
        modes = call.args[isinstance(call.func, ast.Name) :][:1]
        modes += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
        return any(isinstance(m, ast.Constant) and {*str(m.value)} & {*"wax"} for m in modes)
    if called in ("copy", "move", "copy2", "copyfile", "copytree"):
        return owner == "shutil"
    return called in ("write_text", "write_bytes") and owner not in ("", "files")


def law_errors(
    package: pathlib.Path,
    allowed_gets: Set[tuple[str, str]] = frozenset(),
    allowed_writes: Set[tuple[str, str]] = frozenset(),
) -> list[str]:
    """One line for each breach of a law in a file, and each allowed call that is not there."""
    errors, gets, writes = [], set(), set()
    for path, tree in sources(package).items():
        for name in sorted(imported_names("", tree, False)):
            if any(f"{name}.".startswith(f"{bad}.") for bad in FORBIDDEN):
                errors.append(f"{path} imports {name}")
        for node in ast.walk(tree):
            if not path.startswith(("teachers/", "config/")) and asks_what_teacher(node):
                errors.append(f"{path}:{node.lineno} asks what kind of teacher it is")
            if not isinstance(node, ast.Call):
                continue
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_TRUE and ast.unparse(keyword.value) != "False":
                    errors.append(f"{path} sets {keyword.arg}")
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            has_default = len(node.args) == 2 or any(k.arg == "default" for k in node.keywords)
            if called in ("get", "getenv") and has_default:
                gets.add((path, ast.unparse(node)))
            if not path.startswith("utils/") and writes_a_file(node):
                writes.add((path, ast.unparse(node)))
        lines = (package / path).read_text().count("\n")
        if lines >= MOST_LINES:
            errors.append(f"{path} has {lines} lines")
    errors += [f"{path} hides a default: {call}" for path, call in sorted(gets - allowed_gets)]
    errors += [f"{path} writes by itself: {call}" for path, call in sorted(writes - allowed_writes)]
    missing = (allowed_gets - gets) | (allowed_writes - writes)
    return errors + [f"{path} has no {call}" for path, call in sorted(missing)]


def test_the_package_keeps_its_order_and_laws():
    assert layout_errors(PACKAGE, ORDER) == []
    assert law_errors(PACKAGE, ALLOWED_GETS, ALLOWED_WRITES) == []
    graph = import_graph(PACKAGE)
    for name, most in DEEPEST.items():
        chain = longest_chain(graph, name)
        assert len(chain) - 1 <= most, " -> ".join(chain)
    assert len({room_of(name) for name in graph} - {""}) <= MOST_NAMES


def test_losses_need_jax_and_chex_only():
    for path, tree in sources(PACKAGE / "losses").items():
        names = imported_names("gkdjax.losses.x", tree, False)
        outside = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
        assert outside <= LOSSES_MAY_IMPORT, path
        assert all(n.startswith("gkdjax.losses") for n in names if n.startswith("gkdjax")), path


def test_the_package_and_its_rooms_load_nothing_before_it_is_asked_for():
    """In a process of its own, as this one has loaded everything."""
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


def plant(tmp_path: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    """A package "house" with these sources beside empty ones for the rest of it."""
    for name, source in ({"__init__": "", "ground": "", "roof": ""} | files).items():
        file = tmp_path / "house" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path / "house"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"ground": "import house.roof"}, "house.ground imports house.roof, which"),
        ({"ground": "def f():\n    from . import roof"}, "house.ground imports house.roof, which"),
        ({"ground": "import_module('house.roof')"}, "house.ground imports house.roof, which"),
        ({"middle/a": "from house.roof import x"}, "house.middle.a imports house.roof, which"),
        ({"ground": "from house.cellar import x", "cellar": ""}, "house.ground imports house.cell"),
        ({"middle/a": "from . import b", "middle/b": "from .a import x"}, "imports go in a circle"),
        ({"shed": ""}, "house.shed is in no room"),
        ({"roof": "from house.middle.a import x", "middle/a": "from .. import ground"}, ""),
    ],
)
def test_a_planted_layout_fault_is_found(tmp_path, files, wanted):
    house = plant(tmp_path, {"middle/__init__": ""} | files)
    errors = layout_errors(house, (("ground", "cellar"), ("middle",), ("roof", "")))
    assert [error[: len(wanted)] for error in errors] == [wanted] * bool(wanted)
    if not wanted:
        chain = longest_chain(import_graph(house), "house.roof")
        assert chain == ["house.roof", "house.middle.a", "house.ground"]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("from flax import nnx", "imports flax.nnx"),
        ("import flax\nflax.nnx.Module", "imports flax.nnx"),
        ("def f():\n    import torch.nn", "imports torch.nn"),
        ("import pickle", "imports pickle"),
        ("d.get('key', 3)", "hides a default: d.get('key', 3)"),
        ("os.getenv('KEY', default='x')", "hides a default: os.getenv('KEY', default='x')"),
        ("np.load(f, allow_pickle=True)", "sets allow_pickle"),
        ("f(trust_remote_code=flag)", "sets trust_remote_code"),
        ("path.write_text('x')", "writes by itself: path.write_text('x')"),
        ("(path / 'a').write_bytes(b'x')", "writes by itself: (path / 'a').write_bytes(b'x')"),
        ("path.open('a')", "writes by itself: path.open('a')"),
        ("with open(path, mode='xb') as file: pass", "writes by itself: open(path, mode='xb')"),
        ("shutil.copyfile(a, b)", "writes by itself: shutil.copyfile(a, b)"),
        ("\n" * MOST_LINES, f"has {MOST_LINES} lines"),
        ("isinstance(t, (int, server.ServerTeacher))", "asks what kind"),
        ("checks.SERVERS", "asks what kind"),
        ("if config.teacher.backend == 'flax': pass", "asks what kind"),
        ("c.backend in names", "asks what kind"),
    ],
)
def test_a_planted_breach_of_a_law_is_found(tmp_path, source, wanted):
    (error,) = law_errors(plant(tmp_path, {"roof": source}))
    assert error.startswith("roof.py") and wanted in error


def test_what_only_looks_like_a_breach_passes(tmp_path):
    source = (
        "d.get('key')\nrequests.get(url, timeout=3)\nimport torchless\n"
        "np.load(f, allow_pickle=False)\nimport flax.linen\n"
        "files.write_text(path, 'x')\nwrite_bytes(path, b'x')\na.copy()\n"
        "open(path)\npath.open('rb')\n"
        "isinstance(t, Hooks)\nx.backend = 'flax'\nbackend_key == 'backend'\nd.get('key', 3)"
    )
    house = plant(tmp_path, {"roof": source, "teachers/a": "checks.SERVERS"})
    assert law_errors(house, {("roof.py", "d.get('key', 3)")}) == []
    (error,) = law_errors(plant(tmp_path, {"roof": ""}), {("roof.py", "d.get('key', 3)")})
    assert error == "roof.py has no d.get('key', 3)"
