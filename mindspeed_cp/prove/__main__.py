import sys

from mindspeed_cp.prove import main

if __name__ == "__main__":
    sys.exit(main())
