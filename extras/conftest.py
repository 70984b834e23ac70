"""Tests run on the CPU. test_gpu.py gives the GPUs back to processes of its own."""

import os

# Before torch is imported.
os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
