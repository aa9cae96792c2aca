"""Names that docstrings, comments and manuals state: `python -m tests.structure.stated_names` lists those of nothing.

A name is what stands between backticks and is an identifier or a dotted path of them; a dotted path that begins with
one of our packages; and a path of a Python file. It has to be a module, a definition or an attribute of ours, a name of
the protos, an identifier of the code, or a text of it outside of tests; `FOREIGN` lists names of other projects.

The beginning of a dotted path is looked up where a reader would: in the module itself, in the packages around it, in
the three packages, then among all modules and classes. Nothing is imported but the generated stubs.
"""

import ast
import builtins
import importlib
import io
import keyword
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.structure.rooms import PACKAGES, ROOT

FOLDERS: Final = (*PACKAGES, "migrations", "tests", "docs", "examples")
FOREIGN: Final = frozenset(
    {
        "CKA_ID",  # PKCS #11
        "CKM_ML_DSA",
        "CK_SIGN_ADDITIONAL_CONTEXT",
        "HASHLIB_GIL_MINSIZE",  # CPython
        "core_pattern",  # Linux, /proc/sys/kernel
        "commit_delay",  # PostgreSQL
        "commit_siblings",
        "cryptography.exceptions.InvalidSignature",
        "hash_algorithm",  # cryptography
        "PREFIX.ID.SECRET",  # the form of a token
        "tests/test_compute_delta.py",  # TensorFlow Privacy
        "torch.nn.Module",
        "Trainer.fit",  # Lightning
        "lightning.Trainer",
        "transformers.Trainer",  # Hugging Face
        "PeftModel",
        "peft.PeftModel",
        "keras.Model",
        "params.Dense_0.kernel",  # a leaf of a Flax model
        "asdict",  # dataclasses
        "F8_E4M3",  # safetensors
        "Context.node_config",  # Flower
        "Context.run_config",
        "Context.state",
        "client_fn",
        "flare.init",  # NVFLARE
        "model.current_round",
        "model.params",
        "v_t",  # of the formulas of Adam
    }
)
FILE_NAME: Final = re.compile(
    r".*\.(?:cfg|conf|css|db|dump|html|ini|jsonl?|js|key|md|npz|payloads|pem|png|proto|py|safetensors|sh|svg|toml|txt|ya?ml)"
)
QUOTED: Final = re.compile(r"(?<!`)`{1,2}([^`\n]+)`{1,2}(?!`)")
IDENTIFIERS: Final = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
OURS: Final = re.compile(rf"(?<![\w/.@-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+")
MADE_BY_PAGE: Final = re.compile(r"^# (\w+\.py)$", re.MULTILINE)
"""The first line of an example that becomes a file."""
PYTHON_FILE: Final = re.compile(r"(?<![\w/.-])[\w-]+(?:/[\w-]+)*\.py\b")


@dataclass(frozen=True, order=True)
class StaleName:
    """A stated name of nothing."""

    path: str
    line: int
    name: str

    def __str__(self) -> str:
        """Return it as a linter does."""
        return f"{self.path}:{self.line}: `{self.name}` is no name of ours"


@dataclass
class Definitions:
    """What a module or a class defines.

    Attributes:
        names: Definitions, assignments and imports.
        bases: Names of base classes; empty for a module.
        values: Arguments and local variables of a module's functions, of whatever type.
    """

    names: set[str] = field(default_factory=set)
    bases: tuple[str, ...] = ()
    values: set[str] = field(default_factory=set)


