"""The metadata of the package, and with -m slow the wheel that is built of it."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import autopar

ROOT = Path(__file__).parents[1]


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def test_the_metadata_is_that_of_the_package() -> None:
    found = project()
    assert found["version"] == autopar.__version__
    assert found["license"] == "Apache-2.0" and (ROOT / "LICENSE").read_text().strip().startswith("Apache License")
    assert not [line for line in found["classifiers"] if line.startswith("License ::")], "SPDX says it"
    assert found["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_what_messages_tell_to_install_there_is() -> None:
    """``pip install 'autopar[export]'``: an extra of that name."""
    extras = set(project()["optional-dependencies"])
    for folder in ("autopar", "docs", "tests", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".md"):
                for names in re.findall(r"autopar\[([\w,]+)\]", path.read_text(encoding="utf-8")):
                    assert set(names.split(",")) <= extras, f"{path.name} names the extras {names}"


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(tmp_path: Path) -> None:
    if find_spec("build") is None or find_spec("twine") is None:
        pytest.skip("pip install 'autopar[release]'")
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path), str(source)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "deprecat" not in (built.stdout + built.stderr).lower()
    files = [str(path) for path in tmp_path.glob("autopar-*")]
    assert len(files) == 2
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"autopar"}
    for name in ("autopar/passes/cut_stages.py", "autopar/models/llama.py", "autopar/py.typed"):
        assert name in names
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (place,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (place / "torch.pth").write_text(sysconfig.get_path("purelib"))  # torch and the rest are those of this environment
    look = "import autopar, autopar.models.llama; print(autopar.__file__)"
    found = subprocess.run([python, "-P", "-c", look], check=True, capture_output=True, text=True, env={}, cwd=tmp_path)
    assert str(tmp_path / "venv") in found.stdout
