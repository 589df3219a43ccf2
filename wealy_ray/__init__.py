"""wealy-ray: find recordings that share their lyrics, from audio alone, at corpus scale."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wealy_ray.model import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # torch is heavy: `import wealy_ray` must stay cheap
    if name == "load_model":
        from wealy_ray.model import load_model

        return load_model
    raise AttributeError(f"module 'wealy_ray' has no attribute '{name}'")
