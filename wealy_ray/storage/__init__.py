"""One door to all storage: local disk, S3, and whatever fsspec opens.

`Storage` is small, picklable and thread-safe. It knows four things that matter to us:

* **Atomic**: a reader sees a whole file or none (local: temporary file and rename; object stores by nature).
* **Write if absent**: of several writers of one name exactly one succeeds (local: hard link; S3: `If-None-Match`).
* **Faults are sorted**: an object's own fault (`ObjectMissingError`, `ObjectForbiddenError`), a fault of the run
  (`StorageError`: bad credentials, missing bucket), and a passing fault, which is retried with back-off and
  ends as `TransientError`.
* **Secrets stay out of URIs**: credentials come from the usual environment or profile only.
"""

from wealy_ray.storage.access import Storage
from wealy_ray.storage.faults import ObjectForbiddenError, ObjectMissingError
from wealy_ray.storage.info import ObjectInfo
from wealy_ray.storage.uri import check_uri, join, scheme_of

__all__ = [
    "ObjectForbiddenError",
    "ObjectInfo",
    "ObjectMissingError",
    "Storage",
    "check_uri",
    "join",
    "scheme_of",
]
