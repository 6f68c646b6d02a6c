"""README stays true: its example is the one the tests run, its commands name what exists."""

from __future__ import annotations

import re
from pathlib import Path

from filtrun.catalogue import entries
from filtrun.cli import VERBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_is_the_tested_package() -> None:
    example = ROOT / "tests" / "e2e" / "example"
    code = re.search(r"```python\n# mypkg/parts.py\n(.*?)```", README, re.S)
    yaml = re.search(r"```yaml\n# my_conf/method/noisy_head.yaml\n(.*?)```", README, re.S)
    assert code and yaml
    shown = code.group(1)
    tested = (example / "mypkg" / "parts.py").read_text(encoding="utf-8")
    method = shown[shown.index("@dataclass") :].strip()
    assert method in tested
    imports = shown[: shown.index("@dataclass")].strip().splitlines()
    assert all(line in tested for line in imports if line)
    assert yaml.group(1).strip() in (example / "conf" / "method" / "noisy_head.yaml").read_text(encoding="utf-8")


def test_commands_name_what_exists() -> None:
    names = {kind: {e.name for e in entries(kind)} for kind in ("methods", "models", "data", "tasks")}
    lines = [line.strip() for line in README.splitlines() if line.strip().startswith(("filtrun ", "| filtrun"))]
    assert len(lines) > 10
    for line in lines:
        for group, kind in (("method", "methods"), ("model", "models"), ("data", "data"), ("task", "tasks")):
            for value in re.findall(rf"(?<![\w.]){group}=([\w\[\],]+)", line):
                for name in value.strip("[]").split(","):
                    assert name in names[kind] | {"noisy_head"}, line
        word = line.split()[1] if len(line.split()) > 1 else ""
        if word.isalpha():
            assert word in VERBS, line
