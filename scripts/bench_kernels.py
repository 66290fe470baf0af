"""The same as ``python scripts/bench kernels``."""

from bench.kernels import main

if __name__ == "__main__":
    main()
