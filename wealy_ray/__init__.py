"""wealy-ray: find recordings that share their lyrics, from audio alone, at corpus scale."""

__version__ = "0.1.0"
