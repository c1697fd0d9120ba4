"""The public face of the package."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import prunewise


@pytest.mark.parametrize("name", prunewise.__all__)
def test_public_name_resolves(name):
    assert getattr(prunewise, name) is not None


@pytest.mark.parametrize("name", [name for name in prunewise.__all__ if not name.startswith("_")])
def test_public_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(prunewise, name))


def test_names_for_type_checkers_are_the_public_names():
    tree = ast.parse(Path(prunewise.__file__).read_text(encoding="utf-8"))
    typed = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prunewise.")
        for alias in node.names
    }
    resolved = {
        f"prunewise.{prunewise._HOME.get(name, 'core.errors')}.{name}"
        for name in prunewise.__all__
        if name != "__version__"
    }
    assert typed == resolved


def test_error_classes_share_one_base():
    errors = [getattr(prunewise, name) for name in prunewise.__all__ if name.endswith("Error")]
    assert len(errors) >= 10
    assert all(issubclass(error, prunewise.PrunewiseError) for error in errors)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'mesure'"):
        prunewise.mesure  # noqa: B018


def test_dir_lists_the_public_names():
    assert set(prunewise.__all__) <= set(dir(prunewise))


def test_version_is_the_distribution_s():
    assert prunewise.__version__ == importlib.metadata.version("prunewise")


def test_package_is_typed():
    assert (Path(prunewise.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("statement", ["import prunewise", "import prunewise.cli.main"])
def test_import_leaves_heavy_modules_alone(statement):
    script = f"{statement}; import sys; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
