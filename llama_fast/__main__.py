"""Run the llama-fast command: python -m llama_fast."""

import sys

from .cli import main

sys.exit(main())
