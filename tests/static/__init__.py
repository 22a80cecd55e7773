import os

EVERY_CHIP = os.environ.get("LLAMA_FAST_TEST_EVERY_CHIP") == "1"  # make test-static
