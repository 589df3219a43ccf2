"""`python -m wealy_ray` is `wealy`."""

from wealy_ray.cli import main

if __name__ == "__main__":
    main()