class Index:
    """Everything that a stated name may be.

    Args:
        root: The repository.
    """

    def __init__(self, root: Path) -> None:
        self.trees = {
            path: ast.parse(path.read_text())
            for folder in FOLDERS
            for path in sorted((root / folder).rglob("*.py"))
            if not re.search(r"_pb2(_grpc)?\.py$", path.name)
        }
        self.files = {str(path.relative_to(root)) for path in self.trees}
        self.modules: dict[str, Definitions] = {}
        self.by_last_name: dict[str, list[str]] = defaultdict(list)
        self.classes: dict[str, list[Definitions]] = defaultdict(list)
        self.words = {*dir(builtins), *keyword.kwlist, *sys.stdlib_module_names}
        self.test_words: set[str] = set()  # of strings in tests: known to tests only
        self.texts: set[str] = set()
        self.fields: set[str] = set()
        for path, tree in self.trees.items():
            self._add_module(module_name(path, root), tree)
        self._add_stubs(root)
        for settings in self.classes.get("ServerConfig", ()):
            self.words |= {f"QFLARE_{name.upper()}" for name in settings.names}

    def _add_module(self, name: str, tree: ast.Module) -> None:
        self.modules[name] = Definitions(
            names=defined(tree.body),
            values={node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
            | {
                node.id
                for node in ast.walk(tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            },
        )
        self.by_last_name[name.rpartition(".")[2]].append(name)
        self.words.update(name.split("."))
        prose = {id(node) for node, _ in bare_strings(tree)}
        is_test = name.startswith("tests.")
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self.classes[node.name].append(class_members(node))
            if not isinstance(node, ast.Constant):
                self.words.update(identifiers(node))
            elif isinstance(node.value, str) and id(node) not in prose:
                words = re.findall(r"\w+", node.value)
                (self.test_words if is_test else self.words).update(words)
                self.texts |= set() if is_test else {node.value}

    def _add_stubs(self, root: Path) -> None:
        """Add messages with their fields, services with their methods, and enums with their values."""
        for path in sorted((root / "protos" / "qflare" / "v1").glob("*.proto")):
            module = f"qflare.v1.{path.stem}_pb2"
            descriptor = importlib.import_module(module).DESCRIPTOR
            self.modules[module] = self.modules[f"{module}_grpc"] = Definitions()
            self.by_last_name[f"{path.stem}_pb2"].append(module)
            waiting = [*descriptor.message_types_by_name.values()]
            while waiting:
                message = waiting.pop()
                self.classes[message.name].append(Definitions({*message.fields_by_name}))
                self.texts.add(message.full_name)
                self.fields |= {*message.fields_by_name}
                waiting += message.nested_types
                self._add_enums(message.enum_types)
            self._add_enums(descriptor.enum_types_by_name.values())
            for service in descriptor.services_by_name.values():
                self.classes[service.name].append(Definitions({*service.methods_by_name}))
                self.texts |= {service.full_name, *(f"{m.full_name}" for m in service.methods)}
            self.words.update(re.findall(r"\w+", re.sub(r"//.*", "", path.read_text())))

    def _add_enums(self, enums: Iterator[object]) -> None:
        for enum in enums:
            self.texts.add(enum.full_name)  # type: ignore[attr-defined]
            self.classes[enum.name].append(Definitions({*enum.values_by_name}))  # type: ignore[attr-defined]

    def is_name(self, name: str, module: str) -> bool:
        """Return whether a name that a module or a page states is one.

        Args:
            name: An identifier or a dotted path.
            module: The module that states it; empty for a page.
        """
        if name in self.texts or name in FOREIGN:
            return True
        first, *rest = name.split(".")
        if not rest:
            return self._is_word(first) or (
                module.startswith("tests.") and first in self.test_words
            )
        scope = self.modules.get(module, Definitions())
        targets = list(self._modules_named(first, module))
        found = any(self._resolves(target, rest) for target in targets)
        found = found or any(self._in_class(each, rest) for each in self.classes.get(first, ()))
        if found:
            return True
        if first in self.fields and self.fields.issuperset(rest):
            return True
        instance_of = first.title().replace("_", "")
        if any(self._in_class(each, rest) for each in self.classes.get(instance_of, ())):
            return True
        if (targets or first in self.classes) and first not in scope.values:
            return first in scope.names - {target.rpartition(".")[2] for target in targets}
        return all(part in self.words for part in name.split("."))

    def _is_word(self, word: str) -> bool:
        """Return whether a word is an identifier, or the beginning of one up to an underscore."""
        return word in self.words or (
            word.endswith("_") and any(known.startswith(word) for known in self.words)
        )

    def _modules_named(self, first: str, module: str) -> Iterator[str]:
        """Yield the modules that the beginning of a dotted path may be, seen from a module."""
        around = module.split(".") if module else []
        scopes = [".".join(around[:count]) for count in range(len(around), 0, -1)]
        for scope in (*scopes, *PACKAGES):
            if f"{scope}.{first}" in self.modules:
                yield f"{scope}.{first}"
        if first in self.modules:
            yield first
        yield from self.by_last_name.get(first, ())

    def _resolves(self, module: str, rest: list[str]) -> bool:
        if not rest:
            return True
        if f"{module}.{rest[0]}" in self.modules:
            return self._resolves(f"{module}.{rest[0]}", rest[1:])
        if module.endswith(("_pb2", "_pb2_grpc")):
            return all(part in self.words for part in rest)
        if rest[0] not in self.modules[module].names:
            return False
        return len(rest) == 1 or any(
            self._in_class(each, rest[1:]) for each in self.classes.get(rest[0], ())
        )

    def _in_class(self, members: Definitions, rest: list[str]) -> bool:
        """Return whether a class has an attribute; bases that are not ours may have any known word."""
        if rest[0] in members.names:
            return all(part in self.words for part in rest[1:])
        for base in members.bases:
            known = self.classes.get(base)
            if known is None and base not in {
                "Protocol",
                "object",
                "Exception",
                "ABC",
                "NamedTuple",
            }:
                return rest[0] in self.words
            if any(self._in_class(each, rest) for each in known or ()):
                return True
        return False

    def is_file(self, name: str) -> bool:
        """Return whether a path or the end of one is a Python file of the repository."""
        return name in FOREIGN or any(
            path == name or path.endswith(f"/{name}") for path in self.files
        )


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a module."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def defined(body: list[ast.stmt]) -> set[str]:
    """Return the names that statements define, assign or import."""
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            names |= defined(
                [node for node in ast.walk(statement) if isinstance(node, ast.stmt)][1:]
            )
        else:
            names |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return names


def class_members(node: ast.ClassDef) -> Definitions:
    """Return what a class defines, attributes that its methods assign included."""
    names = defined(node.body)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            names.add(inner.attr)
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return Definitions(names, tuple(ast.unparse(base).rpartition(".")[2] for base in bases))


def identifiers(node: ast.AST) -> Iterator[str]:
    """Yield the identifiers that a node of a syntax tree itself holds."""
    for _, value in ast.iter_fields(node):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                yield from item.split(".")


def bare_strings(tree: ast.Module) -> Iterator[tuple[ast.Constant, str]]:
    """Yield the strings that stand alone: docstrings of modules, definitions and attributes."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            yield node.value, node.value.value


def prose_of_module(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the lines of docstrings and comments with their numbers."""
    for node, text in bare_strings(tree):
        yield from enumerate(text.splitlines(), node.lineno)
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def stated_names(line: str) -> Iterator[str]:
    """Yield the names that a line of prose states, but for Python files."""
    for quoted in QUOTED.findall(line):
        name = quoted.removesuffix("()")
        if IDENTIFIERS.fullmatch(name) and not FILE_NAME.fullmatch(name):
            yield name
    for match in OURS.finditer(QUOTED.sub(" ", line)):
        if not FILE_NAME.fullmatch(match[0]):
            yield match[0]


def stale_names(index: Index, module: str, line: str) -> list[str]:
    """Return the names of nothing in a line of prose of a module."""
    names = [name for name in stated_names(line) if not index.is_name(name, module)]
    return names + [name for name in PYTHON_FILE.findall(line) if not index.is_file(name)]


def stale_names_of_page(index: Index, line: str, examples: Collection[str]) -> list[str]:
    """Return the names of nothing in a line of a manual: dotted ones, and files that are not its examples."""
    names = [name for name in stated_names(line) if "." in name and not index.is_name(name, "")]
    files = [name for name in PYTHON_FILE.findall(line) if name not in examples]
    return names + [name for name in files if not index.is_file(name)]


def find_stale(root: Path = ROOT) -> list[StaleName]:
    """Return every stated name of nothing, in order."""
    index = Index(root)
    found = set()
    for path, tree in index.trees.items():
        module, where = module_name(path, root), str(path.relative_to(root))
        for number, line in prose_of_module(path, tree):
            found |= {StaleName(where, number, name) for name in stale_names(index, module, line)}
    texts = {path: path.read_text() for path in pages(root)}
    examples = {name for text in texts.values() for name in MADE_BY_PAGE.findall(text)}
    for path, text in texts.items():
        where = str(path.relative_to(root))
        for number, line in enumerate(text.splitlines(), 1):
            stale = stale_names_of_page(index, line, examples)
            found |= {StaleName(where, number, name) for name in stale}
    return sorted(found)


def pages(root: Path) -> Iterator[Path]:
    """Yield the manuals and the protos; the changelog may name what is gone."""
    yield root / "README.md"
    for folder, pattern in (("docs", "*.md"), ("tests", "*.md"), ("protos", "*.proto")):
        yield from sorted((root / folder).rglob(pattern))


if __name__ == "__main__":
    stale = find_stale()
    sys.stdout.writelines(f"{each}\n" for each in stale)
    sys.exit(bool(stale))
