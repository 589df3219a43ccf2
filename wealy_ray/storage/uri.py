"""URIs: joining, schemes, and what is refused."""

from __future__ import annotations

import re

import fsspec

from wealy_ray.errors import ConfigError

S3_SCHEMES = ("s3", "s3a")


def join(base: str, *parts: str) -> str:
    """Joins a folder URI or path and names below it."""
    return "/".join([base.rstrip("/") if base.strip("/") else base, *(p.strip("/") for p in parts)])


def scheme_of(uri: str) -> str:
    """The URI's scheme; `file` for plain paths."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)", uri)
    return match.group(1).lower() if match else "file"


def lower_scheme(uri: str) -> str:
    """The URI with its scheme in lower case, as fsspec knows it."""
    scheme, sep, rest = uri.partition("://")
    return f"{scheme.lower()}{sep}{rest}" if sep else uri


def check_uri(uri: str) -> None:
    """Refuses URIs that nothing can open, and URIs that carry credentials.

    Raises:
        ConfigError: Unknown scheme, or `user:password@` in the URI (which is not repeated).
    """
    scheme = scheme_of(uri)
    if scheme == "file":
        return
    if _has_credentials(uri):
        raise ConfigError(
            f"a {scheme}:// URI carries credentials; remove them and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile, instead"
        )
    if re.search(r"[?&](X-Amz-Signature|X-Amz-Security-Token|Signature|sig|token)=", uri, re.I):
        raise ConfigError(
            f"a {scheme}:// URI carries a signature or token, which would end in files and logs; name the object "
            "without it, and give access through the environment"
        )
    if scheme not in fsspec.available_protocols():
        raise ConfigError(
            f"unknown URI scheme '{scheme}' in {uri}; use a path, s3:// or another fsspec scheme"
        )


def _has_credentials(uri: str) -> bool:
    """Whether a URI looks like `scheme://user:password@place`.

    A password may hold slashes (AWS secrets do), so a colon before the first slash counts as well, unless a
    port number follows it.
    """
    authority = re.sub(r"^[^/]+://", "", uri).split("/", 1)[0]
    if re.search(r":.*@", authority):
        return True
    return "://" in uri and re.fullmatch(r"\[.*\](:\d*)?|[^:]*(:\d*)?", authority) is None
