"""What a run leaves behind: ``record.json``, checked against a schema, replaced in one piece at every change."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from filtrun.errors import RunFailure, UserError

SCHEMA = 1
FILE = "record.json"
STATUS = ("running", "finished", "failed", "interrupted")


@dataclass
class Record:
    """A run's record; `folder` is where it lies and is not part of it.

    `metrics` are named split/name: ``base/fid`` before training, ``tuned/fid`` after training, ``test/fid`` after the
    methods' `finish` (what the stored model does). `cost` counts scalars, bytes, seconds and floating-point operations.
    """

    folder: Path
    schema: int = SCHEMA
    status: str = "running"
    key: str = ""
    name: str = ""
    overrides: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    task: str = ""
    data: str = ""
    model: str = ""
    methods: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float | int | None] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values; numbers that are not finite become None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "folder"}
        return _finite(values)

    def write(self) -> None:
        """Check and replace ``record.json``. Raises RunFailure when the folder cannot be written."""
        values = self.to_dict()
        validate(values)
        path = self.folder / FILE
        work = path.with_name(f".{FILE}.{os.getpid()}")
        try:
            with work.open("w", encoding="utf-8") as stream:
                json.dump(values, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(work, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                work.unlink(missing_ok=True)
            raise RunFailure(f"{path} could not be written: {error.strerror or error}") from error

    @classmethod
    def read(cls, folder: Path | str) -> Record:
        """Read the record in `folder` (or the record file itself). Raises UserError when it is missing or broken."""
        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        if not path.exists():
            raise UserError(f"{folder} is no run folder: there is no {FILE} in it")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            validate(values)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no record of filtrun: {error}") from error
        return cls(folder=path.parent, **values)


def validate(values: dict[str, Any]) -> None:
    """Raise ValueError, naming the place, when `values` is no record."""
    errors = sorted(_validator().iter_errors(values), key=lambda e: list(map(str, e.path)))
    if errors:
        place = "/".join(map(str, errors[0].absolute_path)) or "record"
        raise ValueError(f"{place}: {errors[0].message}")


@functools.cache
def _validator() -> Any:
    import jsonschema

    schema = json.loads(resources.files("filtrun").joinpath("record.schema.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
