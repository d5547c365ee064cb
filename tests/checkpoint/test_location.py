"""Places: paths and URLs, from the user's text and back to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.checkpoint.catalog import step_directory
from supervisor.checkpoint.location import Remote, is_url, located, parse
from supervisor.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://bucket/a//b/", "s3://bucket/a/b"),
        ("gs://bucket", "gs://bucket"),
        ("az://container/x/", "az://container/x"),
    ],
)
def test_urls(text: str, url: str) -> None:
    place = parse(text)
    assert place == Remote(url) == located(str(place))
    step = step_directory(place, 1200)
    assert str(step) == f"{url}/step-000001200"
    assert (step.name, step.parent) == ("step-000001200", place)


def test_paths() -> None:
    assert parse("a/b") == Path("a/b") == located("a/b")
    assert not is_url("/a/b")
    assert step_directory(Path("a"), 7) == Path("a/step-000000007")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://host/x", "allowed: a path, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"),
        ("s3://", "no bucket is named"),
        ("s3:///x", "no bucket is named"),
        ("s3://bucket/a/../b", "plain prefix"),
        ("s3://key:secret@bucket/a", "plain prefix"),
        ("s3://bucket/a?versionId=1", "plain prefix"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
