"""python -m llama_fast: the llama-fast command."""

import sys

from .cli import main

sys.exit(main())
