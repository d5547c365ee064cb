"""Uploads in parts that nobody will finish: on S3 they stay, invisible and paid for, until somebody aborts them.

The client library can neither list nor abort uploads that it did not begin, so these two requests are made and signed here
(AWS Signature Version 4, docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html). Only with static keys
from the environment, and only for S3: other credentials and stores are left to the bucket's lifecycle rules.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree as ET

from supervisor.checkpoint.location import Remote
from supervisor.edge import clock

_MOST: Final = 1000  # uploads aborted at one start; the next one goes on
_EMPTY: Final = hashlib.sha256(b"").hexdigest()
_NAMESPACE: Final = re.compile(r"^\{[^}]*\}")


@dataclass(frozen=True)
class _Access:
    endpoint: str  # scheme and host
    base: str  # path of the bucket
    region: str
    key: str
    secret: str
    token: str | None


def abort_uploads(
    where: Remote,
    is_ours: Callable[[str], bool],
    *,
    timeout: float,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Abort what was begun below ``where`` and never completed, if ``is_ours`` says so of its name; how many.

    Precondition: nobody is uploading there now. 0 where it cannot be done. Raises OSError.
    """
    access = _access(where, environ)
    if access is None:
        return 0
    prefix = where.url.partition("://")[2].partition("/")[2]
    below = f"{prefix}/" if prefix else ""
    listed = _request(access, "GET", "", {"max-uploads": str(_MOST), "prefix": below, "uploads": ""}, timeout)
    aborted = 0
    for upload in ET.fromstring(listed):
        if _NAMESPACE.sub("", upload.tag) != "Upload":
            continue
        values = {_NAMESPACE.sub("", child.tag): child.text or "" for child in upload}
        key, upload_id = values.get("Key", ""), values.get("UploadId", "")
        if key.startswith(below) and upload_id and is_ours(key.removeprefix(below)):
            _request(access, "DELETE", key, {"uploadId": upload_id}, timeout)
            aborted += 1
    return aborted


def _access(where: Remote, environ: Mapping[str, str]) -> _Access | None:
    key, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if where.scheme != "s3" or not key or not secret:
        return None
    bucket = where.url.partition("://")[2].partition("/")[0]
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    given = (
        environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or environ.get("AWS_ENDPOINT")
    )
    endpoint = given.rstrip("/") if given else f"https://s3.{region}.amazonaws.com"
    return _Access(endpoint, f"/{bucket}", region, key, secret, environ.get("AWS_SESSION_TOKEN"))


def _request(access: _Access, method: str, key: str, query: Mapping[str, str], timeout: float) -> bytes:
    path = access.base + (f"/{quote(key)}" if key else "")
    words = "&".join(
        f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(query.items())
    )
    moment = datetime.fromtimestamp(clock.now(), UTC).strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": urlsplit(access.endpoint).netloc, "x-amz-content-sha256": _EMPTY, "x-amz-date": moment}
    if access.token:
        headers["x-amz-security-token"] = access.token
    names = ";".join(sorted(headers))
    canonical = "\n".join(
        [method, path, words, *(f"{name}:{headers[name]}" for name in sorted(headers)), "", names, _EMPTY]
    )
    scope = f"{moment[:8]}/{access.region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    signing = f"AWS4{access.secret}".encode()
    for word in scope.split("/"):
        signing = hmac.digest(signing, word.encode(), "sha256")
    signature = hmac.digest(
        signing, f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}".encode(), "sha256"
    ).hex()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={access.key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    request = urllib.request.Request(f"{access.endpoint}{path}?{words}", method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return bytes(answer.read())
