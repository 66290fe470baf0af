import sys

from mindspeed_cp.doctor import main

if __name__ == "__main__":
    sys.exit(main())
