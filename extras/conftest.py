"""Tests run on the CPU, on every machine; test_gpu.py gives the GPUs back to processes of its
own."""

import os

os.environ.setdefault(
    "TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all")
)  # before torch is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""
