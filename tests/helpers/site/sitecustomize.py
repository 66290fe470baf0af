"""What every Python that the tests start imports first (conftest.py puts this folder into its path).

Importing torch and Megatron makes millions of objects that stay; looking through them for garbage again and again takes
a third of the time.
"""

import gc

gc.set_threshold(100_000, 20, 20)
