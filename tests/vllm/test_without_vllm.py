"""Tests of the plugin that need no vLLM."""

from __future__ import annotations

import subprocess
import sys

