"""A file of options, as YAML has it: a mapping, or one line that says what is wrong with it, and where."""

from __future__ import annotations

from pathlib import Path

from supervisor.errors import ConfigError


def mapping(file: Path) -> dict[object, object]:
    """What is in the file; an empty one is an empty mapping. Raises ConfigError that names the file."""
    import yaml

    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: {_problem(error)}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{file}: a mapping of options is required, not a {type(document).__name__}")
    return document


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
    return f"line {mark.line + 1}: {problem}" if mark is not None else f"not YAML: {problem}"
